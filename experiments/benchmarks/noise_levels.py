"""Compare `dae.estimate_noise` with known noise and with scikit-image, on FOLDER/Set12 and FOLDER/BSD68 (docs/data.md).

`python experiments/benchmarks/noise_levels.py FOLDER`. Errors are of the level, or of the gain of Poisson noise.
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
    noisy = level * rng.poisson(clean / level) if name == "poisson" else noisy
    pixels, file = np.rint(255 * np.clip(noisy, 0, 1)).astype(np.uint8), io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return noisy if name == "unclipped" else np.asarray(Image.open(file)) if name == "jpeg" else pixels


def figures(name: str, level: float, paths: list[Path]) -> list[str]:
    """Return the figures of a line of the table for some pictures; for Poisson noise, the level is the gain."""
    clean = [np.asarray(Image.open(path).convert("L")) / 255 for path in paths]
    noisy = [corrupted(name, level, image, np.random.default_rng(seed)) for seed, image in enumerate(clean)]
    found = [estimate_noise(image) for image in noisy]
    other = np.array([estimate_sigma(image) * (1 if image.dtype == np.uint8 else 255) for image in noisy])
    if name == "poisson":
        errors = np.array([abs(estimate.gain - level) for estimate in found])
        spread = np.array([estimate.gain_error for estimate in found])
    else:
        errors = np.array([abs(255 * estimate.sigma - level) for estimate in found])
        spread = np.array([255 * estimate.sigma_error for estimate in found])
    cells = [255 * combined(found).sigma, errors.mean(), abs(other - level).mean(), np.mean(errors < 2 * spread)]
    problems = [str(estimate.problems()) for estimate in found]
    cells += [np.mean([word in text for text in problems]) for word in ("pixels (", "JPEG", "rises")]
    return [f"{cell:.3g}" for cell in cells]


print("noise | level | sigma of all | error | scikit-image | within 2 errors | correlated | JPEG | rises")
files = [sorted((Path(sys.argv[1]) / folder).glob("*.png")) for folder in ("Set12", "BSD68")]
for name, level in (kind.split("-") for kind in KINDS.split()):
    sets = [figures(name, float(level), paths) for paths in (files[0], files[1][:40], files[1][40:])]
    print(name, level, *(" / ".join(cells) for cells in zip(*sets, strict=True)), sep=" | ", flush=True)
