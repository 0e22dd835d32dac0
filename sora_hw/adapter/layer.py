"""The conditioned linear layer: a frozen base layer and the adapters that condition its weight."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn

from sora_hw import ops
from sora_hw.adapter.base_weight import KeptProduct, adapter_dtype, gathered, is_whole, row_norm_squared
from sora_hw.adapter.config import ConditionedConfig
from sora_hw.adapter.keeping import Keeping, look_after_steps
from sora_hw.adapter.merging import Merges
from sora_hw.adapter.mixed_batches import samples_of
from sora_hw.adapter.starting import STARTS, principal_part
from sora_hw.conditioning import Conditioning, LinearMap, conditioned_bias, diagonal, linear_map

PARAMETER_NAMES = ("A", "B", "pre_delta", "post_delta", "pre_C", "pre_E", "post_C", "post_E", "magnitude")
_ATTRIBUTES = {name: f"conditioned_{name}" for name in PARAMETER_NAMES}


class LowRankPath(NamedTuple):
    """One adapter between the input and the output of the base layer.

    Attributes:
        linear: the coefficients of the map.
        z: what it has read from the input, `[s x~ A^T, h Q]`, or without `h Q` where that is to be read off the output.
        bias: what the update must add, or None.
        reads_output: whether `h Q` is still to be read.
        keep: what the backward pass keeps of it.
    """

    linear: LinearMap
    z: Tensor
    bias: Tensor | None
    reads_output: bool
    keep: ops.Keep

    def output(self, base: Tensor) -> Tensor:
        """The layer's output under this adapter from `base`, the base layer's output with its bias."""
        c, b, q = self.linear
        z = self.z if self.z.dtype == base.dtype else self.z.to(base.dtype)
        with without_autocast(base.device.type):
            if self.reads_output:
                z = torch.cat([z, ops.skinny_product(base, q.t())], dim=-1)
            return ops.scale_rank_update(base, c, z, b, self.bias, keep=self.keep)


class ConditionedLinear(nn.Module, Merges):
    """A linear layer with weight-conditioned adapters, `y = x W'^T + b0`, `W' = post(pre(W0) + s B A)`.

    The base product stays with the base layer, so sharded and quantised layers and the vendor's matrix product keep
    working; the adapter adds one pass over its output (`sora_hw.ops.scale_rank_update`). The output has the dtype of
    the base layer's output.

    Args:
        base_layer: `torch.nn.Linear`, or a layer like it.
        adapter_name: name of the first adapter.
        config: its configuration.
        fan_in_fan_out: the base weight is stored as (in, out).
        quantization: what PEFT's backend for a quantised base layer needs (`peft.utils.get_quantization_kwargs`).
    """

    sample_dims = 1  # dimensions of an input without a batch
    adapter_layer_names = tuple(_ATTRIBUTES.values())
    other_param_names = ("r", "scaling", "conditioning", "conditions_bias", "conditioned_dropout", "kept_products")

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: ConditionedConfig,
        fan_in_fan_out: bool = False,
        **quantization,
    ):
        super().__init__()
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **quantization)
        self.fan_in_fan_out = fan_in_fan_out
        self.in_features, self.out_features = self._features()
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self.conditioned_dropout = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.conditioning: dict[str, Conditioning] = {}
        self.conditions_bias: dict[str, bool] = {}
        self.merged_adapters: list[str] = []
        self.kept_products: dict[str, KeptProduct] = {}
        self.keeping = Keeping()
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        look_after_steps(self)  # a copy is a layer of its own

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args, **kwargs) -> None:
        if any(name.startswith(f"{prefix}base_layer.") for name in state_dict):
            self._forget_base()  # a compiled graph sees no addresses and versions
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    # --- adapters ---

    def _features(self) -> tuple[int, int]:
        """(in, out) of the weight as a matrix; from attributes, since the weight may be sharded."""
        base = self.get_base_layer()
        return (base.nx, base.nf) if hasattr(base, "nx") else (base.in_features, base.out_features)

    def update_layer(self, adapter_name: str, config: ConditionedConfig) -> None:
        """Add an adapter, or replace the one of this name."""
        if self.starts_from_base is not None or (config.init_weights in STARTS and len(self.conditioned_A) > 0):
            raise ValueError(
                f"init_weights={config.init_weights!r}: an adapter that starts from the base weight takes its part out "
                "of it, so it must be the only adapter of a layer"
            )
        if adapter_name in self.merged_adapters:
            raise ValueError(f"adapter {adapter_name} is merged: unmerge before replacing it")
        for name in self.adapter_layer_names:
            values = getattr(self, name)
            if adapter_name in values:
                del values[adapter_name]
        self.r[adapter_name] = config.r
        self.scaling[adapter_name] = config.scaling
        self.conditioning[adapter_name] = config.conditioning
        self.conditions_bias[adapter_name] = config.condition_bias
        self.conditioned_dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        shapes = config.conditioning.parameter_shapes(
            self.in_features, self.out_features, config.r, config.rotation_rank
        )
        dtype = adapter_dtype(self._base_dtype())
        # Start values are drawn where they are the same for every device, but beside a weight without values are none.
        base = self._base_device()
        device = base if base is not None and base.type == "meta" else None
        for name, shape in shapes.items():
            empty = torch.empty(shape, dtype=dtype, device=device)
            getattr(self, f"conditioned_{name}")[adapter_name] = nn.Parameter(empty)
        self.reset_adapter(adapter_name, bool(config.init_weights))
        if config.init_weights in STARTS:
            self._start_from_base(adapter_name, config.init_weights)
        self._move_adapter_to_base_device(adapter_name)
        self.keeping.add(adapter_name)
        if config.conditioning.scales:
            look_after_steps(self)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def reset_adapter(self, adapter_name: str, identity: bool = True) -> None:
        """Start values: the identity, or a random point for tests.

        `A` and `C` are Kaiming-uniform with `a = sqrt(5)` (`C` by fan-out), everything else starts so that `W' = W0`.
        """
        p = self.adapter_parameters(adapter_name)
        if p["A"].is_meta:
            return  # the values are loaded afterwards
        with torch.no_grad():
            self._reset_low_rank(p["A"], p["B"], identity)
            for name, value in p.items():
                if name.endswith("_C"):
                    nn.init.kaiming_uniform_(value, a=math.sqrt(5), mode="fan_out")
                elif name == "magnitude":
                    self._reset_magnitude(value, identity)
                elif name not in ("A", "B"):
                    nn.init.zeros_(value) if identity else nn.init.normal_(value, std=0.1)

    def _reset_low_rank(self, a: Tensor, b: Tensor, identity: bool) -> None:
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        nn.init.zeros_(b) if identity else nn.init.normal_(b, std=0.1)

    def _reset_magnitude(self, magnitude: Tensor, identity: bool) -> None:
        if self.weight.is_meta:
            return
        with self._unmerged_weight() as weight:
            magnitude.copy_(self._base_norm_squared(weight).sqrt())
        if not identity:
            magnitude.mul_(1 + 0.1 * torch.randn_like(magnitude))

    @torch.no_grad()
    def _start_from_base(self, adapter_name: str, start: str) -> None:
        """Take the principal part out of the base weight and train it: together they are what the weight was.

        An adapter on the meta device takes no values, they are loaded; the base weight must change all the same.
        """
        if self._is_quantised:
            raise ValueError(f"init_weights={start!r} writes into the base weight, which must not be quantised")
        p, s = self.adapter_parameters(adapter_name), self.scaling[adapter_name]
        with self._base_gathered():
            weight = self._stored_weight().data
            whole = weight.to(adapter_dtype(weight.dtype))
            b, a = principal_part(whole, self.r[adapter_name], s, start)
            weight.copy_(whole - s * b @ a)
        p["A"].copy_(a)
        p["B"].copy_(b)
        self._forget_base()
        self.starts_from_base = adapter_name

    def adapter_parameters(self, adapter_name: str) -> dict[str, Tensor]:
        """The adapter's parameters by their names in `Conditioning.parameter_shapes`."""
        names = self.conditioning[adapter_name].parameter_names
        return {name: getattr(self, _ATTRIBUTES[name])[adapter_name] for name in names}

    def cast_adapter_to_base_dtype(self, adapter_name: str) -> None:
        """Store the adapter in the base weight's dtype, where that is a floating dtype."""
        dtype = self._base_dtype()
        if not self._is_quantised:
            for parameter in self.adapter_parameters(adapter_name).values():
                parameter.data = parameter.data.to(dtype)

    def _base_device(self) -> torch.device | None:
        return self._get_base_layer_device_and_dtype(self.get_base_layer())[0]

    def _move_adapter_to_base_device(self, adapter_name: str) -> None:
        # The device only: PEFT's own helper would also round the start values to the base's dtype, and a magnitude
        # rounded to bfloat16 no longer starts as the identity.
        device = self._base_device()
        if device is None:
            return
        for parameter in self.adapter_parameters(adapter_name).values():
            if not parameter.is_meta:
                parameter.data = parameter.data.to(device)

    # --- forward ---

    def forward(self, x: Tensor, *args, adapter_names: Sequence[str] | None = None, **kwargs) -> Tensor:
        """`x` (..., in) -> (..., out). Several active adapters add their differences from the base layer.

        With `adapter_names` every sample has an adapter of its own (`sora_hw.adapter.mixed_batches`).
        """
        if adapter_names is not None and not self.disable_adapters:
            return self._mixed_forward(x, adapter_names, *args, **kwargs)
        if x.dim() == self.sample_dims:
            return self(x[None], *args, **kwargs)[0]
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(x, *args, **kwargs)
        paths = []
        for name in self.active_adapters:
            if name in self.conditioned_A:
                x, path = self._low_rank_path(name, x)
                paths.append(path)
        base = self.base_layer(x, *args, **kwargs)
        outputs = [self._output(path, base) for path in paths]
        if len(outputs) == 1:
            if paths[0].keep == "inputs":
                self.keeping.watch_output(outputs[0])
            return outputs[0]
        result = base
        for output in outputs:
            result = result + (output - base)
        return result

    def _mixed_forward(self, x: Tensor, adapter_names: Sequence[str], *args, **kwargs) -> Tensor:
        places = samples_of(adapter_names, x, self.merged)
        base = self.base_layer(x, *args, **kwargs)
        result = base.clone()
        for name, samples in places.items():
            if name in self.conditioned_A:
                _, path = self._low_rank_path(name, x[samples])
                result[samples] = self._output(path, base[samples])
        return result

    def _output(self, path: LowRankPath, base: Tensor) -> Tensor:
        """The layer's output under one adapter from the base layer's."""
        return path.output(base)

    def _low_rank_path(self, adapter_name: str, x: Tensor) -> tuple[Tensor, LowRankPath]:
        """What an adapter takes from the input, and the `x` to go on with (`sora_hw.ops.low_rank_input`)."""
        dtype = compute_dtype(x)
        p = self.adapter_parameters(adapter_name)
        with without_autocast(x.device.type):
            linear = self._linear_map(adapter_name, p)
            reads_output = linear.q is not None and self._rotation_reads_output(x)
            reads_input = linear.q is not None and not reads_output
            probe = self._probe(adapter_name, linear.q, p.values()) if reads_input else None
            dropout = self.conditioned_dropout[adapter_name]
            drops = dropout.p if self.training and isinstance(dropout, nn.Dropout) else 0.0
            source = x if x.dtype == dtype else x.to(dtype)
            through, z = ops.low_rank_input(source, p["A"], self.scaling[adapter_name], drops, probe)
            x = through if source is x else x
            bias = self._missing_bias(adapter_name, linear, reads_output)
        keep = self.keeping.keep(adapter_name, linear.c, p.values())
        return x, LowRankPath(linear, z, bias, reads_output, keep)

    def _rotation_reads_output(self, x: Tensor) -> bool:
        """Whether a rotation takes its `h Q` from the finished product, or as `x (Q^T W0)^T` from the input.

        The latter is one read of the weight, no pass over the output and nothing of its size kept for the backward
        pass; but a weight that is sharded or quantised cannot be read, and for few rows without a gradient, as in
        generation, its read costs more than theirs. Not while training: there a checkpointed forward pass has no
        gradient either, and must round as its recomputation does.
        """
        generates = not self.training and not torch.is_grad_enabled()
        return not self._weight_is_readable() or (generates and x.numel() < self.in_features**2)

    def trained_scales(self) -> Iterator[tuple[str, Tensor, Iterable[Tensor]]]:
        """See `sora_hw.adapter.keeping.ScaledLayer`."""
        for name in self.conditioned_A:
            p = self.adapter_parameters(name)
            trained = any(value.requires_grad for value in p.values()) and self.conditioning[name].scales
            here = all(is_whole(value) and not value.is_meta for value in p.values())
            reads_weight = self.conditioning[name].post == "magnitude"
            if trained and here and (self._weight_is_readable() or not reads_weight):
                with torch.no_grad():
                    c = self._linear_map(name, p).c if reads_weight else diagonal(self.conditioning[name], p)
                    yield name, c, p.values()

    def _missing_bias(self, adapter_name: str, linear: LinearMap, reads_output: bool) -> Tensor | None:
        """What the update must add so that the result has the bias it should, (out,), or None.

        The base layer's output holds `b0` already: `c` scales it, and a rotation that reads that output turns it.
        """
        b0 = self._base_bias()
        if b0 is None or (linear.c is None and linear.q is None):
            return None
        b0 = gathered(b0)
        turned = conditioned_bias(b0, linear)
        present = turned if reads_output or linear.q is None else _times(linear.c, b0)
        wanted = turned if self.conditions_bias[adapter_name] else b0
        return None if wanted is present else wanted - present

    def _linear_map(self, adapter_name: str, p: dict[str, Tensor], weight: Tensor | None = None) -> LinearMap:
        """The coefficients of an adapter with parameters `p`, on the base weight or on the `weight` (out, in) given."""

        def the_weight() -> AbstractContextManager[Tensor]:
            return self._base_weight() if weight is None else nullcontext(weight)

        def row_norm(c: Tensor | None, b: Tensor, a: Tensor) -> Tensor:
            with the_weight() as w:
                norm_squared = row_norm_squared(w) if weight is not None else self._base_norm_squared(w)
                return ops.factored_row_norm(w, norm_squared, c, b, a)

        def pull_back(q: Tensor) -> Tensor:
            with the_weight() as w:
                return (q.t().to(w.dtype) @ w).t()

        return linear_map(
            self.conditioning[adapter_name],
            p,
            self.scaling[adapter_name],
            row_norm,
            pull_back,
        )

    def __repr__(self) -> str:
        return "conditioned." + super().__repr__()


def without_autocast(device_type: str):
    """What runs within computes in the dtypes that it is given."""
    # To leave autocast where it is not on costs as much as the launch of several kernels.
    return torch.autocast(device_type, enabled=False) if _autocasts(device_type) else nullcontext()


def _autocasts(device_type: str) -> bool:
    return device_type != "meta" and torch.is_autocast_enabled(device_type)  # torch refuses to answer for meta


def compute_dtype(x: Tensor) -> torch.dtype:
    """What the base layer multiplies in: autocast's dtype, or that of `x`."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if _autocasts(device) else x.dtype


def _times(c: Tensor | None, t: Tensor) -> Tensor:
    return t if c is None else c * t
