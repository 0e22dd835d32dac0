"""One fine-tuning run, from the command line to the saved adapter, in the order in which it happens."""

import math
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from types import ModuleType

import torch.distributed as dist
from rich.console import Console
from transformers import PreTrainedTokenizerBase, PrinterCallback, Trainer

from sora_hw.data.records import read_records
from sora_hw.errors import UserError
from sora_hw.training.arguments import Request, parse
from sora_hw.training.base_model import (
    EMBEDDED,
    BaseModel,
    check_model,
    check_tokens,
    find,
    is_local,
    load_model,
    load_tokenizer,
)
from sora_hw.training.callbacks import Clock, EngineCheck, LastLoss, ProgressBar
from sora_hw.training.deepspeed_config import check_loaded, deepspeed_config
from sora_hw.training.demo import score_demo
from sora_hw.training.environment import rank, rank_here
from sora_hw.training.machines import agree, common_facts, where
from sora_hw.training.plan import Plan, make_plan
from sora_hw.training.prepare import Prepared, prepare
from sora_hw.training.ranks import silence, start
from sora_hw.training.report import draw_losses, facts, now, print_plan, print_results, what_runs
from sora_hw.training.run_folder import CURVE, RunFolder, fingerprint, open_folder
from sora_hw.training.saving import save_adapter, trainable_rate
from sora_hw.training.trainer import add_adapter, build_trainer, training_arguments
from sora_hw.versions import check_versions

USER_ERROR = 2
FIRST_RANK_SPEAKS = 20  # seconds


@dataclass(frozen=True)
class Job:
    """A run whose every part has been checked."""

    request: Request
    plan: Plan
    base: BaseModel
    tokenizer: PreTrainedTokenizerBase
    data: Prepared
    deepspeed: dict[str, object]
    folder: RunFolder
    fingerprint: dict[str, object]

    def as_dict(self) -> dict[str, object]:
        """The plan and all that followed from it, in JSON's types."""
        resolved = {"data": self.data.as_dict(), "deepspeed": self.deepspeed, "output": str(self.folder.path)}
        return self.plan.as_dict() | resolved


def main(module: ModuleType, argv: Sequence[str] | None = None) -> int:
    """Run the launcher of the recipes in `module`; its exit code: 0, or 2 for an error of the user's."""
    silence()
    try:
        run(module, argv)
    except UserError as error:
        if rank_here() > 0:  # every rank finds the same error; the launcher ends this one when the first has told it
            time.sleep(FIRST_RANK_SPEAKS)
        print("error:", re.sub(r"\s*\n\s*", " ", str(error)), file=sys.stderr)
        return USER_ERROR
    return 0


def run(module: ModuleType, argv: Sequence[str] | None) -> None:
    """Plan, check, train, save and report. Nothing is created before everything has been checked."""
    request = parse(module, argv)
    check_versions()
    plan = make_plan(request, module)
    console = Console(quiet=rank() > 0, highlight=False, soft_wrap=True, markup=False, emoji=False)
    if request.dry_run and not is_local(plan.recipe.model):  # a dry run downloads nothing
        read = {"records": len(read_records(plan.train_data)), "deepspeed": deepspeed_config(plan, None)}
        print_plan(plan.as_dict() | read, console, request.as_json)
        return
    job = check(request, plan, module)
    if request.dry_run:
        print_plan(job.as_dict(), console, request.as_json)
        return
    announce(job, console)
    train(job, console)


def check(request: Request, plan: Plan, module: ModuleType) -> Job:
    """Model, data and output folder, looked at before any of them is touched. Raises UserError."""
    base = find(plan.recipe.model)
    if base.name != EMBEDDED and plan.asks_embedded_questions:
        raise UserError(
            f"--model {base.name} learns from --train-data FILE...: give the records of {module.DATA}, "
            f"or --model {EMBEDDED} for the embedded model and its questions"
        )
    largest_tensor = check_model(base, plan.recipe)
    tokenizer = load_tokenizer(base)
    data = prepare(plan, tokenizer)
    check_tokens(base, data.largest_token, data.longest)
    wanted = fingerprint(plan, data.steps, data.checksum)
    folder = open_folder(request, plan, wanted)
    return Job(request, plan, base, tokenizer, data, deepspeed_config(plan, largest_tensor), folder, wanted)


