"""Denoising of files: which pictures and arrays to read, where to write them, and doing so.

`plan` does not import TensorFlow, so that a mistyped path is reported at once.
"""

import collections
import csv
import itertools
import math
import os
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dae.data import pictures
from dae.data.array_files import npy_header
from dae.data.image_folder import find_files
from dae.data.images import shape_as_batch
from dae.data.pictures import BrokenPicture
from dae.errors import UsageError, as_usage_error, listed
from dae.files import atomic_path

if TYPE_CHECKING:
    from dae.inference.denoise import Denoiser

ARRAYS = (".npy", ".npz")
SUFFIXES = (*pictures.SUFFIXES, *ARRAYS)
# Pictures are read and computed together up to this many pixels.
_GROUP_PIXELS = 2**18
# As many images of an array are shown.
_SHOWN = 10

ValueRange = tuple[float, float] | None


class Member(NamedTuple):
    """A picture, or an array of a file."""

    name: str
    """The name within an .npz file, or an empty string."""
    shape: tuple[int, ...]
    """As stored."""
    dtype: np.dtype

    @property
    def images(self) -> tuple[int, int, int, int]:
        """The shape as [N, H, W, C]."""
        return shape_as_batch(self.shape)


class File(NamedTuple):
    """A file to denoise."""

    source: Path
    target: Path
    clean: Path | None
    comparison: Path | None
    """Path for input and output side by side; in an .npz file, the name of the array is added."""
    members: tuple[Member, ...]
    """The picture, or the arrays that are images."""
    copied: tuple[str, ...] = ()
    """Names of the arrays of an .npz file that are copied."""

    @property
    def is_picture(self) -> bool:
        """True for a picture, False for an array."""
        return self.source.suffix.lower() not in ARRAYS

    def comparison_of(self, member: Member) -> Path | None:
        """Return the path for the comparison of one of the members."""
        if self.comparison is None or not member.name:
            return self.comparison
        return self.comparison.with_stem(f"{self.comparison.stem}-{member.name.replace('/', '-')}")

    @property
    def pixels(self) -> int:
        """The number of pixels, N H W, of all images."""
        return sum(math.prod(member.images[:3]) for member in self.members)


class Plan(NamedTuple):
    """The files to denoise, and notes for the user about those that are not."""

    files: list[File]
    notes: list[str]


def plan(
    inputs: Sequence[Path],
    output: Path,
    clean: Path | None = None,
    show: bool = False,
    overwrite: bool = False,
    skip_broken: bool = False,
) -> Plan:
    """Return what to do, after checking that all inputs can be read and all outputs written. Writes nothing.

    Raises UsageError if an input is missing or, unless `skip_broken`, broken; if an output would be an input, that of
    two inputs, or, unless `overwrite`, a file that exists; and if an image of `clean` is missing or of another shape.
    """
    if clean is not None and not clean.is_dir():
        raise UsageError(f"--clean: {clean}: no such folder")
    sources, notes = _sources(inputs, output)
    files, broken = [], []
    for source, relative in sources:
        comparison = output / relative.with_name(f"{relative.stem}-comparison.png") if show else None
        try:
            members, copied = _members(source)
            if source.suffix.lower() not in ARRAYS:
                pictures.check_writable(output / relative, members[0].dtype)
        except BrokenPicture as error:
            if not skip_broken:
                raise UsageError(f"{error}; remove it, or skip broken ones with --skip-broken") from None
            broken.append(source)
            continue
        matching = None if clean is None else clean / relative
        file = File(source, output / relative, matching, comparison, members, copied)
        if matching is not None:
            _check_clean(file, matching)
        files.append(file)
    if not files:
        names = ", ".join(map(str, inputs))
        raise UsageError(f"{names}: nothing to denoise; expected files that end in {', '.join(SUFFIXES)}")
    _check_targets(files, output, overwrite, output / "metrics.csv" if clean is not None else None)
    notes += [f"copied unchanged: {', '.join(file.copied)} of {file.source}" for file in files if file.copied]
    if broken:
        notes.append(f"skipped broken files: {listed(broken)}")
    return Plan(files, notes)


def _sources(inputs: Sequence[Path], output: Path) -> tuple[list[tuple[Path, Path]], list[str]]:
    """Return the files with their paths below the output, and notes about other files in folders."""
    found: list[tuple[Path, Path]] = []
    notes = []
    for path in inputs:
        if path.is_dir():
            if path.resolve() == output.resolve():
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
    return found, notes


