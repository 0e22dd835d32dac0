"""Commonsense reasoning: Commonsense15K, the paper's Table 3.

    deepspeed launchers/commonsense.py --train-data commonsense_15k.json

"paper" below is the SORA paper's section on commonsense reasoning, "LLM-Adapters" the code of Hu et al. (2023) whose
data, prompt and protocol it follows.
"""

from dataclasses import replace

from sora_hw.recipes.recipe import EMBEDDED, Grid, LanguageModelling

DESCRIPTION = "Fine-tune a language model on commonsense questions with a weight-conditioned adapter."


def recipe() -> LanguageModelling:
    """The paper's recipe."""
    return LanguageModelling(
        name="commonsense",
        model="meta-llama/Meta-Llama-3-8B",  # paper, Table 3
        method="sora",
        target_modules=("q_proj", "k_proj", "v_proj", "up_proj", "down_proj"),  # paper
        modules_to_save=(),
        rank=16,  # paper: 4, 8, 16 and 32
        alpha=32,  # paper, for every rank
        rotation_rank=1,  # paper
        rotation="taylor",  # paper
        rotation_scale="bounded",  # paper, Theorem 2
        dropout=0.05,  # default of the authors' script
        train_data=("fw407/Commonsense-15K",),  # paper: Commonsense15K
        records=None,
        max_length=512,  # paper
        learn="text",  # LLM-Adapters: train_on_inputs
        validation_size=120,  # LLM-Adapters: val_set_size
        global_batch=128,  # paper
        epochs=5,  # paper
        max_steps=588,  # paper; no rounding of 5 epochs gives it, so it stands by itself
        warmup_steps=20,  # paper
        learning_rate=4e-4,  # paper
        schedule="cosine",  # paper
        beta1=0.9,  # paper
        beta2=0.999,  # paper
        weight_decay=0.0,  # default of the Trainer, which LLM-Adapters keeps
        max_grad_norm=1.0,  # default of the Trainer, which LLM-Adapters keeps
        seed=42,  # default of the Trainer; the paper runs one seed
        log_steps=1,
        save_steps=80,  # LLM-Adapters
        eval_steps=80,  # LLM-Adapters
        keep_best=False,  # the paper scores the adapter of the last step
    )


def grid() -> Grid:
    """The rows of Table 3 for one method."""
    paper = recipe()
    return Grid(
        learning_rates=(paper.learning_rate,),  # paper: one
        seeds=(paper.seed,),  # paper: one
        ranks=(4, 8, 16, 32),  # paper
        validation_size=paper.validation_size,
    )


def embedded() -> LanguageModelling:
    """The same on the embedded tiny model: what its size needs is different, the method is not."""
    return replace(
        recipe(),
        model=EMBEDDED,
        train_data=(EMBEDDED,),
        max_length=1024,  # the model's own limit: its small vocabulary makes many tokens of a real record
        learn="answer",  # in so few steps the prompt's many tokens would drown out the answer's few
        validation_size=32,
        global_batch=32,
        max_steps=150,
        warmup_steps=10,
        learning_rate=3e-3,
        save_steps=50,
        eval_steps=50,
    )
