"""The faults of the campaign: what happens when, to which rank, and what must then be said and gone on from."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file

RUN = "sora_hw.training.run"
TRAINER = "sora_hw.training.trainer"
CHECKPOINTS = "sora_hw.training.checkpoints"
SAVING = "sora_hw.training.saving"

FULL_DISK = r"No space left on device"
GONE = r"rank {} on \S+ no longer answers: "
TOO_LARGE = r"[Ff]ile too large|cannot be written"


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        what: what happens.
        when: at which moment, for the table.
        injected: what `faulty` does, in the first run and, where there are more, in the ones that resume it; None where
            all that happens is done to the folder of a run that was killed.
        ranks: those that it happens to.
        stage: ZeRO's.
        told: a regular expression for what the run must say of it, without a traceback; None where it can say nothing.
        harm: what is done to the files after that. The run that goes on must name it, by `names`.
        refused: what is done to the files, must be refused by a line that holds `names`, and is then undone.
        survives: it is no fault: the run goes on to its end.
        cold: by `deepspeed` as a user calls it, not by warm processes.
        disk: on a small disk of its own, which takes the right to mount one.
        short: in `make test` too.
    """

    what: str
    when: str
    injected: tuple[dict[str, object], ...]
    ranks: tuple[int, ...] = (0,)
    stage: int = 2
    told: str | None = None
    harm: Callable[[Path], None] | None = None
    refused: Callable[[Path], Callable[[], None]] | None = None
    names: str | None = None
    survives: bool = False
    cold: bool = False
    disk: bool = False
    short: bool = False

    @property
    def name(self) -> str:
        return f"{self.what}, {self.when}"


def at(target: str, action: str = "kill", value: object = None, **more: object) -> dict[str, object]:
    """What `faulty` is to do; see there."""
    usual = {"reached": 0, "call": 1, "holding": "", "half": False, "patience": None}
    return usual | {"target": target, "action": action, "value": value} | more


def killed(when: str, target: str, ranks: tuple[int, ...] = (0,), stage: int = 2, **more: object) -> Fault:
    """The rank that is left says which is gone, while it trains: before and after that it is the launcher's to say."""
    chosen = {name: more.pop(name) for name in ("cold", "short") if name in more}
    trains = 0 < more.get("reached", 0) < 6 and len(ranks) == 1
    told = GONE.format(ranks[0]) if trains else None
    return Fault("SIGKILL", when, (at(target, **more),), ranks, stage, told=told, **chosen)


def full(when: str, target: str, told: str = FULL_DISK, ranks: tuple[int, ...] = (0,), stage: int = 2, **more: object):
    """The system's own answer on a full disk, where a call asks it."""
    short = more.pop("short", False)
    return Fault("disk full", when, (at(target, "fail", "ENOSPC", **more),), ranks, stage, told=told, short=short)


def cut(when: str, target: str, size: int, ranks: tuple[int, ...] = (0,), stage: int = 2, **more: object) -> Fault:
    """A file that really cannot grow further, halfway through."""
    return Fault("file cut off", when, (at(target, "limit", size, **more),), ranks, stage, told=TOO_LARGE)


def signalled(number: str, to: str, when: str, target: str, ranks=(0,), stage: int = 2, cold=False, **more) -> Fault:
    reached = {"rank": "the rank", "twice": "the rank twice", "launcher": "the launcher", "all": "all processes"}[to]
    return Fault(f"{number} to {reached}", when, (at(target, "send", (number, to), **more),), ranks, stage, cold=cold)


FORWARD = "transformers:LlamaForCausalLM.forward"
KILLED_IN_STEP_6 = (at(FORWARD, reached=5),)  # when there are two checkpoints, of steps 2 and 4


def damaged(what: str, harm: Callable[[Path], None], names: str, stage: int = 2, short: bool = False) -> Fault:
    return Fault("SIGKILL", f"in step 6; {what}", KILLED_IN_STEP_6, (0, 1), stage, harm=harm, names=names, short=short)


def refused(what: str, change: Callable[[Path], Callable[[], None]], names: str, stage: int = 2) -> Fault:
    return Fault("SIGKILL", f"in step 6; {what}", KILLED_IN_STEP_6, (0, 1), stage, refused=change, names=names)


