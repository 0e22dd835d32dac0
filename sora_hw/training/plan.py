"""What a run is going to do, resolved from the request before anything is created."""

from dataclasses import asdict, dataclass, replace
from types import ModuleType

from sora_hw.devices.cpu import CPU
from sora_hw.devices.detect import DEVICES, select
from sora_hw.devices.device import Device
from sora_hw.errors import UserError
from sora_hw.hardware import ENCODER, BatchPlan, Profile, batch_plan, choose, fitting_micro_batch
from sora_hw.recipes.recipe import EMBEDDED, FULL, LanguageModelling, Recipe
from sora_hw.training.arguments import Request, paper_recipe
from sora_hw.training.environment import number_of_ranks


@dataclass(frozen=True)
class Plan:
    """The recipe and how this hardware carries it out. Only `recipe` and the data decide what is learned."""

    recipe: Recipe
    device: Device
    profile: Profile
    batch: BatchPlan

    @property
    def environment(self) -> dict[str, str]:
        """The variables that a run sets where the user has not."""
        accelerator = {"DS_ACCELERATOR": self.device.deepspeed_accelerator}
        return accelerator | dict(self.device.environment) | dict(self.profile.environment)

    def as_dict(self) -> dict[str, object]:
        """The plan in JSON's types."""
        return {
            "recipe": asdict(self.recipe),
            "device": self.device.type,
            "profile": {**asdict(self.profile), "environment": dict(self.profile.environment)},
            "batch": asdict(self.batch),
        }


def make_plan(request: Request, module: ModuleType) -> Plan:
    """Choose device, profile, recipe and batches.

    Raises UserError for what cannot be had together: a device that is not usable or not the profile's, a dtype that it
    lacks, ZeRO-0 in bfloat16, a global batch that the ranks cannot share.
    """
    device, profile = _hardware(request)
    recipe = _recipe(request, module, profile)
    profile = _fitted(profile, recipe, request)
    check_profile(profile, device, recipe)
    world_size = number_of_ranks() or request.ranks or (request.dry_run and profile.ranks) or 1
    micro_batch = request.profile.get("micro_batch")
    if micro_batch is None:  # the profile's is what fits into memory; a smaller one always does
        # Where none divides the batch, 1 makes the error propose every batch that the ranks could share.
        micro_batch = fitting_micro_batch(recipe.global_batch, world_size, profile.micro_batch) or 1
    return Plan(recipe, device, profile, batch_plan(recipe.global_batch, world_size, micro_batch))


def _hardware(request: Request) -> tuple[Device, Profile]:
    if not request.dry_run or request.hardware == "auto":
        device = select(request.backend)
        profile = choose(request.hardware, device)
    else:  # another machine's run is planned here
        profile = choose(request.hardware, CPU)
        device = DEVICES[profile.device]
    if profile.device != device.type or request.backend not in ("auto", device.type):
        raise UserError(
            f"--hardware {request.hardware} is for --backend {profile.device}, but the backend is "
            f"{device.type if request.backend == 'auto' else request.backend}; give one that fits the other"
        )
    return device, replace(profile, **request.profile)


def _fitted(profile: Profile, recipe: Recipe, request: Request) -> Profile:
    """The profile without what the recipe has no use for."""
    if isinstance(recipe, LanguageModelling):
        return profile
    return replace(profile, **{**ENCODER, **request.profile})  # nothing needs to be spared: see hardware.ENCODER


def check_profile(profile: Profile, device: Device, recipe: Recipe) -> None:
    """Raises UserError for what device, recipe and the profile's own values do not let it have."""
    if profile.dtype not in device.dtypes:
        raise UserError(f"--dtype {profile.dtype}: {device.display_name} trains in {' or '.join(device.dtypes)}")
    if profile.zero_stage == 0 and profile.dtype == "bfloat16":
        raise UserError(
            "--zero-stage 0 drifts from the right losses in bfloat16; use stage 1, 2 or 3, or --dtype float32"
        )
    if profile.offload and device.type == CPU.type:
        raise UserError("--offload moves memory to the host, and on --backend cpu everything is there already")
    if profile.four_bit and recipe.method == FULL:
        raise UserError("--load-in-4bit freezes the base, which --method full trains; give one of them")
    if profile.four_bit and profile.zero_stage == 3:
        raise UserError("--load-in-4bit: ZeRO-3 cannot shard packed weights; use --zero-stage 2")
    if profile.four_bit and not device.has_four_bit:
        raise UserError(f"--load-in-4bit: bitsandbytes does not serve the {device.display_name}")
    if profile.fused_loss and not device.has_fused_loss:
        raise UserError(f"--fused-loss: Liger has no kernels for the {device.display_name}; use --no-fused-loss")


def _recipe(request: Request, module: ModuleType, profile: Profile) -> Recipe:
    named = request.recipe.get("model")
    small = named == EMBEDDED or (named is None and profile.device == CPU.type)
    given = dict(request.recipe)
    if "epochs" in given:
        given.setdefault("max_steps", None)
    recipe = module.embedded() if small and hasattr(module, "embedded") else paper_recipe(module, given)
    if "train_data" in given and hasattr(recipe, "test_data"):
        given.setdefault("test_data", ())  # the benchmark's own would score what was learned from something else
    return replace(recipe, **given)
