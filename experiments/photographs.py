"""Make the photographs of docs/photographs.md: `python experiments/photographs.py OUTPUT --debs FOLDER`."""

import dataclasses
import hashlib
import importlib.util
import subprocess
import tempfile
from collections import namedtuple
from pathlib import Path

import numpy as np
import tyro

from dae import cli
from dae.errors import UsageError, as_usage_error, warn
from dae.files import atomic_path, check_output

# The SHA-256 that `main` prints for the packages and versions below.
DIGEST = "362cc3bb50936cb99c7f05a41ec8636e55247c42d629c1bfb073295e675f423f"

# Package: its version, and the folder of its pictures in the installed Python package or below the root of the .deb.
PYTHON = {"scikit-image": ("0.26.0", "skimage/data"), "scikit-learn": ("1.9.1", "sklearn/datasets/images")}
DEBIAN = {
    "lomiri-wallpapers-16.04": ("20.04.0-2", "usr/share/backgrounds"),
    "libjxl-testdata": ("0.0~git20230110.d6168ff-1", "usr/share/libjxl-testdata/external/wesaturate/500px"),
}
SOURCES = PYTHON | DEBIAN
# The sides of a picture are divided by its factor.
Photograph = namedtuple("Photograph", "name shows package file author license split factor", defaults=[1])
SKIMAGE, SKLEARN, LOMIRI, JXL = SOURCES
AITZOL = "Aitzol Berasategi"
# ruff: noqa: E501  (the table has one line for each picture)
# fmt: off
PHOTOGRAPHS = (
    Photograph("astronaut", "portrait", SKIMAGE, "astronaut.png", "NASA", "public domain", "train"),
    Photograph("blossom", "blossom of a tree", JXL, "u76c0g_bliznaca_srgb8.png", "bliznaca", "CC0", "train"),
    Photograph("brick", "brick wall (grey)", SKIMAGE, "brick.png", "CC0Textures", "CC0", "train"),
    Photograph("brushes", "paint brushes", LOMIRI, "Picture_1A_by_freespace.jpg", 'Trevor "Freespace"', "CC-BY-4.0", "train"),
    Photograph("cliff", "cliff by the sea", JXL, "cvo9xd_keong_macan_srgb8.png", "keong_macan", "CC0", "train"),
    Photograph("dandelion", "meadow in sunlight", LOMIRI, "seeding_by_Clements_Engelhardt.jpg", "Clemens Engelhardt", "CC0", "train", 4),
    Photograph("dogs", "dogs in front of boards", LOMIRI, "friends_by_Aitzol_Berasategi.jpg", AITZOL, "CC-BY-4.0", "train", 2),
    Photograph("fig", "fig in a bowl", LOMIRI, "Picture_0B_by_freespace.jpg", 'Trevor "Freespace"', "CC-BY-4.0", "train", 2),
    Photograph("flower", "dahlia", SKLEARN, "flower.jpg", "vultilion", "CC-BY-2.0", "train"),
    Photograph("grass", "grass (grey)", SKIMAGE, "grass.png", "linolafett", "CC0", "train"),
    Photograph("gravel", "gravel (grey)", SKIMAGE, "gravel.png", "CC0Textures", "CC0", "train"),
    Photograph("mountains", "rocks, meadow and clouds", LOMIRI, "picosdeeuropa_by_Aitzol_Berasategi.jpg", AITZOL, "CC-BY-4.0", "train", 2),
    Photograph("rocket", "rocket at dusk", SKIMAGE, "rocket.jpg", "SpaceX", "public domain", "train"),
    Photograph("stream", "stream in a forest", LOMIRI, "life_by_Aitzol_Berasategi.jpg", AITZOL, "CC-BY-4.0", "train", 2),
    Photograph("sunset", "hills at sunset", LOMIRI, "sunset_by_Aitzol_Berasategi.jpg", AITZOL, "CC-BY-4.0", "train", 3),
    Photograph("wine", "room with a drum", LOMIRI, "Wine_by_Jakkub_Mede.jpg", "Jakub Mede", "CC-BY-4.0", "train", 3),
    Photograph("camera", "cameraman (grey)", SKIMAGE, "camera.png", "Lav Varshney", "CC0", "val"),
    Photograph("china", "pagoda", SKLEARN, "china.jpg", "danielbuechele", "CC-BY-2.0", "val"),
    Photograph("coffee", "cup on a table", SKIMAGE, "coffee.png", "Rachel Michetti", "CC0", "val"),
    Photograph("tulips", "tulips", JXL, "tmshre_riaphotographs_srgb8.png", "riaphotographs", "CC0", "val"),
    Photograph("cat", "fine texture: a cat's fur", SKIMAGE, "chelsea.png", "Stefan van der Walt", "CC0", "test"),
    Photograph("sky", "flat sky above mountains", LOMIRI, "aitzgorri_by_Aitzol_Berasategi.jpg", AITZOL, "CC-BY-4.0", "test", 3),
    Photograph("text", "text (grey)", SKIMAGE, "text.png", "unnamed (Wikipedia's Corner.png)", "public domain", "test"),
)
# fmt: on


