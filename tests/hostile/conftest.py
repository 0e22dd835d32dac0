"""The programs in this process, and what each of them owes to whatever it is given: one line and exit code 2, no more.

Nothing is loaded twice: the base model's skeleton and tokenizer are the same for every case.
"""

import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sora_hw import cli
from sora_hw.finished import score
from sora_hw.training import launch, run

LIMIT = 20  # seconds; what waits for ever fails here


def _launcher(name: str) -> Callable[[list[str]], int]:
    return lambda arguments: launch.main(importlib.import_module(f"sora_hw.recipes.{name}"), arguments)


PROGRAMS = {
    "commonsense": _launcher("commonsense"),
    "metamath": _launcher("metamath"),
    "glue": _launcher("glue"),
    "score": score.main,
    "sora-hw": cli.main,
}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def loaded() -> dict[object, object]:
    """What has been found and loaded so far, by name."""
    return {}


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch, loaded):
    """What a launcher should have refused does not run on; the models of earlier cases are kept."""

    def never(*arguments, **options):
        raise AssertionError("it was taken for good")

    def kept(function):
        def call(base, *others):
            key = function.__name__, getattr(base, "name", base), type(others[-1]).__name__
            name = getattr(base, "name", base)
            if name != "embedded" or function.__name__ == "check_model":
                return function(base, *others)
            if key not in loaded:
                loaded[key] = function(base, *others)
            return loaded[key]

        return call

    for function in (run.find, run.load_tokenizer):
        monkeypatch.setattr(run, function.__name__, kept(function))
    monkeypatch.setattr(launch, "train", never)
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def refused(folder, capfd) -> Iterator[Callable[..., str]]:
    """`refused(program, *arguments)`: the one line with which a program of `PROGRAMS` refuses them."""

    def run(program: str, *arguments: object) -> str:
        before = _everything(folder)
        capfd.readouterr()
        try:
            code = PROGRAMS[program]([str(argument) for argument in arguments])
        except SystemExit as error:
            code = f"SystemExit({error.code})"
        printed, told = capfd.readouterr()
        assert (code, printed) == (2, ""), told
        assert told.startswith(("error: ", "sora-hw: ")) and told.endswith("\n") and told.count("\n") == 1, told
        assert told[:-1].isprintable(), told
        assert "Traceback" not in told
        assert _everything(folder) == before
        return told

    return run


def _everything(folder: Path) -> dict[str, object]:
    """All that lies there: content of files, targets of links."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in folder.rglob("*")
    }
