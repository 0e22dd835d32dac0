"""What goes wrong at a start without a word: each trap has a test that it is avoided, or noticed before the first step.

Those that need no start have theirs elsewhere: ZeRO-0 in bfloat16, WORLD_SIZE without RANK, and a checkpoint of other
ranks in test_bad_input; a compiler that is missing in test_end_to_end; DeepSpeed's accelerator, which the launchers
decide for, in test_before_torch; a file of variables that DeepSpeed cannot read in test_machines.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import deepspeed
import pytest
import torch

from sora_hw.devices.cpu import CPU
from sora_hw.errors import UserError
from sora_hw.hardware import PROFILES
from sora_hw.recipes import commonsense
from sora_hw.training import deepspeed_config, ranks, run
from sora_hw.training.arguments import parse
from sora_hw.training.deepspeed_config import check_engine, check_loaded
from sora_hw.training.plan import make_plan

LAUNCHERS = Path(__file__).resolve().parents[2] / "launchers"

# A launcher one of whose precautions is gone; the first argument says which.
BROKEN = f"""
import sys
sys.path.insert(0, {str(LAUNCHERS)!r})
import before_torch
from sora_hw.recipes import commonsense
from dataclasses import replace
from sora_hw.training import launch, run
from transformers.integrations import deepspeed

def load_before_the_arguments(base, profile, load=run.load_model):
    kept, deepspeed._hf_deepspeed_config_weak_ref = deepspeed._hf_deepspeed_config_weak_ref, None
    model = load(base, profile)
    deepspeed._hf_deepspeed_config_weak_ref = kept
    return model

def load_in_bfloat16(base, profile, load=run.load_model):
    return load(base, replace(profile, dtype="bfloat16"))

def arguments_without_deepspeed(*given, make=run.training_arguments):
    return make(*given[:-1], None)

def deepspeeds_own_threshold(plan, largest, make=run.deepspeed_config):
    return make(plan, None)

broken = globals()[sys.argv.pop(next(index for index, word in enumerate(sys.argv) if word in globals()))]
place = {{"load": "load_model", "arguments": "training_arguments", "deepspeeds": "deepspeed_config"}}
setattr(run, place[broken.__name__.partition("_")[0]], broken)
sys.exit(launch.main(commonsense))
"""


@pytest.fixture(scope="module")
def arguments(tiny_model, records_file):
    """Of a short run whose adapter has larger tensors than DeepSpeed would keep whole by itself."""
    return [
        *("--model", tiny_model, "--train-data", records_file, "--max-steps", 3, "--warmup-steps", 1, "--dropout", 0),
        *("--global-batch", 4, "--micro-batch", 2, "--rank", 32, "--max-length", 320, "--validation-size", 5),
        *("--learning-rate", 5e-3, "--seed", 11, "--save-steps", 100, "--eval-steps", 100),
    ]


@pytest.fixture(scope="module")
def alone(arguments, tmp_path_factory, train):
    """The run of one rank, without any launcher."""
    return train(tmp_path_factory.mktemp("alone") / "out", 0, *arguments)


@pytest.fixture(scope="module")
def start(finish):
    """`start(command, folder, **variables)` runs a program of the virtual environment to its end, in `folder`."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}

    def run(command, folder, **variables):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": path, **variables}
        return finish(subprocess.Popen(list(map(str, command)), cwd=folder, env=environment, **pipes))

    return run


@pytest.fixture
def refusal(tmp_path, arguments, launch):
    """`refusal(ranks, precaution, *arguments)`: the line that a run without it ends with, before its first step."""

    def line(ranks, precaution, *more):
        program = tmp_path / "broken.py"
        program.write_text(BROKEN)
        done = launch(ranks, precaution, *arguments, "--output", tmp_path / "out", *more, launcher=program)
        assert done.returncode and "step 1/" not in done.stdout, done.stdout + done.stderr
        told = {line for line in done.stderr.splitlines() if line.startswith("error:")}
        assert len(told) == 1, done.stderr
        return told.pop()

    return line


