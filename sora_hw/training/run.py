"""One fine-tuning run, from the checks to what it leaves behind, in the order in which it happens."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch.distributed as dist
from transformers import PreTrainedTokenizerBase, PrinterCallback, Trainer, set_seed
from transformers.integrations import TensorBoardCallback, is_tensorboard_available

from sora_hw.errors import UserError
from sora_hw.recipes.recipe import EMBEDDED
from sora_hw.terminal import Console
from sora_hw.training.arguments import TENSORBOARD, Request
from sora_hw.training.base_model import (
    BaseModel,
    check_fused_loss,
    check_model,
    check_tokens,
    find,
    identity,
    load_model,
    load_tokenizer,
)
from sora_hw.training.callbacks import Clock, EngineCheck, LastLoss, ProgressBar
from sora_hw.training.checkpoints import together
from sora_hw.training.deepspeed_config import check_loaded, deepspeed_config, release
from sora_hw.training.demo import score_demo
from sora_hw.training.divergence import Diverged
from sora_hw.training.machines import agree, common_facts, where
from sora_hw.training.methods import add_method
from sora_hw.training.objectives import Objective, objective_of
from sora_hw.training.peers import Peers
from sora_hw.training.plan import Plan
from sora_hw.training.prepare import Prepared, prepare
from sora_hw.training.ranks import leave, start
from sora_hw.training.report import draw_losses, facts, now, print_results, what_runs
from sora_hw.training.run_folder import CURVE, EVENTS, RunFolder, fingerprint, open_folder
from sora_hw.training.saving import save_trained, trainable_rate
from sora_hw.training.signals import Interrupted, StopOnSignal
from sora_hw.training.trainer import build_trainer, training_arguments

OTHER_COLUMNS = (
    "runtime",
    "samples_per_second",
    "steps_per_second",
    "epoch",
    "loss",
    "step",
)  # of the Trainer's metrics


@dataclass(frozen=True)
class Job:
    """A run whose every part has been checked."""

    request: Request
    plan: Plan
    objective: Objective
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


def check(request: Request, plan: Plan) -> Job:
    """Model, data and output folder, looked at before any of them is touched. Raises UserError."""
    if request.report_to == TENSORBOARD and not is_tensorboard_available():
        raise UserError("--report-to tensorboard: it is not installed; pip install 'sora_hw[report]'")
    objective = objective_of(plan.recipe)
    base = find(plan.recipe.model, objective)
    largest_tensor = check_model(base, plan.recipe)
    if plan.profile.fused_loss and not request.dry_run:
        check_fused_loss(base)
    tokenizer = load_tokenizer(base, objective)
    data = prepare(objective, tokenizer)
    check_tokens(base, data.largest_token, data.longest)
    wanted = fingerprint(plan, data.steps, data.checksum, identity(base))
    folder = open_folder(request, plan, wanted)
    return Job(request, plan, objective, base, tokenizer, data, deepspeed_config(plan, largest_tensor), folder, wanted)


def announce(job: Job, console: Console) -> None:
    """Tell what runs where, on what, before it starts."""
    recipe = job.plan.recipe
    if recipe.model == EMBEDDED:
        console.print("base model: the embedded tiny one; --model FOLDER_OR_ID takes another")
    if recipe.asks_embedded_questions:
        console.print("data: the embedded questions; --train-data FILE... takes others")
    data = job.data.as_dict()
    cut = f"{data['truncated']} cut at {recipe.max_length} tokens, {data['left_out']} left out"
    if data["truncated"] is None:
        cut = f"tokenised as they are taken, cut at {recipe.max_length} tokens"
    console.print(
        f"{data['training_samples']} training samples ({cut}), {data['validation_samples']} held out for validation, "
        f"{data['steps']} steps"
    )
    console.print(what_runs(job.plan))
    for line in job.folder.passed_over:
        console.print(line)
    if job.folder.checkpoint:
        console.print(f"resuming from {job.folder.checkpoint}")
    elif job.request.resume:
        console.print(f"no checkpoint in {job.folder.path} yet: starting afresh")


def train(job: Job, console: Console) -> None:
    """Train on all ranks, and leave adapter or model, curve and run.json in the job's folder.

    Raises, on every rank, Diverged when a loss is not finite, and Interrupted when a signal has ended it: run.json then
    says so. Raises LostPeer where another rank is gone.
    """
    settings = start(job.plan)
    known = facts(job.plan.device)
    weights = job.fingerprint["base_weights"]
    same = common_facts(known["versions"], known["git_commit"], job.plan, job.data, weights, job.folder.checkpoint)
    machines = agree(same)
    if len(machines) > 1:
        console.print(where(machines))
    global_batch = job.plan.recipe.global_batch
    clock = Clock(job.data.tokens_of_steps(global_batch), len(job.data.training), global_batch)
    stop, peers = StopOnSignal(), Peers(job.plan.profile.peer_timeout)
    trainer = make_trainer(job, clock, stop, peers, console)
    manifest = {**known, **job.as_dict(), "argv": list(job.request.argv), "machines": machines}
    manifest |= {"environment": settings.environment, "device_settings": settings.device}
    manifest |= {"fingerprint": job.fingerprint, "resumed_from": str(job.folder.checkpoint or "") or None}
    with together(job.folder.path):
        if dist.get_rank() == 0:
            job.folder.create(job.request.overwrite)
            job.folder.write_manifest({**manifest, "status": "started"})

    try:
        with stop.listening(), peers:
            trainer.train(resume_from_checkpoint=str(job.folder.checkpoint) if job.folder.checkpoint else None)
        results = None if stop.stopped_by else finish(job, trainer, clock)
    except Diverged:
        save_state(job, trainer)
        record(job, {**manifest, "status": "diverged", "finished": now()})
        release(trainer.model_wrapped)
        raise
    if stop.stopped_by:
        record(job, {**manifest, "status": "interrupted", "finished": now()})
        release(trainer.model_wrapped)
        leave()  # together: when one rank ends, a launcher ends the others
        raise Interrupted(stop.stopped_by)
    record(job, {**manifest, "status": "finished", "finished": now(), "results": results})
    if dist.get_rank() == 0:
        print_results(results, job.plan.device, console)
    release(trainer.model_wrapped)
    dist.barrier()


def make_trainer(job: Job, clock: Clock, stop: StopOnSignal, peers: Peers, console: Console) -> Trainer:
    """The model with its adapter in a Trainer; the order matters, see `training_arguments`."""
    arguments = training_arguments(job.plan, job.data.steps, job.folder.path, job.deepspeed)
    set_seed(job.plan.recipe.seed)  # a head that the base model lacks is drawn while it is loaded
    base = load_model(job.base, job.plan.profile)
    check_loaded(base, job.plan)
    model = add_method(base, job.plan.recipe, job.objective.task_type, job.plan.profile.zero_stage)
    callbacks = [clock, LastLoss()] + ([ProgressBar(clock, console)] if dist.get_rank() == 0 else [])
    if job.request.report_to == TENSORBOARD:
        board = TensorBoardCallback()
        board.logging_dir = str(job.folder.path / EVENTS)  # in the place of a folder named after date and machine
        callbacks.append(board)

    def measure() -> dict[str, float]:
        return {"tokens_per_second": clock.lap(), "peak_memory_gib": job.plan.device.peak_memory_bytes() / 2**30}

    trainer = build_trainer(model, arguments, job.tokenizer, job.objective, job.data, callbacks, measure, stop, peers)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(EngineCheck(trainer, job.plan))
    return trainer


def finish(job: Job, trainer: Trainer, clock: Clock) -> dict[str, object]:
    """Save what was trained, state and curve, score what the run was asked to score; the results for run.json."""
    validation = validate(trainer) if job.data.validation else {}
    test = trainer.evaluate(job.data.test, metric_key_prefix="test") if job.data.test else {}
    trained = job.folder.trained(job.plan.recipe)
    save_trained(trainer.model, trained, job.plan.profile.zero_stage, job.tokenizer)
    save_state(job, trainer)
    with together(job.folder.path):
        if dist.get_rank() == 0:
            draw_losses(trainer.state.log_history, job.objective.loss_unit, job.folder.path / CURVE)
    demo = None
    if job.plan.recipe.asks_embedded_questions:
        demo = asdict(score_demo(job.base, job.tokenizer, trained, job.plan.profile, trainer.args.device))
    return {
        "steps": trainer.state.global_step,
        "final_loss": final_loss(trainer),
        "validation_loss": _finite(validation.get("eval_loss")),
        "validation": _own_metrics(validation, "eval_"),
        "test": _own_metrics(test, "test_"),
        "seconds": clock.elapsed,
        "tokens_per_second": clock.tokens_per_second,
        "peak_memory_bytes": job.plan.device.peak_memory_bytes(),
        "trainable_percent": trainable_rate(trainer.model),
        trained.name: str(trained),
        "embedded_questions": demo,
    }


def record(job: Job, manifest: Mapping[str, object]) -> None:
    """Write run.json. Every rank must call it, and raises UserError where rank 0 cannot."""
    with together(job.folder.path):
        if dist.get_rank() == 0:
            job.folder.write_manifest(manifest)


def save_state(job: Job, trainer: Trainer) -> None:
    """Write trainer_state.json. Every rank must call it, and raises UserError where rank 0 cannot."""
    with together(job.folder.path):
        trainer.save_state()


def final_loss(trainer: Trainer) -> float:
    """The training loss that was logged last."""
    return next(entry["loss"] for entry in reversed(trainer.state.log_history) if "loss" in entry)


def validate(trainer: Trainer) -> dict[str, float]:
    """The validation metrics of what is kept, measured unless they just were."""
    measured = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    if measured and measured[-1]["step"] == trainer.state.global_step and not trainer.args.load_best_model_at_end:
        return measured[-1]
    return trainer.evaluate()


def _finite(value: float | None) -> float | None:
    """JSON has no name for what is not finite."""
    return value if value is not None and math.isfinite(value) else None


def _own_metrics(measured: dict[str, float], prefix: str) -> dict[str, float | None]:
    """The objective's metrics beside the loss, by their names."""
    named = {name.removeprefix(prefix): value for name, value in measured.items()}
    return {name: _finite(value) for name, value in named.items() if name not in OTHER_COLUMNS}
