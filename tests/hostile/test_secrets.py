"""Secrets of the environment reach nothing that a run writes or prints."""

import os
import time
from pathlib import Path

import pytest
from tiny import write_records

from sora_hw import cli
from sora_hw.errors import UserError, one_line, without_secrets
from sora_hw.recipes import commonsense
from sora_hw.training.arguments import parse

LAUNCHER = Path(__file__).resolve().parents[2] / "launchers" / "commonsense.py"
NAMES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "DB_PASSWORD")
SECRETS = {name: f"canary-{number}-of-a-secret" for number, name in enumerate(NAMES)}
SECRETS["HTTPS_PROXY"] = "http://user:canary-of-a-proxy@127.0.0.1:9"


def test_a_run_tells_none_of_them(folder, warm):
    """Nor does one that is started cold: tests/training/test_end_to_end.py."""
    program = [LAUNCHER, "--backend", "cpu", "--max-steps", 1, "--global-batch", 4, "--output", "run"]
    program += ["--train-data", write_records(folder / "records.jsonl"), "--validation-size", 0]
    program += ["--report-to", "tensorboard"]
    done = warm.run(list(map(str, program)), folder, {**os.environ, **SECRETS})
    assert done.returncode == 0, done.stderr
    assert cli.main(["report", "run"]) == 0
    written = {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert {"run.json", "report.html", "trainer_state.json"} <= {Path(name).name for name in written}
    told = {**written, "standard output": done.stdout.encode(), "standard error": done.stderr.encode()}
    assert [name for name, content in told.items() if b"canary" in content] == []


def test_an_error_hides_the_password_of_an_address():
    error = UserError("--model https://user:canary@example.org/a: no\n such \x1b[2J folder")
    assert one_line(error) == "--model https://(hidden)@example.org/a: no such \\x1b[2J folder"


TOKEN = "hf_" + "Canary0123456789" * 2
GIVEN = (
    ["--model", "https://user:canary@127.0.0.1:9/model"],
    ["--train-data", "https://user:canary@127.0.0.1:9/data.jsonl"],
    ["--output", "https://user:canary@127.0.0.1:9/run"],
    ["--resume", "https://user:canary@127.0.0.1:9/checkpoint-3"],
    ["--hub-token", "canary"],
    ["--password=canary"],
    ["--model", f"/nowhere/{TOKEN}"],
    ["--learning-rate", TOKEN],
)


@pytest.mark.parametrize("given", GIVEN, ids=" ".join)
def test_a_secret_among_the_flags_is_refused_without_being_told(folder, refused, given):
    told = refused("commonsense", "--backend", "cpu", "--model", "embedded", "--train-data", "embedded", *given)
    assert "canary" not in told.lower() and "(hidden)" in told


def test_what_is_kept_of_the_command_line_holds_no_secret():
    """As `run.json` has it, and the page made of that."""
    argv = ["--target-modules", f"{TOKEN}|q_proj", "--model", "https://user:canary@example.org/x", "--rank", "4"]
    kept = parse(commonsense, argv).argv
    assert kept == ("--target-modules", "(hidden)|q_proj", "--model", "https://(hidden)@example.org/x", "--rank", "4")


def test_text_without_secrets_is_searched_in_no_time():
    for part in ("-", "--a", "sk-", "eyJ-", "eyJ.", "://", "://a", "hf_", "--token", "xoxb-"):
        started = time.process_time()
        without_secrets(part * 20_000)
        assert time.process_time() - started < 2
