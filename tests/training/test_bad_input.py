"""Every mistake of the user's: one line on stderr that names the fix, exit code 2, and nothing created."""

import json
import re
import shutil
import sys
from types import ModuleType

import pytest
from sealed import write_checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from sora_hw.data.dataset import split
from sora_hw.data.records import Record
from sora_hw.devices import DEVICES
from sora_hw.errors import UserError
from sora_hw.recipes import commonsense
from sora_hw.training.arguments import parse
from sora_hw.training.base_model import check_fused_loss, find
from sora_hw.training.launch import main
from sora_hw.training.objectives import objective_of
from sora_hw.training.plan import make_plan
from sora_hw.training.run import check


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def good(tiny_model, records_file):
    """Arguments of a run that would work."""
    data = ["--train-data", str(records_file), "--validation-size", "5"]
    return ["--backend", "cpu", "--model", str(tiny_model), *data, "--output", "out"]


def refused(arguments, capfd) -> str:
    """The one line that `arguments` are refused with."""
    capfd.readouterr()
    assert main(commonsense, [str(argument) for argument in arguments]) == 2
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.endswith("\n") and printed.err.count("\n") == 1
    return printed.err


def everything(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_an_interrupt_is_one_line_that_says_how_to_go_on(good, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("sora_hw.training.launch.train", interrupt)
    assert main(commonsense, good) == 130
    error = capsys.readouterr().err
    assert "--resume" in error and error.count("\n") == 1


WRONG_VALUES = {
    "--backend tpu": "invalid choice: 'tpu'",
    "--hardware 4x4090": "--hardware 4x4090 is for --backend ",
    "--hardware 3x7": "invalid choice: '3x7'",
    "--method polar": "invalid choice: 'polar'",
    "--model /no/such/folder": "--model /no/such/folder: no such folder",
    "--model ./relative": "no such folder",
    "--target-modules q_proj fc1": "--target-modules fc1: no linear layer .* it has down_proj, gate_proj, k_proj, lm",
    "--target-modules embed_tokens": "--target-modules embed_tokens: no linear layer",
    "--target-modules (": r"--target-modules \(: neither a name nor a regular expression \(missing \)",
    "--modules-to-save score": "--modules-to-save score: .* has no layer of this name; outermost it has model, lm_head",
    "--offload": "--offload moves memory to the host, and on --backend cpu everything is there already",
    "--fused-loss": "--fused-loss: Liger has no kernels for the CPU; use --no-fused-loss",
    "--load-in-4bit --method full": "--load-in-4bit freezes the base, which --method full trains",
    "--load-in-4bit --zero-stage 3": "--load-in-4bit: ZeRO-3 cannot shard packed weights; use --zero-stage 2",
    "--records 0": "--records 0: must be at least 1",
    "--rank 0": "--rank 0: must be at least 1",
    "--rank -4": "--rank -4: must be at least 1",
    "--rank 97": r"--rank 97 is larger than the layer model\.layers\.0\..* of 64 x 64",
    "--rank many": "invalid int value: 'many'",
    "--seed 4294967296": "--seed 4294967296: must be below 4294967296",
    "--micro-batch 0": "--micro-batch 0: must be at least 1",
    "--max-steps 100000000": "100000000 steps of .* samples are more than the 50,000,000",
    "--rotation-rank 0": "--rotation-rank 0: must be at least 1",
    "--rotation-rank 97": "--rotation-rank 97 is larger than the layer",
    "--dropout 1": "--dropout 1.0: must be below 1",
    "--learning-rate nan": "--learning-rate nan: must be a finite number",
    "--max-length 100": "every record is longer than the maximum length of 100 tokens .*; raise --max-length",
    "--validation-size 50": "smaller --validation-size",
    "--global-batch 10 --micro-batch 4": "a global batch of 10 cannot be split .* use a global batch of 8 or 12",
    "--dtype bfloat16 --zero-stage 0": "--zero-stage 0 drifts .* use stage 1, 2 or 3",
    "--keep-best --validation-size 0": "--keep-best needs --validation-size",
    "--resume --overwrite": "give one of them",
    "--resume nowhere/checkpoint-4": "--resume nowhere/checkpoint-4: no checkpoint",
    "--json": "--json prints the plan of a --dry-run",
    "--ranks 3": "unrecognized arguments: --ranks 3",
}


@pytest.mark.parametrize("wrong", WRONG_VALUES)
def test_wrong_values(folder, good, capfd, wrong):
    before = everything(folder)
    line = refused([*good, *wrong.split()], capfd)
    assert re.search(WRONG_VALUES[wrong], line)
    assert everything(folder) == before


@pytest.mark.parametrize(
    "device", [device for device in DEVICES.values() if device.is_usable()], ids=lambda it: it.type
)
def test_a_backend_that_cannot_be_used(folder, good, capfd, device):
    assert f"--backend {device.type} cannot be used: " in refused([*good, "--backend", device.type], capfd)
    assert everything(folder) == {}


WRONG_DATA = {
    "missing.jsonl": (None, "missing.jsonl: no such data file"),
    "empty.json": (b"", "empty.json: the file holds no records"),
    "text.jsonl": (b"hello", "text.jsonl: line 1: not JSON"),
    "field.jsonl": (b'{"instruction": "a", "output": "b"}', 'field.jsonl: line 1: the record lacks the field "answer"'),
    "latin.jsonl": ("é".encode("latin-1"), "latin.jsonl: line 1: not UTF-8"),
    "cut.jsonl.gz": (b"\x1f\x8b\x08\x00\x00\x00\x00\x00", "cut.jsonl.gz: the gzip file is truncated"),
    "table.xlsx": (b"a,b", "table.xlsx: unknown kind of data file"),
}


@pytest.mark.parametrize("name", WRONG_DATA)
def test_wrong_data(folder, good, capfd, records_file, name):
    content, message = WRONG_DATA[name]
    if content is not None:
        (folder / name).write_bytes(content)
    before = everything(folder)
    assert message in refused([*good, "--train-data", records_file, name], capfd)
    assert everything(folder) == before


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_models_own_data_must_be_named(folder, tiny_model, capfd, more):
    line = refused(["--backend", "cpu", "--model", tiny_model, *more], capfd)
    assert "--train-data" in line and "Commonsense-15K" in line
    assert "--model gone/: no such folder" in refused(["--backend", "cpu", "--model", "gone/", *more], capfd)


def test_a_folder_that_is_no_model(folder, good, tiny_model, capfd):
    (folder / "empty").mkdir()
    assert "holds no weights" in refused([*good, "--model", "empty"], capfd)
    shutil.copytree(tiny_model, "broken")
    (folder / "broken" / "config.json").write_text("{")
    assert "no model configuration" in refused([*good, "--model", "broken"], capfd)
    shutil.copytree(tiny_model, "bare")
    for file in (folder / "bare").glob("tokenizer*"):
        file.unlink()
    assert "no usable tokenizer" in refused([*good, "--model", "bare"], capfd)


def test_weights_that_are_damaged_or_of_another_model(folder, good, tiny_model, capfd):
    shutil.copytree(tiny_model, "cut")
    weights = (folder / "cut" / "model.safetensors").read_bytes()
    (folder / "cut" / "model.safetensors").write_bytes(weights[:-100])
    assert "--model cut: model.safetensors is damaged" in refused([*good, "--model", "cut"], capfd)
    shutil.copytree(tiny_model, "other")
    config = json.loads((folder / "other" / "config.json").read_text())
    (folder / "other" / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    line = refused([*good, "--model", "other"], capfd)
    assert re.search(r"_proj.weight in model.safetensors is .*96.*, but by config.json it is .*128", line)
    (folder / "adapter").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / "adapter" / name).write_text("{}")
    assert "--model adapter: the folder holds an adapter, not a model" in refused([*good, "--model", "adapter"], capfd)


def test_a_model_too_small_for_its_data(folder, good, tiny_model, capfd):
    for name, changed, message in (
        ("vocabulary", {"vocab_size": 200}, "its tokenizer gives token 256, but the model knows 200"),
        ("positions", {"max_position_embeddings": 150}, "longer than the 150 positions of .*: give --max-length 150"),
    ):
        shutil.copytree(tiny_model, name)
        config = json.loads((folder / name / "config.json").read_text())
        (folder / name / "config.json").write_text(json.dumps(config | changed))
        model = LlamaForCausalLM(LlamaConfig.from_pretrained(name))
        model.save_pretrained(name)
        assert re.search(message, refused([*good, "--model", name], capfd))


def test_a_long_record_that_is_held_out_for_validation_is_only_cut(folder, good, records_file):
    records = [json.loads(line) for line in records_file.read_text().splitlines()][:20]
    held_out = split([Record(**{"input": "", **record}) for record in records], 1, 42)[1][0].id
    for record in records:
        if record["id"] == held_out:
            record["instruction"] *= 100
    (folder / "long.jsonl").write_text("\n".join(map(json.dumps, records)))
    request = parse(commonsense, [*good, "--train-data", "long.jsonl", "--validation-size", "1"])
    data = check(request, make_plan(request, commonsense)).data
    assert (data.training.truncated, data.validation.truncated) == (0, 1)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set but RANK is not"),
        ({"WORLD_SIZE": "x", "RANK": "0"}, "WORLD_SIZE is 'x': it must be a whole number, at least 1"),
        ({"OMP_NUM_THREADS": "0"}, "OMP_NUM_THREADS is '0': it must be a whole number, at least 1"),
    ],
)
def test_an_environment_that_makes_no_sense(folder, launch, good, variables, message):
    cold = "OMP_NUM_THREADS" in variables  # which libraries read as well
    done = launch(0, *good, "--max-steps", "1", cwd=folder, cold=cold, **variables)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]  # libraries may have complained before
    assert "Traceback" not in done.stderr
    assert list(folder.iterdir()) == []