class TestTheProcesses:
    """Whoever starts them, there are as many as were asked for, or none."""

    def test_accelerate_launch_runs_one_process_on_a_cpu_and_is_refused(self, tmp_path, arguments, start):
        command = ["accelerate", "launch", "--cpu", "--num_processes", 2, LAUNCHERS / "commonsense.py"]
        done = start([*command, "--backend", "cpu", *arguments, "--output", "out"], tmp_path)
        told = [line for line in done.stderr.splitlines() if line.startswith("error:")]
        assert done.returncode and len(told) == 1
        assert told[0].startswith("error: `accelerate launch` has started a single process")
        assert list(tmp_path.iterdir()) == []

    @pytest.fixture(scope="class")
    @classmethod
    def two_ranks(cls, tmp_path_factory, arguments, start):
        """A run by torchrun, with what an interrupted build leaves in the cache of extensions."""
        folder = tmp_path_factory.mktemp("torchrun")
        lock = folder / "extensions" / "deepspeed_shm_comm" / "lock"
        lock.parent.mkdir(parents=True)
        lock.touch()
        command = ["torchrun", "--standalone", "--nproc_per_node", 2, LAUNCHERS / "commonsense.py"]
        cache = {"TORCH_EXTENSIONS_DIR": str(folder / "extensions")}
        done = start([*command, "--backend", "cpu", *arguments, "--output", folder / "out"], folder, **cache)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return folder

    def test_torchrun_starts_two_ranks_of_one_run(self, two_ranks, alone):
        both = type(alone)(two_ranks / "out", "")
        assert both.manifest["batch"]["world_size"] == 2
        assert len(alone.losses) == 3 and both.losses == pytest.approx(alone.losses, abs=5e-5)

    def test_a_stale_lock_holds_up_nothing_as_nothing_is_built(self, two_ranks):
        """With its extension DeepSpeed would wait for the lock for ever."""
        built = [path for path in (two_ranks / "extensions").rglob("*") if path.is_file()]
        assert [path.name for path in built] == ["lock"]

    def test_variables_of_the_environment_do_not_decide(self, tmp_path, arguments, alone, train):
        """With ACCELERATE_USE_FSDP accelerate would put FSDP in the place of DeepSpeed. DS_ACCELERATOR must be right
        before deepspeed is imported; the run, not the shell, knows what is right."""
        misleading = {"ACCELERATE_USE_FSDP": "true", "DS_ACCELERATOR": "cuda"}
        other = train(tmp_path / "out", 0, *arguments, backend="auto", **misleading)
        assert other.manifest["device"] == "cpu" and other.losses == alone.losses

    def test_the_profiles_variables_stand_before_the_first_collective(self, monkeypatch):
        """NCCL hangs on a 4090 that it tries to reach peer to peer; what the user has set stays."""
        monkeypatch.setattr(os, "environ", {**os.environ, "NCCL_IB_DISABLE": "0"})
        monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
        seen = {}
        monkeypatch.setattr(deepspeed, "init_distributed", lambda *_, **__: seen.update(os.environ))
        plan = make_plan(parse(commonsense, ["--backend", "cpu"]), commonsense)
        profile = replace(plan.profile, environment=PROFILES["4x4090"].environment)
        settings = ranks.start(replace(plan, profile=profile))
        assert (seen["NCCL_P2P_DISABLE"], seen["NCCL_IB_DISABLE"], seen["DS_ACCELERATOR"]) == ("1", "0", "cpu")
        assert settings.environment["NCCL_P2P_DISABLE"] == "1" and "NCCL_IB_DISABLE" not in settings.environment


class TestTheModel:
    """It is loaded, sharded and cast as planned."""

    def test_the_group_comes_before_the_arguments_and_they_before_the_model(self, monkeypatch, tmp_path, arguments):
        """ZeRO-3 on processors asks the group for its size, and shards only a model that is loaded after that."""
        request = parse(commonsense, [*map(str, arguments), "--backend", "cpu", "--output", str(tmp_path / "out")])
        job = run.check(request, make_plan(request, commonsense))
        order = []

        def note(name):
            def noted(*_):
                order.append(name)
                if name == "load_model":
                    raise KeyboardInterrupt
                return {}

            monkeypatch.setattr(run, name, noted)

        for name in ("start", "agree", "training_arguments", "load_model"):
            note(name)
        monkeypatch.setattr(run.dist, "get_rank", lambda: 0)
        monkeypatch.setattr(run.dist, "get_world_size", lambda: 1)
        with pytest.raises(KeyboardInterrupt):
            run.train(job, None)
        assert order == ["start", "agree", "training_arguments", "load_model"]
        assert not (tmp_path / "out").exists()

    def test_a_model_that_zero_3_did_not_shard_while_loading(self, refusal):
        """Loaded before the Trainer's arguments, every rank holds it whole, and DeepSpeed shards it only then."""
        line = refusal(2, "load_before_the_arguments", "--zero-stage", 3)
        assert line.startswith("error: ZeRO-3 has not sharded the model while it was loaded")

    def test_zero_3_keeps_the_adapter_whole(self, tmp_path, arguments):
        words = [*map(str, arguments), "--backend", "cpu", "--zero-stage", "3", "--output", str(tmp_path / "out")]
        request = parse(commonsense, words)
        zero = run.check(request, make_plan(request, commonsense)).deepspeed["zero_optimization"]
        assert zero["stage3_param_persistence_threshold"] == 32 * 96  # of rank 32, beside the model's 96 wide layer

    def test_an_adapter_that_zero_3_does_not_keep_whole(self, refusal):
        """DeepSpeed keeps tensors whole up to a size of its own, which the adapter's exceed: training would crawl."""
        line = refusal(2, "deepspeeds_own_threshold", "--zero-stage", 3)
        assert line.startswith("error: ZeRO-3 gathers the adapter's tensors one by one")

    def test_a_base_in_another_dtype(self, refusal):
        line = refusal(0, "load_in_bfloat16", "--dtype", "float32")
        assert line.startswith(
            "error: the model trains in bfloat16 and float32, DeepSpeed's bf16 being off, instead of "
        )

    def test_a_trainer_without_deepspeed(self, refusal):
        line = refusal(0, "arguments_without_deepspeed")
        assert line.startswith("error: the Trainer runs without DeepSpeed")


