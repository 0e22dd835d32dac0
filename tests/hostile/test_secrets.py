"""Secrets of the environment reach nothing that a run writes or prints."""

import os
import subprocess
import sys
from pathlib import Path

from sora_hw import cli
from sora_hw.errors import UserError, one_line

LAUNCHER = Path(__file__).resolve().parents[2] / "launchers" / "commonsense.py"
NAMES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "DB_PASSWORD")
SECRETS = {name: f"canary-{number}-of-a-secret" for number, name in enumerate(NAMES)}
SECRETS["HTTPS_PROXY"] = "http://user:canary-of-a-proxy@127.0.0.1:9"


def test_a_run_tells_none_of_them(folder, capfd):
    command = [
        sys.executable,
        LAUNCHER,
        "--backend",
        "cpu",
        "--max-steps",
        "1",
        "--global-batch",
        "4",
        "--output",
        "run",
    ]
    command += ["--validation-size", "0", "--report-to", "tensorboard"]
    environment = {**os.environ, **SECRETS, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert cli.main(["report", "run"]) == 0
    written = {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert {"run.json", "report.html", "trainer_state.json"} <= {Path(name).name for name in written}
    told = {**written, "standard output": done.stdout, "standard error": done.stderr}
    assert [name for name, content in told.items() if b"canary" in content] == []


def test_an_error_hides_the_password_of_an_address():
    error = UserError("--model https://user:canary@example.org/a: no\n such \x1b[2J folder")
    assert one_line(error) == "--model https://(hidden)@example.org/a: no such \\x1b[2J folder"
