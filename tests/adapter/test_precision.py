"""dtypes: bfloat16 bases with float32 adapters, autocast, gradient checkpointing, small steps in bfloat16."""

import copy
import itertools

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import sora_hw
from sora_hw.conditioning import PRESETS


def adapted(method="sora", dtype=torch.float32, autocast_adapter_dtype=True, **options):
    torch.manual_seed(0)
    options = {"r": 4, "dropout": 0.0, "init_weights": False} | options
    config = sora_hw.ConditionedConfig(method=method, target_modules=["0"], **options)
    base = nn.Sequential(nn.Linear(32, 48)).to(dtype)
    return get_peft_model(base, config, autocast_adapter_dtype=autocast_adapter_dtype)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("method", PRESETS)
def test_the_output_has_the_dtype_of_the_base(method, dtype, dropout):
    model = adapted(method, dtype, dropout=dropout)
    adapter_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    for training in (True, False):
        y = model.train(training)(torch.randn(5, 32, dtype=dtype))
        assert y.dtype == dtype
        y.sum().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.dtype == adapter_dtype and p.grad.dtype == adapter_dtype, name


@pytest.mark.parametrize("method", PRESETS)
def test_a_bfloat16_layer_is_the_float64_one_to_bfloat16_s_precision(method):
    low = adapted(method, torch.bfloat16)
    exact = copy.deepcopy(low).double()
    x = torch.randn(64, 32).bfloat16().requires_grad_()
    x_exact = x.detach().double().requires_grad_()
    y, y_exact = low(x), exact(x_exact)
    y.sum().backward()
    y_exact.sum().backward()
    assert (y.double() - y_exact).abs().max() < 1.5e-2 * y_exact.abs().max()
    assert (x.grad.double() - x_exact.grad).abs().max() < 1.5e-2 * x_exact.grad.abs().max()
    for (name, p), (_, q) in zip(low.named_parameters(), exact.named_parameters(), strict=True):
        if p.requires_grad:
            assert torch.linalg.norm(p.grad.double() - q.grad) < 3e-2 * torch.linalg.norm(q.grad), name


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    ("base", "autocast"), list(itertools.product([torch.float32, torch.bfloat16], [torch.bfloat16, torch.float16]))
)
def test_under_autocast_the_output_is_a_lora_s(base, autocast, dropout):
    model = adapted("sora", base, dropout=dropout)
    with torch.autocast("cpu", dtype=autocast):
        y = model(torch.randn(5, 32, dtype=base))
        plain = model.base_model.model[0].base_layer(torch.randn(5, 32, dtype=base))
    assert y.dtype == plain.dtype == autocast
    y.float().sum().backward()


def test_coefficients_are_not_rounded_by_autocast():
    """A small rotation survives: under autocast its coefficients would lose all but 8 bits before they are used."""
    model = adapted("sora")
    layer = model.base_model.model[0]
    exact = layer._linear_map("default", layer.adapter_parameters("default"))
    seen = {}
    original = layer._linear_map
    layer._linear_map = lambda *a: seen.setdefault("map", original(*a))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.randn(5, 32))
    assert torch.equal(seen["map"].b, exact.b) and seen["map"].b.dtype == torch.float32


def test_adapters_can_take_the_base_dtype():
    model = adapted("sora", torch.bfloat16, autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(torch.randn(3, 32).bfloat16()).dtype == torch.bfloat16


def test_a_bfloat16_delta_moves_under_adamw_where_a_bfloat16_diagonal_would_not():
    """Why the diagonal is stored as its difference from one."""
    model = adapted("prediag", torch.bfloat16, autocast_adapter_dtype=False, init_weights=True)
    delta = model.base_model.model[0].conditioned_pre_delta["default"]
    optimiser = torch.optim.AdamW([delta], lr=2e-4)
    for _ in range(50):
        delta.grad = torch.ones_like(delta)
        optimiser.step()
    assert (delta + 0.01).abs().max() < 2e-3
    diagonal = torch.ones(4, dtype=torch.bfloat16, requires_grad=True)
    optimiser = torch.optim.AdamW([diagonal], lr=2e-4, weight_decay=0.0)
    for _ in range(50):
        diagonal.grad = torch.ones_like(diagonal)
        optimiser.step()
    assert torch.equal(diagonal, torch.ones_like(diagonal))


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1, vocab_size=64, max_position_embeddings=32))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("method", ["sora", "dora", "pre_ortho"])
def test_gradient_checkpointing_gives_the_same_gradients(method, reentrant):
    targets = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    config = sora_hw.ConditionedConfig(method=method, r=4, dropout=0.2, init_weights=False, target_modules=targets)
    model = get_peft_model(llama(), config)
    model.enable_input_require_grads()
    ids = torch.arange(20)[None]
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.train()
        model.zero_grad()
        torch.manual_seed(1)
        model(ids, labels=ids).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    for name, wanted in gradients[0].items():
        assert torch.allclose(gradients[1][name], wanted, atol=1e-7), name


@pytest.mark.parametrize("method", PRESETS)
def test_made_and_used_in_inference_mode(method):
    x = torch.randn(5, 32)
    with torch.inference_mode():
        y = adapted(method).eval()(x)
    assert torch.allclose(adapted(method)(x), y, atol=1e-5)
