"""Images from a folder of pictures: PNG, JPEG, BMP, and the first frame of a GIF, read by Pillow.

Every picture is decoded when a run starts, so that a broken one is found before training. Pictures are rotated
according to their EXIF orientation, transparent ones are blended with white, and 16 bits are reduced to 8. They are
shuffled with a fixed seed, because folders are often sorted by class and the last training images are used for
validation.
"""

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from dae.data import storage
from dae.data.array_files import RawImages, check_shape
from dae.errors import UsageError, first_line

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif")
_FORMATS = ("PNG", "JPEG", "BMP", "GIF")
_GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B")
_ORIENTATION = 0x0112  # the EXIF tag; values of 5 and more swap height and width
# The threads are given this many pictures at a time, so at most this many decoded ones wait in memory.
_AHEAD = 256


class _Header(NamedTuple):
    path: Path
    size: tuple[int, int]  # height, width
    is_colour: bool


class _Reader:
    """Reads pictures in threads. A broken one raises UsageError, or is put in `broken` if `skip_broken`."""

    def __init__(self, skip_broken: bool) -> None:
        self._skip_broken = skip_broken
        self.broken: list[Path] = []

    def __call__(self, read_one: Callable[[Path], Any], files: list[Path]) -> Iterator[Any]:
        """Yield `read_one(file)` for each readable file, in order."""
        for path, (value, reason) in zip(files, _in_threads(read_one, files), strict=True):
            if reason is None:
                yield value
            elif self._skip_broken:
                self.broken.append(path)
            else:
                raise UsageError(
                    f"--data: {path}: broken ({reason}); repair or remove it, or skip broken ones with --skip-broken"
                )


def find(folder: Path) -> list[Path]:
    """Return the paths of all pictures in `folder` and its subfolders, sorted, without hidden ones."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def read(folder: Path, image_size: int | tuple[int, int] | None, skip_broken: bool) -> RawImages:
    """Read the pictures in `folder`; if it has the subfolders train and test, they hold training and test images.

    Images are grey if every picture is stored in grey, and otherwise in colour. With `image_size`, one side or (height,
    width), each picture is scaled to cover that size and cropped to the centre. Raises UsageError if pictures have
    different sizes and `image_size` is None, and for a broken picture unless `skip_broken`.
    """
    parts = _parts(folder)
    reader = _Reader(skip_broken)
    headers = list(reader(_read_header, [path for files in parts.values() for path in files]))
    if not headers:
        raise UsageError(f"--data: {folder}: all pictures are broken")
    notes: list[str] = []
    shape = _common_shape(folder, headers, image_size, notes)
    images = []
    for path, files in parts.items():
        decoded = reader(functools.partial(_decode, shape=shape), files)
        images.append(storage.materialize((len(files), *shape), decoded))
        if not len(images[-1]):
            raise UsageError(f"--data: {path}: all pictures are broken")
    broken = sorted({str(path.relative_to(folder)) for path in reader.broken})
    if broken:
        notes.append(f"skipped broken pictures: {', '.join(broken[:5])}" + ("" if len(broken) <= 5 else ", ..."))
    return RawImages(images[0], images[1] if len(images) > 1 else None, notes)


def _parts(folder: Path) -> dict[Path, list[Path]]:
    """Return the pictures, shuffled, of the subfolders train and test, or of `folder` if it does not have both."""
    folders = [folder / "train", folder / "test"]
    if not all(path.is_dir() for path in folders):
        folders = [folder]
    parts = {}
    for path in folders:
        files = find(path)
        if not files:
            raise UsageError(f"--data: {path}: holds no pictures; expected files that end in {', '.join(SUFFIXES)}")
        # RandomState's permutations are the same in every version of NumPy.
        parts[path] = [files[index] for index in np.random.RandomState(0).permutation(len(files))]
    return parts


def _common_shape(
    folder: Path, headers: list[_Header], image_size: int | tuple[int, int] | None, notes: list[str]
) -> tuple[int, int, int]:
    """Return the (H, W, C) to which all pictures are converted; append to `notes` what the conversion changes."""
    examples = {header.size: header.path for header in reversed(headers)}
    if image_size is None and len(examples) > 1:
        least, most = (of(examples, key=lambda size: size[0] * size[1]) for of in (min, max))
        raise UsageError(
            f"--data: {folder}: pictures of {len(examples)} sizes, from {least[0]} x {least[1]} "
            f"({examples[least].name}) to {most[0]} x {most[1]} ({examples[most].name}); "
            "add --image-size to scale and crop them to one"
        )
    if image_size is None:
        (size,) = examples
    else:
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        notes.append(f"pictures scaled to cover {size[0]} x {size[1]} (height x width) and cropped to the centre")
    colours = {header.is_colour for header in headers}
    if len(colours) > 1:
        notes.append("grey pictures among coloured ones converted to colour")
    shape = (*size, 3 if any(colours) else 1)
    check_shape((1, *shape), f"--data: {folder}: ")
    return shape


def _in_threads(read_one: Callable[[Path], Any], files: list[Path]) -> Iterator[tuple[Any, str | None]]:
    """Yield (what `read_one` returns, None) or (None, why it failed) for each file, in order."""

    def attempt(path: Path) -> tuple[Any, str | None]:
        try:
            return read_one(path), None
        except Exception as error:  # Pillow raises exceptions of many types for damaged files
            return None, first_line(error)

    bar = tqdm(total=len(files), unit=" pictures", unit_scale=True, disable=None, delay=3, leave=False)
    with ThreadPoolExecutor() as pool, bar:
        for start in range(0, len(files), _AHEAD):
            for result in pool.map(attempt, files[start : start + _AHEAD]):
                bar.update()
                yield result


def _read_header(path: Path) -> _Header:
    with Image.open(path, formats=_FORMATS) as image:
        swapped = image.getexif().get(_ORIENTATION, 1) >= 5
        size = (image.width, image.height) if swapped else (image.height, image.width)
        if image.mode == "P":
            red, green, blue = np.reshape(image.getpalette("RGB"), (-1, 3)).T
            return _Header(path, size, bool((red != green).any() or (green != blue).any()))
        return _Header(path, size, image.mode not in _GREY_MODES)


def _decode(path: Path, shape: tuple[int, int, int]) -> np.ndarray:
    """Return a picture as uint8 [1, H, W, C], converted to `shape`, (H, W, C)."""
    height, width, channels = shape
    with Image.open(path, formats=_FORMATS) as opened:
        # A JPEG can be decoded faster at an eighth, a quarter or half of its size. `draft` chooses the smallest of
        # these that still has at least twice the wanted size.
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
