"""Trains a denoising autoencoder: python experiments/run.py; --help tells the flags."""

from dae import command_line


def main() -> None:
    arguments = command_line.parse_run()
    command_line.load_tensorflow()
    from dae import run_directory, trainer

    run_dir = arguments.run_dir or run_directory.new_name(arguments.settings)
    trainer.train(arguments.settings, run_dir, resume=arguments.resume)


if __name__ == "__main__":
    command_line.run(main)
