"""The simulated device against the CPU, inside a process that has it. Run by test_device.py."""

import io
import os

import pytest
import torch
import torch_npu
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch_npu import simulation


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    torch.npu.set_device(0)
    simulation.reset()


def test_views_share_storage_and_the_host_does_not():
    host = torch.arange(12.0)
    x = host.to("npu")
    rows = x.view(3, 4)
    assert rows.t()[1:].data_ptr() == x.data_ptr() + x.element_size() != host.data_ptr()
    rows[1].mul_(10)
    rows.t()[0, 0] = -1
    assert x.tolist() == [-1, 1, 2, 3, 40, 50, 60, 70, 8, 9, 10, 11]
    assert host[4] == 4
    complex_pairs = torch.view_as_complex(x.view(6, 2))
    halves = rows[:, :2].reshape(3, 2, 1)
    for view in (x.unfold(0, 4, 4), halves, torch.view_as_real(complex_pairs), x.view(torch.int32)):
        assert view.is_npu and view.data_ptr() == x.data_ptr()
    assert torch.equal(x.unfold(0, 4, 4), rows)
    other = torch.empty(0, device="npu")
    for source in (x, x.untyped_storage()):
        assert other.set_(source).data_ptr() == x.data_ptr()
    assert other.set_().untyped_storage().size() == 0
    x.untyped_storage().resize_(0)
    assert x.untyped_storage().size() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_every_dtype_travels(dtype):
    host = torch.tensor([[0, 1, 2], [3, 4, 5]]).to(dtype)
    assert torch.equal(host.to("npu").t().contiguous().cpu(), host.t())
    assert host.to("npu")[1, 2].item() == host[1, 2].item()


def test_each_index_is_a_device():
    assert torch.npu.device_count() == 8 and torch.accelerator.current_accelerator() == torch.device("npu")
    with torch.npu.device("npu:2"):
        assert torch.ones(1, device="npu").device == torch.device("npu:2")
    torch.npu.set_device(1)
    assert torch.npu.current_device() == torch.ones(1, device="npu").get_device() == 1
    # What grows stays where it was, storage included.
    for grown in (torch.arange(3, device="npu:3"), torch.empty(0, device="npu:3").resize_(5)):
        assert grown.device == grown.untyped_storage().device == torch.device("npu:3")
    storage = torch.ones(2, device="npu:3").untyped_storage()
    storage.resize_(64)
    grown = torch.empty(0, device="npu:3").set_(storage)
    assert storage.device == torch.device("npu:3") and grown.numel() == 16 and grown[:2].tolist() == [1, 1]
    assert torch.arange(3, device="npu:3").to("npu:0").device.index == 0
    with pytest.raises(RuntimeError, match="there is no device 8"):
        torch.ones(1, device="npu:8")


@pytest.mark.parametrize("other", ["npu:1", "cpu"])
def test_operands_on_two_devices_are_refused(other):
    x, y = torch.ones(3, 3, device="npu:0"), torch.ones(3, 3, device=other)
    for operation in (torch.add, torch.mm, torch.Tensor.add_, lambda a, b: torch.cat([a, b])):
        with pytest.raises(RuntimeError, match=f"at least two devices, npu:0 and {other}"):
            operation(x, y)
        with pytest.raises(RuntimeError, match="at least two devices"):
            operation(y, x)


def test_numbers_and_indices_may_come_from_the_cpu():
    x = torch.arange(4.0, device="npu")
    assert (x * torch.tensor(2.0))[torch.tensor([3, 1])].tolist() == [6, 2]
    x[torch.tensor([0])] = 7
    assert x.tolist() == [7, 1, 2, 3]


def test_module_to_keeps_its_parameters():
    """ZeRO finds parameters by identity."""
    module = torch.nn.Linear(3, 3)
    weight = module.weight
    module.to("npu")
    assert module.weight is weight and weight.is_npu
    module.cpu()
    assert module.weight is weight and not weight.is_npu


def test_save_and_load_keep_the_device():
    file = io.BytesIO()
    torch.save({"x": torch.arange(3, device="npu:1")}, file)
    for location, device in ((None, "npu:1"), ("cpu", "cpu"), ("npu:0", "npu:0")):
        file.seek(0)
        x = torch.load(file, map_location=location)["x"]
        assert x.device == torch.device(device) and x.tolist() == [0, 1, 2]


