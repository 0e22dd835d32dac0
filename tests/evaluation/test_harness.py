"""The harness' likelihoods of our task files, against plain sums of log-probabilities in float64."""

import math
from pathlib import Path

import pytest
import torch

from sora_hw.data.records import ChoiceRecord
from sora_hw.errors import UserError
from sora_hw.evaluation import harness
from sora_hw.evaluation.harness import TASKS_OF_OURS, HarnessChoices, harness_model, local_task
from sora_hw.evaluation.tasks import COMMONSENSE, TASKS

# For each task a record, the text before every choice, and the texts whose likelihoods are compared.
ASKED = {
    "boolq": (
        ChoiceRecord("is a robin a bird?", ("true", "false"), 0),
        ["Question: is a robin a bird?\nAnswer:"] * 2,
        [" yes", " no"],
    ),
    "piqa": (
        ChoiceRecord("To mend a chair,", ("use a hammer.", "use a plum."), 1),
        ["Question: To mend a chair,\nAnswer:"] * 2,
        [" use a hammer.", " use a plum."],
    ),
    "social_i_qa": (
        ChoiceRecord("Ann ate a pear. How is she?", ("glad", "a wardrobe", "blue"), 0),
        ["Q: Ann ate a pear. How is she?\nA:"] * 3,
        [" glad", " a wardrobe", " blue"],
    ),
    "hellaswag": (
        ChoiceRecord("Cooking: She takes the pot", ("and fills it.", "to the sea.", "a a a a a", "off."), 3),
        ["Cooking: She takes the pot"] * 4,
        [" and fills it.", " to the sea.", " a a a a a", " off."],
    ),
    "winogrande": (
        ChoiceRecord("The hat was on the shelf because the _ was red.", ("hat", "shelf"), 1),
        ["The hat was on the shelf because the hat", "The hat was on the shelf because the shelf"],
        [" was red.", " was red."],
    ),
    "ARC-Easy": (
        ChoiceRecord("What flies?", ("a 'robin'", "a saw", "a pot"), 0),
        ["Question: What flies?\nAnswer:"] * 3,
        [" a 'robin'", " a saw", " a pot"],
    ),
    "ARC-Challenge": (
        ChoiceRecord("What swims?", ("a trout", "a saw", "a pot", "a bed", "a hat"), 4),
        ["Question: What swims?\nAnswer:"] * 5,
        [" a trout", " a saw", " a pot", " a bed", " a hat"],
    ),
    "openbookqa": (
        ChoiceRecord("A hammer is", ("a tool", "a bird"), 0),
        ["A hammer is"] * 2,
        [" a tool", " a bird"],
    ),
}
OTHER = ChoiceRecord("Which _ of these is it then?", ("true", "false"), 1, id="other")


@torch.no_grad()
def log_likelihood(model, tokenizer, context: str, text: str) -> float:
    """Of every token of `text` behind `context`, one after the other, in float64, each from the tokens before it."""
    start, ids = len(tokenizer(context)["input_ids"]), tokenizer(context + text)["input_ids"]
    model = model.double()
    try:
        total = 0.0
        for place in range(start, len(ids)):
            logits = model(torch.tensor([ids[:place]]), use_cache=False).logits[0, -1]
            total += torch.log_softmax(logits, dim=-1)[ids[place]].item()
        return total
    finally:
        model.float()


def test_every_commonsense_task_has_a_file():
    names = {task.harness for task in TASKS.values() if task.kind == COMMONSENSE}
    assert {file.stem for file in TASKS_OF_OURS.glob("*.yaml")} == names
    assert {TASKS[name].harness for name in ASKED} == names


@pytest.mark.parametrize("name", ASKED)
def test_likelihoods_are_sums_of_log_probabilities(name, embedded_model, embedded_tokenizer):
    record, contexts, texts = ASKED[name]
    expected = [
        log_likelihood(embedded_model, embedded_tokenizer, context, text)
        for context, text in zip(contexts, texts, strict=True)
    ]
    assert len({round(value, 3) for value in expected}) == len(expected)
    lengths = [len(choice) for choice in (("yes", "no") if name == "boolq" else record.choices)]
    normalised = [value / length for value, length in zip(expected, lengths, strict=True)]
    for batch_size in (1, 16):
        scorer = HarnessChoices(
            TASKS[name],
            local_task(TASKS[name], [OTHER, record]),
            harness_model(embedded_model, embedded_tokenizer, batch_size),
        )
        other, found = scorer.predict([0, 1])
        assert found["log_likelihoods"] == pytest.approx(expected, abs=2e-4)
        assert (found["gold"], found["chosen"]) == (record.label, expected.index(max(expected)))
        assert found["correct"] == (found["chosen"] == record.label)
        assert other["id"] == "other" and not found["cut"]
        if name == "winogrande":
            assert scorer.metrics == ("correct",)
        else:
            assert scorer.metrics == ("correct", "correct_normalised")
            assert found["correct_normalised"] == (normalised.index(max(normalised)) == record.label)


