import struct
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import tifffile
from helpers import fuzz
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from dae.data import pictures
from dae.errors import UsageError

LOSSLESS = {
    ".png": ("uint8", "uint16"),
    ".tif": ("uint8", "uint16", "int16", "float32"),
    ".bmp": ("uint8",),
    ".webp": ("uint8",),
}


def random_pixels(dtype: str, *shape: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    if dtype == "float32":
        return rng.normal(size=shape).astype(np.float32)
    return rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def png_bytes(pixels: np.ndarray, *chunks: tuple[bytes, bytes], last: tuple[tuple[bytes, bytes], ...] = ()) -> bytes:
    """Return uint16 pixels as a PNG, with these chunks before the pixels, and the last ones behind them."""
    height, width, channels = pixels.shape
    head = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    every = [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(rows)), *last, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in every
    )


def write_tiff(path: Path, pixels: np.ndarray, false_tags: Mapping[str, int] | None = None, **options: Any) -> None:
    """Write one page, pixels [H, W, C], with these options of tifffile; then overwrite some tags."""
    settings = {"photometric": "rgb" if pixels.shape[2] > 2 else "minisblack", "metadata": None, **options}
    tifffile.imwrite(path, pixels, planarconfig="contig" if pixels.shape[2] > 1 else None, **settings)
    with tifffile.TiffFile(path, mode="r+") as file:
        for name, value in (false_tags or {}).items():
            file.pages[0].tags[name].overwrite(value)


def check_read(path: Path, expected: np.ndarray) -> None:
    """Assert that the header and the pixels, blended with white, are as expected: [H, W, C], or [N, H, W, C]."""
    expected = expected if expected.ndim == 4 else expected[None]
    header = pictures.read_header(path)
    assert header[:4] == expected.shape
    pixels = pictures.read(path)
    assert header.dtype == pixels.dtype == expected.dtype
    np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("suffix", "dtype"), [(suffix, dtype) for suffix in LOSSLESS for dtype in LOSSLESS[suffix]])
def test_written_pixels_are_read_back_exactly(suffix, dtype, channels, tmp_path):
    pixels = random_pixels(dtype, 1, 21, 30, channels)
    pictures.write(tmp_path / f"a{suffix}", pixels)
    # WebP knows only colour.
    check_read(tmp_path / f"a{suffix}", pixels.repeat(3, axis=3) if (suffix, channels) == (".webp", 1) else pixels)


@pytest.mark.parametrize(
    ("dtype", "suffix", "count"),
    [
        ("uint8", ".png", 1),
        ("uint8", ".tif", 3),
        ("uint8", ".webp", 1),
        ("uint16", ".png", 1),
        ("uint16", ".tif", 1),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_transparent_is_blended_with_white(suffix, dtype, count, channels, tmp_path):
    values = random_pixels(dtype, count, 21, 30, channels + 1)
    path = tmp_path / f"a{suffix}"
    if suffix == ".tif":
        photometric: Literal["rgb", "minisblack"] = "rgb" if channels == 3 else "minisblack"
        tifffile.imwrite(path, values, photometric=photometric, planarconfig="contig", extrasamples=["unassalpha"])
    elif dtype == "uint16":
        path.write_bytes(png_bytes(values[0]))
    else:
        Image.fromarray(values[0]).save(path, lossless=True, exact=True)
    white = np.iinfo(dtype).max
    opacity = values[..., -1:] / white
    blended = np.rint(values[..., :-1] * opacity + white * (1 - opacity)).astype(dtype)
    check_read(path, blended.repeat(3, axis=3) if (suffix, channels) == (".webp", 1) else blended)


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".jfif", ".JPG"])
def test_jpeg_keeps_colours_almost_exactly_and_is_decoded_at_a_smaller_size_on_request(suffix, tmp_path):
    path, pixels = tmp_path / f"a{suffix}", random_pixels("uint8", 1, 25, 50, 3).repeat(8, axis=1).repeat(8, axis=2)
    pictures.write(path, pixels)
    assert pictures.read_header(path) == (1, 200, 400, 3, np.uint8)
    np.testing.assert_allclose(pictures.read(path).astype(int), pixels, atol=3)
    assert pictures.read(path, at_least=(20, 20)).shape == (1, 50, 100, 3)
    assert pictures.read(path, at_least=(101, 20)).shape == (1, 200, 400, 3)


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp"])
def test_animations_are_rejected(suffix, tmp_path):
    images = [Image.fromarray(frame) for frame in random_pixels("uint8", 4, 21, 30)]
    images[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=images[1:])
    with pytest.raises(pictures.BrokenPicture, match=r"\(4 frames of .* save them as a TIFF of grey or RGB pages\)$"):
        pictures.read_header(tmp_path / f"a{suffix}")


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
@pytest.mark.parametrize("compression", [None, "lzw", "deflate", "zstd"])
def test_pages_of_a_tiff_are_images(dtype, compression, tmp_path):
    pages = random_pixels(dtype, 5, 21, 30)
    tifffile.imwrite(tmp_path / "a.tif", pages, compression=compression, byteorder="<" if compression else ">")
    check_read(tmp_path / "a.tif", pages[..., None])


