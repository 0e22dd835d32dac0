"""A random tiny Llama with a tokenizer of bytes, and a few short records: what runs in tests learn, and learn from."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def write_tiny_model(folder: Path) -> Path:
    """A two-layer model of random weights, always the same; its tokens are bytes, its end-of-text is 256."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)} | {"</s>": 256}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=256,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_records(file: Path) -> Path:
    """50 records whose lengths differ widely, so that ranks and micro-batches hold unequal numbers of tokens."""
    records = [
        {
            "instruction": f"Is {number} even?" + " Think." * (number * 7 % 13),
            "output": f"the correct answer is {str(number % 2 == 0).lower()}",
            "answer": str(number % 2 == 0).lower(),
            "id": f"even/{number}",
        }
        for number in range(50)
    ]
    file.write_text("\n".join(map(json.dumps, records)))
    return file
