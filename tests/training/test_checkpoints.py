"""What a run survives, and what it refuses."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import keras
import pytest
from conftest import EXPERIMENTS, TINY, run_here, run_script

from dae import config as configs
from dae.analysis import reproducibility
from dae.errors import RunError, UsageError
from dae.models import networks
from dae.training import trainer
from dae.training.checkpoints import Checkpoints

TWO_EPOCHS = replace(TINY, epochs=2)


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory) -> Path:
    """A finished run of two epochs, of TINY's three."""
    folder = tmp_path_factory.mktemp("runs") / "two"
    trainer.train(TWO_EPOCHS, folder)
    return folder


def restored_step(folder: Path, model: keras.Model | None = None) -> int:
    """The step of the checkpoint that a resume goes on from."""
    model = model or networks.build(TINY, (28, 28, 1))
    checkpoints = Checkpoints(folder / "checkpoints", model, keras.optimizers.Adam(1e-3))
    assert checkpoints.restore_newest()
    return int(checkpoints.state.step)


def flip(at: float) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[int(at * len(content))] ^= 1
        file.write_bytes(content)

    return damage


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def zero(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


@pytest.mark.parametrize(
    ("part", "damage"),
    [
        ("data", flip(0.1)),
        ("data", flip(0.9)),
        ("data", truncate),
        ("data", zero),
        ("data", Path.unlink),
        ("index", flip(0.1)),
        ("index", flip(0.6)),
        ("index", truncate),
        ("index", zero),
    ],
)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(part, damage, two_epochs, tmp_path, capsys):
    shutil.copytree(two_epochs, tmp_path / "run")
    (file,) = (tmp_path / "run" / "checkpoints" / "newest").glob(f"ckpt-20.{part}*")
    damage(file)
    assert restored_step(tmp_path / "run") == 10
    assert "ckpt-20 is broken and passed over" in capsys.readouterr().err


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_to_the_same_bits(two_epochs, tiny_run, tmp_path):
    shutil.copytree(two_epochs, tmp_path / "run")
    for folder, step in (("newest", 20), ("best", 20)):
        (data,) = (tmp_path / "run" / "checkpoints" / folder).glob(f"ckpt-{step}.data-*")
        flip(0.5)(data)
    (tmp_path / "run" / "checkpoints" / "newest" / "checkpoint").write_text("")  # TensorFlow's list, lost
    trainer.train(TINY, tmp_path / "run", resume=True)
    assert reproducibility.first_difference(tmp_path / "run", tiny_run) is None


def test_no_good_checkpoint_at_all_is_an_error(two_epochs, tmp_path):
    shutil.copytree(two_epochs, tmp_path / "run")
    for data in (tmp_path / "run" / "checkpoints" / "newest").glob("*.data-*"):
        zero(data)
    with pytest.raises(RunError, match=r"none of the checkpoints in .* can be read"):
        trainer.train(TINY, tmp_path / "run", resume=True)


def test_without_a_good_best_checkpoint_the_last_epoch_is_kept(two_epochs, tmp_path, capsys):
    shutil.copytree(two_epochs, tmp_path / "run")
    (tmp_path / "run" / "report.json").unlink()
    (best,) = (tmp_path / "run" / "checkpoints" / "best").glob("*.data-*")
    zero(best)
    report = trainer.train(TWO_EPOCHS, tmp_path / "run", resume=True)
    assert "holds no good checkpoint; the last epoch is kept" in capsys.readouterr().err
    # Which was the best too.
    assert report == json.loads((two_epochs / "report.json").read_text())


def test_a_checkpoint_of_another_model_is_refused_with_the_reason(two_epochs, tmp_path, capsys):
    shutil.copytree(two_epochs, tmp_path / "run")
    inputs = keras.Input((28, 28, 1))
    other = keras.Model(inputs, keras.layers.Conv2D(1, 5, padding="same", activation="sigmoid")(inputs))
    with pytest.raises(RunError, match="can be read"):
        restored_step(tmp_path / "run", other)
    assert "passed over (" in capsys.readouterr().err


def test_checkpoints_within_an_epoch_change_nothing_and_are_gone_on_from(tiny_run, tmp_path):
    trainer.train(replace(TINY, checkpoint_every=4), tmp_path / "run")
    assert reproducibility.first_difference(tmp_path / "run", tiny_run) is None
    newest = tmp_path / "run" / "checkpoints" / "newest"
    assert sorted(path.stem for path in newest.glob("*.index")) == ["ckpt-24", "ckpt-28", "ckpt-30"]
    for path in newest.glob("ckpt-30.*"):
        path.unlink()  # as if killed in the last epoch
    (tmp_path / "run" / "report.json").unlink()
    trainer.train(TINY, tmp_path / "run", resume=True)
    shutil.move(tmp_path / "run", tmp_path / "moved")
    assert reproducibility.first_difference(tmp_path / "moved", tiny_run) is None


def test_a_changed_configuration_and_other_data_are_refused(two_epochs):
    with pytest.raises(UsageError, match=r"--batch-size was 64, now 32; --seed was 0, now 1"):
        trainer.train(replace(TINY, batch_size=32, seed=1), two_epochs, resume=True)
    with pytest.raises(UsageError, match="--epochs was 2, now 1"):
        trainer.train(replace(TINY, epochs=1), two_epochs, resume=True)
    with pytest.raises(UsageError, match="--data-digest was"):
        trainer.train(replace(TINY, data_digest="other"), two_epochs, resume=True)


def test_going_on_with_other_versions_than_a_run_was_begun_with_is_warned_of(two_epochs, tmp_path, capsys):
    shutil.copytree(two_epochs, tmp_path / "run")
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    environment["versions"]["tensorflow"] = "2.20.0"
    (tmp_path / "run" / "environment.json").write_text(json.dumps(environment))
    trainer.train(TINY, tmp_path / "run", resume=True)
    assert "'tensorflow': '2.20.0'" in capsys.readouterr().err


def test_a_second_process_on_one_run_is_refused(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    held = os.open(folder, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    try:
        with pytest.raises(UsageError, match="another process is working on"):
            trainer.train(TINY, folder)
    finally:
        os.close(held)  # as the system does when a process ends
    assert list(folder.iterdir()) == []


def test_a_run_that_was_gone_on_with_by_another_process_meanwhile_is_refused(two_epochs, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(two_epochs, folder)
    (folder / "report.json").unlink()
    prepare = trainer.prepare

    def meanwhile(*arguments):
        saved = configs.read(folder / "config.json")
        (folder / "config.json").write_text(configs.to_json(replace(saved, epochs=9)))
        return prepare(*arguments)

    monkeypatch.setattr(trainer, "prepare", meanwhile)
    with pytest.raises(UsageError, match="another process has been working on"):
        trainer.train(TWO_EPOCHS, folder, resume=True)


# run.py, in a process that may write only 60,000 bytes to one file, which is less than a checkpoint has.
ON_A_FULL_DISK = """
import resource, runpy, sys
sys.argv = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_full_disk_ends_the_run_clearly_and_what_was_saved_is_good(tiny_run, tmp_path):
    shutil.copy(tiny_run / "config.json", tmp_path)
    arguments = [str(EXPERIMENTS / "run.py"), "--config", "config.json", "--run-dir", "run"]
    done = subprocess.run(
        [sys.executable, "-c", ON_A_FULL_DISK, *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    assert "go on with --resume --run-dir run" in done.stderr
    assert "Traceback" not in done.stderr
    trainer.train(TINY, tmp_path / "run", resume=True)
    assert reproducibility.first_difference(tmp_path / "run", tiny_run) is None


def test_a_folder_that_goes_away_ends_the_run_clearly(tmp_path):
    with pytest.raises(RunError, match="what was saved before is good"):
        trainer.train(TINY, tmp_path / "run", after_epoch=lambda line: shutil.rmtree(tmp_path / "run"))


def test_verify_says_that_the_bits_agree_and_where_they_part(tiny_run, tmp_path):
    done = run_script("verify.py", tiny_run)
    assert done.returncode == 0, done.stderr
    assert "agree in every bit" in done.stdout
    shutil.copytree(tiny_run, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    lines[1]["validation_mse"] += 1e-12
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = run_here("verify.py", tmp_path / "run")
    assert done.returncode == 1
    assert "part at metrics.jsonl, epoch 2: validation_mse is" in done.stderr