def test_a_loss_that_liger_cannot_fuse(tiny_model, monkeypatch):
    base = find(str(tiny_model), objective_of(commonsense.embedded()))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--fused-loss needs Liger: pip install 'sora_hw\[cuda\]'"):
        check_fused_loss(base)
    known = ModuleType("liger_kernel.transformers.monkey_patch")
    known.MODEL_TYPE_TO_APPLY_LIGER_FN = {"gemma": None}
    monkeypatch.setitem(sys.modules, known.__name__, known)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(UserError, match="--fused-loss: Liger does not know llama models; use --no-fused-loss"):
        check_fused_loss(base)
    known.MODEL_TYPE_TO_APPLY_LIGER_FN["llama"] = None
    check_fused_loss(base)


def test_an_id_that_the_hub_cannot_give(folder, good, capfd, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "no such folder, and the hub cannot give it" in refused([*good, "--model", "nobody/no-model"], capfd)


def test_an_output_that_is_a_file_or_holds_a_run(folder, good, capfd):
    (folder / "file").write_text("mine")
    assert "file is a file, not a folder" in refused([*good, "--output", "file"], capfd)
    assert "file is a file, not a folder" in refused([*good, "--output", "file/below"], capfd)
    assert "File name too long" in refused([*good, "--output", "x" * 300], capfd)
    for number, trace in enumerate(("run.json", "checkpoint-12/model.bin", "adapter/adapter_config.json")):
        left = folder / f"run{number}" / trace
        left.parent.mkdir(parents=True)
        left.write_text("{}")
        before = everything(folder)
        line = refused([*good, "--output", f"run{number}"], capfd)
        assert "already holds a run; continue it with --resume, delete it with --overwrite" in line
        if trace != "run.json":
            assert "no run of this launcher" in refused([*good, "--output", f"run{number}", "--overwrite"], capfd)
            line = refused([*good, "--output", f"run{number}", "--resume"], capfd)
            assert "run.json is missing or damaged" in line
        assert everything(folder) == before


@pytest.fixture
def interrupted(folder, good):
    """The folder of a run of `good` that got as far as its fourth step."""
    request = parse(commonsense, good)
    job = check(request, make_plan(request, commonsense))
    write_checkpoint(folder / "out" / "checkpoint-4")
    job.folder.write_manifest({"fingerprint": job.fingerprint})
    return folder / "out"


CHANGES = {
    "--method lora": "its method is sora, here it is lora",
    "--rank 8": "its rank is 16, here it is 8",
    "--rotation-rank 2": "its rotation_rank is 1, here it is 2",
    "--target-modules q_proj": "its target_modules is ",
    "--seed 7": "its seed is 42, here it is 7",
    "--learning-rate 0.5": "its learning_rate is 0.0004, here it is 0.5",
    "--schedule linear": "its schedule is cosine, here it is linear",
    "--max-steps 9": "its max_steps is 588, here it is 9",
    "--global-batch 16": "its global_batch is 128, here it is 16",
    "--max-length 300": "its max_length is 512, here it is 300",
    "--train-data other.jsonl": "its train_data is ",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_checkpoint_of_another_recipe(folder, good, interrupted, records_file, capfd, change):
    (folder / "other.jsonl").write_text(records_file.read_text().replace("Is 7 even?", "Is 9 odd?"))
    before = everything(folder)
    for resume in (["--resume"], ["--resume", interrupted / "checkpoint-4"]):
        assert CHANGES[change] in refused([*good, *change.split(), *resume], capfd)
    assert everything(folder) == before


def other_weights(model):
    changed = LlamaForCausalLM.from_pretrained(model)
    changed.lm_head.weight.data[0] += 1
    changed.save_pretrained(model)


def other_configuration(model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))


def other_tokenizer(model):
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.mark.parametrize("change", [other_weights, other_configuration, other_tokenizer])
def test_a_checkpoint_of_a_base_model_that_has_changed(folder, good, tiny_model, capfd, change):
    shutil.copytree(tiny_model, folder / "model")
    given = [*good, "--model", "model"]
    request = parse(commonsense, given)
    job = check(request, make_plan(request, commonsense))
    write_checkpoint(folder / "out" / "checkpoint-4")
    job.folder.write_manifest({"fingerprint": job.fingerprint})
    change(folder / "model")
    assert "its base_weights is " in refused([*given, "--resume"], capfd)


def test_a_checkpoint_of_the_same_recipe_is_found(good, interrupted):
    for resume in (["--resume"], ["--resume", "auto"], ["--resume", str(interrupted / "checkpoint-4")]):
        request = parse(commonsense, [*good, *resume, "--save-steps", "3"])
        job = check(request, make_plan(request, commonsense))
        assert job.folder.checkpoint.resolve() == (interrupted / "checkpoint-4").resolve()


DAMAGE = {
    "trainer_state.json": "trainer_state.json is damaged",
    "state-0.safetensors": "state-0.safetensors is damaged",
    "checkpoint.json": "checkpoint.json is damaged",
}


@pytest.mark.parametrize("file", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_passed_over(good, interrupted, capfd, file):
    write_checkpoint(interrupted / "checkpoint-8")
    content = (interrupted / "checkpoint-8" / file).read_bytes()
    (interrupted / "checkpoint-8" / file).write_bytes(content[: len(content) // 2])
    assert DAMAGE[file] in refused([*good, "--resume", interrupted / "checkpoint-8"], capfd)
    request = parse(commonsense, [*good, "--resume"])
    job = check(request, make_plan(request, commonsense))
    assert job.folder.checkpoint.name == "checkpoint-4"
    assert job.folder.passed_over == [f"out/checkpoint-8 is left out: {DAMAGE[file]}"]


@pytest.mark.parametrize(
    "name",
    ["run.json.part", "trainer_state.json", "loss.png", "adapter", "adapter.part", "tensorboard", "checkpoint-8"],
)
def test_a_run_s_folder_with_a_link_out_of_it(folder, good, interrupted, capfd, name):
    """What the run writes by this name would land there."""
    (folder / "mine").write_text("precious")
    (interrupted / name).symlink_to(folder / "mine")
    before = everything(folder)
    assert f"{name} in it is a link" in refused([*good, "--resume"], capfd)
    assert everything(folder) == before


def test_a_run_goes_on_where_its_best_checkpoint_is(folder, good, interrupted, capfd):
    write_checkpoint(interrupted / "checkpoint-8", best=4)
    line = refused([*good, "--output", "other", "--resume", interrupted / "checkpoint-8"], capfd)
    assert "with --keep-best a run goes on where its checkpoints are" in line


def test_a_run_that_cannot_be_resumed_safely(folder, good, interrupted, capfd):
    checkpoint = interrupted / "checkpoint-4"
    (folder / "other").mkdir()
    (folder / "other" / "run.json").write_text("{}")
    line = refused([*good, "--output", "other", "--resume", checkpoint], capfd)
    assert "other already holds another run" in line
    line = refused([*good, "--resume", interrupted], capfd)
    assert "is a run's folder: name one of its checkpoints" in line
    (interrupted / "run.json").write_text("{")
    assert "run.json is missing or damaged" in refused([*good, "--resume"], capfd)
    (interrupted / "run.json").unlink()
    assert "run.json is missing or damaged" in refused([*good, "--resume", checkpoint], capfd)


def test_tensorboard_that_is_not_installed(folder, good, monkeypatch, capfd):
    monkeypatch.setattr("sora_hw.training.run.is_tensorboard_available", lambda: False)
    wanted = "error: --report-to tensorboard: it is not installed; pip install 'sora_hw[report]'\n"
    assert refused([*good, "--report-to", "tensorboard"], capfd) == wanted
    assert everything(folder) == {}


def test_the_process_ends_with_2_and_one_line(folder, launch, good):
    done = launch(0, *good, "--rank", "0", cwd=folder, cold=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --rank 0: must be at least 1\n"
    assert list(folder.iterdir()) == []


def test_under_deepspeed_one_rank_tells_it(folder, launch, good):
    done = launch(2, *good, "--train-data", "gone.jsonl", cwd=folder)
    assert done.returncode != 0
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("error:")]
    assert lines == ["error: gone.jsonl: no such data file"]
    assert "Traceback" not in done.stdout + done.stderr
    assert list(folder.iterdir()) == []


def test_a_run_that_diverges_says_so_and_leaves_no_adapter(folder, launch, good):
    options = ["--max-steps", "3", "--global-batch", "4", "--warmup-steps", "0", "--learning-rate", "1e30"]
    done = launch(0, *good, *options, cwd=folder)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "error: the loss of step 2 is nan on rank 0, first in model.layers.0.self_attn.q_proj, with "
    )
    assert json.loads((folder / "out" / "run.json").read_text())["status"] == "diverged"
    history = json.loads((folder / "out" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [1], "how it went is kept"
    assert not (folder / "out" / "adapter").exists()


def test_a_name_that_a_terminal_could_take_for_markup(folder, launch, good):
    done = launch(0, *good, "--max-steps", "2", "--global-batch", "4", "--output", "o [/b][red]:smile:", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "o [/b][red]:smile:/adapter" in done.stdout
    assert (folder / "o [/b][red]:smile:" / "adapter" / "adapter_model.safetensors").exists()
