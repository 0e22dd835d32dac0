"""What a saved adapter says, and that it is loaded as a whole or not at all."""

import json
import re
import subprocess
import sys

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import sora_hw
from sora_hw.conditioning import PRESETS


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 6))


def config(method="sora", **options):
    return sora_hw.ConditionedConfig(method=method, r=2, target_modules=["0", "2"], init_weights=False, **options)


def saved(folder, method="sora", **options):
    get_peft_model(net(), config(method, **options)).save_pretrained(folder)
    return folder


def edited(folder, change):
    """The folder after `change` of its configuration."""
    file = folder / "adapter_config.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return folder


def with_tensors(folder, change):
    """The folder after `change` of its tensors."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("method", PRESETS)
def test_the_saved_configuration_says_everything_that_the_output_depends_on(tmp_path, method):
    folder = saved(tmp_path, method, rotation="cayley", rotation_scale="reference", rotation_eps=0.5, use_rslora=True)
    content = json.loads((folder / "adapter_config.json").read_text())
    expected = {"format_version": 1, "pre": PRESETS[method][0], "post": PRESETS[method][1], "rotation": "cayley"}
    expected |= {"rotation_scale": "reference", "rotation_eps": 0.5, "condition_bias": False, "use_rslora": True}
    assert {name: content[name] for name in expected} == expected
    assert "import sora_hw" in content["how_to_load"]


@pytest.mark.parametrize("version", [2, 0, "1", True, None])
@pytest.mark.parametrize("load", [PeftConfig.from_pretrained, lambda folder: PeftModel.from_pretrained(net(), folder)])
def test_an_unknown_format_is_refused(tmp_path, load, version):
    folder = edited(saved(tmp_path), lambda content: content.update(format_version=version, of_the_future=3))
    with (
        pytest.warns(UserWarning, match="of_the_future"),
        pytest.raises(ValueError, match=rf"format_version={version!r}: this sora_hw reads adapters of format 1"),
    ):
        load(folder)


def test_an_adapter_without_the_field_is_of_version_1(tmp_path):
    folder = edited(saved(tmp_path), lambda content: [content.pop(name) for name in ("format_version", "how_to_load")])
    assert PeftConfig.from_pretrained(folder).format_version == 1


def damages():
    yield "missing", lambda t: t.pop("base_model.model.2.conditioned_post_C"), r"1 missing, .*\.2\.conditioned_post_C"
    yield "all missing", lambda t: t.clear(), r"10 missing, .*\.0\.conditioned_A.*damaged"
    yield (
        "another method's",
        lambda t: t.update({"base_model.model.0.conditioned_magnitude": torch.ones(12)}),
        (r"1 foreign, .*0\.conditioned_magnitude first.*of another method"),
    )
    yield "another model's", lambda t: t.update({"base_model.model.4.conditioned_A": torch.ones(2, 6)}), r"1 foreign"


@pytest.mark.parametrize(("change", "words"), [each[1:] for each in damages()], ids=[each[0] for each in damages()])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_tensors_that_do_not_fit_are_refused(tmp_path, change, words, low_cpu_mem_usage):
    folder = with_tensors(saved(tmp_path), change)
    with pytest.raises(ValueError, match=words) as refusal:
        PeftModel.from_pretrained(net(), folder, low_cpu_mem_usage=low_cpu_mem_usage)
    assert "\n" not in str(refusal.value)
    model = get_peft_model(net(), config("lora"), adapter_name="other")
    with pytest.raises(ValueError, match=words):
        model.load_adapter(folder, "second")
    with pytest.raises(ValueError, match=words):
        set_peft_model_state_dict(get_peft_model(net(), config()), load_file(folder / "adapter_model.safetensors"))


@pytest.mark.parametrize("other", [method for method in PRESETS if method != "sora"])
def test_another_method_s_configuration_is_refused(tmp_path, other):
    pre, post = PRESETS[other]
    folder = edited(saved(tmp_path), lambda content: content.update(method=other, pre=pre, post=post))
    with pytest.raises(ValueError, match=r"the tensors are not this adapter's"):
        PeftModel.from_pretrained(net(), folder)


def test_a_tensor_of_another_shape_is_refused(tmp_path):
    folder = edited(saved(tmp_path), lambda content: content.update(rotation_rank=2))
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(net(), folder)


def test_a_plain_lora_is_not_loaded_as_ours(tmp_path):
    lora = LoraConfig(r=2, target_modules=["0", "2"])
    get_peft_model(net(), lora).save_pretrained(tmp_path)
    words = r"10 missing.*4 foreign.*the checkpoint is a LoRA's"
    with pytest.raises(ValueError, match=words):
        PeftModel.from_pretrained(net(), tmp_path, config=config())
    ours = {"peft_type": "CONDITIONED", "method": "sora"}
    with pytest.warns(UserWarning, match="lora_alpha"), pytest.raises(ValueError, match=words):
        PeftModel.from_pretrained(net(), edited(tmp_path, lambda content: content.update(ours)))


def test_ours_is_not_loaded_as_a_plain_lora(tmp_path):
    """PEFT itself cannot be made to refuse a configuration that is forced upon it; it names what is missing."""
    folder = saved(tmp_path)
    names = {name.rpartition(".")[2] for name in load_file(folder / "adapter_model.safetensors")}
    assert not [name for name in names if name.startswith("lora")]
    with pytest.warns(UserWarning, match=r"Found missing adapter keys.*0\.lora_A.*2\.lora_B"):
        PeftModel.from_pretrained(net(), folder, config=LoraConfig(r=2, target_modules=["0", "2"]))


@pytest.mark.parametrize("bias", ["none", "all", "conditioned_only"])
def test_what_is_trained_beside_the_adapter_is_no_foreigner(tmp_path, bias):
    options = sora_hw.ConditionedConfig(r=2, target_modules=["0"], init_weights=False, bias=bias, modules_to_save=["2"])
    model = get_peft_model(net(), options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    x = torch.randn(4, 8)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(net(), tmp_path)(x), model(x))


def llama(tied=False):
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    options = {"attention_bias": True, "tie_word_embeddings": tied}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, **options)).eval()


def test_layers_that_transformers_has_put_into_its_model(tmp_path):
    """Without a PeftModel around them the model's names have no prefix, the checkpoint's have one or not."""
    options = sora_hw.ConditionedConfig(method="sora", r=2, init_weights=False)
    wrapped, ids = get_peft_model(llama(), options).eval(), torch.arange(6)[None]
    tensors = get_peft_model_state_dict(wrapped)
    for given in (tensors, {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}):
        model = llama()
        model.add_adapter(sora_hw.ConditionedConfig(method="sora", r=2))
        set_peft_model_state_dict(model, given)
        assert torch.equal(model.eval()(ids).logits, wrapped(ids).logits)
        with pytest.raises(ValueError, match="1 missing"):
            set_peft_model_state_dict(model, dict(list(given.items())[1:]))


BESIDE = [
    {},
    {"bias": "all", "modules_to_save": ["o_proj"]},
    {"modules_to_save": ["lm_head"]},
    {"trainable_token_indices": [1, 2]},
]


def saved_beside_its_base(folder, tied=False, **options):
    """A changed adapter in `folder / "adapter"` and its base model in `folder / "base"`; the model they are."""
    llama(tied).save_pretrained(folder / "base")
    options = {"method": "sora", "r": 2, "init_weights": False, "task_type": "CAUSAL_LM"} | options
    base = LlamaForCausalLM.from_pretrained(folder / "base")
    model = get_peft_model(base, sora_hw.ConditionedConfig(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    model.save_pretrained(folder / "adapter")
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("options", BESIDE, ids=str)
def test_transformers_loads_what_peft_loads(tmp_path, options, tied):
    ids, folder = torch.arange(6)[None], tmp_path / "adapter"
    wanted = saved_beside_its_base(tmp_path, tied, **options)(ids).logits
    assert (wanted - llama(tied)(ids).logits).abs().max() > 1e-3
    with_adapter = llama(tied)
    with_adapter.load_adapter(folder, adapter_name="other")
    for model in (
        PeftModel.from_pretrained(llama(tied), folder),
        AutoPeftModelForCausalLM.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder),
        with_adapter,
    ):
        assert torch.equal(model(ids).logits, wanted)


@pytest.mark.parametrize("method", [method for method in PRESETS if method != "sora"])
def test_transformers_loads_every_method(tmp_path, method):
    ids = torch.arange(6)[None]
    wanted = saved_beside_its_base(tmp_path, method=method)(ids).logits
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")(ids).logits, wanted)


V = "base_model.model.model.layers.1.self_attn.v_proj"
DAMAGES = {
    "missing": (lambda t: t.pop(f"{V}.conditioned_post_E"), r"1 missing, .*v_proj\.conditioned_post_E.*damaged"),
    "foreign": (lambda t: t.update({f"{V}.conditioned_magnitude": torch.ones(16)}), r"1 foreign, .*magnitude.*first"),
    "a lora's": (lambda t: (t.clear(), t.update({f"{V}.lora_A.weight": torch.ones(2, 16)})), r"missing.*is a LoRA's"),
    "a head": (lambda t: t.pop("base_model.model.lm_head.weight"), r"1 missing, lm_head\.modules_to_save\.default"),
}


@pytest.mark.parametrize(("change", "words"), DAMAGES.values(), ids=DAMAGES)
def test_transformers_loads_as_a_whole_or_not_at_all(tmp_path, change, words):
    """Its own loader only reports what is missing or foreign."""
    saved_beside_its_base(tmp_path, modules_to_save=["lm_head"])
    folder, model, ids = with_tensors(tmp_path / "adapter", change), llama(), torch.arange(6)[None]
    with pytest.raises(ValueError, match=words) as refusal:
        AutoModelForCausalLM.from_pretrained(folder)
    assert "\n" not in str(refusal.value)
    plain = model(ids).logits
    with pytest.raises(ValueError, match=words):
        model.load_adapter(folder)
    assert torch.equal(model(ids).logits, plain) and not hasattr(model, "peft_config")


def test_transformers_loads_a_lora_as_before(tmp_path):
    get_peft_model(llama(), LoraConfig(r=2, task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    name = "model.layers.1.self_attn.v_proj.lora_B"
    with_tensors(tmp_path, lambda tensors: tensors.pop(f"base_model.model.{name}.weight"))
    assert llama().load_adapter(tmp_path).missing_keys == {f"{name}.default.weight"}


def test_the_card_of_an_adapter_says_how_to_load_it(tmp_path):
    model = get_peft_model(llama(), sora_hw.ConditionedConfig(method="sora", r=2, task_type="CAUSAL_LM"))
    model.peft_config["default"].base_model_name_or_path = "someone/llama"
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    front, text = re.fullmatch(r"---\n(.*?)\n---\n(.*)", card, re.DOTALL).groups()
    assert "library_name: peft" in front and "- sora_hw" in front
    assert "import sora_hw" in "\n".join(text.splitlines()[:2])
    assert "KeyError: 'CONDITIONED'" in text and 'AutoModelForCausalLM.from_pretrained("someone/llama")' in text
    assert "| method | sora |" in text and "| r | 2 |" in text and "taylor, rank 1, scale bounded" in text
    assert "# Model Card for Model ID" in text, "PEFT's form, to be filled in"
    (tmp_path / "README.md").unlink()
    model.peft_config["default"].write_card(tmp_path)
    assert (tmp_path / "README.md").read_text().rstrip().endswith("<!-- end of sora_hw -->")


def test_a_card_that_somebody_wrote_stays(tmp_path):
    model = get_peft_model(net(), config())
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags:\n- mine\n---\n# Mine\n\nAll about it.\n")
    for _ in range(2):
        model.save_pretrained(tmp_path)
        model.peft_config["default"].r = 5
    card = (tmp_path / "README.md").read_text()
    assert "license: mit" in card and "- mine" in card and "# Mine\n\nAll about it." in card
    assert card.count("import sora_hw` before") == 1 and "| r | 5 |" in card and "| r | 2 |" not in card
    assert card.index("import sora_hw") < card.index("# Mine")


WITHOUT_THE_IMPORT = """
import sys
from peft import PeftConfig
try:
    PeftConfig.from_pretrained(sys.argv[1])
except KeyError as error:
    print(error)
assert "sora_hw" not in sys.modules
"""


def test_without_the_import_nothing_is_loaded(tmp_path):
    """The error that the model card promises."""
    arguments = [sys.executable, "-c", WITHOUT_THE_IMPORT, str(saved(tmp_path))]
    assert subprocess.run(arguments, capture_output=True, text=True, check=True).stdout == "'CONDITIONED'\n"
