"""The trainable rates that the paper prints pin its recipes down; counted on the meta device, from shapes alone."""

import pytest
import torch
from peft import get_peft_model
from transformers import (
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

import sora_hw

DECODER_TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
ENCODER_TARGETS = ["query_proj", "key_proj", "value_proj", "dense"]


def deberta():
    """microsoft/deberta-v3-base with a two-class head."""
    attention = {"relative_attention": True, "position_buckets": 256, "norm_rel_ebd": "layer_norm"}
    attention |= {"share_att_key": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
    sizes = {"vocab_size": 128100, "hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072}
    return DebertaV2ForSequenceClassification(DebertaV2Config(**sizes, **attention, type_vocab_size=0, num_labels=2))


def gemma():
    """google/gemma-7b."""
    sizes = {"vocab_size": 256000, "hidden_size": 3072, "num_hidden_layers": 28, "intermediate_size": 24576}
    return GemmaForCausalLM(GemmaConfig(**sizes, num_attention_heads=16, num_key_value_heads=16, head_dim=256))


def llama():
    """meta-llama/Meta-Llama-3-8B."""
    sizes = {"vocab_size": 128256, "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=32, num_key_value_heads=8))


def rate(build, targets, **options) -> float:
    """Adapter parameters in per cent of all parameters: the base model's with its head, and the adapter's."""
    with torch.device("meta"):
        model = get_peft_model(build(), sora_hw.ConditionedConfig(target_modules=targets, **options))
    trainable, total = model.get_nb_trainable_parameters()
    return 100 * trainable / total


def encoder_targets() -> str:
    """Every linear layer of the encoder's blocks; not the pooler, whose layer is called dense as well."""
    return r".*encoder\.layer\.\d+\..*(query_proj|key_proj|value_proj|dense)"


@pytest.mark.parametrize(
    ("method", "rp", "printed"),
    [
        *(("lora", 1, 1.42), ("dora", 1, 1.46), ("prediag", 1, 1.46)),
        *(("sora", rp, rate) for rp, rate in ((1, 1.55), (2, 1.64), (4, 1.81), (8, 2.16), (16, 2.84))),
    ],
)
def test_deberta_v3_base(method, rp, printed):
    assert abs(rate(deberta, encoder_targets(), method=method, r=16, rotation_rank=rp) - printed) < 0.01


@pytest.mark.parametrize(("method", "rp", "printed"), [("lora", 1, 0.40), ("dora", 1, 0.41), ("sora", 2, 0.47)])
def test_gemma_7b(method, rp, printed):
    assert abs(rate(gemma, DECODER_TARGETS, method=method, r=16, rotation_rank=rp) - printed) < 0.01


@pytest.mark.parametrize(
    ("method", "r", "expected"),
    [
        *(("lora", r, rate) for r, rate in ((4, 0.088), (8, 0.176), (16, 0.351), (32, 0.700))),
        *(("sora", r, rate) for r, rate in ((4, 0.117), (8, 0.205), (16, 0.380), (32, 0.729))),
    ],
)
def test_llama_3_8b(method, r, expected):
    assert abs(rate(llama, DECODER_TARGETS, method=method, r=r) - expected) < 0.001
