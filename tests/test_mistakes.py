"""A user's mistake is one line on stderr that names the flag or the file, exit status 2, and nothing is written."""

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import RESOLVED, run_in_process, run_subprocess
from PIL import Image

from dae import analysis, resolved

# Flags, in which {} stands for the folder of the files of runs.py, and words of the message.
SMALL = "--data {}/digits.npz --model {}/networks.py:plain --validation-examples 40"
NOISY = "--noisy {}/pairs/train/noisy --value-range 0 4095 --image-size 16"
MISTAKES = [
    # Names and values
    ("--losss bce", ["--losss", "did you mean --loss "]),
    ("words", ["words"]),
    ("--epochs", ["--epochs", "Missing"]),
    ("--epochs x", ["--epochs", "'x'", "INT"]),
    ("--epochs 2.5", ["--epochs", "'2.5'", "INT"]),
    ("--epochs 0", ["--epochs: expected an integer from 1 to 1,000,000, got 0"]),
    ("--noise-level 1 2 3", ["--noise-level", "'1', '2', '3'", "FLOAT|{FLOAT FLOAT}"]),
    ("--warmup-ratio 0.3", ["--warmup-ratio: 0.3 needs --schedule cosine"]),
    (f"{SMALL} --loss bcee", ["--loss: unknown name 'bcee'; did you mean 'bce'?"]),
    ("--data {}/digits.npz --model cnov", ["--model: unknown name 'cnov'; did you mean 'conv'?"]),
    (f"{SMALL} --noise gausian", ["--noise: unknown name 'gausian'; did you mean 'gaussian'?"]),
    (f"{SMALL} --optimizer adm", ["--optimizer: unknown name 'adm'; did you mean 'adam'?"]),
    (f"{SMALL} --schedule cosin", ["--schedule: unknown name 'cosin'; did you mean 'cosine'?"]),
    ("--dataset minst", ["--dataset: unknown name 'minst'; did you mean 'mnist'?"]),
    ("--train-examples 0", ["--train-examples: expected an integer >= 1, got 0"]),
    ("--preset quick", ["--preset: unknown name 'quick'", "(known: default, tutorial, fast, "]),
    ("--preset fsat", ["--preset: unknown name 'fsat'; did you mean 'fast'?"]),
    ("--preset fast --config x.json", ["--preset and --config: give only one of them"]),
    ("--config none.json", ["none.json: cannot be read (", "No such file"]),
    ("--precision float16", ["--precision: expected float32 or bfloat16", "unlike float16"]),
    # The folder
    ("--run-dir /proc/1/none", ["--run-dir: /proc/1/none cannot be written"]),
    (f"--run-dir {'x' * 300}", ["--run-dir: "]),
    ("--run-dir runs/*", ["--run-dir: 'runs/*' cannot name a run"]),
    ("--resume", ["--resume: the run to resume is not given; add --run-dir"]),
    # Data
    ("--data nowhere --image-size 32", ["--data: ", "nowhere: no such file or folder"]),
    (NOISY, ["--loss: bce needs clean images; with noisy ones alone, use noise2void"]),
    (f"{NOISY} --loss sure --noise-level 0", ["--loss: sure needs the level of the noise", "--noise-level"]),
    (f"{NOISY} --loss noise2noise", ["--loss: noise2noise takes `second_noisy`"]),
    ("--noisy {}/pairs/train/noisy --noise-level 0.1 0.2", ["--noisy: without --clean no noise is added"]),
    ("--data {}/pairs --clean {}/pairs/clean", ["--clean: '{}/pairs/clean' replaces --data"]),
    ("--noisy {}/pairs --clean {}/pairs", ["--noisy: {}/pairs, --clean: {}/pairs: expected two folders"]),
    ("--noisy {}/pairs --loss noise2void", ["train has clean images too; train on pairs, with --data or --clean"]),
    ("--noisy {}/pairs --clean {}/none", ["--clean: {}/none: no such folder; if it was moved, add --clean"]),
    ("--data {}/pairs", ["pictures of 8 sizes, such as 2.png and 4.png; add --image-size"]),
    ("--data {}/pairs --patch-size 17", ["--patch-size: 17 exceeds the smallest side of the images, 16"]),
    ("--patches-per-epoch 100", ["--patches-per-epoch: needs --patch-size"]),
    ("--noisy {}/networks.py", ["--noisy: {}/networks.py", "expected a folder, or an .npz, .npy or IDX file"]),
    ("--data {}/pairs --patch-size 8", ["--patch-size: expected an integer from 11"]),
    ("--data {}/pairs --value-range 4095 0", ["--value-range: expected two finite numbers in ascending order"]),
    (
        "--data {}/pairs --value-range 0 4095 --patch-size 16 --noise poisson",
        ["--noise: poisson for images that are noisy already needs its --noise-level"],
    ),
    (
        "--data {}/pairs --value-range 0 4095 --patch-size 16 --loss noise2noise --no-clip-noise",
        ["--loss: noise2noise takes `second_noisy`", "cannot be used with images that are noisy already"],
    ),
    ("--data {}/pairs --axes NYX", ["--axes: applies only to arrays, not to folders of pictures"]),
    (f"{SMALL} --axes NYXC", ["digits.npz: expected images, NYXC, got x_train (140, 16, 16), x_test (4, 16, 16)"]),
    (f"{SMALL} --axes NYY", ["--axes: NYY: expected one letter for each axis"]),
    ("--validation-examples 60000", ["--validation-examples: 60000 exceeds the 59999 images available"]),
    ("--image-size 32", ["--image-size: ", "folder of pictures"]),
    (f"{SMALL} --validation-examples 0 --patience 1", ["--patience: needs validation images"]),
    # Noise
    (f"{SMALL} --noise masking --noise-level 1.5", ["--noise-level: expected 0 to 1 for masking, got 1.5"]),
    (f"{SMALL} --noise {{}}/noises.py:flat", ["noises.py:flat: expected float32 [2, 16, 16, 1]"]),
    # Network, loss and metrics
    (f"{SMALL} --width 2", ["--width: plain has no parameter `width`, so it must be 1"]),
    (f"{SMALL} --model {{}}/networks.py:plane", ["networks.py: unknown name 'plane'; did you mean 'plain'?"]),
    (f"{SMALL} --loss {{}}/losses.py:Moving --shards 2", ["losses.py:Moving has a method `update`", "--shards 1"]),
    (f"{SMALL} --loss {{}}/none.py:f", ["--loss: {}/none.py: cannot be read (no such file)"]),
    (f"{SMALL} --loss mse+0.5*sure --bce-steps 0", ["--loss: sure: ", "--no-clip-noise"]),
    (f"{SMALL} --metrics {{}}/noises.py:flat", ["--metrics: ", "noises.py:flat: "]),
    # Initial weights
    (f"{SMALL} --start-from none", ["--start-from: ", "none: no such run or model file"]),
    (f"{SMALL} --start-from {{}}", ["--start-from: {}: not a finished run"]),
    (f"{SMALL} --model blog --start-from {{}}/start.keras", ["start.keras: weights of another network than --model"]),
    (f"{SMALL} --model {{}}/networks.py:normalized --start-from {{}}/start.keras", ["weights of another network"]),
    # The machine
    ("--devices gpu:7", ["--devices: expected some of ", "cpu:0", ", got gpu:7"]),
    (f"{SMALL} --intra-op-threads 1000", ["--intra-op-threads: 1000 cannot be set, because TensorFlow was started"]),
]