@dataclasses.dataclass(frozen=True)
class PhotographsArguments:
    """Write the photographs for training, validation and tests as PNG files to OUTPUT/train, OUTPUT/val, OUTPUT/test."""

    output: tyro.conf.Positional[str]
    """New folder to write to."""
    debs: str = "."
    """Folder of the downloaded Debian packages."""


def folder_of(package: str, debs: Path, scratch: Path) -> Path:
    """Return the folder of a package's pictures; a Debian package is unpacked to `scratch`. Raises UsageError."""
    version, folder = SOURCES[package]
    if package in PYTHON:
        spec = importlib.util.find_spec(folder.partition("/")[0])
        if spec is None or spec.origin is None:
            raise UsageError(f"{package} is not installed; run: pip install {package}=={version}")
        return Path(spec.origin).parents[1] / folder
    found = sorted(debs.glob(f"{package}_*.deb"))
    if len(found) != 1:
        problem = f"{debs} has {len(found)} files {package}_*.deb, expected one"
        raise UsageError(f"--debs: {problem}; run there: apt-get download {package}={version}")
    with as_usage_error(found[0], "cannot be unpacked by dpkg-deb", OSError, subprocess.CalledProcessError):
        subprocess.run(["dpkg-deb", "-x", found[0], scratch / package], check=True, capture_output=True)
    return scratch / package / folder


def main() -> None:
    arguments = cli.parse(PhotographsArguments)
    output = Path(arguments.output)
    check_output(output, (), "OUTPUT")
    digest = hashlib.sha256()
    sizes: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    with tempfile.TemporaryDirectory() as scratch, atomic_path(output) as written:
        folders = {name: folder_of(name, Path(arguments.debs), Path(scratch)) for name in SOURCES}
        from PIL import Image  # which scikit-image requires

        for photograph in sorted(PHOTOGRAPHS):
            path = folders[photograph.package] / photograph.file
            with as_usage_error(path, "cannot be read", OSError), Image.open(path) as image:
                picture = image.convert("L" if image.mode == "L" else "RGB").reduce(photograph.factor)
            pixels = np.asarray(picture)
            digest.update(f"{photograph.name} {pixels.shape}".encode() + pixels.tobytes())
            sizes[photograph.split].append(pixels.shape[0] * pixels.shape[1])
            (written / photograph.split).mkdir(parents=True, exist_ok=True)
            picture.save(written / photograph.split / f"{photograph.name}.png")
    for split, areas in sizes.items():
        print(f"{split}: {len(areas)} pictures, {sum(areas) / 1e6:.2f} megapixels")
    print(f"SHA-256: {digest.hexdigest()}")
    if digest.hexdigest() != DIGEST:
        warn(f"the pictures are not those of docs/photographs.md, whose SHA-256 is {DIGEST}; install its versions")


if __name__ == "__main__":
    cli.run(main)