def mlp(device):
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.SiLU(), torch.nn.Linear(16, 6)).to(device)


def test_training_equals_the_cpu():
    """Gradients, clipping and AdamW, step by step."""
    weights = {}
    for device in ("cpu", "npu"):
        module, x = mlp(device), torch.linspace(-2, 2, 30).view(5, 6).to(device)
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.05)
        for _ in range(5):
            module(x).square().sum().backward()
            norm = torch.nn.utils.clip_grad_norm_(module.parameters(), 0.1)
            assert norm > 0.1
            optimizer.step()
            optimizer.zero_grad()
        weights[device] = module[0].weight.detach().cpu()
    assert torch.allclose(weights["npu"], weights["cpu"], rtol=0, atol=1e-6)
    assert not torch.allclose(weights["cpu"], mlp("cpu")[0].weight, atol=1e-2)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_mask_again(reentrant):
    gradients = []
    for run in (lambda block, x: block(x), lambda block, x: checkpoint(block, x, use_reentrant=reentrant)):
        block = torch.nn.Sequential(mlp("npu"), torch.nn.Dropout(0.5))
        x = torch.ones(4, 6, device="npu", requires_grad=True)
        torch.manual_seed(2)
        y = run(block, x)
        torch.rand(5, device="npu")
        y.sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients) and gradients[0].abs().max() > 0


def test_the_device_has_a_random_state_of_its_own():
    host = torch.get_rng_state()
    before = torch.npu.get_rng_state()
    drawn = [torch.rand(4, device="npu"), functional.dropout(torch.ones(50, device="npu"), 0.5)]
    assert torch.equal(torch.get_rng_state(), host), "drawing on the device leaves the CPU's state alone"
    assert not torch.equal(torch.npu.get_rng_state(), before)
    torch.npu.set_rng_state(before)
    assert torch.equal(torch.rand(4, device="npu"), drawn[0])
    assert torch.equal(functional.dropout(torch.ones(50, device="npu"), 0.5), drawn[1])
    with torch.random.fork_rng(devices=[0, 1], device_type="npu"):
        state = torch.npu.get_rng_state()
        torch.rand(4, device="npu")
    assert not torch.equal(torch.npu.get_rng_state(), before) and torch.equal(torch.npu.get_rng_state(), state)


