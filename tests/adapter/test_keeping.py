"""What is kept for the gradient of `c`: models that write into a layer's output, scales that become small, memory."""

import copy
import pickle

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

import sora_hw
from sora_hw.adapter import keeping
from sora_hw.adapter.keeping import SMALLEST_SCALE_FROM_OUTPUT
from sora_hw.conditioning import PRESETS


class Model(nn.Module):
    """Two layers whose outputs are written into, or the same in new tensors."""

    def __init__(self, in_place: bool, checkpointed: bool | None = None):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(24, 40), nn.Linear(40, 24)
        self.in_place, self.reentrant = in_place, checkpointed

    def block(self, x):
        y = self.down(nn.functional.relu(self.up(x), inplace=self.in_place))
        if not self.in_place:
            return y + x
        y += x
        return y

    def forward(self, x):
        return self.block(x) if self.reentrant is None else checkpoint(self.block, x, use_reentrant=self.reentrant)


def adapted(method, in_place=False, checkpointed=None, dtype=torch.float32, **options):
    model = Model(in_place, checkpointed).to(dtype)
    config = {"r": 4, "dropout": 0.0, "init_weights": False, "target_modules": ["up", "down"], **options}
    torch.manual_seed(1)
    return get_peft_model(model, sora_hw.ConditionedConfig(method=method, **config))


def steps(model, count=3, accumulation=2):
    """Every gradient of every step, and the parameters at the end."""
    torch.manual_seed(2)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(trained, lr=1e-4)
    seen = []
    for _ in range(count):
        for _ in range(accumulation):
            model(torch.randn(50, 24).requires_grad_()).square().sum().backward()
        seen += [p.grad.clone() for p in trained]
        optimiser.step()
        optimiser.zero_grad()
    return seen + [p.detach() for p in trained]


@pytest.mark.parametrize("checkpointed", [None, False, True], ids=["plain", "checkpointed", "reentrant"])
@pytest.mark.parametrize("method", PRESETS)
def test_a_model_may_write_into_the_output(method, checkpointed):
    """The same gradients, to the bit, as in a model that does not; in the first step and when it has been learned."""
    wanted = steps(adapted(method, checkpointed=checkpointed))
    actual = steps(adapted(method, in_place=True, checkpointed=checkpointed))
    assert all(torch.equal(a, w) for a, w in zip(actual, wanted, strict=True))