LOSSES = "--losses bce"
# The same of other scripts, in whose flags {run} stands for a finished run on pairs.
OTHERS = [
    ("benchmarks/benchmark", "--only fitt", ["did you mean 'fit'"]),
    ("benchmarks/benchmark", "--require 2 --only fit", ["--require: needs dae"]),
    ("benchmarks/startup", "--rounds 0", ["--rounds: ", "got 0"]),
    ("benchmarks/record", "--programs fitt", ["did you mean 'fit'"]),
    ("benchmarks/record", "--seeds 1", ["--seeds: expected an integer >= 2, got 1"]),
    ("benchmarks/screenshots", "--logdir .", ["--logdir: . holds no TensorBoard files"]),
    ("export", "text.h5 --format savedmodel --output out", ["text.h5: not a readable model"]),
    ("export", "none --format savedmodel --output out", ["none: no such run or model file"]),
    ("export", "text.h5 --output out", ["--format"]),
    ("export", "run --format tflite --output a", ["--format: unknown name 'tflite'; did you mean 'litert'?"]),
    ("export", "run --format onnx --output a.tflite", ["--output: a.tflite: expected the name of a .onnx file"]),
    ("export", "run --format litert --output a", ["--output: a: expected the name of a .tflite or .litert file"]),
    ("export", "run --format savedmodel --output in", ["--output: in exists; expected the name of a new folder"]),
    ("compare_losses", f"{LOSSES} mes", ["did you mean 'mse'"]),
    ("compare_losses", f"{LOSSES} --preset fast --seedz 3", ["--seedz", "did you mean --seed"]),
    ("compare_losses", f"{LOSSES} --metric psnrr", ["--metric: unknown name 'psnrr'; did you mean 'psnr'?"]),
    ("compare_losses", f"{LOSSES} --seeds 0", ["--seeds: expected an integer >= 1, got 0"]),
    ("compare_losses", f"{LOSSES} --preset tutorial", ["--validation-examples: 0"]),
    ("compare_losses", "--losses noise2void --noisy {}/pairs/train/noisy", ["--noisy: without --clean"]),
    ("compare_losses", f"{LOSSES} --loss mse", ["--losses: --loss is a flag of run.py"]),
    ("compare_losses", "--values 1 2", ["--losses: "]),
    ("compare_losses", f"--field width --values 1 {LOSSES}", ["--values: "]),
    ("compare_losses", "--field widht --values 1", ["did you mean 'width'"]),
    ("compare_losses", "--field seed --values 1 2", ["--field: seed is what repeats a run; see --seeds"]),
    ("compare_losses", "--field width --values 1 x", ["--width: expected int, got 'x'"]),
    ("compare_losses", f"{LOSSES} --tune --rates 4", ["--rates: expected an odd number >= 3, got 4"]),
    ("compare_losses", "--field learning-rate --values 0.1 --tune", ["--tune: "]),
    ("score_table", "--presets fsat", ["did you mean 'fast'"]),
    ("denoise", "--model {run} in --output in", ["--output: in is an input"]),
    ("denoise", "--model {run} in/sub in/sub/0.png --output out", ["would both write out/0.png"]),
    ("denoise", "--model {run} nowhere --output out", ["nowhere: no such file or folder"]),
    ("denoise", "--model {run} in/notes.txt --output out", ["in/notes.txt: expected a folder"]),
    ("denoise", "--model {run} labels.npy --output out", ["labels.npy: expected images"]),
    ("denoise", "--model {run} empty --output out", ["empty: nothing to denoise"]),
    ("denoise", "--model {run} in --output in/notes.txt", ["--output: in/notes.txt is not a folder"]),
    ("denoise", "--model {run} in --output out --value-range 1 0", ["--value-range: expected two finite numbers"]),
    ("denoise", "--model {run} --output out", ["expected one or more pictures"]),
    ("denoise", "{run} a.png --output out", ["{run}: a model, not images; write --model {run}"]),
    ("denoise", "in --output out --zero-shot --model {run}", ["--zero-shot: starts from the package's models; leave"]),
    ("denoise", "in --output out --noise-level 0.1", ["--noise-level: applies to --zero-shot, which is not given"]),
    (
        "denoise",
        "--model {run} volume.npy --output out",
        ["(30, 30, 20) is 30 images of 30 x 20, or 20 of 30 x 30; add"],
    ),
    (
        "denoise",
        "--model {run} volume.npy --output out --axes NYXC",
        ["volume.npy: expected images with the axes NYXC"],
    ),
    ("denoise", "--model {run} volume.npy --output out --axes NHH", ["--axes: NHH: expected one letter for each axis"]),
    ("denoise", "--model {run} in/sub --output out --axes NYX", ["--axes: applies to .npy and .npz files"]),
    ("verify", "unfinished", ["unfinished: not a finished run"]),
    ("photographs", "in", ["expected the name of a new folder"]),
    ("photographs", "new", ["run"]),  # pip install, or apt-get download
    ("noise_level", "", ["expected pictures, arrays or folders"]),
    ("noise_level", "nowhere", ["nowhere: no such file or folder"]),
    ("noise_level", "volume.npy", ["(30, 30, 20) is 30 images of 30 x 20, or 20 of 30 x 30; add"]),
    ("noise_level", "in/sub --axes NYX", ["--axes: applies to .npy and .npz files"]),
    ("noise_level", "in --value-range 1 0", ["in/0.png: expected two finite numbers in ascending order"]),
    ("evaluate", "{run} --axes YXZ", ["--axes: applies to --data, which is not given"]),
    ("evaluate", "{run} --data volume.npy", ["or 20 of 30 x 30; add --axes NYX or, with the images last, YXN"]),
    ("evaluate", "{run} --image-size 32", ["--image-size: applies to --data, which is not given"]),
    ("evaluate", "{run} --grey", ["--grey: applies to --data, which is not given"]),
    ("evaluate", "{run} --data nowhere", ["nowhere: no such file or folder; if it was moved"]),
    ("evaluate", "{run} --data colour.npy", ["--data: the model takes images of 1 channels, not of 3; --grey"]),
    ("evaluate", "{run} --data small.npy", ["H and W >= 11"]),
]

