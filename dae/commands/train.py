"""Train a denoising autoencoder: `dae train`, or `python experiments/run.py`; `--help` lists the flags."""

from dae import cli


def main() -> None:
    """Train as the command line says."""
    arguments = cli.parse_config(cli.RunArguments)
    config = arguments.config
    cli.import_tensorflow(arguments.onednn)
    from dae.training.trainer import train

    train(
        config,
        arguments.run_dir,
        recorded=arguments.recorded,
        resume=arguments.resume,
        finish=arguments.finish,
        quiet=arguments.quiet,
        devices=arguments.devices,
    )