def test_seeding():
    torch.npu.manual_seed(7)
    first, other = torch.randn(3, device="npu:0"), torch.randn(3, device="npu:1")
    assert torch.npu.initial_seed() == 7 and not torch.equal(first.cpu(), other.cpu())
    torch.manual_seed(7)
    assert torch.equal(torch.randn(3, device="npu:0"), first)
    assert torch.equal(torch.randn(3, device="npu:1").cpu(), first.cpu()), "every device is seeded"
    generator = torch.Generator("npu").manual_seed(7)
    state = torch.npu.get_rng_state()
    assert torch.equal(torch.randn(3, device="npu", generator=generator), first)
    assert torch.equal(torch.npu.get_rng_state(), state), "a generator that is given is the one that is drawn from"
    states = torch.npu.random.get_rng_state_all()
    torch.npu.seed_all()
    assert len(states) == len(torch.npu.default_generators) == 8
    torch.npu.random.set_rng_state_all(states)
    assert torch.equal(torch.npu.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    x = torch.ones(3, 6, device="npu")
    with torch.autocast("npu", dtype):
        y = mlp("npu")(x)
        attention = functional.scaled_dot_product_attention(*[x.view(1, 1, 3, 6)] * 3)
        assert y.dtype == (x @ x.t()).dtype == attention.dtype == dtype
        assert torch.softmax(y, -1).dtype == functional.layer_norm(y, (6,)).dtype == torch.float32
    assert mlp("npu")(x).dtype == torch.float32


def test_loss_scaling():
    scaler = torch.npu.amp.GradScaler(init_scale=8.0)
    module = mlp("npu")
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    before = module[2].bias.detach().clone()
    scaler.scale(module(torch.ones(1, 6, device="npu")).sum()).backward()
    assert (module[2].bias.grad == 8).all()
    scaler.step(optimizer)
    scaler.update()
    assert torch.allclose(before - module[2].bias, torch.ones(6, device="npu"))
    module[2].bias.grad.fill_(float("inf"))
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 4 and module[2].bias.isfinite().all()


def test_memory_is_counted():
    torch.npu.reset_peak_memory_stats(1)
    before = torch.npu.memory_allocated(1)
    free, total = torch.npu.mem_get_info(1)
    x = torch.empty(1000, device="npu:1")
    assert torch.npu.memory_allocated(1) == before + 4000
    assert torch.npu.mem_get_info(1) == (free - 4000, total)
    assert torch.npu.get_device_properties(1).total_memory == total
    del x
    assert torch.npu.memory_allocated(1) == before
    assert torch.npu.max_memory_allocated(1) == before + 4000
    assert torch.npu.memory_stats(1)["allocated_bytes.all.peak"] == before + 4000
    torch.npu.reset_peak_memory_stats(1)
    assert torch.npu.max_memory_allocated(1) == before


def test_pinned_memory():
    pinned = torch.arange(6.0).pin_memory()
    assert pinned.is_pinned() and pinned[4:].is_pinned()
    neighbours = [(torch.ones(3), torch.ones(3).pin_memory()) for _ in range(20)]
    assert not any(pageable.is_pinned() for pageable, _ in neighbours)
    assert torch.equal(pinned.to("npu", non_blocking=True).cpu(), torch.arange(6.0))


def test_streams_and_events():
    stream = torch.npu.Stream()
    assert torch.npu.current_stream() == torch.npu.default_stream() != stream
    start, end = (torch.npu.Event(enable_timing=True) for _ in range(2))
    with torch.npu.stream(stream):
        assert torch.npu.current_stream() == stream
        start.record()
        x = torch.ones(2, device="npu")
        end.record(stream)
    x.record_stream(stream)
    stream.wait_event(end)
    stream.wait_stream(torch.npu.current_stream())
    stream.synchronize()
    torch.npu.synchronize()
    assert end.query() and 0 < start.elapsed_time(end) < 10_000
    assert torch.npu.current_stream() == torch.npu.default_stream()


def test_a_llama_trains_as_on_the_cpu():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    losses = {}
    for device in ("cpu", "npu"):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).to(device)
        ids = torch.arange(64).view(2, 32).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses[device] = []
        for _ in range(3):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[device].append(loss.item())
    assert losses["npu"] == pytest.approx(losses["cpu"], abs=1e-5) and losses["cpu"][2] < losses["cpu"][0] - 0.5


def test_the_libraries_see_an_npu():
    from accelerate.utils import is_npu_available
    from deepspeed.accelerator import get_accelerator
    from transformers.utils import is_torch_npu_available

    from sora_hw.devices.npu import NPU

    assert is_npu_available() and is_torch_npu_available(check_device=True)
    assert get_accelerator().device_name() == "npu" and get_accelerator().communication_backend_name() == "hccl"
    assert get_accelerator().FloatTensor([2.5]).item() == 2.5
    assert NPU.is_usable() is None and NPU.count() == 8
    assert "simulated" in NPU.name(), "what it is shows in every report"


@pytest.fixture(scope="module")
def probes():
    """Operators in our namespace with each kind of kernel; the first is differentiable, with itself as its gradient."""
    library = torch.library.Library("sora_hw", "FRAGMENT")
    for name, key in (("native", "PrivateUse1"), ("composite", "CompositeExplicitAutograd"), ("missing", "CPU")):
        library.define(f"probe_{name}(Tensor x) -> Tensor")
        library.impl(f"probe_{name}", torch.clone, key)
    library.impl("probe_native", torch.clone, "CPU")
    library.define("probe_view(Tensor(a) x) -> Tensor(a)")
    library.impl("probe_view", torch.clone, "CPU")
    torch.library.register_autograd(
        "sora_hw::probe_native", lambda ctx, grad: torch.ops.sora_hw.probe_native(grad), lib=library
    )
    yield torch.ops.sora_hw
    library._destroy()


