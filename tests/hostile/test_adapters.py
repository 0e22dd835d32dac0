"""Adapters from strangers: damaged, contradictory, or made to do harm."""

import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sora_hw import cli
from sora_hw.training import patterns

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
CHANGED = {
    "no-peft-type": {"peft_type": None},
    "unknown-peft-type": {"peft_type": "NOBODYS"},
    "number-as-peft-type": {"peft_type": 7},
    "list-as-peft-type": {"peft_type": ["LORA"]},
    "other-peft-type": {"peft_type": "LORA"},
    "prompt-tuning": {"peft_type": "PROMPT_TUNING"},
    "unknown-version": {"format_version": 2},
    "version-as-text": {"format_version": "1"},
    "version-true": {"format_version": True},
    "version-huge": {"format_version": 10**30},
    "unknown-method": {"method": "polar"},
    "method-as-number": {"method": 7},
    "method-as-list": {"method": ["sora"]},
    "contradiction": {"pre": "rotation"},
    "unknown-pre": {"method": None, "pre": "../../etc"},
    "r-zero": {"r": 0},
    "r-negative": {"r": -1},
    "r-text": {"r": "4"},
    "r-fraction": {"r": 4.5},
    "r-true": {"r": True},
    "r-null": {"r": None},
    "r-list": {"r": [4]},
    "r-other": {"r": 5},
    "r-huge": {"r": 10**30},
    "r-that-fills-the-memory": {"r": 10**12},
    "rotation-rank-other": {"rotation_rank": 2},
    "rotation-rank-huge": {"rotation_rank": 10**13},
    "alpha-nan": {"alpha": float("nan")},
    "alpha-infinite": {"alpha": float("inf")},
    "alpha-text": {"alpha": "8"},
    "alpha-huge": {"alpha": 10**400},
    "alpha-null": {"alpha": None},
    "dropout-one": {"dropout": 1},
    "dropout-text": {"dropout": "0"},
    "eps-zero": {"rotation_eps": 0},
    "unknown-rotation": {"rotation": "euler"},
    "rotation-as-object": {"rotation": {}},
    "bias-unknown": {"bias": "some"},
    "init-unknown": {"init_weights": "random"},
    "init-object": {"init_weights": {}},
    "targets-missing": {"target_modules": ["nothing_proj"]},
    "targets-number": {"target_modules": 7},
    "targets-empty": {"target_modules": []},
    "targets-of-numbers": {"target_modules": [7]},
    "targets-expression": {"target_modules": "("},
    "targets-fewer": {"target_modules": ["q_proj"]},
    "targets-norms": {"target_modules": ["input_layernorm"]},
    "rank-pattern-text": {"rank_pattern": {"q_proj": "4"}},
    "rank-pattern-zero": {"rank_pattern": {"q_proj": 0}},
    "rank-pattern-list": {"rank_pattern": ["q_proj"]},
    "rank-pattern-expression": {"rank_pattern": {"(": 4}},
    "alpha-pattern-text": {"alpha_pattern": {"q_proj": "x"}},
    "alpha-pattern-number": {"alpha_pattern": 7},
    "layers-text": {"layers_to_transform": "x"},
    "layers-pattern-number": {"layers_pattern": 7},
    "parameters": {"target_parameters": ["q_proj.weight"]},
    "save-number": {"modules_to_save": 7},
    "tokens-text": {"trainable_token_indices": "x"},
    "tokens-beyond": {"trainable_token_indices": [10**9]},
    "tokens-negative": {"trainable_token_indices": [-(10**9)]},
    "task-unknown": {"task_type": "READ_MINDS"},
    "task-number": {"task_type": 7},
    "task-none": {"task_type": None},
    "mapping-text": {"task_type": None, "auto_mapping": "x"},
    "mapping-number": {"task_type": None, "auto_mapping": {"base_model_class": 7, "parent_library": "transformers."}},
    "mapping-foreign": {"task_type": None, "auto_mapping": {"base_model_class": "system", "parent_library": "os"}},
    "mapping-half": {"task_type": None, "auto_mapping": {"parent_library": "transformers.models"}},
    "base-missing": {"base_model_name_or_path": None},
    "base-number": {"base_model_name_or_path": 7},
    "base-list": {"base_model_name_or_path": ["a"]},
    "base-elsewhere": {"base_model_name_or_path": "../../../nowhere"},
    "base-long": {"base_model_name_or_path": "a" * 300},
    "base-with-nul": {"base_model_name_or_path": "a\0b"},
    "base-is-itself": {"base_model_name_or_path": "adapter"},
    "base-is-a-file": {"base_model_name_or_path": "/dev/null"},
    "base-escape": {"base_model_name_or_path": "\x1b[2Jgone/x"},
}
DAMAGED = {
    "empty": b"",
    "text": b"hello",
    "brace": b"{",
    "list": b"[]",
    "null": b"null",
    "number": b"7",
    "nothing-in-it": b"{}",
    "binary": bytes(range(256)),
    "utf-16": '{"peft_type": "CONDITIONED"}'.encode("utf-16"),
    "deep": b"[" * 200_000,
    "long-number": b'{"r": ' + b"9" * 5000 + b"}",
}
HEADER = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()