def parameter(dtype=torch.float32, device="cpu", sharded=False, trained=False, persistent=True):
    made = torch.nn.Parameter(torch.zeros(4, dtype=dtype, device=device), requires_grad=trained)
    if sharded:
        made.ds_tensor, made.ds_numel, made.ds_persist = torch.zeros(2), 4, persistent
    return made


def engine(stage=2, batch=8, accumulation=2, bf16=False, base=torch.float32, **kind):
    """DeepSpeed's, as far as the check looks at it, with one parameter of that kind beside a usual one."""
    parameters = [parameter(base), parameter(**{"dtype": base, **kind})]
    return SimpleNamespace(
        zero_optimization_stage=lambda: stage,
        train_batch_size=lambda: batch,
        gradient_accumulation_steps=lambda: accumulation,
        bfloat16_enabled=lambda: bf16,
        module=torch.nn.ParameterList(parameters),
    )


def plan(stage=2, dtype="float32"):
    batch = SimpleNamespace(global_batch=8, accumulation=2, world_size=2)
    profile = SimpleNamespace(zero_stage=stage, dtype=dtype)
    return SimpleNamespace(batch=batch, profile=profile, device=CPU, recipe=commonsense.recipe())


WRONG = {
    "another stage": (engine(stage=1), plan(), r"= \(1, 8, 2\) instead of \(2, 8, 2\)"),
    "another global batch": (engine(batch=4), plan(), "instead of"),
    "another accumulation": (engine(accumulation=1), plan(), "instead of"),
    "no engine": (torch.nn.Linear(1, 1), plan(), "without DeepSpeed"),
    "another device": (engine(device="meta"), plan(), "is on meta instead of cpu; set DS_ACCELERATOR=cpu"),
    "two dtypes": (engine(dtype=torch.bfloat16), plan(), "in bfloat16 and float32, .* off, instead of float32"),
    "another dtype": (engine(), plan(dtype="bfloat16"), "in float32, .* off, instead of bfloat16"),
    "bf16 switched on": (engine(bf16=True), plan(), "in float32, .* on, instead of float32"),
    "bf16 switched off": (engine(base=torch.bfloat16), plan(dtype="bfloat16"), "in bfloat16, .* off, instead of bf"),
    "nothing sharded": (engine(stage=3), plan(stage=3), "shards nothing"),
    "the adapter sharded": (
        engine(stage=3, sharded=True, trained=True, persistent=False),
        plan(stage=3),
        "gathers the adapter's tensors one by one",
    ),
}


class TestTheEngine:
    """What the check reads off DeepSpeed's engine, on one that is made up: a wrong one is hard to come by."""

    @pytest.fixture(autouse=True)
    def two_ranks(self, monkeypatch):
        monkeypatch.setattr(deepspeed_config.dist, "get_world_size", lambda: 2)

    def test_what_is_planned_passes(self):
        check_engine(engine(), plan())
        check_engine(engine(bf16=True, base=torch.bfloat16), plan(dtype="bfloat16"))
        check_engine(engine(stage=3, sharded=True, trained=True), plan(stage=3))
        check_engine(engine(stage=3, sharded=True, persistent=False), plan(stage=3))

    @pytest.mark.parametrize("name", WRONG)
    def test_what_is_not_planned_is_refused(self, name):
        found, wanted, message = WRONG[name]
        with pytest.raises(UserError, match=message):
            check_engine(found, wanted)

    def test_another_number_of_ranks(self, monkeypatch):
        monkeypatch.setattr(deepspeed_config.dist, "get_world_size", lambda: 1)
        with pytest.raises(UserError, match="1 ranks started instead of 2"):
            check_engine(engine(), plan())

    def test_a_model_that_is_loaded_whole(self):
        with pytest.raises(UserError, match="has not sharded"):
            check_loaded(engine().module, plan(stage=3))
        check_loaded(engine(sharded=True).module, plan(stage=3))
        check_loaded(engine().module, plan(stage=2))
