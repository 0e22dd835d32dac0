"""The life of an adapter in PEFT: save, load, merge, several at once, disable, delete, and around other modules."""

import copy
import itertools
import os
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import sora_hw
from sora_hw.conditioning import POST, PRE, PRESETS

PAIRS = list(itertools.product(PRE, POST))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 24), Conv1D(10, 24)
        self.head = nn.Linear(10, 4)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def net(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return Net().to(dtype)


def config(method=None, **options):
    options = {"r": 4, "alpha": 8, "rotation_rank": 2, "dropout": 0.0, "init_weights": False} | options
    return sora_hw.ConditionedConfig(method=method, target_modules=["first", "second"], **options)


def base_weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "base_layer" in n or "head" in n}


def restored(model, before):
    return all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


@pytest.mark.parametrize("condition_bias", [False, True])
@pytest.mark.parametrize(("pre", "post"), PAIRS)
def test_merged_equals_unmerged_and_unmerging_restores_every_bit(pre, post, condition_bias):
    model = get_peft_model(net(), config(pre=pre, post=post, condition_bias=condition_bias)).eval()
    x, before = torch.randn(7, 16), base_weights(model)
    with torch.no_grad():
        y = model(x)
        model.merge_adapter()
        assert not restored(model, before)
        assert (model(x) - y).abs().max() < 1e-5
        model.unmerge_adapter()
        assert restored(model, before)
        assert torch.equal(model(x), y)
        plain = model.merge_and_unload()
        assert isinstance(plain, Net) and isinstance(plain.first, nn.Linear)
        assert (plain(x) - y).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_low_precision_merge_is_the_float32_merge_rounded_once_and_restores_every_bit(dtype):
    low = get_peft_model(net(dtype=dtype), config("sora"))
    wide = get_peft_model(net(dtype=dtype).float(), config("sora"))
    wide.load_state_dict(low.state_dict())
    before = base_weights(low)
    for _ in range(5):
        low.merge_adapter()
        wide.merge_adapter()
        for name in ("first", "second"):
            merged = getattr(low.base_model.model, name).base_layer.weight
            assert torch.equal(merged, getattr(wide.base_model.model, name).base_layer.weight.to(dtype))
        low.unmerge_adapter()
        wide.unmerge_adapter()
        assert restored(low, before)


def test_a_broken_adapter_is_not_merged_and_the_base_is_left_alone():
    model = get_peft_model(net(), config("sora"))
    before = base_weights(model)
    with torch.no_grad():
        model.base_model.model.first.conditioned_B["default"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="default"):
        model.base_model.model.first.merge(safe_merge=True)
    assert restored(model, before) and not model.base_model.model.first.merged


def test_merging_keeps_the_original_in_host_memory_and_unloading_keeps_nothing():
    model = get_peft_model(net(), config("sora"))
    layer = model.base_model.model.first
    original = layer.base_layer.weight.clone()
    model.merge_adapter()
    assert layer._original.weight.device.type == "cpu" and torch.equal(layer._original.weight, original)
    model.unmerge_adapter()
    assert layer._original is None
    model.merge_and_unload()
    assert layer._original is None


LOADS_EVERY_ADAPTER = """
import sys
from pathlib import Path

import torch
from peft import PeftModel

import sora_hw

folder = Path(sys.argv[1])
sys.path.insert(0, sys.argv[2])
from test_lifecycle import Net

for state in sorted(folder.glob("*.pt")):
    state = torch.load(state, weights_only=True)
    net = Net()
    net.load_state_dict(state["net"])
    model = PeftModel.from_pretrained(net, folder / state["method"]).eval()
    with torch.no_grad():
        print(state["method"], "identical" if torch.equal(model(state["x"]), state["y"]) else "different")
"""


def test_another_process_loads_to_identical_outputs(tmp_path, warm):
    x = torch.randn(5, 16)
    for method in PRESETS:
        model = get_peft_model(net(), config(method)).eval()
        model.save_pretrained(tmp_path / method)
        with torch.no_grad():
            state = {"method": method, "net": net().state_dict(), "x": x, "y": model(x)}
        torch.save(state, tmp_path / f"{method}.pt")
        saved = load_file(tmp_path / method / "adapter_model.safetensors")
        names = {f"conditioned_{n}" for n in model.base_model.model.first.adapter_parameters("default")}
        assert {key.rsplit(".", 1)[1] for key in saved} == names
    program = tmp_path / "program.py"
    program.write_text(LOADS_EVERY_ADAPTER)
    result = warm.run([str(program), str(tmp_path), str(Path(__file__).parent)], tmp_path, os.environ)
    assert result.stdout.splitlines() == [f"{method} identical" for method in sorted(PRESETS)], result.stderr


