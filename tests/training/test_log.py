"""What a run logs over time, and that TensorBoard is told the same."""

import json

import pytest

LOGGED = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory_gib")


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model, records_file, train):
    """Five steps, logged at 2, 4 and 5, with a validation at 3 and at 5."""
    data = ["--model", tiny_model, "--train-data", records_file, "--validation-size", 5, "--global-batch", 8]
    steps = ["--max-steps", 5, "--log-steps", 2, "--eval-steps", 3, "--warmup-steps", 1, "--report-to", "tensorboard"]
    return train(tmp_path_factory.mktemp("log") / "run", 0, *data, *steps)


@pytest.fixture(scope="module")
def history(run):
    return json.loads((run.folder / "trainer_state.json").read_text())["log_history"]


def test_speed_and_memory_stand_beside_every_loss(run, history):
    losses = [entry for entry in history if "loss" in entry]
    assert [entry["step"] for entry in losses] == [2, 4, 5]
    for entry in losses:
        assert set(LOGGED) <= set(entry)
    assert not any("tokens_per_second" in entry for entry in history if "eval_loss" in entry)
    peaks = [entry["peak_memory_gib"] * 2**30 for entry in losses]
    assert peaks == sorted(peaks) and peaks[0] > 2**27
    assert peaks[-1] <= run.manifest["results"]["peak_memory_bytes"]
    slowest = min(entry["tokens_per_second"] for entry in losses)
    assert run.manifest["results"]["tokens_per_second"] < max(entry["tokens_per_second"] for entry in losses)
    assert slowest > 0


def test_tensorboard_has_the_same_numbers_in_the_run_s_folder(run, history):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = event_accumulator.EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    for name in LOGGED:
        wanted = [(entry["step"], entry[name]) for entry in history if name in entry]
        found = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert found == [(step, pytest.approx(value, rel=1e-6)) for step, value in wanted]
    assert [event.step for event in events.Scalars("eval/loss")] == [3, 5]
    assert sorted(path.name for path in run.folder.iterdir() if path.is_dir()) == [
        "adapter",
        "checkpoint-5",
        "tensorboard",
    ]
