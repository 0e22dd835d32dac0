"""Adapters for others: exported and merged, and loaded where this library has never been imported."""

import json
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import sora_hw
from sora_hw.cli import main
from sora_hw.conditioning import PRESETS
from sora_hw.data.embedded import MODEL_PATH
from sora_hw.errors import UserError
from sora_hw.finished.exporting import export
from sora_hw.finished.merging import merge
from sora_hw.recipes import commonsense

FOLDS = ("dora", "post_diag", "prediag", "sora")
IDS = torch.arange(1, 17).view(2, 8)


def run_of(folder: Path, recipe) -> Path:
    """A finished run of `recipe`, which has left nothing yet."""
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"recipe": asdict(recipe), "status": "finished"}))
    return folder


def quiet() -> Console:
    return Console(quiet=True)


def llama(bias: bool, **options) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, attention_bias=bias, **options))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def stored(folder: Path, model: nn.Module, dtype=torch.float32) -> Path:
    model.to(dtype).save_pretrained(folder)
    return folder


def adapter(folder: Path, base: Path, auto_class=AutoModelForCausalLM, **options) -> Path:
    """An adapter at a random point, on the model in `base`."""
    options = {"r": 3, "dropout": 0.0, "init_weights": False, "task_type": "CAUSAL_LM"} | options
    torch.manual_seed(1)
    model = get_peft_model(auto_class.from_pretrained(base), sora_hw.ConditionedConfig(**options))
    model.save_pretrained(folder)
    return folder


def logits(model: nn.Module, ids=IDS) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(ids).logits


def adapted_logits(base: Path, folder: Path, auto_class=AutoModelForCausalLM) -> torch.Tensor:
    """What the adapter itself gives, computed in float32 whatever the base is stored in."""
    return logits(PeftModel.from_pretrained(auto_class.from_pretrained(base, dtype=torch.float32), folder))


PLAIN_PEFT = """
import json, sys
import torch, transformers
from peft import PeftModel

cases = torch.load(sys.argv[1], weights_only=True)
for case in cases:
    auto_class = getattr(transformers, case["class"])
    if case["adapter"]:
        base = json.load(open(case["folder"] + "/adapter_config.json"))["base_model_name_or_path"]
        model = auto_class.from_pretrained(base, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, case["folder"])
    else:
        model = auto_class.from_pretrained(case["folder"], dtype=torch.float32)
    with torch.no_grad():
        case["logits"] = model.eval()(case["ids"]).logits
assert not [name for name in sys.modules if name.startswith("sora_hw")]
torch.save(cases, sys.argv[1])
"""


def by_plain_peft(folder: Path, cases: list[dict]) -> list[dict]:
    """`cases` with `logits`, computed by a process that has PEFT and transformers alone.

    Of each: `folder`, whether it is an `adapter`, the `class` of its model, and the `ids` to show it.
    """
    file = folder / "cases.pt"
    torch.save(cases, file)
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", PLAIN_PEFT, str(file)], capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return torch.load(file, weights_only=True)


def case(
    folder: Path, adapter: bool, expected: torch.Tensor, ids=IDS, auto_class="AutoModelForCausalLM", **more
) -> dict:
    return {"folder": str(folder), "adapter": adapter, "ids": ids, "class": auto_class, "expected": expected, **more}


