"""Checkpoints of the authors' released layer: read, written as adapters, and equal in what they compute."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import sora_hw
from sora_hw.adapter.released import converted
from sora_hw.cli import main
from sora_hw.finished import importing

R, RP, ALPHA = 4, 2, 12
LAYERS = [f"model.layers.{number}.self_attn.{name}" for number in (0, 1) for name in ("q_proj", "v_proj")]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, attention_bias=True))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    return folder


def released_tensors(size: float = 1.0) -> dict[str, torch.Tensor]:
    """What the authors' code saves of a trained model (the last section of the paper's notes)."""
    torch.manual_seed(1)
    tensors = {}
    for layer in LAYERS:
        out = 16 if "q_proj" in layer else 8
        shapes = {"A": (R, 16), "B": (out, R), "C": (out, RP), "D": (out, RP), "Diag": (out, 1)}
        for name, shape in shapes.items():
            value = size * torch.randn(shape)
            tensors[f"base_model.model.{layer}.lora_{name}.weight"] = 1 + 0.3 * value if name == "Diag" else value
    return tensors


def checkpoint(folder: Path, base: Path, tensors=None, pickled=False, **options) -> Path:
    """A folder as the authors' code writes it: PEFT's configuration of a LoRA, which does not know `rp`."""
    folder.mkdir()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": R,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.05,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
        "inference_mode": True,
        "megatron_config": None,
        "use_rslora": False,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config | options))
    tensors = released_tensors() if tensors is None else tensors
    if pickled:
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


class ReleasedLayer(nn.Module):
    """The released layer, in its own words."""

    def __init__(self, base: nn.Linear, tensors: dict[str, torch.Tensor]):
        super().__init__()
        self.base, self.tensors = base, tensors

    def forward(self, x):
        a, b, c, d, diagonal = (self.tensors[name] for name in ("A", "B", "C", "D", "Diag"))
        u = self.base(x) * diagonal.T + ALPHA / R * x @ a.T @ b.T
        s = torch.clamp(1 / (c.norm() + d.norm() + 1e-6), max=1.0)
        return u + s * (torch.matmul(torch.matmul(u, c), d.T) - torch.matmul(torch.matmul(u, d), c.T))


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("size", [1.0, 0.05])  # the rule for the rotation's size has two branches
def test_the_imported_adapter_is_the_released_model(tmp_path, base, capsys, size, pickled):
    tensors = released_tensors(size)
    folder = checkpoint(tmp_path / "theirs", base, tensors, pickled)
    assert main(["import", str(folder), "--output", str(tmp_path / "ours")]) == 0
    told = capsys.readouterr().out
    assert "SORA of 4 layers, rank 4, rotation of rank 2" in told and f"the weights of {base}" in told
    assert float(re.search(r"at most (\S+) of the largest", told)[1]) < 1e-6

    theirs = LlamaForCausalLM.from_pretrained(base).double()
    for layer in LAYERS:
        own = {
            name: tensors[f"base_model.model.{layer}.lora_{name}.weight"].double()
            for name in ("A", "B", "C", "D", "Diag")
        }
        parent, _, name = layer.rpartition(".")
        setattr(theirs.get_submodule(parent), name, ReleasedLayer(theirs.get_submodule(layer), own))
    ours = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base).double(), tmp_path / "ours")
    plain = LlamaForCausalLM.from_pretrained(base).double()
    ids = torch.arange(1, 13)[None]
    with torch.no_grad():
        expected = theirs(ids).logits
        assert (ours(ids).logits - expected).abs().max() < 1e-6 * expected.abs().max()
        assert (plain(ids).logits - expected).abs().max() > 1e-3 * expected.abs().max()
    assert (tmp_path / "ours" / "README.md").read_text().count("import sora_hw")
    saved = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    expected = {"r": R, "alpha": ALPHA, "dropout": 0.05, "rotation_rank": RP, "rotation_scale": "reference"}
    expected |= {"condition_bias": True, "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base)}
    assert {name: saved[name] for name in expected} == expected
    assert {file.name for file in (tmp_path / "ours").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_without_the_base_model_the_weights_are_random(tmp_path, capsys):
    folder = checkpoint(tmp_path / "theirs", Path("someone/llama"))
    assert main(["import", str(folder), "--output", str(tmp_path / "ours")]) == 0
    assert (
        "random weights of the layers' shapes; --model proves it on those of the base model" in capsys.readouterr().out
    )


def test_layers_that_were_trained_whole_come_along(tmp_path, base):
    head = "base_model.model.lm_head.weight"
    tensors = released_tensors() | {head: torch.randn(40, 16)}
    folder = checkpoint(tmp_path / "theirs", base, tensors, modules_to_save=["lm_head"])
    assert main(["import", str(folder), "--output", str(tmp_path / "ours")]) == 0
    assert torch.equal(load_file(tmp_path / "ours" / "adapter_model.safetensors")[head], tensors[head])
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), tmp_path / "ours")
    assert torch.equal(model.base_model.model.lm_head.modules_to_save["default"].weight, tensors[head])


def swapped(released):
    return converted(released | {"C": released["D"], "D": released["C"]})


def unscaled(released):
    return converted(released) | {"pre_delta": converted(released)["pre_delta"] * 0}


@pytest.mark.parametrize("wrong", [swapped, unscaled])
def test_the_proof_notices_a_wrong_conversion(tmp_path, base, monkeypatch, capsys, wrong):
    folder = checkpoint(tmp_path / "theirs", base)
    monkeypatch.setattr(importing, "converted", wrong)
    assert main(["import", str(folder), "--output", str(tmp_path / "ours")]) == 2
    assert re.search(r"differ from the authors' formula by \S+ of the largest one", capsys.readouterr().err)
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("option", [{"rotation_scale": "bounded"}, {"condition_bias": False}, {"rotation": "exp"}])
def test_the_proof_notices_a_wrong_configuration(tmp_path, base, monkeypatch, capsys, option):
    folder = checkpoint(tmp_path / "theirs", base)
    monkeypatch.setattr(importing, "OPTIONS", importing.OPTIONS | option)
    assert main(["import", str(folder), "--output", str(tmp_path / "ours")]) == 2
    assert "differ from the authors' formula" in capsys.readouterr().err


def without(*names):
    return {
        key: tensor for key, tensor in released_tensors().items() if not re.search(rf"lora_({'|'.join(names)})\.", key)
    }


@pytest.mark.parametrize(
    ("tensors", "options", "words"),
    [
        (without("C", "D", "Diag"), {}, "a plain LoRA needs no import, PEFT loads it as it is"),
        (without("D"), {}, r"layers\.\d\.self_attn\.._proj has no lora_D\.weight"),
        (None, {"r": 8}, r"lora_A.weight is \(4, 16\), where \(8, 16\) is expected"),
        (None, {"r": None}, r"lora_A.weight is \(4, 16\), where \(None, 16\) is expected"),
        (None, {"peft_type": "LOHA"}, "peft_type LOHA, but the released code writes LORA"),
        (None, {"use_dora": True}, "the released layer knows no use_dora"),
        (None, {"alpha_pattern": {"q_proj": 3}}, "the released layer knows no alpha_pattern"),
        (None, {"lora_alpha": "x"}, "adapter_config.json is damaged .*alpha"),
        ({}, {}, "no lora_Diag in it"),
    ],
)
def test_what_is_no_such_checkpoint_is_one_line_and_leaves_nothing(tmp_path, base, capsys, tensors, options, words):
    folder = checkpoint(tmp_path / "theirs", base, tensors, **options)
    before = sorted(tmp_path.iterdir())
    assert main(["import", str(folder), "--output", str(tmp_path / "ours")]) == 2
    error = capsys.readouterr().err
    assert re.search(words, error) and error.startswith("sora-hw: ") and error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_another_model_is_refused(tmp_path, base, capsys):
    tensors = {name.replace("layers.1", "layers.7"): tensor for name, tensor in released_tensors().items()}
    assert main(["import", str(checkpoint(tmp_path / "a", base, tensors)), "--output", str(tmp_path / "b")]) == 2
    assert "it has no layer model.layers.7.self_attn.q_proj" in capsys.readouterr().err
    tensors = {
        name.replace("v_proj", "k_proj").replace("q_proj", "o_proj"): t for name, t in released_tensors().items()
    }
    tensors = {
        name.replace("o_proj", "gate_proj").replace("self_attn.gate", "mlp.gate"): t for name, t in tensors.items()
    }
    assert main(["import", str(checkpoint(tmp_path / "c", base, tensors)), "--output", str(tmp_path / "d")]) == 2
    assert "mlp.gate_proj is not a linear one of 16 to 16 features" in capsys.readouterr().err


class Runs:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_pickle_with_more_than_tensors_runs_nothing(tmp_path, base, capsys):
    folder = checkpoint(tmp_path / "theirs", base, pickled=True)
    torch.save(released_tensors() | {"x": Runs(f"touch {tmp_path}/ran")}, folder / "adapter_model.bin")
    assert main(["import", str(folder), "--output", str(tmp_path / "ours")]) == 2
    assert "its weights are damaged, or hold more than tensors" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists() and not (tmp_path / "ours").exists()


def test_the_released_file_is_no_adapter_of_ours(tmp_path, base):
    """Loaded as an adapter of this library without a conversion, it is refused rather than loaded in part."""
    folder = checkpoint(tmp_path / "theirs", base)
    config = sora_hw.ConditionedConfig(method="sora", r=R, target_modules=["q_proj", "v_proj"])
    with pytest.raises(ValueError, match=r"20 missing.*20 foreign.*a LoRA's"):
        PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), folder, config=config)
