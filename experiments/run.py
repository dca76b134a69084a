"""Train a denoising autoencoder: `python experiments/run.py`; `--help` lists the flags."""

from dae import cli


def main() -> None:
    arguments = cli.parse_run()
    cli.import_tensorflow(arguments.config.onednn, arguments.verbose)
    from dae.training.trainer import train

    train(
        arguments.config,
        arguments.run_dir,
        resume=arguments.resume,
        quiet=arguments.quiet,
        profile=arguments.profile,
        devices=arguments.devices,
    )


if __name__ == "__main__":
    cli.run(main)
