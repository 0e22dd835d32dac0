"""Batched generation against transformers' own, one unpadded prompt at a time."""

import pytest
import torch

from sora_hw.data.embedded import heldout_records
from sora_hw.data.prompts import prompt
from sora_hw.data.records import Record
from sora_hw.evaluation.generation import NEW_TOKENS, GeneratedAnswers, Generator
from sora_hw.evaluation.tasks import TASKS

TEXTS = [prompt(record, for_training=False) for record in heldout_records()[:12]]
TEXTS += [
    "A robin is",
    "In the garden you would look for a carrot, and",
    "The hammer, the saw and the drill are kinds of",
]


@pytest.fixture(scope="module")
def generator(embedded_model, embedded_tokenizer):
    return Generator(embedded_model, embedded_tokenizer, "cpu", max_new_tokens=24)


@torch.no_grad()
def reference(model, tokenizer, text, max_new_tokens) -> str:
    """The likeliest token after the other, from whole forward passes in float64, without padding or cache."""
    model = model.double()
    try:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        written = []
        while len(written) < max_new_tokens:
            written.append(model(ids, use_cache=False).logits[0, -1].argmax())
            if written[-1] == tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, written[-1].view(1, 1)], dim=1)
        return tokenizer.decode(written, skip_special_tokens=True).strip()
    finally:
        model.float()


def test_the_answers_are_the_likeliest_tokens(generator, embedded_model, embedded_tokenizer):
    together = generator.answer([generator.encode(text) for text in TEXTS])
    assert len(set(together)) > 5  # or nothing is told apart
    for text, answer in zip(TEXTS, together, strict=True):
        assert answer == reference(embedded_model, embedded_tokenizer, text, 24)
        ids = embedded_tokenizer(text, return_tensors="pt")
        own = embedded_model.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert answer == embedded_tokenizer.decode(own, skip_special_tokens=True).strip()


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_batch_makes_no_difference(generator, batch_size):
    prompts = [generator.encode(text) for text in TEXTS]
    parts = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
    assert [answer for part in parts for answer in generator.answer(part)] == generator.answer(prompts)


def test_an_answer_ends_with_the_text(generator, embedded_model, embedded_tokenizer):
    """What stands behind the end of text, as the padding of shorter answers, is no part of it."""
    answer = embedded_tokenizer("true")["input_ids"]
    assert generator._text([*answer, embedded_tokenizer.eos_token_id, *answer]) == "true"
    assert generator._text(answer) == "true"
    embedded_model.generation_config.eos_token_id = [embedded_tokenizer.eos_token_id, answer[-1]]
    try:
        assert Generator(embedded_model, embedded_tokenizer, "cpu", 4)._text(
            [*answer, *answer]
        ) == embedded_tokenizer.decode(answer[:-1])
    finally:
        embedded_model.generation_config.eos_token_id = embedded_tokenizer.eos_token_id


def test_a_prompt_that_leaves_no_room_loses_its_beginning(embedded_model, embedded_tokenizer):
    generator = Generator(embedded_model, embedded_tokenizer, "cpu", max_new_tokens=24)
    positions = embedded_model.config.max_position_embeddings
    ids = embedded_tokenizer("a robin is a bird " * 400)["input_ids"]
    cut = generator.encode("a robin is a bird " * 400)
    assert cut.cut and cut.ids == ids[-(positions - 24) :]
    assert not generator.encode("a robin").cut
    generator.answer([cut, generator.encode("a robin")])


def test_predictions_of_a_task(generator):
    records = [
        Record("Is a robin a bird?\n\nAnswer format: true/false", "", "", gold, f"r{gold}")
        for gold in ("true", "false")
    ]
    scorer = GeneratedAnswers(TASKS["boolq"], records, generator)
    text = generator.answer([generator.encode(prompt(records[0], for_training=False))])[0]
    assert scorer.lengths == [len(generator.encode(prompt(each, for_training=False)).ids) for each in records]
    for number, prediction in zip((1, 0), scorer.predict([1, 0]), strict=True):
        assert prediction["id"] == records[number].id
        assert (prediction["text"], prediction["gold"]) == (text, records[number].answer)
        assert prediction["correct"] == (prediction["extracted"] == records[number].answer)
    other = GeneratedAnswers(TASKS["boolq"], records[::-1], generator)
    assert other.fingerprint != scorer.fingerprint


def test_the_protocols_lengths():
    assert NEW_TOKENS == {"commonsense": 32, "math": 256}
