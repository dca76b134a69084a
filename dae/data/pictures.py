"""One picture file at full precision: PNG, JPEG, BMP, GIF (its first frame), TIFF (its first page) and WebP.

Pillow reads and writes pictures. It reduces 16-bit colour to 8 bits without saying so, and does not read colours stored
as floats; OpenCV, of the extra `opencv`, reads and writes these. What neither reads exactly is refused. Pictures are
upright: their EXIF orientation is applied.
"""

import contextlib
import importlib.util
import math
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL import TiffImagePlugin as tiff

from dae.errors import UsageError, first_line
from dae.files import atomic_path

# Pillow's format for each suffix.
_FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jfif": "JPEG",
    ".bmp": "BMP",
    ".gif": "GIF",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".webp": "WEBP",
}
SUFFIXES = tuple(_FORMATS)
# The largest picture, in pixels; one in colour takes about 4 GiB while it is read.
MAX_PIXELS = 2**29
# Deflate, the compression of PNG, packs at most 1032 bytes into one: zlib.net/zlib_tech.html
_DEFLATE = 1032

_UINT8, _UINT16, _FLOAT32 = map(np.dtype, (np.uint8, np.uint16, np.float32))
_DTYPES = {"PNG": (_UINT8, _UINT16), "TIFF": (_UINT8, _UINT16, _FLOAT32)}
_HAVE_ALPHA = ("PNG", "TIFF", "WEBP")
_GREY_MODES = ("1", "L", "LA", "La")
_PALETTE_MODES = ("P", "PA")
_ORIENTATION = 0x0112  # the EXIF tag, and TIFF's own


class BrokenPicture(UsageError):
    """A file is damaged, no picture, or one that cannot be read exactly."""

    def __init__(self, path: Path, error: Exception) -> None:
        super().__init__(f"{path}: not readable ({first_line(error)})")
        self.path = path


class Header(NamedTuple):
    """Size and type of a picture, upright, known before its pixels are decoded."""

    height: int
    width: int
    channels: int
    """1 for grey, 3 for colour; transparency does not count."""
    dtype: np.dtype
    """uint8, uint16 or float32."""


class Picture(NamedTuple):
    """A picture with its transparency."""

    pixels: np.ndarray
    """[H, W, C] of the header's dtype, not blended with anything."""
    alpha: np.ndarray | None
    """Opacity [H, W] of the same dtype, or None if the picture has no transparency."""
    icc_profile: bytes | None
    """The colour profile embedded in the file."""


class _Source(NamedTuple):
    """The way in which a file is to be decoded."""

    header: Header
    orientation: int = 1
    """The EXIF orientation that the reader does not apply."""
    with_opencv: bool = False
    white_is_zero: bool = False
    ignore_fourth: bool = False
    """True if the fourth channel is not opacity."""
    icc_profile: bytes | None = None


def read_header(path: Path) -> Header:
    """Return size and type of the picture at `path`, without decoding its pixels.

    Raises BrokenPicture if it cannot be read or claims more pixels than MAX_PIXELS or than its bytes can hold, and
    UsageError if it needs OpenCV, which is not installed.
    """
    with _broken(path):
        return _inspect(path).header


def read(path: Path, at_least: tuple[int, int] | None = None) -> np.ndarray:
    """Return the pixels, [H, W, C] of the header's dtype, upright; what is transparent is blended with white.

    With `at_least`, (height, width), a larger JPEG may be decoded at an eighth, a quarter or half of its size, which is
    faster, but not below twice that size. Raises as `read_header` does.
    """
    pixels, alpha, _ = _read(path, at_least)
    return pixels if alpha is None else _on_white(pixels, alpha)


def read_with_alpha(path: Path) -> Picture:
    """Return the picture, upright, with its opacity and ICC profile. Raises as `read_header` does."""
    return _read(path, None)


def can_hold_alpha(path: Path) -> bool:
    """Return whether `write` can write opacity to a file with this suffix."""
    return _FORMATS.get(path.suffix.lower()) in _HAVE_ALPHA


def check_writable(path: Path, dtype: np.dtype) -> None:
    """Raise UsageError if a file with the suffix of `path` cannot hold pixels of `dtype`."""
    if path.suffix.lower() not in _FORMATS:
        raise UsageError(f"{path}: expected a name that ends in {', '.join(SUFFIXES)}")
    if dtype not in _DTYPES.get(_FORMATS[path.suffix.lower()], (_UINT8,)):
        raise UsageError(
            f"{path}: {path.suffix} cannot hold {dtype}; .png holds uint8 and uint16, .tif these and float32"
        )


