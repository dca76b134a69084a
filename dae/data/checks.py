"""Whether the images of a data set fit together and are plausible, and a line about them for the user."""

from collections.abc import Collection

import numpy as np

from dae.config import RunConfig
from dae.data.images import Images, value_range
from dae.data.layout import TRAIN
from dae.errors import UsageError

# A brightest value of at most this share of white is taken for a mistake about which value is white.
NEARLY_BLACK = 0.25


def check_same_kind(images: Images, train: Images, part: str, config: RunConfig, name: str) -> None:
    """Raise UsageError if the images of a part differ in kind from those to train on, or are too small for patches."""
    kinds = [f"{one.channels} channels" if config.patch_size else f"shape {one.image_shape}" for one in (train, images)]
    kinds = [f"{kind} and type {one.pixels.dtype}" for kind, one in zip(kinds, (train, images), strict=True)]
    if kinds[0] != kinds[1]:
        raise UsageError(f"{name}: expected images of one kind, got {TRAIN} of {kinds[0]}, and {part} of {kinds[1]}")
    if config.patch_size is not None and part == TRAIN and images.shapes.min() < config.patch_size:
        height, width = images.shapes[images.shapes.min(axis=1).argmin()]
        raise UsageError(
            f"--patch-size: {config.patch_size} exceeds the size of an image of {name}, {height} x {width}; expected "
            f"at most {min(height, width)}"
        )


def check_brightness(parts: Collection[Images], config: RunConfig, name: str) -> None:
    """Raise UsageError if all images are nearly black, unless `config` says which value is white."""
    low, white = value_range(next(iter(parts)), config.value_range)
    brightest = max(float(images.clean_range[1]) for images in parts if len(images))
    if config.value_range is None and brightest <= NEARLY_BLACK * white:
        likely = 2 ** int(brightest).bit_length() - 1 if brightest >= 1 else brightest
        guess = f"{low:g} {likely:g} if {likely:g} is white, or --value-range " if likely > low else ""
        raise UsageError(
            f"{name}: nearly black: the largest value is {brightest:g}, but white is {white:g}; add --value-range "
            f"{guess}{low:g} {white:g} if the images are so dark"
        )


def check_values(images: Images, part: str, config: RunConfig, name: str) -> None:
    """Raise UsageError if values of clean images lie outside their range, or those of noisy ones that are clipped."""
    if not len(images):
        return
    # In the precision of the pixels, of which none exceeds --value-range 0 0.1 by its rounding.
    low, high = map(np.float32, value_range(images, config.value_range))
    darkest, brightest = images.clean_range
    if not low <= darkest <= brightest <= high:  # also for NaN
        raise UsageError(
            f"{name}: {part} has values from {darkest:g} to {brightest:g}, but black is {low:g} and white {high:g}; "
            "--value-range sets others"
        )
    if images.is_paired:
        noisy = images.pixels[..., images.channels :]
        least, most = noisy.min(), noisy.max()
        if not np.isfinite([least, most]).all() or (config.clip_noise and not low <= least <= most <= high):
            raise UsageError(
                f"{name}: {part} has noisy values from {least:g} to {most:g}, but black is {low:g} and white {high:g}; "
                "--value-range sets others, and --no-clip-noise allows any finite ones"
            )


def describe(images: Images, part: str) -> str:
    """Return a line for the user about the images of a part: their number, sizes, type and range."""
    if not len(images):
        return f"{part}: no images"
    areas = images.shapes.prod(axis=1)
    sizes = [f"{height} x {width}" for height, width in images.shapes[[areas.argmin(), areas.argmax()]]]
    size = " to ".join(dict.fromkeys(sizes))
    kind = f"{'grey' if images.channels == 1 else 'colour'}, {images.pixels.dtype.name}"
    if images.is_paired:
        noun = "pair of a noisy and a clean image" if len(images) == 1 else "pairs of noisy and clean images"
    else:
        noun = "image" if len(images) == 1 else "images"
    darkest, brightest = images.clean_range
    return f"{part}: {len(images):,} {noun}, {size}, {kind} from {darkest:g} to {brightest:g}"
