"""Denoising of files: which pictures and arrays to read, where to write them, and doing so.

`plan` does not import TensorFlow, so that a mistyped path is reported at once.
"""

import collections
import contextlib
import csv
import io
import math
import os
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dae.data import array_files, pictures
from dae.data.image_folder import find_files
from dae.data.images import as_batch, check_sides
from dae.data.pictures import BrokenPicture, Header
from dae.errors import UsageError, as_usage_error, listed
from dae.files import atomic_path, atomic_write

if TYPE_CHECKING:
    from dae.inference.denoise import Denoiser

SUFFIXES = (*pictures.SUFFIXES, *array_files.SUFFIXES)
# Integers that have a usual value range.
_PIXELS = (np.uint8, np.uint16)

ValueRange = tuple[float, float] | None
# Noisy images, and space for the denoised ones.
Pair = tuple[np.ndarray, np.ndarray]


class File(NamedTuple):
    """A file to denoise."""

    source: Path
    target: Path
    clean: Path | None
    parts: dict[str, Header]
    """The images to denoise: the arrays of an .npz file by name; unnamed, an .npy file's array or a picture's pages."""
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
    clean: Path | None = None,
    overwrite: bool = False,
    skip_broken: bool = False,
) -> tuple[list[File], list[str]]:
    """Return the files to denoise, and notes on how arrays and stacks are read and on what is left out.

    Writes nothing. Raises UsageError if an input is missing or, unless `skip_broken`, broken; if the shape of an array
    leaves doubts about its `axes`; if an output would be an input, that of two inputs, or, unless `overwrite`, a file
    that exists; and if an image of `clean` is missing or of another shape.
    """
    if clean is not None and not clean.is_dir():
        raise UsageError(f"--clean: {clean}: no such folder")
    sources, notes = _sources(inputs, output, axes)
    files, broken, readings = [], [], collections.defaultdict(list)
    for source, relative in sources:
        try:
            parts, copied = _parts(source, axes)
            if _is_picture(source):
                pictures.check_writable(output / relative, parts[""])
            if clean is not None:
                _check_clean(parts, clean / relative, axes)
        except BrokenPicture as error:
            if not skip_broken:
                raise UsageError(f"{error}; remove it, or skip broken ones with --skip-broken") from None
            broken.append(source)
            continue
        files.append(file := File(source, output / relative, clean and clean / relative, parts, axes))
        for name, header in parts.items():
            if header.count > 1 or not _is_picture(source):
                readings[_describe(header)].append(file.label(name))
        notes += [f"copied unchanged: {', '.join(copied)} of {source}"] if copied else []
    if not files:
        names = ", ".join(map(str, inputs))
        raise UsageError(f"{names}: nothing to denoise; expected files that end in {', '.join(SUFFIXES)}")
    _check_targets(files, output, overwrite, output / "metrics.csv" if clean is not None else None)
    notes += [f"{listed(labels)}: {'each ' * (len(labels) > 1)}{reading}" for reading, labels in readings.items()]
    return files, notes + ([f"skipped broken files: {listed(broken)}"] if broken else [])


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() not in array_files.SUFFIXES


def _describe(header: Header) -> str:
    count, height, width, channels, dtype = header
    colour = "grey" if channels == 1 else "colour"
    return f"{_counted(count, 'image')}, {height} x {width}, {colour}, {dtype.name}"


