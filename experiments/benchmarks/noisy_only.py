"""Compare losses that need no clean images with `mse`, which does, on standard photographs (docs/results.md).

`python experiments/benchmarks/noisy_only.py FOLDER`, with the folders Train400, Set12 and BSD68 in FOLDER.
"""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tyro

from dae import cli
from dae.config import RunConfig, preset
from dae.errors import UsageError

if TYPE_CHECKING:
    import keras

    from dae.data.images import Images

# Validation pictures, the last ones of the training pictures: their clean versions show which weights are best.
VALIDATION = 8
SETS = ("Set12", "BSD68")
NEED_LEVEL = ("sure", "recorrupted")
NEED_CLEAN = ("mse",)
LEVEL = 25 / 255  # of the Gaussian noise


@dataclasses.dataclass(frozen=True)
class NoisyOnlyArguments:
    """Train on pictures with noise drawn once, with each loss, and on the clean ones with new noise in each batch."""

    natural: tyro.conf.Positional[str]
    """Folder with the folders Train400, Set12 and BSD68."""
    losses: tuple[str, ...] = ("mse", "neighbor2neighbor", "noise2void", "recorrupted", "sure")
    """Losses; mse is trained on the clean pictures."""
    epochs: int = 30
    """Epochs of each run."""
    precision: str = "float32"
    """As --precision of run.py."""
    output: str = "runs/noisy_only"
    """Folder of the runs and the noisy pictures; runs in it are resumed."""


def write_noisy(folder: Path, clean: RunConfig) -> None:
    """Write the grey pictures of a run, each with noise drawn once, not clipped, as float32 TIFF files."""
    import tifffile
    from PIL import Image

    from dae.data import noise
    from dae.files import atomic_path
    from dae.seeding import stateless_seed

    corrupt = noise.corruption(clean, highest_level=1.0)
    with atomic_path(folder) as scratch:
        scratch.mkdir()
        for number, path in enumerate(sorted(Path(clean.data or "").iterdir())):
            image = np.asarray(Image.open(path), np.float32)[None, :, :, None] / 255
            noisy = corrupt(image, clean.noise_level, stateless_seed(clean.seed, "noisy pictures", number))
            tifffile.imwrite(scratch / f"{path.stem}.tif", noisy.numpy()[0, :, :, 0])


def psnr(model: "keras.Model", weights: list[np.ndarray], config: RunConfig, images: "Images") -> float:
    """Return the mean PSNR of images, with the noise of `config`, denoised with these weights."""
    from dae.analysis.denoisers import model_trial, score

    model.set_weights(weights)
    (metrics,) = score([model_trial("network", model, config, images)])
    return metrics["psnr"]


def main() -> None:
    arguments = cli.parse(NoisyOnlyArguments)
    natural, output = Path(arguments.natural), Path(arguments.output)
    for name in ("Train400", *SETS):
        if not (natural / name).is_dir():
            raise UsageError(f"{natural}: expected a folder {name} in it")
    cli.import_tensorflow()
    from dae import runtime
    from dae.analysis.report import table
    from dae.data import datasets
    from dae.training.trainer import EpochEnd, train
    from dae.workdir.model_files import load_model

    clean = preset(
        "photo",
        data=str(natural / "Train400"),
        noise_level=LEVEL,
        epochs=arguments.epochs,
        validation_examples=VALIDATION,
        precision=arguments.precision,
        shards=2,
        intra_op_threads=1,
    )
    runtime.resolve(clean)
    noisy = output / "noisy"
    output.mkdir(parents=True, exist_ok=True)
    if not noisy.exists():
        write_noisy(noisy, clean)
    validation = datasets.load(clean).validation
    tests = {name: datasets.load_test(dataclasses.replace(clean, data=str(natural / name)))[0] for name in SETS}

    selections, results = [], []
    for loss in arguments.losses:
        config = dataclasses.replace(clean, loss=loss)
        if loss not in NEED_CLEAN:
            level = LEVEL if loss in NEED_LEVEL else None
            config = dataclasses.replace(config, data=None, noisy=str(noisy), noise_level=level)
        folder = output / loss

        def save_weights(end: EpochEnd, folder: Path = folder) -> None:
            end.model.save_weights(folder / f"epoch-{end.values['epoch']:03}.weights.h5")

        train(config, folder, on_epoch_end=save_weights, resume=True, quiet=True)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        model = load_model(folder)
        weights = []
        for path in sorted(folder.glob("epoch-*.weights.h5")):
            model.load_weights(path)
            weights.append(model.get_weights())
        last = weights[-max(1, len(weights) // 10) :]
        mean = [np.mean(values, axis=0) for values in zip(*last, strict=True)]
        choices = {"last": weights[-1], "mean of the last tenth": mean}
        for title, key in (("lowest loss", "validation_loss"), ("lowest masked error", "validation_blind_spot_error")):
            if key in lines[0]:
                choices[title] = weights[min(range(len(lines)), key=lambda epoch: lines[epoch][key])]
        known = {title: psnr(model, chosen, clean, validation) for title, chosen in choices.items()}
        best = max(psnr(model, epoch, clean, validation) for epoch in weights)
        selections.append({"loss": loss, "best of all epochs": best, "lowest masked error": "", **known})
        seconds = sum(line["seconds"] for line in lines)
        results.append({"loss": loss, "steps": str(lines[-1]["step"]), "seconds": f"{seconds:.0f}"})
        results[-1] |= {name: psnr(model, weights[-1], clean, images) for name, images in tests.items()}
    print(table(results), table(selections), sep="\n")


if __name__ == "__main__":
    cli.run(main)
