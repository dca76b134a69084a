"""Denoise your own images: `dae denoise photos --output denoised`; `--help` lists the flags."""

import dataclasses
import time
from pathlib import Path

import numpy as np
import tyro
from tqdm import tqdm

from dae import cli, config
from dae.config import RunConfig
from dae.data.values import ValueRange
from dae.errors import UsageError, as_usage_error, listed
from dae.inference import denoise_files


@dataclasses.dataclass(frozen=True)
class DenoiseArguments:
    """Denoise pictures and arrays; the outputs keep names, sizes, formats and bit depths."""

    inputs: tyro.conf.Positional[tuple[str, ...]]
    """Pictures, .npy and .npz files, and folders of them."""
    output: str
    """Folder to write to, with the subfolders of the inputs."""
    model: str | None = None
    """Folder of a run, or a .keras or .h5 file; None: the pretrained models, for photographs with white Gaussian
    noise."""
    zero_shot: tyro.conf.FlagCreatePairsOff[bool] = False
    """First train a network on each file alone, in about a minute: for noise that is independent between pixels."""
    noise_level: float | None = None
    """With --zero-shot: the noise is white and Gaussian with this standard deviation, such as 25/255 (black is 0, white
    1); None: the kind of the noise and its level are estimated (docs/data.md)."""
    seed: int = 0
    """Seed of --zero-shot."""
    self_ensemble: tyro.conf.FlagCreatePairsOff[bool] = False
    """Average over the eight flips and rotations of each image: slightly better, in eight times the time."""
    value_range: tuple[float, float] | None = None
    """Values of black and white; None: those of the run for images of the same type; else 0 and 255 or 65535 for
    uint8 and uint16, 0 and 1 for floats."""
    axes: str | None = None
    """Axes of arrays, one letter each, such as NYXC, NCYX or YXZ (slices last): Y is for rows, X for columns, C for
    channels, others count images; None: by the shape, where it leaves no doubt."""
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False
    """Replace outputs that exist."""


def main() -> None:
    """Denoise the files that the command line names."""
    arguments = cli.parse(DenoiseArguments)
    if not arguments.inputs:
        raise UsageError("expected one or more pictures, arrays or folders to denoise")
    if arguments.value_range is not None:
        with as_usage_error("--value-range"):
            ValueRange.requested(arguments.value_range, np.dtype(np.float32))
    for name in arguments.inputs:
        if Path(name).suffix in (".keras", ".h5") or Path(name, "config.json").exists():
            raise UsageError(f"{name}: a model, not images; write --model {name}")
    if arguments.zero_shot and arguments.model is not None:
        raise UsageError("--zero-shot: starts from the package's models; leave out --model")
    if arguments.noise_level is not None and not arguments.zero_shot:
        raise UsageError("--noise-level: applies to --zero-shot, which is not given")
    path, output = None if arguments.model is None else Path(arguments.model), Path(arguments.output)
    if path is not None and not path.exists():
        raise UsageError(
            f"--model: {path}: no such run or model file; expected a run's folder, or a .keras or .h5 file"
        )
    trained = config.read(path / "config.json") if path is not None and path.is_dir() else RunConfig()
    files, notes, broken = denoise_files.plan(
        [Path(name) for name in arguments.inputs],
        output,
        arguments.axes,
        arguments.overwrite,
    )
    for note in notes:
        print(note)

    cli.import_tensorflow(trained.onednn)
    from dae import runtime
    from dae.inference.denoise import Denoiser
    from dae.workdir.model_files import load_model

    if arguments.zero_shot:
        from dae.inference.zero_shot import ZeroShot

        settings = config.preset("zero_shot", seed=arguments.seed, noise_level=arguments.noise_level)
        runtime.resolve(settings)
        denoiser: Denoiser = ZeroShot(settings, arguments.self_ensemble)
    else:
        runtime.resolve(dataclasses.replace(RunConfig(), onednn=trained.onednn), whole_batches=True)
        denoiser = Denoiser(None if path is None else load_model(path), self_ensemble=arguments.self_ensemble)
    channels = {header.channels for file in files for header in file.parts.values()}
    if any(denoiser.of(count).channels == 1 < count for count in channels):
        print("the network is grey: it denoises each channel of colour images separately")
    if 1 in channels and denoiser.of(1).channels > 1:
        print("the network is for colour: its outputs for grey images are averaged over the channels")
    started = time.perf_counter()
    with tqdm(total=sum(file.pixels for file in files), unit="px", unit_scale=True, disable=None) as bar:
        failed = denoise_files.process(denoiser, files, arguments.value_range, bar.update)
    seconds = time.perf_counter() - started
    done = [file for file in files if file.source not in failed]
    megapixels = sum(file.pixels for file in done) / 1e6
    count = f"{len(done)} of {len(files) + len(broken)} files"
    print(f"denoised {count} ({megapixels:.3g} megapixels in {seconds:.1f} s) into {output}")
    if failed := broken | failed:
        raise UsageError(f"{next(iter(failed.values()))}; denoised all files but {listed(failed)}")
