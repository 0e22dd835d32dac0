"""A weighted sum of adapters as one adapter, exactly.

Every adapter is `W' = c W0 + B' [s A; Q^T W0]` (`sora_hw.conditioning`), so

    sum_i w_i (W'_i - W0) = (sum_i w_i (c_i - 1)) W0 + [w_1 B'_1, ...] [s_1 A_1; Q_1^T W0; ...]

is a Pre-Diag adapter of rank `sum_i (r_i + q_i)`, or a LoRA where nothing scales. With the weights 1 it computes what
the adapters compute when all are active. A magnitude enters with the norm that it has now.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from sora_hw.adapter.base_weight import adapter_dtype, check_no_fsdp_shard
from sora_hw.adapter.config import ConditionedConfig
from sora_hw.adapter.layer import ConditionedLinear
from sora_hw.adapter.starting import STARTS
from sora_hw.conditioning import low_rank_rows

EXACT = ("cat", "linear")  # PEFT's names for a sum; there "linear" keeps the rank and is not quite one


class WeightedSum(NamedTuple):
    """The parameters of the sum in one layer: `delta` (out,) or None, `a` (R, in), `b` (out, R); scale 1."""

    delta: Tensor | None
    a: Tensor
    b: Tensor


@torch.no_grad()
def weighted_sum(layer: ConditionedLinear, weights: Mapping[str, float]) -> WeightedSum:
    """Of the adapters that the layer has among `weights`, adapter -> weight."""
    delta, rows, columns = None, [], []
    with layer._unmerged_weight_if_read(weights) as stored:
        for name, weight in weights.items():
            p, scaling = layer.adapter_parameters(name), layer.scaling[name]
            w0 = None if stored is None else stored.to(adapter_dtype(stored.dtype))
            linear = layer._linear_map(name, p, w0)
            rows.append(low_rank_rows(w0, linear, p["A"], scaling))
            columns.append(weight * linear.b)
            if linear.c is not None:
                change = weight * (linear.c - 1)
                delta = change if delta is None else delta + change
    return WeightedSum(delta, torch.cat(rows), torch.cat(columns, dim=1))


def combined_config(
    configs: Mapping[str, ConditionedConfig], sums: Mapping[str, WeightedSum], scales: bool
) -> ConditionedConfig:
    """The configuration of the sum.

    Args:
        configs: adapter -> its configuration.
        sums: name of a layer -> its part of the sum.
        scales: whether any part has a diagonal.
    """
    ranks = {name: len(part.a) for name, part in sums.items()}
    r = max(ranks.values())
    own = {re.escape(name): rank for name, rank in ranks.items() if rank != r}
    targets = [config.target_modules for config in configs.values()]
    heads = {head for config in configs.values() for head in config.modules_to_save or ()}
    return replace(
        next(iter(configs.values())),
        method=None,
        pre="diagonal" if scales else "none",
        post="none",
        r=r,
        alpha=r,
        rank_pattern=own,
        alpha_pattern=dict(own),
        use_rslora=False,
        condition_bias=False,
        init_weights=True,
        target_modules=_union(targets),
        modules_to_save=sorted(heads) or None,
    )


def _union(targets: list[set[str] | str]) -> set[str] | str:
    if all(isinstance(target, str) for target in targets):
        return "|".join(f"({target})" for target in dict.fromkeys(targets))
    if any(isinstance(target, str) for target in targets):
        raise ValueError("weighted adapters must all name their target_modules, or all by a regular expression")
    return set().union(*targets)


def check_combinable(model: nn.Module, configs: Mapping[str, ConditionedConfig], combination_type: str) -> None:
    """Raises ValueError for what has no exact sum."""
    if combination_type not in EXACT:
        raise ValueError(f"combination_type={combination_type!r} is not exact: choose one of {', '.join(EXACT)}")
    for parameter in model.parameters():
        check_no_fsdp_shard(parameter, "a weighted sum of adapters")
    heads = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    if shared := sum(sum(name in head.modules_to_save for name in configs) > 1 for head in heads):
        raise ValueError(
            "Cannot add weighted adapters if they target the same module with modules_to_save, but found "
            f"{shared} such instance(s)."
        )
    for name, config in configs.items():
        if config.init_weights in STARTS:
            raise ValueError(f"adapter {name} started from the base weight and is the only one beside what that left")
        if config.condition_bias or config.bias != "none" or config.trainable_token_indices:
            raise ValueError(
                f"adapter {name} changes biases or tokens, which a weighted sum of weights does not hold: "
                "merge it on its own"
            )