def packed(header: bytes, length: int | None = None, data: bytes = bytes(4)) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(**changes: object) -> bytes:
    return packed(json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **changes}}).encode())


FILES = {
    "empty": b"",
    "short": b"\0\0\0",
    "text": b"hello, world",
    "zip": b"PK\x03\x04" + bytes(100),
    "pickle": pickle.dumps({"a": 1}),
    "no-header": packed(b""),
    "header-not-json": packed(b"hello"),
    "header-cut": packed(HEADER[:-5]),
    "header-longer-than-file": packed(HEADER, 10**6),
    "header-of-exbibytes": packed(HEADER, 2**63),
    "header-deep": packed(b'{"a":' * 100_000),
    "header-list": packed(b"[]"),
    "header-nul": packed(b"\0" * 64),
    "offsets-beyond": entry(data_offsets=[0, 400]),
    "offsets-backwards": entry(data_offsets=[4, 0]),
    "offsets-negative": entry(data_offsets=[-4, 0]),
    "offsets-huge": entry(data_offsets=[0, 2**70]),
    "shape-negative": entry(shape=[-1]),
    "shape-huge": entry(shape=[2**40, 2**40]),
    "shape-other": entry(shape=[2]),
    "dtype-unknown": entry(dtype="F31"),
    "dtype-number": entry(dtype=7),
    "foreign": entry(),
    "more-behind": packed(HEADER, None, bytes(400)),
}


def changed(adapter: Path, change: dict) -> None:
    content = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(content | change))


@pytest.mark.parametrize("case", CHANGED)
def test_a_configuration_that_cannot_be(adapter, refused, case):
    changed(adapter, CHANGED[case])
    refused("sora-hw", "merge", "adapter", "--output", "new")


SLOW = {
    "target_modules": "(.+)+!",
    "exclude_modules": "(.+|x)*!",
    "rank_pattern": {"(.*.*)*!": 4},
    "alpha_pattern": {"(.*_?)*!": 4},
    "modules_to_save": ["(.|.)*!"],
}


@pytest.mark.parametrize("field", SLOW)
@pytest.mark.parametrize("method", ["CONDITIONED", "LORA"])
def test_an_expression_that_takes_years_is_refused(adapter, refused, monkeypatch, field, method):
    monkeypatch.setattr(patterns, "LONGEST", 0.5)
    changed(adapter, {"peft_type": method, field: SLOW[field]})
    assert "cannot be matched" in refused("sora-hw", "merge", "adapter", "--output", "new")


HONEST = (
    ".*(q|v)_proj$",
    r"^(?!.*vision).*(?:q_proj|v_proj)$",
    r"model\.layers\.(0|1|2|3)\.self_attn\.(q|v)_proj",
    r"(\w+\.)*[qv]_proj",
    r".*\.(\d+)\.(?:self_)?att\w*\..*[qv]_proj",
)


