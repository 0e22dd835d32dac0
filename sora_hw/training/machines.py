"""Several machines: DeepSpeed's hostfile, the variables that ranks elsewhere need, and what all ranks must share."""

import os
import re
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from sora_hw.devices.detect import DEVICES
from sora_hw.devices.device import Device
from sora_hw.errors import UserError
from sora_hw.hardware import PROFILES, Profile
from sora_hw.storage import write_whole
from sora_hw.training.plan import Plan
from sora_hw.training.prepare import Prepared

SLOTS = re.compile(r"(\S+)\s+slots=(\d+)(?!\S)")
EXPORTED = ("MLFLOW", "PYTHON", "MV2", "UCX")  # DeepSpeed's launcher carries what begins so, whatever the device
CARRIED = (
    *("DS_ACCELERATOR", "HF_HUB_OFFLINE", "HF_HOME", "HF_ENDPOINT", "OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME"),
    *("SORA_HW_FALLBACK", "SORA_HW_NPU_KERNELS"),
)
# DeepSpeed cuts blanks off both ends of a value and puts it between double quotes into a command for the other
# machines' shells, by way of pdsh, which replaces %h and its like.
NOT_CARRIED_WHOLE = re.compile(r'[\r\n"$`\\%]|^\s|\s$')
PASSWORD = re.compile(r"://[^/]*@")
ADVICE = {
    "versions": "install the same versions on every machine",
    "data": "give every machine the same data files",
    "base model": "give every machine the same one",
    "plan": "start every machine with the same arguments",
}


@dataclass(frozen=True)
class Machine:
    """One line of a hostfile: a machine by the name that ssh knows it by, and how many ranks it runs."""

    name: str
    slots: int


def read_hostfile(path: Path) -> list[Machine]:
    """The machines of a hostfile in DeepSpeed's format: lines `name slots=n`, blank lines, and lines that begin with #.

    Raises UserError, naming file and line, for what DeepSpeed refuses, and for a machine without slots or a number
    that something is glued to, both of which it takes.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--hostfile {path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    machines: dict[str, Machine] = {}
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        machine = _machine(line, f"{path}, line {number}")
        if machine.name in machines:
            raise UserError(f"{path}, line {number}: {machine.name} stands there a second time; name it once, with all")
        machines[machine.name] = machine
    if not machines:
        raise UserError(f"{path}: names no machine; write a line `name slots=n` for each")
    return list(machines.values())


def _machine(line: str, where: str) -> Machine:
    match = SLOTS.match(line)
    if not match:
        raise UserError(f"{where}: {line!r} is not of the form `name slots=n`")
    name, slots = match[1], int(match[2])
    if slots == 0:
        raise UserError(f"{where}: {name} has 0 slots; give it as many as it has devices, or take the line out")
    return Machine(name, slots)


def needed_elsewhere(device: Device, profile: Profile, environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that ranks on other machines need, and that DeepSpeed's launcher does not carry there by itself.

    Those of the device and the profile, where the user has set another value that one, and of `CARRIED` what is set.
    Secrets such as HF_TOKEN are none of them.
    """
    defaults = {**device.environment, **profile.environment}
    values = {name: environ.get(name, default) for name, default in defaults.items()}
    values |= {name: environ[name] for name in CARRIED if name in environ}
    values["DS_ACCELERATOR"] = device.deepspeed_accelerator
    return {name: value for name, value in values.items() if not name.startswith(EXPORTED + device.exported_prefixes)}


def write_deepspeed_env(variables: Mapping[str, str], folder: Path) -> Path:
    """Write the file from which `deepspeed`, started in `folder`, takes variables for the ranks of all machines.

    Its name is .deepspeed_env, or what DS_ENV_FILE says. DeepSpeed reads it in the home folder and in the current one,
    whose values win, and splits each line at its first `=`: a blank line or a comment would end it with a traceback.
    Values stay in force until the file is written anew or deleted.

    Raises:
        ValueError: a variable that `needed_elsewhere` does not know; it could be a secret.
        UserError: a value that would not arrive as it is, or a file there that holds other variables.
    """
    for name, value in variables.items():
        if name not in _known():
            raise ValueError(f"{name} is no variable for other machines")
        if NOT_CARRIED_WHOLE.search(value) or PASSWORD.search(value):
            raise UserError(
                f"{name} cannot be passed to other machines: its value has a password, a line break, a blank at an end "
                'or one of " $ ` \\ %; set it on every machine, and unset it here'
            )
    file = folder / os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    _check_ours(file)
    write_whole(file, "".join(f"{name}={value}\n" for name, value in variables.items()))
    return file