def write(path: Path, pixels: np.ndarray, alpha: np.ndarray | None = None, icc_profile: bytes | None = None) -> None:
    """Write pixels, [H, W, C] with C 1 or 3, in the format that the suffix of `path` names.

    PNG and TIFF hold uint8 and uint16, TIFF also float32, and the other formats uint8. JPEG has quality 95 without
    subsampling of colours, WebP is lossless, and GIF has at most 256 colours. `alpha` is the opacity [H, W] of the same
    dtype, which PNG, TIFF and WebP hold, though not as floats. OpenCV, which writes 16-bit colour and colours as
    floats, leaves the ICC profile of a TIFF out.
    """
    check_writable(path, pixels.dtype)
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3):
        raise ValueError(f"expected pixels [H, W, 1 or 3], got {pixels.shape}")
    if alpha is not None and (not can_hold_alpha(path) or pixels.dtype == _FLOAT32 or alpha.dtype != pixels.dtype):
        raise ValueError(f"{path.suffix} cannot hold {pixels.dtype} with an opacity of {alpha.dtype}")
    with atomic_path(path) as temporary:
        if pixels.dtype != _UINT8 and (pixels.shape[2] == 3 or alpha is not None):
            _write_opencv(temporary, pixels, alpha, icc_profile)
        else:
            _write_pillow(temporary, pixels, alpha, icc_profile)


@contextlib.contextmanager
def _broken(path: Path) -> Iterator[None]:
    """Raise any exception as BrokenPicture, in one line; Pillow raises many types for damaged files."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        raise BrokenPicture(path, error) from None


def _read(path: Path, at_least: tuple[int, int] | None) -> Picture:
    with _broken(path):
        source = _inspect(path)
        values = _read_opencv(path, source) if source.with_opencv else _read_pillow(path, source, at_least)
    values = _upright(values, source.orientation)
    channels = source.header.channels
    alpha = values[..., channels] if values.shape[2] > channels else None
    return Picture(values[..., :channels], alpha, source.icc_profile)


def _on_white(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    white = np.iinfo(pixels.dtype).max
    wide = np.uint16 if pixels.dtype == np.uint8 else np.uint32  # holds the square of white
    opacity = alpha[..., None].astype(wide)
    return ((pixels * opacity + white * (white - opacity) + wide(white // 2)) // wide(white)).astype(pixels.dtype)


class _NoLimit(contextlib.ContextDecorator):
    """While any thread is within, Pillow's limit of pixels, one of its global variables, is off."""

    def __init__(self) -> None:
        self._lock, self._users, self._limit = threading.Lock(), 0, Image.MAX_IMAGE_PIXELS

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                self._limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                Image.MAX_IMAGE_PIXELS = self._limit


_no_limit = _NoLimit()


@_no_limit
def _inspect(path: Path) -> _Source:
    with open(path, "rb") as file:
        start = file.read(33)
    if start[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return _inspect_tiff(path)
    with Image.open(path, formats=sorted({*_FORMATS.values()})) as image:
        is_png = image.format == "PNG"
        depth, colour_type = struct.unpack("BB", start[24:26]) if is_png else (8, 0)
        bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour_type]
        _check_size(path, image.width, image.height, bits, _DEFLATE if is_png else math.inf)
        if depth == 16 and colour_type:
            _require_opencv(path)
            source = _Source(Header(image.height, image.width, 1 if colour_type == 4 else 3, _UINT16), with_opencv=True)
        else:
            source = _Source(_header(image))
        orientation = _orientation(image, path)
        header = source.header
        if orientation >= 5:
            header = header._replace(height=header.width, width=header.height)
        return source._replace(header=header, orientation=orientation, icc_profile=_icc_profile(image))


