"""A batch in which every sample has an adapter of its own equals the samples one by one."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration, GPT2Config, GPT2LMHeadModel

import sora_hw
from sora_hw.conditioning import PRESETS

NAMES = ["first", "__base__", "second", "second", "first"]


def config(method, targets, **options):
    options = {"r": 4, "init_weights": False, "dropout": 0.1} | options
    return sora_hw.ConditionedConfig(method=method, target_modules=targets, **options)


def one_by_one(model, x, **inputs):
    outputs = []
    for i, name in enumerate(NAMES):
        sample = x[i : i + 1]
        if name == "__base__":
            with model.disable_adapter():
                outputs.append(model(sample, **inputs))
        else:
            model.set_adapter(name)
            outputs.append(model(sample, **inputs))
    return outputs


@pytest.mark.parametrize("method", PRESETS)
def test_every_sample_is_under_its_adapter(method):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv1d(3, 8, 3), nn.Linear(6, 10), nn.Linear(10, 4)).double()
    model = get_peft_model(base, config(method, ["0", "1"]), "first")
    model.add_adapter("second", config("sora", ["1", "2"], r=2))
    model.eval()
    x = torch.randn(5, 3, 8, dtype=torch.float64)
    mixed = model(x, adapter_names=NAMES)
    expected = torch.cat(one_by_one(model, x))
    assert (mixed - expected).abs().max() < 1e-12
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(model(x, adapter_names=NAMES), model(x))


def test_gpt2_with_its_transposed_layers_and_its_embedding():
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=32)).double()
    model = get_peft_model(base, config("sora", ["c_attn", "wte"]), "first")
    model.add_adapter("second", config("dora", ["c_fc"]))
    model.eval()
    x = torch.randint(0, 50, (5, 7))
    mixed = model(x, adapter_names=NAMES).logits
    assert (mixed - torch.cat([out.logits for out in one_by_one(model, x)])).abs().max() < 1e-10


def test_a_beam_search_of_an_encoder_decoder():
    """The decoder sees every sample once for every beam, the encoder sees it once."""
    torch.manual_seed(0)
    sizes = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    bart = BartConfig(d_model=16, encoder_layers=1, decoder_layers=1, vocab_size=40, init_std=0.5, **sizes)
    model = get_peft_model(BartForConditionalGeneration(bart), config("sora", ["q_proj", "fc1"]), "first")
    model.add_adapter("second", config("post_ortho", ["v_proj"]))
    model.eval()
    x = torch.randint(4, 40, (5, 6))
    how = {"num_beams": 3, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    mixed = model.generate(input_ids=x, adapter_names=NAMES, **how)
    for i, name in enumerate(NAMES):
        if name != "__base__":
            model.set_adapter(name)
            assert torch.equal(model.generate(input_ids=x[i : i + 1], **how)[0], mixed[i])


def test_what_a_mixed_batch_cannot_be_is_refused():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), config("sora", ["0"]), "first")
    x = torch.randn(2, 4)
    with pytest.raises(ValueError, match="training mode"):
        model.train()(x, adapter_names=["first"] * 2)
    model.eval()
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): other"):
        model(x, adapter_names=["first", "other"])
    with pytest.raises(ValueError, match="got 3 and 2 respectively"):
        model(x, adapter_names=["first"] * 3)
    model.merge_adapter()
    with pytest.raises(ValueError, match="there are merged adapters"):
        model(x, adapter_names=["first"] * 2)
    model.unmerge_adapter()
    assert model(x, adapter_names=["first", "__base__"]).shape == x.shape  # the hooks of the refusals are gone
