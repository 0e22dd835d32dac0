"""The programs in this process, and what each of them owes to whatever it is given: one line and exit code 2, no more.

Nothing is loaded twice: the base model's skeleton and tokenizer are the same for every case.
"""

import importlib
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from sora_hw import ConditionedConfig, cli
from sora_hw.data.embedded import MODEL_PATH
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


@pytest.fixture(scope="session")
def sound(tmp_path_factory) -> Path:
    """An adapter of the embedded model."""
    folder = tmp_path_factory.mktemp("sound") / "adapter"
    model = AutoModelForCausalLM.from_pretrained(MODEL_PATH, dtype=torch.float32)
    targets = ["q_proj", "v_proj"]
    config = ConditionedConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", init_weights=False)
    torch.manual_seed(0)
    get_peft_model(model, config).save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(folder, sound) -> Path:
    """A copy of it in the current folder."""
    return shutil.copytree(sound, folder / "adapter")


class Payload:
    """Leaves a file behind where it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.fixture
def payload(folder) -> Iterator[Payload]:
    """What must not be unpickled in the test, and would do harm if it were."""
    yield Payload()
    assert not (folder / "executed").exists()
    pickle.loads(pickle.dumps(Payload()))
    assert (folder / "executed").exists(), "the payload works"