def test_a_stack_of_imagej_is_written_as_one(tmp_path):
    stack = random_pixels("uint16", 3, 4, 21, 30)
    metadata = {"axes": "TZYX", "unit": "micron", "spacing": 0.5, "Info": "of a microscope", "Labels": ["a"] * 12}
    tifffile.imwrite(tmp_path / "a.tif", stack, imagej=True, metadata=metadata, resolution=(9.5, 9.25))
    picture = pictures.read_picture(tmp_path / "a.tif")
    assert picture.pixels.shape == (12, 21, 30, 1)
    pictures.write(tmp_path / "b.tif", 65535 - picture.pixels, None, picture.tags)
    with tifffile.TiffFile(tmp_path / "a.tif") as before, tifffile.TiffFile(tmp_path / "b.tif") as after:
        assert after.imagej_metadata == before.imagej_metadata
        assert after.series[0].axes == "TZYX"
        assert after.pages[0].resolution == (9.5, 9.25)
        np.testing.assert_array_equal(after.asarray(), 65535 - stack)


def test_a_stack_of_tifffile_or_ome_is_written_as_one(tmp_path):
    stack = random_pixels("float32", 3, 4, 21, 30)
    for ome in (False, True):
        tifffile.imwrite(
            tmp_path / "a.tif",
            stack,
            ome=ome,
            photometric="minisblack",
            metadata={"axes": "TZYX", "Name": "µ"} if ome else {},
        )
        picture = pictures.read_picture(tmp_path / "a.tif")
        pictures.write(tmp_path / "b.tif", picture.pixels, None, picture.tags)
        with tifffile.TiffFile(tmp_path / "b.tif") as after:
            assert after.is_ome == ome
            np.testing.assert_array_equal(after.asarray(), stack)


def test_axes_and_pages_that_could_be_misread_are_rejected(tmp_path):
    path, pages = tmp_path / "a.tif", random_pixels("uint16", 4, 21, 30)
    tifffile.imwrite(path, pages[None], imagej=True, metadata={"axes": "ZCYX"})
    with pytest.raises(pictures.BrokenPicture, match=r"axes CYX, \(4, 21, 30\); save each channel"):
        pictures.read_header(path)
    tifffile.imwrite(path, pages, photometric="minisblack", planarconfig="separate")
    with pytest.raises(pictures.BrokenPicture, match="4 x uint16"):
        pictures.read_header(path)
    with tifffile.TiffWriter(path) as writer:
        for page in (pages[0], pages[1, :20]):
            writer.write(page, photometric="minisblack")
    with pytest.raises(pictures.BrokenPicture, match=r"several kinds or files, .*\(21, 30\), \(20, 30\)"):
        pictures.read_header(path)


