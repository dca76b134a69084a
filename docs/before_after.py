"""Draw docs/images/NAME.jpg for docs/pretrained.md: `python docs/before_after.py photographs` (extra `baselines`).

Each picture shows, at full resolution, a part of a photograph of the split test: noisy, denoised by BM3D, given the
noise level, denoised by the pretrained models, and clean, with the PSNR of the whole photograph. With a .tif file
instead of the folder, it draws docs/images/nuclei.jpg for docs/data.md: a part of that file, which is noisy itself.
"""

import sys
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image, ImageDraw, ImageFont

import dae
from dae.inference.zero_shot import ZeroShot

LEVEL = 25 / 255
# The left and upper corner of a square of SIDE pixels of each photograph.
CORNERS = {"cat": (90, 0), "sky": (330, 60), "text": (60, 0)}
SIDE = 300


def psnr(clean: np.ndarray, image: np.ndarray) -> float:
    """Return the PSNR in dB of an image, clipped to [0, 1]."""
    return float(-10 * np.log10(np.mean((clean - np.clip(image, 0, 1)) ** 2)))


def draw(name: str, columns: dict[str, np.ndarray]) -> None:
    """Draw images [H, W, C] in [0, 1] side by side, each below its label."""
    height, width = next(iter(columns.values())).shape[:2]
    figure = Image.new("RGB", (len(columns) * (width + 4) - 4, height + 18), "white")
    for index, (label, image) in enumerate(columns.items()):
        pixels = np.rint(255 * np.broadcast_to(np.clip(image, 0, 1), (height, width, 3))).astype(np.uint8)
        figure.paste(Image.fromarray(pixels), (index * (width + 4), 18))
        ImageDraw.Draw(figure).text((index * (width + 4), 2), label, "black", ImageFont.load_default(13))
    figure.save(Path(__file__).parent / "images" / f"{name}.jpg", quality=93, subsampling=0)


def draw_photographs(folder: Path) -> None:
    """Draw a picture for each photograph, and print its PSNR."""
    from dae.analysis.denoisers import bm3d_for

    for number, (name, (left, top)) in enumerate(CORNERS.items()):
        picture = Image.open(folder / "test" / f"{name}.png")
        clean = np.asarray(picture, np.float32) / np.float32(255)
        clean = clean[..., np.newaxis] if clean.ndim == 2 else clean
        noisy = clean + np.float32(LEVEL) * np.random.default_rng(number).standard_normal(clean.shape, np.float32)
        bm3d = bm3d_for(LEVEL)(noisy[np.newaxis])[0]
        images = {"noisy": noisy, "BM3D": bm3d, "dae": dae.denoise(noisy)}
        labelled = {f"{label}: {psnr(clean, image):.2f} dB": image for label, image in images.items()} | {
            "clean": clean
        }
        draw(name, {label: image[top : top + SIDE, left : left + SIDE] for label, image in labelled.items()})
        print(name, *labelled)


def draw_noisy(path: Path) -> None:
    """Draw a noisy 8-bit image [H, W] without a clean version, brighter by a factor of two."""
    noisy = tifffile.imread(path)
    images = {
        "noisy": noisy,
        "denoise.py": dae.denoise(noisy, value_range=(0, 255)),
        "denoise.py --zero-shot": ZeroShot(dae.preset("zero_shot"))(noisy, (0, 255)),
    }
    columns = {label: image[:SIDE, :SIDE, np.newaxis] / 127.5 for label, image in images.items()}
    draw("nuclei", columns | {"removed by --zero-shot": 0.5 + columns["noisy"] - columns["denoise.py --zero-shot"]})


if __name__ == "__main__":
    (draw_noisy if sys.argv[1].endswith(".tif") else draw_photographs)(Path(sys.argv[1]))
