"""The planned memory against figures found another way: counted by hand, tracked elsewhere, measured."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

import sora_hw
from sora_hw.analysis import Memory, Step, changes_that_fit, expected_memory, memory
from sora_hw.analysis.stand_ins import fused_loss_chunk
from sora_hw.analysis.tracking import ACTIVATIONS, LOGITS, Tracker, set_dtype

GIB = 2**30
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
ONE_GPU = Step(1, 512, "bfloat16", gradient_checkpointing=True, zero_stage=2)


def llama_8b(layers):
    sizes = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, num_hidden_layers=layers))


def gemma_7b(layers):
    sizes = {"vocab_size": 256000, "hidden_size": 3072, "intermediate_size": 24576, "head_dim": 256}
    return GemmaForCausalLM(
        GemmaConfig(**sizes, num_attention_heads=16, num_key_value_heads=16, num_hidden_layers=layers)
    )


def deberta(layers):
    attention = {"relative_attention": True, "position_buckets": 256, "norm_rel_ebd": "layer_norm"}
    attention |= {"share_att_key": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
    sizes = {"vocab_size": 128100, "hidden_size": 768, "intermediate_size": 3072}
    return DebertaV2ForSequenceClassification(
        DebertaV2Config(**sizes, **attention, num_hidden_layers=layers, type_vocab_size=0, num_labels=2)
    )


def tiny(layers):
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1000,
            hidden_size=64,
            intermediate_size=96,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_hidden_layers=layers,
        )
    )


def with_lora(base, dropout=0.0):
    config = LoraConfig(r=16, lora_alpha=32, lora_dropout=dropout, target_modules=TARGETS)
    return lambda layers: get_peft_model(base(layers), config)


def conditioned(base, method, r=16, **options):
    config = sora_hw.ConditionedConfig(method=method, r=r, target_modules=TARGETS, **options)
    return lambda layers: get_peft_model(base(layers), config)


def gib(build, layers, step) -> float:
    return expected_memory(build, layers, step, bucket=50_000_000).total / GIB


# --- tracking ---


def test_what_is_released_is_no_longer_counted():
    weight = torch.empty(100, 50, device="meta", requires_grad=True)
    with Tracker([weight], vocabulary=None) as tracker:
        tracker.enter("forward")
        x = torch.empty(10, 50, device="meta")  # 2000 bytes
        kept = (x @ weight.t()).relu()  # twice 4000 bytes, of which the product is released
        tracker.enter("after")
        del kept
        tracker.enter("released")
    assert tracker.peaks == {
        "forward": {ACTIVATIONS: 10_000},
        "after": {ACTIVATIONS: 6_000},
        "released": {ACTIVATIONS: 2_000},
    }


def test_views_cost_nothing_and_the_heads_tensors_have_a_name():
    with Tracker([], vocabulary=50) as tracker:
        tracker.enter("all")
        logits = torch.empty(10, 50, device="meta")
        views = logits.t(), logits[:5], logits.detach()
    assert tracker.peaks == {"all": {LOGITS: 2_000}}
    assert len(views) == 3


# --- the parts, counted by hand ---


def tiny_counts(rank: int = 4):
    """Elements of the tiny model with two layers, and of LoRA on TARGETS."""
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96 + 2 * 64
    base = 2 * layer + 2 * 1000 * 64 + 64
    adapter = 2 * rank * (64 + 64 + 2 * (64 + 32) + 2 * (64 + 96))
    return base, adapter


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
@pytest.mark.parametrize("stage", [1, 2])
def test_what_every_rank_holds(dtype, size, stage):
    base, adapter = tiny_counts()
    step = Step(1, 8, dtype, gradient_checkpointing=False, zero_stage=stage, world_size=2)
    found = expected_memory(conditioned(tiny, "lora", r=4), 2, step, bucket=0)
    inverse_frequencies = 2 * 8 * 4  # rotary embedding: one buffer, and a copy of it, in float32
    assert found.base == base * size + inverse_frequencies
    assert found.adapter == adapter * size
    assert found.optimiser == 12 * adapter // 2


def test_offload_leaves_the_optimiser_in_the_hosts_memory():
    step = Step(1, 8, "bfloat16", False, zero_stage=2, offload=True)
    assert expected_memory(conditioned(tiny, "lora"), 2, step, bucket=0).optimiser == 0


def test_zero_3_shards_the_base_and_gathers_what_it_computes_with():
    base, adapter = tiny_counts()
    step = Step(1, 8, "bfloat16", False, zero_stage=3, world_size=4)
    found = expected_memory(conditioned(tiny, "lora", r=4), 2, step, bucket=0)
    assert found.base == -(-(base * 2 + 64) // 4)
    assert found.buffers == base * 2 + 64  # far fewer than DeepSpeed lets live
    assert found.adapter == adapter * 2 + adapter * 2 // 4


def test_full_fine_tuning_is_16_bytes_a_parameter_and_the_update():
    """ZeRO-1 in bfloat16 on one rank: 2 + 4 + 8 held, and 8 while the gradients are made float32."""
    base, _ = tiny_counts()
    found = expected_memory(tiny, 2, Step(1, 1, "bfloat16", True, zero_stage=1), bucket=0)
    assert found == Memory(base=64, adapter=2 * base, optimiser=12 * base, gradients=8 * base)


def test_four_bits_pack_the_linear_layers_and_leave_head_and_embeddings():
    packed = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96)
    base, _ = tiny_counts()
    step = Step(1, 8, "bfloat16", False, zero_stage=2, four_bit=True)
    found = expected_memory(conditioned(tiny, "lora"), 2, step, bucket=0)
    assert found.base == (base - packed) * 2 + 64 + packed // 2 + packed // 64 * 4
    assert found.buffers == 64 * 96 * 2


def test_the_logits_are_three_float32_copies_in_the_backward_pass():
    """log-softmax, its gradient and that of the logits; those in bfloat16 have been released."""
    step = Step(2, 64, "bfloat16", gradient_checkpointing=True, zero_stage=2)
    assert expected_memory(conditioned(tiny, "lora"), 2, step, bucket=0).logits == 3 * 2 * 64 * 1000 * 4


def test_the_fused_losss_logits_are_of_a_few_tokens():
    # 2048 tokens, 4096 wide: 128256 / 4096 = 31.3 -> 32 parts of 64 tokens.
    assert fused_loss_chunk(2048, 4096, 128256) == 64
    step = Step(4, 512, "bfloat16", True, zero_stage=2, fused_loss=True)
    fused = expected_memory(conditioned(llama_8b, "lora"), 32, step, bucket=0)
    plain = expected_memory(conditioned(llama_8b, "lora"), 32, replace(step, fused_loss=False), bucket=0)
    assert fused.logits <= 64 * 128256 * 2
    assert plain.total - fused.total > 2 * GIB


# --- large models ---


@pytest.mark.parametrize(("micro_batch", "tracked"), [(1, 16.15), (2, 17.0), (4, 18.76)])
def test_llama_8b_with_checkpointing(micro_batch, tracked):
    """Figures of an independent tracking of all 32 layers."""
    step = replace(ONE_GPU, micro_batch=micro_batch)
    assert gib(with_lora(llama_8b, 0.05), 32, step) == pytest.approx(tracked, rel=0.03)


@pytest.mark.parametrize(("micro_batch", "tracked"), [(1, 22.07), (2, 28.9), (4, 42.45)])
def test_llama_8b_without_checkpointing(micro_batch, tracked, monkeypatch):
    """The same tracking: it kept PEFT's adapter in float32, so that every adapted layer kept its input in float32."""

    def all_but_the_adapter(parameters, dtype):
        set_dtype([each for each in parameters if not each.requires_grad], dtype)

    monkeypatch.setattr(memory, "set_dtype", all_but_the_adapter)
    step = replace(ONE_GPU, micro_batch=micro_batch, gradient_checkpointing=False)
    assert gib(with_lora(llama_8b, 0.05), 32, step) == pytest.approx(tracked, rel=0.03)