def test_pages_of_an_ome_tiff_in_another_file_are_neither_read_nor_zero(tmp_path):
    planes = "".join(
        f'<TiffData IFD="0" FirstT="{number}" PlaneCount="1"><UUID FileName="{name}.tif">urn:uuid:{name}</UUID>'
        "</TiffData>"
        for number, name in enumerate("ab")
    )
    head = '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:'
    size = 'DimensionOrder="XYZCT" Type="uint16" SizeX="30" SizeY="21" SizeZ="1" SizeC="1" SizeT="2"'
    for name in "ab":
        xml = f'<?xml version="1.0"?>{head}{name}"><Image><Pixels {size}>{planes}</Pixels></Image></OME>'
        tifffile.imwrite(tmp_path / f"{name}.tif", random_pixels("uint16", 21, 30), description=xml, metadata=None)
    for _ in range(2):
        with pytest.raises(pictures.BrokenPicture, match="of several kinds or files"):
            pictures.read_header(tmp_path / "a.tif")
        (tmp_path / "b.tif").unlink(missing_ok=True)


def test_of_a_pyramid_the_full_size_is_read(tmp_path):
    pixels = random_pixels("uint8", 64, 80, 3)
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        writer.write(pixels, photometric="rgb")
        writer.write(pixels[::4, ::4], photometric="rgb", subfiletype=1)
    check_read(tmp_path / "a.tif", pixels)
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:  # of a kind that Pillow reads
        writer.write(pixels[..., 0] > 99, photometric="minisblack")
        writer.write(pixels[::4, ::4, 0] > 99, photometric="minisblack", subfiletype=1)
    check_read(tmp_path / "a.tif", (pixels[..., :1] > 99) * np.uint8(255))


@pytest.mark.parametrize("compression", [None, "lzw", "deflate", "zstd"])
def test_a_stack_that_was_cut_off_is_rejected(compression, tmp_path):
    tifffile.imwrite(
        tmp_path / "a.tif", random_pixels("uint16", 4, 21, 30), compression=compression, photometric="minisblack"
    )
    content = (tmp_path / "a.tif").read_bytes()
    for kept in (0.3, 0.6, 0.99):
        (tmp_path / "a.tif").write_bytes(content[: int(kept * len(content))])
        with pytest.raises(pictures.BrokenPicture):
            pictures.read(tmp_path / "a.tif")


def test_the_transparent_colour_of_a_16_bit_png_becomes_white(tmp_path):
    for channels in (1, 3):
        stored = random_pixels("uint16", 21, 30, channels)
        (tmp_path / "a.png").write_bytes(png_bytes(stored, (b"tRNS", stored[0, 0].astype(">u2").tobytes())))
        expected = stored.copy()
        expected[0, 0] = 65535
        check_read(tmp_path / "a.png", expected)


def test_palettes_become_grey_or_colour(tmp_path):
    grey = Image.fromarray(random_pixels("uint8", 21, 30)).quantize(8)
    colour = Image.fromarray(random_pixels("uint8", 21, 30, 3)).quantize(8)
    for image, mode in ((grey, "L"), (colour, "RGB")):
        for suffix in ("png", "gif", "bmp", "tif"):
            image.save(tmp_path / f"a.{suffix}")
            check_read(tmp_path / f"a.{suffix}", np.asarray(image.convert(mode)).reshape(21, 30, -1))
    colour.save(tmp_path / "a.png", transparency=3)
    expected = np.asarray(colour.convert("RGB")).copy()
    expected[np.asarray(colour) == 3] = 255
    check_read(tmp_path / "a.png", expected)


