"""Check a claimed record, the time to a quality: `python experiments/benchmarks/record.py --preset good`."""

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

from measure import Program, save, table
from tqdm import tqdm

from dae import cli
from dae.config import RunConfig, shortest
from dae.errors import UsageError, lookup

# Programs of programs.py that report the PSNR of their last epoch, or write a run.
CONTESTANTS = ("dae", "fit", "PyTorch", "PyTorch compile")


@dataclasses.dataclass(frozen=True)
class RecordArguments(cli.ConfigArguments, cli.PresetArguments):
    """Train with several seeds, and print rows for the table of records in docs/results.md.

    The rule: the mean PSNR of the test images, by the model that is kept, is greater than the target with p < 0.01
    (t-test over the seeds, one-sided). The time is that from the end of the imports to the end of the last epoch:
    loading the images, tracing, training and, but for PyTorch, validation.
    """

    target: float = 20.4
    """PSNR of the test images to exceed, in dB."""
    seeds: int = 5
    """Number of runs, with the seeds 0, 1, ..."""
    programs: tuple[str, ...] = ("dae",)
    """Programs to train, in turn for each seed: dae, fit, PyTorch and "PyTorch compile". All but dae train with Adam at
    1e-3 on bce, for the epochs and with the network, images and batch size of the flags."""
    checkouts: tuple[str, ...] = ()
    """Also train with dae of other checkouts of this repository, in turn with the others."""
    output: str = "runs/record"
    """Folder of record.json."""


def train(program: Program, config: RunConfig) -> dict[str, Any]:
    """Train for all epochs of `config`; return the `seconds`, the `psnr` and, of a run, the digest of its weights."""
    with program:
        epochs = [program.epoch() for _ in range(config.epochs)]
        seconds = sum(epoch["seconds"] for epoch in epochs)
        if "test_psnr" in epochs[-1]:
            return {"seconds": seconds, "psnr": epochs[-1]["test_psnr"]}
        program.finish()
        report = json.loads((program.run / "report.json").read_text(encoding="utf-8"))
    return {"seconds": seconds, "psnr": report["test_psnr"], "weights_sha256": report["weights_sha256"]}


def main() -> None:
    arguments = cli.parse_config(RecordArguments)
    for name in arguments.programs:
        lookup(dict.fromkeys(CONTESTANTS), name, "--programs")
    if arguments.seeds < 2:
        raise UsageError(f"--seeds: expected an integer >= 2, got {arguments.seeds}")
    try:
        from scipy.stats import ttest_1samp
    except ModuleNotFoundError:
        raise UsageError("scipy is not installed; needed here: pip install '.[compare]'") from None

    config = arguments.config
    contestants = {f"dae of {checkout}": ("dae", checkout) for checkout in arguments.checkouts}
    contestants |= {name: (name, None) for name in arguments.programs}
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in contestants}
    for seed in tqdm(range(arguments.seeds), unit=" seeds", disable=None):
        seeded = dataclasses.replace(config, seed=seed)
        for name, (program, checkout) in contestants.items():
            results[name].append(train(Program(program, seeded, checkout=checkout), seeded))
    rows = []
    for name, runs in results.items():
        values, seconds = [run["psnr"] for run in runs], [run["seconds"] for run in runs]
        p = ttest_1samp(values, arguments.target, alternative="greater").pvalue
        spread = f"{min(values):.2f} to {max(values):.2f}"
        rows.append(
            [
                f"{arguments.target:g} dB",
                name,
                shortest(config, unnamed=("seed",)),
                f"{statistics.mean(seconds):.1f}",
                f"{statistics.mean(values):.3f} ({spread})",
                f"{p:.1g}" + ("" if p < 0.01 else ", not reached"),
            ]
        )
    print(table(["target", "program", "settings", "seconds", "PSNR, dB", "p"], rows))
    save(Path(arguments.output) / "record.json", arguments, {"results": results})


if __name__ == "__main__":
    cli.run(main)
