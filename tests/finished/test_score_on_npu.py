"""Scoring on simulated NPUs: the CPU's answers. It shows nothing of a real NPU's numerics."""

import json
import shutil

from sora_hw.finished.scores import read_facts, read_scores


def test_two_npus_score_as_the_cpu(tmp_path, simulated_npu, embedded_run, questions, score_here, two_ranks):
    run = tmp_path / "run"
    shutil.copytree(embedded_run, run, ignore=shutil.ignore_patterns("scores"))
    manifest = json.loads((run / "run.json").read_text())
    # The profile of a run on the same type of device is kept; it would be bfloat16 otherwise.
    (run / "run.json").write_text(json.dumps({**manifest, "device": "npu"}))
    arguments = ("--data", questions, "--tasks", "boolq", "winogrande", "AQuA", "--output")
    assert score_here("--adapter", embedded_run, *arguments, tmp_path / "cpu")[0] == 0
    out = two_ranks("--adapter", run, *arguments, tmp_path / "npu", backend="npu", **simulated_npu)
    assert "simulated" in out and "float32, 2 ranks x 16 texts" in out
    assert read_scores(tmp_path / "npu") == read_scores(tmp_path / "cpu")
    assert read_facts(tmp_path / "npu")["device"] == "npu"
    for file in ("boolq", "winogrande", "AQuA"):
        assert (tmp_path / "npu/generation" / f"{file}.jsonl").read_text() == (
            tmp_path / "cpu/generation" / f"{file}.jsonl"
        ).read_text()
