"""Trains a denoising autoencoder: python experiments/run.py; --help tells the flags."""

from dae import command_line


def main() -> None:
    arguments = command_line.parse_run()
    command_line.load_tensorflow(arguments.settings, arguments.verbose)
    from dae import trainer

    trainer.train(
        arguments.settings,
        arguments.run_dir,
        resume=arguments.resume,
        quiet=arguments.quiet,
        profile=arguments.profile,
    )


if __name__ == "__main__":
    command_line.run(main)