def in_newest(name: str, harm: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda room: harm(room / "run" / "checkpoint-4" / name)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def take_from_the_one_before(file: Path) -> None:
    shutil.copy(file.parent.with_name("checkpoint-2") / file.name, file)


def rename_the_one_before(room: Path) -> None:
    shutil.rmtree(room / "run" / "checkpoint-4")
    shutil.copytree(room / "run" / "checkpoint-2", room / "run" / "checkpoint-4")


def leave_halves(room: Path) -> None:
    """As of runs that were killed while they wrote or deleted a checkpoint."""
    for name in ("checkpoint-6.part", "checkpoint-2.old", "checkpoint-4.old"):
        shutil.copytree(room / "run" / "checkpoint-4", room / "run" / name)
        (room / "run" / name / "state-0.safetensors").unlink()
    (room / "run" / "run.json.part").write_text('{"status": ')
    (room / "run" / "adapter.part").mkdir()
    (room / "run" / "adapter.part" / "adapter_config.json").write_text("{")


def vanish(name: str) -> Callable[[Path], Callable[[], None]]:
    def change(room: Path) -> Callable[[], None]:
        (room / name).rename(room / "elsewhere")
        return lambda: (room / "elsewhere").rename(room / name)

    return change


def rewrite(name: str, new: Callable[[Path], None]) -> Callable[[Path], Callable[[], None]]:
    def change(room: Path) -> Callable[[], None]:
        before = (room / name).read_bytes()
        new(room / name)
        return lambda: (room / name).write_bytes(before)

    return change


def change_an_answer(file: Path) -> None:
    file.write_text(file.read_text().replace("answer is true", "answer is nay", 1))


def cut_a_line(file: Path) -> None:
    file.write_text(file.read_text()[:-9])


def other_weights(file: Path) -> None:
    """Of the same model, as if somebody had gone on training it."""
    save_file({name: tensor + 1e-3 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})


def other_layers(file: Path) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | {"intermediate_size": 128}))


