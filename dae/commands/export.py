"""Export a model for other runtimes: `dae export runs/NAME --format onnx --output denoise.onnx`."""

import dataclasses
from pathlib import Path

import tyro

from dae import cli
from dae.inference import export


@dataclasses.dataclass(frozen=True)
class ExportArguments:
    """Write a model as ONNX, LiteRT or SavedModel. Before it appears, it is run and compared with the Keras model."""

    model: tyro.conf.Positional[str]
    """Folder of a run, or a .keras or .h5 file."""
    format: str
    """onnx, litert or savedmodel."""
    output: str
    """Path to write to: a .onnx, .tflite or .litert file, which is overwritten, or, for savedmodel, a new folder."""


def main() -> None:
    """Export the model that the command line names, and print how far it differs."""
    arguments = cli.parse(ExportArguments)
    output = Path(arguments.output)
    export.check_request(arguments.format, output)
    cli.import_tensorflow()
    from dae.workdir.model_files import load_model

    differences = export.export(load_model(arguments.model), arguments.format, output)
    size = sum(path.stat().st_size for path in (output, *output.rglob("*")) if path.is_file())
    shapes = ", ".join("x".join(map(str, shape)) for shape in differences)
    print(f"{output}: {size:,} bytes")
    print(f"checked: differs by at most {max(differences.values()):.1e} from the Keras model, on images {shapes}")