def test_black_and_white_and_cmyk_pictures_become_8_bit(tmp_path):
    image = Image.fromarray(random_pixels("uint8", 21, 30) > 99)
    for suffix in ("png", "tif", "bmp"):
        image.save(tmp_path / f"a.{suffix}")
        check_read(tmp_path / f"a.{suffix}", np.asarray(image)[..., None] * np.uint8(255))
    cmyk = Image.fromarray(np.full((20, 20, 3), (200, 100, 50), np.uint8)).convert("CMYK")
    cmyk.save(tmp_path / "a.jpg", quality=100)
    np.testing.assert_allclose(pictures.read(tmp_path / "a.jpg"), np.full((1, 20, 20, 3), (200, 100, 50)), atol=6)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_read_upright(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation

    def upright(pixels: np.ndarray) -> np.ndarray:
        image = Image.fromarray(pixels)
        image.getexif()[0x0112] = orientation
        return np.asarray(ImageOps.exif_transpose(image))

    for dtype, channels in (("uint8", 3), ("uint8", 1), ("uint16", 1), ("uint16", 3)):
        pixels = random_pixels(dtype, 21, 30, channels)
        expected = np.stack([upright(channel) for channel in np.moveaxis(pixels, 2, 0)], axis=2)
        for suffix in ("png", "tif", "webp") if (dtype, channels) == ("uint8", 3) else ("png", "tif"):
            if (dtype, channels) != ("uint16", 3):
                Image.fromarray(pixels.squeeze()).save(tmp_path / f"a.{suffix}", exif=exif, lossless=True)
            else:  # which Pillow cannot write
                chunk = b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")
                (tmp_path / "a.png").write_bytes(png_bytes(pixels, chunk))
                write_tiff(tmp_path / "a.tif", pixels, extratags=[(0x0112, "H", 1, orientation, True)])
            check_read(tmp_path / f"a.{suffix}", expected)


@pytest.mark.parametrize("exif", [b"", b"II*\0\x08\0\0\0\xff\xff\x12\x01", b"nonsense" * 9])
def test_malformed_exif_does_not_make_a_picture_broken(exif, tmp_path):
    pixels = random_pixels("uint16", 21, 30, 1)
    (tmp_path / "before.png").write_bytes(png_bytes(pixels, (b"eXIf", exif)))
    (tmp_path / "behind.png").write_bytes(png_bytes(pixels, last=((b"eXIf", exif),)))
    check_read(tmp_path / "before.png", pixels)
    check_read(tmp_path / "behind.png", pixels)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp", ".jpg"])
def test_icc_profile_is_kept(suffix, tmp_path):
    profiles = {3: ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), 1: b"of grey" * 30}
    for dtype, channels in (("uint8", 1), ("uint8", 3), ("uint16", 1), ("uint16", 3)):
        if dtype == "uint16" and suffix not in (".png", ".tif"):
            continue
        pixels = random_pixels(dtype, 1, 21, 30, channels)
        pictures.write(tmp_path / f"a{suffix}", pixels, icc_profile=profiles[channels])
        picture = pictures.read_picture(tmp_path / f"a{suffix}")
        assert picture.icc_profile == profiles[channels]
        if suffix != ".jpg":
            np.testing.assert_array_equal(picture.pixels[..., :channels], pixels)


@pytest.mark.parametrize(
    ("dtype", "shape", "options"),
    [
        ("int8", (9, 8, 1), {}),
        ("uint32", (9, 8, 1), {}),
        ("float32", (9, 8, 1), {"photometric": "miniswhite"}),
        ("uint16", (9, 8, 1), {"photometric": "miniswhite"}),
        ("uint32", (9, 8, 3), {}),
        ("uint16", (9, 8, 3), {"false_tags": {"PhotometricInterpretation": 1}}),
        ("uint16", (9, 8, 4), {"extrasamples": ["assocalpha"]}),
        ("uint16", (9, 8, 4), {"photometric": "separated"}),
    ],
)
def test_what_cannot_be_read_exactly_is_refused(dtype, shape, options, tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=shape).astype(dtype) if "f" in dtype else rng.integers(-99, 99, shape).astype(dtype)
    write_tiff(tmp_path / "a.tif", pixels, **options)
    with pytest.raises(pictures.BrokenPicture, match=r"a\.tif: not readable"):
        pictures.read(tmp_path / "a.tif")