def preset_cases(tmp_path: Path) -> list[dict]:
    """Every preset, with and without a bias that it conditions."""
    cases = []
    for bias in (False, True):
        base = stored(tmp_path / f"base{bias}", llama(bias))
        for method in PRESETS:
            folder = adapter(tmp_path / f"{method}{bias}", base, method=method, condition_bias=bias, rotation_rank=2)
            expected = adapted_logits(base, folder)
            assert (expected - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 0.01
            for program in (export, merge):
                output = tmp_path / f"{program.__name__}{method}{bias}"
                program(folder, output, None, quiet())
                cases.append(case(output, program is export, expected, method=method, bias=bias))
            folds = method in FOLDS or (bias and method != "lora")
            assert (tmp_path / f"export{method}{bias}" / "model").exists() == folds
            config = json.loads((tmp_path / f"export{method}{bias}" / "adapter_config.json").read_text())
            assert config["peft_type"] == "LORA" and config["r"] == 3 + 4 * method.endswith(("ortho", "sora"))
    return cases


def other_cases(tmp_path: Path) -> list[dict]:
    """GPT-2's transposed layers, an adapted embedding, a classifier with its head, ranks that differ by the layer."""
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 16}
    gpt2 = stored(tmp_path / "gpt2", GPT2LMHeadModel(GPT2Config(**sizes, tie_word_embeddings=False)))
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    bert = stored(tmp_path / "bert", BertModel(BertConfig(**sizes, vocab_size=40)))
    plain = stored(tmp_path / "llama", llama(True))
    adapters = [
        (gpt2, AutoModelForCausalLM, {"target_modules": ["c_attn", "c_fc"], "method": "dora"}),
        (plain, AutoModelForCausalLM, {"target_modules": ["embed_tokens", "q_proj"], "method": "sora"}),
        (
            plain,
            AutoModelForCausalLM,
            {"rank_pattern": {"layers.1.self_attn.q_proj": 5}, "alpha_pattern": {"v_proj": 7}},
        ),
        (plain, AutoModelForCausalLM, {"init_weights": "pissa", "method": "lora"}),
        (plain, AutoModelForCausalLM, {"bias": "conditioned_only", "condition_bias": True, "task_type": None}),
        (bert, AutoModelForSequenceClassification, {"task_type": "SEQ_CLS", "pre": "rotation", "post": "magnitude"}),
    ]
    cases = []
    for number, (base, auto_class, options) in enumerate(adapters):
        labels = {"num_labels": 3} if options.get("task_type") == "SEQ_CLS" else {}
        torch.manual_seed(number)
        model = get_peft_model(
            auto_class.from_pretrained(base, **labels),
            sora_hw.ConditionedConfig(**{"r": 3, "init_weights": False, "task_type": "CAUSAL_LM"} | options),
        )
        with torch.no_grad():  # whatever trains has moved
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        folder = tmp_path / str(number)
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(auto_class.from_pretrained(base, **labels), folder)
        expected = logits(again)
        assert torch.equal(expected, logits(model))
        for program in (export, merge):
            program(folder, tmp_path / f"{program.__name__}{number}", None, quiet())
            name = auto_class.__name__
            cases.append(case(tmp_path / f"{program.__name__}{number}", program is export, expected, auto_class=name))
    config = json.loads((tmp_path / "export2" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 7
    assert set(config["rank_pattern"].values()) == set(config["alpha_pattern"].values()) == {5}
    return cases


def test_it_is_the_same_model_without_this_library(tmp_path):
    cases = preset_cases(tmp_path / "presets") + other_cases(tmp_path / "others")
    assert len(cases) == 4 * len(PRESETS) + 2 * 6
    for done in by_plain_peft(tmp_path, cases):
        assert (done["logits"] - done["expected"]).abs().max() < 1e-5, done["folder"]


def _is_rounded_once(rounded: torch.Tensor, exact: torch.Tensor) -> bool:
    """Whether all lie within half a unit in the last place, and all but what float32 itself rounds are the nearest."""
    near = (rounded.double() - exact).abs() <= 2**-8 * exact.abs() * 1.0001
    return bool(near.all()) and (rounded == exact.to(rounded.dtype)).double().mean() > 0.99


@pytest.mark.parametrize("method", PRESETS)
def test_a_bfloat16_model_is_rounded_once(tmp_path, method, capsys):
    base = stored(tmp_path / "base", llama(True), torch.bfloat16)
    folder = adapter(tmp_path / "adapter", base, method=method)
    assert main(["export", str(folder), "--output", str(tmp_path / "lora")]) == 0
    told = capsys.readouterr().out
    assert main(["merge", str(folder), "--output", str(tmp_path / "merged")]) == 0
    wide = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    model = PeftModel.from_pretrained(wide, folder)
    layers = {n: m for n, m in model.get_base_model().named_modules() if hasattr(m, "conditioned_A")}
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    copied = load_file(tmp_path / "lora" / "model" / "model.safetensors") if method in FOLDS else {}
    assert set(layers) and all(tensor.dtype == torch.bfloat16 for tensor in (merged | copied).values())
    error = change = 0.0
    for name, layer in layers.items():
        w0 = layer.get_base_layer().weight.detach()
        conditioned = w0 + layer.get_delta_weight("default")
        assert _is_rounded_once(merged[f"{name}.weight"], conditioned)
        low_rank = tensors[f"base_model.model.{name}.lora_B.weight"].double() @ (
            tensors[f"base_model.model.{name}.lora_A.weight"].double()
        )
        folded = conditioned - low_rank
        if copied:
            assert _is_rounded_once(copied[f"{name}.weight"], folded)
            error += (copied[f"{name}.weight"].double() - folded).square().sum()
            change += (folded - w0).square().sum()
        else:
            assert (folded - w0).abs().max() < 1e-6
    assert ("rounding to bfloat16 loses" in told) == bool(copied)
    if copied:
        percent = float(re.search(r"loses ([\d.]+)% of the change", told)[1])
        assert abs(percent - 100 * (error / change) ** 0.5) < 0.1


def test_vllm_s_format(tmp_path, capsys):
    """What vLLM reads of an adapter (vllm/lora/peft_helper.py and utils.py): one scale for all layers, names, ranks."""
    base = stored(tmp_path / "base", llama(False))
    folder = adapter(tmp_path / "adapter", base, method="sora", rank_pattern={"layers.1.self_attn.q_proj": 9})
    assert main(["export", str(folder), "--output", str(tmp_path / "lora")]) == 0
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["lora_alpha"] / config["r"] == 1.0 and not config["use_rslora"] and not config["use_dora"]
    assert config["bias"] == "none" and config["modules_to_save"] is None and not config["lora_bias"]
    assert sorted(config["target_modules"]) == ["q_proj", "v_proj"]
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    named = {
        re.fullmatch(r"base_model\.model\.(.+\.[qv]_proj)\.lora_([AB])\.weight", name).groups(): t.shape
        for name, t in tensors.items()
    }
    assert len(named) == 8
    ranks = {layer: (named[layer, "A"][0], named[layer, "B"][1]) for layer, _ in named}
    assert ranks.pop("model.layers.1.self_attn.q_proj") == (11, 11) and set(ranks.values()) == {(5, 5)}
    told = capsys.readouterr().out
    assert (
        f"vllm serve {tmp_path}/lora/model --enable-lora --max-lora-rank 16 --lora-modules lora={tmp_path}/lora" in told
    )


def test_what_was_folded_is_told(tmp_path, capsys):
    base = stored(tmp_path / "base", llama(True))
    sora = adapter(tmp_path / "sora", base, condition_bias=True)
    assert main(["export", str(sora), "--output", str(tmp_path / "a")]) == 0
    told = capsys.readouterr().out
    assert "4 layers as a LoRA of rank 5, which is exact" in told
    assert f"folded into a copy of {base}: the diagonal of 4 layers and the bias of 4 layers" in told
    assert "rounding" not in told and f"{tmp_path}/a/model (float32)" in told
    assert all(line in (tmp_path / "a" / "README.md").read_text() for line in told.splitlines())
    # what names the copy as its base model loads whole, too
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert (logits(whole) - adapted_logits(base, sora)).abs().max() < 1e-5
    ortho = adapter(tmp_path / "ortho", base, method="post_ortho")
    assert main(["export", str(ortho), "--output", str(tmp_path / "b")]) == 0
    assert f"nothing is folded: it belongs to {base} as that is" in capsys.readouterr().out


def test_a_run_and_its_tokenizer(tmp_path, capsys):
    run = run_of(tmp_path / "run", commonsense.embedded())
    adapter(run / "adapter", MODEL_PATH, r=2, target_modules=["q_proj"])
    assert main(["merge", str(run), "--output", str(tmp_path / "merged")]) == 0
    assert main(["export", str(run), "--output", str(tmp_path / "lora")]) == 0
    assert "no tokenizer" not in capsys.readouterr().out
    text = "Is the sky blue?"
    for folder in (tmp_path / "merged", tmp_path / "lora" / "model"):
        assert AutoTokenizer.from_pretrained(folder)(text) == AutoTokenizer.from_pretrained(MODEL_PATH)(text)
    ids = torch.tensor([[5, 6, 7]])
    base, merged = (
        AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32) for each in (MODEL_PATH, tmp_path / "merged")
    )
    before, after = logits(base, ids), logits(merged, ids)
    expected = logits(PeftModel.from_pretrained(base, run / "adapter"), ids)
    assert (after - expected).norm() < 0.05 * (before - expected).norm()  # the model is stored in bfloat16


def test_another_base_model_is_named_by_hand(tmp_path):
    base = stored(tmp_path / "base", llama(False))
    folder = adapter(tmp_path / "adapter", base)
    moved = base.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=f"--model {base}: no such folder"):
        merge(folder, tmp_path / "merged", None, quiet())
    merge(folder, tmp_path / "merged", str(moved), quiet())
    expected = adapted_logits(moved, folder)
    assert (logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")) - expected).abs().max() < 1e-5


def test_adapters_of_peft_s_own_merge_and_need_no_export(tmp_path):
    base = stored(tmp_path / "base", llama(False))
    options = LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), options)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"an adapter of PEFT's own \(LORA\)"):
        export(tmp_path / "adapter", tmp_path / "lora", None, quiet())
    merge(tmp_path / "adapter", tmp_path / "merged", None, quiet())
    assert (logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")) - logits(model)).abs().max() < 1e-5


def no_config(folder):
    (folder / "adapter_config.json").unlink()


def damaged_config(folder):
    (folder / "adapter_config.json").write_text("{")


def of_the_future(folder):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": 2}))


def unnamed_base(folder):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": None}))


def unknown_task(folder):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"task_type": None}))


