"""What a run has done to each of its layers: the spectrum of `dW = W' - W0`, layer by layer."""

import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from peft import LoraConfig, PeftConfig, inject_adapter_in_model
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import Tensor, nn

from sora_hw import ConditionedConfig
from sora_hw.analysis.spectrum import DENSE, LayerSpectrum, conditioned_singular_values, how_computed, singular_values
from sora_hw.errors import UserError
from sora_hw.finished.run import FinishedRun
from sora_hw.finished.weights import StoredModel
from sora_hw.hardware import Profile
from sora_hw.recipes.recipe import FULL
from sora_hw.storage import check_regular
from sora_hw.training.base_model import find, targeted
from sora_hw.training.objectives import objective_of
from sora_hw.training.run_folder import MANIFEST
from sora_hw.training.saving import WEIGHTS

# base_model.model.LAYER.conditioned_A of ours; base_model.model.LAYER.lora_A.weight or .oft_R.weight of PEFT's
_KEY = re.compile(r"base_model\.model\.(?P<layer>.+)\.(?:conditioned|lora|oft)_(?P<parameter>\w+)(?:\.weight)?")
_COPIES = 5  # of a weight in float64, while its dense spectrum is computed: W0, W', LAPACK's and what that works with

Watch = Callable[[int, int], None]  # layers done, layers in all
Adapter = Mapping[str, Mapping[str, Tensor]]  # layer -> parameter -> tensor


def layer_spectra(run: FinishedRun, watch: Watch) -> list[LayerSpectrum]:
    """The spectrum of every layer that the run has trained, in float64 on the processor, whatever trained it.

    `W0` is the base weight in the dtype that the run held it in; of a base that was packed to four bits it is the
    weight before packing. Layers that are trained whole beside an adapter (`modules_to_save`) are left out; of full
    fine-tuning those layers are taken that the recipe targets. As many layers are worked on at a time as torch may use
    threads and as fit into memory, each on one thread.

    Raises UserError where what was trained or its base model is missing or damaged, or they do not fit each other.
    """
    objective, profile = objective_of(run.recipe), _profile(run)
    with ExitStack() as opened:
        before = opened.enter_context(StoredModel(find(run.recipe.model, objective), profile))
        layers = before.layers()
        if run.recipe.method == FULL:
            model = find(str(run.trained), objective)
            after = opened.enter_context(StoredModel(model, replace(profile, dtype="float32")))
            targets = set().union(*(targeted(after.model, target) for target in run.recipe.target_modules))
            names = [name for name in after.layers() if name in targets]

            def spectrum(name: str) -> LayerSpectrum:
                return _tuned(name, before.weight(name), after.weight(name))
        else:
            config, adapter = _adapter(run.trained)
            names = sorted(adapter, key=lambda name: layers.index(name) if name in layers else -1)

            def spectrum(name: str) -> LayerSpectrum:
                return _adapted(name, before.weight(name), config, adapter[name])

        if unknown := [name for name in names if name not in layers]:
            raise UserError(f"{run.trained}: {run.recipe.model}, its base model, has no linear layer {unknown[0]}")
        largest = max(before.size(name) for name in names)
        return _each(spectrum, names, _at_once(largest), watch)


def _profile(run: FinishedRun) -> Profile:
    try:
        return Profile(**{**run.manifest["profile"], "four_bit": False})
    except (KeyError, TypeError):
        raise UserError(f"{run.path / MANIFEST} does not say in which dtype its base model was held") from None


def _adapter(folder: Path) -> tuple[PeftConfig, Adapter]:
    """The configuration and the tensors of an adapter."""
    try:
        config = PeftConfig.from_pretrained(str(folder))
        check_regular(folder / WEIGHTS)
        tensors = load_file(folder / WEIGHTS)
    except Exception as error:  # each method of PEFT's fails in its own ways at what a file may hold
        raise UserError(f"{folder}: the adapter is missing or damaged ({str(error).splitlines()[0]})") from None
    adapter: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if found := _KEY.fullmatch(key):
            adapter.setdefault(found["layer"], {})[found["parameter"]] = tensor
    if not adapter:
        raise UserError(f"{folder}: the adapter holds no layer")
    return config, adapter