def test_other_16_bit_and_float_tiffs_are_read_exactly(tmp_path):
    colour, floats = random_pixels("uint16", 21, 30, 4), random_pixels("float32", 21, 30, 3)
    planar = np.moveaxis(colour[..., :3], 2, 0)
    unspecified: dict[str, Any] = {"extrasamples": ["unspecified"]}
    for stored, options, expected in (
        (colour, unspecified, colour[..., :3]),
        (floats, {}, floats),
        (floats.astype(np.float16), {}, floats.astype(np.float16).astype(np.float32)),
        (floats.astype(np.float64), {}, floats),
    ):
        write_tiff(tmp_path / "a.tif", stored, **options)
        check_read(tmp_path / "a.tif", expected)
    tifffile.imwrite(tmp_path / "a.tif", planar, photometric="rgb", planarconfig="separate")
    check_read(tmp_path / "a.tif", colour[..., :3])


def test_large_pictures_are_read_and_larger_ones_than_the_limit_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5_000)
    for suffix in ("png", "tif", "bmp"):
        image = Image.new("L" if suffix == "tif" else "1", (140, 135))  # more than twice Pillow's limit
        image.save(tmp_path / f"a.{suffix}", compression="tiff_adobe_deflate")
        assert pictures.read(tmp_path / f"a.{suffix}").shape == (1, 135, 140, 1)
    assert Image.MAX_IMAGE_PIXELS == 5_000
    monkeypatch.setattr(pictures, "MAX_PIXELS", 135 * 140 - 1)
    with pytest.raises(pictures.BrokenPicture, match="at most 18,899"):
        pictures.read_header(tmp_path / "a.png")


def test_pictures_that_claim_more_pixels_than_they_can_hold_are_refused(tmp_path):
    content = bytearray(png_bytes(np.zeros((20, 20, 1), np.uint16)))
    content[16:24] = struct.pack(">II", 20_000, 20_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    (tmp_path / "a.png").write_bytes(content)
    write_tiff(tmp_path / "a.tif", np.zeros((20, 20, 1), np.uint8), {"ImageWidth": 20_000, "ImageLength": 20_000})
    for name in ("a.png", "a.tif"):
        with pytest.raises(pictures.BrokenPicture, match=r"not readable"):
            pictures.read(tmp_path / name)


def test_what_a_format_cannot_hold_is_refused(tmp_path):
    for suffix, dtype in ((".jpg", "uint16"), (".png", "float32"), (".txt", "uint8")):
        with pytest.raises(UsageError, match=rf"a\{suffix}: "):
            pictures.check_writable(tmp_path / f"a{suffix}", pictures.Header(1, 9, 8, 1, np.dtype(dtype)))
    for suffix, dtype in ((".jpg", "uint8"), (".bmp", "uint8"), (".png", "uint8"), (".png", "uint16")):
        with pytest.raises(UsageError, match=rf"a\{suffix}: \{suffix} cannot hold 2 images of {dtype}; .tif holds"):
            pictures.check_writable(tmp_path / f"a{suffix}", pictures.Header(2, 9, 8, 1, np.dtype(dtype)))


@fuzz
@given(
    data=st.data(),
    suffix=st.sampled_from([".png", ".jpg", ".bmp", ".gif", ".tif", ".webp", "16.png", "16.tif"]),
)
def test_randomly_damaged_picture_is_read_as_its_header_says_or_refused(tmp_path_factory, mnist, data, suffix):
    path = tmp_path_factory.getbasetemp() / f"damaged{suffix}"
    pixels = mnist.test.pixels[: 2 if suffix == ".tif" else 1].repeat(3, axis=3)
    pictures.write(path, pixels.astype(np.uint16) * 257 if "16" in suffix else pixels)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd but readable files
            header, pixels = pictures.read_header(path), pictures.read(path)
    except pictures.BrokenPicture as error:
        assert "\n" not in str(error)
    else:
        assert (*pixels.shape, pixels.dtype) == header
