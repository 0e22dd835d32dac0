"""The paper's runs planned on any machine, without their hardware, their models' weights or their data."""

import json
import re
from dataclasses import replace

import pytest

from sora_hw.cli import main as sora_hw
from sora_hw.recipes import commonsense, glue, metamath
from sora_hw.training.forecast import forecast
from sora_hw.training.launch import main

GIB = 2**30
# By benchmark: recipe module, model, steps, warm-up, learning rate, rates of LoRA and SORA in percent (the paper's
# where it prints them), GiB of the base model in bfloat16.
BENCHMARKS = {
    "commonsense": (commonsense, "meta-llama/Meta-Llama-3-8B", 588, 20, "0.0004, cosine", (0.351, 0.380), 14.96),
    "metamath": (metamath, "google/gemma-7b", 192, 8, "0.0004, cosine", (0.40, 0.47), 15.90),
    "glue": (glue, "microsoft/deberta-v3-base", 390, 0, "0.0008, linear", (1.42, 1.55), 0.34),
}
SETUPS = {"4x4090": (4, 24.0), "8x910c": (8, 64.0)}


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr("socket.socket.connect", lambda *arguments: pytest.fail("the dry run used the network"))
    monkeypatch.chdir(tmp_path)
    yield
    assert list(tmp_path.iterdir()) == [], "a dry run writes nothing"


@pytest.fixture
def forecast_once(monkeypatch):
    """A plan that is shown twice, for people and for programs, is tracked once: that takes seconds."""
    known = {}

    def once(plan, base):
        if repr(plan) not in known:
            known[repr(plan)] = forecast(plan, base)
        return known[repr(plan)]

    monkeypatch.setattr("sora_hw.training.dry_run.forecast", once)


@pytest.fixture(scope="module")
def recipes():
    """The first plan's recipe, by benchmark and method: on other hardware it must be the same."""
    return {}