def kept(layer, x):
    """What the layer's forward pass saves that is as large as its output: "output", "other" or nothing."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    large = {t.data_ptr() for t in saved if t.shape == y.shape}
    return {"output" if pointer == y.data_ptr() else "other" for pointer in large}


@pytest.mark.parametrize(
    ("method", "in_place", "expected"),
    [("sora", False, {"output"}), ("dora", False, {"output"}), ("sora", True, {"other"}), ("lora", True, set())],
)
def test_what_is_kept_once_it_has_been_learned(method, in_place, expected):
    model = adapted(method, in_place)
    layer = model.base_model.model.up
    assert kept(layer, torch.randn(50, 24)) == (set() if method == "lora" else {"other"})
    steps(model, 1)
    assert kept(layer, torch.randn(50, 24)) == expected
    assert kept(copy.deepcopy(layer), torch.randn(50, 24)) == expected


def test_a_step_that_makes_a_scale_small_is_noticed():
    model = adapted("prediag")
    steps(model, 1)
    layer = model.base_model.model.up
    delta = layer.conditioned_pre_delta["default"]
    with torch.no_grad():
        delta[3] = -1.0
    assert kept(layer, torch.randn(50, 24)) == {"other"}  # set by hand: noticed at once
    with torch.no_grad():
        delta[3] = 0.0
    assert kept(layer, torch.randn(50, 24)) == {"output"}
    delta.grad = torch.zeros_like(delta)
    delta.grad[3] = 1.0 - SMALLEST_SCALE_FROM_OUTPUT / 2
    torch.optim.SGD([delta], lr=1.0).step()
    assert layer.keeping.has_small_scale["default"]
    assert kept(layer, torch.randn(50, 24)) == {"other"}


@pytest.mark.parametrize(
    ("pre", "post"),
    [("diagonal", "none"), ("diagonal", "diagonal"), ("rotation", "diagonal"), ("diagonal", "rotation")],
)
def test_the_smallest_scale_after_a_step_is_that_of_the_diagonals(pre, post, monkeypatch):
    model = adapted(None, pre=pre, post=post)
    seen = {}
    monkeypatch.setattr(keeping.Keeping, "saw", lambda self, name, smallest, parameters: seen.update({self: smallest}))
    steps(model, 1)
    for layer in (model.base_model.model.up, model.base_model.model.down):
        p = layer.adapter_parameters("default")
        factors = [1 + p[name].detach().double() for name in ("pre_delta", "post_delta") if name in p]
        assert abs(seen[layer.keeping] - torch.stack(factors).prod(0).abs().min()) < 1e-6


def test_a_step_on_shards_is_noticed_though_address_and_version_stay(monkeypatch):
    """As FSDP gathers: the step is taken elsewhere, and the new values are written to where the old ones were."""
    monkeypatch.setattr("sora_hw.adapter.layer.is_whole", lambda parameter: False)
    model = adapted("prediag")
    steps(model, 1)
    layer = model.base_model.model.up
    assert kept(layer, torch.randn(50, 24)) == {"output"}
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad]).step()
    layer.conditioned_pre_delta["default"].data[3] = -1.0
    assert kept(layer, torch.randn(50, 24)) == {"other"}


@pytest.mark.parametrize(("in_place", "expected"), [(False, {"output"}), (True, {"other"})])
def test_it_is_learned_without_an_optimiser_once_the_graphs_are_gone(in_place, expected):
    model = adapted("sora", in_place)
    layer = model.base_model.model.up
    x = torch.randn(50, 24)
    loss = model(x).sum()
    assert kept(layer, x) == {"other"}, "the first graph is still there, and might be computed again"
    loss.backward()
    del loss
    model(x)
    assert kept(layer, x) == expected


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("shape", [(50, 24), (5, 10, 24)])
def test_what_was_seen_in_rows_and_in_sequences_of_rows(in_place, shape):
    model = adapted("sora", in_place)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    for _ in range(2):
        model(torch.randn(shape)).sum().backward()
        optimiser.step()
    for layer in (model.base_model.model.up, model.base_model.model.down):
        assert layer.keeping._output_is_overwritten is in_place


@pytest.mark.parametrize("in_place", [False, True])
def test_two_checkpointed_passes_before_their_backward_passes(in_place):
    """The second forward pass may not decide anything that the recomputation of the first would follow."""

    def gradients(model):
        torch.manual_seed(3)
        losses = [model(torch.randn(50, 24).requires_grad_()).square().sum() for _ in range(2)]
        for loss in losses:
            loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    wanted = gradients(adapted("sora"))
    actual = gradients(adapted("sora", in_place, checkpointed=False))
    assert all(torch.equal(a, w) for a, w in zip(actual, wanted, strict=True))


def test_a_watched_layer_can_be_saved_and_copied():
    model = adapted("sora")
    y = model(torch.randn(50, 24))
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for same in copies:
        assert torch.equal(same(torch.ones(3, 24)), model(torch.ones(3, 24)))
    y.sum().backward()


def test_a_copy_learns_for_itself():
    original = adapted("sora")
    model = copy.deepcopy(original)
    steps(model, 1)
    assert kept(model.base_model.model.up, torch.randn(50, 24)) == {"output"}
    assert kept(original.base_model.model.up, torch.randn(50, 24)) == {"other"}


@pytest.mark.parametrize("method", PRESETS)
def test_nothing_piles_up_where_nothing_is_to_be_learned(method):
    """Many passes without an optimiser: inference with gradients, and backward passes whose graphs are dropped."""
    model = adapted(method)
    for _ in range(20):
        model(torch.randn(50, 24))
    for _ in range(20):
        model(torch.randn(50, 24)).sum().backward()
    assert len(model.base_model.model.up.keeping._watched) <= 1


def test_watching_holds_no_memory():
    layer = adapted("sora").base_model.model.up
    y = layer(torch.randn(50, 24))
    (watched,) = layer.keeping._watched
    witness = watched._witness
    assert witness.untyped_storage().nbytes() == 0
    y.data.add_(1)
    assert y.shape == (50, 40)


@pytest.mark.parametrize("method", ["sora", "prediag", "dora", "post_diag"])
def test_an_optimiser_of_something_else_between_a_pass_and_its_recomputation(method):
    """As a critic's: its step comes while a checkpointed pass of this model still waits for its backward pass."""

    def gradients(checkpointed):
        model, other = adapted(method, checkpointed=checkpointed), nn.Parameter(torch.ones(1))
        other.grad = torch.ones(1)
        torch.manual_seed(3)
        first = model(torch.randn(50, 24)).square().sum()
        first.backward()
        second = model(torch.randn(50, 24)).square().sum()
        torch.optim.SGD([other]).step()
        second.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    assert all(torch.equal(a, w) for a, w in zip(gradients(False), gradients(None), strict=True))


def test_a_recomputation_that_keeps_something_else_is_an_error_not_a_wrong_gradient():
    model = adapted("sora", checkpointed=False)
    loss = model(torch.randn(50, 24)).sum()
    model.base_model.model.up.keeping._output_is_overwritten = False
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        loss.backward()


def test_an_optimiser_looks_at_the_layers_that_it_trains(monkeypatch):
    mine, another = adapted("sora"), adapted("prediag")
    looked = []
    monkeypatch.setattr(keeping.Keeping, "saw", lambda self, name, smallest, parameters: looked.append(self))
    optimiser = torch.optim.SGD([p for p in mine.parameters() if p.requires_grad], lr=0.1)
    optimiser.step()
    own = [mine.base_model.model.up.keeping, mine.base_model.model.down.keeping]
    assert set(looked) == set(own) and len(looked) == 2
    looked.clear()
    torch.optim.SGD([nn.Parameter(torch.ones(9))], lr=0.1).step()  # may be flat copies, as DeepSpeed's
    assert {*own, another.base_model.model.up.keeping} <= set(looked)


def test_nothing_is_looked_at_while_a_cuda_graph_is_captured(monkeypatch):
    model = adapted("sora")
    monkeypatch.setattr(keeping, "is_capturing", lambda: True)
    monkeypatch.setattr(keeping, "_smallest", lambda c: pytest.fail("waits for the device"))
    steps(model, 2)


def test_without_values_the_first_pass_watches_its_output_as_well(monkeypatch):
    """On the meta device a scale cannot be looked at, but what is kept must be what a real pass keeps."""
    kept = []
    decide = keeping.Keeping.keep
    monkeypatch.setattr(keeping.Keeping, "keep", lambda *args: kept.append(decide(*args)) or kept[-1])
    with torch.device("meta"):
        model = adapted("sora")
        for _ in range(2):
            model(torch.empty(5, 24, requires_grad=True)).sum().backward()
    assert kept == ["inputs", "inputs", "output", "output"]