def _check_targets(files: list[File], output: Path, overwrite: bool, metrics: Path | None) -> None:
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output: {output} is not a folder")
    inputs = {path.resolve() for file in files for path in (file.source, file.clean) if path is not None}
    targets: dict[Path, object] = {} if metrics is None else {metrics: "--clean"}
    for file in files:
        for target in filter(None, (file.target, *map(file.comparison_of, file.members))):
            if target.resolve() in inputs:
                raise UsageError(f"--output: {target} is an input; choose another folder")
            if target in targets:
                raise UsageError(f"--output: {targets[target]} and {file.source} would both write {target}")
            targets[target] = file.source
    existing = [target for target in targets if target.exists()]
    if existing and not overwrite:
        raise UsageError(f"--output: would replace {listed(existing)}; choose another folder, or add --overwrite")
    folder = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not os.access(folder, os.W_OK):
        raise UsageError(f"--output: {folder} is not writable")


def _check_clean(file: File, clean: Path) -> None:
    if not clean.exists():
        raise UsageError(f"--clean: {clean}: no such file; it must have the same name as {file.source}")
    members, _ = _members(clean)
    shapes = {member.name: member.images for member in members}
    for member in file.members:
        if shapes.get(member.name) != member.images:
            raise UsageError(
                f"--clean: {clean}: expected {member.images} as {file.source}, got {shapes.get(member.name)}"
            )
        if min(member.images[1:3]) < 11:
            raise UsageError(f"--clean: {file.source}: SSIM needs images of at least 11 x 11, got {member.images}")


def _members(path: Path) -> tuple[tuple[Member, ...], tuple[str, ...]]:
    """Return the images of a file, and the names of the arrays in it that are none.

    Raises BrokenPicture for a file that cannot be read, and UsageError for one without images.
    """
    if path.suffix.lower() not in ARRAYS:
        header = pictures.read_header(path)
        return (Member("", header[:3], header.dtype),), ()
    try:
        arrays = list(_arrays(path))
    except Exception as error:  # zipfile and NumPy raise many types
        raise BrokenPicture(path, error) from None
    images: list[Member] = []
    problems: dict[str, UsageError] = {}
    for array in arrays:
        try:
            _check_array(array)
            images.append(array)
        except UsageError as error:
            problems[array.name] = error
    if any(len(image.shape) > 2 for image in images):  # beside these, an array of two dimensions holds labels
        problems |= {image.name: UsageError("no images") for image in images if len(image.shape) == 2}
        images = [image for image in images if len(image.shape) > 2]
    if not images:
        reasons = "; ".join(f"{name}: {error}" if name else str(error) for name, error in problems.items())
        raise UsageError(f"{path}: {reasons or 'holds no arrays'}")
    return tuple(images), tuple(problems)


def _arrays(path: Path) -> Iterator[Member]:
    if path.suffix.lower() == ".npy":
        with open(path, "rb") as file:
            yield Member("", *npy_header(file, path.stat().st_size)[:2])
    else:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if not info.filename.endswith(".npy"):
                    yield Member(info.filename, (), np.dtype(object))
                    continue
                with archive.open(info) as member:
                    yield Member(info.filename.removesuffix(".npy"), *npy_header(member, info.file_size)[:2])


def _check_array(array: Member) -> None:
    if array.dtype.kind not in "iuf":
        raise UsageError(f"expected integers or floats, got {array.dtype}")
    shape_as_batch(array.shape)


def check(denoiser: "Denoiser", files: Iterable[File]) -> list[str]:
    """Return notes on how colour and grey are converted.

    Raises UsageError for an image that the network cannot take.
    """
    counts: collections.Counter[tuple[bool, int]] = collections.Counter()
    for file in files:
        for member in file.members:
            count, height, width, channels = member.images
            with as_usage_error(file.source):
                denoiser.check(height, width, channels)
            if channels != denoiser.channels:
                counts[file.is_picture, channels] += 1 if file.is_picture else count
    how = {3: "colour {} per channel with a grey network", 1: "grey {} with a colour network, averaging its channels"}
    kinds = {True: ("picture", "pictures"), False: ("image of arrays", "images of arrays")}
    return [
        f"processing {count} {how[channels].format(kinds[is_picture][count != 1])}"
        for (is_picture, channels), count in sorted(counts.items())
    ]


