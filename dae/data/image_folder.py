"""Images from a folder of pictures: PNG, JPEG, BMP, and the first frame of GIF, read by Pillow.

Every picture is decoded once, when a run starts, so that a broken one is found then and not in the middle of it.
Pictures are turned as their EXIF says, transparent ones laid on white, and 16 bits cut to 8. They come in an order
drawn by a fixed seed, since folders are often sorted by kind, and the last training images validate.
"""

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from dae.data import storage
from dae.data.array_files import Found, check_shape
from dae.errors import UsageError, first_line

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif")
_FORMATS = ("PNG", "JPEG", "BMP", "GIF")
_GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B")
_ORIENTATION = 0x0112  # EXIF's tag; from 5 on, the sides change places
# Pictures that are decoded ahead of the one that is asked for, at most.
_AHEAD = 256


def find(folder: Path) -> list[Path]:
    """All pictures in `folder` and the folders in it, sorted; hidden ones are left out."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def read(folder: Path, image_size: int | tuple[int, int] | None, skip_broken: bool) -> Found:
    """The pictures of `folder`; if it has the folders train and test, they are the two parts, else there is one.

    All in grey if every picture is grey, else all in colour. With `image_size`, one side or (height, width), each is
    scaled until it just covers that, then cut to its middle. Raises UsageError for pictures of several sizes without
    it, and for a broken one unless `skip_broken`.
    """
    folders = [folder / "train", folder / "test"]
    if not all(path.is_dir() for path in folders):
        folders = [folder]
    # RandomState's permutations are the same in every version of NumPy.
    parts = [[files[i] for i in np.random.RandomState(0).permutation(len(files))] for files in map(find, folders)]
    for path, files in zip(folders, parts, strict=True):
        if not files:
            raise UsageError(f"--data: {path}: holds no pictures ({', '.join(SUFFIXES)})")
    broken: dict[Path, str] = {}

    def good(read_one: Callable[[Path], Any], files: list[Path]) -> Iterator[Any]:
        for path, (value, reason) in zip(files, _in_threads(read_one, files), strict=True):
            if reason and not skip_broken:
                raise UsageError(
                    f"--data: {path}: broken ({reason}); mend or remove it, or leave out all such by --skip-broken"
                )
            if reason:
                broken[path] = reason
            else:
                yield value

    examples: dict[tuple[int, int], Path] = {}
    colours = set()
    for path, size, colour in good(_look, [path for files in parts for path in files]):
        examples.setdefault(size, path)
        colours.add(colour)
    if not examples:
        raise UsageError(f"--data: {folder}: all its pictures are broken")
    notes = []
    if image_size is None and len(examples) > 1:
        least, most = (of(examples, key=lambda size: size[0] * size[1]) for of in (min, max))
        raise UsageError(
            f"--data: {folder}: pictures of {len(examples)} sizes, from {least[0]} x {least[1]} "
            f"({examples[least].name}) to {most[0]} x {most[1]} ({examples[most].name}); "
            "add --image-size to scale and cut them to one"
        )
    if image_size is None:
        (size,) = examples
    else:
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        notes.append(f"pictures scaled to cover {size[0]} x {size[1]} (height x width), and cut to their middle")
    if len(colours) > 1:
        notes.append("grey pictures among coloured ones are shown in colour")
    shape = (*size, 3 if any(colours) else 1)
    check_shape((1, *shape), "the pictures: ")

    decode = functools.partial(_decode, shape=shape)
    images = []
    for path, files in zip(folders, parts, strict=True):
        images.append(storage.stored((len(files), *shape), good(decode, files)))
        if not len(images[-1]):
            raise UsageError(f"--data: {path}: all its pictures are broken")
    if broken:
        names = ", ".join(str(path.relative_to(folder)) for path in sorted(broken)[:5])
        notes.append(f"broken pictures left out: {names}" + (f" and {len(broken) - 5} more" if len(broken) > 5 else ""))
    return images[0], images[1] if len(images) > 1 else None, notes


def _in_threads(read_one: Callable[[Path], Any], files: list[Path]) -> Iterator[tuple[Any, str]]:
    """(what `read_one` returns, "") or (None, why it could not) of each file, in order; Pillow decodes side by side."""

    def attempt(path: Path) -> tuple[Any, str]:
        try:
            return read_one(path), ""
        except Exception as error:  # for broken bytes Pillow raises what it likes
            return None, first_line(error)

    bar = tqdm(total=len(files), unit=" pictures", unit_scale=True, disable=None, delay=3, leave=False)
    with ThreadPoolExecutor() as pool, bar:
        for start in range(0, len(files), _AHEAD):
            for result in pool.map(attempt, files[start : start + _AHEAD]):
                bar.update()
                yield result


def _look(path: Path) -> tuple[Path, tuple[int, int], bool]:
    """(path, (height, width), whether it has colour) of a picture, as its header says."""
    with Image.open(path, formats=_FORMATS) as image:
        sides = (image.width, image.height) if image.getexif().get(_ORIENTATION, 1) >= 5 else image.size[::-1]
        if image.mode == "P":
            red, green, blue = np.reshape(image.getpalette("RGB"), (-1, 3)).T
            return path, sides, bool((red != green).any() or (green != blue).any())
        return path, sides, image.mode not in _GREY_MODES


def _decode(path: Path, shape: tuple[int, int, int]) -> np.ndarray:
    """A picture as uint8 [1, H, W, C] of `shape`."""
    height, width, channels = shape
    with Image.open(path, formats=_FORMATS) as opened:
        # A JPEG is decoded at an eighth, a quarter or half of its size where that is still twice what is wanted.
        if opened.width > 2 * width and opened.height > 2 * height:
            opened.draft(opened.mode, (2 * max(height, width), 2 * max(height, width)))
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I"):
            image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB" if channels == 3 else "L")
        if image.size != (width, height):
            image = ImageOps.fit(image, (width, height))
        return np.asarray(image).reshape(1, *shape)
