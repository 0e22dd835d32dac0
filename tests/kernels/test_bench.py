"""The benchmark programs run, on sizes far too small to measure anything, and write what they are asked for; the figure
of speeds shows what a file holds."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

BENCH = Path(__file__).resolve().parents[2] / "kernels" / "bench"


def run(tmp_path, program, *arguments):
    files = [tmp_path / "results.json", tmp_path / "chart.png"]
    command = [sys.executable, str(BENCH / program), "--device", "cpu", "--repeats", "1", *arguments]
    command += ["--json", str(files[0]), "--chart", str(files[1])]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert files[1].read_bytes().startswith(b"\x89PNG")
    return json.loads(files[0].read_text())["results"], done.stdout


def test_one_layer(tmp_path, figure):
    passes = ["both", "forward", "backward", "inference"]
    sizes = ["--shapes", "48x64", "--rows", "16", "--dtypes", "bfloat16"]
    results, printed = run(tmp_path, "linear.py", "--passes", *passes, *sizes)
    assert [result["pass"] for result in results] == passes
    expected = {"PEFT LoRA", "PEFT DoRA", "PEFT OFT", "LoRA by hand", "SORA by formula", "sora_hw sora", "sora_hw dora"}
    assert all(name in printed for name in expected)
    for result in results:
        assert result["ratios"]["frozen linear"] == 1.0
        assert expected < set(result["ratios"]) and all(ratio > 0 for ratio in result["ratios"].values())
    assert len(figure.cases_of({"results": results})) == 1


def test_a_training_step(tmp_path):
    results, printed = run(tmp_path, "step.py", "--layers", "1", "--micro-batches", "1", "--checkpointing")
    methods = {"PEFT LoRA", "PEFT DoRA", "SORA by formula", "sora_hw sora", "sora_hw prediag"}
    assert methods < {result["method"] for result in results}
    assert all(result["tokens_per_second"] > 0 < result["inference_tokens_per_second"] for result in results)
    assert "PEFT LoRA = 1" in printed


@pytest.fixture(scope="module")
def figure():
    """The program kernels/bench/figure.py as a module."""
    spec = importlib.util.spec_from_file_location("figure", BENCH / "figure.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for it
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def linear_result(what: str, ratios: dict[str, float], **changes) -> dict:
    size = {"dtype": "float32", "shape": "8x8", "rank": 16, "rotation_rank": 1, "rows": 4}
    return {**size, **changes, "pass": what, "ratios": {"frozen linear": 1.0, **ratios}}


MACHINE = {"hardware": "Abacus", "date": "2026-01-02", "torch": "2.13", "peft": "0.21"}
LINEAR = {
    "machine": MACHINE,
    "results": [
        linear_result("both", {"PEFT DoRA": 3.0, "PEFT LoRA": 1.5, "sora_hw sora": 2.0, "sora_hw prediag": 1.2}),
        linear_result("inference", {"PEFT DoRA": 4.0, "PEFT LoRA": 1.6, "sora_hw sora": 2.5, "sora_hw prediag": 1.0}),
    ],
}


def bars(drawn: Figure, panel: int) -> dict[str, float]:
    axes = drawn.axes[panel]
    labels = [label.get_text() for label in drawn.axes[panel - panel % 2].get_yticklabels()]
    return dict(zip(labels, (bar.get_width() for bar in axes.patches), strict=True))


def test_the_bars_are_the_speeds_over_dora(figure):
    (case,) = figure.cases_of(LINEAR)
    drawn = figure.draw([case], figure.caption(LINEAR))
    training = {"PEFT LoRA": 2.0, "PEFT DoRA": 1.0, "sora_hw Pre-Diag": 2.5, "sora_hw SORA": 1.5}
    inference = {"PEFT LoRA": 2.5, "PEFT DoRA": 1.0, "sora_hw Pre-Diag": 4.0, "sora_hw SORA": 1.6}
    assert bars(drawn, 0) == pytest.approx(training) and bars(drawn, 1) == pytest.approx(inference)
    for axes, papers, frozen in zip(drawn.axes, ([1.506, 1.3696], [1.6509, 1.5127]), (3.0, 4.0), strict=True):
        marks = [line for line in axes.lines if line.get_marker() == "D"]
        assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in marks] == [
            (pytest.approx(papers[0]), 2),  # on the bars of Pre-Diag and SORA
            (pytest.approx(papers[1]), 3),
        ]
        assert [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == "--"] == [frozen]
    titles = [axes.get_title(loc="left") for axes in drawn.axes]
    assert titles == [f"{panel}: float32, a linear layer 8x8, N 4, r 16, rp 1" for panel in ("training", "inference")]
    assert "Abacus, torch 2.13, peft 0.21, 2026-01-02" in drawn.get_supxlabel()


def test_of_a_large_grid_the_paper_s_ranks_and_a_whole_block(figure):
    ratios = {"PEFT DoRA": 3.0, "sora_hw sora": 2.0}
    grid = [
        linear_result(what, ratios, shape=shape, rank=rank, rotation_rank=rotation_rank)
        for what in ("both", "inference", "forward")
        for shape in ("8x8", "block")
        for rank in (16, 64)
        for rotation_rank in (1, 16)
    ]
    (case,) = figure.cases_of({"machine": MACHINE, "results": grid})
    assert case.title == "float32, the linear layers of a block of LLaMA3-8B, N 4, r 16, rp 1"
    assert figure.cases_of({"machine": MACHINE, "results": grid[:8]}) == [], "training alone"
    out_of_memory = [linear_result("both", ratios), {**linear_result("inference", {}), "ratios": {}}]
    assert figure.cases_of({"machine": MACHINE, "results": out_of_memory}) == []


def test_the_speeds_of_whole_models(figure):
    def result(method, batch, training, inference):
        speeds = {"tokens_per_second": training, "inference_tokens_per_second": inference}
        return {"method": method, "micro_batch": batch, **speeds}

    results = [result("PEFT DoRA", 1, 100.0, 200.0), result("sora_hw sora", 1, 150.0, 500.0)]
    results += [result("PEFT DoRA", 2, None, None), result("sora_hw sora", 2, 160.0, 510.0)]
    machine = {**MACHINE, "layers": 32, "rank": 16, "rotation_rank": 1}
    (case,) = figure.cases_of({"machine": machine, "results": results})
    assert case.title == "bfloat16, 32 layers, 1 x 512 tokens, r 16, rp 1"
    assert case.speeds["training"]["sora_hw sora"] == 1.5 and case.speeds["inference"]["sora_hw sora"] == 2.5


def draw_file(figure, monkeypatch, content: dict, folder: Path) -> None:
    (folder / "linear.json").write_text(json.dumps(content))
    monkeypatch.setattr(sys, "argv", ["figure.py", str(folder / "linear.json")])
    figure.main()


def test_the_pictures(figure, monkeypatch, tmp_path):
    draw_file(figure, monkeypatch, LINEAR, tmp_path)
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert "sora_hw Pre-Diag" in (tmp_path / "speed.svg").read_text()


def test_a_file_without_both_is_refused(figure, monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="no size of which training and inference were measured"):
        draw_file(figure, monkeypatch, {**LINEAR, "results": LINEAR["results"][:1]}, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["linear.json"]
