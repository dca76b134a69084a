"""Picture files at full precision: PNG, JPEG, BMP, GIF, WebP, TIFF, PGM and PPM. Pages and frames are images.

tifffile reads and writes TIFF, imagecodecs PNG of 16 bits, and Pillow the rest, also TIFF of 8 bits in other colours
than grey and RGB. What they do not read exactly is rejected. Pictures are upright: their EXIF orientation is applied.
"""

import contextlib
import functools
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
    **dict.fromkeys((".pgm", ".ppm", ".pnm"), "PPM"),
}
SUFFIXES = tuple(_FORMATS)
# The most pixels of a file, in all its pages; in colour they take about 4 GiB while they are read.
MAX_PIXELS = 2**29

_UINT8, _UINT16, _INT16, _FLOAT32 = map(np.dtype, (np.uint8, np.uint16, np.int16, np.float32))
_TIFF_DTYPES = (_UINT8, _UINT16, _INT16, _FLOAT32)
# The types of one image in a file of each format, and of several.
_DTYPES = {
    "PNG": ((_UINT8, _UINT16), (_UINT8,)),
    "PPM": ((_UINT8, _UINT16), ()),
    "TIFF": (_TIFF_DTYPES, _TIFF_DTYPES),
    **dict.fromkeys(("GIF", "WEBP"), ((_UINT8,), (_UINT8,))),
    **dict.fromkeys(("BMP", "JPEG"), ((_UINT8,), ())),
}
_HAVE_ALPHA = ("PNG", "TIFF", "WEBP")
# Arguments of Pillow; exact: WebP keeps colours also where it is transparent.
_OPTIONS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"lossless": True, "exact": True},
}
_GREY_MODES = ("1", "L", "LA", "La")
_PALETTE_MODES = ("P", "PA")
_TIFF_TAGS = ("description", "resolution", "resolutionunit", "extratags")
_ORIENTATION = 0x0112  # the EXIF tag, and TIFF's own


class BrokenPicture(UsageError):
    """A file is damaged, no picture, or one that cannot be read exactly."""

    def __init__(self, path: Path, error: Exception) -> None:
        super().__init__(f"{path}: not readable ({first_line(error)})")
        self.path = path


class Header(NamedTuple):
    """Size and type of the images of a file, upright, known before their pixels are decoded."""

    count: int  # type: ignore[assignment]  # a tuple's method has this name
    """Pages or frames, all of one size."""
    height: int
    width: int
    channels: int
    """1 for grey, 3 for colour; transparency does not count."""
    dtype: np.dtype
    """uint8, uint16, int16 or float32."""


class Picture(NamedTuple):
    """The images of a file with what `write` needs to write them likewise."""

    pixels: np.ndarray
    """[N, H, W, C] of the header's dtype, not blended with anything."""
    alpha: np.ndarray | None
    """Opacity [N, H, W] of the same dtype, or None if the file has no transparency."""
    icc_profile: bytes | None
    """The colour profile embedded in the file."""
    tags: dict[str, Any]
    """Arguments of the writing library: resolution, description and ImageJ's metadata, or durations of frames."""


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
    pixels, alpha, *_ = read_picture(path, at_least)
    return pixels if alpha is None else _on_white(pixels, alpha)


def read_picture(path: Path, at_least: tuple[int, int] | None = None) -> Picture:
    """Return the images, upright, with opacity, ICC profile and tags. `at_least` and errors are those of `read`."""
    with _opened(path) as source:
        values = _upright(source.decode(at_least), source.orientation)
    channels = source.header.channels
    alpha = values[..., channels] if values.shape[3] > channels else None
    return Picture(values[..., :channels], alpha, source.icc_profile, source.tags)


def can_hold_alpha(path: Path) -> bool:
    """Return whether `write` can write opacity to a file with this suffix."""
    return _FORMATS.get(path.suffix.lower()) in _HAVE_ALPHA


