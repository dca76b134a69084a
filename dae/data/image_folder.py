"""Images from a folder of pictures, clean ones or pairs of noisy and clean ones (dae/data/layout.py).

Every picture is decoded when a run starts, so that a broken one is found before training. Pictures are shuffled with a
fixed seed, because folders are often sorted by class and the last training images can be used for validation.
"""

import collections
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from dae.config import RunConfig
from dae.data import layout, pictures, storage
from dae.data.array_files import check_shape
from dae.data.images import Images, Parts, rescaled, to_grey
from dae.data.pictures import BrokenPicture, Header
from dae.errors import UsageError, as_usage_error, listed
from dae.workdir.files import files_in

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


def read(folder: Path, config: RunConfig, keep_sizes: bool) -> Parts:
    """Read the pictures in `folder`.

    Images are grey if every picture is stored in grey, or with `config.grey`, and otherwise in colour; they have 16
    bits if any picture has. With `config.image_size`, each is scaled to cover that size and cropped to the centre.
    Raises UsageError if pictures have different sizes without that or `keep_sizes`; for names that are ambiguous; and
    for a broken picture, unless `config.skip_broken`.
    """
    with as_usage_error("--data"):
        files, others = find_files(folder)
    if not files:
        held = f" (but {others})" if others else ""
        raise UsageError(
            f"--data: {folder}: holds no pictures{held}; expected files that end in {', '.join(pictures.SUFFIXES)}"
        )
    notes = [f"not read, because of their suffixes: {others}"] if others else []
    with as_usage_error(f"--data: {folder}"):
        places = layout.of_files(path.relative_to(folder) for path in files)
        divided = layout.divide(places)
    notes += layout.doubts(places)
    parts = {
        part: _shuffled([tuple(folder / path for path in names if path is not None) for names in divided[part]])
        for part in divided
    }
    for part, ((clean_path, noisy_path), *_) in divided.items():
        if noisy_path is not None:
            notes.append(f"{part} pairs: {noisy_path} is noisy, {clean_path} is clean")
    reader = _Reader(config.skip_broken)
    headers: dict[_Paths, list[Header]] = {}
    for paths, found in reader(_read_headers, [paths for each in parts.values() for paths in each]):
        headers[paths] = found
    if not headers:
        raise UsageError(f"--data: {folder}: all pictures are broken")
    convert = _Conversion(folder, headers, config, keep_sizes)
    images = {}
    for part, all_paths in parts.items():
        readable = [paths for paths in all_paths if paths in headers]
        if readable:
            images[part] = convert.images(readable, headers, reader)
        if not readable or not len(images[part]):
            raise UsageError(f"--data: {folder}: all pictures of the part {part} are broken")
    broken = sorted({str(path.relative_to(folder)) for path in reader.broken})
    if broken:
        notes.append(f"skipped {len(broken)} broken pictures: {listed(broken)}")
    return Parts(images, notes + convert.notes)


def _shuffled(paths: Sequence[_Paths]) -> list[_Paths]:
    # RandomState's permutations are the same in every version of NumPy.
    return [paths[index] for index in np.random.RandomState(0).permutation(len(paths))]


class _Reader:
    """Reads pictures in threads. A broken one raises UsageError, or is put in `broken` if `skip_broken`."""

    def __init__(self, skip_broken: bool) -> None:
        self._skip_broken = skip_broken
        self.broken: list[Path] = []

    def __call__(self, read_one: Callable[[_Paths], Any], files: Sequence[_Paths]) -> Iterator[tuple[_Paths, Any]]:
        """Yield the paths of each readable picture or pair with what `read_one` returns, in order."""
        bar = tqdm(total=len(files), unit=" pictures", unit_scale=True, disable=None, delay=3, leave=False)
        with ThreadPoolExecutor() as pool, bar:
            for start in range(0, len(files), _AHEAD):
                some = files[start : start + _AHEAD]
                for paths, value in zip(some, pool.map(_attempt(read_one), some), strict=True):
                    bar.update()
                    if not isinstance(value, BrokenPicture):
                        yield paths, value
                    elif self._skip_broken:
                        self.broken.append(value.path)
                    else:
                        raise UsageError(
                            f"--data: {value}; repair or remove it, or skip broken pictures with --skip-broken"
                        )


def _attempt(read_one: Callable[[_Paths], Any]) -> Callable[[_Paths], Any]:
    """Return the function that returns what `read_one` returns, or the BrokenPicture that it raises."""

    def attempt(paths: _Paths) -> Any:
        try:
            return read_one(paths)
        except BrokenPicture as error:
            return error

    return attempt


def _read_headers(paths: _Paths) -> list[Header]:
    return [pictures.read_header(path) for path in paths]


