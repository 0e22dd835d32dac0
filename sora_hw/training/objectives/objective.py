"""What every objective must say to the run that learns it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
from transformers import EvalPrediction, PreTrainedTokenizerBase

from sora_hw.data.dataset import Samples
from sora_hw.recipes.recipe import Recipe


class Objective(ABC):
    """One way to learn from records.

    Attributes:
        recipe: the recipe it reads its values from.
        auto_class: transformers' class that loads a model with the right head.
        model_options: values for the model's configuration.
        task_type: PEFT's name for it.
        ends_texts: whether the tokenizer must have an end-of-text token.
        loss_unit: what the loss is counted in.
        loss: None for the model's own loss, which must be a mean over all labels of a global batch; otherwise
            `(outputs, labels, num_items_in_batch) -> loss`.
    """

    auto_class: type
    model_options: Mapping[str, object] = {}
    task_type: str
    ends_texts: bool
    loss_unit: str
    loss: Callable | None = None

    def __init__(self, recipe: Recipe):
        self.recipe = recipe

    @abstractmethod
    def training_records(self) -> list:
        """The records of `recipe.train_data`. Raises DataError for what is wrong with them."""

    @abstractmethod
    def test_records(self) -> list:
        """The records that the trained model is scored on; empty where the run does not score."""

    @abstractmethod
    def tokenise(self, records: Sequence, tokenizer: PreTrainedTokenizerBase) -> Samples:
        """The samples of `records`."""

    @abstractmethod
    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable:
        """Makes a batch of samples."""

    @abstractmethod
    def reduce(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """What is kept of the logits of a batch, (samples, ...), so that `metrics` can be computed of all of them."""

    @abstractmethod
    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """`loss` in nats per label and the objective's own metrics, from what `reduce` kept of all samples. The loss
        takes the place of the Trainer's mean of batch means, which depends on how the samples happened to be batched.
        """
