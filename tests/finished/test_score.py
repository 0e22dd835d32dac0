"""The scoring program: what it writes, that batches, ranks and interruptions change nothing, and what it refuses."""

import gzip
import json
import math
import os
from dataclasses import asdict
from pathlib import Path

import pytest
import torch.distributed as dist

from sora_hw.errors import UserError
from sora_hw.evaluation import harness
from sora_hw.evaluation.generation import GeneratedAnswers
from sora_hw.evaluation.tasks import TASKS
from sora_hw.finished.predictions import PredictionFile, take_folder
from sora_hw.finished.scores import read_facts, read_scores
from sora_hw.recipes import glue

LAUNCHER = Path(__file__).resolve().parents[2] / "launchers" / "score.py"


def predictions(folder: Path) -> dict[str, list[dict]]:
    """By protocol and task, likelihoods rounded to what rounding in another batch leaves alone."""
    found = {}
    for file in sorted(folder.glob("*/*.jsonl")):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        for line in lines:
            if "log_likelihoods" in line:
                line["log_likelihoods"] = [round(value, 2) for value in line["log_likelihoods"]]
        found[f"{file.parent.name}/{file.stem}"] = lines
    return found


def counted(folder: Path) -> dict[tuple[str, str, str], float]:
    """Scores, from the predictions."""
    names = {"correct": "accuracy", "correct_normalised": "accuracy normalised by length"}
    names["strict_correct"] = "strict accuracy"
    return {
        (*name.split("/"), names[field]): sum(line[field] for line in lines) / len(lines)
        for name, lines in predictions(folder).items()
        for field in names
        if field in lines[0]
    }


def test_a_run_and_its_base(tmp_path, embedded_run, questions, score_here):
    tasks = ("--tasks", "boolq", "winogrande", "AQuA", "AddSub")
    code, out, err = score_here("--adapter", embedded_run, "--data", questions, *tasks)
    assert (code, err) == (0, "")
    folder = embedded_run / "scores"
    assert "sora of " in out and "float32, 1 ranks x 16 texts, kernels of sora_hw_kernels.reference" in out
    assert "WinoGrande" in out and f"scores and predictions: {folder}" in out
    scores = read_scores(folder)
    assert {(each.protocol, each.task, each.metric): each.value for each in scores} == counted(folder)
    assert [(each.protocol, each.task, each.records) for each in scores] == [
        *[("likelihood", "boolq", 10)] * 2,
        ("likelihood", "winogrande", 6),
        ("generation", "boolq", 10),
        ("generation", "winogrande", 6),
        *[("generation", "AQuA", 4)] * 2,
        ("generation", "AddSub", 4),
    ]
    for table in json.loads((folder / "table.json").read_text()):
        kind, how, *_ = table["title"].split(", ")
        cells = table["rows"][0]["cells"]
        own = [each for each in scores if (TASKS[each.task].kind, f"{each.metric} by {each.protocol}") == (kind, how)]
        assert own
        for each in own:
            assert cells[TASKS[each.task].title]["mean"] == pytest.approx(100 * each.value, abs=1e-4)
    assert sorted(file.name for file in folder.glob("table.*")) == ["table.csv", "table.json", "table.md"]
    found = predictions(folder)
    assert [line["id"] for line in found["generation/boolq"]] == [f"boolq/{number}" for number in range(10)]
    assert [line["gold"] for line in found["generation/AddSub"]] == ["1.0", "2.0", "3.0", "4.0"]
    assert not list(folder.glob("*/*part*"))
    facts = read_facts(folder)
    assert facts["model"] == "embedded" and facts["adapter"] == str(embedded_run / "adapter")
    assert (facts["method"], facts["recipe"], facts["device"], facts["dtype"]) == (
        "sora",
        "commonsense",
        "cpu",
        "float32",
    )
    assert (facts["ranks"], facts["batch_size"]) == (1, 16) and facts["versions"]["torch"] and facts["seconds"] > 0
    unanswered = sum(line["extracted"] is None for line in found["generation/boolq"])
    assert facts["counts"]["generation/boolq"] == {"unanswered": unanswered, "cut": 0}

    output = tmp_path / "base"
    assert score_here("--model", "embedded", "--data", questions, "--output", output)[0] == 0
    base = predictions(output)
    assert base.keys() == found.keys()  # a base is asked whatever the folder has
    for name in found:
        assert base[name] != found[name], "the adapter changes what is said"
    assert read_facts(output)["adapter"] is None