def announce(job: Job, console: Console) -> None:
    """Tell what runs where, on what, before it starts."""
    if job.plan.recipe.model == EMBEDDED:
        console.print("base model: the embedded tiny one; --model FOLDER_OR_ID takes another")
    if job.plan.asks_embedded_questions:
        console.print("data: the embedded questions; --train-data FILE... takes others")
    data = job.data.as_dict()
    console.print(
        f"{data['training_samples']} training samples ({data['truncated']} cut at {job.plan.recipe.max_length} tokens, "
        f"{data['left_out']} left out), {data['validation_samples']} held out for validation, {data['steps']} steps"
    )
    console.print(what_runs(job.plan))
    if job.folder.checkpoint:
        console.print(f"resuming from {job.folder.checkpoint}")
    elif job.request.resume:
        console.print(f"no checkpoint in {job.folder.path} yet: starting afresh")


def train(job: Job, console: Console) -> None:
    """Train on all ranks, and leave adapter, curve and run.json in the job's folder."""
    settings = start(job.plan)
    known = facts(job.plan.device)
    machines = agree(common_facts(known["versions"], known["git_commit"], job.plan, job.data, job.folder.checkpoint))
    if len(machines) > 1:
        console.print(where(machines))
    main_rank = dist.get_rank() == 0
    global_batch = job.plan.recipe.global_batch
    clock = Clock(job.data.tokens_of_steps(global_batch), len(job.data.training), global_batch)
    trainer = make_trainer(job, clock, console)
    manifest = {**known, **job.as_dict(), "argv": list(job.request.argv), "machines": machines}
    manifest |= {"environment": settings.environment, "device_settings": settings.device}
    manifest |= {"fingerprint": job.fingerprint, "resumed_from": str(job.folder.checkpoint or "") or None}
    if main_rank:
        job.folder.create(job.request.overwrite)
        job.folder.write_manifest({**manifest, "status": "started"})
    dist.barrier()

    trainer.train(resume_from_checkpoint=str(job.folder.checkpoint) if job.folder.checkpoint else None)
    if not math.isfinite(final_loss(trainer)):
        if main_rank:
            job.folder.write_manifest({**manifest, "status": "diverged", "finished": now()})
        raise UserError(
            f"the loss of step {trainer.state.global_step} is {final_loss(trainer)}: the run has diverged, and no "
            "adapter was saved; try a smaller --learning-rate, or more --warmup-steps"
        )
    results = finish(job, trainer, clock)
    if main_rank:
        job.folder.write_manifest({**manifest, "status": "finished", "finished": now(), "results": results})
        print_results(results, job.plan.device, console)
    dist.barrier()
    dist.destroy_process_group()


def make_trainer(job: Job, clock: Clock, console: Console) -> Trainer:
    """The model with its adapter in a Trainer; the order matters, see `training_arguments`."""
    arguments = training_arguments(job.plan, job.data.steps, job.folder.path, job.deepspeed)
    base = load_model(job.base, job.plan.profile.dtype)
    check_loaded(base, job.plan)
    model = add_adapter(base, job.plan.recipe)
    callbacks = [clock, LastLoss()] + ([ProgressBar(clock, console)] if dist.get_rank() == 0 else [])
    trainer = build_trainer(model, arguments, job.tokenizer, job.data, callbacks)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(EngineCheck(trainer, job.plan))
    return trainer


def finish(job: Job, trainer: Trainer, clock: Clock) -> dict[str, object]:
    """Save adapter, state and curve, score what the run was asked to score; the results for run.json."""
    validation_loss = final_validation_loss(trainer) if job.data.validation else None
    if validation_loss is not None and not math.isfinite(validation_loss):
        validation_loss = None  # JSON has no name for it
    save_adapter(trainer.model, job.folder.adapter, job.plan.profile.zero_stage)
    trainer.save_state()
    history = trainer.state.log_history
    if dist.get_rank() == 0:
        draw_losses(history, job.folder.path / CURVE)
    demo = None
    if job.plan.asks_embedded_questions:
        demo = asdict(score_demo(job.base, job.tokenizer, job.folder.adapter, trainer.args.device))
    return {
        "steps": trainer.state.global_step,
        "final_loss": final_loss(trainer),
        "validation_loss": validation_loss,
        "seconds": clock.elapsed,
        "tokens_per_second": clock.tokens_per_second,
        "peak_memory_bytes": job.plan.device.peak_memory_bytes(),
        "trainable_percent": trainable_rate(trainer.model),
        "adapter": str(job.folder.adapter),
        "embedded_questions": demo,
    }


def final_loss(trainer: Trainer) -> float:
    """The training loss that was logged last."""
    return next(entry["loss"] for entry in reversed(trainer.state.log_history) if "loss" in entry)


def final_validation_loss(trainer: Trainer) -> float:
    """The validation loss of the adapter that is kept, measured unless it just was."""
    if trainer.args.load_best_model_at_end:
        return trainer.state.best_metric
    measured = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    if measured and measured[-1]["step"] == trainer.state.global_step:
        return measured[-1]["eval_loss"]
    return trainer.evaluate()["eval_loss"]
