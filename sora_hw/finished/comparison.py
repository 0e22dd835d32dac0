"""Finished runs and sweeps beside one another and beside the paper: which runs make a row, and which are left out.

Runs of one method, ranks, task and base model are one pool, whatever folders they come from. Of several learning rates
the pool has, the best on the records held out is taken, and of its runs those with the fewest held out; their seeds
give mean and standard deviation, as in the paper's Table 2.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

from sora_hw.errors import UserError
from sora_hw.finished.beside_paper import GLUE, Measure, Sample, Setting, samples, tables_of
from sora_hw.finished.run import FinishedRun, read_runs
from sora_hw.finished.scores import FOLDER, read_facts, read_scores
from sora_hw.finished.tables import Table
from sora_hw.recipes import commonsense
from sora_hw.recipes.recipe import RUN, Classification, Recipe
from sora_hw.storage import read_json
from sora_hw.training.sweep_report import SUMMARY, Outcome, chosen

FINISHED, DIVERGED = "finished", "diverged"
VARIED = {"seed", "learning_rate", "validation_size"}  # what the runs of a pool may differ in


def compare(folders: Sequence[Path]) -> list[Table]:
    """The tables of runs and sweeps in `folders`.

    Raises UserError for a folder with neither, where none is scored, and where runs cannot stand in one row: they
    differ in more than seed and learning rate, the same run is there twice, or no records were held out to choose one
    of several learning rates by.
    """
    remarks = [f"{folder}: the sweep is unfinished." for folder in folders if _unfinished(folder)]
    bases = [folder for folder in folders if _holds_base(folder)]
    runs = read_runs([folder for folder in folders if folder not in bases])
    tables = _tables(runs, [_base(folder) for folder in bases], remarks)
    if not tables and not runs:
        raise UserError(f"{bases[0]}: no scores there")
    if not tables:
        raise UserError(_why_unscored(next((run for run in runs if run.status == FINISHED), runs[0])))
    return tables


def compare_runs(runs: Sequence[FinishedRun]) -> list[Table]:
    """The same for runs that have been read; no table where none is scored."""
    return _tables(runs, [], [])


def _holds_base(folder: Path) -> bool:
    """Whether the scores of a base model lie there, which belong to no run."""
    facts = read_facts(folder)
    return "model" in facts and not facts.get("adapter")


def _base(folder: Path) -> Setting:
    recipe = replace(commonsense.recipe(), model=read_facts(folder)["model"])  # only the model of it is looked at
    return Setting(recipe, samples(read_scores(folder)), tuned=False)


def _tables(runs: Sequence[FinishedRun], bases: Sequence[Setting], remarks: list[str]) -> list[Table]:
    pools: dict[tuple, list[FinishedRun]] = {}
    for run in runs:
        setting = Setting(run.recipe, {})
        key = run.recipe.name, run.recipe.model, run.recipe.method, setting.rank, setting.rotation_rank
        pools.setdefault(key, []).append(run)
    settings = [*bases, *(setting for pool in pools.values() if (setting := _setting(pool, remarks)))]
    return [replace(table, notes=(*table.notes, *remarks)) for table in tables_of(settings)]


def _unfinished(folder: Path) -> bool:
    """Whether a sweep lies there that has not come to its end, as far as its summary tells."""
    file = folder / f"{SUMMARY}.json"
    if not file.exists():  # it is written after the first rank
        return any(folder.glob("rank=*"))
    try:
        return not read_json(file).get("finished", True)  # early versions did not say so
    except (OSError, ValueError, AttributeError):
        raise UserError(f"{file} is damaged; start the sweep again, which repeats no finished run") from None


def _setting(pool: Sequence[FinishedRun], remarks: list[str]) -> Setting | None:
    """The best setting of the pool, None where it has no scores; what is left out is added to `remarks`."""
    remarks += [f"{run.path}: left out, the run is unfinished." for run in pool if not _done(run)]
    done = [run for run in pool if _done(run)]
    if not done:
        return None
    _check_alike(done)
    best = _best(done)
    remarks += [f"{run.path}: left out, the run has diverged." for run in best if run.status == DIVERGED]
    finished = [run for run in best if run.status == FINISHED]
    scores = [_scores(run) for run in finished]
    remarks += [_why_unscored(run) for run, scored in zip(finished, scores, strict=True) if not scored]
    together = _together([scored for scored in scores if scored])
    if not together:
        return None
    rates = [rate for run in finished if (rate := run.results.get("trainable_percent")) is not None]
    # What a resumed run measured is the time of its last steps alone.
    timed = [run.results for run in finished if not run.manifest.get("resumed_from") and run.results.get("seconds")]
    return Setting(
        done[0].recipe,
        together,
        rate=statistics.fmean(rates) if rates else None,
        speed=statistics.fmean(result["steps"] / result["seconds"] for result in timed) if timed else None,
    )


def _done(run: FinishedRun) -> bool:
    return run.status in (FINISHED, DIVERGED)


def _check_alike(runs: Sequence[FinishedRun]) -> None:
    """Raises UserError for two runs that cannot stand in one row."""
    first, *others = runs
    wanted = _shared(first.recipe)
    for run in others:
        found = _shared(run.recipe)
        if differing := [name for name in wanted if found[name] != wanted[name]]:
            name = differing[0]
            raise UserError(
                f"{first.path} and {run.path} differ in {name} ({wanted[name]} and {found[name]}): compare one of them "
                "at a time"
            )
    seen: dict[tuple, Path] = {}
    for run in runs:
        key = tuple(getattr(run.recipe, name) for name in sorted(VARIED))
        if key in seen:
            raise UserError(f"{seen[key]} and {run.path} are the same run twice: compare one of them at a time")
        seen[key] = run.path


def _shared(recipe: Recipe) -> dict[str, object]:
    how_it_runs = {field.name for field in fields(recipe) if field.metadata.get("group") == RUN}
    return {name: value for name, value in asdict(recipe).items() if name not in VARIED | how_it_runs}


def _best(runs: Sequence[FinishedRun]) -> list[FinishedRun]:
    outcomes = [
        Outcome(
            run.recipe.rank,
            run.recipe.learning_rate,
            run.recipe.seed,
            run.recipe.validation_size,
            run.path,
            run.manifest.get("results"),
        )
        for run in runs
    ]
    try:
        best = {outcome.folder for outcome in chosen(outcomes)}
    except UserError as error:
        raise UserError(f"{runs[0].path.parent}: {error}; name the runs to compare") from None
    return [run for run in runs if run.path in best]


def _scores(run: FinishedRun) -> dict[Measure, Sample]:
    """What one run scored: GLUE's metric in its run.json, everything else where launchers/score.py has written it."""
    if isinstance(run.recipe, Classification):
        test = run.results.get("test") or {}
        return {Measure(GLUE, run.recipe.task): Sample((value,)) for value in test.values() if value is not None}
    return samples(read_scores(run.path / FOLDER))


def _together(runs: Sequence[Mapping[Measure, Sample]]) -> dict[Measure, Sample]:
    measures = dict.fromkeys(measure for run in runs for measure in run)
    return {
        measure: Sample(
            tuple(value for run in runs if measure in run for value in run[measure].values),
            next(run[measure].records for run in runs if measure in run),
        )
        for measure in measures
    }


def _why_unscored(run: FinishedRun) -> str:
    if not _done(run) or run.status == DIVERGED:
        return f"{run.path}: the run has not finished ({run.status})"
    how = (
        "give it --test-data" if isinstance(run.recipe, Classification) else f"launchers/score.py --adapter {run.path}"
    )
    return f"{run.path}: not scored ({how})"
