"""Images from a folder of pictures, clean ones or pairs of noisy and clean ones (dae/data/layout.py).

Every picture is decoded when a run starts, so that a broken one is found before training. Pictures are shuffled with a
fixed seed, because folders are often sorted by class and the last training images can be used for validation.
"""

import collections
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from dae.config import RunConfig
from dae.data import layout, pictures, storage
from dae.data.images import Images, RawSplits, check_sides, rescaled, to_grey
from dae.data.pictures import BrokenPicture, Header
from dae.errors import UsageError, as_usage_error, listed
from dae.files import files_in

# The threads are given this many pictures at a time, so at most this many decoded ones wait in memory.
_AHEAD = 256

# The paths of a clean picture and, in a pair, of a noisy one.
_Paths = tuple[Path, ...]


def find_files(
    folder: Path, suffixes: Collection[str] = pictures.SUFFIXES, without: Path | None = None
) -> tuple[list[Path], str]:
    """Return the files in `folder` and its subfolders with one of `suffixes`, sorted, and a count of others by suffix.

    Links are followed; hidden files and folders, and the subfolder `without`, are left out.
    """
    files = list(files_in(folder, without))
    others = (path.suffix.lower() or "no suffix" for path in files if path.suffix.lower() not in suffixes)
    counts = ", ".join(f"{count} {suffix}" for suffix, count in collections.Counter(others).most_common())
    return [path for path in files if path.suffix.lower() in suffixes], counts


def read(folder: Path, config: RunConfig, keep_sizes: bool) -> RawSplits:
    """Read the pictures in `folder`.

    Images are grey if every picture is stored in grey, or with `config.grey`; they have 16 bits if any picture has.
    `keep_sizes` allows pictures of several sizes. Raises UsageError for names that are ambiguous, and for a broken
    picture, unless `config.skip_broken`.
    """
    with as_usage_error("--data"):
        files, others = find_files(folder)
    if not files:
        held = f" (but {others})" if others else ""
        raise UsageError(f"--data: {folder}: holds no pictures{held}; expected {', '.join(pictures.SUFFIXES)}")
    notes = [f"not read, because of their suffixes: {others}"] if others else []
    with as_usage_error(f"--data: {folder}"):
        places = layout.of_files(path.relative_to(folder) for path in files)
        divided = layout.divide(places)
    notes += layout.doubts(places)
    splits: dict[str, list[_Paths]] = {}
    for split, pairs in divided.items():
        clean_path, noisy_path = pairs[0]
        if noisy_path is not None:
            notes.append(f"{split} pairs: {noisy_path} is noisy, {clean_path} is clean")
        # RandomState's permutations are the same in every version of NumPy.
        shuffled = (pairs[index] for index in np.random.RandomState(0).permutation(len(pairs)))
        splits[split] = [tuple(folder / path for path in paths if path is not None) for paths in shuffled]
    broken: list[Path] | None = [] if config.skip_broken else None
    all_paths = [paths for split in splits.values() for paths in split]
    headers = dict(_in_threads(lambda paths: [pictures.read_header(path) for path in paths], all_paths, broken))
    if not headers:
        raise UsageError(f"--data: {folder}: all pictures are broken")
    target = _target(folder, headers, config, keep_sizes)
    if target.cover:
        height, width = target.cover
        notes.append(f"pictures scaled to cover {height} x {width} (height x width) and cropped to the centre")
    if target.channels == 3 and any(header.channels == 1 for found in headers.values() for header in found):
        notes.append("grey pictures among coloured ones converted to colour; to denoise grey ones, train with --grey")
    images = {}
    for split, split_paths in splits.items():
        images[split] = _decode_all([paths for paths in split_paths if paths in headers], headers, target, broken)
        if not len(images[split]):
            raise UsageError(f"--data: {folder}: all pictures of the split {split} are broken")
    if broken:
        names = sorted({str(path.relative_to(folder)) for path in broken})
        notes.append(f"skipped {len(names)} broken pictures: {listed(names)}")
    return images, notes


def _in_threads(
    read_picture: Callable[[_Paths], Any], files: Sequence[_Paths], broken: list[Path] | None
) -> Iterator[tuple[_Paths, Any]]:
    """Yield the paths and `read_picture(paths)` of each readable picture or pair, in order.

    The path of a broken one is appended to `broken`; if that is None, raises UsageError.
    """

    def attempt(paths: _Paths) -> Any:
        try:
            return read_picture(paths)
        except BrokenPicture as error:
            if broken is None:
                raise UsageError(f"--data: {error}; repair or remove it, or add --skip-broken") from None
            broken.append(error.path)
            return None

    bar = tqdm(total=len(files), unit=" pictures", unit_scale=True, disable=None, delay=3, leave=False)
    with ThreadPoolExecutor() as pool, bar:
        for start in range(0, len(files), _AHEAD):
            block = files[start : start + _AHEAD]
            for paths, value in zip(block, pool.map(attempt, block), strict=True):
                bar.update()
                if value is not None:
                    yield paths, value


