"""score_choices against a plain computation, one unpadded text at a time."""

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from sora_hw.data.embedded import MODEL_PATH, candidates, heldout_records
from sora_hw.data.prompts import prompt
from sora_hw.evaluation.choices import score_choices

RECORDS = heldout_records()[:12]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_PATH)


@pytest.fixture(scope="module")
def model(tokenizer):
    """Random weights, large enough to tell the candidates apart; dropout shows whether evaluation mode is used."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
        attention_dropout=0.5,
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def reference(model, tokenizer, record, candidate):
    """Sum of the log-probabilities of the answer's tokens, found by their character offsets."""
    context = prompt(record, for_training=True)
    encoded = tokenizer(context + f"the correct answer is {candidate}", return_offsets_mapping=True)
    ids = encoded["input_ids"]
    model.eval()
    log_probabilities = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)
    # The blanks before "the" belong to the prompt, but the tokenizer may split them differently with an answer behind.
    first = next(i for i, (_, end) in enumerate(encoded["offset_mapping"]) if end >= len(context.rstrip(" ")) + 15)
    return sum(log_probabilities[i - 1, ids[i]].item() for i in range(first, len(ids)))


@pytest.mark.parametrize("batch_size", [1, 3, 16, 1000])
def test_matches_one_text_at_a_time(model, tokenizer, batch_size):
    score = score_choices(model, tokenizer, RECORDS, candidates, "cpu", batch_size=batch_size)
    for record, choice in zip(RECORDS, score.by_record, strict=True):
        expected = {candidate: reference(model, tokenizer, record, candidate) for candidate in candidates(record)}
        assert choice.record is record
        assert list(choice.log_likelihoods) == candidates(record)
        assert choice.log_likelihoods == pytest.approx(expected, abs=2e-5)
        assert choice.chosen == max(expected, key=expected.get)


def test_padding_and_batch_size_do_not_change_the_result(model, tokenizer):
    alone = score_choices(model, tokenizer, RECORDS, candidates, "cpu", batch_size=1)
    together = score_choices(model, tokenizer, RECORDS, candidates, "cpu", batch_size=64)
    for one, other in zip(alone.by_record, together.by_record, strict=True):
        assert one.log_likelihoods == pytest.approx(other.log_likelihoods, abs=1e-5)


def test_accuracy_counts_the_right_choices(model, tokenizer):
    score = score_choices(model, tokenizer, RECORDS, candidates, "cpu")
    correct = sum(choice.chosen == record.answer for record, choice in zip(RECORDS, score.by_record, strict=True))
    assert (score.correct, score.total, score.accuracy) == (correct, len(RECORDS), correct / len(RECORDS))
    assert 0 < score.correct < score.total  # or the count is not tested


@pytest.mark.parametrize("training", [True, False])
def test_the_training_mode_is_restored(model, tokenizer, training):
    model.train(training)
    score_choices(model, tokenizer, RECORDS[:1], candidates, "cpu")
    assert model.training is training


def test_no_graph_is_built(model, tokenizer):
    seen = []
    handle = model.register_forward_hook(lambda _module, _inputs, output: seen.append(output.logits.requires_grad))
    score_choices(model, tokenizer, RECORDS[:1], candidates, "cpu")
    handle.remove()
    assert seen and not any(seen)


def test_candidates_of_different_length_are_summed_not_averaged(model, tokenizer):
    record = RECORDS[0]
    names = ["true", "an answer of many more words than that"]
    score = score_choices(model, tokenizer, [record], lambda _: names, "cpu")
    expected = {name: reference(model, tokenizer, record, name) for name in names}
    assert score.by_record[0].log_likelihoods == pytest.approx(expected, rel=1e-5)


def test_nothing_to_score_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="no records"):
        score_choices(model, tokenizer, [], candidates, "cpu")
