"""Picture files at full precision: PNG, JPEG, BMP, GIF, WebP and TIFF. The pages of a TIFF are images.

tifffile reads and writes TIFF, imagecodecs PNG of 16 bits, and Pillow the rest, also TIFF of 8 bits in other colours
than grey and RGB. What they do not read exactly is rejected. Pictures are upright: their EXIF orientation is applied.
"""

import contextlib
import io
import logging
import math
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import imagecodecs
import numpy as np
import tifffile
from PIL import Image, PngImagePlugin

from dae.errors import UsageError, first_line
from dae.files import atomic_path

# Pillow's name of the format for each suffix.
_FORMATS = {
    **{".png": "PNG", ".bmp": "BMP", ".gif": "GIF", ".webp": "WEBP"},
    **dict.fromkeys((".jpg", ".jpeg", ".jfif"), "JPEG"),
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
}
SUFFIXES = tuple(_FORMATS)
# The most pixels of a file, in all its pages; in colour they take about 4 GiB while they are read.
MAX_PIXELS = 2**29

_UINT8, _UINT16, _INT16, _FLOAT32 = map(np.dtype, (np.uint8, np.uint16, np.int16, np.float32))
_TIFF_DTYPES = (_UINT8, _UINT16, _INT16, _FLOAT32)
# The types of an image in a file of a format, if others than uint8.
_DTYPES = {"PNG": (_UINT8, _UINT16), "TIFF": _TIFF_DTYPES}
# Arguments of Pillow.
_OPTIONS: dict[str, dict[str, Any]] = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}
_GREY_MODES = ("1", "L", "LA", "La")
_PALETTE_MODES = ("P", "PA")
_ORIENTATION = 0x0112  # the EXIF tag, and TIFF's own


class BrokenPicture(UsageError):
    """A file is damaged, no picture, or one that cannot be read exactly."""

    def __init__(self, path: Path, error: Exception) -> None:
        super().__init__(f"{path}: not readable ({first_line(error)})")
        self.path = path


class Header(NamedTuple):
    """Size and type of the images of a file, upright, known before their pixels are decoded."""

    count: int  # type: ignore[assignment]  # a tuple's method has this name
    """Pages, all of one size; 1 in formats other than TIFF."""
    height: int
    width: int
    channels: int
    """1 for grey, 3 for colour; transparency does not count."""
    dtype: np.dtype
    """uint8, uint16, int16 or float32."""


class Picture(NamedTuple):
    """The images of a file with what `write` needs to write them likewise."""

    pixels: np.ndarray
    """[N, H, W, C] of the header's dtype."""
    icc_profile: bytes | None
    """The colour profile embedded in the file."""
    tags: dict[str, Any]
    """Arguments of `tifffile.imwrite`: resolution, description and ImageJ's metadata."""


class _Source(NamedTuple):
    """An open file."""

    header: Header
    decode: Callable[[tuple[int, int] | None], np.ndarray]
    """Returns [N, H, W, C] or, with transparency, [N, H, W, C + 1]; as stored, of at least a (height, width)."""
    orientation: int
    """The EXIF orientation, which is applied to the header, but not by `decode`."""
    icc_profile: bytes | None
    tags: dict[str, Any]


def read_header(path: Path) -> Header:
    """Return the number, size and type of the images in a file, without decoding their pixels.

    Raises BrokenPicture if it cannot be read exactly, or claims more pixels than MAX_PIXELS.
    """
    with _opened(path) as source:
        return source.header


def read(path: Path, at_least: tuple[int, int] | None = None) -> np.ndarray:
    """Return the images, [N, H, W, C] of the header's dtype, upright; what is transparent is blended with white.

    With `at_least`, (height, width), a larger JPEG may be decoded at an eighth, a quarter or half of its size, which is
    faster, but not below twice that size. Raises as `read_header` does.
    """
    return read_picture(path, at_least).pixels


