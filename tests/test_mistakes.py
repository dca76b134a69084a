"""A user's mistake is one line on stderr that names the flag or the file, exit status 2, and nothing is written."""

import shutil
from pathlib import Path

import pytest
from helpers import run_in_process

# Flags, in which {} stands for the folder of the files of runs.py, and words of the message.
SMALL = "--data {}/digits.npz --model {}/networks.py:plain --validation-examples 40"
MISTAKES = [
    # Names and values
    ("--losss bce", ["--losss", "did you mean --loss "]),
    ("--epochs 0", ["--epochs: expected an integer from 1 to 1,000,000, got 0"]),
    ("--warmup-ratio 0.3", ["--warmup-ratio: 0.3 needs --schedule cosine"]),
    (f"{SMALL} --loss bcee", ["--loss: unknown name 'bcee'; did you mean 'bce'?"]),
    ("--data {}/digits.npz --model cnov", ["--model: unknown name 'cnov'; did you mean 'conv'?"]),
    (f"{SMALL} --noise gausian", ["--noise: unknown name 'gausian'; did you mean 'gaussian'?"]),
    (f"{SMALL} --optimizer adm", ["--optimizer: unknown name 'adm'; did you mean 'adam'?"]),
    (f"{SMALL} --schedule cosin", ["--schedule: unknown name 'cosin'; did you mean 'cosine'?"]),
    ("--dataset minst", ["--dataset: unknown name 'minst'; did you mean 'mnist'?"]),
    ("--preset fsat", ["--preset: unknown name 'fsat'; did you mean 'fast'?"]),
    ("--preset fast --config x.json", ["--preset and --config: give only one of them"]),
    ("--config none.json", ["none.json: cannot be read (", "No such file"]),
    # What was removed
    ("--reduction fast", ["--reduction was removed: gradients of several workers are always added exactly"]),
    ("--reduction=exact", ["--reduction was removed"]),
    ("--precision float16", ["--precision: expected float32 or bfloat16", "unlike float16"]),
    # The folder
    ("--run-dir /proc/1/none", ["--run-dir: /proc/1/none cannot be written"]),
    ("--run-dir runs/*", ["--run-dir: 'runs/*' cannot name a run"]),
    ("--resume", ["--resume: the run to resume is not given; add --run-dir"]),
    # Data
    ("--data nowhere --image-size 32", ["--data: ", "nowhere: no such file or folder"]),
    ("--data {}/pairs", ["pictures of 8 sizes, such as 2.png and 4.png; add --image-size"]),
    ("--data {}/pairs --patch-size 17", ["--patch-size: 17 exceeds the smallest side of the images, 16"]),
    ("--data {}/pairs --patch-size 8", ["--patch-size: expected an integer from 11"]),
    ("--data {}/pairs --value-range 4095 0", ["--value-range: expected two finite numbers in ascending order"]),
    (
        "--data {}/pairs --value-range 0 4095 --patch-size 16 --noise poisson",
        ["--noise: poisson for images that are noisy already needs its --noise-level"],
    ),
    (
        "--data {}/pairs --value-range 0 4095 --patch-size 16 --loss noise2noise --no-clip-noise",
        ["--loss: noise2noise takes `second_noisy`", "cannot be used with pairs"],
    ),
    (f"{SMALL} --train-examples 1000", ["--train-examples: 1000 exceeds the 100"]),
    (f"{SMALL} --validation-examples 0 --patience 1", ["--patience: needs validation images"]),
    # Noise
    (f"{SMALL} --noise masking --noise-level 1.5", ["--noise-level: expected 0 to 1 for masking, got 1.5"]),
    (f"{SMALL} --noise {{}}/noises.py:flat", ["noises.py:flat: expected float32 [2, 16, 16, 1]"]),
    # Network, loss and metrics
    (f"{SMALL} --width 2", ["--width: plain has no parameter `width`, so it must be 1"]),
    (f"{SMALL} --model {{}}/networks.py:plane", ["networks.py: unknown name 'plane'; did you mean 'plain'?"]),
    (f"{SMALL} --loss {{}}/losses.py:Moving --shards 2", ["losses.py:Moving has a method `update`", "--shards 1"]),
    (f"{SMALL} --loss {{}}/none.py:f", ["--loss: {}/none.py: cannot be read (no such file)"]),
    (f"{SMALL} --metrics {{}}/noises.py:flat", ["--metrics: {}/noises.py:flat: expected (clean, denoised)"]),
    # Initial weights
    (f"{SMALL} --start-from none", ["--start-from: ", "none: no such run's folder or model file"]),
    (f"{SMALL} --start-from {{}}", ["--start-from: {}: not a finished run"]),
    (f"{SMALL} --model blog --start-from {{}}/start.keras", ["start.keras: weights of another network than --model"]),
    (f"{SMALL} --model {{}}/networks.py:normalized --start-from {{}}/start.keras", ["weights of another network"]),
    # The machine
    ("--devices gpu:7", ["--devices: expected some of ", "cpu:0, got gpu:7"]),
    (f"{SMALL} --compile --devices cpu:0 cpu:1", ["--compile: needs a single device, got CPU:0, CPU:1"]),
    (f"{SMALL} --intra-op-threads 1000", ["--intra-op-threads: 1000 cannot be set, because TensorFlow was started"]),
]

