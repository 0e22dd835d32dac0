"""`sora-hw spectrum`: every method against merged weights in float64, what is kept, figures, errors."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import matplotlib.image
import numpy
import pytest
import safetensors.torch
import torch
from peft import PeftModel, get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, LlamaModel

from sora_hw.cli import main
from sora_hw.finished.run import read_run
from sora_hw.finished.spectra import read_spectrum, spectrum_of
from sora_hw.hardware import PROFILES
from sora_hw.recipes import commonsense
from sora_hw.recipes.recipe import METHODS
from sora_hw.training.methods import peft_config

LLAMA = {"vocab_size": 32, "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 2, "num_hidden_layers": 2}
TARGETS = ("q_proj", "up_proj")


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A tiny model in two files."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Path:
    """A tiny model whose layers store their weight as (in, out)."""
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=24, n_layer=2, n_head=2, n_positions=16)).save_pretrained(folder)
    return folder


def make_run(folder: Path, model: Path, method: str, dtype: str = "float32", **changes) -> Path:
    """A finished run with an adapter, or a model, far from its start."""
    changes = {"target_modules": TARGETS, "modules_to_save": (), "rank": 3, "seed": 0, **changes}
    recipe = replace(commonsense.embedded(), model=str(model), method=method, **changes)
    folder.mkdir(parents=True)
    trained = AutoModelForCausalLM.from_pretrained(model)
    torch.manual_seed(recipe.seed + 1)
    if method == "full":
        for parameter in trained.parameters():
            parameter.data += 0.01 * torch.randn_like(parameter)
        trained.save_pretrained(folder / "model")
    else:
        trained = get_peft_model(trained, peft_config(recipe, "CAUSAL_LM"))
        for name, parameter in trained.named_parameters():
            if parameter.requires_grad and "modules_to_save" not in name:
                parameter.data += 0.05 * torch.randn_like(parameter)
        trained.save_pretrained(folder / "adapter")
    profile = {**asdict(replace(PROFILES["cpu"], dtype=dtype, environment={})), "environment": {}}
    manifest = {"recipe": asdict(recipe), "status": "finished", "profile": profile}
    (folder / "run.json").write_text(json.dumps(manifest))
    return folder


def merged_update(folder: Path, layer: str) -> numpy.ndarray:
    """`W' - W0`, (out, in) or transposed, by merging in a float64 model."""
    run = read_run(folder)
    rounded = AutoModelForCausalLM.from_pretrained(run.recipe.model, dtype=run.manifest["profile"]["dtype"])
    base = rounded.double()
    before = base.get_submodule(layer).weight.detach().clone()
    if run.recipe.method == "full":
        after = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64)
    else:
        after = PeftModel.from_pretrained(base, folder / "adapter", autocast_adapter_dtype=False)
        after = after.double().merge_and_unload()
    return (after.get_submodule(layer).weight.detach() - before).numpy()


def spectrum(folder: Path):
    return spectrum_of(read_run(folder), Console(quiet=True))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_the_singular_values_of_its_merged_weights(tmp_path, llama, method):
    run = make_run(tmp_path / "run", llama, method)
    found = spectrum(run)
    assert [layer.name for layer in found.layers] == [
        f"model.layers.{block}.{name}" for block in (0, 1) for name in ("self_attn.q_proj", "mlp.up_proj")
    ]
    assert [layer.shape for layer in found.layers] == [(24, 24), (40, 24)] * 2
    core = method in ("lora", "lora_plus", "pre_ortho", "post_ortho")
    for layer in found.layers:
        update = merged_update(run, layer.name)
        expected = numpy.linalg.svd(update, compute_uv=False)
        sigma = numpy.array(layer.singular_values)
        assert len(sigma) == (3 + 2 * method.endswith("ortho") if core else 24)
        assert layer.computed == ("core" if core else "dense")
        assert numpy.allclose(sigma, expected[: len(sigma)], rtol=0, atol=1e-8)
        assert layer.norm == pytest.approx(numpy.linalg.norm(update), abs=1e-8)
        p = expected**2 / (expected**2).sum()
        assert layer.entropy == pytest.approx(-(p[p > 0] * numpy.log(p[p > 0])).sum(), abs=1e-8)
        assert layer.stable_rank == pytest.approx((expected**2).sum() / expected[0] ** 2, abs=1e-8)
    assert found.mean_entropy == pytest.approx(numpy.mean([layer.entropy for layer in found.layers]))
    assert (found.method, found.recipe, found.seed) == (method, "commonsense", 0)


@pytest.mark.parametrize("method", ["dora", "post_ortho", "lora_plus"])  # PEFT has no OFT for these
def test_a_layer_stored_as_in_out(tmp_path, gpt2, method):
    run = make_run(tmp_path / "run", gpt2, method, target_modules=("c_attn",))
    for layer in spectrum(run).layers:
        expected = numpy.linalg.svd(merged_update(run, layer.name), compute_uv=False)
        assert layer.shape == (72, 24)
        assert numpy.allclose(layer.singular_values, expected[: len(layer.singular_values)], rtol=0, atol=1e-8)


@pytest.mark.parametrize("method", ["dora", "pre_ortho", "full"])
def test_the_base_weight_counts_as_the_run_held_it(tmp_path, llama, method):
    """Rounded to bfloat16: otherwise full fine-tuning would have learned the rounding errors."""
    run = make_run(tmp_path / "run", llama, method, dtype="bfloat16")
    layer = spectrum(run).layers[0]
    expected = numpy.linalg.svd(merged_update(run, layer.name), compute_uv=False)
    assert numpy.allclose(layer.singular_values, expected[: len(layer.singular_values)], rtol=0, atol=1e-8)


def test_a_checkpoint_with_other_names(tmp_path, llama):
    """Saved without its head, a model calls its layers `layers.0`, where the adapter has `model.layers.0`."""
    run = make_run(tmp_path / "run", llama, "sora")
    expected = spectrum(run)
    LlamaModel.from_pretrained(llama).save_pretrained(tmp_path / "headless")
    manifest = json.loads((run / "run.json").read_text())
    manifest["recipe"]["model"] = str(tmp_path / "headless")
    (run / "run.json").write_text(json.dumps(manifest))
    (run / "spectrum.json").unlink()
    assert spectrum(run) == expected


def test_layers_at_the_same_time_give_the_same(tmp_path, llama):
    run = make_run(tmp_path / "run", llama, "sora")
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 4):
            torch.set_num_threads(count)
            found.append(spectrum(run))
            (run / "spectrum.json").unlink()
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1]


def test_what_trained_whole_beside_the_adapter_is_left_out(tmp_path, llama):
    run = make_run(tmp_path / "run", llama, "lora", modules_to_save=("lm_head",))
    assert all("lm_head" not in layer.name for layer in spectrum(run).layers)


def test_a_spectrum_is_kept_until_the_adapter_changes(tmp_path, llama, monkeypatch):
    run = make_run(tmp_path / "run", llama, "sora")
    assert read_spectrum(read_run(run)) is None
    first = spectrum(run)
    assert read_spectrum(read_run(run)) == first
    content = json.loads((run / "spectrum.json").read_text())
    assert content["version"] == 1
    assert content["mean_entropy"] == first.mean_entropy
    assert content["mean_stable_rank"] == first.mean_stable_rank
    with monkeypatch.context() as patched:
        patched.setattr("sora_hw.finished.spectra.layer_spectra", None)  # is not called
        assert spectrum(run) == first
    other = make_run(tmp_path / "other", llama, "sora", seed=1)
    weights = (other / "adapter" / "adapter_model.safetensors").read_bytes()
    (run / "adapter" / "adapter_model.safetensors").write_bytes(weights)
    assert read_spectrum(read_run(run)) is None
    assert spectrum(run).mean_entropy == spectrum(other).mean_entropy != first.mean_entropy


def test_the_command(tmp_path, llama, capsys, monkeypatch):
    """Seeds together, settings apart, a diverged run left out; three figures that show something."""
    monkeypatch.setenv("COLUMNS", "200")
    for seed in (0, 1):
        make_run(tmp_path / "lora" / f"seed={seed}", llama, "lora", seed=seed)
    for rank in (2, 3):
        make_run(tmp_path / "sora" / f"rank={rank}", llama, "sora", rank=rank)
    diverged = make_run(tmp_path / "sora" / "rank=4", llama, "sora", rank=4)
    (diverged / "run.json").write_text((diverged / "run.json").read_text().replace("finished", "diverged"))
    assert (
        main(["spectrum", *(str(tmp_path / name) for name in ("lora", "sora")), "--output", str(tmp_path / "f")]) == 0
    )
    out = capsys.readouterr().out
    assert "rank=4: has diverged, left out" in out
    entropies = [read_spectrum(read_run(tmp_path / "lora" / f"seed={seed}")).mean_entropy for seed in (0, 1)]
    mean, spread = numpy.mean(entropies), numpy.std(entropies, ddof=1)
    assert f"│ commonsense │ LoRA         │ 2     │ {mean:.3f} ± {spread:.3f} │" in out
    for rank in (2, 3):
        alone = read_spectrum(read_run(tmp_path / "sora" / f"rank={rank}"))
        assert f"│ SORA, rank {rank} │ 1     │ {alone.mean_entropy:.3f}         │ {alone.mean_stable_rank:.3f} " in out
    names = ("entropy-by-layer-commonsense", "singular-values-commonsense", "entropy-by-method")
    assert {file.name for file in (tmp_path / "f").iterdir()} == {
        f"{n}.{kind}" for n in names for kind in ("png", "svg")
    }
    for name in names:
        picture = (255 * matplotlib.image.imread(tmp_path / "f" / f"{name}.png")[..., :3]).round().astype(int)
        for colour in ((0x56, 0xB4, 0xE9), (0xD5, 0x5E, 0x00)):  # LoRA's and SORA's
            assert (abs(picture - colour).max(axis=-1) <= 2).sum() > 100, (name, colour)
        drawn = (tmp_path / "f" / f"{name}.svg").read_text()
        assert all(f">{label}<" in drawn for label in ("LoRA", "SORA, rank 2", "SORA, rank 3"))


def test_a_single_run_keeps_its_figures(tmp_path, llama, capsys):
    run = make_run(tmp_path / "run", llama, "full")
    assert main(["spectrum", str(run)]) == 0
    assert (run / "entropy-by-method.svg").stat().st_size > 1000
    assert main(["spectrum", str(run)]) == 0
    assert "(dense, known)" in capsys.readouterr().out


def test_a_stranger_s_names_and_links_lead_nowhere_else(tmp_path, llama, capsys):
    run = make_run(tmp_path / "run", llama, "lora")
    manifest = json.loads((run / "run.json").read_text())
    manifest["recipe"]["name"] = "x/../../escaped"
    (run / "run.json").write_text(json.dumps(manifest))
    for name in ("entropy-by-layer-x", "singular-values-x"):  # or there would be no way through them
        (run / name).mkdir()
    (tmp_path / "mine").write_text("precious")
    (run / "entropy-by-method.png").symlink_to(tmp_path / "mine")
    outside = set(tmp_path.iterdir())
    assert main(["spectrum", str(run)]) == 0, capsys.readouterr()
    assert set(tmp_path.iterdir()) == outside and (tmp_path / "mine").read_text() == "precious"
    assert not (run / "entropy-by-method.png").is_symlink()


def refused(capsys, *arguments: object) -> str:
    """The one line of an error."""
    assert main(["spectrum", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def test_what_is_refused(tmp_path, llama, gpt2, capsys):
    assert "neither a run nor a sweep" in refused(capsys, tmp_path)
    run = make_run(tmp_path / "run", llama, "sora")
    manifest, adapter = run / "run.json", run / "adapter" / "adapter_model.safetensors"
    said, weights = manifest.read_text(), adapter.read_bytes()
    (tmp_path / "file").write_text("")
    assert "the folder cannot be made" in refused(capsys, run, "--output", tmp_path / "file")

    manifest.write_text(said.replace("finished", "diverged"))
    assert "none of the runs has finished" in refused(capsys, run)
    manifest.write_text(said.replace(str(llama), str(tmp_path / "gone")))
    assert "no such folder" in refused(capsys, run)
    manifest.write_text(said.replace(str(llama), str(gpt2)))
    assert "its base model, has no linear layer model.layers.0" in refused(capsys, run)
    manifest.write_text(said.replace('"dtype"', '"dtypo"'))
    assert "does not say in which dtype" in refused(capsys, run)
    manifest.write_text(said)

    adapter.write_bytes(weights[: len(weights) // 2])
    assert "the adapter is missing or damaged" in refused(capsys, run)
    tensors = safetensors.torch.load(weights)
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    for changes, message in (
        ({f"{layer}.conditioned_B": torch.ones(24, 4)}, "B is 24 x 4 where the base model makes it 24 x 3"),
        ({f"{layer}.conditioned_magnitude": torch.ones(24)}, "other parameters .* \\(differing: magnitude\\)"),
        ({f"{layer}.conditioned_B": torch.full((24, 3), torch.nan)}, "values that are not finite"),
    ):
        safetensors.torch.save_file({**tensors, **changes}, adapter)
        assert re.search(message, refused(capsys, run))
    safetensors.torch.save_file({"base_model.model.lm_head.weight": torch.ones(2)}, adapter)
    assert "the adapter holds no layer" in refused(capsys, run)
    adapter.unlink()
    assert "the adapter is missing or damaged" in refused(capsys, run)
    assert not (run / "spectrum.json").exists()
    assert not list(run.glob("*.part"))


def test_a_damaged_spectrum(tmp_path, llama, capsys):
    run = make_run(tmp_path / "run", llama, "lora")
    for damaged in ("{", "[]", '{"version": 1}'):
        (run / "spectrum.json").write_text(damaged)
        assert "spectrum.json is damaged; delete it" in refused(capsys, run)
    (run / "spectrum.json").write_text('{"version": 0}')
    assert read_spectrum(read_run(run)) is None


def test_a_model_of_another_shape(tmp_path, llama, capsys):
    run = make_run(tmp_path / "run", llama, "full")
    LlamaForCausalLM(LlamaConfig(**{**LLAMA, "intermediate_size": 48})).save_pretrained(run / "model")
    assert "mlp.up_proj: the weight is 48 x 24 where the base model makes it 40 x 24" in refused(capsys, run)