ALL = [*(("run", *row) for row in MISTAKES), *OTHERS]


def write_inputs(folder: Path) -> None:
    """Write the files that the flags of OTHERS name."""
    for name in ("empty", "in/sub", "unfinished"):
        (folder / name).mkdir(parents=True)
    for name, text in (("config.json", "{}"), (resolved.FILE, resolved.to_json(RESOLVED))):
        (folder / "unfinished" / name).write_text(text)
    for name in ("in/0.png", "in/sub/0.png"):
        Image.new("L", (20, 20)).save(folder / name)
    for name in ("in/notes.txt", "text.h5"):
        (folder / name).write_text("text")
    np.save(folder / "labels.npy", np.arange(9))
    np.save(folder / "volume.npy", np.zeros((30, 30, 20), np.float32))
    np.save(folder / "colour.npy", np.full((2, 28, 28, 3), 200, np.uint8))
    np.save(folder / "small.npy", np.full((2, 10, 28), 200, np.uint8))


def check_line(script: str, stderr: str, words: list[str]) -> None:
    assert stderr.startswith(f"{Path(script).name}.py: ")
    assert stderr.count("\n") == 1, stderr
    assert not set("│─╭╰\x1b") & set(stderr)
    assert [word for word in words if word not in stderr] == [], stderr