def read_picture(path: Path, at_least: tuple[int, int] | None = None) -> Picture:
    """Return the images as `read` does, with ICC profile and tags."""
    with _opened(path) as source:
        values = _upright(source.decode(at_least), source.orientation)
    if values.shape[3] > source.header.channels:
        values = _on_white(values[..., :-1], values[..., -1:])
    return Picture(values, source.icc_profile, source.tags)


def check_writable(path: Path, header: Header) -> None:
    """Raise UsageError if a file with the suffix of `path` cannot hold images of this type or number."""
    kind = _FORMATS.get(path.suffix.lower())
    if kind is None:
        raise UsageError(f"{path}: expected a name that ends in {', '.join(SUFFIXES)}")
    if header.dtype not in _DTYPES.get(kind, (_UINT8,)) or (header.count > 1 and kind != "TIFF"):
        images = "an image" if header.count == 1 else f"{header.count} images"
        raise UsageError(
            f"{path}: {path.suffix} cannot hold {images} of {header.dtype}; .tif holds uint8, uint16, int16 and float32"
        )


def write(path: Path, pixels: np.ndarray, icc_profile: bytes | None = None, tags: dict[str, Any] | None = None) -> None:
    """Write images, [N, H, W, C] with C 1 or 3, as pages in the format that the suffix of `path` names.

    `check_writable` must have been called. JPEG has quality 95 without subsampling of colours, WebP is lossless, and
    GIF has at most 256 colours.
    """
    channels = pixels.shape[3]
    kind = _FORMATS[path.suffix.lower()]
    with atomic_path(path) as temporary:
        if kind == "TIFF":
            tifffile.imwrite(
                temporary,
                pixels if channels == 3 else pixels[..., 0],
                photometric="rgb" if channels == 3 else "minisblack",
                planarconfig="contig" if channels == 3 else None,
                iccprofile=icc_profile,
                metadata=None,
                software=False,
                byteorder="<",
                **(tags or {}),
            )
        elif pixels.dtype == _UINT8:
            _write_pillow(temporary, pixels[0], kind, icc_profile)
        else:
            temporary.write_bytes(_encode_png(pixels[0], icc_profile))


