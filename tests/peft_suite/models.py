"""Tiny random models under the names that PEFT's tests ask the hub for, as folders below the working directory.

`from_pretrained` takes a name for a folder where there is one, so with these nothing needs a hub.
"""

from pathlib import Path

import torch
import transformers as t
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

_VOCABULARY = 1024
# The row of the padding token in an embedding is zero, and PEFT's inputs are the tokens 1 and 2.
_TOKENS = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 5}
_SPECIAL = ("<s>", "<unk>", "</s>", "<mask>", "<sep>", "<pad>")

_DECODER = {
    **_TOKENS,
    "vocab_size": _VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_GPT = {**_TOKENS, "vocab_size": _VOCABULARY, "n_positions": 128, "n_embd": 32, "n_layer": 5, "n_head": 4}
_ENCODER = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": 128,
    "type_vocab_size": 16,
}
_DEBERTA = _ENCODER | {
    "relative_attention": True,
    "position_biased_input": False,
    "type_vocab_size": 0,
    "pos_att_type": ["c2p", "p2c"],
}


def _models() -> dict[str, tuple[type, object]]:
    """Name -> class and configuration."""
    opt = t.OPTConfig(
        **_TOKENS,
        vocab_size=_VOCABULARY,
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=4,
        num_hidden_layers=5,
        num_attention_heads=4,
        max_position_embeddings=100,
    )
    gpt2 = t.GPT2Config(**_GPT)
    llama = t.LlamaConfig(**_DECODER | {"num_key_value_heads": 4})
    bart = t.BartConfig(
        **_TOKENS,
        vocab_size=_VOCABULARY,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=4,
        decoder_ffn_dim=4,
        init_std=0.2,
        max_position_embeddings=128,
        decoder_start_token_id=2,
        forced_eos_token_id=2,
    )
    t5 = t.T5Config(
        vocab_size=_VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=37,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=1,
        pad_token_id=1,
        eos_token_id=2,
    )
    bert, roberta = t.BertConfig(**_ENCODER, pad_token_id=0), t.RobertaConfig(**_ENCODER, **_TOKENS)
    gemma = t.Gemma3TextConfig(**_DECODER | {"head_dim": 4, "sliding_window": 32})
    return {
        "peft-internal-testing/tiny-random-OPTForCausalLM": (t.OPTForCausalLM, opt),
        "peft-internal-testing/opt-125m": (t.OPTForCausalLM, opt),
        "peft-internal-testing/tiny-random-GPT2LMHeadModel": (t.GPT2LMHeadModel, gpt2),
        "hf-internal-testing/tiny-random-gpt2": (t.GPT2LMHeadModel, gpt2),
        "gpt2": (t.GPT2LMHeadModel, gpt2),
        "peft-internal-testing/tiny-random-GPTJForCausalLM": (t.GPTJForCausalLM, t.GPTJConfig(**_GPT, rotary_dim=4)),
        "trl-internal-testing/tiny-random-LlamaForCausalLM": (t.LlamaForCausalLM, llama),
        "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (t.LlamaForSequenceClassification, llama),
        "hf-internal-testing/tiny-random-MistralForCausalLM": (t.MistralForCausalLM, t.MistralConfig(**_DECODER)),
        "peft-internal-testing/tiny-dummy-qwen2": (
            t.Qwen2ForCausalLM,
            t.Qwen2Config(**_DECODER | {"hidden_size": 8, "intermediate_size": 32}),
        ),
        "trl-internal-testing/tiny-Qwen3ForCausalLM": (
            t.Qwen3ForCausalLM,
            t.Qwen3Config(**_DECODER | {"head_dim": 4}),
        ),
        "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (t.Gemma3ForCausalLM, gemma),
        "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (t.T5ForConditionalGeneration, t5),
        "peft-internal-testing/tiny-random-BartForConditionalGeneration": (t.BartForConditionalGeneration, bart),
        "peft-internal-testing/tiny-random-BertModel": (t.BertModel, bert),
        "peft-internal-testing/tiny-random-BertForSequenceClassification": (t.BertForSequenceClassification, bert),
        "bert-base-uncased": (t.BertForSequenceClassification, bert),
        "peft-internal-testing/tiny-random-RobertaModel": (t.RobertaModel, roberta),
        "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
            t.RobertaForSequenceClassification,
            roberta,
        ),
        "peft-internal-testing/tiny-random-DebertaModel": (
            t.DebertaModel,
            t.DebertaConfig(**_DEBERTA, max_relative_positions=-1, pad_token_id=0),
        ),
        "peft-internal-testing/tiny-random-DebertaV2Model": (
            t.DebertaV2Model,
            t.DebertaV2Config(**_DEBERTA, max_relative_positions=-1, pad_token_id=0),
        ),
    }


def save_models(folder: Path) -> None:
    """Write every model with a byte-level tokenizer, and the one LoRA adapter that a test of configurations reads."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        BPE(vocab={token: i for i, token in enumerate([*_SPECIAL, *alphabet])}, merges=[], unk_token="<unk>")
    )
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = t.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
    )
    for name, (model_class, config) in _models().items():
        torch.manual_seed(0)
        model_class(config).save_pretrained(folder / name)
        fast.save_pretrained(folder / name)
    adapter = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapter.save_pretrained(folder / "peft-internal-testing/tiny-opt-lora-revision")


if __name__ == "__main__":
    save_models(Path.cwd())
