"""Run by test_fsdp2.py on two ranks: methods sharded by FSDP2 beside the same model whole.

An argument is a pair of placements and what is sharded on its own: "blocks", as trainers do, or "layers", where not
even the frozen weight of a layer lies whole on a rank while the layer around it runs.
"""

import copy
import json
import sys

import torch
import torch.distributed as dist
from peft import get_peft_model_state_dict
from sharded_model import ADAMW, adapted, base_model, rotated_convolution
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from sora_hw.adapter import ConditionedLinear


def shard(model, what):
    layers = [module for module in model.modules() if isinstance(module, ConditionedLinear)]
    for unit in model.get_base_model().model.layers if what == "blocks" else [layer.base_layer for layer in layers]:
        fully_shard(unit)
    return fully_shard(model)


def compare(pre: str, post: str, what: str) -> tuple[float, float, float]:
    """Differences of the losses and, relative to their sizes, of the worst gradient and of the worst saved tensor."""
    ids = torch.arange(40).view(2, 20) % 64
    mine = ids[dist.get_rank()][None]
    whole = adapted(base_model(), pre, post)
    sharded = shard(copy.deepcopy(whole), what)
    assert all(isinstance(p, DTensor) for p in sharded.parameters())
    optimisers = [
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **ADAMW) for model in (whole, sharded)
    ]
    loss_difference = gradient_difference = tensor_difference = 0.0
    for _ in range(3):
        loss, sharded_loss = whole(ids, labels=ids).loss, sharded(mine, labels=mine).loss
        loss.backward()
        sharded_loss.backward()
        dist.all_reduce(total := sharded_loss.detach().clone())
        loss_difference = max(loss_difference, abs(total.item() / dist.get_world_size() - loss.item()))
        for (name, p), q in zip(sharded.named_parameters(), whole.parameters(), strict=True):
            if q.requires_grad:
                assert p.grad is not None, name
                difference = (p.grad.full_tensor() - q.grad).norm() / q.grad.norm().clamp(min=1e-3)
                gradient_difference = max(gradient_difference, difference.item())
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    gathered = get_model_state_dict(sharded, options=options)
    if dist.get_rank() == 0:
        saved, wanted = get_peft_model_state_dict(sharded, gathered), get_peft_model_state_dict(whole)
        assert saved.keys() == wanted.keys()
        for name, value in wanted.items():
            difference = (saved[name] - value).norm() / value.norm().clamp(min=1e-3)
            tensor_difference = max(tensor_difference, difference.item())
        base = {name: value for name, value in whole.state_dict().items() if "conditioned_" not in name}
        assert all(torch.equal(gathered[name], value) for name, value in base.items())
    return loss_difference, gradient_difference, tensor_difference


def convolutions() -> tuple[float, float]:
    """Relative differences of the output and of the worst gradient, of a grouped convolution that is rotated."""
    torch.manual_seed(0)
    whole, x = rotated_convolution(), torch.randn(2, 4, 9)
    sharded = shard(copy.deepcopy(whole), "layers")
    outputs, expected = sharded(x), whole(x)
    outputs.square().sum().backward()
    expected.square().sum().backward()
    worst = 0.0
    for p, q in zip(sharded.parameters(), whole.parameters(), strict=True):
        if q.requires_grad:
            worst = max(worst, ((p.grad.full_tensor() - q.grad).norm() / q.grad.norm()).item())
    return ((outputs - expected).norm() / expected.norm()).item(), worst


def refusals() -> list[str]:
    """What a sharded model answers to what would write or sum its weights."""
    model = shard(adapted(base_model(), "none", "magnitude"), "blocks")
    said = []
    for action in (
        model.merge_adapter,
        model.merge_and_unload,
        lambda: model.base_model.add_weighted_adapter(["default"], [2.0], "sum"),
    ):
        try:
            action()
        except ValueError as error:
            said.append(str(error))
    return said


if __name__ == "__main__":
    dist.init_process_group("gloo")
    results = {"convolutions": convolutions(), "refusals": refusals()}
    results["compared"] = {case: compare(*case.split("+")) for case in sys.argv[1:] if "+" in case}
    if dist.get_rank() == 0:
        print("RESULT", json.dumps(results), flush=True)
    dist.destroy_process_group()
