"""Images from a folder of pictures, clean ones or pairs of noisy and clean ones (dae/data/layout.py).

Every picture is decoded when a run starts, so that a broken one is found before training. Pictures are shuffled with a
fixed seed, because folders are often sorted by class and the last training images can be used for validation.
"""

import collections
import dataclasses
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from dae.config import RunConfig
from dae.data import layout, pictures, storage
from dae.data.images import Images, RawSplits, check_sides, to_grey
from dae.data.pictures import BrokenPicture, Header
from dae.data.values import ValueRange
from dae.errors import UsageError, as_usage_error, listed
from dae.files import files_in

# Number of files that are decoded into memory at once.
_TOGETHER = 16

# The paths of a clean picture and, in a pair, of a noisy one.
_Paths = tuple[Path, ...]
_Headers = Mapping[_Paths, Sequence[Header]]


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


def read(folders: Mapping[str | None, Path], config: RunConfig, keep_sizes: bool) -> RawSplits:
    """Read the pictures in folders of a role (dae/data/layout.py), CLEAN or NOISY, or in one whose names say the roles.

    A role can have one picture instead. Each page is an image. Images are grey if every picture is stored in grey, or
    with `config.grey`. `keep_sizes` allows pictures of several sizes.
    Raises UsageError for names that are ambiguous, and for a broken picture, unless `config.skip_broken`.
    """
    base = Path(os.path.commonpath([path if path.is_dir() else path.parent for path in folders.values()]))
    if len(folders) > 1 and base in folders.values():
        raise UsageError("expected two folders, neither within the other")
    meanings: dict[PurePath, layout.Meaning] = {}
    notes = []
    for role, folder in folders.items():
        files, others = find_files(folder) if folder.is_dir() else ([folder], "")
        if not files:
            held = f" (but {others})" if others else ""
            raise UsageError(f"{folder} holds no pictures{held}; expected {', '.join(pictures.SUFFIXES)}")
        notes += [f"not read, because of their suffixes: {others}"] if others else []
        # Without --clean, a folder of noisy pictures can have clean ones for tests.
        root, given = (folder, None if config.only_noisy else role) if folder.is_dir() else (folder.parent, role)
        parsed = layout.parse_paths((path.relative_to(root) for path in files), given)
        meanings |= {(root / path).relative_to(base): meaning for path, meaning in parsed.items()}
    splits: dict[str, list[_Paths]] = {}
    for split, pairs in layout.divide(meanings, config.only_noisy).items():
        clean, noisy = pairs[0]
        notes += [f"{split} pairs: {noisy} is noisy, {clean} is clean"] if noisy is not None else []
        # RandomState's permutations are the same in every version of NumPy.
        shuffled = (pairs[index] for index in np.random.RandomState(0).permutation(len(pairs)))
        splits[split] = [tuple(base / path for path in paths if path is not None) for paths in shuffled]
    broken: list[Path] | None = [] if config.skip_broken else None
    all_paths = [paths for split in splits.values() for paths in split]
    headers = dict(_in_threads(lambda paths: [pictures.read_header(path) for path in paths], all_paths, broken))
    if not headers:
        raise UsageError("all pictures are broken")
    target = _target(headers, config, keep_sizes)
    if target.cover:
        height, width = target.cover
        notes.append(f"pictures scaled to cover {height} x {width} (height x width) and cropped to the centre")
    if target.channels == 3 and any(header.channels == 1 for found in headers.values() for header in found):
        notes.append("grey pictures among coloured ones converted to colour; to denoise grey ones, train with --grey")
    images = {}
    for split, paths in splits.items():
        readable = {names: headers[names] for names in paths if names in headers}
        images[split] = _decode_all(readable, target, broken)
        if not len(images[split]):
            raise UsageError(f"all pictures of the split {split} are broken")
        if config.only_noisy and not images[split].is_paired:
            images[split] = dataclasses.replace(images[split], has_clean=False)
    if broken:
        names = sorted({str(path.relative_to(base)) for path in broken})
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
                raise UsageError(f"{error}; repair or remove it, or add --skip-broken") from None
            broken.append(error.path)
            return None

    bar = tqdm(total=len(files), unit=" pictures", unit_scale=True, disable=None, delay=3, leave=False)
    with ThreadPoolExecutor() as pool, bar:
        for start in range(0, len(files), _TOGETHER):
            together = files[start : start + _TOGETHER]
            for paths, value in zip(together, pool.map(attempt, together), strict=True):
                bar.update()
                if value is not None:
                    yield paths, value


