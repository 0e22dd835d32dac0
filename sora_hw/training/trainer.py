"""The Trainer of transformers, set up so that a run's losses do not depend on how many ranks share its batches."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainerState, TrainingArguments

from sora_hw.devices.cpu import CPU
from sora_hw.errors import UserError
from sora_hw.recipes.recipe import Recipe
from sora_hw.storage import read_json, write_whole
from sora_hw.training.checkpoints import (
    SCHEDULE,
    STATE,
    damage,
    going_on_from,
    prune,
    reading_state,
    state_shapes,
    together,
    write_state,
    writing,
)
from sora_hw.training.divergence import Diverged, explain
from sora_hw.training.engine_state import check_shapes, read_engine, steps_taken, write_moments, write_weights
from sora_hw.training.methods import optimiser
from sora_hw.training.objectives import Objective
from sora_hw.training.peers import Peers
from sora_hw.training.plan import Plan
from sora_hw.training.prepare import Prepared
from sora_hw.training.run_folder import ADAPTER
from sora_hw.training.saving import save_trained
from sora_hw.training.signals import StopOnSignal

LIGER_KERNELS = {  # the loss alone: the rest of the model stays what it is on every device
    "fused_linear_cross_entropy": True,
    "cross_entropy": False,
    "rope": False,
    "rms_norm": False,
    "swiglu": False,
    "geglu": False,
}
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def training_arguments(plan: Plan, steps: int, folder: Path, deepspeed: dict[str, object]) -> TrainingArguments:
    """The Trainer's arguments. They must exist before the model is loaded, or ZeRO-3 does not shard it."""
    recipe, batch = plan.recipe, plan.batch
    return TrainingArguments(
        output_dir=str(folder),
        deepspeed=deepspeed,
        use_cpu=plan.device.type == CPU.type,
        bf16=plan.profile.dtype == "bfloat16",
        per_device_train_batch_size=batch.micro_batch,
        per_device_eval_batch_size=batch.micro_batch,
        gradient_accumulation_steps=batch.accumulation,
        gradient_checkpointing=plan.profile.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        use_liger_kernel=plan.profile.fused_loss,
        liger_kernel_config=LIGER_KERNELS,
        max_steps=steps,
        warmup_steps=recipe.warmup_steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=SCHEDULES[recipe.schedule],
        optim="adamw_torch",
        adam_beta1=recipe.beta1,
        adam_beta2=recipe.beta2,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        seed=recipe.seed,
        train_sampling_strategy="sequential",  # the samples come in the order that they are to be taken
        average_tokens_across_devices=True,  # every token of the global batch weighs the same, whichever rank has it
        logging_steps=recipe.log_steps,
        logging_nan_inf_filter=False,  # it would log a mean in the place of a loss that is not a number
        save_steps=recipe.save_steps,
        eval_strategy="steps" if recipe.validation_size else "no",
        eval_steps=recipe.eval_steps,
        load_best_model_at_end=recipe.keep_best,
        metric_for_best_model="loss" if recipe.keep_best else None,
        label_names=["labels"],
        remove_unused_columns=False,
        disable_tqdm=True,
        log_level_replica="error",
        report_to=[],
    )