def _on_white(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Blend images [N, H, W, C] with white by their opacity [N, H, W, 1]."""
    white = np.iinfo(pixels.dtype).max
    wide = np.uint16 if pixels.dtype == np.uint8 else np.uint32  # holds the square of white
    opacity = alpha.astype(wide)
    return ((pixels * opacity + white * (white - opacity) + wide(white // 2)) // wide(white)).astype(pixels.dtype)


def _upright(values: np.ndarray, orientation: int) -> np.ndarray:
    """Return images [N, H, W, C] turned and mirrored as their EXIF orientation says."""
    if orientation in (5, 6, 7, 8):
        values = values.swapaxes(1, 2)
    if orientation in (3, 4, 7, 8):
        values = values[:, ::-1]
    if orientation in (2, 3, 6, 7):
        values = values[:, :, ::-1]
    return values


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[_Source]:
    """Yield an open file. Raises any exception as BrokenPicture; the libraries raise many types for damaged files."""
    try:
        with open(path, "rb") as file, contextlib.ExitStack() as stack:
            is_tiff = file.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
            file.seek(0)
            source = _tiff_source(file, stack) if is_tiff else _pillow_source(file, stack)
            count, height, width, *_ = source.header
            if not 0 < count * height * width <= MAX_PIXELS:
                claim = f"{count} x {height} x {width}" if count > 1 else f"{height} x {width}"
                raise ValueError(f"claims {claim} pixels; at most {MAX_PIXELS:,} are allowed")
            if source.orientation in (5, 6, 7, 8):
                source = source._replace(header=source.header._replace(height=width, width=height))
            yield source
    except Exception as error:
        raise BrokenPicture(path, error) from None


class _Strict(threading.local):
    """Raises the errors that tifffile only logs in threads where `is_on`, such as a chain of pages that breaks off."""

    is_on = False

    def filter(self, record: logging.LogRecord) -> bool:
        if self.is_on and record.levelno >= logging.ERROR:
            raise ValueError(record.getMessage())
        return not self.is_on


_strict = _Strict()
tifffile.logger().addFilter(_strict)


def _tiff_source(file: IO[bytes], stack: contextlib.ExitStack) -> _Source:
    """Return the first series of pages. Raises ValueError if there are others than previews, or axes unlike pages."""
    _strict.is_on = True
    stack.callback(setattr, _strict, "is_on", False)
    tiff = stack.enter_context(tifffile.TiffFile(file))
    series, page = tiff.series[0], tiff.series[0].keyframe
    axes, shape = series.axes, series.shape
    kinds = [shape, *(further.shape for further in tiff.series[1:] if not further.keyframe.is_reduced)]
    # Of an OME-TIFF of several files, tifffile reads all, and replaces missing ones by zeros.
    if len(kinds) > 1 or series.is_multifile or (series.kind == "ome" and None in [*series]):
        raise ValueError(f"a TIFF with pages of several kinds or files, {kinds}; save each kind in a separate file")
    if "C" in axes or not {"Y", "X"} <= {*axes}:
        raise ValueError(f"a TIFF with the axes {axes}, {shape}; save each channel (C) as a separate stack")
    # From pages to rows, columns and samples.
    order = sorted(range(len(axes)), key=lambda axis: "YXS".find(axes[axis]))
    samples = shape[axes.index("S")] if "S" in axes else 1
    height, width = shape[axes.index("Y")], shape[axes.index("X")]
    count = math.prod(shape) // max(1, height * width * samples)
    colours = {tifffile.PHOTOMETRIC.MINISBLACK: 1, tifffile.PHOTOMETRIC.RGB: 3}.get(page.photometric, 0)
    dtype = _FLOAT32 if series.dtype.kind == "f" else series.dtype
    has_alpha = page.extrasamples == (tifffile.EXTRASAMPLE.UNASSALPHA,) and dtype.kind == "u"
    # A fourth sample beside colours is often unused; a second one beside grey is likely to be another channel.
    is_ignored = page.extrasamples == () or (colours == 3 and page.extrasamples == (tifffile.EXTRASAMPLE.UNSPECIFIED,))
    is_exact = dtype in _TIFF_DTYPES and (dtype != _UINT8 or page.bitspersample == 8)
    if not (is_exact and colours and (has_alpha or is_ignored) and samples == colours + len(page.extrasamples)):
        if dtype not in (_UINT8, np.bool_):
            kind = f"{samples} x {page.dtype} ({tifffile.PHOTOMETRIC(page.photometric).name.lower()})"
            raise ValueError(f"a TIFF of {kind}; expected uint8, uint16, int16 or floats, in grey or RGB")
        return _pillow_source(file, stack, count)._replace(tags=_tiff_tags(tiff, page))

    def decode(_: tuple[int, int] | None) -> np.ndarray:
        values = series.asarray(maxworkers=1).transpose(order).reshape(count, height, width, samples)
        with np.errstate(over="ignore"):  # to infinity, which datasets.py rejects
            return values[..., : colours + has_alpha].astype(dtype, copy=False)

    header, orientation = Header(count, height, width, colours, dtype), page.tags.valueof(_ORIENTATION, 1)
    return _Source(header, decode, orientation, page.iccprofile, _tiff_tags(tiff, page))


def _tiff_tags(tiff: tifffile.TiffFile, page: tifffile.TiffPage) -> dict[str, Any]:
    """Return arguments of `tifffile.imwrite` that keep the description of a stack and the size of its pixels."""
    tags: dict[str, Any] = {"description": page.description.encode()} if page.description else {}
    if "XResolution" in page.tags:
        tags |= {"resolution": page.resolution, "resolutionunit": page.resolutionunit}
    if tiff.is_imagej:
        tags["extratags"] = tifffile.imagej_metadata_tag(tiff.imagej_metadata or {}, "<")
    return tags


def _pillow_source(file: IO[bytes], stack: contextlib.ExitStack, count: int | None = None) -> _Source:
    """Open a file of one image with Pillow; `count` is the number of its pages, if known."""
    file.seek(0)
    start = file.read(33)
    file.seek(0)
    # Not by Image.open, which limits the size, nor by path: Pillow misreads mapped TIFFs that lie on their side.
    Image.init()
    readers = ((kind, *Image.OPEN[kind]) for kind in dict.fromkeys(_FORMATS.values()))
    kind, reader = next(((kind, reader) for kind, reader, accepts in readers if accepts and accepts(start)), ("", None))
    if reader is None:
        raise ValueError(f"no picture of the formats {', '.join(dict.fromkeys(_FORMATS.values()))}")
    image = stack.enter_context(reader(file, ""))
    if count is None:
        count = 1 if kind == "JPEG" else getattr(image, "n_frames", 1)  # the others in a JPEG are previews
    if count > 1:
        raise ValueError(f"{count} frames of {kind} in the mode {image.mode}; save them as a TIFF of grey or RGB pages")
    is_grey = image.mode in (*_GREY_MODES, "I", "I;16")
    if image.mode in _PALETTE_MODES:
        red, green, blue = np.reshape(image.getpalette("RGB") or (), (-1, 3)).T
        is_grey = bool((red == green).all() and (green == blue).all())
    elif kind == "PNG":
        is_grey = start[25] in (0, 4)  # in colours for Pillow, if it has 16 bits and opacity
    is_deep = kind == "PNG" and start[24] == 16
    if image.mode[0] in "FI" and not is_deep:
        raise ValueError(f"{kind} of the mode {image.mode}")
    header = Header(1, image.height, image.width, 1 if is_grey else 3, _UINT16 if is_deep else _UINT8)

    def decode(at_least: tuple[int, int] | None) -> np.ndarray:
        if is_deep:
            file.seek(0)
            return imagecodecs.png_decode(file.read()).reshape(*header[:3], -1)
        if at_least is not None and min(image.size) > 2 * max(at_least):
            image.draft(image.mode, (2 * max(at_least), 2 * max(at_least)))
        mode = "RGBA" if image.has_transparency_data else "L" if is_grey else "RGB"
        pixels = np.atleast_3d(image if image.mode == mode else image.convert(mode))  # `convert` always copies
        return pixels[None, ..., [0, 3]] if is_grey and mode == "RGBA" else pixels[None]

    keeps_colours = is_grey or image.mode in _PALETTE_MODES or image.mode.startswith("RGB")  # unlike CMYK
    icc_profile = image.info.get("icc_profile") if keeps_colours else None
    orientation = 1
    if kind != "TIFF":  # Pillow turns a TIFF itself
        with contextlib.suppress(Exception):  # a malformed orientation does not make a picture broken
            # Not `image.getexif`, which for a PNG decodes all pixels.
            orientation = Image.Image.getexif(image).get(_ORIENTATION, 1)
    return _Source(header, decode, orientation, icc_profile, {})


def _write_pillow(path: Path, values: np.ndarray, kind: str, icc_profile: bytes | None) -> None:
    image = Image.fromarray(np.ascontiguousarray(values if values.shape[2] == 3 else values[..., 0]))
    options = dict(_OPTIONS.get(kind, {}))
    if kind == "GIF" and values.shape[2] == 3:
        image = image.quantize(dither=Image.Dither.NONE)
    elif icc_profile is not None:
        options["icc_profile"] = icc_profile
    image.save(path, kind, **options)


def _encode_png(values: np.ndarray, icc_profile: bytes | None) -> bytes:
    encoded = imagecodecs.png_encode(np.ascontiguousarray(values))
    chunk = io.BytesIO()
    if icc_profile is not None:
        PngImagePlugin.putchunk(chunk, b"iCCP", b"ICC Profile\0\0" + zlib.compress(icc_profile))
    return bytes(encoded[:33]) + chunk.getvalue() + encoded[33:]  # after the first chunk
