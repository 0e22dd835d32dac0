"""The command line becomes a plan: which recipe, which values, how many steps, how the batch is shared."""

import json
from dataclasses import fields, replace

import pytest

from sora_hw.errors import UserError
from sora_hw.recipes import commonsense
from sora_hw.recipes.recipe import LanguageModelling
from sora_hw.training.arguments import parse
from sora_hw.training.launch import main
from sora_hw.training.plan import make_plan


def plan_of(*arguments):
    return make_plan(parse(commonsense, [str(argument) for argument in arguments]), commonsense)


@pytest.mark.parametrize(
    ("arguments", "model"),
    [
        (["--backend", "cpu"], "embedded"),
        (["--backend", "cpu", "--hardware", "cpu"], "embedded"),
        (["--backend", "cpu", "--model", "m", "--train-data", "f.json"], "m"),
        (["--hardware", "4x4090", "--dry-run"], "meta-llama/Meta-Llama-3-8B"),
        (["--hardware", "8x910c", "--dry-run"], "meta-llama/Meta-Llama-3-8B"),
        (["--hardware", "4x4090", "--model", "embedded", "--dry-run"], "embedded"),
    ],
)
def test_which_model(arguments, model):
    plan = plan_of(*arguments)
    assert plan.recipe.model == model
    base = commonsense.embedded() if model == "embedded" else commonsense.recipe()
    assert plan.recipe.max_steps == base.max_steps and plan.recipe.learning_rate == base.learning_rate


def test_own_data_changes_nothing_but_the_data():
    plan = plan_of("--backend", "cpu", "--train-data", "a.jsonl", "b.json")
    assert plan.recipe == replace(commonsense.embedded(), train_data=("a.jsonl", "b.json"))
    assert not plan.recipe.asks_embedded_questions and plan_of("--backend", "cpu").recipe.asks_embedded_questions


OTHER_VALUES = {
    str: "x",
    int: 3,
    float: 0.5,
    int | None: 3,
    tuple[str, ...]: ("a", "b"),
}


def test_every_recipe_value_has_a_flag():
    for field in fields(LanguageModelling):
        if field.name == "name":
            continue
        among = field.metadata.get("among")
        value = among[-1] if among else OTHER_VALUES.get(field.type)
        flag = "--" + field.name.replace("_", "-")
        if field.type is bool:
            request = parse(commonsense, [flag])
            value = True
        else:
            request = parse(commonsense, [flag, *map(str, value if isinstance(value, tuple) else [value])])
        assert request.recipe == {field.name: value} and type(request.recipe[field.name]) is type(value)


def test_the_profile_decides_the_hardware_side_and_flags_override_it():
    plan = plan_of("--hardware", "4x4090", "--dry-run")
    assert (plan.device.type, plan.profile.zero_stage, plan.profile.dtype) == (plan.profile.device, 2, "bfloat16")
    assert (plan.batch.world_size, plan.batch.micro_batch, plan.batch.accumulation) == (4, 4, 8)
    plan = plan_of("--hardware", "4x4090", "--dry-run", "--micro-batch", 2, "--zero-stage", 3, "--dtype", "float32")
    assert (plan.profile.zero_stage, plan.profile.dtype, plan.batch.accumulation) == (3, "float32", 16)


def test_the_micro_batch_shrinks_to_what_divides_the_batch(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert plan_of("--backend", "cpu", "--global-batch", 12).batch.micro_batch == 6
    with pytest.raises(UserError, match="use a global batch of 8 or 16"):
        plan_of("--backend", "cpu", "--global-batch", 12, "--micro-batch", 4)
    with pytest.raises(UserError, match=r"global batch of 7 cannot be split over 2 ranks.*a global batch of 6 or 8"):
        plan_of("--backend", "cpu", "--global-batch", 7)


def test_steps_are_given_or_follow_from_the_epochs():
    assert plan_of("--backend", "cpu").recipe.steps(10_000) == commonsense.embedded().max_steps
    assert plan_of("--backend", "cpu", "--max-steps", 7).recipe.steps(10_000) == 7
    assert plan_of("--backend", "cpu", "--epochs", 2, "--global-batch", 32).recipe.steps(100) == 8, "4 batches a pass"
    assert plan_of("--backend", "cpu", "--epochs", 2, "--max-steps", 5).recipe.steps(100) == 5


def test_a_dry_run_prints_the_whole_plan_and_writes_nothing(tmp_path, monkeypatch, capsys, tiny_model, records_file):
    monkeypatch.chdir(tmp_path)
    arguments = ["--backend", "cpu", "--model", str(tiny_model), "--train-data", str(records_file), "--dry-run"]
    arguments += ["--validation-size", "5", "--max-length", "320", "--epochs", "3", "--global-batch", "10"]
    assert main(commonsense, [*arguments, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["recipe"]["rank"] == 16 and plan["device"] == "cpu" and plan["output"] == "runs/commonsense-sora-1"
    assert plan["data"]["training_samples"] == 45 and plan["data"]["steps"] == 15 and plan["data"]["truncated"] > 0
    assert plan["deepspeed"]["train_batch_size"] == 10
    assert main(commonsense, arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  rank: 16" in lines and "  training_samples: 45" in lines and "output: runs/commonsense-sora-1" in lines
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_of_the_papers_model_needs_neither_hardware_nor_download(capsys, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *arguments: pytest.fail("the dry run used the network"))
    assert main(commonsense, ["--hardware", "8x910c", "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["recipe"]["model"] == "meta-llama/Meta-Llama-3-8B" and plan["recipe"]["max_steps"] == 588
    assert plan["batch"] == {"global_batch": 128, "world_size": 8, "micro_batch": 16, "accumulation": 1}
    assert plan["deepspeed"]["bf16"] == {"enabled": True}


def test_the_help_is_grouped(capsys):
    with pytest.raises(SystemExit) as stop:
        main(commonsense, ["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    titles = ["run:", "model and method:", "data:", "optimisation:", "hardware:"]
    assert [line for line in text.splitlines() if line in titles] == titles
    assert "--local_rank" not in text and "588; 150 for the embedded model" in " ".join(text.split())
