import gzip
import json

from conftest import TINY, run_here

from dae import config as configs


def test_profile_writes_a_trace_of_training_steps_that_tensorboard_and_perfetto_open(tmp_path):
    (tmp_path / "tiny.json").write_text(configs.to_json(TINY))
    done = run_here("run.py", "--config", "tiny.json", "--run-dir", "run", "--profile", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run" / "tensorboard" / "plugins" / "profile"
    assert len(list(folder.glob("*/*.xplane.pb"))) == 1
    (trace,) = folder.glob("*/trace.json.gz")
    assert str(trace.name) in done.stdout
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    (steps,) = [event for event in events if event["name"] == "train_steps"]
    assert steps["dur"] > 0
    assert any("Conv2DBackpropFilter" in event["name"] for event in events)