NOISES = """
import tensorflow as tf


def flat(clean, level, seed):
    return tf.reshape(clean, [-1])
"""


def check_line(stderr: str, words: list[str], folder: Path) -> None:
    assert stderr.startswith("run.py: ")
    assert stderr.count("\n") == 1, stderr
    assert [word for word in words if word.replace("{}", str(folder)) not in stderr] == [], stderr


@pytest.mark.parametrize(("flags", "words"), MISTAKES, ids=[flags or "none" for flags, _ in MISTAKES])
def test_a_mistake_is_one_line_with_exit_status_2_and_nothing_is_written(flags, words, files, tmp_path):
    (files / "noises.py").write_text(NOISES)
    before = sorted(files.rglob("*"))
    given = [] if "--run-dir" in flags or "--resume" in flags else ["--run-dir", "runs/run"]
    done = run_in_process("run.py", *flags.replace("{}", str(files)).split(), *given, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    check_line(done.stderr, words, files)
    assert list(tmp_path.iterdir()) == []
    assert sorted(files.rglob("*")) == before


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("", ["already holds a run; choose another folder, or add --resume"]),
        ("--resume --batch-size 32 --seed 1", ["--batch-size was 16, now 32; --seed was 0, now 1"]),
        ("--resume --epochs 1", ["--epochs was 2, now 1"]),
        ("--resume --noise-level 0.3", ["--noise-level was (0.01, 0.5), now 0.3"]),
        ("--resume --data {}/none.npz --epochs 3", ["none.npz: no such file or folder; if it was moved"]),
        ("--resume --epochs 3 --model {}/other.py:plain", ["--model was", "normalized@", "other.py:plain@"]),
        ("--resume --epochs 3 --initial-brightness 0.4", ["--initial-brightness was None, now 0.4"]),
    ],
)
def test_a_resume_that_is_rejected_leaves_the_run_as_it_is(flags, words, finished_run, files):
    run = finished_run("network")
    (files / "other.py").write_text((files / "networks.py").read_text())
    before = times(run)
    done = run_in_process("run.py", "--run-dir", run, *flags.replace("{}", str(files)).split())
    assert (done.returncode, done.stdout) == (2, "")
    check_line(done.stderr, words, files)
    assert times(run) == before


@pytest.mark.parametrize("content", [None, "{", "[]"])
@pytest.mark.parametrize(
    "name", ["environment.json", "metrics.jsonl", "config.json", "resolved.json", "code/networks.py"]
)
def test_a_run_without_one_of_its_files_is_not_resumed(name, content, finished_run, tmp_path):
    run = Path(shutil.copytree(finished_run("network"), tmp_path / "run"))
    (run / name).unlink()
    if content is not None:
        (run / name).write_text(content)
    before = times(run)
    done = run_in_process("run.py", "--run-dir", run, "--resume", "--epochs", 3, "--quiet")
    assert (done.returncode, done.stdout) == (2, "")
    # Without its configuration, the folder is not a run's, and an empty one is that of another run.
    check_line(done.stderr, [] if name == "config.json" else [Path(name).name], run)
    assert times(run) == before