def check_writable(path: Path, header: Header) -> None:
    """Raise UsageError if a file with the suffix of `path` cannot hold images of this type or number."""
    kind = _FORMATS.get(path.suffix.lower())
    if kind is None:
        raise UsageError(f"{path}: expected a name that ends in {', '.join(SUFFIXES)}")
    if header.dtype not in _DTYPES[kind][header.count > 1]:
        images = "an image" if header.count == 1 else f"{header.count} images"
        raise UsageError(
            f"{path}: {path.suffix} cannot hold {images} of {header.dtype}; .tif holds uint8, uint16, int16 and float32"
        )


def write(
    path: Path,
    pixels: np.ndarray,
    alpha: np.ndarray | None = None,
    icc_profile: bytes | None = None,
    tags: dict[str, Any] | None = None,
) -> None:
    """Write images, [N, H, W, C] with C 1 or 3, as pages or frames in the format that the suffix of `path` names.

    `check_writable` says what a format holds. JPEG has quality 95 without subsampling of colours, WebP is lossless, and
    GIF has at most 256 colours per frame. `alpha` is the opacity [N, H, W] of the same dtype, for the formats of
    `can_hold_alpha`. Frames of an animation that equal the one before become a longer frame.
    """
    count, height, width, channels = pixels.shape
    check_writable(path, Header(count, height, width, channels, pixels.dtype))
    if alpha is not None and (not can_hold_alpha(path) or pixels.dtype.kind != "u"):
        raise ValueError(f"{path.suffix} cannot hold {pixels.dtype} with opacity")
    values = pixels if alpha is None else np.concatenate([pixels, alpha[..., None]], axis=3)
    kind = _FORMATS[path.suffix.lower()]
    with atomic_path(path) as temporary:
        if kind == "TIFF":
            kept = {name: value for name, value in (tags or {}).items() if name in _TIFF_TAGS}
            tifffile.imwrite(
                temporary,
                values if values.shape[3] > 1 else values[..., 0],
                photometric="rgb" if channels == 3 else "minisblack",
                planarconfig=None if values.shape[3] == 1 else "contig",
                extrasamples=None if alpha is None else ["unassalpha"],
                iccprofile=icc_profile,
                metadata=None,
                software=False,
                byteorder="<",
                **kept,
            )
        elif pixels.dtype == _UINT8:
            _write_pillow(temporary, values, kind, icc_profile, tags or {})
        elif kind == "PNG":
            temporary.write_bytes(_encode_png(values[0], icc_profile))
        else:
            head = f"P{5 if channels == 1 else 6}\n{width} {height}\n65535\n"
            temporary.write_bytes(head.encode() + values.astype(">u2").tobytes())


