"""Finished sweeps in one table."""

import json

import pytest

from sora_hw.cli import main
from sora_hw.data.glue import TASKS
from sora_hw.errors import UserError
from sora_hw.evaluation.comparison import comparison


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
    (tmp_path / "summary.json").write_text('{"method": "sora", "recipe": "x", "rows": [{"scores": {}}]}')
    with pytest.raises(UserError, match="not scored; give them --test-data"):
        comparison([tmp_path])
