"""A run that is planned and not started."""

from rich.console import Console

from sora_hw.training.arguments import Request
from sora_hw.training.base_model import is_local
from sora_hw.training.deepspeed_config import deepspeed_config
from sora_hw.training.plan import Plan
from sora_hw.training.report import print_plan
from sora_hw.training.run import check


def show_plan(request: Request, plan: Plan, console: Console) -> None:
    """Print what the run would be. Nothing is downloaded and nothing written."""
    if is_local(plan.recipe.model):
        shown = check(request, plan).as_dict()
    else:
        shown = plan.as_dict() | {"deepspeed": deepspeed_config(plan, None)}
    print_plan(shown, console, request.as_json)
