"""The memory that a computation on meta tensors would take: every storage is counted from its birth to its release."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Hashable, Iterable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ACTIVATIONS, LOGITS, GRADIENTS = "activations", "logits", "gradients"


class Tracker(TorchDispatchMode):
    """Counts the bytes that live while it is entered, by kind, and keeps the greatest sum of every moment.

    Args:
        held: tensors that are counted elsewhere: parameters, buffers of the model, inputs.
        vocabulary: what has this many columns belongs to the loss head; None for a model without one.

    Attributes:
        moment: the part of the step that is running; set from outside.
        peaks: of each moment, the bytes of each kind when their sum was greatest.
    """

    def __init__(self, held: Iterable[Tensor], vocabulary: int | None):
        super().__init__()
        self.moment: Hashable = None
        self.peaks: dict[Hashable, Counter] = {}
        self._vocabulary = vocabulary
        self._live: Counter = Counter()
        self._kinds: dict[int, str] = {}
        self._references: dict[int, weakref.ref] = {}
        # A view of one of these is no new memory. They outlive the tracker, so no address of theirs comes back.
        self._held = {tensor.untyped_storage()._cdata for tensor in held}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self._meet(tensor)
        return result

    def enter(self, moment: Hashable) -> None:
        """A new moment begins, with what lives now."""
        self.moment = moment
        self._note_peak()

    def set_kind(self, tensor: Tensor, kind: str) -> None:
        """Count a tensor that was met before as another kind."""
        key = tensor.untyped_storage()._cdata
        if key in self._kinds:
            size = tensor.untyped_storage().nbytes()
            self._live[self._kinds[key]] -= size
            self._live[kind] += size
            self._kinds[key] = kind

    def _meet(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._kinds or key in self._held:
            return
        kind = LOGITS if tensor.dim() and tensor.shape[-1] == self._vocabulary else ACTIVATIONS

        def release(_: weakref.ref) -> None:
            del self._references[key]
            self._live[self._kinds.pop(key)] -= size

        # The storage's Python object lives as long as the storage, whoever holds it, so this sees the true release.
        self._references[key] = weakref.ref(storage, release)
        self._kinds[key] = kind
        self._live[kind] += size
        self._note_peak()

    def _note_peak(self) -> None:
        peak = self.peaks.get(self.moment)
        if peak is None or self._live.total() > peak.total():
            self.peaks[self.moment] = self._live.copy()


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """The bytes of the tensors' storages, each storage once: tied weights share one."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def set_dtype(parameters: Iterable[torch.nn.Parameter], dtype: torch.dtype) -> None:
    """Convert floating parameters in place, as DeepSpeed does with a module; tied ones stay one parameter."""
    for parameter in parameters:
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