def _tuned(name: str, before: Tensor, after: Tensor) -> LayerSpectrum:
    """Of a layer that was trained whole."""
    _check(name, {"the weight": (before.shape, after)})
    return LayerSpectrum.of(name, tuple(before.shape), DENSE, singular_values(after.double() - before.double()))


def _adapted(name: str, weight: Tensor, config: PeftConfig, parameters: Mapping[str, Tensor]) -> LayerSpectrum:
    """Of a layer with the parameters of one adapter of ours, or of PEFT's LoRA or OFT."""
    if isinstance(config, LoraConfig):
        rank, alpha = (
            pattern.get(get_pattern_key(pattern, name), otherwise)
            for pattern, otherwise in (
                (config.rank_pattern, config.r),
                (config.alpha_pattern, config.lora_alpha),
            )
        )
        config = ConditionedConfig(method="lora", r=rank, alpha=alpha, use_rslora=config.use_rslora)
    out_features, in_features = weight.shape
    if not isinstance(config, ConditionedConfig):
        update = _rotated(weight, config, parameters["R"]) - weight.double()
        return LayerSpectrum.of(name, (out_features, in_features), DENSE, singular_values(update))
    shapes = config.conditioning.parameter_shapes(in_features, out_features, config.r, config.rotation_rank)
    if parameters.keys() != shapes.keys():
        wrong = ", ".join(sorted(parameters.keys() ^ shapes.keys()))
        raise UserError(f"{name}: the adapter has other parameters than its configuration says (differing: {wrong})")
    _check(name, {parameter: (shapes[parameter], parameters[parameter]) for parameter in shapes})
    sigma = conditioned_singular_values(weight, config.conditioning, parameters, config.scaling)
    return LayerSpectrum.of(name, (out_features, in_features), how_computed(config.conditioning), sigma)


def _rotated(weight: Tensor, config: PeftConfig, r: Tensor) -> Tensor:
    """`W'` (out, in) of PEFT's OFT, computed by PEFT, float64.

    weight: `W0`, (out, in). r: the elements of each block's skew-symmetric matrix, (blocks, elements).
    """
    out_features, in_features = weight.shape
    layer = nn.Linear(in_features, out_features, bias=False, dtype=torch.float64)
    layer.weight.data.copy_(weight)
    config = replace(config, target_modules=["layer"], oft_block_size=in_features // len(r))
    rotated = inject_adapter_in_model(config, nn.ModuleDict({"layer": layer}))["layer"]
    rotated.oft_R["default"].weight.data.copy_(r)
    with torch.no_grad():
        rotated.merge()
    return layer.weight.data


def _check(name: str, tensors: Mapping[str, tuple[Sequence[int], Tensor]]) -> None:
    """tensors: what each is called -> its shape as it should be, the tensor."""
    for called, (shape, tensor) in tensors.items():
        if tuple(tensor.shape) != tuple(shape):
            raise UserError(
                f"{name}: {called} is {_times(tensor.shape)} where the base model makes it {_times(shape)}: "
                "they belong to different models"
            )
        if not torch.isfinite(tensor).all():
            raise UserError(f"{name}: {called} has values that are not finite: the run has diverged")


def _times(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _at_once(largest: int) -> int:
    """How many layers fit into memory and have a thread; `largest` is the number of weights of the largest."""
    fitting = psutil.virtual_memory().available // (_COPIES * largest * torch.float64.itemsize)
    return max(1, min(torch.get_num_threads(), fitting))


def _each(
    spectrum: Callable[[str], LayerSpectrum], names: Sequence[str], at_once: int, watch: Watch
) -> list[LayerSpectrum]:
    """The spectrum of every layer, `at_once` at a time."""
    spectra = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(at_once) as pool:
            for done, each in enumerate(pool.map(spectrum, names), 1):
                spectra.append(each)
                watch(done, len(names))
    finally:
        torch.set_num_threads(threads)
    return spectra
