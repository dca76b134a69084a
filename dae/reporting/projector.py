"""The latents of some images for TensorBoard's Projector, which arranges them in space with the images themselves."""

import io
from pathlib import Path

import numpy as np
import tensorflow as tf
from google.protobuf import text_format
from tensorboard.plugins import projector

from dae.workdir.files import atomic_write

# Relative paths, so that the folder can be moved.
CONFIG = "projector_config.pbtxt"
LATENTS, LABELS, SPRITE = "projector/latents.tsv", "projector/labels.tsv", "projector/sprite.png"


def write_latents(folder: Path, latents: np.ndarray, images: np.ndarray, labels: np.ndarray | None) -> None:
    """Write what the Projector shows to `folder`, which TensorBoard takes for a run.

    `latents` are [N, ...], and flattened; `images` are float32 [N, H, W, C] in [0, 1]; `labels` are integers [N], if
    any.
    """
    (folder / LATENTS).parent.mkdir(exist_ok=True)
    config = projector.ProjectorConfig()
    embedding = config.embeddings.add(tensor_name="latents", tensor_path=LATENTS)
    table = io.StringIO()
    np.savetxt(table, latents.reshape(len(latents), -1), fmt="%.6g", delimiter="\t")
    atomic_write(folder / LATENTS, table.getvalue())
    if labels is not None:
        embedding.metadata_path = LABELS
        atomic_write(folder / LABELS, "".join(f"{label}\n" for label in labels))
    embedding.sprite.image_path = SPRITE
    embedding.sprite.single_image_dim.extend([images.shape[2], images.shape[1]])
    atomic_write(folder / SPRITE, _sprite(images))
    atomic_write(folder / CONFIG, text_format.MessageToString(config))


def _sprite(images: np.ndarray) -> bytes:
    """Return one PNG with all images in a square grid, as the Projector expects it."""
    count, height, width, channels = images.shape
    side = int(np.ceil(np.sqrt(count)))
    cells = np.zeros((side * side, height, width, 3), np.float32)
    cells[:count] = images if channels == 3 else np.repeat(images[..., :1], 3, axis=-1)
    sheet = cells.reshape(side, side, height, width, 3).swapaxes(1, 2).reshape(side * height, side * width, 3)
    return tf.io.encode_png(np.rint(255 * sheet).astype(np.uint8)).numpy()