def _inspect_tiff(path: Path) -> _Source:
    with open(path, "rb") as file:
        start = file.read(8)
        tags = tiff.ImageFileDirectory_v2(start if start[2:4] in (b"*\0", b"\0*") else start + file.read(8))
        file.seek(tags.next)
        tags.load(file)
    samples, photometric = tags.get(tiff.SAMPLESPERPIXEL, 1), tags.get(tiff.PHOTOMETRIC_INTERPRETATION)
    bits, formats = tags.get(tiff.BITSPERSAMPLE, (1,)), set(tags.get(tiff.SAMPLEFORMAT, (1,)))
    width, height, orientation = tags[tiff.IMAGEWIDTH], tags[tiff.IMAGELENGTH], tags.get(_ORIENTATION, 1)
    expansion = {1: 1, 8: _DEFLATE, 32946: _DEFLATE}.get(tags.get(tiff.COMPRESSION, 1), math.inf)
    _check_size(path, width, height, sum(bits), expansion)
    # Pillow transposes a TIFF itself.
    size = (width, height) if orientation in range(5, 9) else (height, width)
    kind = (samples, photometric, *sorted({*bits}), *sorted(formats))
    if max(bits) <= 8 and formats == {1}:
        with Image.open(path, formats=("TIFF",)) as image:
            _, _, channels, dtype = _header(image)
            return _Source(Header(*size, channels, dtype), icc_profile=_icc_profile(image))
    if kind in ((1, 0, 16, 1), (1, 1, 12, 1), (1, 1, 16, 1), (1, 1, 16, 2), (1, 1, 32, 1), (1, 1, 32, 2)):
        source = _Source(Header(*size, 1, _UINT16), white_is_zero=photometric == 0)
    elif kind == (1, 1, 32, 3):
        source = _Source(Header(*size, 1, _FLOAT32))
    elif kind in ((3, 2, 16, 1), (4, 2, 16, 1), (3, 2, 32, 3)) and tags.get(tiff.EXTRASAMPLES, (2,)) in ((0,), (2,)):
        _require_opencv(path)
        # OpenCV mixes up the channels of a planar TIFF, and applies an orientation or not, depending on its version.
        if tags.get(tiff.PLANAR_CONFIGURATION, 1) != 1 or orientation != 1:
            raise ValueError(f"a TIFF of {bits[0]}-bit colour must not be planar, or have an orientation")
        dtype = _FLOAT32 if formats == {3} else _UINT16
        source = _Source(Header(*size, 3, dtype), with_opencv=True, ignore_fourth=tags.get(tiff.EXTRASAMPLES) == (0,))
    else:
        names = {1: "unsigned", 2: "signed", 3: "float"}
        raise ValueError(
            f"a TIFF of {samples} x {'/'.join(map(str, sorted({*bits})))} bits, "
            f"{'/'.join(names.get(number, 'unknown') for number in sorted(formats))}, photometric {photometric}; "
            "at most 16 bits unsigned, or 32-bit floats, in grey or RGB, are supported"
        )
    return source._replace(icc_profile=tags.get(tiff.ICCPROFILE))


