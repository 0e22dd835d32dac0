"""Convolutions and embeddings under every placement pair, against the dense weight in float64; what is refused."""

import copy
import itertools
from contextlib import nullcontext

import pytest
import torch
from dense import output as dense_output
from dense import weight as dense_weight
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import sora_hw
from sora_hw.conditioning import POST, PRE, PRESETS

PAIRS = list(itertools.product(PRE, POST))
CONVOLUTIONS = {
    "1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), (3, 4, 9)),
    "1d grouped": (nn.Conv1d(4, 6, 3, groups=2), (3, 4, 9)),
    "2d": (nn.Conv2d(4, 6, (3, 2), padding=1, dilation=2, padding_mode="circular"), (3, 4, 8, 7)),
    "2d depthwise": (nn.Conv2d(6, 6, 3, padding="same", groups=6), (2, 6, 5, 5)),
    "3d without a bias": (nn.Conv3d(2, 5, 2, bias=False), (2, 2, 4, 3, 3)),
}
FUNCTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def adapted(module, pre, post, **options):
    torch.manual_seed(1)
    options = {"r": 3, "alpha": 6, "rotation_rank": 2, "dropout": 0.0, "init_weights": False} | options
    config = sora_hw.ConditionedConfig(pre=pre, post=post, rotation="exp", target_modules=["0"], **options)
    model = get_peft_model(nn.Sequential(module).double(), config)
    return model, model.base_model.model[0]


def dense(layer, pre, post, matrix, condition_bias=False):
    """`W'` (out, in) from the matrix, and the bias."""
    p, turning = layer.adapter_parameters("default"), {"kind": "exp"}
    bias = layer._base_bias()
    if bias is not None and condition_bias:
        nothing = torch.zeros(1, matrix.shape[1], dtype=matrix.dtype)
        bias = dense_output(nothing, nothing, matrix, bias, pre, post, p, 2.0, True, **turning)[0]
    return dense_weight(matrix, pre, post, p, 2.0, **turning), bias


def assert_same(outputs, expected, inputs):
    assert (outputs - expected).abs().max() < 1e-11
    dy = torch.randn_like(outputs)
    ours, theirs = (torch.autograd.grad(y, inputs, dy) for y in (outputs, expected))
    for actual, wanted in zip(ours, theirs, strict=True):
        assert (actual - wanted).abs().max() < 1e-10 * max(1, wanted.abs().max())


@pytest.mark.parametrize("condition_bias", [False, True])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize(("pre", "post"), PAIRS)
def test_a_convolution_is_that_of_the_dense_weight(pre, post, kind, condition_bias):
    module, shape = CONVOLUTIONS[kind]
    model, layer = adapted(module, pre, post, condition_bias=condition_bias)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    base = layer.get_base_layer()
    weight, bias = dense(layer, pre, post, base.weight.flatten(1), condition_bias)
    expected = base._conv_forward(x, weight.view(base.weight.shape), bias)
    assert_same(model(x), expected, [x, *layer.adapter_parameters("default").values()])
    assert (layer(x[0]) - expected[0]).abs().max() < 1e-11  # without a batch

    unmerged = model(x).detach()
    layer.merge()
    assert (model(x) - unmerged).abs().max() < 1e-11


@pytest.mark.parametrize(("pre", "post"), PAIRS)
def test_an_embedding_is_a_look_up_in_the_dense_weight(pre, post):
    model, layer = adapted(nn.Embedding(9, 6), pre, post)
    ids = torch.tensor([[0, 3, 3, 8], [1, 2, 0, 5]])
    base = layer.get_base_layer()
    weight, _ = dense(layer, pre, post, base.weight.t())
    expected = weight.t()[ids]
    assert_same(model(ids), expected, list(layer.adapter_parameters("default").values()))
    assert torch.equal(layer(ids[0, 1]), layer(ids)[0, 1])

    before, unmerged = base.weight.detach().clone(), model(ids).detach()
    layer.merge()
    assert (model(ids) - unmerged).abs().max() < 1e-11
    assert (layer.get_delta_weight("default") - (base.weight - before)).abs().max() < 1e-12
    layer.unmerge()
    assert torch.equal(base.weight, before)


def test_the_scale_of_an_embedding_applies_to_the_adapter():
    """As in Gemma: the embedding's output is its weight times a number."""

    class Scaled(nn.Embedding):
        embed_scale = 3.0

        def forward(self, ids):
            return super().forward(ids) * self.embed_scale

    model, layer = adapted(Scaled(9, 6), "diagonal", "rotation")
    weight, _ = dense(layer, "diagonal", "rotation", layer.get_base_layer().weight.t())
    ids = torch.arange(9)
    assert (model(ids) - 3.0 * weight.t()[ids]).abs().max() < 1e-11


