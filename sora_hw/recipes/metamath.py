"""Mathematical reasoning: 14,000 questions of MetaMathQA, the paper's Table 4.

    deepspeed launchers/metamath.py --hardware 8x910c

"paper" below is the SORA paper's section on mathematical reasoning, "LLM-Adapters" the code of Hu et al. (2023) whose
prompt it follows.
"""

from dataclasses import replace

from sora_hw.recipes.recipe import EMBEDDED, Grid, LanguageModelling

DESCRIPTION = "Fine-tune a language model on mathematical questions with a weight-conditioned adapter."


def recipe() -> LanguageModelling:
    """The paper's recipe."""
    return LanguageModelling(
        name="metamath",
        model="google/gemma-7b",  # paper, Table 4
        method="sora",
        target_modules=("q_proj", "k_proj", "v_proj", "up_proj", "down_proj"),  # paper
        modules_to_save=(),
        rank=16,  # paper
        alpha=32,  # paper
        rotation_rank=2,  # paper, Table 4
        rotation="taylor",  # paper
        rotation_scale="bounded",  # paper, Theorem 2
        dropout=0.05,  # default of the authors' script
        train_data=("meta-math/MetaMathQA",),  # paper
        records=14_000,  # paper: MetaMathQA 14k; it does not say which, so the seed draws them
        max_length=512,  # paper
        learn="text",  # LLM-Adapters: train_on_inputs
        validation_size=1_400,  # paper: 10 % held out
        global_batch=128,  # paper
        epochs=2,  # paper
        max_steps=192,  # paper; no rounding of 2 epochs gives it, so it stands by itself
        warmup_steps=8,  # paper
        learning_rate=4e-4,  # paper: the best of the three in `grid`; this is the middle one
        schedule="cosine",  # paper
        beta1=0.9,  # paper
        beta2=0.999,  # paper
        weight_decay=0.0,  # default of the Trainer
        max_grad_norm=1.0,  # default of the Trainer
        seed=42,  # default of the Trainer; the paper runs one seed
        log_steps=1,
        save_steps=48,
        eval_steps=48,
        keep_best=False,  # the paper scores the adapter of the last step
    )


def grid() -> Grid:
    """The learning rates among which the paper takes the best, here by the loss on the records held out."""
    paper = recipe()
    return Grid(
        learning_rates=(2e-4, 4e-4, 6e-4),  # paper
        seeds=(paper.seed,),  # paper: one
        ranks=(paper.rank,),  # paper: one
        validation_size=paper.validation_size,
    )


def embedded() -> LanguageModelling:
    """The same on the embedded tiny model, which knows no mathematics: a first step on files of your own."""
    return replace(
        recipe(),
        model=EMBEDDED,
        train_data=(),
        records=None,
        max_length=1024,  # the model's own limit: its small vocabulary makes many tokens of a record
        validation_size=32,
        global_batch=32,
        max_steps=60,
        warmup_steps=8,
        learning_rate=3e-3,
        save_steps=30,
        eval_steps=30,
    )
