"""To be dropped: the coming interface of dae/data/pictures.py, on top of today's."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dae.data import pictures
from dae.data.pictures import SUFFIXES, BrokenPicture, can_hold_alpha  # noqa: F401


class Header(NamedTuple):
    count: int
    height: int
    width: int
    channels: int
    dtype: np.dtype


class Picture(NamedTuple):
    pixels: np.ndarray
    alpha: np.ndarray | None
    icc_profile: bytes | None
    tags: dict[str, Any]


def _pages(path: Path) -> int:
    with Image.open(path) as image:
        return getattr(image, "n_frames", 1)


def read_header(path: Path) -> Header:
    header = pictures.read_header(path)
    return Header(_pages(path) if path.suffix == ".tif" else 1, *header)


def read_picture(path: Path) -> Picture:
    pixels, alpha, icc_profile = pictures.read_with_alpha(path)
    if path.suffix == ".tif" and _pages(path) > 1:
        with Image.open(path) as image:
            found = []
            for page in range(image.n_frames):
                image.seek(page)
                found.append(np.asarray(image)[..., None])
        return Picture(np.stack(found), None, None, {})
    return Picture(pixels[None], None if alpha is None else alpha[None], icc_profile, {})


def read(path: Path) -> np.ndarray:
    if path.suffix == ".tif":
        return read_picture(path).pixels
    return pictures.read(path)[None]


def check_writable(path: Path, header: Header) -> None:
    pictures.check_writable(path, header.dtype)


def write(path: Path, pixels: np.ndarray, alpha: Any = None, icc_profile: bytes | None = None, tags: Any = ()) -> None:
    if len(pixels) > 1:
        pages = [Image.fromarray(page[..., 0]) for page in pixels]
        pages[0].save(path, save_all=True, append_images=pages[1:])
    else:
        pictures.write(path, pixels[0], None if alpha is None else alpha[0], icc_profile)
