"""The codes of some images for TensorBoard's Projector, which lays them out in space with the images themselves."""

import io
from pathlib import Path

import numpy as np
import tensorflow as tf
from google.protobuf import text_format
from tensorboard.plugins import projector

from dae.workdir.workdir import write

# Relative paths: the folder may be moved.
CONFIG = "projector_config.pbtxt"
CODES, LABELS, SPRITE = "projector/codes.tsv", "projector/labels.tsv", "projector/sprite.png"


def write_codes(folder: Path, codes: np.ndarray, images: np.ndarray, labels: np.ndarray | None) -> None:
    """Writes to `folder`, a run of TensorBoard's, what the Projector shows.

    `codes` are [N, ...], flattened; `images` float32 [N, H, W, C] in [0, 1]; `labels` whole numbers [N], if any.
    """
    (folder / CODES).parent.mkdir(exist_ok=True)
    config = projector.ProjectorConfig()
    shown = config.embeddings.add(tensor_name="code", tensor_path=CODES)
    table = io.StringIO()
    np.savetxt(table, codes.reshape(len(codes), -1), fmt="%.6g", delimiter="\t")
    write(folder / CODES, table.getvalue())
    if labels is not None:
        shown.metadata_path = LABELS
        write(folder / LABELS, "".join(f"{label}\n" for label in labels))
    shown.sprite.image_path = SPRITE
    shown.sprite.single_image_dim.extend([images.shape[2], images.shape[1]])
    write(folder / SPRITE, _sprite(images))
    write(folder / CONFIG, text_format.MessageToString(config))


def _sprite(images: np.ndarray) -> bytes:
    """One PNG of all images, row by row in a square of places, as the Projector wants it."""
    count, height, width, channels = images.shape
    side = int(np.ceil(np.sqrt(count)))
    places = np.zeros((side * side, height, width, 3), np.float32)
    places[:count] = images if channels == 3 else np.repeat(images[..., :1], 3, axis=-1)
    sheet = places.reshape(side, side, height, width, 3).swapaxes(1, 2).reshape(side * height, side * width, 3)
    return tf.io.encode_png(np.rint(255 * sheet).astype(np.uint8)).numpy()
