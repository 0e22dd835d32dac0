"""How much memory a training step takes on each rank, tracked on meta tensors before anything is downloaded.

A model of a few layers is built on torch's meta device, where tensors have shapes and no memory, and takes two
micro-batches there: every storage is counted while it lives (`tracking`). What grows with the layers grows linearly, so
two depths give the full one. What DeepSpeed holds beside it stands in `held`.

Counted are tensors. Not counted: the allocator's fragmentation, workspaces of kernels and of communication, and what a
device's runtime takes for itself. On the processor glibc's malloc is such an allocator: it keeps freed blocks of up to
32 MiB, and processes were seen with up to 70 % more than their tensors; with MALLOC_MMAP_THRESHOLD_=1048576 in their
environment they hold what is planned, within 4 %.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.fx.experimental import _config as fx_config
from transformers import PreTrainedModel

from sora_hw.adapter.base_weight import in_backward
from sora_hw.analysis.held import Held
from sora_hw.analysis.stand_ins import FusedLossHead, fuse_attention
from sora_hw.analysis.tracking import ACTIVATIONS, GRADIENTS, LOGITS, Tracker, set_dtype, storage_bytes

KINDS = (ACTIVATIONS, LOGITS, GRADIENTS)

# The moments of a micro-batch, each with a peak that grows linearly with the layers. The peak of a whole micro-batch
# does not: which moment it falls into depends on the layers. Between the last and the first layer's backward pass the
# memory changes from layer to layer by the same amount, so its maximum is at one of the two ends.
FORWARD, HEAD, LAST, MIDDLE, FIRST = "forward", "head", "last layer", "middle layers", "first layer"
BACKWARD = (LAST, MIDDLE, FIRST)

FEW, MORE = 2, 3  # layers: with two the first and the last are different ones

# NF4 as transformers sets it up: half a byte an element, and a float32 maximum for every 64 (no double quantisation).
NF4_BYTES = 0.5 + 4 / 64


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the peak of a training step.

    Attributes:
        base: the frozen parameters, and the model's buffers.
        adapter: the trained parameters that the computation uses.
        optimiser: float32 copies of what is trained, and Adam's moments.
        gradients: of the trained parameters, with the bucket that they are reduced in.
        activations: what the forward pass keeps, and the intermediate results of the moment.
        logits: the loss head: logits, their float32 copies, their gradients.
        buffers: gathered or dequantised weights, the optimiser's scratch, and the process itself.
    """

    base: int = 0
    adapter: int = 0
    optimiser: int = 0
    gradients: int = 0
    activations: int = 0
    logits: int = 0
    buffers: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, each.name) for each in fields(self))


@dataclass(frozen=True)
class Step:
    """How a rank computes its share of an optimiser step.

    Attributes:
        micro_batch: sequences of one forward pass.
        sequence_length: tokens of each; the longest that occur, since the peak is theirs.
        dtype: of the base model, float32 or bfloat16.
        gradient_checkpointing: whether the layers' activations are recomputed.
        zero_stage: 0 to 3.
        world_size: ranks.
        accumulation: micro-batches of an optimiser step.
        fused_loss: whether the loss is Liger's fused linear cross-entropy.
        offload: whether optimiser states, and under ZeRO-3 parameters, lie in the host's memory.
        four_bit: whether the frozen linear layers but the head are packed to NF4.
    """

    micro_batch: int
    sequence_length: int
    dtype: str
    gradient_checkpointing: bool
    zero_stage: int
    world_size: int = 1
    accumulation: int = 1
    fused_loss: bool = False
    offload: bool = False
    four_bit: bool = False