FAULTS: list[Fault] = [
    # A rank that is gone, at every moment of a run.
    killed("before the ranks meet", f"{RUN}:start", (1,), 2, cold=True),
    killed("while data is read", "sora_hw.training.objectives.language_modelling:read_records", (0,), 3),
    killed("while the ranks meet", "deepspeed:init_distributed", (0,), 3),
    killed("before the model is loaded", f"{RUN}:load_model", (0, 1), 0),
    killed("while run.json is first written", "os:replace", (0,), 1, holding="run.json"),
    killed("in the first forward pass", FORWARD, (1,), 2),
    killed("in the forward pass of step 4", FORWARD, (0,), 2, reached=3, short=True),
    killed("in the forward pass of step 4", FORWARD, (0, 1), 3, reached=3, cold=True),
    killed("before the backward pass of step 3", "deepspeed:DeepSpeedEngine.backward", (1,), 2, reached=2),
    killed("between two backward passes of step 4", "deepspeed:DeepSpeedEngine.backward", (0,), 1, reached=3, call=2),
    killed("in the reduction of step 4's gradients", "deepspeed.comm:all_reduce", (1,), 2, reached=3, call=2),
    killed("in the reduction of step 4's gradients", "torch.distributed:reduce_scatter_tensor", (1,), 3, reached=3),
    killed("before step 3 of the optimiser", "torch.optim:AdamW.step", (0,), 2, reached=2),
    killed("in step 4 of the optimiser, one rank's part done", "torch.optim:AdamW.step", (1,), 3, reached=3),
    killed("in the forward pass of step 5", FORWARD, (1,), 0, reached=4),
    killed("after step 4, before its checkpoint", f"{TRAINER}:MethodTrainer._save_checkpoint", (0,), 2, reached=4),
    killed(
        "writing checkpoint-4: half a file of tensors", f"{CHECKPOINTS}:save_file", reached=4, half=True, short=True
    ),
    killed("writing checkpoint-4: between two files", f"{TRAINER}:save_trained", (0, 1), 3, reached=4),
    killed("writing checkpoint-4: half its adapter", f"{SAVING}:sync", (0,), 2, reached=4),
    killed("writing checkpoint-4: half of rank 1's random state", "torch:save", (1,), 2, reached=4, half=True),
    killed("writing checkpoint-4: before its seal", f"{CHECKPOINTS}:_seal", (0,), 0, reached=4),
    killed("writing checkpoint-4: the seal not renamed", "os:replace", (0,), 3, reached=4, holding="checkpoint.json"),
    killed("writing checkpoint-4: sealed, not renamed", "os:rename", (0,), 2, holding="checkpoint-4.part", cold=True),
    killed("writing checkpoint-2, the first", "os:rename", (0,), 1, holding="checkpoint-2.part"),
    killed("after checkpoint-6 is there, before the old one goes", f"{TRAINER}:prune", (0,), 2, reached=6),
    killed("deleting checkpoint-2: put aside", "shutil:rmtree", (0,), 2, reached=6, holding="checkpoint-2.old", call=2),
    killed("writing the adapter: nothing yet", f"{RUN}:save_trained", (1,), 3),
    killed("writing the adapter: half its weights", "peft.peft_model:safe_save_file", (0,), 2, call=4, half=True),
    killed("writing the adapter: not renamed", "pathlib:Path.rename", (0,), 2, reached=6, call=2, short=True),
    killed("after the adapter, before trainer_state.json", "transformers:Trainer.save_state", (0,), 3),
    killed(
        "writing trainer_state.json: half of it",
        "transformers.trainer_callback:TrainerState.save_to_json",
        (0,),
        2,
        reached=6,
        call=2,
        half=True,
    ),
    killed("writing run.json at the end", "os:replace", (0,), 2, reached=6, holding="run.json"),
    Fault(
        "SIGKILL three times",
        "in steps 4, 4 and 6",
        (at(FORWARD, reached=3), at(FORWARD, reached=3), at(FORWARD, reached=5)),
        (1,),
        3,
    ),
    # A disk that takes no more.
    full("making the folder of checkpoint-4", "pathlib:Path.mkdir", reached=4, holding="checkpoint-4.part"),
    full("syncing checkpoint-4", "os:fsync", ranks=(0,), stage=3, reached=4),
    full("renaming checkpoint-4", "os:rename", holding="checkpoint-4.part", short=True),
    full("renaming the adapter", "pathlib:Path.rename", stage=3, reached=6, call=2),
    full("writing run.json at the start", "os:fsync", stage=0),
    cut("writing the tensors of checkpoint-4", f"{CHECKPOINTS}:save_file", 4096, reached=4),
    cut("writing the adapter of checkpoint-4", "peft.peft_model:safe_save_file", 4096, stage=3, reached=4),
    cut("writing rank 1's random state", "torch:save", 1000, ranks=(1,), stage=0, reached=4),
    cut("writing the seal of checkpoint-4", f"{CHECKPOINTS}:_seal", 100, reached=4),
    cut("writing the adapter's weights", "peft.peft_model:safe_save_file", 4096, stage=2, call=4),
    cut("writing trainer_state.json at the end", "transformers:Trainer.save_state", 100, stage=2),
    cut("drawing loss.png", f"{RUN}:draw_losses", 100, stage=3),
    cut("writing run.json at the end", "sora_hw.training.run_folder:write_whole", 100, stage=2, reached=6),
    Fault(
        "disk full (a real one)",
        "writing checkpoint-4",
        (at(f"{TRAINER}:write_state", "fill", 8192, reached=4),),
        told=FULL_DISK,
        disk=True,
    ),
    Fault(
        "disk full (a real one)",
        "writing the adapter",
        (at(f"{RUN}:save_trained", "fill", 8192),),
        stage=3,
        told=FULL_DISK,
        disk=True,
    ),
    Fault(
        "disk read-only",
        "making the folder of checkpoint-4",
        (at("pathlib:Path.mkdir", "fail", "EROFS", holding="checkpoint-4.part"),),
        told="Read-only file system",
    ),
    Fault(
        "disk read-only",
        "deleting checkpoint-2",
        (at("os:rename", "fail", "EROFS", reached=6, holding="checkpoint-2.old"),),
        told="Read-only file system",
    ),
    Fault(
        "disk read-only",
        "renaming the adapter",
        (at("pathlib:Path.rename", "fail", "EROFS", reached=6, call=2),),
        told="Read-only file system",
    ),
    Fault(
        "disk read-only",
        "writing run.json at the end",
        (at("os:replace", "fail", "EROFS", reached=6, holding="run.json"),),
        told="Read-only file system",
    ),
    # A rank that stands still for ever: the others must say which.
    Fault("a rank freezes", "in step 4", (at(FORWARD, "freeze", reached=3, patience=8),), (1,), 2, told=GONE.format(1)),
    Fault("a rank freezes", "in step 3", (at(FORWARD, "freeze", reached=2, patience=8),), (0,), 3, told=GONE.format(0)),
    Fault(
        "a rank freezes",
        "writing checkpoint-4",
        (at(f"{CHECKPOINTS}:save_file", "freeze", reached=4, patience=8),),
        told=GONE.format(0),
    ),
    # Numbers that are none.
    Fault(
        "NaN in one rank's activations",
        "in step 3",
        (at("torch.nn:Embedding.forward", "spoil", "nan", reached=2),),
        (1,),
        2,
        told=r"the loss of step 3 is nan on rank 1, .* with the records even/",
    ),
    Fault(
        "infinity in one rank's loss",
        "in step 4",
        (at(FORWARD, "spoil", "inf", reached=3),),
        (0,),
        3,
        told=r"the loss of step 4 is inf on rank 0",
    ),
    # Files that are not what they were.
    refused("the data is gone", vanish("records.jsonl"), "records.jsonl"),
    refused("a word of the data is another", rewrite("records.jsonl", change_an_answer), "train_data", 3),
    refused("the data is cut off", rewrite("records.jsonl", cut_a_line), "records.jsonl"),
    refused("the base model is gone", vanish("model"), "model"),
    refused("the base model has other layers", rewrite("model/config.json", other_layers), "different models", 3),
    refused("the base model has other weights", rewrite("model/model.safetensors", other_weights), "base_weights"),
    refused("run.json is cut off", rewrite("run/run.json", truncate), "run.json is missing or damaged"),
    damaged(
        "checkpoint-4 has half a file", in_newest("state-0.safetensors", truncate), "state-0.safetensors is damaged"
    ),
    damaged(
        "checkpoint-4 has a flipped bit",
        in_newest("rng_state_1.pth", flip),
        "rng_state_1.pth is damaged",
        short=True,
    ),
    damaged("checkpoint-4 lacks a file", in_newest("schedule.json", os.unlink), "schedule.json is missing", 0),
    damaged("checkpoint-4 lacks its seal", in_newest("checkpoint.json", os.unlink), "checkpoint.json is missing"),
    damaged(
        "checkpoint-4 has a file of checkpoint-2",
        in_newest("state-0.safetensors", take_from_the_one_before),
        "state-0.safetensors is damaged",
        3,
    ),
    damaged("checkpoint-4 is checkpoint-2 renamed", rename_the_one_before, "it is that of step 2"),
    Fault("SIGKILL", "in step 6; .part and .old lie about", KILLED_IN_STEP_6, (0, 1), harm=leave_halves),
    # Signals.
    signalled("SIGTERM", "all", "before the ranks meet", f"{RUN}:start"),
    signalled("SIGTERM", "rank", "in step 3", FORWARD, (1,), 3, reached=2),
    signalled("SIGUSR1", "rank", "in step 5", FORWARD, (0,), 2, reached=4),
    signalled("SIGINT", "rank", "writing checkpoint-4", f"{TRAINER}:write_state", (1,), 2, reached=4),
    signalled("SIGTERM", "launcher", "in step 3", FORWARD, (0,), 2, reached=2),
    signalled("SIGTERM", "all", "in step 4", FORWARD, (0,), 3, reached=3, cold=True),
    signalled("SIGINT", "all", "in step 3", FORWARD, (1,), 0, reached=2),
    signalled("SIGTERM", "twice", "in step 4", FORWARD, (0,), 2, reached=3),
    signalled("SIGTERM", "launcher", "writing the adapter", f"{RUN}:save_trained", (0,), 2),
    # No faults: the run goes on to its end.
    Fault("a slow rank", "5 s in step 3", (at(FORWARD, "wait", 5, reached=2),), (1,), 2, survives=True),
    Fault("a rank stands still", "5 s in step 4", (at(FORWARD, "freeze", 5, reached=3),), (0,), 3, survives=True),
    Fault(
        "SIGTERM to the rank",
        "in the last micro-step",
        (at(FORWARD, "send", ("SIGTERM", "rank"), reached=5, call=2),),
        (1,),
        2,
        survives=True,
    ),
]
