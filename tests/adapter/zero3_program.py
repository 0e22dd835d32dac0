"""Run by test_zero3.py on two ranks: every method sharded by ZeRO-3 beside the same model whole, losses and gradients.

The persistence threshold is zero, so that really everything is sharded: adapters, biases and base weights. Several
steps, with transformers' configuration in place as its Trainer has it: from the second on DeepSpeed fetches ahead.
The pair `start` and `pissa` or `olora` stands for that start on a base model that is sharded already, `convolution` and
`grouped` for a rotated one.
"""

import copy
import sys
from functools import partial

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from peft import get_peft_model
from sharded_model import ADAMW, TARGETS, adapted, base_model, rotated_convolution
from transformers.integrations import HfDeepSpeedConfig

import sora_hw

ZERO3 = {
    "train_batch_size": 2,
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "optimizer": {"type": "AdamW", "params": {"torch_adam": True, **ADAMW}},
}


def compare(pre: str, post: str) -> tuple[float, float]:
    """Differences of the losses and, relative to its size, of the worst gradient between sharded and whole."""
    ids = torch.arange(40).view(2, 20) % 64
    mine = ids[dist.get_rank()][None]
    whole = adapted(base_model(), pre, post)
    sharded = copy.deepcopy(whole)
    trained = [p for p in sharded.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=sharded, model_parameters=trained, config=ZERO3)
    assert all(p.ds_tensor.numel() < p.ds_numel for p in engine.module.parameters() if p.ds_numel > 1)
    optimiser = torch.optim.AdamW([p for p in whole.parameters() if p.requires_grad], **ADAMW)

    worst_loss = worst_gradient = 0.0
    for _ in range(3):
        loss = whole(ids, labels=ids).loss
        loss.backward()
        sharded_loss = engine(mine, labels=mine).loss
        engine.backward(sharded_loss)
        dist.all_reduce(total := sharded_loss.detach().clone())
        worst_loss = max(worst_loss, abs(total.item() / dist.get_world_size() - loss.item()))
        for (name, p), (_, q) in zip(engine.module.named_parameters(), whole.named_parameters(), strict=True):
            if q.requires_grad:
                gradient = safe_get_full_grad(p)
                assert gradient is not None, name
                difference = (gradient - q.grad).norm() / q.grad.norm().clamp(min=1e-3)
                worst_gradient = max(worst_gradient, difference.item())
        engine.step()
        optimiser.step()
        optimiser.zero_grad()
    engine.destroy()
    return worst_loss, worst_gradient


def start(kind: str) -> tuple[float, float]:
    """Starting from the base weight: differences of the loss, and of the base weights, sharded from whole."""
    options = {"r": 4, "dropout": 0.0, "init_weights": kind, "target_modules": TARGETS}
    whole = get_peft_model(base_model(), sora_hw.ConditionedConfig(**options))
    with deepspeed.zero.Init(config_dict_or_path=ZERO3):
        base = base_model()
    values = dict(base_model().named_parameters())
    for name, parameter in base.named_parameters():
        with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
            parameter.data.copy_(values[name])
    sharded = get_peft_model(base, sora_hw.ConditionedConfig(**options))
    trained = [p for p in sharded.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=sharded, model_parameters=trained, config=ZERO3)
    ids = torch.arange(40).view(2, 20) % 64
    loss = (engine(ids, labels=ids).loss - whole(ids, labels=ids).loss).abs().item()
    worst = 0.0
    for p, q in zip(engine.module.parameters(), whole.parameters(), strict=True):
        assert p.ds_tensor.numel() < p.ds_numel or p.ds_numel == 1
        with deepspeed.zero.GatheredParameters(p):
            worst = max(worst, (p - q).abs().max().item())
    engine.destroy()
    return loss, worst


def convolution(_: str) -> tuple[float, float]:
    """Relative differences of the output and of the worst gradient, of a grouped convolution that is rotated."""
    torch.manual_seed(0)
    whole, x = rotated_convolution(), torch.randn(1, 4, 9)
    sharded = copy.deepcopy(whole)
    trained = [p for p in sharded.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=sharded, model_parameters=trained, config=ZERO3)
    outputs, expected = engine(x), whole(x)
    engine.backward(outputs.square().sum())
    expected.square().sum().backward()
    worst = 0.0
    for p, q in zip(engine.module.parameters(), whole.parameters(), strict=True):
        assert p.ds_tensor.numel() < p.ds_numel
        if q.requires_grad:
            worst = max(worst, ((safe_get_full_grad(p) - q.grad).norm() / q.grad.norm()).item())
    engine.destroy()
    return ((outputs - expected).norm() / expected.norm()).item(), worst


if __name__ == "__main__":
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    in_place = HfDeepSpeedConfig(ZERO3)  # by which PEFT and transformers know; it lasts as long as this name
    for pair in (argument.split("+") for argument in sys.argv[1:] if "+" in argument):
        differences = {"start": start, "convolution": convolution}.get(pair[0], partial(compare, pair[0]))(pair[1])
        if dist.get_rank() == 0:
            print("RESULT", *pair, *differences, flush=True)
