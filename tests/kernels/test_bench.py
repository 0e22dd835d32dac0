"""The benchmark programs run, on sizes far too small to measure anything, and write what they are asked for."""

import json
import os
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parents[2] / "kernels" / "bench"


def run(tmp_path, program, *arguments):
    files = [tmp_path / "results.json", tmp_path / "chart.png"]
    command = [sys.executable, str(BENCH / program), "--device", "cpu", "--repeats", "1", *arguments]
    command += ["--json", str(files[0]), "--chart", str(files[1])]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert files[1].read_bytes().startswith(b"\x89PNG")
    return json.loads(files[0].read_text())["results"], done.stdout


def test_one_layer(tmp_path):
    passes = ["both", "forward", "backward", "inference"]
    sizes = ["--shapes", "48x64", "--rows", "16", "--dtypes", "bfloat16"]
    results, printed = run(tmp_path, "linear.py", "--passes", *passes, *sizes)
    assert [result["pass"] for result in results] == passes
    expected = {"PEFT LoRA", "PEFT DoRA", "PEFT OFT", "LoRA by hand", "SORA by formula", "sora_hw sora", "sora_hw dora"}
    assert all(name in printed for name in expected)
    for result in results:
        assert result["ratios"]["frozen linear"] == 1.0
        assert expected < set(result["ratios"]) and all(ratio > 0 for ratio in result["ratios"].values())


def test_a_training_step(tmp_path):
    results, printed = run(tmp_path, "step.py", "--layers", "1", "--micro-batches", "1", "--checkpointing")
    methods = {"PEFT LoRA", "PEFT DoRA", "SORA by formula", "sora_hw sora", "sora_hw prediag"}
    assert methods < {result["method"] for result in results}
    assert all(result["tokens_per_second"] > 0 for result in results)
    assert "PEFT LoRA = 1" in printed
