"""The data of a run: read, checked, tokenised and put in order, before anything is created."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from sora_hw.data.dataset import Samples, checksum, sample_order, split, tokenise
from sora_hw.data.embedded import train_records
from sora_hw.data.records import read_records
from sora_hw.training.plan import Plan


@dataclass(frozen=True)
class Prepared:
    """`order` lists the training sample of every place in every optimiser step; `checksum` covers all records read."""

    training: Samples
    validation: Samples | None
    steps: int
    order: list[int]
    checksum: str

    def tokens_of_steps(self, global_batch: int) -> list[int]:
        """The tokens of each optimiser step, over all ranks, padding not counted."""
        lengths = [len(self.training.input_ids[index]) for index in self.order]
        return [sum(lengths[start : start + global_batch]) for start in range(0, len(lengths), global_batch)]

    def as_dict(self) -> dict[str, object]:
        """What run.json says of the data."""
        parts = [part for part in (self.training, self.validation) if part]
        return {
            "checksum": self.checksum,
            "training_samples": len(self.training),
            "validation_samples": len(self.validation) if self.validation else 0,
            "truncated": sum(part.truncated for part in parts),
            "left_out": sum(part.left_out for part in parts),
            "steps": self.steps,
        }


def prepare(plan: Plan, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """Read the plan's records and make its samples. Raises DataError for what is wrong with them."""
    recipe = plan.recipe
    records = train_records() if plan.asks_embedded_questions else read_records(plan.train_data)
    training_records, validation_records = split(records, recipe.validation_size, recipe.seed)
    training = tokenise(training_records, tokenizer, recipe.max_length, recipe.learn)
    validation = (
        tokenise(validation_records, tokenizer, recipe.max_length, recipe.learn) if validation_records else None
    )
    steps = plan.steps(len(training))
    order = sample_order(len(training), steps * recipe.global_batch, recipe.seed)
    return Prepared(training, validation, steps, order, checksum(records))
