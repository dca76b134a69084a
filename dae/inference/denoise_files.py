"""Denoising of files: which pictures and arrays to read, where to write them, and doing so.

`plan` does not import TensorFlow, so that a mistyped path is reported at once.
"""

import collections
import contextlib
import math
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dae.data import array_files, pictures
from dae.data.image_folder import find_files
from dae.data.images import as_batch
from dae.data.pictures import BrokenPicture, Header
from dae.errors import UsageError, as_usage_error, listed
from dae.files import atomic_path, reserve

if TYPE_CHECKING:
    from dae.inference.denoise import Denoiser

SUFFIXES = (*pictures.SUFFIXES, *array_files.SUFFIXES)
# Integers that have a usual value range.
_PIXELS = (np.uint8, np.uint16)

ValueRange = tuple[float, float] | None
# The arrays of a file by name; unnamed, an .npy file's array or a picture's pages.
Arrays = dict[str, np.ndarray]


class File(NamedTuple):
    """A file to denoise."""

    source: Path
    target: Path
    parts: dict[str, Header]
    """The shapes and types of the images to denoise, by name as those of `Arrays`."""
    axes: str | None

    @property
    def pixels(self) -> int:
        """The number of pixels, N H W, of all images."""
        return sum(math.prod(header[:3]) for header in self.parts.values())

    def label(self, name: str) -> str:
        """Return the name for the user of one of the parts."""
        return f"{self.source}:{name}" if name else str(self.source)


def plan(
    inputs: Sequence[Path],
    output: Path,
    axes: str | None = None,
    overwrite: bool = False,
) -> tuple[list[File], list[str], dict[Path, UsageError]]:
    """Return the files to denoise, notes on how arrays and stacks are read, and the errors of broken files.

    Writes nothing. Raises UsageError if an input is missing; if the shape of an array leaves doubts about its `axes`;
    if an output would be an input, that of two inputs, or, unless `overwrite`, a file that exists; and if all files are
    broken.
    """
    sources, notes = _sources(inputs, output, axes)
    files, readings = [], collections.defaultdict(list)
    broken: dict[Path, UsageError] = {}
    for source, relative in sources:
        try:
            parts, copied = _parts(source, axes)
            if _is_picture(source):
                pictures.check_writable(output / relative, parts[""])
        except BrokenPicture as error:
            broken[source] = error
            continue
        files.append(file := File(source, output / relative, parts, axes))
        for name, header in parts.items():
            if header.count > 1 or not _is_picture(source):
                readings[_describe(header)].append(file.label(name))
        notes += [f"copied unchanged: {', '.join(copied)} of {source}"] if copied else []
    if not files and broken:
        raise next(iter(broken.values()))
    if not files:
        names = ", ".join(map(str, inputs))
        raise UsageError(f"{names}: nothing to denoise; expected files that end in {', '.join(SUFFIXES)}")
    _check_targets(files, output, overwrite)
    notes += [f"{listed(labels)}: {'each ' * (len(labels) > 1)}{reading}" for reading, labels in readings.items()]
    return files, notes, broken


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() not in array_files.SUFFIXES


def _describe(header: Header) -> str:
    count, height, width, channels, dtype = header
    colour = "grey" if channels == 1 else "colour"
    return f"{count:,} image{'s' * (count != 1)}, {height} x {width}, {colour}, {dtype.name}"