@pytest.mark.parametrize("expression", HONEST)
def test_an_honest_expression_is_matched(folder, adapter, expression, capfd):
    changed(adapter, {"target_modules": expression, "rank_pattern": {r"layers\.[0-9]+\..*up_proj": 2}})
    assert cli.main(["merge", "adapter", "--output", "new"]) == 0, capfd.readouterr()


@pytest.mark.parametrize("case", DAMAGED)
@pytest.mark.parametrize("command", ["merge", "import"])
def test_a_damaged_configuration(adapter, refused, command, case):
    (adapter / CONFIG).write_bytes(DAMAGED[case])
    refused("sora-hw", command, "adapter", "--output", "new")


@pytest.mark.parametrize("case", FILES)
def test_damaged_weights(adapter, refused, case):
    (adapter / WEIGHTS).write_bytes(FILES[case])
    assert "adapter" in refused("sora-hw", "export", "adapter", "--output", "new")


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_cut_weights(adapter, refused, share):
    content = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(content[: int(len(content) * share)])
    refused("sora-hw", "export", "adapter", "--output", "new")


CHANGES = {
    "missing": lambda tensors, name: tensors.pop(name),
    "foreign": lambda tensors, name: tensors.update({"base_model.model.nowhere.conditioned_A": torch.zeros(1)}),
    "path-in-name": lambda tensors, name: tensors.update({"../../escaped": torch.zeros(1)}),
    "empty-name": lambda tensors, name: tensors.update({"": torch.zeros(1)}),
    "narrower": lambda tensors, name: tensors.update({name: tensors[name][:, :-1].contiguous()}),
    "transposed": lambda tensors, name: tensors.update({name: tensors[name].T.contiguous()}),
    "flat": lambda tensors, name: tensors.update({name: tensors[name].flatten()}),
    "scalar": lambda tensors, name: tensors.update({name: torch.tensor(1.0)}),
    "empty": lambda tensors, name: tensors.update({name: torch.zeros(0)}),
    "nan": lambda tensors, name: tensors[name].fill_(float("nan")),
    "infinite": lambda tensors, name: tensors[name].fill_(float("inf")),
    "nothing": lambda tensors, name: tensors.clear(),
}


@pytest.mark.parametrize("command", ["merge", "export"])
@pytest.mark.parametrize("case", CHANGES)
def test_tensors_that_are_not_the_adapter_s(adapter, refused, command, case):
    tensors = load_file(adapter / WEIGHTS)
    CHANGES[case](tensors, next(name for name in tensors if name.endswith("conditioned_A")))
    save_file(tensors, adapter / WEIGHTS)
    refused("sora-hw", command, "adapter", "--output", "new")


@pytest.mark.parametrize("command", ["merge", "export", "import"])
@pytest.mark.parametrize("protocol", ["pickle", "torch", "torch-old"])
def test_a_pickle_is_refused_and_its_payload_does_not_run(adapter, payload, refused, command, protocol):
    (adapter / WEIGHTS).unlink()
    if command == "import":
        changed(adapter, {"peft_type": "LORA"})
    file = adapter / "adapter_model.bin"
    if protocol == "pickle":
        file.write_bytes(pickle.dumps({"a": payload}))
    else:
        torch.save({"a": payload}, file, _use_new_zipfile_serialization=protocol == "torch")
    refused("sora-hw", command, "adapter", "--output", "new")


def test_a_pickle_of_nothing_but_tensors_is_refused_as_well(adapter, refused):
    torch.save(load_file(adapter / WEIGHTS), adapter / "adapter_model.bin")
    (adapter / WEIGHTS).unlink()
    for command in ("merge", "export"):
        assert "adapter_model.safetensors" in refused("sora-hw", command, "adapter", "--output", "new")


@pytest.mark.parametrize("what", ["pipe", "endless", "loop", "folder"])
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_what_is_no_file(folder, adapter, refused, name, what):
    (adapter / name).unlink()
    {
        "pipe": os.mkfifo,
        "endless": lambda file: file.symlink_to("/dev/zero"),
        "loop": lambda file: file.symlink_to(file.name),
        "folder": lambda file: file.mkdir(),
    }[what](adapter / name)
    refused("sora-hw", "merge", "adapter", "--output", "new")
