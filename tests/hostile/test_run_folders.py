"""Folders of runs from strangers: what lies in them is damaged, or made to do harm."""

import html.parser
import io
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from sora_hw import cli
from sora_hw.recipes import commonsense
from sora_hw.training import launch

DEEP = b"[" * 200_000
DAMAGED = {
    "empty": b"",
    "text": b"hello",
    "brace": b"{",
    "list": b"[]",
    "null": b"null",
    "number": b"7",
    "nothing-in-it": b"{}",
    "binary": bytes(range(256)),
    "utf-16": "{}".encode("utf-16"),
    "deep": DEEP,
    "long-number": b'{"recipe": ' + b"9" * 5000 + b"}",
    "pickle": b"\x80\x04\x95.",
}
RECIPE = asdict(commonsense.embedded())
MANIFEST = {"recipe": RECIPE, "status": "finished", "device": "cpu", "profile": {"dtype": "float32"}}
MANIFEST["results"] = {"steps": 1, "final_loss": 0.5, "test": {}}
RUN = {
    **{
        f"recipe-{kind}": {"recipe": value}
        for kind, value in {"null": None, "text": "x", "list": [1], "empty": {}}.items()
    },
    "recipe-more": {"recipe": {**RECIPE, "more": 1}},
    "recipe-less": {"recipe": {name: value for name, value in RECIPE.items() if name != "rank"}},
    **{
        f"recipe-{name}-{kind}": {"recipe": {**RECIPE, name: value}}
        for name in ("rank", "learning_rate", "target_modules", "method", "model", "seed")
        for kind, value in {"null": None, "object": {}, "nan": float("nan"), "nested": [[[]]]}.items()
        if not (name in ("target_modules", "model") and kind in ("nan", "nested"))
    },
    "recipe-rank-text": {"recipe": {**RECIPE, "rank": "x"}},
    "recipe-rank-negative": {"recipe": {**RECIPE, "rank": -1}},
    "recipe-method-unknown": {"recipe": {**RECIPE, "method": "polar"}},
    "recipe-task-unknown": {"recipe": {**RECIPE, "task": "../rte"}},
    **{
        f"{name}-{kind}": {name: value}
        for name in ("results", "data", "batch")
        for kind, value in {"text": "x", "number": 7}.items()
    },
}
RESULTS = {
    **{
        f"{name}-{kind}": {name: value}
        for name in ("steps", "final_loss", "validation_loss", "seconds", "peak_memory_bytes", "trainable_percent")
        for kind, value in {"text": "x", "list": [1], "true": True, "nan": float("nan"), "huge": 10**400}.items()
    },
    **{
        f"{name}-{kind}": {name: value}
        for name in ("test", "validation", "embedded_questions")
        for kind, value in {"text": "x", "number": 7, "of-text": {"accuracy": "x"}, "of-nan": {"after": 1e999}}.items()
    },
}
SCORE = {"protocol": "likelihood", "task": "boolq", "metric": "accuracy", "value": 0.5, "records": 3}
SCORES = {
    **{kind: {"scores": value} for kind, value in {"null": None, "text": "x", "number": 7, "object": {"a": 1}}.items()},
    **{
        f"{name}-{kind}": {"scores": [{**SCORE, name: value}]}
        for name in SCORE
        for kind, value in {"null": None, "list": [], "object": {}}.items()
    },
    "task-path": {"scores": [{**SCORE, "task": "../boolq"}]},
    "value-nan": {"scores": [{**SCORE, "value": float("nan")}]},
    "value-huge": {"scores": [{**SCORE, "value": 10**400}]},
    "more": {"scores": [{**SCORE, "more": 1}]},
}


@pytest.fixture
def run(folder) -> Path:
    """The folder of a finished run whose adapter is missing."""
    (folder / "run").mkdir()
    (folder / "run" / "run.json").write_text(json.dumps(MANIFEST))
    return folder / "run"


@pytest.mark.parametrize("case", DAMAGED)
@pytest.mark.parametrize("command", ["compare", "report", "merge", "generate"])
def test_a_damaged_manifest(run, refused, command, case):
    (run / "run.json").write_bytes(DAMAGED[case])
    more = {"merge": ["--output", "new"], "generate": ["a question?"]}.get(command, [])
    assert "run.json" in refused("sora-hw", command, "run", *more)


@pytest.mark.parametrize("case", RUN)
def test_a_manifest_that_cannot_be(run, refused, case):
    (run / "run.json").write_text(json.dumps({**MANIFEST, **RUN[case]}))
    assert "run.json" in refused("sora-hw", "report", "run")


@pytest.mark.parametrize("case", RESULTS)
@pytest.mark.parametrize("command", ["compare", "report"])
def test_results_that_cannot_be(run, refused, command, case):
    (run / "run.json").write_text(json.dumps({**MANIFEST, "results": {**MANIFEST["results"], **RESULTS[case]}}))
    assert "run.json" in refused("sora-hw", command, "run")