def _check_size(path: Path, width: int, height: int, bits: int, expansion: float) -> None:
    """Raise ValueError for a picture of no or too many pixels; at most `expansion` bytes are packed into one."""
    if not 0 < width * height <= MAX_PIXELS:
        raise ValueError(f"claims {height} x {width} pixels; at most {MAX_PIXELS:,} are allowed")
    if height * (width * bits // 8) > expansion * path.stat().st_size:
        raise ValueError(f"claims {height} x {width} pixels, more than its {path.stat().st_size:,} bytes can hold")


def _require_opencv(path: Path) -> None:
    if importlib.util.find_spec("cv2") is None:
        raise UsageError(f"{path}: 16-bit or float colour needs OpenCV; install it with pip install '.[opencv]'")


def _header(image: Image.Image) -> Header:
    """Return the header of a picture that Pillow reads exactly; not turned by EXIF."""
    is_grey = image.mode in _GREY_MODES or image.mode.startswith("I")
    if image.mode in _PALETTE_MODES:
        red, green, blue = np.reshape(image.getpalette("RGB") or (), (-1, 3)).T
        is_grey = bool((red == green).all() and (green == blue).all())
    return Header(image.height, image.width, 1 if is_grey else 3, _UINT16 if image.mode.startswith("I") else _UINT8)


def _orientation(image: Image.Image, path: Path) -> int:
    """Return the EXIF orientation, 1 to 8, or 1 if it cannot be read, which does not make a picture broken."""
    try:
        if image.format == "PNG" and "exif" not in image.info:
            image.info["exif"] = _exif_after_pixels(path)
        # Not `image.getexif`, which for a PNG decodes all pixels.
        orientation = Image.Image.getexif(image).get(_ORIENTATION, 1)
    except Exception:  # of many types
        return 1
    return orientation if orientation in range(1, 9) else 1


def _exif_after_pixels(path: Path) -> bytes | None:
    """Return the content of a PNG's chunk eXIf, which may stand behind the pixels."""
    with open(path, "rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            size, kind = struct.unpack(">I4s", head)
            if kind == b"eXIf":
                return b"Exif\0\0" + file.read(size)
            file.seek(size + 4, 1)
    return None


def _icc_profile(image: Image.Image) -> bytes | None:
    """Return the ICC profile, unless it describes colours that are converted, such as CMYK."""
    keeps = image.mode in (*_GREY_MODES, *_PALETTE_MODES) or image.mode.startswith(("RGB", "I"))
    return image.info.get("icc_profile") if keeps else None


@_no_limit
def _read_pillow(path: Path, source: _Source, at_least: tuple[int, int] | None) -> np.ndarray:
    """Return [H, W, C] or, with transparency, [H, W, C + 1]."""
    # Given a path, Pillow maps some files, and then misreads a TIFF whose orientation is a quarter turn.
    with open(path, "rb") as file, Image.open(file, formats=sorted({*_FORMATS.values()})) as image:
        if at_least is not None and min(image.size) > 2 * max(at_least):
            image.draft(image.mode, (2 * max(at_least), 2 * max(at_least)))
        if source.header.dtype == _FLOAT32:
            return np.asarray(image)[..., None]
        if source.header.dtype == _UINT16:
            return _read_uint16(image, source.white_is_zero)
        grey = source.header.channels == 1
        if not image.has_transparency_data:
            mode = "L" if grey else "RGB"
            values = np.asarray(image if image.mode == mode else image.convert(mode))  # `convert` always copies
            return values[..., None] if grey else values
        values = np.asarray(image.convert("RGBA"))
        return values[..., [0, 3]] if grey else values


def _read_uint16(image: Image.Image, white_is_zero: bool) -> np.ndarray:
    values = np.asarray(image)
    if image.mode == "I" and not (values.min() >= 0 and values.max() <= 65535):
        raise ValueError("whole numbers outside 0 to 65535, which do not fit 16 bits")
    values = values.astype(np.uint16)
    if white_is_zero:
        values = 65535 - values
    transparent = image.info.get("transparency")
    if transparent is None:
        return values[..., None]
    return np.stack([values, np.where(values == transparent, 0, 65535).astype(np.uint16)], axis=-1)


def _read_opencv(path: Path, source: _Source) -> np.ndarray:
    """Return [H, W, C] or, with transparency, [H, W, C + 1]."""
    with contextlib.suppress(UnidentifiedImageError), Image.open(path, formats=("PNG",)) as image:
        image.verify()  # finds damage without the messages that OpenCV prints
    with _opencv() as cv2:
        values = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        if values is None or values.dtype != source.header.dtype or values.ndim != 3:
            raise ValueError("damaged, or of a kind that OpenCV does not read")
        values = cv2.cvtColor(values, cv2.COLOR_BGRA2RGBA if values.shape[2] == 4 else cv2.COLOR_BGR2RGB)
    if source.header.channels == 1:
        return values[..., [0, 3]]
    return values[..., :3] if source.ignore_fourth else values


@contextlib.contextmanager
def _opencv() -> Iterator[Any]:
    """Yield the module cv2, which prints no messages meanwhile."""
    import cv2  # not above: it is optional

    level = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        yield cv2
    finally:
        cv2.utils.logging.setLogLevel(level)


def _upright(values: np.ndarray, orientation: int) -> np.ndarray:
    """Return a picture [H, W, C] turned and mirrored as its EXIF orientation says."""
    if orientation >= 5:
        values = values.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        values = values[::-1]
    if orientation in (2, 3, 6, 7):
        values = values[:, ::-1]
    return values


def _write_pillow(path: Path, pixels: np.ndarray, alpha: np.ndarray | None, icc_profile: bytes | None) -> None:
    values = pixels if alpha is None else np.concatenate([pixels, alpha[..., None]], axis=2)
    image = Image.fromarray(np.ascontiguousarray(values[..., 0] if values.shape[2] == 1 else values))
    kind = _FORMATS[path.suffix.lower()]
    options: dict[str, Any] = {}
    if kind == "JPEG":
        options = {"quality": 95, "subsampling": 0}
    elif kind == "WEBP":
        options = {"lossless": True, "exact": True}  # exact: also where it is transparent
    if kind == "GIF" and image.mode == "RGB":
        image = image.quantize(dither=Image.Dither.NONE)
    elif icc_profile is not None:
        options["icc_profile"] = icc_profile
    image.save(path, kind, **options)


def _write_opencv(path: Path, pixels: np.ndarray, alpha: np.ndarray | None, icc_profile: bytes | None) -> None:
    _require_opencv(path)
    with _opencv() as cv2:
        if alpha is None:
            values = cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_RGB2BGR)
        else:
            values = np.concatenate([np.broadcast_to(pixels[..., ::-1], (*alpha.shape, 3)), alpha[..., None]], axis=2)
        written = False
        if icc_profile is not None and path.suffix.lower() == ".png":
            profile = np.frombuffer(icc_profile, np.uint8)
            written = cv2.imwriteWithMetadata(str(path), values, [cv2.IMAGE_METADATA_ICCP], [profile])
        if not written and not cv2.imwrite(str(path), values):  # an ICC profile may be damaged
            raise OSError(f"{path}: OpenCV cannot write it")
