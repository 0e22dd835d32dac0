"""A sweep: which runs it makes, that it goes on where it stopped, and what it chooses."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from sora_hw.errors import UserError
from sora_hw.recipes import commonsense, glue, metamath
from sora_hw.training import sweep as sweeping
from sora_hw.training.arguments import parse
from sora_hw.training.divergence import Diverged
from sora_hw.training.launch import main
from sora_hw.training.sweep import sweep
from sora_hw.training.sweep_report import Outcome, best_learning_rate, chosen, rows_of, shown


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """Sweeps whose runs are written down instead of made; the second learning rate does best, the third diverges."""
    made = []

    class Folder:
        def drop_checkpoints(self):
            pass

    class Job:
        folder = Folder()

    def note(request, plan):
        job = Job()
        job.recipe, job.path = plan.recipe, request.output
        return job

    def train(job, console):
        made.append(job.recipe)
        score = 1 - abs(job.recipe.learning_rate - 8e-4) * 100 - job.recipe.seed / 1000
        results = {"test": {"accuracy": score}, "validation": {"accuracy": score}}
        results |= {"validation_loss": 1 - score, "final_loss": 1 - score}
        diverged = job.recipe.learning_rate == 4e-4
        job.path.mkdir(parents=True)
        manifest = {"status": "diverged"} if diverged else {"status": "finished", "results": results}
        manifest["recipe"] = asdict(job.recipe)
        (job.path / "run.json").write_text(json.dumps(manifest))
        if diverged:
            raise Diverged("no more")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweeping, "check", note)
    monkeypatch.setattr(sweeping, "train", train)
    monkeypatch.setattr(sweeping, "announce", lambda *given: None)
    return made


class Console:
    def print(self, *given, **options):
        pass


def start(module, *arguments):
    sweep(parse(module, ["--sweep", "--hardware", "auto", "--backend", "cpu", *arguments]), module, Console())


def test_the_grid_of_glue_and_the_runs_on_all_records(runs):
    start(glue, "--task", "rte")
    tried, final = runs[:9], runs[9:]
    assert [(r.learning_rate, r.seed) for r in tried] == [(lr, s) for lr in (1e-3, 8e-4, 4e-4) for s in (0, 1, 2)]
    assert {r.validation_size for r in tried} == {249} and {r.rank for r in tried} == {16}
    assert [(r.learning_rate, r.seed, r.validation_size) for r in final] == [(8e-4, seed, 0) for seed in (0, 1, 2)]
    rows = summary()["rows"]
    assert [row["diverged"] for row in rows] == [0, 0, 3, 0]
    assert rows[-1]["scores"]["test accuracy"] == pytest.approx([0.999, 0.001])
    assert "99.90 ± 0.10" in Path("runs/glue-rte-sora-sweep/summary.md").read_text()


def test_it_goes_on_where_it_stopped(runs):
    start(glue, "--task", "rte")
    start(glue, "--task", "rte")
    assert len(runs) == 12
    (Path("runs/glue-rte-sora-sweep") / "rank=16-lr=0.0008-seed=1" / "run.json").unlink()
    with pytest.raises(FileExistsError):  # the stand-in's own: it makes the run again
        start(glue, "--task", "rte")
    assert (runs[-1].learning_rate, runs[-1].seed, runs[-1].validation_size) == (8e-4, 1, 249)


def summary(name="glue-rte-sora-sweep"):
    return json.loads((Path("runs") / name / "summary.json").read_text())


def test_other_rates_add_their_rows(runs):
    start(glue, "--task", "rte", "--learning-rate", "8e-4", "--seed", "0")
    start(glue, "--task", "rte", "--learning-rate", "1e-3")
    start(glue, "--task", "rte", "--learning-rate", "8e-4")
    assert [(row["learning_rate"], row["seeds"]) for row in summary()["rows"]] == [(1e-3, [0, 1, 2]), (8e-4, [0, 1, 2])]
    assert len(runs) == 6


def test_another_recipe_needs_another_folder(runs):
    start(glue, "--task", "rte")
    before = summary()
    with pytest.raises(UserError, match=r"holds a sweep whose rotation_rank is 1, here it is 4; name another folder"):
        start(glue, "--task", "rte", "--rotation-rank", "4", "--learning-rate", "2e-3")
    assert summary() == before and len(runs) == 12
    start(glue, "--task", "rte", "--rotation-rank", "4", "--output", "other")


def test_an_unfinished_sweep_says_so(runs, monkeypatch):
    def stop_at_rank_16(request, plan, check=sweeping.check):
        if plan.recipe.rank == 16:
            raise KeyboardInterrupt
        return check(request, plan)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(sweeping, "check", stop_at_rank_16)
        start(commonsense, "--model", "m", "--learning-rate", "1e-3")
    folder = "commonsense-sora-sweep"
    assert [row["rank"] for row in summary(folder)["rows"]] == [4, 8] and summary(folder)["finished"] is False
    assert "(unfinished)" in (Path("runs") / folder / "summary.md").read_text()
    start(commonsense, "--model", "m", "--learning-rate", "1e-3")
    assert [row["rank"] for row in summary(folder)["rows"]] == [4, 8, 16, 32] and summary(folder)["finished"] is True
    assert "(unfinished)" not in (Path("runs") / folder / "summary.md").read_text()


def test_what_is_given_stays_fixed(runs):
    start(glue, "--task", "cola", "--learning-rate", "8e-4", "--method", "lora")
    assert [(r.learning_rate, r.seed, r.validation_size) for r in runs] == [(8e-4, seed, 0) for seed in (0, 1, 2)]
    assert {r.task for r in runs} == {"cola"}


def test_the_ranks_of_commonsense_and_none_where_they_mean_nothing(runs):
    start(commonsense, "--model", "m")
    assert [(r.rank, r.learning_rate, r.seed) for r in runs] == [(rank, 4e-4, 42) for rank in (4, 8, 16, 32)]
    runs.clear()
    start(commonsense, "--model", "m", "--method", "full", "--output", "full")
    assert [r.rank for r in runs] == [16]


def test_math_holds_out_a_tenth_anyway(runs):
    start(metamath, "--model", "m")
    assert [r.learning_rate for r in runs] == [2e-4, 4e-4, 6e-4] and {r.validation_size for r in runs} == {1400}


@pytest.mark.parametrize("more", ["--resume", "--overwrite", "--dry-run"])
def test_what_does_not_go_with_it(more, capsys):
    assert main(commonsense, ["--sweep", more]) == 2
    assert "--sweep goes on with what its folder holds" in capsys.readouterr().err


def outcome(rate, seed, results, held_out=10):
    return Outcome(16, rate, seed, held_out, Path("x"), results)


def results(loss, **validation):
    return {"test": {}, "validation": validation, "validation_loss": loss, "final_loss": loss}


def test_the_best_is_that_of_the_metric_or_else_of_the_loss():
    tried = [outcome(1e-3, 0, results(0.1, matthews=0.2)), outcome(2e-3, 0, results(0.9, matthews=0.3))]
    assert best_learning_rate(tried) == 2e-3
    assert best_learning_rate([outcome(1e-3, 0, results(0.1)), outcome(2e-3, 0, results(0.9))]) == 1e-3
    assert best_learning_rate([outcome(1e-3, 0, None), outcome(2e-3, 0, results(0.9))]) == 2e-3
    assert best_learning_rate([outcome(1e-3, 0, results(None)), outcome(2e-3, 0, results(0.9))]) == 2e-3
    with pytest.raises(UserError, match="every learning rate of the sweep has diverged"):
        best_learning_rate([outcome(1e-3, 0, None)])


def test_the_best_setting_is_that_on_all_records():
    tried = [outcome(1e-3, seed, results(0.9)) for seed in (0, 1)] + [
        outcome(2e-3, seed, results(0.8)) for seed in (0, 1)
    ]
    assert chosen(tried) == tried[2:]
    final = [outcome(2e-3, seed, results(None), held_out=0) for seed in (0, 1)]
    assert chosen(tried + final) == final
    assert chosen(final) == final
    with pytest.raises(UserError, match="several learning rates, and no records held out"):
        chosen([*final, outcome(1e-3, 0, results(None), held_out=0)])


def test_mean_and_deviation_of_a_sample():
    row = rows_of([outcome(1e-3, seed, results(loss)) for seed, loss in enumerate((1.0, 2.0, 4.5))])[0]
    assert row.scores["validation loss"] == pytest.approx((2.5, 1.8027756))
    assert shown("validation loss", (2.5, None)) == "2.5000" and shown("test pearson", (0.5, 0.01)) == "50.00 ± 1.00"
    assert asdict(row)["seeds"] == [0, 1, 2]


def test_a_real_sweep_makes_the_runs_that_one_makes_by_hand(tmp_path, tiny_model, records_file, train, launch):
    arguments = ["--model", tiny_model, "--train-data", records_file, "--max-steps", 3, "--global-batch", 8]
    arguments += ["--validation-size", 5, "--micro-batch", 4, "--warmup-steps", 1, "--learning-rate", 5e-3]
    done = launch(2, "--sweep", *arguments, "--output", tmp_path / "sweep")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    folders = sorted(path for path in (tmp_path / "sweep").iterdir() if path.is_dir())
    assert [path.name for path in folders] == [f"rank={rank}-lr=0.005-seed=42" for rank in (16, 32, 4, 8)]
    alone = train(tmp_path / "alone", 2, *arguments, "--rank", 32)
    weights = "adapter/adapter_model.safetensors"
    assert (folders[1] / weights).read_bytes() == (alone.folder / weights).read_bytes(), "the second run of the sweep"
    assert not list((tmp_path / "sweep").rglob("checkpoint-*"))
    again = launch(0, "--sweep", *arguments, "--output", tmp_path / "sweep")
    assert again.returncode == 0 and again.stdout.count("finished before") == 4
    different = launch(0, "--sweep", *arguments, "--alpha", 1, "--output", tmp_path / "sweep")
    assert different.returncode == 2 and "a sweep whose alpha is 32" in different.stderr.splitlines()[-1]
