"""Folders of base models from strangers: what lies in them is damaged, or made to do harm."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sora_hw import cli
from sora_hw.data.embedded import MODEL_PATH

SAFE, PICKLED, PART = "model.safetensors", "pytorch_model.bin", "part.safetensors"
TENSORS = load_file(MODEL_PATH / SAFE)


@pytest.fixture
def base(folder, adapter) -> Path:
    """A copy of the embedded model beside an adapter of it; its weights are in a file of another name."""
    shutil.copytree(MODEL_PATH, folder / "base")
    (folder / "base" / SAFE).rename(folder / "base" / PART)
    return folder / "base"


def index(base: Path, name: str = SAFE, **changes: object) -> None:
    content = {"metadata": {}, "weight_map": dict.fromkeys(TENSORS, PART), **changes}
    (base / f"{name}.index.json").write_text(json.dumps({key: it for key, it in content.items() if it is not None}))


def configure(base: Path, **changes: object) -> None:
    content = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(content | changes))


PROGRAMS = {
    "merge": ("sora-hw", "merge", "adapter", "--model", "./base", "--output", "new"),
    "train": ("commonsense", "--backend", "cpu", "--model", "./base", "--train-data", "embedded"),
}
programs = pytest.mark.parametrize("program", PROGRAMS)
OUTSIDE = {
    "above": "../outside.safetensors",
    "absolute": "{folder}/outside.safetensors",
    "around": "../base/part.safetensors",
    "system": "../../../../../../etc/passwd",
    "missing": "gone.safetensors",
    "folder": "sub",
    "below": "sub/part.safetensors",
    "pipe": "pipe.safetensors",
    "endless": "endless.safetensors",
    "nothing": "",
    "here": ".",
    "nul": "a\0b",
    "number": 7,
    "list": ["part.safetensors"],
    "null": None,
}

NONE_NAMED = "config", "null"


@programs
@pytest.mark.parametrize(
    ("by", "case"),
    [(by, case) for by in ("index", "index-of-pickles", "config") for case in OUTSIDE if (by, case) != NONE_NAMED],
)
def test_weights_that_are_named_are_in_the_folder(folder, base, refused, program, by, case):
    (folder / "outside.safetensors").symlink_to(base / PART)
    (base / "sub").mkdir()
    (base / "sub" / PART).symlink_to(base / PART)
    os.mkfifo(base / "pipe.safetensors")
    (base / "endless.safetensors").symlink_to("/dev/zero")
    name = OUTSIDE[case].format(folder=folder) if isinstance(OUTSIDE[case], str) else OUTSIDE[case]
    if by == "config":
        configure(base, transformers_weights=name)
    else:
        index(base, SAFE if by == "index" else PICKLED, weight_map={**dict.fromkeys(TENSORS, PART), "more": name})
    assert "--model ./base" in refused(*PROGRAMS[program])


INDEX = {
    "empty": b"",
    "brace": b"{",
    "list": b"[]",
    "nothing-in-it": b"{}",
    "binary": bytes(range(256)),
    "deep": b"[" * 200_000,
    "map-list": b'{"metadata": {}, "weight_map": ["part.safetensors"]}',
    "map-null": b'{"metadata": {}, "weight_map": null}',
    "no-metadata": b'{"weight_map": {"a": "part.safetensors"}}',
    "metadata-number": b'{"metadata": 7, "weight_map": {"a": "part.safetensors"}}',
}


@programs
@pytest.mark.parametrize("case", INDEX)
def test_a_damaged_index(base, refused, program, case):
    (base / f"{SAFE}.index.json").write_bytes(INDEX[case])
    assert "model.safetensors.index.json is damaged" in refused(*PROGRAMS[program])


def pickles(base: Path, payload: object) -> dict[str, Callable[[], object]]:
    file, tensors = base / PICKLED, dict.fromkeys(TENSORS, "p.bin")
    return {
        "plain": lambda: file.write_bytes(pickle.dumps({"a": payload})),
        "torch": lambda: torch.save({"a": payload}, file),
        "torch-old": lambda: torch.save({"a": payload}, file, _use_new_zipfile_serialization=False),
        "behind-tensors": lambda: torch.save({**TENSORS, "a": payload}, file),
        "in-parts": lambda: (torch.save({"a": payload}, base / "p.bin"), index(base, PICKLED, weight_map=tensors)),
        "as-safetensors": lambda: (torch.save({"a": payload}, base / "p.bin"), index(base, weight_map=tensors)),
        "by-config": lambda: (
            torch.save({"a": payload}, base / "adapter_model.bin"),
            configure(base, transformers_weights="adapter_model.bin"),
        ),
        "as-model": lambda: torch.save({"a": payload}, base / SAFE),
    }


@pytest.mark.parametrize("case", pickles(Path(), None))
def test_the_payload_of_a_pickle_does_not_run(base, payload, refused, case):
    (base / PART).unlink()
    pickles(base, payload)[case]()
    assert "--model ./base" in refused(*PROGRAMS["merge"])


def test_code_beside_a_model_does_not_run(folder, base, refused):
    (base / PART).rename(base / SAFE)
    (base / "evil.py").write_text("import os; os.system('touch executed')\n")
    configure(base, model_type="mine", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    refused(*PROGRAMS["merge"])
    refused(*PROGRAMS["train"])
    assert not (folder / "executed").exists()


DAMAGED = {"empty": b"", "text": b"hello", "cut-zip": b"PK\x03\x04" + bytes(100), "cut-pickle": b"\x80\x02}"}


@pytest.mark.parametrize("name", [SAFE, PICKLED])
@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_weights(base, refused, name, case):
    (base / PART).unlink()
    (base / name).write_bytes(DAMAGED[case])
    assert "its" in refused(*PROGRAMS["merge"])


@programs
@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "x"},
        {"hidden_size": 64},
        {"vocab_size": 10**12},
        {"num_attention_heads": 0},
        {"hidden_act": "__import__"},
        {"dtype": "evil"},
        {"quantization_config": 7},
        {"model_type": ["llama"]},
    ],
    ids=str,
)
def test_a_configuration_that_cannot_be(base, refused, program, change):
    (base / PART).rename(base / SAFE)
    configure(base, **change)
    assert "--model ./base" in refused(*PROGRAMS[program])


@pytest.mark.parametrize("kind", ["parts", "named", "pickle", "pickled-parts", "stale-index"])
def test_honest_weights_are_loaded(folder, base, kind, capfd):
    if kind == "parts":
        names = list(TENSORS)
        parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for part, inside in parts.items():
            save_file({name: TENSORS[name] for name in inside}, base / part, metadata={"format": "pt"})
        index(base, weight_map={name: part for part, inside in parts.items() for name in inside})
    elif kind == "named":
        configure(base, transformers_weights=PART)
    elif kind == "stale-index":
        (base / PART).rename(base / SAFE)
        index(base, PICKLED, weight_map=dict.fromkeys(TENSORS, "never-fetched.bin"))
    else:
        (base / PART).unlink()
        torch.save(TENSORS, base / (PICKLED if kind == "pickle" else "p.bin"))
        if kind == "pickled-parts":
            index(base, PICKLED, weight_map=dict.fromkeys(TENSORS, "p.bin"))
    assert cli.main(list(PROGRAMS["merge"][1:])) == 0, capfd.readouterr()
    merged = load_file(folder / "new" / SAFE)
    changed = {name for name in TENSORS if not torch.equal(merged[name], TENSORS[name])}
    assert changed == {name for name in TENSORS if name.endswith(("q_proj.weight", "v_proj.weight"))}