def test_several_active_adapters_add_their_differences_from_the_base():
    model = get_peft_model(net(), config("sora"), adapter_name="a").eval()
    model.add_adapter("b", config("dora", r=3))
    model.add_adapter("c", config(pre="rotation", post="diagonal"))
    layer, x = model.base_model.model.first, torch.randn(6, 16)
    with torch.no_grad():
        base = layer.base_layer(x)
        single = {}
        for name in "abc":
            model.base_model.set_adapter(name)
            single[name] = layer(x)
        model.base_model.set_adapter(["a", "b", "c"])
        expected = base + sum(y - base for y in single.values())
        assert (layer(x) - expected).abs().max() < 1e-6

        before = base_weights(model)
        model.merge_adapter(["a"])
        model.merge_adapter(["b", "c"])  # on top: each is conditioned against the original all the same
        assert (layer(x) - expected).abs().max() < 1e-5
        model.unmerge_adapter()
        assert restored(model, before)


def test_adding_and_deleting_adapters():
    model = get_peft_model(net(), config("sora"), adapter_name="a").eval()
    x = torch.randn(6, 16)
    y_a = model(x)
    model.add_adapter("b", config("lora"))
    assert torch.equal(model(x), y_a)  # added, not active
    frozen = [p for n, p in model.named_parameters() if n.endswith(".b")]
    assert frozen and not any(p.requires_grad for p in frozen)
    model.set_adapter("b")
    y_b = model(x)
    assert not torch.allclose(y_a, y_b)
    model.delete_adapter("a")
    assert not any(n.endswith(".a") for n, _ in model.named_parameters())
    assert torch.equal(model(x), y_b)


@pytest.mark.parametrize("method", PRESETS)
def test_disabling_gives_the_base_model(method):
    plain = net()
    x = torch.randn(6, 16)
    y = plain(x)
    model = get_peft_model(plain, config(method)).eval()
    assert not torch.allclose(model(x), y)
    with model.disable_adapter():
        assert torch.equal(model(x), y)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(x), y)


def test_modules_to_save_train_and_travel(tmp_path):
    model = get_peft_model(net(), config("sora", modules_to_save=["head"]))
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["default"].weight.add_(1)
    x = torch.randn(3, 16)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(net(), tmp_path)(x), model.eval()(x))
    assert model.base_model.model.head.modules_to_save["default"].weight.requires_grad


def test_gpt2_s_transposed_layers():
    torch.manual_seed(0)
    shape = {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
        "vocab_size": 50,
        "n_positions": 20,
        "resid_pdrop": 0,
        "embd_pdrop": 0,
    }
    gpt2 = GPT2LMHeadModel(GPT2Config(**shape, attn_pdrop=0)).eval()
    options = sora_hw.ConditionedConfig(method="sora", r=4, dropout=0.0, init_weights=False)  # PEFT's own targets
    model = get_peft_model(copy.deepcopy(gpt2), options)
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    assert layer.fan_in_fan_out and (layer.in_features, layer.out_features) == (32, 96)
    ids = torch.arange(10)[None]
    y = model(ids).logits
    assert not torch.allclose(y, gpt2(ids).logits, atol=1e-3)
    assert (model.merge_and_unload()(ids).logits - y).abs().max() < 1e-5


def test_the_delta_is_the_difference_of_the_weights():
    model = get_peft_model(net(), config("sora"))
    for layer in (model.base_model.model.first, model.base_model.model.second):
        before = layer.base_layer.weight.detach().clone()
        delta = layer.get_delta_weight("default")
        layer.merge()
        assert torch.allclose(layer.base_layer.weight - before, delta, atol=1e-6)
        assert torch.allclose(layer.get_delta_weight("default"), delta, atol=1e-6)  # of the original, also when merged


def test_the_cached_norm_follows_the_base_weight():
    model = get_peft_model(net(), config("dora")).eval()
    layer, x = model.base_model.model.first, torch.randn(4, 16)
    before = layer(x)
    with torch.no_grad():
        layer.base_layer.weight.mul_(3.0)
        layer.base_layer.bias.mul_(0.0)
    p = layer.adapter_parameters("default")
    w = layer.base_layer.weight + layer.scaling["default"] * p["B"] @ p["A"]
    expected = x @ (p["magnitude"] / torch.linalg.norm(w, dim=1))[:, None].mul(w).T
    assert (layer(x) - expected).abs().max() < 1e-5
    assert not torch.allclose(layer(x), before, atol=1e-3)


def test_what_cannot_be_adapted_is_refused_by_name():
    with pytest.raises(ValueError, match=r"target module 0 is a LayerNorm.*choose other target_modules"):
        get_peft_model(nn.Sequential(nn.LayerNorm(4)), sora_hw.ConditionedConfig(target_modules=["0"]))


def test_registration_is_idempotent_and_notices_a_foreign_method():
    from sora_hw.adapter.registration import register

    register(sora_hw.ConditionedConfig, sora_hw.ConditionedModel)
    with pytest.raises(ImportError, match="PEFT already has a method of type CONDITIONED"):
        register(type("Other", (), {}), sora_hw.ConditionedModel)