@pytest.mark.parametrize("method", ["lora", "sora"])
@pytest.mark.parametrize("hardware", SETUPS)
@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_the_twelve_combinations(benchmark, hardware, method, recipes, forecast_once, capsys):
    module, model, steps, warmup, learning_rate, rates, base = BENCHMARKS[benchmark]
    ranks, memory = SETUPS[hardware]
    arguments = ["--dry-run", "--hardware", hardware, "--method", method]
    assert main(module, arguments) == 0
    lines = dict(
        line.split(": ", 1) for line in capsys.readouterr().out.splitlines() if re.match(r"\w[\w ,-]*: ", line)
    )
    assert lines["model"] == model
    assert abs(float(lines["trainable rate"].removesuffix(" %")) - rates[method == "sora"]) < 0.01
    assert lines["steps"] == str(steps) and lines["warm-up"] == f"{warmup} steps"
    assert lines["learning rate"] == learning_rate
    variable = {"4x4090": "NCCL_P2P_DISABLE=1", "8x910c": "PYTORCH_NPU_ALLOC_CONF=expandable_segments:True"}[hardware]
    assert variable in lines["environment"].split()
    batch, *factors = map(int, re.findall(r"\d+", lines["global batch"]))
    assert batch == (32 if benchmark == "glue" else 128) == factors[0] * factors[1] * factors[2] and factors[0] == ranks
    total, available = map(float, re.findall(r"[\d.]+", lines["memory"]))
    parts = {name: float(text.split()[0]) for name, text in lines.items() if name.startswith("memory, ")}
    assert {name.removeprefix("memory, ") for name in parts} == {
        *("base", "adapter", "optimiser", "gradients", "activations", "logits", "buffers")
    }
    assert sum(parts.values()) == pytest.approx(total, abs=0.05) and total < available == memory
    assert parts["memory, base"] == pytest.approx(base, abs=0.02)

    assert main(module, [*arguments, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["model"], plan["steps"], plan["warmup_steps"]) == (model, steps, warmup)
    assert plan["memory_bytes"]["total"] / GIB == pytest.approx(total, abs=0.01) and plan["memory_bytes"]["fits"]
    assert plan["deepspeed"]["zero_optimization"]["stage"] == 2 and plan["deepspeed"]["bf16"]["enabled"]
    assert ("NCCL_P2P_DISABLE" in plan["environment"]) == (hardware == "4x4090")
    assert recipes.setdefault((benchmark, method), plan["recipe"]) == plan["recipe"], "the hardware changes the recipe"


@pytest.mark.parametrize(("options", "change"), [(["--no-gradient-checkpointing"], "--gradient-checkpointing")])
def test_a_plan_that_does_not_fit_says_what_would_make_it_fit(options, change, capsys):
    arguments = ["--dry-run", "--hardware", "4x4090", *options]
    assert main(commonsense, arguments) == 2
    printed = capsys.readouterr()
    assert "of 24.00 GiB on each rank" in printed.out
    message = printed.err.splitlines()[-1]
    needed = float(re.search(r"needs ([\d.]+) GiB on each rank, which has 24.00 GiB", message)[1])
    assert needed > 24
    assert change in message
    assert main(commonsense, ["--dry-run", "--hardware", "4x4090"]) == 0


def test_every_change_that_is_proposed_makes_it_fit(capsys):
    start = ["--dry-run", "--hardware", "4x4090", "--micro-batch", "32", "--no-fused-loss"]
    assert main(commonsense, start) == 2
    ways = capsys.readouterr().err.rpartition("fit: ")[2].split("; or ")
    assert ways
    for way in ways:
        flags = [word for flag in re.findall(r"\((--[^)]*)\)", way) for word in flag.split()]
        planned = float(re.search(r"([\d.]+) GiB", way)[1])
        kept = [] if "--fused-loss" in flags else ["--no-fused-loss"]
        micro_batch = [] if "--micro-batch" in flags else ["--micro-batch", "32"]
        arguments = ["--dry-run", "--json", "--hardware", "4x4090", *kept, *micro_batch, *flags]
        assert main(commonsense, arguments) == 0
        found = json.loads(capsys.readouterr().out)["memory_bytes"]["total"] / GIB
        assert found == pytest.approx(planned, abs=0.06)


@pytest.mark.parametrize(
    ("arguments", "refused"),
    [
        (["--hardware", "4x4090", "--method", "full", "--zero-stage", "3"], {"four_bit": True}),
        (["--hardware", "8x910c", "--no-gradient-checkpointing"], {"four_bit": True}),
    ],
)
def test_no_change_is_proposed_that_the_launcher_would_refuse(arguments, refused, capsys, monkeypatch):
    def fake(step, *rest, accepts):
        return [f"this: {accepts(step)}", f"that: {accepts(replace(step, **refused))}"]

    monkeypatch.setattr("sora_hw.training.forecast.changes_that_fit", fake)
    assert main(commonsense, ["--dry-run", *arguments]) == 2
    assert capsys.readouterr().err.endswith("this: True; or that: False\n")


def test_a_model_whose_configuration_does_not_come_with_the_package(capsys):
    assert main(commonsense, ["--dry-run", "--hardware", "4x4090", "--model", "somebody/large-model"]) == 0
    printed = capsys.readouterr().out
    assert "memory: not known: the configuration of somebody/large-model does not come with this package" in printed


def test_the_steps_of_own_data_follow_from_them(capsys, tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "rte.jsonl"
    file.write_text("\n".join(['{"sentence1": "a", "sentence2": "b", "label": 0}'] * 65))
    assert main(glue, ["--dry-run", "--json", "--hardware", "4x4090", "--train-data", str(file)]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["steps"] == 5 * 3 and plan["recipe"]["test_data"] == []
    file.write_text('{"sentence1": "a"}')
    assert main(glue, ["--dry-run", "--json", "--hardware", "4x4090", "--train-data", str(file)]) == 2
    assert "rte.jsonl: line 1: " in capsys.readouterr().err
    assert main(commonsense, ["--dry-run", "--hardware", "4x4090", "--train-data", "missing.jsonl"]) == 2
    assert capsys.readouterr().err.startswith("error: missing.jsonl")


def test_plan_is_the_dry_run(forecast_once, capsys):
    assert main(glue, ["--dry-run", "--json", "--task", "cola", "--hardware", "8x910c"]) == 0
    dry_run = capsys.readouterr().out
    assert sora_hw(["plan", "glue", "--json", "--task", "cola", "--hardware", "8x910c"]) == 0
    assert capsys.readouterr().out == dry_run
    assert json.loads(dry_run)["steps"] == 5 * 268  # ceil(8551 / 32) batches


class TestAHostfile:
    @pytest.fixture(autouse=True)
    def offline(self, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)

    def test_a_plan_for_several_machines(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        (tmp_path / "hostfile").write_text("node1 slots=8\nnode2 slots=8\n")
        assert sora_hw(["plan", "commonsense", "--hostfile", "hostfile", "--hardware", "8x910c"]) == 0
        assert "global batch: 128 = 16 ranks x 8 micro-batch x 1 accumulation" in capsys.readouterr().out
        lines = (tmp_path / ".deepspeed_env").read_text().splitlines()
        assert "DS_ACCELERATOR=npu" in lines and "HF_HUB_OFFLINE=1" in lines
        assert all(re.fullmatch(r"\w+=.+", line) for line in lines) and "secret" not in "".join(lines)

    def test_machines_that_cannot_share_the_batch(self, tmp_path, capsys):
        (tmp_path / "hostfile").write_text("node1 slots=8\nnode2 slots=4\n")
        assert sora_hw(["plan", "commonsense", "--hostfile", "hostfile", "--hardware", "8x910c"]) == 2
        assert "cannot be split over 12 ranks" in capsys.readouterr().err
        assert not (tmp_path / ".deepspeed_env").exists()