def _known() -> set[str]:
    records = (*DEVICES.values(), *PROFILES.values())
    return {*CARRIED, *(name for record in records for name in record.environment)}


def _check_ours(file: Path) -> None:
    """Every key of an existing file must be one that this module writes: then nothing of somebody else's is lost."""
    if not file.exists():
        return
    keys = [line.partition("=")[0].strip() for line in file.read_text(errors="replace").splitlines()]
    foreign = [key for key in keys if key not in _known()]
    if foreign:
        raise UserError(
            f"{file} was written by somebody else (it has {foreign[0] or 'a blank line'}): move its lines to "
            "~/.deepspeed_env, which DeepSpeed reads as well, or start in another folder"
        )


@dataclass(frozen=True)
class Report:
    """What one rank tells the others: its machine, and its facts by the group of `ADVICE` that they belong to."""

    machine: str
    facts: Mapping[str, Mapping[str, object]]


def common_facts(
    versions: Mapping[str, str],
    commit: str | None,
    plan: Plan,
    data: Prepared,
    base_weights: str,
    checkpoint: Path | None,
) -> dict[str, dict[str, object]]:
    """What must be the same on every rank, or the ranks would wait for one another, or average unlike gradients.

    Where data and checkpoints lie may differ from machine to machine, and so may the profile's name and memory. The
    commit is None where the source is no checkout.
    """
    profile = {name: getattr(plan.profile, name) for name in ("zero_stage", "dtype", "gradient_checkpointing")}
    return {
        "versions": {**versions, **({"git commit": commit} if commit else {})},
        "plan": {
            "seed": plan.recipe.seed,
            **asdict(plan.recipe),
            **asdict(plan.batch),
            **profile,
            "backend": plan.device.type,
            "checkpoint": checkpoint.name if checkpoint else "none",
        },
        "base model": {"base weights with checksum": base_weights},
        "data": {
            "training data with checksum": data.checksum,
            "training samples": len(data.training),
            "steps": data.steps,
        },
    }


def agree(facts: Mapping[str, Mapping[str, object]]) -> dict[str, list[int]]:
    """Compare `facts` over all ranks; the ranks of each machine, by its name.

    Every rank must call it, and every rank raises the same UserError when one differs. A fact that a rank does not tell
    differs from nothing.
    """
    reports: list[Report] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, Report(socket.gethostname(), facts))
    if difference := find_difference(reports):
        raise UserError(difference)
    machines: dict[str, list[int]] = {}
    for rank, report in enumerate(reports):
        machines.setdefault(report.machine, []).append(rank)
    return machines


def find_difference(reports: Sequence[Report]) -> str | None:
    """One line on the first fact that is not the same in all reports, which come in the order of their ranks."""
    for group, advice in ADVICE.items():
        told = [report.facts[group] for report in reports]
        for name in dict.fromkeys(name for facts in told for name in facts):
            shown = {rank: str(facts[name]) for rank, facts in enumerate(told) if name in facts}
            counts = Counter(shown.values()).most_common()  # where two are equally many, the lower rank's comes first
            if len(counts) > 1:
                usual = counts[0][0]
                rank = next(rank for rank, value in shown.items() if value != usual)
                others = "the rest" if len(counts) == 2 else "most"
                return f"rank {rank} on {reports[rank].machine} has {name} {shown[rank]}, {others} {usual}: {advice}"
    return None


def where(machines: Mapping[str, Sequence[int]]) -> str:
    """One line: how many ranks run on which machine."""
    return "machines: " + ", ".join(f"{name} ({len(ranks)} ranks)" for name, ranks in machines.items())