def expected_memory(
    build: Callable[[int], nn.Module], layers: int, step: Step, *, bucket: int, process: int = 0
) -> Memory:
    """The peak of one rank.

    Args:
        build: makes the model with a number of layers: a causal language model or a classifier of transformers, whole,
            with an adapter of PEFT around it or without. It is called with the meta device as torch's default.
        layers: the model's layers.
        step: how a rank computes.
        bucket: elements of DeepSpeed's reduce_bucket_size. On the processor memory counts when it is written to, so
            there it is at most the number of trained elements.
        process: bytes of the process without tensors, where the device's memory is the host's.
    """
    few, more = min(FEW, layers), min(MORE, layers)
    low = _track(build, few, step)
    track = low if few == more else low.extrapolated(_track(build, more, step), (layers - few) / (more - few))
    held = Held(
        trained=track.trained,
        largest=track.largest,
        frozen_bytes=track.frozen_bytes,
        bytes=getattr(torch, step.dtype).itemsize,
        zero_stage=step.zero_stage,
        world_size=step.world_size,
        offload=step.offload,
        bucket=bucket,
    )
    return max(_moments(track, held, step, process), key=lambda memory: memory.total)


@dataclass(frozen=True)
class _Track:
    """What was found on a model of some layers: counts, and the tracked bytes of each kind at each moment's peak."""

    trained: int
    largest: int
    frozen_bytes: int
    dequantised: int
    peaks: dict[tuple[int, str], Counter]

    def extrapolated(self, other: _Track, times: float) -> _Track:
        """`self` and `times` the difference to `other`, a model of more layers."""

        def line(a: int, b: int) -> int:
            return round(a + times * (b - a))

        peaks = {
            moment: Counter({kind: line(found[kind], other.peaks[moment][kind]) for kind in KINDS})
            for moment, found in self.peaks.items()
        }
        trained, frozen = line(self.trained, other.trained), line(self.frozen_bytes, other.frozen_bytes)
        return replace(self, trained=trained, frozen_bytes=frozen, peaks=peaks)


def _moments(track: _Track, held: Held, step: Step, process: int) -> Iterator[Memory]:
    """What a rank holds at each of the moments of which one is the peak."""
    always = Memory(base=held.base, adapter=held.adapter, optimiser=held.master, buffers=process)
    weights = held.gathered + track.dequantised
    for (micro_batch, moment), found in track.peaks.items():
        later = micro_batch > 0  # Adam's moments are there when the first optimiser step has been made
        gradients = held.gradients(moment in BACKWARD, accumulated=later and step.accumulation > 1)
        yield replace(
            always,
            optimiser=always.optimiser + later * held.moments,
            gradients=found[GRADIENTS] + gradients,
            activations=found[ACTIVATIONS],
            logits=found[LOGITS],
            buffers=process + weights,
        )
    yield replace(
        always,
        optimiser=held.master + held.moments,
        gradients=held.update_gradients,
        buffers=process + held.update_scratch,
    )


def _track(build: Callable[[int], nn.Module], layers: int, step: Step) -> _Track:
    """Take two micro-batches on the meta device.

    The second is the one of a long run. The first may take more: a conditioned layer does not know yet whether the
    model goes on to write into its output, and keeps its input (`sora_hw.adapter.keeping`).
    """
    with torch.device("meta"):
        model = build(layers)
    set_dtype(model.parameters(), getattr(torch, step.dtype))
    transformer = _transformer(model)
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    packed = _packed_weights(model) if step.four_bit else []
    _mark(frozen if step.zero_stage == 3 else [], packed)
    frozen_bytes = (
        storage_bytes(frozen)
        + storage_bytes(model.buffers())
        - round(sum(weight.numel() * (weight.itemsize - NF4_BYTES) for weight in packed))
    )
    peaks = _two_micro_batches(model, transformer, layers, step)
    return _Track(
        trained=sum(parameter.numel() for parameter in trained),
        largest=max(parameter.numel() for parameter in trained),
        frozen_bytes=frozen_bytes,
        dequantised=max((weight.nbytes for weight in packed), default=0),
        peaks=peaks,
    )