class _Conversion:
    """How all pictures become images of one type and, unless `keep_sizes`, of one size."""

    def __init__(self, folder: Path, headers: dict[_Paths, list[Header]], config: RunConfig, keep_sizes: bool) -> None:
        """Raise UsageError if pictures do not fit together, or are too small."""
        self.notes: list[str] = []
        self._size = (config.image_size, config.image_size) if isinstance(config.image_size, int) else config.image_size
        every = {path: one for paths, each in headers.items() for path, one in zip(paths, each, strict=True)}
        types = {one.dtype for one in every.values()}
        if len(types) > 1 and (np.dtype(np.float32) in types or config.value_range is not None):
            found = " and ".join(sorted(map(str, types)))
            raise UsageError(f"--data: {folder}: pictures of {found}; expected one type")
        self._dtype = np.promote_types(*types, *types) if len(types) == 1 else np.dtype(np.uint16)
        channels = {one.channels for one in every.values()}
        if channels == {1, 3} and not config.grey:
            self.notes.append(
                "grey pictures among coloured ones converted to colour; to denoise grey ones, train with --grey"
            )
        self._channels = 1 if config.grey else max(channels)
        for paths, each in headers.items():
            if len({(one.height, one.width) for one in each}) > 1 and self._size is None:
                raise UsageError(
                    f"--data: {paths[0]} and {paths[1]}: expected equal sizes, got "
                    + " and ".join(f"{one.height} x {one.width}" for one in each)
                )
        if self._size is not None:
            height, width = self._size
            self.notes.append(f"pictures scaled to cover {height} x {width} (height x width) and cropped to the centre")
            sizes = {self._size: folder}
        else:
            sizes = {(one.height, one.width): path for path, one in reversed(every.items())}
        least, most = (of(sizes, key=lambda size: size[0] * size[1]) for of in (min, max))
        if len(sizes) > 1 and not keep_sizes:
            raise UsageError(
                f"--data: {folder}: pictures of {len(sizes)} sizes, from {least[0]} x {least[1]} "
                f"({sizes[least].name}) to {most[0]} x {most[1]} ({sizes[most].name}); add --image-size to scale and "
                "crop them to one, or --patch-size to train on patches of them"
            )
        self._only_size = least if len(sizes) == 1 else None
        for size, path in sizes.items():
            with as_usage_error(f"--data: {path}"):
                check_shape((1, *size, self._channels))

    def images(self, paths: Sequence[_Paths], headers: dict[_Paths, list[Header]], reader: _Reader) -> Images:
        """Decode the pictures or pairs of one part."""
        is_paired = len(paths[0]) == 2
        channels = self._channels * (2 if is_paired else 1)
        sizes = []

        def rows() -> Iterator[np.ndarray]:
            for _, pixels in reader(self._decode, paths):
                sizes.append(pixels.shape[:2])
                yield pixels.reshape(-1, channels)

        count = sum(math.prod(self._only_size or headers[one][0][:2]) for one in paths)
        pixels = storage.materialize((count, channels), rows(), self._dtype)
        if self._only_size is not None:
            return Images(pixels.reshape(-1, *self._only_size, channels), is_paired)
        return Images(pixels, is_paired, np.array(sizes, np.int64).reshape(-1, 2))

    def _decode(self, paths: _Paths) -> np.ndarray:
        """Return a picture, or a pair on the axis of channels, [H, W, C or 2 C]."""
        decoded = []
        for path in paths:
            pixels = rescaled(pictures.read(path, self._size), self._dtype)
            if pixels.shape[2] == 3 and self._channels == 1:
                pixels = to_grey(pixels)
            pixels = np.broadcast_to(pixels, (*pixels.shape[:2], self._channels))
            decoded.append(pixels if self._size is None else _fit(pixels, self._size))
        return decoded[0] if len(decoded) == 1 else np.concatenate(decoded, axis=2)


def _fit(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scale [H, W, C] to cover `size`, (height, width), and crop it to the centre; by Pillow's bicubic filter."""
    if pixels.shape[:2] == size:
        return pixels
    if pixels.dtype == np.uint8:
        image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else np.ascontiguousarray(pixels))
        return np.asarray(ImageOps.fit(image, size[::-1])).reshape(*size, -1)
    channels = [Image.fromarray(pixels[..., channel].astype(np.float32)) for channel in range(pixels.shape[2])]
    fitted = np.stack([np.asarray(ImageOps.fit(channel, size[::-1])) for channel in channels], axis=2)
    # The filter overshoots at edges.
    fitted = np.clip(fitted, pixels.min(), pixels.max())
    return fitted if pixels.dtype == np.float32 else np.rint(fitted).astype(pixels.dtype)
