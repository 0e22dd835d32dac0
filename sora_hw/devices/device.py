"""What every device type must tell about itself, and how its environment is applied.

Nothing here, nor in the other modules of this folder, imports torch before a method is called: the records can be read
where torch itself does not start.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class Check(NamedTuple):
    """One thing that a device needs.

    Attributes:
        what: what is looked at.
        found: what is there, in a few words.
        problem: None where that serves; otherwise one line: what is missing and what to do.
    """

    what: str
    found: str
    problem: str | None = None


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
        has_fused_loss: whether Liger's fused linear cross-entropy runs on it.
        has_four_bit: whether bitsandbytes holds weights in 4 bits on it.
        exported_prefixes: how variables begin that DeepSpeed's launcher carries to other machines for this device.
    """

    type: str
    display_name: str
    communication_backend: str
    deepspeed_accelerator: str
    dtypes: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    has_fused_loss: bool = False
    has_four_bit: bool = False
    exported_prefixes: tuple[str, ...] = ()

    @abstractmethod
    def checks(self) -> Iterator[Check]:
        """What the device needs, in the order of set-up. Never raises, and never breaks the process."""

    @abstractmethod
    def is_expected(self) -> bool:
        """Whether this machine is evidently meant to use it, so that a failed check means that something is broken."""

    def is_usable(self) -> str | None:
        """None where the device can be used; otherwise one line: the first thing that is missing and what to do."""
        return next((check.problem for check in self.checks() if check.problem), None)

    @abstractmethod
    def count(self) -> int:
        """How many of them this process sees; each serves one rank."""

    @abstractmethod
    def name(self, index: int = 0) -> str:
        """The product name of one of them, as the device itself reports it."""

    @abstractmethod
    def memory_bytes(self, index: int = 0) -> int:
        """The memory of one of them, in bytes, as the device itself reports it."""

    @abstractmethod
    def peak_memory_bytes(self) -> int:
        """The most memory that this process has held so far on its current device, in bytes."""

    def configure(self) -> dict[str, object]:
        """Make the settings that training needs in a process that has taken its device; what was set, by name."""
        return {}

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