class Result(NamedTuple):
    """The quality of one image."""

    file: str
    image: int
    """The index of the image in its array; 0 for a picture."""
    psnr_input: float
    ssim_input: float
    psnr_output: float
    ssim_output: float


class _Run(NamedTuple):
    denoiser: "Denoiser"
    value_range: ValueRange
    skip_broken: bool
    progress: Callable[[int], object]
    results: list[Result]
    broken: list[Path]


def process(
    denoiser: "Denoiser",
    files: Sequence[File],
    value_range: ValueRange = None,
    skip_broken: bool = False,
    progress: Callable[[int], object] = lambda pixels: None,
) -> tuple[list[Result], list[Path]]:
    """Denoise the files; return the quality of each image that has a clean one, and the files that were broken.

    `progress` is called with the number of pixels just denoised. Raises UsageError for a file whose pixels are broken,
    unless `skip_broken`; the outputs of those before it have then been written.
    """
    run = _Run(denoiser, value_range, skip_broken, progress, [], [])
    with ThreadPoolExecutor() as pool:
        for is_picture, neighbours in itertools.groupby(files, lambda file: file.is_picture):
            if is_picture:
                for group in _groups(neighbours):
                    _process_pictures(run, group, pool)
            else:
                for file in neighbours:
                    _process_arrays(run, file)
    return run.results, run.broken


