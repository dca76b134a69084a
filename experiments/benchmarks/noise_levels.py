"""Compare `dae.estimate_noise` with known noise and with scikit-image, on standard photographs (docs/data.md).

`python experiments/benchmarks/noise_levels.py FOLDER`, with the folders Set12 and BSD68 in FOLDER, and scikit-image.
"""

import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import convolve, gaussian_filter
from skimage.restoration import estimate_sigma

from dae.data.noise_level import combined, estimate_noise

KINDS = "unclipped-5 unclipped-15 unclipped-25 unclipped-50 white-5 white-15 white-25 white-50 clean-0 blurred-25 "
KINDS += "demosaiced-15 jpeg-0 jpeg-25 poisson-0.01 poisson-0.0333"


def corrupted(name: str, level: float, clean: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a picture with noise, in 8 bits except if `unclipped`; `level` is of 255, or the gain of Poisson noise."""
    noise = level / 255 * rng.standard_normal(clean.shape)
    noisy = clean + (gaussian_filter(noise, 0.7) if name == "blurred" else noise)
    if name == "demosaiced":  # the red pixels of a Bayer pattern, interpolated
        noisy[1::2], noisy[:, 1::2] = 0, 0
        noisy = convolve(noisy, np.outer([1, 2, 1], [1, 2, 1]) / 4)
    if name == "poisson":
        noisy = level * rng.poisson(clean / level)
    pixels, file = np.rint(255 * np.clip(noisy, 0, 1)).astype(np.uint8), io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return noisy if name == "unclipped" else np.asarray(Image.open(file)) if name == "jpeg" else pixels


def figures(name: str, level: float, paths: list[Path]) -> list[str]:
    clean = [np.asarray(Image.open(path).convert("L")) / 255 for path in paths]
    noisy = [corrupted(name, level, image, np.random.default_rng(seed)) for seed, image in enumerate(clean)]
    found = [estimate_noise(image) for image in noisy]
    other = np.array([estimate_sigma(image) * (1 if image.dtype == np.uint8 else 255) for image in noisy])
    sigma, spread, gain, gain_error = np.array([one[:4] for one in found]).T
    error, one_error = (
        (gain / level - 1, gain_error / level) if name == "poisson" else (255 * sigma - level, 255 * spread)
    )
    cells = [255 * combined(found).sigma, abs(error).mean(), abs(other - level).mean()]
    rates = [np.mean(abs(error) < 2 * one_error)]
    rates += [np.mean([word in str(one.problems()) for one in found]) for word in ("pixels (", "JPEG", "rises")]
    together = [problem[:20] for problem in combined(found).problems()]
    return [*(f"{cell:.2f}" for cell in cells), *(f"{rate:.0%}" for rate in rates), ", ".join(together)]


print("noise | sigma of all | error | scikit-image | within 2 errors | correlated | JPEG | rises | problems of all")
files = [sorted((Path(sys.argv[1]) / folder).glob("*.png")) for folder in ("Set12", "BSD68")]
for name, level in (kind.split("-") for kind in KINDS.split()):
    sets = [figures(name, float(level), paths) for paths in (files[0], files[1][:40], files[1][40:])]
    print(name, level, *(" / ".join(cells) for cells in zip(*sets, strict=True)), sep=" | ", flush=True)