def test_results_without_what_a_choice_among_runs_needs(folder, refused):
    for rate in (1e-3, 1e-4):
        recipe = {**RECIPE, "learning_rate": rate, "validation_size": 8}
        (folder / f"{rate}").mkdir()
        (folder / f"{rate}" / "run.json").write_text(json.dumps({**MANIFEST, "recipe": recipe}))
    assert "learning rate" in refused("sora-hw", "compare", ".")


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_scores(run, refused, case):
    (run / "scores").mkdir()
    (run / "scores" / "scores.json").write_bytes(DAMAGED[case])
    assert "scores.json" in refused("sora-hw", "report", "run")


@pytest.mark.parametrize("case", SCORES)
def test_scores_that_cannot_be(run, refused, case):
    (run / "scores").mkdir()
    (run / "scores" / "scores.json").write_text(json.dumps({"model": "x", **SCORES[case]}))
    assert "scores.json" in refused("sora-hw", "report", "run")


@pytest.mark.parametrize("name", ["trainer_state.json", "spectrum.json"])
@pytest.mark.parametrize("case", DAMAGED)
def test_other_damaged_files(run, refused, name, case):
    (run / "adapter").mkdir()
    (run / name).write_bytes(DAMAGED[case])
    assert name in refused("sora-hw", "report", "run")


HISTORY = {
    "step-text": [{"step": "x", "loss": 1}],
    "step-null": [{"step": None}],
    "step-missing": [{"loss": 1}],
    "entries-numbers": [1, 2],
    "entries-null": [None],
    "step-nan": [{"step": float("nan"), "loss": 1.0}],
    "step-infinite": [{"step": float("inf"), "loss": 1.0}],
    "loss-huge": [{"step": 1, "loss": 10**400}],
}


@pytest.mark.parametrize("case", HISTORY)
def test_a_history_that_cannot_be(run, refused, case):
    (run / "trainer_state.json").write_text(json.dumps({"log_history": HISTORY[case]}))
    assert "trainer_state.json" in refused("sora-hw", "report", "run")


@pytest.mark.parametrize("name", ["run.json", "trainer_state.json", "spectrum.json", "scores/scores.json"])
@pytest.mark.parametrize("what", ["pipe", "endless", "folder"])
def test_what_is_no_file_is_not_waited_for(run, refused, name, what):
    file = run / name
    (run / "adapter").mkdir()
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    {"pipe": os.mkfifo, "endless": lambda it: it.symlink_to("/dev/zero"), "folder": os.mkdir}[what](file)
    refused("sora-hw", "report", "run")


@pytest.mark.parametrize(
    "profile",
    [
        {},
        {"dtype": "float32"},
        {"dtype": 5, "four_bit": False},
        {"dtype": ["float32"], "four_bit": False},
        {"dtype": "load", "four_bit": False},
        {"dtype": "float32", "four_bit": "no"},
    ],
)
def test_a_profile_that_cannot_be(run, refused, profile):
    (run / "run.json").write_text(json.dumps({**MANIFEST, "profile": profile}))
    (run / "adapter").mkdir()
    assert "run.json" in refused("sora-hw", "generate", "run", "a question?")


EVIL = ["<script>alert(1)</script>", '" onload="alert(1)', "</svg></style></title><img src=x onerror=alert(1)>"]