def test_batches_tasks_and_overwriting(tmp_path, embedded_run, questions, score_here):
    run = ("--adapter", embedded_run, "--data", questions, "--tasks")
    assert score_here(*run, "boolq", "AQuA", "--output", tmp_path / "a")[0] == 0
    assert score_here(*run, "boolq", "--output", tmp_path / "b", "--batch-size", 1)[0] == 0
    assert score_here(*run, "AQuA", "--output", tmp_path / "b", "--batch-size", 3)[0] == 0  # beside the other
    assert predictions(tmp_path / "a") == predictions(tmp_path / "b")
    assert read_scores(tmp_path / "a") == read_scores(tmp_path / "b")
    assert set(read_facts(tmp_path / "b")["counts"]) == {"likelihood/boolq", "generation/boolq", "generation/AQuA"}
    before = (tmp_path / "b" / "scores.json").read_text()
    code, _, err = score_here(
        "--model", "embedded", "--data", questions, "--tasks", "boolq", "--output", tmp_path / "b"
    )
    assert code == 2 and "holds the predictions of another scoring: its weights is" in err
    dist.destroy_process_group()
    assert err.count("\n") == 1 and (tmp_path / "b" / "scores.json").read_text() == before
    again = ("--model", "embedded", "--data", questions, "--tasks", "boolq", "--output", tmp_path / "b", "--overwrite")
    assert score_here(*again)[0] == 0
    assert predictions(tmp_path / "b").keys() == {"likelihood/boolq", "generation/boolq"}
    assert {score.task for score in read_scores(tmp_path / "b")} == {"boolq"}


def test_it_goes_on_from_what_is_there(tmp_path, embedded_run, questions, score_here):
    run = ("--adapter", embedded_run, "--data", questions, "--tasks", "boolq", "--protocol", "generation")
    assert score_here(*run, "--output", tmp_path / "whole")[0] == 0
    assert score_here(*run, "--output", tmp_path / "torn")[0] == 0
    file = tmp_path / "torn" / "generation" / "boolq.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    marked = [line.replace('"text": "', '"text": "kept, ') for line in lines]  # told from what is made anew
    file.unlink()
    (tmp_path / "torn" / "scores.json").unlink()
    file.with_name("boolq.part-0.jsonl").write_text("".join(marked[:3]) + marked[3][:20])  # as a killed rank leaves it
    file.with_name("boolq.part-5.jsonl").write_text("".join(marked[6:8]) + '\n[]\n3\n{"number": 4}\n')
    code, out, _ = score_here(*run, "--output", tmp_path / "torn", "--batch-size", 2)
    assert code == 0 and "5/5 records of rank 0" in out
    assert file.read_text().splitlines(keepends=True) == [*marked[:3], *lines[3:6], *marked[6:8], *lines[8:]]
    assert [entry.name for entry in file.parent.iterdir()] == ["boolq.jsonl"]
    assert read_scores(tmp_path / "torn") == read_scores(tmp_path / "whole")