def test_what_ran_where_is_counted(probes):
    x = torch.ones(2, device="npu", requires_grad=True)
    probes.probe_native(x).sum().backward()
    for _ in range(3):
        probes.probe_composite(x)
    assert simulation.counts()["native"] == {"sora_hw::probe_native": 2}, "forward, and backward in its thread"
    assert simulation.counts()["composite"] == {"sora_hw::probe_composite": 3}
    assert not [name for name in simulation.counts()["cpu_fallback"] if name.startswith("sora_hw::")]
    probes.probe_missing(x.detach())
    assert simulation.counts()["cpu_fallback"]["sora_hw::probe_missing"] == 1
    simulation.reset()
    probes.probe_native(torch.ones(2))
    assert simulation.counts() == {"native": {}, "composite": {}, "cpu_fallback": {}}, "a call on the CPU is none"


def test_a_view_without_a_kernel_is_refused(probes):
    """A copy in its place would lose what is written into it."""
    with pytest.raises(RuntimeError, match="view operator"):
        probes.probe_view(torch.ones(4, device="npu"))


EPILOGUES = {
    "": lambda y, x3: y,
    "add": torch.add,
    "mul": torch.mul,
    "relu": lambda y, x3: y.clamp(min=0),
    "gelu_erf": lambda y, x3: y * (1 + torch.erf(y / 2**0.5)) / 2,
    "gelu_tanh": lambda y, x3: y * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3))) / 2,
}


@pytest.mark.parametrize("kind", EPILOGUES)
def test_npu_fused_matmul(kind):
    x1, x2, bias, x3 = (torch.randn(*shape).bfloat16() for shape in [(5, 7), (7, 3), (3,), (5, 3)])
    options = {"fused_op_type": kind}
    y = x1.double() @ x2.double()
    if not kind.startswith("gelu"):
        options["bias"] = bias.to("npu")
        y += bias.double()
    if kind in ("add", "mul"):
        options["x3"] = x3.to("npu")
    result = torch_npu.npu_fused_matmul(x1.to("npu"), x2.to("npu"), **options)
    assert result.is_npu and result.dtype == torch.bfloat16
    assert torch.allclose(result.cpu().double(), EPILOGUES[kind](y, x3.double()), rtol=2**-8, atol=1e-5)
    assert simulation.counts()["native"] == {"npu::npu_fused_matmul": 1}


def test_npu_fused_matmul_refuses_what_the_npu_refuses():
    half, single = torch.ones(2, 2, device="npu").half(), torch.ones(2, 2, device="npu")
    for x1, x2, options in (
        (single, single, {}),  # float32 runs in HF32 only
        (half, single, {}),
        (half, half[None], {}),
        (half, half, {"fused_op_type": "add"}),
        (half, half, {"fused_op_type": "relu", "x3": half}),
        (half, half, {"fused_op_type": "add", "x3": half[0]}),
        (half, half, {"fused_op_type": "add", "x3": single}),
        (half, half, {"fused_op_type": "gelu_erf", "bias": half[0]}),
        (half, half, {"fused_op_type": "silu"}),
    ):
        with pytest.raises(RuntimeError, match="simulated npu_fused_matmul: does not take"):
            torch_npu.npu_fused_matmul(x1, x2, **options)


def test_the_set_up_is_that_of_a_machine_with_cann():
    assert os.path.isdir(os.environ["ASCEND_HOME_PATH"])
    torch.npu.set_compile_mode(jit_compile=False)
    torch.npu.config.allow_internal_format = False
    torch.npu.matmul.allow_hf32 = False


@pytest.mark.parametrize("shape", [(3, 5), (2, 128), (7, 40, 3)])
def test_dropout_packs_its_mask_as_torch_npu_does(shape):
    x = torch.ones(shape, device="npu").requires_grad_()
    dropped, mask = torch.native_dropout(x, 0.25, True)
    assert mask.dtype == torch.uint8 and mask.shape == (-(-x.numel() // 128) * 16,)
    assert set(dropped.unique().tolist()) <= {0.0, float(torch.tensor(1 / 0.75))}
    (gradient,) = torch.autograd.grad(functional.dropout(x, 0.25).sum(), x)
    assert gradient.unique().numel() <= 2 and gradient.any()
    dropped = functional.dropout(x, 0.25)
    assert torch.equal(torch.autograd.grad(dropped.sum(), x)[0], dropped.detach())