def read_images(inputs: Sequence[Path], axes: str | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the name for the user and the images [N, H, W, C] of each picture and array. Raises as `plan` does."""
    for source, _ in _sources(inputs, None, axes)[0]:
        file = File(source, source, _parts(source, axes)[0], axes)
        for name, images in _batches(file, _arrays(source)).items():
            yield file.label(name), images


def _sources(
    inputs: Sequence[Path], output: Path | None, axes: str | None
) -> tuple[list[tuple[Path, Path]], list[str]]:
    """Return the files with their paths below the output, and notes about other files in folders.

    Raises UsageError if an input is missing, or if there are no arrays that have the `axes`.
    """
    found: list[tuple[Path, Path]] = []
    notes = []
    for path in inputs:
        if path.is_dir():
            if output is not None and path.resolve() == output.resolve():
                raise UsageError(f"--output: {output} is an input; choose another folder")
            files, others = find_files(path, SUFFIXES, without=output)
            found += [(file, file.relative_to(path)) for file in files]
            notes += [f"skipped other files: {others}"] if others else []
        elif not path.exists():
            raise UsageError(f"{path}: no such file or folder")
        elif path.suffix.lower() not in SUFFIXES:
            raise UsageError(f"{path}: expected a folder, or a file that ends in {', '.join(SUFFIXES)}")
        else:
            found.append((path, Path(path.name)))
    if axes is not None and all(_is_picture(source) for source, _ in found):
        raise UsageError("--axes: applies to .npy and .npz files, of which there are none")
    return found, notes


def _check_targets(files: list[File], output: Path, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output: {output} is not a folder")
    inputs = {file.source.resolve() for file in files}
    targets: dict[Path, Path] = {}
    for file in files:
        if file.target.resolve() in inputs:
            raise UsageError(f"--output: {file.target} is an input; choose another folder")
        if file.target in targets:
            raise UsageError(f"--output: {targets[file.target]} and {file.source} would both write {file.target}")
        targets[file.target] = file.source
    existing = [target for target in targets if target.exists()]
    if existing and not overwrite:
        raise UsageError(f"--output: would replace {listed(existing)}; choose another folder, or add --overwrite")


def _parts(path: Path, axes: str | None) -> tuple[dict[str, Header], list[str]]:
    """Return what of a file is denoised, and the names of what else an .npz file holds.

    Raises BrokenPicture for a file that cannot be read, and UsageError for one without images.
    """
    if _is_picture(path):
        return {"": pictures.read_header(path)}, []
    arrays = _arrays(path)
    numbers = {name: array for name, array in arrays.items() if array.dtype.kind in "iuf"}
    images = {name: array for name, array in numbers.items() if array.ndim >= (3 if axes is None else len(axes))}
    # Arrays of two dimensions beside these are labels, and integers of other types beside pixels are masks.
    images = images or {name: array for name, array in numbers.items() if array.ndim == 2} or numbers
    pixels = {name: array for name, array in images.items() if array.dtype.kind == "f" or array.dtype.type in _PIXELS}
    parts = {}
    for name, array in (pixels or images).items():
        with as_usage_error(f"{path}: {name}" if name else path):
            count, height, width, channels = as_batch(array, axes).shape
            parts[name] = Header(count, height, width, channels, array.dtype)
    if not parts:
        kinds = ", ".join(f"{array.dtype} {array.shape}" for array in arrays.values())
        raise UsageError(f"{path}: expected images, integers or floats, got {kinds or 'no arrays'}")
    return parts, [name for name in arrays if name not in parts]


@contextlib.contextmanager
def _as_broken(path: Path) -> Iterator[None]:
    """Raise any exception as BrokenPicture; zipfile and NumPy raise many types."""
    try:
        yield
    except Exception as error:
        raise BrokenPicture(path, error) from None


def process(
    denoiser: "Denoiser",
    files: Sequence[File],
    value_range: ValueRange = None,
    progress: Callable[[int], object] = lambda pixels: None,
) -> dict[Path, UsageError]:
    """Denoise the files; return the errors of those that failed.

    A file fails if its pixels are broken, or if its type, size or values do not fit; others are denoised nevertheless.
    `progress` is called with the number of pixels just done.
    """
    failed: dict[Path, UsageError] = {}
    for file in files:
        try:
            _denoise(denoiser, file, value_range, progress)
        except UsageError as error:
            failed[file.source] = error
            progress(file.pixels)
    return failed


def _denoise(denoiser: "Denoiser", file: File, value_range: ValueRange, progress: Callable[[int], object]) -> None:
    """Denoise one file, and write the result."""
    with _opened(file) as (noisy, denoised):
        for name, images in noisy.items():
            with as_usage_error(source := file.label(name)):
                denoiser.of(images.shape[-1]).denoise_into(denoised[name], images, value_range, progress, source)
        del images
        noisy.clear()  # a large picture is encoded in several times its own memory


@contextlib.contextmanager
def _opened(file: File) -> Iterator[tuple[Arrays, Arrays]]:
    """Yield the noisy images of each part, and space for the denoised ones; then write the latter.

    Raises BrokenPicture for a file that cannot be read.
    """
    with as_usage_error("--output", "cannot create the folder", OSError):
        file.target.parent.mkdir(parents=True, exist_ok=True)
    if _is_picture(file.source):
        pixels, icc_profile, tags = pictures.read_picture(file.source)
        noisy, denoised = _batches(file, {"": pixels}), np.empty_like(pixels)
        del pixels
        yield noisy, {"": denoised}
        pictures.write(file.target, denoised, icc_profile, tags)
        return
    arrays = _arrays(file.source)
    noisy = _batches(file, arrays)
    with atomic_path(file.target) as temporary:
        if "" in noisy:
            written = np.lib.format.open_memmap(temporary, "w+", arrays[""].dtype, arrays[""].shape)
            with open(temporary, "r+b") as reserved:
                reserve(reserved.fileno(), temporary.stat().st_size)
            yield noisy, _batches(file, {"": written})
            written.flush()
        else:
            outputs = {name: np.empty(arrays[name].shape, arrays[name].dtype) for name in noisy}
            yield noisy, _batches(file, outputs)
            with zipfile.ZipFile(file.source) as source, zipfile.ZipFile(temporary, "w") as target:
                for path in source.namelist():
                    with target.open(path, "w", force_zip64=True) as member:
                        if (name := path.removesuffix(".npy")) in outputs:
                            np.lib.format.write_array(member, outputs[name], allow_pickle=False)
                        else:
                            with _as_broken(file.source):
                                content = source.read(path)
                            member.write(content)


def _batches(file: File, arrays: Arrays) -> Arrays:
    """Return the parts of a file among its arrays, as [N, H, W, C]. Raises BrokenPicture if one is missing."""
    axes = "NYXC" if _is_picture(file.source) else file.axes
    with _as_broken(file.source):
        return {name: as_batch(arrays[name], axes) for name in file.parts}


def _arrays(path: Path) -> Arrays:
    """Return the images of a picture, [N, H, W, C], without a name, or the arrays in an .npz or .npy file."""
    if _is_picture(path):
        return {"": pictures.read(path)}
    with _as_broken(path):
        return array_files.load(path)
