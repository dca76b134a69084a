"""Draw docs/images/NAME.jpg for docs/pretrained.md: `python docs/before_after.py photographs` (extra `baselines`).

Each picture shows, at full resolution, a part of a photograph of the split test: noisy, denoised by BM3D, given the
noise level, denoised by the pretrained models, and clean, with the PSNR of the whole photograph.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import dae
from dae.analysis.classical import bm3d_for

LEVEL = 25 / 255
# The left and upper corner of a square of SIDE pixels of each photograph.
CORNERS = {"cat": (90, 0), "sky": (330, 60), "text": (60, 0)}
SIDE = 300


def psnr(clean: np.ndarray, image: np.ndarray) -> float:
    """Return the PSNR in dB of an image, clipped to [0, 1]."""
    return float(-10 * np.log10(np.mean((clean - np.clip(image, 0, 1)) ** 2)))


def main() -> None:
    """Draw a picture for each photograph, and print its PSNR."""
    folder = Path(sys.argv[1])
    for number, (name, (left, top)) in enumerate(CORNERS.items()):
        picture = Image.open(folder / "test" / f"{name}.png")
        clean = np.asarray(picture, np.float32) / np.float32(255)
        clean = clean[..., np.newaxis] if clean.ndim == 2 else clean
        noisy = clean + np.float32(LEVEL) * np.random.default_rng(number).standard_normal(clean.shape, np.float32)
        bm3d = bm3d_for(LEVEL)(noisy[np.newaxis])[0]
        columns = {"noisy": noisy, "BM3D": bm3d, "dae": dae.denoise(noisy), "clean": clean}
        height = min(SIDE, picture.height - top)
        figure = Image.new("RGB", (len(columns) * (SIDE + 4) - 4, height + 18), "white")
        for index, (label, image) in enumerate(columns.items()):
            part = np.clip(image[top : top + height, left : left + SIDE], 0, 1)
            pixels = np.rint(255 * np.broadcast_to(part, (*part.shape[:2], 3))).astype(np.uint8)
            figure.paste(Image.fromarray(pixels), (index * (SIDE + 4), 18))
            text = label if image is clean else f"{label}: {psnr(clean, image):.2f} dB"
            ImageDraw.Draw(figure).text((index * (SIDE + 4), 2), text, "black", ImageFont.load_default(13))
        figure.save(Path(__file__).parent / "images" / f"{name}.jpg", quality=93, subsampling=0)
        print(name, {label: round(psnr(clean, image), 2) for label, image in columns.items() if image is not clean})


if __name__ == "__main__":
    main()
