"""What every device type must tell about itself, and how its environment is applied.

Nothing here, nor in the other modules of this folder, imports torch before a method is called: the records can be read
where torch itself does not start.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Device(ABC):
    """One device type: a record of names, and the few questions that only the device can answer.

    Attributes:
        type: the `torch.device` type, which is also the name of `--backend` and of the kernel package's entry point.
        display_name: for people.
        communication_backend: of `torch.distributed`.
        deepspeed_accelerator: the value of `DS_ACCELERATOR`, which must stand before deepspeed is imported.
        dtypes: the names of the floating dtypes that training may use.
        environment: variables that must stand before the device is first used, unless the user has set them.
    """

    type: str
    display_name: str
    communication_backend: str
    deepspeed_accelerator: str
    dtypes: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)

    @abstractmethod
    def is_usable(self) -> str | None:
        """None where the device can be used; otherwise one line: what is missing and what to do."""

    @abstractmethod
    def count(self) -> int:
        """How many of them this process sees."""

    @abstractmethod
    def name(self, index: int = 0) -> str:
        """The product name of one of them."""

    @abstractmethod
    def memory_bytes(self, index: int = 0) -> int:
        """The memory of one of them, in bytes, as the device itself reports it."""

    @abstractmethod
    def peak_memory_bytes(self) -> int:
        """The most memory that this process has held so far on its current device, in bytes."""

    def torch_device(self, index: int) -> torch.device:
        """The torch device of rank-local number `index`."""
        import torch

        return torch.device(self.type, index)


def apply_environment(mapping: Mapping[str, str], environ: MutableMapping[str, str]) -> dict[str, str]:
    """Set the variables of `mapping` that `environ` lacks; what the user has set, even to nothing, stays.

    Returns:
        The variables that were set.
    """
    applied = {name: value for name, value in mapping.items() if name not in environ}
    environ.update(applied)
    return applied
