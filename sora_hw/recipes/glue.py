"""Natural language understanding: seven tasks of GLUE, the paper's Tables 2, 5 and 6.

    deepspeed launchers/glue.py --task cola --hardware 4x4090

"paper" below is the SORA paper's section on natural language understanding.
"""

from sora_hw.data.glue import TASKS
from sora_hw.recipes.recipe import Classification, Grid

DESCRIPTION = "Fine-tune an encoder on a task of GLUE with a weight-conditioned adapter."


def recipe(task: str = "rte") -> Classification:
    """The paper's recipe for one of `sora_hw.data.glue.TASKS`."""
    return Classification(
        name=f"glue-{task}",
        model="microsoft/deberta-v3-base",  # paper
        method="sora",
        # paper: every linear layer of the encoder; by the names of DeBERTa, and of BERT and RoBERTa
        target_modules=(r".*encoder\.layer\.\d+\..*(query_proj|key_proj|value_proj|query|key|value|dense)",),
        modules_to_save=("pooler", "classifier"),  # the head: no pre-trained weights, so trained whole
        rank=16,  # paper
        alpha=32,  # the authors' example; the default of their script is 16
        rotation_rank=1,  # paper; Table 6 has 1 to 16
        rotation="taylor",  # paper
        rotation_scale="bounded",  # paper, Theorem 2
        dropout=0.0,  # paper
        task=task,
        train_data=("nyu-mll/glue",),  # paper
        test_data=("nyu-mll/glue",),  # paper: the dev sets
        records=None,
        max_length=128,  # paper
        validation_size=0,  # paper: all records are trained on; `grid` holds some out
        global_batch=128 if task == "qqp" else 32,  # paper
        epochs=5,  # paper
        max_steps=None,
        warmup_steps=0,  # not in the paper
        learning_rate=8e-4,  # paper: the best of the three in `grid`; this is the middle one
        schedule="linear",  # default of the Trainer
        beta1=0.9,  # default of AdamW
        beta2=0.999,  # default of AdamW
        weight_decay=0.01,  # paper
        max_grad_norm=1.0,  # default of the Trainer
        seed=0,  # paper: three seeds, see `grid`
        log_steps=10,
        save_steps=500,
        eval_steps=500,
        keep_best=False,  # the last step is scored
    )


def grid(task: str = "rte") -> Grid:
    """A cell of Table 2: three seeds, with the best of three learning rates."""
    return Grid(
        learning_rates=(1e-3, 8e-4, 4e-4),  # paper
        seeds=(0, 1, 2),  # paper: three
        ranks=(16,),  # paper
        validation_size=min(1_000, TASKS[task].training_records // 10),  # ours: the paper does not say how it chose
    )
