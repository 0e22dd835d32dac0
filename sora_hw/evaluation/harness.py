"""Answers by likelihood: lm-evaluation-harness' tasks, prompts and metrics, zero-shot.

A task is the harness' own, whose data it fetches from the Hugging Face hub, or for local records one of ours from
`harness_tasks`, which asks in the same words. The harness is imported only where it is needed: it takes seconds.
"""

import hashlib
import importlib.util
import json
import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sora_hw.data.records import ChoiceRecord
from sora_hw.errors import UserError
from sora_hw.evaluation.scorer import Scorer
from sora_hw.evaluation.tasks import Task

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

TASKS_OF_OURS = Path(__file__).parent / "harness_tasks"
FIELDS = {"acc": "correct", "acc_norm": "correct_normalised"}  # of a prediction, by the harness' metrics


def check_installed() -> None:
    """Raises UserError where the harness is missing."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "likelihoods are scored by lm-evaluation-harness, which is not installed: pip install 'sora_hw[eval]', or "
            "use --protocol generation"
        )


def harness_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> "HFLM":
    """The harness' wrapper of a causal language model, bare or wrapped by PEFT; `batch_size` texts at a time."""
    _silence()
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)


def local_task(task: Task, records: Sequence[ChoiceRecord]) -> "ConfigurableTask":
    """Our task file of the harness' task, over `records`. Raises UserError for records that it cannot ask."""
    _silence()
    import datasets
    from lm_eval.api.task import ConfigurableTask

    if task.name == "winogrande" and (wrong := [each.id for each in records if "_" not in each.question]):
        raise UserError(f'{wrong[0]}: the "question" of a winogrande record needs a blank, "_"')
    documents = [{**vars(each), "choices": list(each.choices)} for each in records]
    config = yaml.safe_load((TASKS_OF_OURS / f"{task.harness}.yaml").read_text())
    data = {"custom_dataset": lambda **_: {config["test_split"]: datasets.Dataset.from_list(documents)}}
    return ConfigurableTask(config=config | data)


def official_task(task: Task) -> "ConfigurableTask":
    """The harness' own task, with its data from the hub. Raises UserError where the hub cannot give it."""
    _silence()
    manager = _manager()
    try:
        return manager.load([task.harness])["tasks"][task.harness]
    except Exception as error:  # whatever stands between here and the hub fails in its own way
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"{task.harness}: the hub cannot give the harness' data ({reason}); give local files with --data FOLDER"
        ) from None


@cache
def _manager() -> "TaskManager":
    """The harness' index of its tasks, which takes it seconds to make."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _silence() -> None:
    """Its notes on every task would bury what the program has to say."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


class HarnessChoices(Scorer):
    """Questions of one task of the harness, answered by the choice of the highest likelihood. See `Scorer`."""

    def __init__(self, task: Task, harness_task: "ConfigurableTask", model: "HFLM"):
        self.task, self.harness_task, self.model = task, harness_task, model
        self.documents = list(harness_task.eval_docs)
        self.requests = [self._requests(index) for index in range(len(self.documents))]
        self.lengths = [max(sum(map(len, each.args)) for each in requests) for requests in self.requests]
        self.metrics = tuple(FIELDS[name] for name in harness_task.aggregation() if name in FIELDS)
        asked = [[each.args for each in requests] for requests in self.requests]
        golds = [self._gold(document) for document in self.documents]
        self.fingerprint = hashlib.sha256(json.dumps([asked, golds]).encode()).hexdigest()

    def _requests(self, index: int) -> list:
        """A context with every continuation, as the harness puts them together for this record."""
        document = self.documents[index]
        context = self.harness_task.fewshot_context(document, num_fewshot=0)
        return self.harness_task.construct_requests(document, context, metadata=(self.task.harness, index, 1))

    def _gold(self, document: dict) -> int:
        task = self.harness_task
        return int(task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document))

    @torch.no_grad()
    def predict(self, batch: Sequence[int]) -> list[dict[str, object]]:
        requests = [request for index in batch for request in self.requests[index]]
        results = iter(self.model.loglikelihood(requests, disable_tqdm=True))
        return [self._judged(index, [next(results) for _ in self.requests[index]]) for index in batch]

    def _judged(self, index: int, results: list[tuple[float, bool]]) -> dict[str, object]:
        document = self.documents[index]
        values = [float(value) for value, _ in results]
        measured = self.harness_task.process_results(document, results)
        return {
            "id": document.get("id"),
            "log_likelihoods": values,
            "chosen": int(np.argmax(values)),
            "gold": self._gold(document),
            **{FIELDS[name]: bool(value) for name, value in measured.items() if name in FIELDS},
            "cut": self._is_cut(index),
        }

    def _is_cut(self, index: int) -> bool:
        """Whether the harness had to cut the beginning of a text to fit the model."""
        longest = max(len(self.model.tok_encode("".join(request.args))) for request in self.requests[index])
        return longest > self.model.max_length + 1
