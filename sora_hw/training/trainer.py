"""The Trainer of transformers, set up so that a run's losses do not depend on how many ranks share its batches."""

from pathlib import Path

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from torch.nn import functional
from torch.utils.data import Subset
from transformers import (
    DataCollatorForSeq2Seq,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from sora_hw import ConditionedConfig
from sora_hw.data.dataset import IGNORED
from sora_hw.devices.cpu import CPU
from sora_hw.recipes.recipe import Recipe
from sora_hw.training.plan import Plan
from sora_hw.training.prepare import Prepared

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


def add_adapter(model: PreTrainedModel, recipe: Recipe) -> PeftModel:
    """`model` with the recipe's adapter around its layers, initialised by the recipe's seed."""
    set_seed(recipe.seed)
    config = ConditionedConfig(
        method=recipe.method,
        r=recipe.rank,
        alpha=recipe.alpha,
        dropout=recipe.dropout,
        rotation_rank=recipe.rotation_rank,
        rotation=recipe.rotation,
        rotation_scale=recipe.rotation_scale,
        target_modules=list(recipe.target_modules),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def build_trainer(
    model: PeftModel,
    arguments: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    data: Prepared,
    callbacks: list[TrainerCallback],
) -> Trainer:
    """A Trainer that takes the training samples in their order, one after the other, over all ranks together."""
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=Subset(data.training, data.order),
        eval_dataset=data.validation,
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=IGNORED),
        compute_metrics=_validation_loss,
        preprocess_logits_for_metrics=_token_losses,
        callbacks=callbacks,
    )


def _token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(samples, 2): of each sample the sum of its tokens' losses and their number, in place of its logits."""
    targets = labels[:, 1:]
    losses = functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), targets, ignore_index=IGNORED, reduction="none"
    )
    return torch.stack([losses.sum(1), targets.ne(IGNORED).sum(1)], dim=1)


def _validation_loss(prediction: EvalPrediction) -> dict[str, float]:
    """The mean loss over all tokens. It takes the place of the Trainer's mean of batch means, which depends on how the
    samples happened to be batched."""
    total, tokens = np.asarray(prediction.predictions, dtype=np.float64).sum(axis=0)
    return {"loss": total / tokens}
