"""A finished run as it is read back."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from sora_hw.errors import UserError
from sora_hw.finished.run import read_run, read_runs
from sora_hw.recipes import commonsense, glue


def make_run(folder: Path, recipe, **manifest) -> Path:
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"recipe": asdict(recipe), "status": "finished", **manifest}))
    return folder


@pytest.mark.parametrize("recipe", [commonsense.embedded(), glue.recipe("cola")], ids=lambda recipe: recipe.name)
def test_the_recipe_comes_back_as_it_was(tmp_path, recipe):
    run = read_run(make_run(tmp_path / "run", recipe))
    assert run.recipe == recipe
    assert run.history == []


def test_what_was_trained(tmp_path):
    run = read_run(make_run(tmp_path / "a", commonsense.embedded(), status="diverged"))
    with pytest.raises(UserError, match=r"has left no adapter/ \(its status: diverged"):
        _ = run.trained
    (tmp_path / "a" / "adapter").mkdir()
    assert run.trained == tmp_path / "a" / "adapter"
    full = read_run(make_run(tmp_path / "b", replace(commonsense.embedded(), method="full")))
    (tmp_path / "b" / "model").mkdir()
    assert full.trained == tmp_path / "b" / "model"


def test_a_sweep_is_its_runs(tmp_path):
    alone = make_run(tmp_path / "alone", commonsense.embedded())
    first, second = (make_run(tmp_path / "sweep" / name, commonsense.embedded()) for name in ("seed=0", "seed=1"))
    assert [run.path for run in read_runs([tmp_path / "sweep", alone])] == [first, second, alone]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no run there"),
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"recipe": 3}', "is damaged"),
        ('{"recipe": {"name": "x"}}', "another version of sora_hw"),
        (json.dumps({"recipe": {**asdict(commonsense.embedded()), "rank": "x"}}), "is damaged"),
        (json.dumps({"recipe": {**asdict(commonsense.embedded()), "method": "x"}}), "run.json: its recipe"),
        (json.dumps({"recipe": asdict(commonsense.embedded()), "results": [1]}), "is damaged"),
    ],
)
def test_what_is_no_run(tmp_path, content, message):
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read_run(tmp_path)


def test_a_folder_without_runs(tmp_path):
    with pytest.raises(UserError, match="neither a run nor a sweep"):
        read_runs([tmp_path])


@pytest.mark.parametrize("content", ["{", '{"log_history": [1]}', '{"log_history": [{"loss": 1.0}]}'])
def test_a_damaged_history(tmp_path, content):
    run = read_run(make_run(tmp_path / "run", commonsense.embedded()))
    (run.path / "trainer_state.json").write_text(content)
    with pytest.raises(UserError, match="is damaged"):
        _ = run.history