def read_images(inputs: Sequence[Path], axes: str | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the name for the user and the images [N, H, W, C] of each picture and array. Raises as `plan` does."""
    for source, _ in _sources(inputs, None, axes)[0]:
        for name, header in _parts(source, axes)[0].items():
            yield File(source, source, None, {name: header}, axes).label(name), _read(source, name, axes)


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


def _check_targets(files: list[File], output: Path, overwrite: bool, metrics: Path | None) -> None:
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output: {output} is not a folder")
    inputs = {path.resolve() for file in files for path in (file.source, file.clean) if path is not None}
    targets: dict[Path, object] = {} if metrics is None else {metrics: "--clean"}
    for file in files:
        if file.target.resolve() in inputs:
            raise UsageError(f"--output: {file.target} is an input; choose another folder")
        if file.target in targets:
            raise UsageError(f"--output: {targets[file.target]} and {file.source} would both write {file.target}")
        targets[file.target] = file.source
    existing = [target for target in targets if target.exists()]
    if existing and not overwrite:
        raise UsageError(f"--output: would replace {listed(existing)}; choose another folder, or add --overwrite")


def _check_clean(parts: dict[str, Header], clean: Path, axes: str | None) -> None:
    if not clean.exists():
        raise UsageError(f"--clean: {clean}: no such file; a clean image must have the name of the noisy one")
    found, _ = _parts(clean, axes)
    for name, header in parts.items():
        with as_usage_error(f"--clean: {clean}"):
            check_sides(header.height, header.width)
        if name not in found or found[name][:4] != header[:4]:
            got = _describe(found[name]) if name in found else "none"
            raise UsageError(f"--clean: {clean}: expected {_describe(header)}, got {got}")


def _parts(path: Path, axes: str | None) -> tuple[dict[str, Header], list[str]]:
    """Return what of a file is denoised, and the names of what else an .npz file holds.

    Raises BrokenPicture for a file that cannot be read, and UsageError for one without images.
    """
    if _is_picture(path):
        return {"": pictures.read_header(path)}, []
    with _as_broken(path):
        arrays = array_files.headers(path)
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


def check(denoiser: "Denoiser", files: Iterable[File], value_range: ValueRange = None) -> list[str]:
    """Return notes on how colour and grey are converted.

    Raises UsageError for images that the network cannot take, and for a type without a usual value range.
    """
    notes: dict[str, None] = {}
    for file in files:
        for name, (_, height, width, channels, dtype) in file.parts.items():
            network = denoiser.of(channels)
            with as_usage_error(file.label(name)):
                network.check(height, width, channels)
                network.value_range(dtype, value_range)
            if channels > network.channels:
                notes["the network is grey: it denoises each channel of colour images separately"] = None
            elif channels < network.channels:
                notes["the network is for colour: its outputs for grey images are averaged over the channels"] = None
    return list(notes)


class Result(NamedTuple):
    """The quality of one image."""

    file: str
    image: int
    """The index of the image in its array; 0 for a picture."""
    psnr_input: float
    ssim_input: float
    psnr_output: float
    ssim_output: float


def process(
    denoiser: "Denoiser",
    files: Sequence[File],
    value_range: ValueRange = None,
    progress: Callable[[int], object] = lambda pixels: None,
) -> tuple[list[Result], dict[Path, UsageError]]:
    """Denoise the files; return the quality of each image that has a clean one, and the errors of files that failed.

    A file fails if its pixels are broken, if it has changed, or if its values do not fit; others are denoised
    nevertheless. `progress` is called with the number of pixels just done.
    """
    results: list[Result] = []
    failed: dict[Path, UsageError] = {}
    for file in files:
        try:
            _denoise(denoiser, file, value_range, progress)
            if file.clean is not None:
                results.extend(_quality(denoiser, file, value_range))
        except UsageError as error:
            failed[file.source] = error
            progress(file.pixels)
    return results, failed


def write_metrics(path: Path, results: Sequence[Result]) -> str:
    """Write a .csv file with a line for each image; return the means over images for the user."""
    from dae.evaluation.metrics import psnr_of_mse

    text = io.StringIO()
    csv.writer(text).writerows([Result._fields, *results])
    atomic_write(path, text.getvalue().encode("utf-8", "surrogateescape"))
    means = Result("", 0, *np.mean([result[2:] for result in results], axis=0).tolist())
    psnrs = np.array([(result.psnr_input, result.psnr_output) for result in results])
    before, after = map(psnr_of_mse, np.mean(10 ** (-psnrs / 10), axis=0))
    return (
        f"PSNR {means.psnr_input:.2f} dB before, {means.psnr_output:.2f} dB after; SSIM {means.ssim_input:.3f} before, "
        f"{means.ssim_output:.3f} after (mean of {_counted(len(results), 'image')}); PSNR of the mean MSE "
        f"{before:.2f} dB before, {after:.2f} dB after; of each: {path}"
    )


def _denoise(denoiser: "Denoiser", file: File, value_range: ValueRange, progress: Callable[[int], object]) -> None:
    """Denoise one file, and write the result."""
    with _opened(file) as parts:
        for name, (noisy, denoised) in parts.items():
            with as_usage_error(source := file.label(name)):
                denoiser.of(noisy.shape[-1]).denoise_into(denoised, noisy, value_range, progress, source)
        del noisy, denoised  # a large picture is encoded in several times its own memory


@contextlib.contextmanager
def _opened(file: File) -> Iterator[dict[str, Pair]]:
    """Yield the noisy images of each part and space for the denoised ones, both [N, H, W, C]; then write the latter.

    Raises BrokenPicture for a file that cannot be read, or that is not as it was planned.
    """
    with as_usage_error("--output", "cannot create the folder", OSError):
        file.target.parent.mkdir(parents=True, exist_ok=True)
    if _is_picture(file.source):
        pixels, alpha, icc_profile, tags = pictures.read_picture(file.source)
        if alpha is not None and not pictures.can_hold_alpha(file.target):
            pixels, alpha = pictures.read(file.source), None
        denoised = np.empty_like(pixels)
        parts = _as_planned(file, {"": (pixels, denoised)})
        del pixels
        yield parts
        parts.clear()
        pictures.write(file.target, denoised, alpha, icc_profile, tags)
    elif "" in file.parts:
        with atomic_path(file.target) as temporary:
            with _as_broken(file.source):
                noisy = array_files.load(file.source, "")
            written = np.lib.format.open_memmap(temporary, "w+", noisy.dtype, noisy.shape)
            if hasattr(os, "posix_fallocate"):  # otherwise a full disk ends the process with SIGBUS
                with open(temporary, "r+b") as reserved:
                    os.posix_fallocate(reserved.fileno(), 0, temporary.stat().st_size)
            yield _as_planned(file, {"": (noisy, written)})
            written.flush()
    else:
        with _as_broken(file.source), zipfile.ZipFile(file.source) as archive:
            names = {info: info.filename.removesuffix(".npy") for info in archive.infolist()}
            others = {info: archive.read(info) for info, name in names.items() if name not in file.parts}
            arrays = {name: array_files.load(file.source, name) for name in file.parts}
        outputs = {name: np.empty(array.shape, array.dtype) for name, array in arrays.items()}
        yield _as_planned(file, {name: (array, outputs[name]) for name, array in arrays.items()})
        with atomic_path(file.target) as temporary, zipfile.ZipFile(temporary, "w") as target:
            for info, name in names.items():
                with target.open(info, "w", force_zip64=True) as member:
                    if name in outputs:
                        np.lib.format.write_array(member, outputs[name], allow_pickle=False)
                    else:
                        member.write(others[info])


def _as_planned(file: File, arrays: dict[str, Pair]) -> dict[str, Pair]:
    """Return the arrays as [N, H, W, C]. Raises BrokenPicture if their shapes or types are not those of the plan."""
    axes = "NYXC" if _is_picture(file.source) else file.axes
    with _as_broken(file.source):
        parts = {name: (as_batch(noisy, axes), as_batch(denoised, axes)) for name, (noisy, denoised) in arrays.items()}
        if any((*noisy.shape, noisy.dtype) != file.parts[name] for name, (noisy, _) in parts.items()):
            raise ValueError("changed after it was checked")
    return parts


def _quality(denoiser: "Denoiser", file: File, value_range: ValueRange) -> Iterator[Result]:
    """Yield the quality of each image of a denoised file that has a clean one."""
    from dae.evaluation.metrics import psnr, ssim

    def scaled(images: np.ndarray) -> np.ndarray:
        return denoiser.value_range(images.dtype, value_range).to_unit(images)

    for name in file.parts:
        paths = (path for path in (file.source, file.target, file.clean) if path is not None)
        columns = [_read(path, name, file.axes) for path in paths]
        for index in range(len(columns[0])):
            before, after, clean = (scaled(images[index : index + 1]) for images in columns)
            values = (float(metric(clean, image)[0]) for image in (before, after) for metric in (psnr, ssim))
            yield Result(file.label(name), index, *values)


def _read(path: Path, name: str, axes: str | None) -> np.ndarray:
    if _is_picture(path):
        return pictures.read(path)
    with _as_broken(path):
        return as_batch(array_files.load(path, name), axes)


def summary(files: Sequence[File], failed: Collection[Path], seconds: float, output: Path) -> str:
    """Return the last line for the user: how much was denoised, how fast and where it is."""
    done = [file for file in files if file.source not in failed]
    images = sum(header.count for file in done for header in file.parts.values())
    megapixels = sum(file.pixels for file in done) / 1e6
    return (
        f"denoised {_counted(images, 'image')} in {_counted(len(done), 'file')} "
        f"({megapixels:.3g} megapixels in {seconds:.1f} s) into {output}"
    )


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"
