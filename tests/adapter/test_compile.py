"""The adapted model under `torch.compile`: whole graphs, eager's numbers, one compilation for layers alike."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import sora_hw
from sora_hw.conditioning import PRESETS


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(24, 40), nn.Linear(40, 24)

    def forward(self, x):
        return self.down(nn.functional.gelu(self.up(x)))


class Blocks(nn.Module):
    def __init__(self, checkpointed: bool | None = None):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.reentrant = checkpointed

    def forward(self, x):
        for block in self.blocks:
            x = x + (block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant))
        return x


def adapted(checkpointed=None, **config):
    torch.manual_seed(0)
    config = {"r": 4, "dropout": 0.0, "init_weights": False, **config}
    return get_peft_model(Blocks(checkpointed), sora_hw.ConditionedConfig(target_modules=["up", "down"], **config))


def outcome(model, parameters):
    torch.manual_seed(1)
    x = torch.randn(50, 24).requires_grad_()
    y = model(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *parameters])]


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()


# Everything up to the generated code, which takes long to build and is the compiler's own; and once with it.
CASES = [(method, None, "aot_eager") for method in PRESETS] + [(name, False, "aot_eager") for name in ("dora", "sora")]
# The code for a processor takes a minute to compile, and tells no more of our graph than the eager one.
INDUCTOR = pytest.param("sora", None, "inductor", marks=pytest.mark.full)


@pytest.mark.parametrize(("method", "checkpointed", "backend"), [*CASES, INDUCTOR])
def test_one_graph_with_eagers_numbers(method, checkpointed, backend):
    model = adapted(checkpointed, method=method)
    trained = [p for p in model.parameters() if p.requires_grad]
    wanted = outcome(model, trained)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for a, w in zip(outcome(compiled, trained), wanted, strict=True):
        assert (a - w).abs().max() <= 1e-5 * w.abs().max()


@pytest.mark.parametrize("method", ["lora", "sora"])
def test_dropout_compiles_and_drops(method):
    model = adapted(method=method, dropout=0.5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(50, 24)
    outputs = [compiled(x) for _ in range(2)]
    assert not torch.equal(*outputs)
    model.eval()
    assert torch.equal(compiled(x), compiled(x))


@pytest.mark.parametrize("method", ["sora", "dora"])
def test_optimiser_steps_and_further_layers_compile_nothing_again(method):
    """Layers compiled one by one share their graphs, and new values are no reason to compile."""
    model = adapted(method=method)
    counter = CompileCounter()
    for block in model.base_model.model.blocks:
        block.compile(backend=counter, fullgraph=True)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-7)
    for _ in range(3):
        model(torch.randn(50, 24).requires_grad_()).sum().backward()
        optimiser.step()
    assert counter.frame_count == 1


def test_a_scale_that_becomes_small_changes_the_graph_once():
    """The optimiser moves an entry of `c` to zero: the base product is kept from then on, in a graph of its own."""
    model = adapted(method="prediag", init_weights=True)
    layer = model.base_model.model.blocks[0].up
    delta = layer.conditioned_pre_delta["default"]
    optimiser = torch.optim.SGD([delta], lr=1.0)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    delta.grad = torch.zeros_like(delta)
    delta.grad[3] = 1.0
    compiled(torch.randn(50, 24))
    optimiser.step()
    x = torch.randn(50, 24)
    (actual,) = torch.autograd.grad(compiled(x).sum(), delta)
    assert torch.isfinite(actual).all()
    (wanted,) = torch.autograd.grad(model(x).sum(), delta)
    assert torch.allclose(actual, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["sora", "dora"])
def test_a_base_weight_that_is_loaded_anew_is_seen(method):
    model = adapted(method=method)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(50, 24)
    compiled(x)
    state = {name: 2 * value if "base_layer" in name else value for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    assert torch.allclose(compiled(x), model(x), rtol=1e-4, atol=1e-4)
