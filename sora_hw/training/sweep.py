"""The paper's grid: one run for each learning rate, seed and rank, each in a folder of its own, and what came of them.

A sweep that is started again goes on where it stopped: a finished run is not repeated, an interrupted one resumes. One
with other rates, seeds or ranks adds its runs to those in its folder.
"""

import gc
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist

from sora_hw.devices.cpu import CPU
from sora_hw.errors import UserError
from sora_hw.recipes.recipe import RUN, Grid, Recipe
from sora_hw.storage import read_json
from sora_hw.terminal import Console
from sora_hw.training.arguments import NEWEST, Request, paper_recipe
from sora_hw.training.divergence import Diverged
from sora_hw.training.plan import make_plan
from sora_hw.training.run import announce, check, train
from sora_hw.training.run_folder import MANIFEST, RUNS
from sora_hw.training.sweep_report import Outcome, best_learning_rate, report

DONE = ("finished", "diverged")
VARIED = ("rank", "learning_rate", "seed", "validation_size")  # what the runs of a sweep differ in


@dataclass(frozen=True)
class Point:
    """One run of a sweep: what it changes in the recipe."""

    rank: int
    learning_rate: float
    seed: int
    validation_size: int

    @property
    def folder(self) -> str:
        """The name of its folder. A run on all records stands beside those that held some out."""
        name = f"rank={self.rank} lr={self.learning_rate:g} seed={self.seed}".replace(" ", "-")
        return name if self.validation_size else f"{name}-all-records"


def sweep(request: Request, module: ModuleType, console: Console) -> None:
    """Run the grid of the recipes in `module`; values that the command line gives stay fixed.

    Where several learning rates are to choose from, records are held out and the best mean over the seeds decides; a
    recipe that trains on all records is then run on all of them, with the best alone.

    Raises UserError where the folder holds runs of another recipe.
    """
    recipe = make_plan(request, module).recipe
    folder = request.output or RUNS / f"{recipe.name}-{recipe.method}-sweep"
    grid = _grid(request, module, recipe)
    choosing = len(grid.learning_rates) > 1
    size = grid.validation_size if choosing and not recipe.validation_size else recipe.validation_size
    earlier = _earlier(folder, recipe)
    outcomes = []
    for rank in grid.ranks:
        points = [Point(rank, rate, seed, size) for rate in grid.learning_rates for seed in grid.seeds]
        tried = [_run(point, request, module, folder, console) for point in points]
        if size != recipe.validation_size:
            best = best_learning_rate(tried)
            points = [Point(rank, best, seed, recipe.validation_size) for seed in grid.seeds]
            tried += [_run(point, request, module, folder, console) for point in points]
        outcomes += tried
        if _is_main():
            made = {outcome.folder for outcome in outcomes}
            others = [outcome for outcome in earlier if outcome.folder not in made]
            report(recipe, [*others, *outcomes], folder, console, finished=rank == grid.ranks[-1])


def _earlier(folder: Path, recipe: Recipe) -> list[Outcome]:
    """The runs that the folder holds already and that are done. Raises UserError where one is of another recipe."""
    wanted = _comparable(asdict(recipe))
    paths = sorted(file.parent for file in folder.glob(f"*/{MANIFEST}"))
    done = [path for path in paths if _status(path) in DONE]
    for path in done:
        found = _comparable(_manifest(path)["recipe"])
        if differing := [name for name in wanted if found.get(name) != wanted[name]]:
            name = differing[0]
            raise UserError(
                f"--output {folder} holds a sweep whose {name} is {found.get(name)}, here it is {wanted[name]}; name "
                "another folder"
            )
    return [_outcome(path) for path in done]


def _comparable(recipe: Mapping[str, object]) -> dict[str, object]:
    """What the runs of a sweep share, in JSON's types; the data are left to the checksum that `check` compares."""
    how_it_runs = {field.name for field in fields(Recipe) if field.metadata.get("group") == RUN}
    left_out = {*VARIED, *how_it_runs, "train_data", "test_data"}
    return json.loads(json.dumps({name: value for name, value in recipe.items() if name not in left_out}))


def _grid(request: Request, module: ModuleType, recipe: Recipe) -> Grid:
    """The paper's grid, narrowed to what the command line gives, and to one learning rate on the embedded model, for
    which the paper has none."""
    given = request.recipe
    grid = module.grid(given["task"]) if "task" in given else module.grid()
    papers = recipe.learning_rate == paper_recipe(module, given).learning_rate
    if "learning_rate" in given or not papers:
        grid = replace(grid, learning_rates=(recipe.learning_rate,))
    if "seed" in given:
        grid = replace(grid, seeds=(recipe.seed,))
    if "rank" in given or not recipe.low_rank:
        grid = replace(grid, ranks=(recipe.rank,))
    return grid


def _run(point: Point, request: Request, module: ModuleType, folder: Path, console: Console) -> Outcome:
    """The outcome of one run, which is made unless it lies there."""
    path = folder / point.folder
    changes = {"rank": point.rank, "learning_rate": point.learning_rate, "seed": point.seed}
    changes["validation_size"] = point.validation_size
    request = replace(request, resume=NEWEST, output=path, recipe={**request.recipe, **changes})
    job = check(request, make_plan(request, module))  # also refuses a folder that holds another run
    if _status(path) not in DONE:
        console.print(f"\n{path}")
        announce(job, console)
        try:
            train(job, console)
            if _is_main():
                job.folder.drop_checkpoints()
        except Diverged as error:
            console.print(f"{error}")
        _forget()
    else:
        console.print(f"{path}: {_status(path)} before")
    return _outcome(path)


def _status(path: Path) -> str | None:
    try:
        return _manifest(path)["status"]
    except (OSError, ValueError, KeyError):
        return None


def _outcome(path: Path) -> Outcome:
    """What run.json says of a run that is done; a diverged one has no results."""
    manifest = _manifest(path)
    values = (manifest["recipe"][name] for name in VARIED)
    return Outcome(*values, path, manifest.get("results"))


def _manifest(path: Path) -> dict[str, object]:
    return read_json(path / MANIFEST)


def _forget() -> None:
    """Give the memory of a run back before the next one."""
    gc.collect()
    if torch.accelerator.is_available() and torch.accelerator.current_accelerator().type != CPU.type:
        torch.accelerator.empty_cache()


def _is_main() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0