class MethodTrainer(Trainer):
    """A Trainer with the optimiser of the recipe's method, and with what `measure` gives beside each logged loss. An
    optimiser that is merely passed to it the Trainer forgets, without a word, when DeepSpeed starts.

    In each micro-step, before anything is learned from it, it tells `peers` how far this rank has come, and the ranks
    agree on whether one of them was asked to stop (see `StopOnSignal`) or has a loss that is not finite, which raises
    Diverged on all of them. `ids` gives the id of a sample's record by its place in the order of training.
    """

    def __init__(
        self,
        recipe: Recipe,
        measure: Callable[[], Mapping[str, float]],
        stop: StopOnSignal,
        peers: Peers,
        ids: Callable[[int], str],
        **options,
    ):
        super().__init__(**options)
        self.recipe, self.measure, self.stop, self.peers, self.ids = recipe, measure, stop, peers, ids
        self.micro_steps = 0  # taken; the engine counts whole steps by this name

    def train(self, resume_from_checkpoint: str | None = None, **options: object):
        if resume_from_checkpoint is not None:
            with going_on_from(Path(resume_from_checkpoint)):
                TrainerState.load_from_json(str(Path(resume_from_checkpoint, STATE)))
        return super().train(resume_from_checkpoint, **options)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ):
        if return_outputs:  # of a validation
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.micro_steps += 1
        self.peers.step()
        found = torch.tensor([0, self.stop.asked()], device=loss.device)
        found[0] = ~torch.isfinite(loss.detach())
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        diverged, self.stop.agreed = found.tolist()
        if diverged:
            raise Diverged(explain(model, inputs, self._records(inputs), loss.detach(), self.state.global_step + 1))
        return loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.model_wrapped.skipped_steps:  # by DeepSpeed under ZeRO, on all ranks and without a word
            raise Diverged(
                f"the gradients of step {self.state.global_step + 1} are not finite, though its loss is: nothing was "
                "learned from them, and no adapter was saved; try a smaller --learning-rate, more --warmup-steps, or "
                "--dtype float32"
            )
        return loss

    def _records(self, inputs: dict[str, Tensor]) -> list[str]:
        """The ids of the records that this micro-batch of this rank holds: ranks take the micro-batches in turn."""
        size, micro_steps = self.args.per_device_train_batch_size, self.args.gradient_accumulation_steps
        taken = self.state.global_step * micro_steps + (self.micro_steps - 1) % micro_steps
        first = (taken * self.args.world_size + self.args.process_index) * size
        return [self.ids(place) for place in range(first, first + size)]

    def _determine_best_metric(self, metrics: dict[str, float], trial: object) -> bool:
        """Of what was measured between two checkpoints nothing is kept, so that it is not the best."""
        saved = self.state.global_step % self.args.save_steps == 0 or self.state.global_step >= self.state.max_steps
        return saved and super()._determine_best_metric(metrics, trial)

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        """Takes the place of the Trainer's, which writes where a checkpoint is looked for, and DeepSpeed's pickles."""
        run, step = Path(self.args.output_dir), self.state.global_step
        best = run / f"checkpoint-{self.state.best_global_step}"
        if self.state.best_global_step:
            self.state.best_model_checkpoint = str(best)
        engine = self.model_wrapped
        with writing(run / f"checkpoint-{step}") as aside:
            write_state(aside, read_engine(engine))
            if isinstance(self.model, PeftModel):
                save_trained(self.model, aside / ADAPTER, engine.zero_optimization_stage(), self.processing_class)
            with together(aside):
                self._save_rng_state(str(aside))
                if self.args.process_index == 0:
                    schedule = {"optimiser_steps": steps_taken(engine), "scheduler": self.lr_scheduler.state_dict()}
                    write_whole(aside / SCHEDULE, json.dumps(schedule, indent=2) + "\n")
                    self.state.save_to_json(str(aside / STATE))
        with together(run):
            if self.args.process_index == 0:
                prune(run, best if self.state.best_global_step else None)

    def _prepare_for_training(self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None):
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)  # DeepSpeed has nothing to load
        if resume_from_checkpoint is not None:
            self._go_on(Path(resume_from_checkpoint))
        return prepared

    def _go_on(self, checkpoint: Path) -> None:
        """From the weights, the moments and the schedule of a checkpoint. The best so far lies beside it, wherever the
        run's folder was when that was written down."""
        engine = self.model_wrapped
        with going_on_from(checkpoint):  # no rank waits for another in it, which may be gone
            check_shapes(engine, state_shapes(checkpoint))
            schedule = read_json(checkpoint / SCHEDULE)
            steps = int(float(schedule["optimiser_steps"]))
            self.lr_scheduler.load_state_dict(schedule["scheduler"])
        with reading_state(checkpoint) as value:
            write_weights(engine, value)
            write_moments(engine, value, steps)
        for group, rate in zip(engine.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        if self.state.best_global_step:
            self.state.best_model_checkpoint = str(checkpoint.with_name(f"checkpoint-{self.state.best_global_step}"))

    def _load_rng_state(self, checkpoint: str) -> None:
        with going_on_from(Path(checkpoint)):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint)
        if reason := damage(best):
            raise UserError(f"{best}, the best of the run, is no longer whole ({reason}): no adapter was saved")
        with reading_state(best) as value:
            write_weights(self.model_wrapped, value)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log({**logs, **self.measure()} if "loss" in logs else logs, start_time)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = optimiser(self.model if model is None else model, self.recipe)
        return super().create_optimizer(model)


def build_trainer(
    model: nn.Module,
    arguments: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    objective: Objective,
    data: Prepared,
    callbacks: list[TrainerCallback],
    measure: Callable[[], Mapping[str, float]],
    stop: StopOnSignal,
    peers: Peers,
) -> Trainer:
    """A Trainer that takes the training samples in their order, one after the other, over all ranks together, and logs
    what `measure` gives with each loss. See `MethodTrainer`."""
    return MethodTrainer(
        objective.recipe,
        measure,
        stop,
        peers,
        lambda place: data.training.id_of(data.order[place]),
        model=model,
        args=arguments,
        train_dataset=Subset(data.training, data.order),
        eval_dataset=data.validation,
        data_collator=objective.collator(tokenizer),
        compute_loss_func=objective.loss,
        compute_metrics=objective.metrics,
        preprocess_logits_for_metrics=objective.reduce,
        callbacks=[*callbacks, stop],
    )
