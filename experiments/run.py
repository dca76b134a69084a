"""Trains a denoising autoencoder: python experiments/run.py; --help tells the flags."""

from dae import cli


def main() -> None:
    arguments = cli.parse_run()
    cli.load_tensorflow(arguments.settings, arguments.verbose)
    from dae.training import trainer

    trainer.train(
        arguments.settings,
        arguments.run_dir,
        resume=arguments.resume,
        quiet=arguments.quiet,
        profile=arguments.profile,
    )


if __name__ == "__main__":
    cli.run(main)