class _Target(NamedTuple):
    """The type and the number of channels to which all pictures are converted."""

    dtype: np.dtype
    channels: int
    cover: tuple[int, int] | None
    """Height and width that pictures are scaled to cover, and cropped to; None to keep their sizes."""


def _target(folder: Path, headers: Mapping[_Paths, list[Header]], config: RunConfig, keep_sizes: bool) -> _Target:
    header_of = {path: header for paths in headers for path, header in zip(paths, headers[paths], strict=True)}
    types = {header.dtype for header in header_of.values()}
    if len(types) > 1 and (np.dtype(np.float32) in types or config.value_range is not None):
        found = " and ".join(sorted(map(str, types)))
        raise UsageError(f"--data: {folder}: pictures of {found}; expected one type")
    channels = 1 if config.grey else max(header.channels for header in header_of.values())
    cover = (config.image_size, config.image_size) if isinstance(config.image_size, int) else config.image_size
    # The first picture of each size stands for all of them.
    sizes = {cover: folder} if cover else {header[:2]: path for path, header in reversed(header_of.items())}
    for paths, pair in headers.items():
        if cover is None and len({header[:2] for header in pair}) > 1:
            raise UsageError(f"--data: {' and '.join(map(str, paths))}: pictures of a pair must have equal sizes")
    for (height, width), path in sizes.items():
        with as_usage_error(f"--data: {path}"):
            check_sides(height, width)
    if len(sizes) > 1 and not keep_sizes:
        smallest, largest = (choose(sizes, key=math.prod) for choose in (min, max))
        raise UsageError(
            f"--data: {folder}: pictures of {len(sizes)} sizes, such as {sizes[smallest].name} and "
            f"{sizes[largest].name}; add --image-size to scale and crop them, or --patch-size to train on patches"
        )
    return _Target(np.result_type(*types), channels, cover)


def _decode_all(
    paths: Sequence[_Paths], headers: Mapping[_Paths, list[Header]], target: _Target, broken: list[Path] | None
) -> Images:
    images_each = len(next(iter(headers)))
    channels, sizes = target.channels * images_each, []

    def rows() -> Iterator[np.ndarray]:
        for _, pixels in _in_threads(lambda paths: _decode(paths, target), paths, broken):
            sizes.append(pixels.shape[:2])
            yield pixels.reshape(-1, channels)

    count = sum(math.prod(target.cover or headers[names][0][:2]) for names in paths)
    pixels = storage.materialize((count, channels), rows(), target.dtype)
    if len(set(sizes)) == 1:
        return Images(pixels.reshape(-1, *sizes[0], channels), is_paired=images_each == 2)
    return Images(pixels, images_each == 2, np.array(sizes, np.int64).reshape(-1, 2))


def _decode(paths: _Paths, target: _Target) -> np.ndarray:
    """Return a picture, or a pair on the axis of channels, [H, W, C or 2 C]."""
    decoded = []
    for path in paths:
        pixels = rescaled(pictures.read(path, target.cover), target.dtype)
        if pixels.shape[2] == 3 and target.channels == 1:
            pixels = to_grey(pixels)
        pixels = np.broadcast_to(pixels, (*pixels.shape[:2], target.channels))
        decoded.append(pixels if target.cover is None else _fit(pixels, target.cover))
    return decoded[0] if len(decoded) == 1 else np.concatenate(decoded, axis=2)


def _fit(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scale [H, W, C] to cover `size`, (height, width), and crop it to the centre; by Pillow's bicubic filter."""
    if pixels.dtype == np.uint8:
        image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else np.ascontiguousarray(pixels))
        return np.asarray(ImageOps.fit(image, size[::-1])).reshape(*size, -1)
    channels = (Image.fromarray(channel.astype(np.float32)) for channel in np.moveaxis(pixels, 2, 0))
    fitted = np.stack([np.asarray(ImageOps.fit(channel, size[::-1])) for channel in channels], axis=2)
    fitted = np.clip(fitted, pixels.min(), pixels.max())  # the filter overshoots at edges
    return fitted if pixels.dtype == np.float32 else np.rint(fitted).astype(pixels.dtype)