def _on_white(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    white = np.iinfo(pixels.dtype).max
    wide = np.uint16 if pixels.dtype == np.uint8 else np.uint32  # holds the square of white
    opacity = alpha[..., None].astype(wide)
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
    """Open a file with Pillow, or its first `count` frames. Pixels that Pillow would reduce are decoded by others."""
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
    is_grey = image.mode in (*_GREY_MODES, "I", "I;16")
    if image.mode in _PALETTE_MODES:
        red, green, blue = np.reshape(image.getpalette("RGB") or (), (-1, 3)).T
        is_grey = bool((red == green).all() and (green == blue).all())
    elif kind == "PNG":
        is_grey = start[25] in (0, 4)  # in colours for Pillow, if it has 16 bits and opacity
    is_deep = start[24] == 16 if kind == "PNG" else kind == "PPM" and _white_of_ppm(image) > 255
    if image.mode[0] in "FI" and not is_deep:
        raise ValueError(f"{kind} of the mode {image.mode}")
    header = Header(count, image.height, image.width, 1 if is_grey else 3, _UINT16 if is_deep else _UINT8)
    tags = {"loop": image.info["loop"]} if "loop" in image.info else {}
    decode: Any = functools.partial(_decode_frames, image, header, tags)
    if is_deep:
        decode = functools.partial(_decode_16_bits, file, image, header)
    keeps_colours = is_grey or image.mode in _PALETTE_MODES or image.mode.startswith("RGB")  # unlike CMYK
    icc_profile = image.info.get("icc_profile") if keeps_colours else None
    orientation = 1
    if kind != "TIFF":  # Pillow turns a TIFF itself
        with contextlib.suppress(Exception):  # a malformed orientation does not make a picture broken
            # Not `image.getexif`, which for a PNG decodes all pixels.
            orientation = Image.Image.getexif(image).get(_ORIENTATION, 1)
    return _Source(header, decode, orientation, icc_profile, tags)


def _white_of_ppm(image: Any) -> int:
    """Return the value of white in a PGM or PPM file."""
    arguments = image.tile[0].args
    return int(arguments[-1]) if isinstance(arguments, tuple) else 65535 if arguments == "I;16B" else 255


def _decode_frames(
    image: Image.Image, header: Header, tags: dict[str, Any], at_least: tuple[int, int] | None
) -> np.ndarray:
    """Decode by Pillow; add the durations of several frames, in milliseconds, to `tags`."""
    if at_least is not None and min(image.size) > 2 * max(at_least):
        image.draft(image.mode, (2 * max(at_least), 2 * max(at_least)))
    is_grey, is_animated = header.channels == 1, header.count > 1
    mode = "RGBA" if image.has_transparency_data or is_animated else "L" if is_grey else "RGB"
    frames, durations = [], []
    for index in range(header.count):
        image.seek(index)
        frame = np.asarray(image if image.mode == mode else image.convert(mode))  # `convert` always copies
        if is_grey and is_animated and (frame[..., :1] != frame[..., 1:3]).any():
            raise ValueError("frames in grey and in colour")
        frames.append(frame[..., [0, 3]] if is_grey and mode == "RGBA" else frame.reshape(*frame.shape[:2], -1))
        durations.append(image.info.get("duration", 0))
    if not is_animated:
        return frames[0][None]
    tags["duration"] = durations
    values = np.stack(frames)
    return values if (values[..., -1] < 255).any() else values[..., :-1]


def _decode_16_bits(file: IO[bytes], image: Any, header: Header, _: tuple[int, int] | None) -> np.ndarray:
    """Decode a PNG, PGM or PPM. As Pillow does with 8 bits, scale a PGM or PPM so that white is the largest value."""
    if header.count > 1:
        raise ValueError("an animation of 16 bits")
    codec, _, offset, _ = image.tile[0] if image.format == "PPM" else ("png", None, 0, None)
    file.seek(offset)
    if codec == "png":
        return imagecodecs.png_decode(file.read()).reshape(*header[:3], -1)
    if codec == "ppm_plain":
        raise ValueError("16 bits written as text")
    white, stored = _white_of_ppm(image), np.frombuffer(file.read(2 * math.prod(header[:4])), ">u2")
    scaled = (np.minimum(stored, white).astype(np.uint32) * 65535 + white // 2) // white
    return scaled.astype(np.uint16).reshape(header[:4])


def _write_pillow(path: Path, values: np.ndarray, kind: str, icc_profile: bytes | None, tags: dict[str, Any]) -> None:
    images = [
        Image.fromarray(image) for image in np.ascontiguousarray(values if values.shape[3] > 1 else values[..., 0])
    ]
    options = dict(_OPTIONS.get(kind, {}))
    if kind == "GIF" and values.shape[3] == 3:
        images = [image.quantize(dither=Image.Dither.NONE) for image in images]
    elif icc_profile is not None:
        options["icc_profile"] = icc_profile
    if len(images) > 1:
        options |= {"save_all": True, "append_images": images[1:]}
        options |= {name: tags[name] for name in ("loop", "duration") if name in tags}
    images[0].save(path, kind, **options)


def _encode_png(values: np.ndarray, icc_profile: bytes | None) -> bytes:
    encoded = imagecodecs.png_encode(np.ascontiguousarray(values))
    chunk = io.BytesIO()
    if icc_profile is not None:
        PngImagePlugin.putchunk(chunk, b"iCCP", b"ICC Profile\0\0" + zlib.compress(icc_profile))
    return bytes(encoded[:33]) + chunk.getvalue() + encoded[33:]  # after the first chunk
