"""The losses of a run do not depend on ranks or ZeRO stage: each must equal a plain PyTorch loop over whole batches."""

import math

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from sora_hw import ConditionedConfig
from sora_hw.data.dataset import sample_order, split
from sora_hw.data.prompts import training_text
from sora_hw.data.records import read_records

STEPS, BATCH, WARMUP, RATE, SEED, HELD_OUT = 6, 8, 2, 5e-3, 11, 5
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
ARGUMENTS = [
    *("--max-steps", STEPS, "--global-batch", BATCH, "--micro-batch", 2, "--warmup-steps", WARMUP),
    *("--learning-rate", RATE, "--seed", SEED, "--validation-size", HELD_OUT, "--max-length", 320, "--dropout", 0),
    *("--rank", 4, "--alpha", 8, "--weight-decay", 0.1, "--save-steps", 100, "--eval-steps", 100),
]


# SORA on every number of ranks and stage; DoRA, which reads the sharded weight, where it lies whole and where not.
RUNS = [
    *(("sora", 2, stage) for stage in (0, 1, 2, 3)),
    *(("sora", 0, 3), ("dora", 0, 2), ("dora", 2, 3, "--gradient-checkpointing")),
]
# Alone there is nothing to shard, and what the stages 0 to 2 do there they do on two ranks as well.
MORE_RUNS = [*(("sora", 0, stage) for stage in (0, 1, 2)), ("dora", 2, 3)]


@pytest.fixture(scope="session")
def references(tiny_model, records_file):
    """By method (losses, validation loss, adapter) of the same optimisation without Trainer or DeepSpeed."""
    return {method: plain_loop(method, tiny_model, records_file) for method in ("sora", "dora")}


def plain_loop(method, tiny_model, records_file):
    records, held_out = split(read_records([records_file]), HELD_OUT, SEED)
    order = sample_order(len(records), STEPS * BATCH, SEED)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    set_seed(SEED)
    config = ConditionedConfig(method=method, r=4, alpha=8, dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    losses = []
    for step in range(STEPS):
        for group in optimiser.param_groups:
            group["lr"] = RATE * _cosine(step)
        loss = _loss(model, tokenizer, [records[index] for index in order[step * BATCH : (step + 1) * BATCH]])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    with torch.no_grad():
        validation = _loss(model, tokenizer, held_out).item()
    adapter = {name: value for name, value in model.named_parameters() if value.requires_grad}
    return losses, validation, adapter


def _cosine(step):
    if step < WARMUP:
        return step / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))


def _loss(model, tokenizer, records):
    """Mean over all predicted tokens of the records, each read by itself: no padding, no batches."""
    total, count = 0.0, 0
    for record in records:
        ids = torch.tensor([[*tokenizer(training_text(record))["input_ids"], tokenizer.eos_token_id]])[:, :320]
        logits = model(input_ids=ids).logits[0, :-1]
        total = total + functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
        count += ids.shape[1] - 1
    return total / count


@pytest.mark.parametrize(
    "case",
    [*RUNS, *(pytest.param(case, marks=pytest.mark.full) for case in MORE_RUNS)],
    ids=lambda case: "{} {} ranks ZeRO-{} {}".format(*case, "").rstrip(),
)
def test_losses_validation_and_adapter_equal_the_plain_loop(
    case, references, tmp_path, tiny_model, records_file, train
):
    method, ranks, stage, *more = case
    data = ["--model", tiny_model, "--train-data", records_file]
    run = train(tmp_path / "out", ranks, *data, "--method", method, "--zero-stage", stage, *ARGUMENTS, *more)
    losses, validation, adapter = references[method]
    assert len(run.losses) == STEPS and losses[-1] < losses[0] - 0.1, "the run is long enough to show a wrong update"
    assert run.losses == pytest.approx(losses, abs=5e-5)
    assert run.manifest["results"]["validation_loss"] == pytest.approx(validation, abs=5e-5)
    saved = load_file(run.folder / "adapter" / "adapter_model.safetensors")
    assert len(saved) == len(adapter)
    for name, value in adapter.items():
        stored = saved[name.replace(".default", "")]
        assert stored.shape == value.shape
        assert torch.allclose(stored, value, atol=2e-4), name


@pytest.mark.parametrize(
    ("ranks", "stage"), [(0, 3), *(pytest.param(*case, marks=pytest.mark.full) for case in ((0, 2), (2, 3)))]
)
def test_bfloat16_learns_as_float32_does(train, references, tiny_model, records_file, tmp_path, ranks, stage):
    """As far as its rounding lets it; what is saved are the optimiser's float32 weights."""
    given = ["--model", tiny_model, "--train-data", records_file, "--dtype", "bfloat16", "--zero-stage", stage]
    run = train(tmp_path / "out", ranks, *given, *ARGUMENTS)
    losses, _, adapter = references["sora"]
    assert run.losses == pytest.approx(losses, abs=1e-3), "they were within 3e-4"
    saved = load_file(run.folder / "adapter" / "adapter_model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float32}
    for name in adapter:
        stored = saved[name.replace(".default", "")]
        assert not torch.equal(stored, stored.bfloat16().float()), name
