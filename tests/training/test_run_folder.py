"""What a run's folder holds, which of it a new run deletes, and where a run goes when it is not told."""

import json
from types import SimpleNamespace

import pytest

from sora_hw.errors import UserError
from sora_hw.training.run_folder import RunFolder, open_folder

PLAN = SimpleNamespace(recipe=SimpleNamespace(name="commonsense", method="sora"))


def request(**given):
    return SimpleNamespace(**{"output": None, "resume": None, "overwrite": False, "sweep": False, **given})


def fill(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"fingerprint": {}}))


def test_overwriting_deletes_the_run_and_nothing_else(tmp_path):
    run = [
        "run.json",
        "adapter/adapter_config.json",
        "loss.png",
        "trainer_state.json",
        "tensorboard/events.out",
        "scores/scores.json",
        "spectrum.json",
        "report.html",
        "checkpoint-5/trainer_state.json",
    ]
    own = ["notes.txt", "checkpoint-notes/mine.txt", "adapters/mine.txt"]
    fill(tmp_path, *run, *own)
    RunFolder(tmp_path).create(overwrite=False)
    assert all((tmp_path / name).exists() for name in run + own)
    RunFolder(tmp_path).create(overwrite=True)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(tmp_path / name for name in own)


def test_runs_are_numbered_where_no_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(open_folder(request(), PLAN, {}).path) == "runs/commonsense-sora-1"
    assert not (tmp_path / "runs").exists()
    fill(tmp_path / "runs", "commonsense-sora-1/run.json", "commonsense-sora-2/run.json")
    assert str(open_folder(request(), PLAN, {}).path) == "runs/commonsense-sora-3"
    assert str(open_folder(request(resume="auto"), PLAN, {}).path) == "runs/commonsense-sora-2"
    assert str(open_folder(request(overwrite=True), PLAN, {}).path) == "runs/commonsense-sora-2"


def test_resuming_where_nothing_was_saved_starts_afresh(tmp_path):
    assert open_folder(request(output=tmp_path / "new", resume="auto"), PLAN, {}) == RunFolder(
        tmp_path / "new", None, []
    )


@pytest.mark.parametrize(("sweep", "flag"), [(False, "--resume"), (True, "--sweep")])
def test_another_run_is_refused_in_the_words_of_what_was_asked_for(tmp_path, sweep, flag):
    (tmp_path / "run.json").write_text(json.dumps({"fingerprint": {"dtype": "float32"}}))
    with pytest.raises(UserError, match=f"^{flag}: the run in .* its dtype is float32, here it is bfloat16$"):
        open_folder(request(output=tmp_path, resume="auto", sweep=sweep), PLAN, {"dtype": "bfloat16"})


def test_the_manifest_is_replaced_whole(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_manifest({"status": "started"})
    folder.write_manifest({"status": "finished"})
    assert json.loads((tmp_path / "run.json").read_text()) == {"status": "finished"}
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