def lost_tensor(folder):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.popitem()
    save_file(tensors, file)


def cut_off(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def not_finite(folder):
    file = folder / "adapter_model.safetensors"
    save_file({name: tensor * torch.nan for name, tensor in load_file(file).items()}, file)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (no_config, "neither a run nor an adapter"),
        (damaged_config, "adapter_config.json cannot be read"),
        (of_the_future, "this sora_hw reads adapters of format 1"),
        (unnamed_base, "does not name the base model; give it with --model"),
        (unknown_task, "names neither a task_type nor a model class of transformers"),
        (lost_tensor, "cannot be loaded onto this model .*1 missing"),
        (cut_off, "cannot be loaded onto this model"),
        (not_finite, "NaNs detected|not finite"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_leaves_nothing(tmp_path, capsys, damage, words):
    base = stored(tmp_path / "base", llama(False))
    folder = adapter(tmp_path / "adapter", base)
    damage(folder)
    before = sorted(tmp_path.iterdir())
    for program in ("merge", "export"):
        assert main([program, str(folder), "--output", str(tmp_path / "output")]) == 2
        error = capsys.readouterr().err
        assert re.search(words, error) and error.startswith("sora-hw: ") and error.count("\n") == 1
        assert sorted(tmp_path.iterdir()) == before


def test_an_existing_folder_stays_as_it_is(tmp_path, capsys):
    base = stored(tmp_path / "base", llama(False))
    folder = adapter(tmp_path / "adapter", base)
    for program in ("merge", "export", "import"):
        assert main([program, str(folder), "--output", str(base)]) == 2
        assert capsys.readouterr().err == f"sora-hw: --output {base} exists; name a new folder\n"
    output = folder / "adapter_config.json" / "x"
    assert main(["merge", str(folder), "--output", str(output)]) == 2
    assert capsys.readouterr().err == f"sora-hw: --output {output} cannot be written (Not a directory)\n"


def test_a_weight_that_is_two_layers_is_not_written_into(tmp_path):
    base = stored(tmp_path / "base", llama(False, tie_word_embeddings=True))
    folder = adapter(tmp_path / "adapter", base, target_modules=["lm_head", "q_proj"])
    for program in (merge, export):
        with pytest.raises(UserError, match=r"model.embed_tokens and lm_head share one weight"):
            program(folder, tmp_path / "output", None, quiet())
    turned = adapter(tmp_path / "turned", base, target_modules=["lm_head"], method="post_ortho")
    export(turned, tmp_path / "output", None, quiet())  # writes into nothing


def test_a_model_that_was_trained_whole_is_plain_already(tmp_path):
    run = run_of(tmp_path / "run", replace(commonsense.embedded(), method="full"))
    with pytest.raises(UserError, match=r"full fine-tuning leaves no adapter but a plain model, .*run/model"):
        merge(run, tmp_path / "merged", None, quiet())