class Tags(html.parser.HTMLParser):
    """The tags of a page and the names of their attributes."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes = set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}


@pytest.mark.parametrize("evil", EVIL)
def test_a_page_shows_what_it_is_given_as_text(folder, capfd, evil):
    chosen = {name: RECIPE[name] for name in ("method", "rotation", "rotation_scale", "schedule", "learn")}
    recipe = {**RECIPE, **chosen, "name": evil, "model": evil, "target_modules": [evil], "train_data": [evil]}
    facts = dict.fromkeys(("device_name", "kernels", "git_commit", "started", "finished", "resumed_from"), evil)
    sections = {
        name: {evil: evil} for name in ("data", "profile", "batch", "versions", "environment", "device_settings")
    }
    results = {"final_loss": 0.5, "steps": 1, "test": {evil: 0.5}, "validation": {evil: 0.5}}
    manifest = {**facts, **sections, "recipe": recipe, "argv": [evil], "deepspeed": {evil: evil}, "results": results}
    history = [{"step": 1, "loss": 1.0, evil: 1.0}, {"step": 2, "loss": 0.5, "learning_rate": 0.1}]
    pages = {}
    for name, changes in (("plain", lambda text: text.replace(evil.replace('"', '\\"'), "x")), ("spoilt", str)):
        for which in "ab":
            run = folder / name / which
            run.mkdir(parents=True)
            own = {**manifest, "status": "finished", "recipe": {**recipe, "seed": ord(which)}}
            (run / "run.json").write_text(changes(json.dumps(own)))
            (run / "trainer_state.json").write_text(changes(json.dumps({"log_history": history})))
        for runs in ("a",), ("a", "b"):
            page = folder / f"{name}-{len(runs)}.html"
            assert cli.main(["report", *(f"{name}/{which}" for which in runs), "--output", str(page)]) == 0, (
                capfd.readouterr()
            )
            pages[name, len(runs)] = page.read_text()
    for count in (1, 2):
        found, wanted = Tags(pages["spoilt", count]), Tags(pages["plain", count])
        assert found.tags == wanted.tags and found.attributes == wanted.attributes
        assert "alert(1)" in pages["spoilt", count] and evil not in pages["spoilt", count]
        assert "script" not in found.tags


def test_names_in_files_do_not_leave_the_run_s_folder(folder, run, capfd):
    """Where anything is written is decided by the command line alone."""
    escape = "../../escaped"
    manifest = {**MANIFEST, "output": escape, "recipe": {**RECIPE, "name": escape, "model": escape}}
    (run / "run.json").write_text(json.dumps(manifest))
    (run / "scores").mkdir()
    facts = {"adapter": escape, "model": escape, "data": {escape: escape}}
    (run / "scores" / "scores.json").write_text(json.dumps({**facts, "scores": [SCORE]}))
    (run / "scores" / "scored.json").write_text(json.dumps({"model": {}, "questions": {f"{escape}/x": "y"}}))
    before = sorted(folder.parent.rglob("*"))
    assert cli.main(["report", "run"]) == 0, capfd.readouterr()
    cli.main(["compare", "run"])
    cli.main(["spectrum", "run"])
    assert sorted(folder.parent.rglob("*")) == sorted([*before, run / "report.html"])


def test_a_list_of_runs_names_the_damaged_ones_and_shows_the_others(folder, run, capfd):
    """Each in one line, whatever its files hold."""
    spoilt = {**MANIFEST, "status": ["\x1b[2J"], "started": 10**400, "finished": "[/x]"}
    spoilt["recipe"] = {**RECIPE, "model": "\x1b[2J\n[red]x"}
    (run / "run.json").write_text(json.dumps(spoilt))
    cases = {f"manifest-{name}": ("run.json", content) for name, content in DAMAGED.items()}
    cases |= {
        f"config-{name}": ("adapter_config.json", content) for name, content in DAMAGED.items() if content != b"{}"
    }
    for name, (file, content) in cases.items():
        (folder / name).mkdir()
        (folder / name / file).write_bytes(content)
    for name, make in {"pipe": os.mkfifo, "endless": lambda it: it.symlink_to("/dev/zero")}.items():
        (folder / f"what-{name}").mkdir()
        make(folder / f"what-{name}" / "adapter_config.json")
    (folder / "config").mkdir()
    config = {"peft_type": ["x"], "method": "[/x]\x1b[2J", "base_model_name_or_path": 7}
    (folder / "config" / "adapter_config.json").write_text(json.dumps(config))
    assert cli.main(["runs", "."]) == 0
    out, err = capfd.readouterr()
    assert err == "" and all(line.isprintable() for line in out.splitlines())
    _, first, second, *problems = out.splitlines()
    assert {line.split()[0] for line in (first, second)} == {"run", "config"}
    assert r"\x1b[2J\n[red]x" in out and r"[/x]\x1b[2J" in out
    assert len(problems) == len(cases) + 2
    assert cli.main(["runs", ".", "--format", "json"]) == 0
    assert len(json.loads(capfd.readouterr().out)) == len(cases) + 4


@pytest.mark.parametrize("where", ["nowhere", "run.json", "empty"])
def test_a_folder_without_runs(folder, refused, where):
    (folder / "run.json").write_text("{}")
    (folder / "empty").mkdir()
    assert where in refused("sora-hw", "runs", where)


@pytest.mark.parametrize("command", ["compare", "spectrum", "runs", "report"])
def test_names_in_files_are_no_markup_and_no_commands(run, capfd, command):
    recipe = {**RECIPE, "name": "[/x]", "model": "\x1b[2J[red]x"}
    (run / "run.json").write_text(json.dumps({**MANIFEST, "recipe": recipe}))
    (run / "scores").mkdir()
    (run / "scores" / "scores.json").write_text(json.dumps({"adapter": "x", "scores": [SCORE]}))
    cli.main([command, "run"])
    for printed in capfd.readouterr():
        assert all(line.isprintable() for line in printed.splitlines())
        assert "Traceback" not in printed


@pytest.mark.parametrize("arguments", [["compare", "run"], ["compare", "run", "--format", "markdown"], ["runs", "."]])
def test_a_table_is_printed_where_its_characters_cannot_be(folder, run, monkeypatch, arguments):
    (run / "run.json").write_text(json.dumps({**MANIFEST, "recipe": {**RECIPE, "model": "日±"}}))
    (run / "scores").mkdir()
    (run / "scores" / "scores.json").write_text(json.dumps({"adapter": "x", "scores": [SCORE]}))
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="ascii"))
    assert cli.main(arguments) == 0
    sys.stdout.flush()
    assert b"??" in printed.getvalue() and b"50.00" in printed.getvalue()


def test_a_launcher_prints_where_characters_cannot_be(monkeypatch):
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="ascii"))
    assert launch.exit_code(lambda: print("0.5 ± 0.1", flush=True), "") == 0
    assert printed.getvalue() == b"0.5 ? 0.1\n"
