"""What lies beside a run: damaged, it is said in one line; and an adapter's weights alone do not make it."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from sora_hw import cli
from sora_hw.data.embedded import MODEL_PATH
from sora_hw.errors import UserError
from sora_hw.finished.layer_spectra import layer_spectra
from sora_hw.finished.loading import weights
from sora_hw.finished.run import read_run
from sora_hw.finished.scores import read_scores
from sora_hw.finished.spectra import FILE, read_spectrum


@pytest.fixture(scope="module")
def run(embedded_run, tmp_path_factory):
    """A copy, whose spectrum is known."""
    folder = shutil.copytree(embedded_run, tmp_path_factory.mktemp("room") / "run [i]")
    assert cli.main(["spectrum", str(folder)]) == 0
    return folder


def test_an_adapter_of_another_alpha_is_another_model(tmp_path, embedded_run):
    other = shutil.copytree(embedded_run, tmp_path / "other")
    file = other / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "alpha": 1}))
    one, other = read_run(embedded_run), read_run(other)
    assert weights(one.recipe, one) != weights(other.recipe, other)


SCORE = {"protocol": "likelihood", "task": "boolq", "metric": "accuracy", "value": 0.5, "records": 3}


@pytest.mark.parametrize("change", [{"task": "x"}, {"value": "x"}, {"value": None}, {"value": float("nan")}])
def test_damaged_scores(tmp_path, change):
    (tmp_path / "scores.json").write_text(json.dumps({"scores": [SCORE]}))
    assert read_scores(tmp_path)
    (tmp_path / "scores.json").write_text(json.dumps({"scores": [SCORE, {**SCORE, **change}]}))
    with pytest.raises(UserError, match="is damaged"):
        read_scores(tmp_path)


@pytest.mark.parametrize("damage", [{"layers": []}, {"layers": None}])
def test_a_damaged_spectrum(tmp_path, run, damage):
    run = read_run(shutil.copytree(run, tmp_path / "run"))
    content = json.loads((run.path / FILE).read_text())
    if damage["layers"] is None:
        damage = {"layers": [{**content["layers"][0], "entropy": None}]}
    (run.path / FILE).write_text(json.dumps(content | damage))
    with pytest.raises(UserError, match="is damaged"):
        read_spectrum(run)


def test_files_that_cannot_be_written(tmp_path, run, capsys):
    run = shutil.copytree(run, tmp_path / "run")
    (tmp_path / "figures" / "entropy-by-method.png").mkdir(parents=True)
    (tmp_path / "file").touch()
    for command, said in (
        (["spectrum", str(run), "--output", str(tmp_path / "figures")], "the figures cannot be written"),
        (["report", str(run), "--output", str(tmp_path / "file" / "page.html")], "cannot be written"),
    ):
        assert cli.main(command) == 2
        assert said in capsys.readouterr().err
    (run / FILE).unlink()
    (run / f"{FILE}.part").mkdir()
    assert cli.main(["spectrum", str(run)]) == 2
    assert f"{FILE} cannot be written" in capsys.readouterr().err


def test_an_unfinished_run_is_left_out(tmp_path, run, capsys):
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    manifest = json.loads((run / "run.json").read_text())
    (unfinished / "run.json").write_text(json.dumps({**manifest, "status": "started"}))
    assert cli.main(["spectrum", str(unfinished), str(run), "--output", str(tmp_path / "figures")]) == 0
    assert "is unfinished, left out" in capsys.readouterr().out
    assert cli.main(["spectrum", str(unfinished)]) == 2
    assert "none of the runs has finished" in capsys.readouterr().err


def test_brackets_in_a_setting_are_text(tmp_path, run, capsys):
    others = []
    for name in ("a", "b"):
        other = shutil.copytree(run, tmp_path / name)
        manifest = json.loads((other / "run.json").read_text())
        manifest["recipe"]["train_data"] = [f"[/{name}].json"]
        (other / "run.json").write_text(json.dumps(manifest))
        others.append(str(other))
    assert cli.main(["spectrum", *others, "--output", str(tmp_path / "figures")]) == 0
    assert "[/b].json" in capsys.readouterr().out


def test_peft_s_lora_with_a_rank_and_an_alpha_of_its_own_for_a_layer(tmp_path, run):
    model = AutoModelForCausalLM.from_pretrained(MODEL_PATH, dtype=torch.float32)
    config = LoraConfig(
        r=4,
        target_modules=["q_proj", "k_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 2},
        alpha_pattern={"q_proj": 64},
        init_lora_weights=False,
    )
    model = get_peft_model(model, config)
    folder = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(folder / "adapter")
    model.save_pretrained(folder / "adapter")
    layers = dict(model.named_modules())
    spectra = layer_spectra(read_run(folder), lambda done, total: None)
    assert [len(each.singular_values) for each in spectra[:4]] == [4, 4, 2, 4]
    for each in spectra:
        update = layers[f"base_model.model.{each.name}"].double().get_delta_weight("default")
        dense = torch.linalg.svdvals(update)[: len(each.singular_values)]
        assert torch.allclose(torch.tensor(each.singular_values, dtype=torch.float64), dense, rtol=1e-10)
