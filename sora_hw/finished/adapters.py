"""An adapter on the disk, of a run or of any other origin, on its base model; and a folder for what is made of it."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from peft import PeftConfig, PeftModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoTokenizer

from sora_hw.adapter.checkpoint import AUTO_CLASSES
from sora_hw.errors import UserError
from sora_hw.finished.run import read_run
from sora_hw.recipes.recipe import FULL
from sora_hw.storage import read_json
from sora_hw.training.base_model import BaseModel, find, load_as_stored
from sora_hw.training.objectives import objective_of
from sora_hw.training.run_folder import MANIFEST, MODEL
from sora_hw.training.saving import ADAPTER_CONFIG, WEIGHTS, load_adapter

NAME = "default"  # of the one adapter that `open_adapter` loads


@dataclass(frozen=True)
class Adapter:
    """The folder of a saved adapter, its configuration, and the model that it belongs to."""

    folder: Path
    config: PeftConfig
    base: BaseModel


@dataclass(frozen=True)
class _Head:
    """What a model must end in for an adapter; see `sora_hw.training.base_model.Headed`."""

    auto_class: type
    model_options: Mapping[str, object] = field(default_factory=dict)


def find_adapter(path: Path, model: str | None) -> Adapter:
    """The adapter that a run left in the folder `path`, or that lies there itself.

    Args:
        path: of the run, or of the adapter.
        model: the base model, where another is meant than run.json or the adapter's configuration name.

    Raises UserError where there is none, or its base model is not to be found or quantised.
    """
    if (path / MANIFEST).exists():
        run = read_run(path, model)
        if run.recipe.method == FULL:
            raise UserError(f"{path}: full fine-tuning leaves no adapter but a plain model, {path / MODEL}")
        folder = run.trained
        config = read_config(folder)
        base = find(run.recipe.model, objective_of(run.recipe))
    else:
        folder = path
        config = read_config(folder)
        base = find_base(folder, config, model)
    if getattr(base.config, "quantization_config", None) is not None:
        raise UserError(f"--model {base.name}: its weights are quantised; name the model with the original ones")
    return Adapter(folder, config, base)


def find_base(folder: Path, config: PeftConfig, model: str | None) -> BaseModel:
    """The base model by an adapter's configuration, or `model`. Raises UserError where it is not to be found."""
    name = model or config.base_model_name_or_path
    if not (name and isinstance(name, str)):
        raise UserError(f"{folder / ADAPTER_CONFIG} does not name the base model; give it with --model")
    return find(name, _head(folder, config))


def read_config(folder: Path) -> PeftConfig:
    """The configuration of the adapter in `folder`. Raises UserError where there is none, or it is damaged."""
    if not (folder / ADAPTER_CONFIG).exists():
        raise UserError(f"{folder}: neither a run nor an adapter (no {MANIFEST} and no {ADAPTER_CONFIG} in it)")
    try:
        dict(read_json(folder / ADAPTER_CONFIG))
        return PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # each method of PEFT's fails in its own ways at what a file may hold
        raise UserError(f"{folder / ADAPTER_CONFIG} cannot be read ({' '.join(str(error).split())})") from None


def open_adapter(adapter: Adapter) -> PeftModel:
    """The adapter on its base model, both as they are stored, in host memory. Raises UserError for damaged files."""
    return load_adapter(load_as_stored(adapter.base), adapter.folder).eval()


def check_untied(model: PeftModel) -> None:
    """Raises UserError where the weight of an adapted layer is another layer's as well, so that to write into the one
    would change the other."""
    owners: dict[int, list[str]] = {}
    for name, module in model.get_base_model().named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name.removesuffix(".base_layer"))
    for module in model.modules():
        # the rows of trained tokens are tied by PEFT itself
        if isinstance(module, BaseTunerLayer) and not isinstance(module, TrainableTokensLayer):
            names = owners[id(module.get_base_layer().weight)]
            if len(names) > 1:
                raise UserError(
                    f"{' and '.join(names)} share one weight, which the adapter changes for one of them only: it "
                    "cannot be written into the model; use the adapter as it is"
                )


def save_tokenizer(adapter: Adapter, folder: Path) -> bool:
    """Write the adapter's own tokenizer to `folder`, else the base model's. False where neither has one."""
    own = (adapter.folder / "tokenizer_config.json").exists()
    try:
        source = str(adapter.folder) if own else adapter.base.source
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception:  # transformers raises all kinds where a folder has no tokenizer
        return False
    tokenizer.save_pretrained(folder)
    return True


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder aside to write into, which becomes `path` at the end; on an error nothing of it is left.

    Raises UserError where `path` exists, or cannot be written.
    """
    if path.exists():
        raise UserError(f"--output {path} exists; name a new folder")
    aside = path.with_name(f"{path.name}.part")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        os.rename(aside, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"--output {path} cannot be written ({reason})") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@dataclass
class Rounding:
    """What a low precision takes from a change of weights: `||error||_F / ||change||_F` over all layers."""

    error: float = 0.0
    change: float = 0.0

    def add(self, before: Tensor, exact: Tensor) -> None:
        """Count a layer, whose weight `before` becomes `exact`, of a wider dtype, rounded to that of `before`."""
        self.error += (exact.to(before.dtype) - exact).square().sum().item()
        self.change += (exact - before).square().sum().item()

    def told(self, dtype: torch.dtype) -> list[str]:
        """A line that says so, where there is anything to say."""
        if dtype.itemsize >= 4 or not self.change:
            return []
        share = (self.error / self.change) ** 0.5
        return [f"rounding to {shown(dtype)} loses {share:.1%} of the change, by its norm"]


def shown(dtype: torch.dtype) -> str:
    """ "bfloat16" of torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def _head(folder: Path, config: PeftConfig) -> _Head:
    """The head by the adapter's task type, or by the class that PEFT has noted where it was given none. The labels of a
    classifier are counted in its saved weights."""
    noted = config.auto_mapping if isinstance(config.auto_mapping, dict) else {}
    own = noted.get("base_model_class") if str(noted.get("parent_library")).startswith("transformers.") else None
    auto_class = getattr(transformers, AUTO_CLASSES.get(str(config.task_type), str(own)), None)
    if not (isinstance(auto_class, type) and hasattr(auto_class, "from_pretrained")):
        raise UserError(f"{folder / ADAPTER_CONFIG} names neither a task_type nor a model class of transformers")
    options = {}
    if config.task_type in ("SEQ_CLS", "TOKEN_CLS") and (folder / WEIGHTS).is_file():
        with (
            suppress(SafetensorError),
            safe_open(folder / WEIGHTS, framework="pt") as weights,
        ):  # told when it is loaded
            for name in weights.keys():  # noqa: SIM118
                if name.endswith(("classifier.weight", "score.weight", "classifier.out_proj.weight")):
                    options["num_labels"] = weights.get_slice(name).get_shape()[0]
    return _Head(auto_class, options)
