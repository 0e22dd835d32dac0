"""Every kind of method and objective gives the losses, scores and weights of a plain PyTorch loop."""

import json
import math
from dataclasses import dataclass

import pytest
import torch
from peft import LoraConfig, OFTConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

from sora_hw import ConditionedConfig
from sora_hw.data.dataset import sample_order

STEPS, BATCH, RATE, DECAY, SEED = 5, 8, 5e-3, 0.1, 7
ENCODER_LAYERS = r".*encoder\.layer\.\d+\..*(query|key|value|dense)"
HEAD = ["pooler", "classifier"]
ARGUMENTS = [
    *("--max-steps", STEPS, "--global-batch", BATCH, "--micro-batch", 2, "--learning-rate", RATE, "--seed", SEED),
    *("--weight-decay", DECAY, "--rank", 4, "--alpha", 8, "--log-steps", 1, "--save-steps", 100, "--max-length", 64),
]


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """Files of a pair task and of a regression: (training, test) by task, and their records."""
    folder = tmp_path_factory.mktemp("pairs")
    made = {}
    for task in ("rte", "stsb"):
        records = [
            {
                "sentence1": "ab" * (number * 7 % 11 + 1),
                "sentence2": "b" * (number % 5 + 1),
                "label": number * 3 % 2 if task == "rte" else number * 1.7 % 5,
            }
            for number in range(40)
        ]
        files = folder / f"{task}.train.jsonl", folder / f"{task}.test.jsonl"
        for file, part in zip(files, (records[:28], records[28:]), strict=True):
            file.write_text("\n".join(map(json.dumps, part)))
        made[task] = (*files, records[:28], records[28:])
    return made


@dataclass
class Plain:
    """What the loop gives."""

    losses: list[float]
    weights: dict[str, torch.Tensor]
    test_logits: torch.Tensor


def wrapped(model, method):
    common = {"target_modules": ENCODER_LAYERS, "modules_to_save": HEAD, "task_type": "SEQ_CLS"}
    if method == "full":
        return model
    if method == "oft":
        return get_peft_model(model, OFTConfig(r=0, oft_block_size=96, **common))
    if method == "lora_plus":
        return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, **common))
    return get_peft_model(model, ConditionedConfig(method=method, r=4, alpha=8, dropout=0.0, **common))


def plain_loop(encoder, task, training, test, method) -> Plain:
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    kind = "regression" if task == "stsb" else "single_label_classification"
    set_seed(SEED)
    model = AutoModelForSequenceClassification.from_pretrained(
        encoder, num_labels=1 if task == "stsb" else 2, problem_type=kind, dtype=torch.float32
    )
    set_seed(SEED)
    model = wrapped(model, method)
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    groups = [
        {
            "params": [each],
            "lr": RATE * (16 if method == "lora_plus" and ("lora_B" in name or each.ndim == 1) else 1),
            "weight_decay": 0 if name.endswith("bias") or "LayerNorm" in name else DECAY,
        }
        for name, each in trained.items()
    ]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
    rates = [group["lr"] for group in groups]
    order = sample_order(len(training), STEPS * BATCH, SEED)
    losses = []
    for step in range(STEPS):
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - step / STEPS)
        batch = [training[index] for index in order[step * BATCH : (step + 1) * BATCH]]
        logits = torch.cat([logits_of(model, tokenizer, record) for record in batch])
        labels = torch.tensor([record["label"] for record in batch])
        loss = functional.mse_loss(logits[:, 0], labels) if task == "stsb" else functional.cross_entropy(logits, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    with torch.no_grad():
        test_logits = torch.cat([logits_of(model, tokenizer, record) for record in test])
    return Plain(losses, {name: each.detach() for name, each in trained.items()}, test_logits)


def logits_of(model, tokenizer, record):
    """One record by itself: no padding, no batches."""
    return model(**tokenizer(record["sentence1"], record["sentence2"], return_tensors="pt")).logits


CASES = [("rte", "sora", 2), ("stsb", "sora", 2), ("rte", "full", 2), ("rte", "lora_plus", 0), ("stsb", "oft", 0)]


@pytest.mark.parametrize(("task", "method", "ranks"), CASES)
def test_a_plain_loop(task, method, ranks, tmp_path, tiny_encoder, pairs, train):
    train_file, test_file, training, test = pairs[task]
    files = ["--task", task, "--model", tiny_encoder, "--train-data", train_file, "--test-data", test_file]
    run = train(tmp_path / "out", ranks, *files, "--method", method, *ARGUMENTS, launcher="glue.py")
    plain = plain_loop(tiny_encoder, task, training, test, method)
    assert run.losses == pytest.approx(plain.losses, abs=5e-5)
    assert abs(plain.losses[0] - plain.losses[-1]) > 1e-3
    results = run.manifest["results"]
    labels = [record["label"] for record in test]
    if task == "rte":
        right = plain.test_logits.argmax(1).tolist()
        wanted = sum(a == b for a, b in zip(right, labels, strict=True)) / len(test)
        assert results["test"] == {"accuracy": pytest.approx(wanted)}
    else:
        wanted = torch.corrcoef(torch.stack([plain.test_logits[:, 0].double(), torch.tensor(labels).double()]))[0, 1]
        assert results["test"] == {"pearson": pytest.approx(wanted.item(), abs=1e-3)}
    saved = load_file(run.folder / ("model" if method == "full" else "adapter") / FILES[method == "full"])
    for name, value in plain.weights.items():
        stored = saved[name.replace(".modules_to_save.default", "").replace(".default", "")]
        assert torch.allclose(stored, value, atol=2e-4), name
    assert math.isfinite(results["final_loss"])


FILES = {True: "model.safetensors", False: "adapter_model.safetensors"}


def test_a_tuned_model_loads_by_itself(tmp_path, tiny_encoder, pairs, train):
    train_file, *_ = pairs["rte"]
    files = ["--task", "rte", "--model", tiny_encoder, "--train-data", train_file]
    run = train(tmp_path / "out", 0, *files, "--method", "full", *ARGUMENTS, "--zero-stage", 3, launcher="glue.py")
    assert run.manifest["results"]["test"] == {} and run.manifest["results"]["trainable_percent"] == 100
    again = train(tmp_path / "more", 0, *files, *ARGUMENTS, "--model", run.folder / "model", launcher="glue.py")
    assert again.losses[0] < run.losses[0]
