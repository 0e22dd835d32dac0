"""Another adapter for every sample of a batch: `adapter_names=` of PEFT's forward and generate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

BASE = "__base__"  # PEFT's name for no adapter


@contextmanager
def adapters_per_sample(model: nn.Module, names: Sequence[str], known: set[str], beams: int = 1) -> Iterator[None]:
    """While this is open, every layer with adapters below `model` gets the names as `adapter_names=`.

    Args:
        model: the model with the layers.
        names: the adapter of every sample, or `BASE`.
        known: the adapters that some layer has.
        beams: beams of a beam search, which repeats every sample; the encoder of an encoder-decoder sees each once.

    Raises:
        ValueError: while training, or for a name that no layer knows.
    """
    if model.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    if unknown := sorted(set(names) - known - {BASE}):
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
    encoder = model.get_encoder() if beams > 1 and hasattr(model, "get_encoder") else None
    unrepeated = set() if encoder is None or encoder is model else set(encoder.modules())
    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
                here = list(names) if module in unrepeated else [name for name in names for _ in range(beams)]
                handle = module.register_forward_pre_hook(partial(_pass_names, names=here), with_kwargs=True)
                hooks.callback(handle.remove)
        yield


def _pass_names(module: nn.Module, args: tuple, kwargs: dict, names: list[str]) -> tuple[tuple, dict]:
    return args, kwargs | {"adapter_names": names}


def samples_of(names: Sequence[str], x: Tensor, merged: bool) -> dict[str, list[int]]:
    """Adapter -> the places of its samples in the batch `x` (samples, ...), without the base model's.

    Raises:
        ValueError: for another number of names than samples, or in a layer with merged adapters.
    """
    if len(x) != len(names):
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(names)} and {len(x)} respectively."
        )
    if merged:
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )
    places: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        if name != BASE:
            places.setdefault(name, []).append(place)
    return places