@pytest.mark.full
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("method", ["lora", "sora"])
def test_the_extrapolation_is_what_all_layers_give(method, checkpointing, monkeypatch):
    build = conditioned(llama_8b, method)
    step = replace(ONE_GPU, gradient_checkpointing=checkpointing)
    planned = gib(build, 32, step)
    monkeypatch.setattr(memory, "FEW", 32)
    monkeypatch.setattr(memory, "MORE", 32)
    assert gib(build, 32, step) == pytest.approx(planned, rel=0.01)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_extrapolation_of_a_small_model_is_what_all_layers_give(checkpointing, monkeypatch):
    build = conditioned(tiny, "sora")
    step = Step(2, 64, "float32", checkpointing, zero_stage=2, accumulation=2)
    planned = expected_memory(build, 7, step, bucket=1000)
    monkeypatch.setattr(memory, "FEW", 7)
    monkeypatch.setattr(memory, "MORE", 7)
    assert expected_memory(build, 7, step, bucket=1000) == planned


@pytest.mark.parametrize(("model", "layers"), [(llama_8b, 32), (gemma_7b, 28)])
def test_the_paper_s_machines(model, layers):
    gpu = Step(4, 512, "bfloat16", True, 2, world_size=4, accumulation=8, fused_loss=True)
    npu = Step(16, 512, "bfloat16", True, 2, world_size=8)
    print(
        "4x4090", gib(conditioned(model, "sora"), layers, gpu), "8x910c", gib(conditioned(model, "sora"), layers, npu)
    )
    assert gib(conditioned(model, "sora"), layers, gpu) < 24
    assert gib(conditioned(model, "sora"), layers, npu) < 64


