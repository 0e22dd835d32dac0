"""Modules and tokens beside the adapter, in a model whose output layer is its embedding."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import sora_hw


def base():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=20, tie_word_embeddings=True, pad_token_id=0)).eval()


def config(**options):
    options = {"target_modules": ["q_proj"], "ensure_weight_tying": True} | options
    return sora_hw.ConditionedConfig(r=2, init_weights=False, dropout=0.0, **options)


def test_a_tied_module_trains_as_one(tmp_path):
    model = get_peft_model(base(), config(modules_to_save=["embed_tokens"]))
    body, head = model.base_model.model.model, model.base_model.model.lm_head
    embedding = body.embed_tokens.modules_to_save["default"].weight
    assert head.modules_to_save["default"].weight is embedding
    x = torch.tensor([[3, 7, 1]])
    embedding.data.add_(torch.randn_like(embedding))
    before = model(x).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(base(), tmp_path)(x).logits, before)


@pytest.mark.parametrize("method", ["lora", "dora", "sora"])
def test_trained_tokens_travel_and_merge_with_the_adapter(method, tmp_path):
    model = get_peft_model(base(), config(method=method, trainable_token_indices=[3, 7]))
    tokens = model.base_model.model.model.embed_tokens.token_adapter
    tokens.trainable_tokens_delta["default"].data.add_(1.0)
    x = torch.tensor([[3, 7, 1]])
    before = model(x).logits
    with model.disable_adapter():
        assert (model(x).logits - before).abs().max() > 1e-2
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(base(), tmp_path)(x).logits, before)
    merged = model.merge_and_unload()
    assert (merged(x).logits - before).abs().max() < 1e-5
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


def test_an_adapter_on_a_tied_embedding_is_not_tied():
    with pytest.raises(ValueError, match="ensure_weight_tying does not go with adapters on tied layers"):
        get_peft_model(base(), config(target_modules=["embed_tokens"]))
