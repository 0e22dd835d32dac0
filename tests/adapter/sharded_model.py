"""The small model that the programs for ZeRO-3 and FSDP2 shard."""

import torch
from peft import get_peft_model
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

import sora_hw

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]  # Qwen2 has biases on q, k and v
ADAMW = {"lr": 1e-4, "weight_decay": 0.0}


def base_model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=2, num_key_value_heads=1))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


def adapted(base, pre, post):
    torch.manual_seed(1)
    options = {"r": 4, "dropout": 0.0, "init_weights": False, "target_modules": TARGETS}
    return get_peft_model(base, sora_hw.ConditionedConfig(pre=pre, post=post, **options))


def rotated_convolution():
    """A grouped convolution with a rotation, which reads its weight: for inputs (N, 4, length)."""
    config = sora_hw.ConditionedConfig(method="sora", r=2, dropout=0.0, init_weights=False, target_modules=["0"])
    return get_peft_model(nn.Sequential(nn.Conv1d(4, 6, 3, groups=2)), config)
