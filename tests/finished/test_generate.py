"""Asking a finished run by `sora-hw generate`."""

import io
import json
import shutil
from dataclasses import asdict

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from sora_hw import cli
from sora_hw.data.embedded import MODEL_PATH
from sora_hw.data.prompts import prompt
from sora_hw.data.records import Record
from sora_hw.recipes import glue

QUESTIONS = [
    "Please answer the following question with true or false, question: is a sofa a bird?",
    "Where is a robin?",
]


@pytest.fixture(scope="module")
def answers(embedded_run):
    """By transformers' and PEFT's own means, at most 20 tokens each."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    base = AutoModelForCausalLM.from_pretrained(MODEL_PATH, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, embedded_run / "adapter").eval()
    found = []
    for question in QUESTIONS:
        text = prompt(Record(question, "", "", ""), for_training=True)
        ids = tokenizer(text.removesuffix(" " * 16), return_tensors="pt")
        written = model.generate(**ids, max_new_tokens=20, do_sample=False)[0, ids["input_ids"].shape[1] :]
        found.append(tokenizer.decode(written, skip_special_tokens=True).strip())
    return found


def ask(*arguments: object) -> int:
    return cli.main(["generate", *map(str, arguments)])


def test_the_answers_alone_are_printed(embedded_run, answers, capfd):
    assert answers[0] != answers[1]
    assert ask(embedded_run, *QUESTIONS, "--backend", "cpu", "--max-new-tokens", 20) == 0
    out, err = capfd.readouterr()
    assert out == "".join(f"{answer}\n" for answer in answers)
    assert "sora of " in err and "on embedded: CPU" in err and "float32, kernels of sora_hw_kernels.reference" in err


def test_the_standard_input_is_a_question(embedded_run, answers, capfd, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(QUESTIONS[1]))
    assert ask(embedded_run, "--backend", "cpu", "--max-new-tokens", 20) == 0
    assert capfd.readouterr().out == f"{answers[1]}\n"


def test_a_base_model_that_has_moved(tmp_path, embedded_run, answers, capfd):
    run = shutil.copytree(embedded_run, tmp_path / "run")
    manifest = json.loads((run / "run.json").read_text())
    manifest["recipe"]["model"] = str(tmp_path / "gone")
    (run / "run.json").write_text(json.dumps(manifest))
    shutil.copytree(MODEL_PATH, tmp_path / "here")
    asked = (run, QUESTIONS[1], "--backend", "cpu", "--max-new-tokens", 20)
    assert ask(*asked) == 2
    assert capfd.readouterr().err == f"sora-hw: --model {tmp_path / 'gone'}: no such folder\n"
    assert ask(*asked, "--model", tmp_path / "here") == 0
    assert capfd.readouterr().out == f"{answers[1]}\n"
    assert cli.main(["spectrum", str(run), "--model", str(tmp_path / "here")]) == 0


def test_a_question_that_is_too_long(embedded_run, capfd):
    assert ask(embedded_run, "a robin is a bird " * 400, "--backend", "cpu", "--max-new-tokens", 2) == 0
    assert "1 of 1 questions are longer than the model takes" in capfd.readouterr().err


def test_errors_are_one_line(tmp_path, embedded_run, capfd):
    manifest = {"recipe": asdict(glue.recipe("rte")), "status": "finished"}
    (tmp_path / "run.json").write_text(json.dumps(manifest))
    for arguments, said in (
        ((tmp_path / "nothing", "why?"), "no run there"),
        ((tmp_path, "why?"), "is a run of GLUE"),
        ((embedded_run, " "), "a question is empty"),
        ((embedded_run, "why?", "--max-new-tokens", 0), "--max-new-tokens 0: must be at least 1"),
        ((embedded_run, "why?", "--max-new-tokens", 100_000), "question and answer together may have"),
    ):
        assert ask(*arguments) == 2
        out, err = capfd.readouterr()
        assert out == "" and said in err and err.count("\n") == 1


def test_an_adapter_that_cannot_be_loaded(tmp_path, embedded_run, capfd):
    def config(**changes):
        return lambda file: file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    for number, (name, damage, said) in enumerate(
        (
            ("adapter_model.safetensors", lambda file: file.write_bytes(b"x"), "cannot be loaded onto this model"),
            ("adapter_config.json", lambda file: file.write_text("{"), "cannot be loaded onto this model"),
            ("adapter_config.json", config(r=4), "cannot be loaded onto this model"),
            ("adapter_config.json", lambda file: file.unlink(), "there is no adapter_config.json"),
        )
    ):
        run = shutil.copytree(embedded_run, tmp_path / str(number), ignore=shutil.ignore_patterns("scores"))
        damage(run / "adapter" / name)
        assert ask(run, "why?", "--backend", "cpu") == 2
        out, err = capfd.readouterr()
        assert out == "" and str(run / "adapter") in err and said in err and err.count("\n") == 1