def _two_micro_batches(model: nn.Module, transformer: PreTrainedModel, layers: int, step: Step) -> dict:
    head = transformer.get_output_embeddings()
    fuse_attention(transformer)
    if step.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    inputs = _inputs(transformer, head, step)
    tracker = Tracker(
        [*model.parameters(), *model.buffers(), *filter(torch.is_tensor, inputs.values())], head and head.out_features
    )
    if step.fused_loss and head is not None:
        transformer.set_output_embeddings(FusedLossHead(head))
    _watch_layers(model, layers, tracker)
    _watch_gradients(model, tracker, kept=step.zero_stage < 2)
    with _as_planned(), tracker:
        for micro_batch in (0, 1):
            tracker.enter((micro_batch, FORWARD))
            _loss(model, inputs).backward()
            if step.accumulation == 1:
                model.zero_grad(set_to_none=True)
    return tracker.peaks


def _loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The loss alone, as the Trainer keeps it; the logits are released."""
    output = model(**inputs)
    return output.logits if "labels" not in inputs else output.loss


def _inputs(transformer: PreTrainedModel, head: nn.Module | None, step: Step) -> dict[str, Tensor | bool]:
    """A micro-batch, without the cache, which the Trainer turns off. The fused head needs no labels: it gives the loss
    in the place of the logits."""
    tokens = torch.zeros(step.micro_batch, step.sequence_length, dtype=torch.long, device="meta")
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False}
    if head is None:  # a classifier
        del inputs["use_cache"]
        return inputs | {"labels": tokens[:, 0]}
    return inputs if step.fused_loss else inputs | {"labels": tokens}


def _transformer(model: nn.Module) -> PreTrainedModel:
    """The model of transformers within PEFT's."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _packed_weights(model: nn.Module) -> list[nn.Parameter]:
    """The frozen weights that bitsandbytes packs: of every linear layer but the head."""
    head = _transformer(model).get_output_embeddings()
    linear = (module for module in model.modules() if isinstance(module, nn.Linear) and module is not head)
    return [module.weight for module in linear if not module.weight.requires_grad]


def _mark(sharded: list[nn.Parameter], packed: list[nn.Parameter]) -> None:
    """Give weights the marks by which a layer knows that it cannot read them whole: those of ZeRO-3, bitsandbytes."""
    for parameter in sharded:
        parameter.ds_id, parameter.ds_numel = 0, parameter.numel()
    for parameter in packed:
        parameter.quant_state = None


def _watch_layers(model: nn.Module, layers: int, tracker: Tracker) -> None:
    """Tell the tracker which moment runs: the head from the last layer's output on, and then each layer's backward."""
    stack = next(each for each in model.modules() if isinstance(each, nn.ModuleList) and len(each) == layers)

    def watch(module: nn.Module, index: int) -> None:
        name = LAST if index == layers - 1 else FIRST if index == 0 else MIDDLE

        def follow(module: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
            if in_backward():  # recomputed
                return
            output = output if isinstance(output, Tensor) else output[0]
            micro_batch = tracker.moment[0]
            output.register_hook(lambda gradient: tracker.enter((micro_batch, name)))
            if index == layers - 1:
                tracker.enter((micro_batch, HEAD))

        module.register_forward_hook(follow)

    for index, module in enumerate(stack):
        watch(module, index)


def _watch_gradients(model: nn.Module, tracker: Tracker, kept: bool) -> None:
    """ZeRO-0 and 1 leave a gradient where autograd puts it; otherwise DeepSpeed takes it into its bucket at once."""

    def arrived(parameter: Tensor) -> None:
        if kept:
            tracker.set_kind(parameter.grad, GRADIENTS)
        else:
            parameter.grad = None

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(arrived)


@contextmanager
def _as_planned() -> Iterator[None]:
    """What libraries say about the planned computation would be taken for a note on a real one. And a classifier looks
    for the samples that have a label, which on the meta device are all of them."""
    with warnings.catch_warnings(), fx_config.patch(meta_nonzero_assume_all_nonzero=True):
        warnings.simplefilter("ignore")
        yield
