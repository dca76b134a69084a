from pathlib import Path

import pytest
from helpers import TINY, new_state, new_train_loop

from dae.data.pipeline import training_batches
from dae.training.profiler import PROFILED_CALL, profiled


def check_profile(folder: Path) -> None:
    """Assert that there is one profile in `folder`, where TensorBoard looks for it, with the parts of a train step."""
    (profile,) = (folder / "train" / "plugins" / "profile").glob("*/*.xplane.pb")
    content = profile.read_bytes()
    for name in (b"train_loop", b"Conv2DBackpropFilter"):
        assert name in content


def test_profiler_profiles_one_call_of_the_train_loop(mnist, tmp_path, capsys):
    state = new_state()
    batches = iter(training_batches(mnist.train, TINY))
    with profiled(new_train_loop(state, TINY), tmp_path, enabled=True) as loop:
        for _ in range(PROFILED_CALL + 1):
            loop(batches, 2, TINY.batch_size)
    assert int(state.step) == 2 * (PROFILED_CALL + 1)
    assert capsys.readouterr().err == ""
    check_profile(tmp_path)


@pytest.mark.parametrize("enabled", [True, False])
def test_profiler_passes_on_every_call_and_warns_if_it_profiled_none(enabled, tmp_path, capsys):
    calls = []

    def train_loop(batches, num_steps, batch_size):
        calls.append((int(num_steps), batch_size))
        return num_steps

    with profiled(train_loop, tmp_path, enabled) as loop:
        results = [int(loop(iter(()), step, 8)) for step in range(PROFILED_CALL - 1)]
    assert calls == [(step, 8) for step in range(PROFILED_CALL - 1)]
    assert results == list(range(PROFILED_CALL - 1))
    assert ("--profile" in capsys.readouterr().err) == enabled
    assert list(tmp_path.iterdir()) == []