def test_the_order_of_the_records_is_free(embedded_model, embedded_tokenizer):
    records = [ASKED[name][0] for name in ("piqa", "openbookqa", "hellaswag")]
    model = harness_model(embedded_model, embedded_tokenizer, 3)
    scorer = HarnessChoices(TASKS["piqa"], local_task(TASKS["piqa"], records), model)
    forwards, backwards = scorer.predict([0, 1, 2]), scorer.predict([2, 1, 0])[::-1]
    for one, other in zip(forwards, backwards, strict=True):
        assert one.pop("log_likelihoods") == pytest.approx(other.pop("log_likelihoods"), abs=1e-3)
        assert one == other
    again = HarnessChoices(TASKS["piqa"], local_task(TASKS["piqa"], records[::-1]), model)
    assert again.fingerprint != scorer.fingerprint
    assert scorer.lengths[2] > scorer.lengths[1]


def test_a_text_that_does_not_fit_is_marked(embedded_model, embedded_tokenizer):
    long = ChoiceRecord("a robin is a bird " * 400, ("true", "false"), 0)
    model = harness_model(embedded_model, embedded_tokenizer, 2)
    scorer = HarnessChoices(TASKS["boolq"], local_task(TASKS["boolq"], [long]), model)
    (found,) = scorer.predict([0])
    assert found["cut"] and all(map(math.isfinite, found["log_likelihoods"]))


def test_a_blank_is_needed():
    records = [OTHER, ChoiceRecord("no blank", ("a", "b"), 0, "second")]
    with pytest.raises(UserError, match='second: the "question" of a winogrande record needs a blank'):
        local_task(TASKS["winogrande"], records)


def test_without_the_harness(monkeypatch):
    harness.check_installed()
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'sora_hw\[eval\]'"):
        harness.check_installed()


def test_without_the_hub(monkeypatch):
    from lm_eval import tasks
    from lm_eval.api.task import ConfigurableTask

    piqa = tasks.TaskManager(include_path=str(Path(tasks.__file__).parent / "piqa"), include_defaults=False)

    def refuse(*arguments, **options):
        raise ConnectionError("Couldn't reach the hub.\nAnd more")

    monkeypatch.setattr(harness, "_manager", lambda: piqa)  # the whole index takes seconds
    monkeypatch.setattr(ConfigurableTask, "download", refuse)
    with pytest.raises(UserError, match=r"piqa: the hub cannot give .* \(Couldn't reach the hub\); give local files"):
        harness.official_task(TASKS["piqa"])


def _official(name: str, record: ChoiceRecord) -> dict[str, object]:
    """The record in the columns of the data that the harness itself fetches."""
    choices, right = list(record.choices), record.label
    letters = list("ABCDE")[: len(choices)]
    lettered = {"choices": {"text": choices, "label": letters}, "answerKey": letters[right]}
    context, _, question = record.question.partition(". ")
    activity, _, start = record.question.partition(": ")
    return {
        "boolq": {"passage": "", "question": record.question.rstrip("?"), "label": 1 - right},
        "piqa": {"goal": record.question, "sol1": choices[0], "sol2": choices[1], "label": right},
        "social_i_qa": {"context": f"{context}.", "question": question, "label": str(right + 1)}
        | dict(zip(("answerA", "answerB", "answerC"), choices, strict=False)),
        "hellaswag": {"activity_label": activity, "ctx_a": start, "ctx_b": "", "endings": choices, "label": str(right)},
        "winogrande": {"sentence": record.question, "option1": choices[0], "option2": choices[1]}
        | {"answer": str(right + 1)},
        "ARC-Easy": {"question": record.question, **lettered},
        "ARC-Challenge": {"question": record.question, **lettered},
        "openbookqa": {"question_stem": record.question, **lettered},
    }[name]


@pytest.mark.parametrize("name", ASKED)
def test_our_files_ask_as_the_harness_does(name, embedded_model, embedded_tokenizer, monkeypatch):
    import datasets
    from lm_eval import tasks
    from lm_eval.api.task import ConfigurableTask

    own = Path(tasks.__file__).parent
    folders = ("super_glue/boolq", "piqa", "siqa", "hellaswag", "winogrande", "arc", "openbookqa")
    manager = tasks.TaskManager(include_path=[str(own / folder) for folder in folders], include_defaults=False)
    monkeypatch.setattr(harness, "_manager", lambda: manager)
    record = ASKED[name][0]
    rows = datasets.Dataset.from_list([_official(name, record)])
    everything = dict.fromkeys(("train", "validation", "test"), rows)
    monkeypatch.setattr(ConfigurableTask, "download", lambda self, *_: setattr(self, "dataset", everything))
    official = harness.official_task(TASKS[name])
    monkeypatch.undo()

    model = harness_model(embedded_model, embedded_tokenizer, 4)
    theirs = HarnessChoices(TASKS[name], official, model)
    ours = HarnessChoices(TASKS[name], local_task(TASKS[name], [record]), model)
    asked = [[request.args for request in scorer.requests[0]] for scorer in (theirs, ours)]
    if name == "boolq":  # with an empty passage, and the answers in the other order
        asked[0] = [(context.lstrip(), text) for context, text in reversed(asked[0])]
    if name == "hellaswag":
        asked[0] = [(context.rstrip(), text) for context, text in asked[0]]
    assert asked[0] == asked[1]
    assert set(theirs.metrics) <= set(ours.metrics)
    assert theirs.predict([0])[0]["correct"] == ours.predict([0])[0]["correct"]
