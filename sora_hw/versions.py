"""Which versions of Python and of the libraries beneath the launcher are supported.

The library itself only needs what it imports; a training run leans on all of them at once, so the launcher refuses a
combination that is known to break before it starts.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from types import MappingProxyType

from packaging.specifiers import SpecifierSet

from sora_hw.errors import UserError


@dataclass(frozen=True)
class Support:
    """The versions that work (a version specifier) and the one that every change is tested with."""

    versions: str
    tested: str


SUPPORTED: Mapping[str, Support] = MappingProxyType(
    {
        "python": Support(">=3.11,<3.14", "3.11"),
        "torch": Support(">=2.11,<2.14", "2.13.0"),
        "transformers": Support(">=5.17,<6", "5.23.0"),
        "peft": Support(">=0.21,<0.22", "0.21.2"),
        "accelerate": Support(">=1.13,<2", "1.15.0"),
        "deepspeed": Support(">=0.19,<0.20", "0.19.8"),
    }
)


@dataclass(frozen=True)
class Verdict:
    """One installed version against the supported ones.

    Attributes:
        name: "python" or the distribution.
        installed: its version; None where it is absent.
        problem: one line, what is wrong and what to do; None where the version is supported.
    """

    name: str
    installed: str | None
    problem: str | None


def verdicts() -> list[Verdict]:
    """What is installed here, in the order of `SUPPORTED`."""
    return [_judge(name, _installed(name), support) for name, support in SUPPORTED.items()]


def check_versions(unneeded: Sequence[str] = ()) -> None:
    """Refuse a combination that is known to break. The libraries in `unneeded` may be absent.

    Raises:
        UserError: Python or a library is absent or outside its supported range; the message names each.
    """
    judged = [each for each in verdicts() if each.installed or each.name not in unneeded]
    if problems := [verdict.problem for verdict in judged if verdict.problem]:
        raise UserError("; ".join(problems))


def _judge(name: str, installed: str | None, support: Support) -> Verdict:
    if installed is None:
        problem = f"{name} is not installed: pip install '{name}{support.versions}'"
    elif SpecifierSet(support.versions).contains(installed, prereleases=True):
        problem = None
    elif name == "python":
        problem = f"Python {installed} is not supported: use {support.versions}"
    else:
        problem = f"{name} {installed} is not supported: pip install '{name}{support.versions}'"
    return Verdict(name, installed, problem)


def _installed(name: str) -> str | None:
    if name == "python":
        return platform.python_version()
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
