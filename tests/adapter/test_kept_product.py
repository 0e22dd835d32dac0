"""`Q^T W0` is read off the weight once per value of `Q`: in micro-batches and recomputations it is there already."""

import copy

import dense
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import sora_hw
from sora_hw.adapter.layer import ConditionedLinear

METHODS = ("post_ortho", "pre_ortho", "sora", "dora")
IN, OUT = 24, 20


class ReadsOfWeight(TorchDispatchMode):
    """Counts the products of a small matrix with the weight: (k, out) x (out, in)."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.mm.default and args[1].shape == (OUT, IN) and args[0].shape[0] <= 4:
            self.count += 1
        return function(*args, **(kwargs or {}))


def layer(method, dtype=torch.float64):
    torch.manual_seed(0)
    base = nn.Linear(IN, OUT, dtype=dtype)
    config = sora_hw.ConditionedConfig(method=method, r=4, rotation_rank=2, dropout=0.0, init_weights=False)
    return ConditionedLinear(base, "default", config).train().requires_grad_(False)


def trained(method, dtype=torch.float64):
    made = layer(method, dtype)
    for parameter in made.adapter_parameters("default").values():
        parameter.requires_grad_(True)
    return made


def gradients(made, x):
    made.zero_grad()
    made(x).square().sum().backward()
    return [parameter.grad.clone() for parameter in made.adapter_parameters("default").values()]


@pytest.mark.parametrize("method", ["post_ortho", "pre_ortho", "sora"])
def test_micro_batches_read_the_weight_once(method):
    made, x = trained(method), torch.randn(6, IN, dtype=torch.float64)
    with ReadsOfWeight() as first:
        once = gradients(made, x)
    with ReadsOfWeight() as later:
        again = gradients(made, x)
    assert (first.count, later.count) == (1, 0)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize("reentrant", (False, True))
def test_a_recomputation_reads_it_no_more(reentrant):
    made, x = trained("sora"), torch.randn(6, IN, dtype=torch.float64, requires_grad=True)
    with ReadsOfWeight() as reads:
        checkpoint(made, x, use_reentrant=reentrant).square().sum().backward()
    assert reads.count == 1
    recomputed = [parameter.grad for parameter in made.adapter_parameters("default").values()]
    assert all(torch.equal(a, b) for a, b in zip(recomputed, gradients(trained("sora"), x.detach()), strict=True))


def through_data(made, optimiser):
    for parameter in made.adapter_parameters("default").values():
        parameter.data.mul_(1.5)


def by_optimiser(made, optimiser):
    optimiser.step()


def by_loading(made, optimiser):
    state = {name: value * 0.5 if "conditioned" in name else value for name, value in made.state_dict().items()}
    made.load_state_dict(state)


def of_the_base(made, optimiser):
    with torch.no_grad():
        made.get_base_layer().weight.mul_(2)


def of_the_base_through_data(made, optimiser):
    made.get_base_layer().weight.data.add_(0.1 * torch.randn(OUT, IN, dtype=torch.float64))


def of_the_base_to_half_and_back(made, optimiser):
    made.get_base_layer().bfloat16().double()


def merged_and_back(made, optimiser):
    made.merge()
    made.unmerge()


def by_a_new_adapter_of_the_name(made, optimiser):
    made.delete_adapter("default")
    config = sora_hw.ConditionedConfig(method="sora", r=4, rotation_rank=2, dropout=0.0, init_weights=False)
    made.update_layer("default", config)
    made.set_adapter(["default"])


CHANGES = (
    through_data,
    by_optimiser,
    by_loading,
    of_the_base,
    of_the_base_through_data,
    of_the_base_to_half_and_back,
    merged_and_back,
    by_a_new_adapter_of_the_name,
)


@pytest.mark.filterwarnings("ignore:Adapter default was active")
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("method", METHODS)
def test_it_is_never_stale(method, change):
    made, x = trained(method), torch.randn(6, IN, dtype=torch.float64)
    optimiser = torch.optim.SGD(made.adapter_parameters("default").values(), lr=0.1)
    gradients(made, x)
    change(made, optimiser)

    fresh = copy.deepcopy(made)
    fresh._forget_base()
    assert all(torch.equal(a, b) for a, b in zip(gradients(made, x), gradients(fresh, x), strict=True))
    base, conditioning, p = made.get_base_layer(), made.conditioning["default"], made.adapter_parameters("default")
    pair = (conditioning.pre, conditioning.post)
    expected = dense.output(x, x, base.weight, base.bias, *pair, p, made.scaling["default"], kind=conditioning.rotation)
    torch.testing.assert_close(made(x), expected, rtol=1e-12, atol=1e-12)


def test_a_bfloat16_weight_gives_the_same_gradients_kept_or_not():
    made, x = trained("sora", torch.bfloat16), torch.randn(6, IN, dtype=torch.bfloat16)
    once = gradients(made, x)
    assert all(torch.equal(a, b) for a, b in zip(once, gradients(made, x), strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_weights_given_for_one_call(method):
    """Each stands at whatever address was free, with a version that begins anew."""
    made, x = trained(method), torch.randn(6, IN, dtype=torch.float64)
    for seed in range(6):
        weight = torch.randn(OUT, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        y = torch.func.functional_call(made, {"base_layer.weight": weight}, x)
        fresh = copy.deepcopy(made)
        fresh._forget_base()
        assert torch.equal(y, torch.func.functional_call(fresh, {"base_layer.weight": weight}, x))


def test_an_adapter_added_while_another_is_merged_starts_as_the_identity():
    made, x = trained("sora"), torch.randn(6, IN, dtype=torch.float64)
    made.merge()
    made.update_layer("later", sora_hw.ConditionedConfig(method="dora", r=4, dropout=0.0))
    made.unmerge()
    made.set_adapter(["later"])
    torch.testing.assert_close(made(x), made.get_base_layer()(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(made.get_delta_weight("later"), torch.zeros(OUT, IN, dtype=torch.float64))