def write_metrics(path: Path, results: Sequence[Result]) -> None:
    """Write a .csv file with a line for each image: PSNR in dB and SSIM of the input and of the output."""
    with (
        atomic_path(path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(Result._fields)
        writer.writerows(results)


def mean_quality(results: Sequence[Result]) -> str:
    """Return the means of PSNR and SSIM over images, before and after, for the user."""
    means = Result("", 0, *np.mean([result[2:] for result in results], axis=0).tolist()) if results else None
    if means is None:
        return "no images compared"
    images = "1 image" if len(results) == 1 else f"mean of {len(results)} images"
    return (
        f"PSNR {means.psnr_input:.2f} dB before, {means.psnr_output:.2f} dB after; "
        f"SSIM {means.ssim_input:.3f} before, {means.ssim_output:.3f} after ({images})"
    )


def _groups(files: Iterable[File]) -> Iterator[list[File]]:
    """Yield lists of consecutive pictures of the same shape and type, of at most `_GROUP_PIXELS`, or one."""
    group: list[File] = []
    for file in files:
        if group and (file.members != group[0].members or (len(group) + 1) * file.pixels > _GROUP_PIXELS):
            yield group
            group = []
        group.append(file)
    if group:
        yield group


def _process_pictures(run: _Run, files: list[File], pool: ThreadPoolExecutor) -> None:
    read = []
    for file, picture in zip(files, pool.map(_read_picture, files), strict=True):
        if not isinstance(picture, BrokenPicture):
            read.append((file, picture))
        elif run.skip_broken:
            run.broken.append(file.source)
            run.progress(file.pixels)
        else:
            raise UsageError(f"{picture}; remove it, or skip broken ones with --skip-broken")
    if not read:
        return
    noisy = read[0][1].pixels[None] if len(read) == 1 else np.stack([picture.pixels for _, picture in read])
    rests = [(file, picture.alpha, picture.icc_profile) for file, picture in read]
    del picture, read
    with as_usage_error(files[0].source if len(files) == 1 else files[0].source.parent):
        denoised = run.denoiser(noisy, run.value_range, run.progress)
    for index, (file, _, _) in enumerate(rests):
        if file.clean is not None or file.comparison is not None:
            clean = None if file.clean is None else pictures.read(file.clean)[None]
            _evaluate(run, file, file.members[0], noisy[index : index + 1], denoised[index : index + 1], clean)
    del noisy  # a large picture is encoded in several times its own memory
    for pixels, (file, alpha, icc_profile) in zip(denoised, rests, strict=True):
        _make_folder(file.target)
        pictures.write(file.target, pixels, alpha, icc_profile)


def _read_picture(file: File) -> "pictures.Picture | BrokenPicture":
    try:
        picture = pictures.read_with_alpha(file.source)
        if picture.alpha is not None and not pictures.can_hold_alpha(file.target):
            picture = picture._replace(pixels=pictures.read(file.source), alpha=None)
        return picture
    except BrokenPicture as error:
        return error


def _process_arrays(run: _Run, file: File) -> None:
    _make_folder(file.target)
    if file.source.suffix.lower() == ".npz":
        with atomic_path(file.target) as temporary:
            _process_npz(run, file, temporary)
        return
    with atomic_path(file.target) as temporary:
        noisy = np.load(file.source, mmap_mode="r", allow_pickle=False)
        denoised = np.lib.format.open_memmap(temporary, "w+", noisy.dtype, noisy.shape)
        if hasattr(os, "posix_fallocate"):  # otherwise a full disk ends the process with SIGBUS
            with open(temporary, "r+b") as written:
                os.posix_fallocate(written.fileno(), 0, temporary.stat().st_size)
        clean = None if file.clean is None else np.load(file.clean, mmap_mode="r", allow_pickle=False)
        _denoise_array(run, file, file.members[0], noisy, denoised, clean)
        denoised.flush()


def _process_npz(run: _Run, file: File, path: Path) -> None:
    """Write the arrays to `path`, one after the other, compressed as in the source."""
    members = {member.name: member for member in file.members}
    with zipfile.ZipFile(file.source) as archive, zipfile.ZipFile(path, "w") as written:
        for info in archive.infolist():
            member = members.get(info.filename.removesuffix(".npy"))
            entry = zipfile.ZipInfo(info.filename)
            entry.compress_type = info.compress_type
            with archive.open(info) as source, written.open(entry, "w", force_zip64=True) as target:
                if member is None:
                    shutil.copyfileobj(source, target)
                    continue
                noisy = np.lib.format.read_array(source, allow_pickle=False)
                denoised = np.empty(noisy.shape, noisy.dtype)
                clean = None if file.clean is None else np.load(file.clean, allow_pickle=False)[member.name]
                _denoise_array(run, file, member, noisy, denoised, clean)
                np.lib.format.write_array(target, denoised, allow_pickle=False)


def _denoise_array(
    run: _Run, file: File, member: Member, noisy: np.ndarray, denoised: np.ndarray, clean: np.ndarray | None
) -> None:
    shape = member.images
    with as_usage_error(file.source):
        run.denoiser.denoise_into(denoised.reshape(shape), noisy.reshape(shape), run.value_range, run.progress)
    if clean is not None or file.comparison is not None:
        clean = None if clean is None else clean.reshape(shape)
        _evaluate(run, file, member, noisy.reshape(shape), denoised.reshape(shape), clean)


def _make_folder(target: Path) -> None:
    with as_usage_error("--output", "cannot create the folder", OSError):
        target.parent.mkdir(parents=True, exist_ok=True)


def _evaluate(
    run: _Run, file: File, member: Member, noisy: np.ndarray, denoised: np.ndarray, clean: np.ndarray | None
) -> None:
    """Append the quality of each image [N, H, W, C], if there is a clean one, and write the comparison."""
    from dae.evaluation.metrics import psnr, ssim

    columns = [noisy, denoised] if clean is None else [noisy, denoised, clean]

    def scaled(images: np.ndarray) -> np.ndarray:
        return run.denoiser.value_range(images.dtype, run.value_range).to_unit(images)

    for index in range(len(noisy) if clean is not None else 0):
        one, other, truth = (scaled(images[index : index + 1]) for images in columns)
        values = (float(metric(truth, image)[0]) for image in (one, other) for metric in (psnr, ssim))
        label = f"{file.source}:{member.name}" if member.name else str(file.source)
        run.results.append(Result(label, index, *values))
    path = file.comparison_of(member)
    if path is not None:
        rows = np.concatenate([scaled(images[:_SHOWN]) for images in columns], axis=2)
        pixels = np.rint(np.clip(rows, 0, 1) * 255).astype(np.uint8).reshape(-1, *rows.shape[2:])
        _make_folder(path)
        pictures.write(path, pixels)


def summary(files: Sequence[File], broken: Sequence[Path], seconds: float, output: Path) -> str:
    """Return the last line for the user: how much was denoised, how fast and where it is."""
    done = [file for file in files if file.source not in set(broken)]
    pictures_done = sum(file.is_picture for file in done)
    counts = ((pictures_done, "picture", "pictures"), (len(done) - pictures_done, "array file", "array files"))
    text = " and ".join(f"{count} {one if count == 1 else many}" for count, one, many in counts if count) or "nothing"
    megapixels = sum(file.pixels for file in done) / 1e6
    return f"denoised {text} ({megapixels:.3g} megapixels in {seconds:.1f} s) into {output}"