@pytest.mark.shared_data
def test_an_interruption_and_two_ranks(tmp_path, embedded_run, shared_data, score_here, warm, monkeypatch):
    """One rank is interrupted in its middle; two go on with another batch size, to what one makes undisturbed."""
    for kind, task, count in (("commonsense", "piqa", 20), ("math", "AQuA", 4)):
        lines = gzip.decompress((shared_data / kind / f"{task}.test.jsonl.gz").read_bytes()).splitlines(keepends=True)
        (tmp_path / f"{task}.test.jsonl").write_bytes(b"".join(lines[:count]))
    run = ["--adapter", embedded_run, "--data", tmp_path, "--tasks", "piqa", "AQuA", "--output"]
    assert score_here(*run, tmp_path / "whole")[0] == 0

    predict = GeneratedAnswers.predict

    def interrupt(self, batch):
        if 0 in batch:
            raise KeyboardInterrupt
        return predict(self, batch)

    monkeypatch.setattr(GeneratedAnswers, "predict", interrupt)
    output = tmp_path / "interrupted"
    code, _, err = score_here(*run, output, "--batch-size", 3)
    dist.destroy_process_group()  # the process would have ended here
    assert (code, err) == (130, "interrupted; the same command goes on from the predictions made so far\n")
    left = sum(file.read_text().count("\n") for file in output.glob("*/*.jsonl"))
    assert 20 <= left < 44 and not (output / "scores.json").exists()

    program = [LAUNCHER, "--backend", "cpu", *run, output, "--batch-size", 7]
    done = warm.run_ranks(2, list(map(str, program)), tmp_path, os.environ)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("2 ranks x 7 texts") == 1, "rank 0 alone speaks"
    assert f"/{math.ceil((44 - left) / 2)} records of rank 0" in done.stdout
    assert predictions(output) == predictions(tmp_path / "whole")
    assert read_scores(output) == read_scores(tmp_path / "whole")
    assert read_facts(output)["ranks"] == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "one of the arguments --adapter --model is required"),
        (["--model", "embedded", "--adapter", "x"], "not allowed with argument"),
        (["--model", "embedded", "--batch-size", "0"], "--batch-size 0: must be at least 1"),
        (["--model", "embedded", "--tasks", "arc"], "invalid choice: 'arc'"),
        (["--adapter", "nowhere"], "nowhere: no run there"),
        (["--model", "nowhere/nothing/at/all", "--data", "{data}"], "no such folder"),
        (["--model", "embedded", "--protocol", "generation"], "give --data FOLDER"),
        (["--model", "embedded", "--tasks", "gsm8k"], "gsm8k and its like are scored by generated answers"),
        (["--model", "embedded", "--data", "{data}", "--tasks", "gsm8k", "--protocol", "likelihood"], "use generation"),
        (["--model", "embedded", "--data", "{data}", "--tasks", "piqa"], "no questions of piqa there"),
        (["--model", "embedded", "--data", "{empty}"], "no questions of boolq there"),
        (["--model", "embedded", "--data", "{bad}", "--tasks", "boolq"], 'lacks the field "question"'),
        (["--model", "embedded", "--data", "{bad}", "--tasks", "boolq", "--protocol", "generation"], "must be one of"),
        (["--model", "embedded", "--data", "{bad}", "--tasks", "gsm8k"], '"answer" must be a number, not'),
        (["--model", "embedded", "--data", "{data}", "--output", "{bad}/boolq.test.jsonl"], "is a file, not a folder"),
        (["--adapter", "{glue}", "--data", "{data}"], "a run of GLUE, which is scored while it trains (its test accur"),
        (["--model", "embedded", "--data", "{data}", "--tasks", "AQuA", "--output", "{foreign}"], "but no scored.json"),
        (
            ["--model", "embedded", "--data", "{data}", "--tasks", "AQuA", "--output", "{foreign}", "--overwrite"],
            "but no scored.json",
        ),
        (["--model", "embedded", "--data", "{data}", "--tasks", "AQuA", "--output", "{damaged}"], "is damaged"),
    ],
)
def test_errors_are_one_line(tmp_path, questions, score_here, arguments, said):
    folders = {name: tmp_path / name for name in ("bad", "empty", "glue", "foreign", "damaged")}
    for folder in folders.values():
        folder.mkdir()
    (folders["bad"] / "boolq.test.jsonl").write_text(json.dumps({"instruction": "is it?", "answer": "yes"}))
    (folders["bad"] / "gsm8k.test.jsonl").write_text(json.dumps({"instruction": "how many?", "answer": "ten"}))
    manifest = {"recipe": asdict(glue.recipe("rte")), "status": "finished", "results": {"test": {"accuracy": 0.5}}}
    (folders["glue"] / "run.json").write_text(json.dumps(manifest))
    (folders["foreign"] / "generation").mkdir()
    (folders["damaged"] / "scored.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    code, _, err = score_here(*[each.format(data=questions, **folders) for each in arguments])
    if dist.is_initialized():
        dist.destroy_process_group()
    assert code == 2 and said in err and err.startswith("error: ") and err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_without_the_harness(questions, score_here, monkeypatch):
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    code, _, err = score_here("--model", "embedded", "--data", questions, "--tasks", "boolq")
    assert code == 2 and "pip install 'sora_hw[eval]', or use --protocol generation" in err


def test_other_questions_are_another_scoring(tmp_path, embedded_run, questions, score_here):
    run = ("--adapter", embedded_run, "--tasks", "AddSub", "--output", tmp_path / "out", "--data")
    assert score_here(*run, questions)[0] == 0
    (tmp_path / "AddSub.test.json").write_text(json.dumps([{"instruction": "What is 1 + 1?", "answer": "2"}]))
    code, _, err = score_here(*run, tmp_path)
    dist.destroy_process_group()
    assert code == 2 and "the questions of generation/AddSub were others; name another folder, or delete them" in err


@pytest.mark.parametrize("name", ["", "generation", "generation/boolq.jsonl"])
def test_a_link_in_a_stranger_s_folder_is_not_written_through(tmp_path, name):
    link = tmp_path / "scores" / name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a link"):
        take_folder(tmp_path / "scores", {}, {}, overwrite=False)
    assert not (tmp_path / "elsewhere").exists()


def test_predictions_of_ranks_that_do_not_see_the_folder(tmp_path):
    file = PredictionFile(tmp_path, "generation/boolq", ("correct",))
    with file.appending(0) as part:
        part.write([(0, {"correct": True}), (2, {"correct": False})])
    with pytest.raises(UserError, match="1 of 3 predictions of generation/boolq are missing"):
        file.finish(3)
    assert file.read() == {0: {"correct": True}, 2: {"correct": False}}
