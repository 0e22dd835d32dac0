"""TRL's trainers with our configuration as their `peft_config`, beside the plain model computed by hand."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import sora_hw
from sora_hw.data.embedded import MODEL_PATH, train_records

trl = pytest.importorskip("trl")

RECORDS = train_records()[:4]
STEPS = 3
METHODS = ("lora", "dora", "prediag", "sora")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_PATH)


@pytest.fixture(scope="module")
def plain():
    return AutoModelForCausalLM.from_pretrained(MODEL_PATH, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def sequences(tokenizer):
    return [tokenizer(f"{record.instruction} {record.output}")["input_ids"] for record in RECORDS]


@pytest.fixture(scope="module")
def pairs(tokenizer):
    """Prompt, chosen and rejected answer of every record, as texts."""
    others = [record.output for record in RECORDS[1:] + RECORDS[:1]]
    return [
        {"prompt": record.instruction, "chosen": f" {record.output}", "rejected": f" not {other}"}
        for record, other in zip(RECORDS, others, strict=True)
    ]


@torch.no_grad()
def log_probabilities(model, ids):
    """Of every token but the first, given those before it; float64."""
    logits = model(torch.tensor([ids])).logits[0, :-1].double()
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def trainer_of(kind, arguments, data, method, plain, tokenizer, folder):
    """A trainer on all records in every step, with TRL's defaults beside that."""
    options = {"max_steps": STEPS, "per_device_train_batch_size": len(RECORDS), "learning_rate": 1e-2, "seed": 0}
    options |= {"use_cpu": True, "bf16": False, "logging_steps": 1, "report_to": "none", "save_strategy": "no"}
    return kind(
        copy.deepcopy(plain),
        args=arguments(str(folder), **options),
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer,
        peft_config=sora_hw.ConditionedConfig(method=method, r=4, task_type="CAUSAL_LM"),
    )


def trained(trainer, plain):
    """The losses of the steps; the base weights are those of the plain model when they are done."""
    trainer.train()
    base = trainer.model.get_base_model().state_dict()
    kept = {name.replace(".base_layer", ""): value for name, value in base.items() if "conditioned_" not in name}
    assert kept.keys() == plain.state_dict().keys()
    assert all(torch.equal(value, kept[name]) for name, value in plain.state_dict().items())
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("method", METHODS)
def test_supervised_fine_tuning(method, plain, tokenizer, sequences, tmp_path):
    data = [{"input_ids": ids} for ids in sequences]
    trainer = trainer_of(trl.SFTTrainer, trl.SFTConfig, data, method, plain, tokenizer, tmp_path)
    losses = trained(trainer, plain)
    first = -torch.cat([log_probabilities(plain, ids) for ids in sequences]).mean().item()
    assert abs(losses[0] - first) < 1e-5
    assert losses[-1] < losses[0] - 1

    trainer.save_model(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "adapter").eval()
    ids = torch.tensor(sequences[:1])
    logits = trainer.model.eval()(ids).logits
    assert torch.equal(loaded(ids).logits, logits)
    assert (logits - plain(ids).logits).abs().max() > 0.1


@pytest.mark.parametrize("method", METHODS)
def test_direct_preference_optimisation(method, plain, tokenizer, pairs, tmp_path):
    trainer = trainer_of(trl.DPOTrainer, trl.DPOConfig, pairs, method, plain, tokenizer, tmp_path)
    losses = trained(trainer, plain)
    assert abs(losses[0] - math.log(2)) < 1e-6
    assert losses[-1] < 0.9 * losses[0]
    batch = next(iter(trainer.get_train_dataloader()))
    reference = torch.cat(trainer.compute_ref_log_probs(trainer.model, batch))  # chosen, then rejected
    rows = zip(batch["input_ids"], batch["attention_mask"].bool(), batch["completion_mask"].bool(), strict=True)
    for (ids, real, completion), value in zip(rows, reference, strict=True):
        expected = log_probabilities(plain, ids[real].tolist())[completion[real][1:]].sum()
        assert abs(value - expected) < 1e-4 * abs(expected)
    assert "ref" not in trainer.model.peft_config and trainer.ref_model is None