@pytest.mark.parametrize(("script", "flags", "words"), ALL, ids=[f"{script} {flags}" for script, flags, _ in ALL])
def test_a_mistake_is_one_line_with_exit_status_2_and_nothing_is_written(
    script, flags, words, files, finished_run, tmp_path
):
    def filled(text: str) -> str:
        return text.replace("{}", str(files)).replace("{run}", str(finished_run("pairs")))

    given = filled(flags).split()
    if script == "run" and not {"--run-dir", "--resume"} & set(given):
        given += ["--run-dir", "runs/run"]
    write_inputs(tmp_path)
    before = sorted(files.rglob("*")), sorted(tmp_path.rglob("*"))
    # One of them as a user sees it, since TensorFlow writes to the file descriptor of stderr.
    run_script = run_subprocess if "bcee" in given else run_in_process
    done = run_script(f"{script}.py", *given, cwd=tmp_path, status=2)
    assert done.stdout == ""
    check_line(script, done.stderr, list(map(filled, words)))
    assert (sorted(files.rglob("*")), sorted(tmp_path.rglob("*"))) == before


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("run", "--epochs 0"),
        ("export", "run --format tflite --output a"),
        ("denoise", "in --model runs/none --output out"),
        ("denoise", "none.png --model text.h5 --output out"),
    ],
)
def test_a_mistake_is_reported_before_tensorflow_is_imported(script, flags, tmp_path, monkeypatch):
    (tmp_path / "tensorflow.py").write_text("raise RuntimeError('imported')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    write_inputs(tmp_path)
    done = run_subprocess(f"{script}.py", *flags.split(), cwd=tmp_path, status=2)
    check_line(script, done.stderr, [])


BM3D = "{run} --bm3d --noises gaussian --noise-levels 0.1"


@pytest.mark.parametrize(
    ("script", "flags", "package", "extra"),
    [
        ("compare_losses", LOSSES, "scipy", "compare"),
        ("evaluate", BM3D, "bm3d", "baselines"),
        ("score_table", "", "bm3d", "baselines"),
    ],
)
def test_without_its_extra_a_script_names_what_to_install(
    script, flags, package, extra, tmp_path, monkeypatch, finished_run
):
    for name in list(sys.modules):
        if name.startswith((package, "dae.analysis.")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(analysis, "comparison", raising=False)  # so that the script imports it anew
    monkeypatch.setitem(sys.modules, package, None)
    given = flags.replace("{run}", str(finished_run("pairs"))).split()
    done = run_in_process(f"{script}.py", *given, cwd=tmp_path, status=2)
    check_line(script, done.stderr, [package, f"pip install '.[{extra}]'"])


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("", ["already holds a run; choose another folder, or add --resume"]),
        ("--resume --noise-level 0.3 --seed 1", ["--noise-level was (0.01, 0.5), now 0.3; --seed was 0, now 1"]),
        ("--resume --data {}/none.npz --epochs 3", ["none.npz: no such file or folder; if it was moved"]),
        ("--resume --epochs 3 --model other.py:plain", ["--model was", "normalized@", "other.py:plain@"]),
        ("--resume --epochs 3 --initial-brightness 0.4", ["--initial-brightness was None, now 0.4"]),
    ],
)
def test_a_resume_that_is_rejected_leaves_the_run_as_it_is(flags, words, finished_run, files, tmp_path):
    run = Path(shutil.copytree(finished_run("network"), tmp_path / "run"))
    shutil.copy(files / "networks.py", tmp_path / "other.py")
    before = times(run)
    done = run_in_process("run.py", "--run-dir", run, *flags.replace("{}", str(files)).split(), cwd=tmp_path, status=2)
    assert done.stdout == ""
    check_line("run", done.stderr, [word.replace("{}", str(files)) for word in words])
    assert times(run) == before


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("environment.json", None),
        ("metrics.jsonl", "[]"),
        ("config.json", None),
        ("config.json", "[]"),
        ("resolved.json", None),
        ("code/networks.py", "[]"),
    ],
)
def test_a_run_with_a_missing_or_damaged_file_is_not_resumed(name, content, finished_run, tmp_path):
    run = Path(shutil.copytree(finished_run("network"), tmp_path / "run"))
    (run / name).unlink()
    if content is not None:
        (run / name).write_text(content)
    before = times(run)
    done = run_in_process("run.py", "--run-dir", run, "--resume", "--epochs", 3, "--quiet", status=2)
    assert done.stdout == ""
    # Without its configuration, the folder is not a run's, and an empty one is that of another run.
    check_line("run", done.stderr, [] if name == "config.json" else [Path(name).name])
    assert times(run) == before