@pytest.mark.parametrize("method", PRESETS)
@pytest.mark.parametrize("module", [nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3, groups=2), nn.Embedding(9, 6)])
def test_they_start_as_the_base_layer_and_keep_its_dtype(module, method):
    pre, post = PRESETS[method]
    x = torch.arange(8).reshape(2, 4) if isinstance(module, nn.Embedding) else torch.randn(2, 4, 5, 5)
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        base = nn.Sequential(module.to(dtype))
        inputs = x if x.dtype == torch.int64 else x.to(dtype)
        wanted = base(inputs)
        config = sora_hw.ConditionedConfig(pre=pre, post=post, target_modules=["0"], dropout=0.3)
        model = get_peft_model(base, config)
        for training in (True, False):
            got = model.train(training)(inputs)
            assert got.dtype == dtype
            assert (got - wanted).abs().max() <= torch.finfo(dtype).eps * wanted.abs().max()
        model.unload()


SMALL = {
    "linear": (lambda: nn.Linear(4, 6), (2, 4)),
    "Conv1D": (lambda: Conv1D(6, 4), (2, 4)),
    "1d": (lambda: nn.Conv1d(4, 6, 2), (2, 4, 3)),
    "2d": (lambda: nn.Conv2d(4, 6, 2), (2, 4, 3, 3)),
    "3d": (lambda: nn.Conv3d(4, 6, 2), (2, 4, 3, 3, 3)),
    "grouped": (lambda: nn.Conv1d(4, 6, 2, groups=2), (2, 4, 3)),
    "embedding": (lambda: nn.Embedding(4, 6), None),
}


AUTOCASTS = (None, torch.float16, torch.bfloat16)
DEVICES = [
    *(("cpu", autocast) for autocast in AUTOCASTS),
    ("meta", None),  # tensors without values know no autocast
    *(pytest.param("cuda", autocast, marks=pytest.mark.gpu) for autocast in AUTOCASTS),
]


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("device", "autocast"), DEVICES)
def test_the_output_has_the_dtype_and_device_of_a_lora_s(device, autocast, dtype, kind):
    """For every method, with and without dropout and adapters in float32, training or not, with a gradient or not."""
    make, shape = SMALL[kind]
    x = torch.tensor([[1, 2, 3]], device=device) if shape is None else torch.randn(shape, dtype=dtype, device=device)

    def outputs(config, **options):
        model = get_peft_model(nn.Sequential(make().to(device, dtype)), config, **options)
        for training, grad in ((True, True), (False, True), (False, False)):
            with torch.set_grad_enabled(grad), torch.autocast(device, autocast) if autocast else nullcontext():
                y = model.train(training)(x)
            yield y.dtype, y.device, y.shape, y.requires_grad

    wanted = list(outputs(LoraConfig(target_modules=["0"], lora_dropout=0.1)))
    for method, dropout, fp32 in itertools.product(PRESETS, (0.0, 0.1), (True, False)):
        config = sora_hw.ConditionedConfig(method=method, r=2, dropout=dropout, target_modules=["0"])
        assert list(outputs(config, autocast_adapter_dtype=fp32)) == wanted, (method, dropout, fp32)


@pytest.mark.parametrize("module", [nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3, groups=2), nn.Embedding(9, 6)])
def test_one_compiled_graph(module):
    x = torch.arange(8).reshape(2, 4) if isinstance(module, nn.Embedding) else torch.randn(2, 4, 5, 5)
    model, _ = adapted(module, "diagonal", "rotation")
    model = model.float()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    trained = [p for p in model.parameters() if p.requires_grad]
    eager, graph = (torch.autograd.grad(f(x).square().sum(), trained) for f in (model, compiled))
    for actual, wanted in zip(graph, eager, strict=True):
        assert (actual - wanted).abs().max() <= 1e-5 * wanted.abs().max().clamp(min=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", PRESETS)
@pytest.mark.parametrize(
    "module",
    [nn.Linear(12, 20), Conv1D(20, 12), nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3, groups=2), nn.Embedding(9, 6)],
    ids=lambda module: str(module),
)
def test_a_merge_is_rounded_once_and_taken_back_a_hundred_times(module, method, dtype):
    config = sora_hw.ConditionedConfig(method=method, init_weights=False, target_modules=["0"])
    layer = get_peft_model(nn.Sequential(copy.deepcopy(module).to(dtype)), config).base_model.model[0]
    wide = copy.deepcopy(layer)
    wide.get_base_layer().float()
    wide.merge()
    stored = layer.get_base_layer().weight
    before = stored.detach().clone()
    for _ in range(100):
        layer.merge()
        assert torch.equal(stored, wide.get_base_layer().weight.to(dtype))
        layer.unmerge()
        assert torch.equal(stored, before)


@pytest.mark.parametrize("target", ["attention", "attention.out_proj"])
def test_attention_that_calls_no_layers_is_refused(target):
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    with pytest.raises(ValueError, match="reads the weights of its layers without calling them"):
        get_peft_model(model, sora_hw.ConditionedConfig(target_modules=[target]))
