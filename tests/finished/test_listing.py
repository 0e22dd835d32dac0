"""A folder of runs at a glance: what is told of each, and how little is read for it."""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from sora_hw import cli
from sora_hw.evaluation.tasks import COMMONSENSE, TASKS
from sora_hw.finished.listing import list_runs
from sora_hw.recipes import commonsense, glue

RECIPE = asdict(commonsense.embedded())
RESULTS = {"steps": 150, "final_loss": 0.5, "test": {}, "validation": {}}
SCORE = {"protocol": "likelihood", "metric": "accuracy", "records": 10}
READ: list[str] = []
sys.addaudithook(lambda event, given: READ.append(str(given[0])) if event == "open" else None)


def run(folder: Path, recipe: dict = RECIPE, **manifest) -> Path:
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter_config.json").write_text('{"peft_type": "NEVER_LISTED"}')
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(bytes(3 * 2**20))
    content = {"recipe": recipe, "status": "finished", "results": RESULTS, "finished": "2026-01-02T03:04:05+00:00"}
    (folder / "run.json").write_text(json.dumps(content | manifest))
    return folder


def adapter(folder: Path, **config) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(bytes(2**20 // 2))
    return folder


def score(folder: Path, **shares) -> None:
    (folder / "scores").mkdir()
    scores = [{**SCORE, "task": task, "value": share} for task, share in shares.items()]
    (folder / "scores" / "scores.json").write_text(json.dumps({"adapter": "x", "scores": scores}))


@pytest.fixture
def told(tmp_path, monkeypatch, capfd) -> Iterator:
    """`told()`: the lines of `sora-hw runs .` in the current folder."""
    monkeypatch.chdir(tmp_path)

    def lines(*arguments: str) -> list[str]:
        assert cli.main(["runs", *(arguments or ["."])]) == 0
        return capfd.readouterr().out.splitlines()

    return lines


def test_what_is_told_of_a_run(tmp_path, told):
    run(tmp_path / "a")
    header, line = told()
    assert " ".join(header.split()) == "folder method model status steps loss score of size date (UTC)"
    assert " ".join(line.split()) == "a sora embedded finished 150 0.5000 - - 3.0 MiB 2026-01-02 03:04"


def test_columns_stand_below_one_another(tmp_path, told):
    run(tmp_path / "日本")
    run(tmp_path / "a-long-name", {**RECIPE, "model": "x/日"}, results={**RESULTS, "steps": 9})
    header, *lines = told()
    wide = [line.replace("日", "日 ").replace("本", "本 ") for line in lines]  # each takes two columns of the terminal
    assert {line.index("sora") for line in wide} == {header.index("method")}
    assert {line.index("finished") for line in wide} == {header.index("status")}
    assert {line.index("0.5000") for line in wide} == {header.index("loss") - 2}, "numbers end together"


def test_the_newest_comes_last_and_what_is_damaged_below(tmp_path, told):
    run(tmp_path / "b", finished="2026-03-01T00:00:00+00:00")
    run(tmp_path / "a", finished="2026-03-01T01:00:00+02:00")  # an hour earlier
    run(tmp_path / "sweeps" / "c" / "d", finished="2026-02-01T00:00:00+00:00")
    old = adapter(tmp_path / "theirs", peft_type="LORA", base_model_name_or_path="some/base") / "adapter_config.json"
    os.utime(old, (1e9, 1e9))
    (adapter(tmp_path / "broken") / "adapter_config.json").write_text("{")
    (run(tmp_path / "cut") / "run.json").write_bytes((tmp_path / "a" / "run.json").read_bytes()[:-9])
    _, *lines = told()
    assert [line.split()[0] for line in lines[:4]] == ["theirs", "sweeps/c/d", "a", "b"]
    assert " ".join(lines[0].split()) == "theirs LORA some/base adapter - - - - 0.5 MiB 2001-09-09 01:46"
    assert lines[4:] == ["broken/adapter_config.json is damaged", "cut/run.json is damaged"]


@pytest.mark.parametrize("status", ["started", "interrupted"])
def test_an_unfinished_run_tells_its_last_checkpoint(tmp_path, told, status):
    folder = run(tmp_path / "a", status=status, results=None, finished=None, started="2026-01-01T00:00:00+00:00")
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-11.part"):
        (folder / name).mkdir()
    assert told()[1].split()[3:7] == [status, "10", "-", "-"]
    assert told()[1].endswith("2026-01-01 00:00")


def test_the_main_score(tmp_path, told):
    score(run(tmp_path / "one"), boolq=0.625)
    tasks = [task.name for task in TASKS.values() if task.kind == COMMONSENSE]
    shares = {task: 0.5 + 0.01 * number for number, task in enumerate(tasks)}
    score(run(tmp_path / "two"), **shares)
    questions = {"questions": 360, "chance": 0.4, "before": 0.41, "after": 0.88}
    run(tmp_path / "three", results={**RESULTS, "embedded_questions": questions})
    recipe = asdict(glue.recipe("rte"))
    run(tmp_path / "four", recipe, results={**RESULTS, "test": {"accuracy": 0.75}})
    found = {each.folder.name: (each.score, each.scored) for each in list_runs(tmp_path)}
    assert found == {
        "one": (62.5, "BoolQ"),
        "two": (pytest.approx(100 * sum(shares.values()) / len(shares)), "average"),
        "three": (88, "held-out questions"),
        "four": (75, "RTE"),
    }


def test_json_has_every_field(tmp_path, told):
    run(tmp_path / "a\x1b[2J")
    (found,) = json.loads("\n".join(told(".", "--format", "json")))
    assert found == {
        "folder": "a\x1b[2J",
        "date": "2026-01-02T03:04:05+00:00",
        "method": "sora",
        "model": "embedded",
        "status": "finished",
        "steps": 150,
        "loss": 0.5,
        "score": None,
        "scored": None,
        "size": 3 * 2**20,
        "problem": None,
    }


def test_what_lies_in_a_run_belongs_to_it_and_links_are_not_followed(tmp_path):
    folder = run(tmp_path / "a")
    (folder / "checkpoint-3").mkdir()
    (folder / "adapter").rename(folder / "checkpoint-3" / "adapter")
    (tmp_path / "b").symlink_to(folder)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "up").symlink_to(tmp_path)
    assert [each.folder for each in list_runs(tmp_path)] == [folder]
    assert [each.folder for each in list_runs(tmp_path / "b")] == [tmp_path / "b"], "unless it is named"


def test_three_folders_down_and_no_further(tmp_path):
    deep = run(tmp_path / "1" / "2" / "3")
    run(tmp_path / "1" / "2" / "x" / "4")
    assert [each.folder for each in list_runs(tmp_path)] == [deep]


def test_a_thousand_runs_are_listed_by_reading_two_files_of_each(tmp_path):
    for number in range(1000):
        folder = tmp_path / f"sweep-{number % 7}" / f"{number}"
        if number % 2:
            adapter(folder, peft_type="LORA")
            continue
        score(run(folder), boolq=number / 1000)
    for file in tmp_path.rglob("*.safetensors"):
        os.truncate(file, 0)
    READ.clear()
    found = list_runs(tmp_path)
    read = [name for name in READ if name.startswith(str(tmp_path))]
    assert len(found) == 1000
    assert {Path(name).name for name in read} == {"run.json", "scores.json", "adapter_config.json"}
    assert len(read) == len(set(read)) == 1500
    shares = sorted(each.score / 100 for each in found if each.score is not None)
    assert shares == pytest.approx([number / 1000 for number in range(0, 1000, 2)])
