"""Finished sweeps in one table."""

import json

import pytest

from sora_hw.cli import main
from sora_hw.data.glue import TASKS
from sora_hw.errors import UserError
from sora_hw.finished.comparison import comparison


def sweep(folder, method, task, *scores):
    folder.mkdir()
    rows = [{"scores": {"validation loss": [0.5, None], f"test {TASKS[task].metric}": score}} for score in scores]
    (folder / "summary.json").write_text(json.dumps({"method": method, "recipe": f"glue-{task}", "rows": rows}))
    return folder


def test_the_last_setting_stands_beside_the_paper(tmp_path):
    rte = sweep(tmp_path / "a", "sora", "rte", [0.5, 0.1], [0.6, 0.01])
    cola = sweep(tmp_path / "b", "full", "cola", [0.3, None])
    lines = comparison([rte, cola]).splitlines()
    assert lines[0] == "| method | rte | cola | mean |"
    assert lines[2] == "| sora | 60.00 ± 1.00 (87.90 ± 0.42) | - | - |"
    assert lines[3] == "| full | - | 30.00 | - |"


def test_a_mean_is_compared_over_the_same_tasks_alone(tmp_path):
    some = [sweep(tmp_path / task, "sora", task, [0.5, 0.0]) for task in list(TASKS)[:3]]
    assert comparison(some).splitlines()[2].endswith("| 50.00 |")
    rest = [sweep(tmp_path / task, "sora", task, [0.5, 0.0]) for task in list(TASKS)[3:]]
    assert comparison(some + rest).splitlines()[2].endswith("| 50.00 (89.23) |")


def test_what_is_no_finished_sweep(tmp_path, capsys):
    with pytest.raises(UserError, match="no finished sweep there"):
        comparison([tmp_path])
    (tmp_path / "summary.json").write_text("{")
    assert main(["compare", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    for damaged in ("[]", '{"method": "sora"}', '{"method": "sora", "recipe": "glue-rte", "rows": []}'):
        (tmp_path / "summary.json").write_text(damaged)
        with pytest.raises(UserError, match="no finished sweep there"):
            comparison([tmp_path])


@pytest.mark.parametrize(("recipe", "advice"), [("glue-rte", "give them --test-data"), ("metamath", "only GLUE's")])
def test_what_was_not_scored(tmp_path, recipe, advice):
    rows = [{"scores": {"validation loss": [0.5, None]}}]
    (tmp_path / "summary.json").write_text(json.dumps({"method": "sora", "recipe": recipe, "rows": rows}))
    with pytest.raises(UserError, match=f"not scored; {advice}"):
        comparison([tmp_path])


def test_no_sweep_hides_another(tmp_path):
    """Two rotation ranks are one method: of two such sweeps the table would show the last."""
    sweeps = [sweep(tmp_path / name, "sora", "rte", [0.5, 0.1]) for name in "ab"]
    with pytest.raises(UserError, match="b: a second sweep of sora on rte"):
        comparison(sweeps)
