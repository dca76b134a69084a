"""What an epoch trains on: images, or patches of them."""

import numpy as np

from dae.config import RunConfig
from dae.data.images import Images


def examples_per_epoch(images: Images, config: RunConfig) -> int:
    """Return the number of examples that an epoch trains on: images, or with `config.patch_size` patches of them."""
    return int(examples_per_image(images, config).sum())


def examples_per_image(images: Images, config: RunConfig) -> np.ndarray:
    """Return the number of examples of each image, int64 [N]: with patches, as many as its area has, at least one."""
    if config.patch_size is None:
        return np.ones(len(images), np.int64)
    return np.maximum(1, images.shapes.prod(axis=1) // config.patch_size**2)


def example_shape(images: Images, config: RunConfig) -> tuple[int, int, int]:
    """Return the (H, W, C) of one example: of an image, or with `config.patch_size` of a patch."""
    if config.patch_size is None:
        return images.image_shape
    return config.patch_size, config.patch_size, images.channels