class _Target(NamedTuple):
    """The type, the number of channels and the size to which all pictures are converted."""

    dtype: np.dtype
    channels: int
    cover: tuple[int, int] | None
    """Height and width that pictures are scaled to cover, and cropped to; None to keep their sizes."""
    value_range: ValueRange

    def shape(self, header: Header) -> tuple[int, int, int, int]:
        """Return the shape [N, H, W, C] of the images of a file."""
        height, width = self.cover or header[1:3]
        return header.count, height, width, self.channels


def _target(headers: _Headers, config: RunConfig, keep_sizes: bool) -> _Target:
    header_of = {path: header for paths in headers for path, header in zip(paths, headers[paths], strict=True)}
    types = {header.dtype for header in header_of.values()}
    if len(types) > 1:
        raise UsageError(f"pictures of {' and '.join(sorted(map(str, types)))}; expected one type")
    (dtype,) = types
    value_range = ValueRange.requested(config.value_range, dtype)
    dtype = np.dtype(np.float32) if dtype == np.int16 else dtype
    channels = 1 if config.grey else max(header.channels for header in header_of.values())
    cover = (config.image_size, config.image_size) if isinstance(config.image_size, int) else config.image_size
    target = _Target(dtype, channels, cover, value_range)
    for paths, pair in headers.items():
        if len({target.shape(header) for header in pair}) > 1:
            found = " and ".join(map(str, paths))
            raise UsageError(f"{found}: pictures of a pair must have equal sizes and numbers of pages")
    # The first picture of each size stands for all of them.
    sizes = {target.shape(header)[1:]: path for path, header in reversed(header_of.items())}
    for (height, width, _), path in sizes.items():
        with as_usage_error(path):
            check_sides(height, width)
    if len(sizes) > 1 and not keep_sizes:
        smallest, largest = (choose(sizes, key=math.prod) for choose in (min, max))
        raise UsageError(
            f"pictures of {len(sizes)} sizes, such as {sizes[smallest].name} and {sizes[largest].name}; add "
            "--image-size to scale and crop them, or --patch-size to train on patches"
        )
    return target


def _decode_all(headers: _Headers, target: _Target, broken: list[Path] | None) -> Images:
    is_paired = any(len(pair) == 2 for pair in headers.values())
    channels, sizes = target.channels * (1 + is_paired), []

    def decode(paths: _Paths) -> np.ndarray:
        return np.concatenate([_decode(*item, target) for item in zip(paths, headers[paths], strict=True)], axis=3)

    def rows() -> Iterator[np.ndarray]:
        for _, pixels in _in_threads(decode, [*headers], broken):
            sizes.extend([pixels.shape[1:3]] * len(pixels))
            yield pixels.reshape(-1, channels)

    count = sum(math.prod(target.shape(header)[:3]) for header, *_ in headers.values())
    pixels = storage.materialize((count, channels), rows(), target.dtype)
    all_sizes = None if len(set(sizes)) == 1 else np.array(sizes, np.int64).reshape(-1, 2)
    pixels = pixels if all_sizes is not None else pixels.reshape(-1, *sizes[0], channels)
    return Images(pixels, is_paired, all_sizes, target.value_range)


def _decode(path: Path, header: Header, target: _Target) -> np.ndarray:
    """Return the images of a file, [N, H, W, C]. Raises BrokenPicture if they cannot be decoded."""
    pixels = pictures.read(path, target.cover)
    # With a cover, a JPEG may have been decoded at a smaller size.
    has_size = target.cover is not None or pixels.shape[1:3] == header[1:3]
    if not has_size or (len(pixels), pixels.dtype) != (header.count, header.dtype):
        raise BrokenPicture(path, ValueError("changed while it was read"))
    pixels = pixels.astype(target.dtype, copy=False)
    if pixels.shape[3] == 3 and target.channels == 1:
        pixels = to_grey(pixels)
    if target.cover is not None:
        pixels = np.stack([_fit(image, target.cover) for image in pixels])
    return np.broadcast_to(pixels, target.shape(header))


def _fit(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scale [H, W, C] to cover `size`, (height, width), and crop it to the centre; by Pillow's bicubic filter."""
    if pixels.dtype == np.uint8:
        image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else np.ascontiguousarray(pixels))
        return np.asarray(ImageOps.fit(image, size[::-1])).reshape(*size, -1)
    channels = (Image.fromarray(channel.astype(np.float32)) for channel in np.moveaxis(pixels, 2, 0))
    fitted = np.stack([np.asarray(ImageOps.fit(channel, size[::-1])) for channel in channels], axis=2)
    fitted = np.clip(fitted, pixels.min(), pixels.max())  # the filter overshoots at edges
    return fitted if pixels.dtype == np.float32 else np.rint(fitted).astype(pixels.dtype)