def test_gemmas_tied_embeddings_count_once():
    found = expected_memory(conditioned(gemma_7b, "lora"), 28, ONE_GPU, bucket=0)
    assert found.base == pytest.approx(8_537_680_896 * 2, rel=1e-6)


def test_deberta_keeps_its_scores():
    """Without a fused attention a layer keeps softmax and dropout of (batch, heads, tokens, tokens)."""
    config = sora_hw.ConditionedConfig(
        method="sora", target_modules=r".*encoder\.layer\.\d+\..*(query_proj|key_proj|value_proj|dense)"
    )
    step = Step(32, 128, "float32", False, zero_stage=2)

    def build(layers: int) -> nn.Module:
        return get_peft_model(deberta(layers), config)

    short, long = (
        expected_memory(build, 12, replace(step, sequence_length=tokens), bucket=0).activations for tokens in (128, 256)
    )
    scores = 12 * 32 * 12 * 128 * 128 * 4  # layers, batch, heads, tokens, bytes
    # Twice the tokens: everything else doubles, a tensor of scores becomes fourfold.
    assert long - 2 * short > 2 * 2 * scores


# --- what makes it fit ---


def sizes(step: Step) -> Memory:
    """10 for the base, halved by ZeRO-3 and quartered in four bits; 4 per sequence, 1 with checkpointing."""
    base = 10 // (2 if step.zero_stage == 3 else 1) // (4 if step.four_bit else 1)
    return Memory(base=base * GIB, activations=step.micro_batch * (1 if step.gradient_checkpointing else 4) * GIB)


def fitting(capacity: int, step: Step, accepts=lambda step: True) -> list[str]:
    return changes_that_fit(step, capacity * GIB, sizes, [1, 2, 4, 8], accepts=accepts)


def test_single_changes_come_in_their_order():
    assert fitting(20, Step(4, 512, "bfloat16", False, 2, world_size=2)) == [
        "a smaller micro-batch (--micro-batch 2): 18.0 GiB",
        "recompute activations (--gradient-checkpointing): 14.0 GiB",
        "pack the base model to four bits (--load-in-4bit): 18.0 GiB",
    ]


def test_pairs_where_no_change_alone_is_enough():
    assert fitting(10, Step(4, 512, "bfloat16", False, 2, world_size=2)) == [
        "a smaller micro-batch (--micro-batch 1) and shard the parameters (--zero-stage 3): 9.0 GiB",
        "a smaller micro-batch (--micro-batch 2) and pack the base model to four bits (--load-in-4bit): 10.0 GiB",
        "recompute activations (--gradient-checkpointing) and shard the parameters (--zero-stage 3): 9.0 GiB",
        "recompute activations (--gradient-checkpointing) and pack the base model to four bits (--load-in-4bit): "
        "6.0 GiB",
    ]


def test_what_the_launcher_refuses_is_not_proposed():
    step = Step(1, 512, "bfloat16", False, 2, world_size=2)
    pair = "shard the parameters (--zero-stage 3) and pack the base model to four bits (--load-in-4bit): 5.0 GiB"
    everything = fitting(5, step)
    assert pair in everything
    everything.remove(pair)
    assert fitting(5, step, accepts=lambda step: not (step.four_bit and step.zero_stage == 3)) == everything


def test_nothing_helps_where_nothing_does():
    assert fitting(1, Step(1, 512, "bfloat16", True, 2)) == []
