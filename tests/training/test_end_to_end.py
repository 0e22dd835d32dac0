"""The two runs that a newcomer makes: the embedded default, and the real commonsense records, both on two ranks."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from sora_hw.data.embedded import candidates, heldout_records
from sora_hw.finished.report import write_report
from sora_hw.finished.run import read_run

LOAD = """
import sys, torch, sora_hw
from peft import PeftModel
from transformers import AutoModelForCausalLM
from sora_hw.data.embedded import MODEL_PATH
base = AutoModelForCausalLM.from_pretrained(MODEL_PATH, dtype=torch.float32)
model = PeftModel.from_pretrained(base, sys.argv[1])
trained = [value for name, value in model.named_parameters() if "conditioned" in name]
print(len(trained), sum(value.numel() for value in trained))
"""


SECRET = "hf_secretsecret"
SHORT = 40  # steps, after which twice as many questions are answered rightly as before; the default takes long


def or_the_default(steps):
    """In `make test-full` the recipe's own number of steps as well."""
    return [["--max-steps", str(steps)], pytest.param([], marks=pytest.mark.full)]


@pytest.fixture(scope="session", params=or_the_default(SHORT), ids=" ".join)
def demo(request, tmp_path_factory, train):
    """`deepspeed --num_accelerators 2 launchers/commonsense.py --backend cpu`, with secrets in the environment and
    with a compiler that does not work."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD"):
            patch.setenv(name, SECRET)
        patch.setenv("CXX", "/bin/false")
        patch.setenv("TORCH_EXTENSIONS_DIR", str(folder / "extensions"))
        return train(folder / "run", 2, *request.param, cold=True)


def test_the_demo_learns_the_embedded_questions(demo):
    score = demo.manifest["results"]["embedded_questions"]
    assert score["questions"] == len(heldout_records())
    assert score["chance"] == pytest.approx(
        sum(1 / len(candidates(record)) for record in heldout_records()) / len(heldout_records())
    )
    spread = (score["chance"] * (1 - score["chance"]) / score["questions"]) ** 0.5
    assert score["after"] > max(score["chance"], score["before"]) + 5 * spread


def test_the_demo_tells_what_it_does(demo):
    for wanted in ("base model: the embedded tiny one", "data: the embedded questions", "ZeRO-2", "= 2 ranks x "):
        assert demo.stdout.count(wanted) == 1, "rank 0 says it once"
    for row in (
        "steps",
        "final loss",
        "validation loss",
        "speed",
        "peak memory",
        "trainable",
        "right after",
        "adapter",
    ):
        assert row in demo.stdout.partition("finished")[2]
    assert "tokens/s" in demo.stdout and " left" in demo.stdout


def test_the_demo_leaves_what_a_run_leaves(demo):
    steps = demo.manifest["results"]["steps"]
    assert sorted(path.name for path in (demo.folder / "adapter").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert "import sora_hw" in (demo.folder / "adapter" / "README.md").read_text()
    assert (demo.folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (demo.folder / f"checkpoint-{steps}").is_dir()
    assert len(demo.losses) == steps == demo.manifest["recipe"]["max_steps"]
    assert not list(demo.folder.glob("*.part"))
    assert not (demo.folder.parent / "extensions").exists(), "DeepSpeed must not build anything"


def test_the_state_counts_passes_over_the_data(demo):
    history = json.loads((demo.folder / "trainer_state.json").read_text())["log_history"]
    recipe, samples = demo.manifest["recipe"], demo.manifest["data"]["training_samples"]
    losses = [entry for entry in history if "loss" in entry]
    assert [entry["step"] for entry in losses] == list(range(1, recipe["max_steps"] + 1))
    assert losses[-1]["epoch"] == pytest.approx(recipe["max_steps"] * recipe["global_batch"] / samples)


def test_the_manifest_repeats_the_run_and_keeps_secrets(demo):
    manifest = demo.manifest
    assert manifest["status"] == "finished"
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["recipe"]["seed"] == 42 and manifest["recipe"]["method"] == "sora"
    short = ["--max-steps", str(SHORT)] if manifest["recipe"]["max_steps"] == SHORT else []
    given = ["--backend", "cpu", "--output", str(demo.folder), *short]
    assert manifest["argv"][1:] == given  # after DeepSpeed's --local_rank
    assert len(manifest["data"]["checksum"]) == 64 and manifest["kernels"] == "sora_hw_kernels.reference"
    assert manifest["environment"]["DS_ACCELERATOR"] == "cpu"
    assert manifest["deepspeed"]["zero_optimization"]["stage"] == 2
    written = [file for file in demo.folder.rglob("*") if file.is_file()]
    assert not [file for file in written if SECRET.encode() in file.read_bytes()] and SECRET not in demo.stdout


def test_the_demo_s_page(demo, tmp_path):
    """The report reads what a real run writes."""
    page = write_report([read_run(demo.folder)], tmp_path / "page.html").read_text()
    results = demo.manifest["results"]
    for figure in (
        f"<b>{results['final_loss']:.4f}</b>",
        f"<b>{results['tokens_per_second']:,.0f} <small>tokens/s</small></b>",
        f"<b>{results['peak_memory_bytes'] / 2**30:.2f} <small>GiB</small></b>",
        f"<b>{results['embedded_questions']['after']:.1%}</b>",
        demo.manifest["data"]["checksum"],
    ):
        assert figure in page
    assert page.count('class="line series"') == 5, "loss, learning rate, throughput, memory, gradient norm"


def test_the_adapter_loads_in_a_fresh_process(demo):
    weights = load_file(demo.folder / "adapter" / "adapter_model.safetensors")
    command = [sys.executable, "-c", LOAD, str(demo.folder / "adapter")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(len(weights)), str(sum(value.numel() for value in weights.values()))]


@pytest.mark.shared_data
@pytest.mark.parametrize("steps", [24, pytest.param(60, marks=pytest.mark.full)])
def test_the_loss_falls_on_the_eight_real_training_files(tmp_path, shared_data, train, steps):
    files = sorted((shared_data / "commonsense").glob("*.train*.jsonl.gz"))
    assert len(files) == 8
    sizes = ["--max-steps", steps, "--global-batch", 8, "--micro-batch", 2]
    run = train(tmp_path / "run", 2, "--train-data", *files, *sizes)
    assert run.manifest["data"]["training_samples"] + run.manifest["data"]["validation_samples"] == 10268
    assert len(run.losses) == steps
    assert sum(run.losses[-10:]) < 0.8 * sum(run.losses[:10])
    assert run.manifest["results"]["embedded_questions"] is None


@pytest.mark.shared_data
@pytest.mark.parametrize("given", or_the_default(24), ids=" ".join)
def test_the_loss_falls_on_real_mathematics(tmp_path, shared_data, train, given):
    data = ["--train-data", shared_data / "math" / "math_demo.train.jsonl.gz"]
    sizes = ["--global-batch", 8, "--micro-batch", 2, *given]
    run = train(tmp_path / "run", 2, *data, *sizes, launcher="metamath.py")
    assert run.manifest["recipe"]["rotation_rank"] == 2 and run.manifest["recipe"]["name"] == "metamath"
    assert run.manifest["data"]["training_samples"] + run.manifest["data"]["validation_samples"] == 1500
    assert len(run.losses) == (24 if given else 60)
    assert sum(run.losses[-10:]) < 0.8 * sum(run.losses[:10])


def test_mathematics_has_no_questions_of_its_own(launch):
    done = launch(0, launcher="metamath.py")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: metamath comes without data of its own for --model embedded")
