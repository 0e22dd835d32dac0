"""What a layer keeps for the gradient of `c` (`sora_hw.ops.Keep`): its output where that serves.

It does not serve

- where an entry of `c` is small: the gradient is read off the output with an error that grows as 1 / |c|, in bfloat16
  4e-3 at 0.1, 4e-2 at 0.01;
- where the model goes on to write into the output, as `ReLU(inplace=True)` and `output += residual` do.

Neither is seen for nothing. Looking at values waits for the device, so it must happen neither in every forward pass nor
inside a compiled graph: a hook looks at all layers at once after every optimiser step. And whether the output is
written into shows only after the forward pass, so the first ones do without the output and watch. A decision must not
change between a forward pass and its recomputation under gradient checkpointing, for the one says what the other keeps:
what was seen counts once every pass that was watched has been through its backward pass, or has left no graph.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from sora_hw.adapter.base_weight import in_backward, tensor_states
from sora_hw.devices.cuda import is_capturing
from sora_hw.ops import Keep

SMALLEST_SCALE_FROM_OUTPUT = 0.1


class _Graph:
    """Lives in the autograd graph of one forward pass, and as long as that."""


class _WatchedOutput:
    """An output of the layer, without its memory: whether it was written into, and how far its pass has come."""

    def __init__(self, output: Tensor):
        self._witness = output.detach()  # shares the count of the output's changes
        self._version = self._witness._version
        self._witness.data = output.new_empty(0)
        graph = output.grad_fn.metadata["sora_hw"] = _Graph()
        self._graph = weakref.ref(graph)
        self.had_gradient = False
        output.register_hook(self._gradient_arrives)

    def _gradient_arrives(self, gradient: Tensor) -> None:
        self.had_gradient = True

    @property
    def is_pending(self) -> bool:
        """Whether its backward pass may still come."""
        return not self.had_gradient and self._graph() is not None

    @property
    def was_overwritten(self) -> bool:
        return self._witness._version != self._version


class Keeping:
    """The decisions of one layer. In a compiled graph nothing is written in place, so the output stays as it is."""

    def __init__(self):
        self.has_small_scale: dict[str, bool] = {}
        self._seen: dict[str, list[tuple[int, int]]] = {}
        self._output_is_overwritten: bool | None = None  # unknown at first
        self._watched: list[_WatchedOutput] = []

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_watched": []}  # a copy has outputs of its own

    def add(self, adapter_name: str) -> None:
        """A new adapter, which starts as the identity or with values that will be looked at."""
        self.has_small_scale[adapter_name] = False
        self._seen.pop(adapter_name, None)

    def saw(self, adapter_name: str, smallest: float, parameters: Iterable[Tensor]) -> None:
        """The smallest |c| that these parameters give."""
        self._seen[adapter_name] = tensor_states(parameters)
        self.has_small_scale[adapter_name] = smallest < SMALLEST_SCALE_FROM_OUTPUT

    def forget_seen(self) -> None:
        """Look again in the next forward pass: FSDP gathers new values to the old address, under the old version."""
        self._seen.clear()

    def keep(self, adapter_name: str, c: Tensor | None, parameters: Iterable[Tensor]) -> Keep:
        """What this forward pass keeps."""
        if c is None or not (torch.is_grad_enabled() and c.requires_grad):
            return "output"
        compiling = torch.compiler.is_compiling()
        if not (compiling or is_capturing()):
            # Between optimiser steps: values that were loaded, set by hand, or gathered anew from other ranks.
            if not c.is_meta and self._seen.get(adapter_name) != tensor_states(parameters):
                self.saw(adapter_name, _smallest(c).item(), parameters)
            self.learn()
        if self.has_small_scale[adapter_name]:
            return "base"
        return "output" if compiling or self._output_is_overwritten is False else "inputs"

    def watch_output(self, output: Tensor) -> None:
        """See whether the model writes into the output of a pass that kept the inputs. Holds none of its memory."""
        if self._output_is_overwritten is None:
            self._watched.append(_WatchedOutput(output))

    def learn(self) -> None:
        """Take what the watched outputs have shown, when their passes are over."""
        if not self._watched or in_backward() or any(output.is_pending for output in self._watched):
            return
        if any(output.was_overwritten for output in self._watched):
            self._output_is_overwritten = True
        # A pass without a gradient shows nothing: it may have been half a model.
        elif any(output.had_gradient for output in self._watched):
            self._output_is_overwritten = False
        self._watched.clear()


class ScaledLayer(Protocol):
    """A layer that the hook on the optimisers' steps looks at."""

    keeping: Keeping

    def parameters(self) -> Iterator[Tensor]:
        """Those of `torch.nn.Module`."""

    def trained_scales(self) -> Iterator[tuple[str, Tensor, Iterable[Tensor]]]:
        """Name, `c` (out,) and parameters of each adapter that is being trained and lies on this rank as a whole."""


_layers: weakref.WeakSet[ScaledLayer] = weakref.WeakSet()
_hooks: list = []


def look_after_steps(layer: ScaledLayer) -> None:
    """Look at this layer's scales after every optimiser step from now on."""
    _layers.add(layer)
    if not _hooks:
        _hooks.append(register_optimizer_step_post_hook(_look))


def _look(optimiser: torch.optim.Optimizer, *_) -> None:
    if is_capturing():  # a graph of the whole step replays what it has captured: nothing can be looked at
        return
    layers = _layers_of(optimiser)
    for layer in layers:
        layer.keeping.forget_seen()
    scales = [(layer.keeping, scale) for layer in layers for scale in layer.trained_scales()]
    if scales:
        # All are computed before they are waited for, once for each device.
        smallest = [_smallest(c) for _, (_, c, _) in scales]
        found = torch.stack([value.float().to(smallest[0].device) for value in smallest]).tolist()
        for (keeping, (name, _, parameters)), value in zip(scales, found, strict=True):
            keeping.saw(name, value, parameters)
    for layer in layers:
        layer.keeping.learn()


def _layers_of(optimiser: torch.optim.Optimizer) -> list[ScaledLayer]:
    """The layers that an optimiser trains; all, where it holds none of their parameters but may hold copies of them.

    DeepSpeed's optimisers hold flat copies of what they train. An optimiser of its own for each parameter, or for
    another part of the model, is known by its parameters.
    """
    held = {id(parameter) for group in optimiser.param_groups for parameter in group["params"]}
    trained = [layer for layer in _layers if any(id(parameter) in held for parameter in layer.parameters())]
    return trained or list(_layers)


def _smallest(c: Tensor) -> Tensor:
    return c.detach().abs().min()
