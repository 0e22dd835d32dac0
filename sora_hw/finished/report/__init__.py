"""A run, or several beside one another, as one HTML page that opens without a server and without a network."""

from collections.abc import Sequence
from pathlib import Path

from sora_hw.finished.report.one import page_of
from sora_hw.finished.report.page import write_page
from sora_hw.finished.report.several import comparing
from sora_hw.finished.run import FinishedRun
from sora_hw.training.run_folder import REPORT


def write_report(runs: Sequence[FinishedRun], file: Path | None = None) -> Path:
    """Write the page of `runs`; where it lies: `file`, otherwise report.html in the run's folder or, of several runs,
    in the current one.

    Raises UserError for a damaged file of a run, and where the page cannot be written.
    """
    file = file or (runs[0].path / REPORT if len(runs) == 1 else Path(REPORT))
    write_page(page_of(runs[0]) if len(runs) == 1 else comparing(runs), file)
    return file
