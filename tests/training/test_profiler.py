import pytest
import tensorflow as tf
from helpers import TINY, run_in_process

from dae import config as config_module
from dae.training.profiler import PROFILED_CALL, profiled


def test_profile_holds_training_steps(tmp_path):
    (tmp_path / "tiny.json").write_text(config_module.to_json(TINY))
    completed = run_in_process("run.py", "--config", "tiny.json", "--run-dir", "run", "--profile", cwd=tmp_path)
    assert completed.returncode == 0, completed.stderr
    assert "--profile" not in completed.stderr
    (profile,) = (tmp_path / "run" / "tensorboard" / "plugins" / "profile").glob("*/*.xplane.pb")
    content = profile.read_bytes()
    for name in (b"train_loop", b"Conv2DBackpropFilter"):
        assert name in content


@pytest.mark.parametrize("enabled", [True, False])
def test_profiler_passes_on_every_call_and_warns_if_it_profiled_none(enabled, tmp_path, capsys):
    calls = []

    def train_loop(batches, num_steps, batch_size):
        calls.append((int(num_steps), batch_size))
        return num_steps

    with profiled(train_loop, tmp_path, enabled) as loop:
        results = [int(loop(iter(()), tf.constant(step), 8)) for step in range(PROFILED_CALL - 1)]
    assert calls == [(step, 8) for step in range(PROFILED_CALL - 1)]
    assert results == list(range(PROFILED_CALL - 1))
    assert ("--profile" in capsys.readouterr().err) == enabled
    assert list(tmp_path.iterdir()) == []
