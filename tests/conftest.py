"""What every test room shares: the markers, the reasons for skipping, and the folder with the shared data."""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from simulated_npu.building import simulated_npu  # noqa: F401  (the fixture, for every test room)
from warm import Warm

REPOSITORY = Path(__file__).resolve().parents[1]
MARKERS = {
    "gpu": "needs a usable CUDA device",
    "npu": "needs a usable Ascend NPU",
    "shared_data": "needs the shared benchmark data ($SORA_HW_DATA or ../shared/data beside the repository)",
    "full": "a long campaign: runs in `make test-full`, not in `make test`",
}


def pytest_configure(config: pytest.Config) -> None:
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")


def pytest_collection_finish() -> None:
    """What has been imported stays: Python shall not walk through all of it whenever it looks for garbage."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker, missing in (("gpu", _missing_gpu), ("npu", _missing_npu), ("shared_data", _missing_data)):
        if item.get_closest_marker(marker) and (reason := missing()):
            pytest.skip(f"{MARKERS[marker]}: {reason}")


@pytest.fixture(autouse=True)
def _own_environment() -> Iterator[None]:
    """No later test sees what a program sets in this process (the command line chooses DeepSpeed's accelerator), nor
    the group of ranks that one leaves which has ended in an error."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_initialized():
        distributed.destroy_process_group()


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    """Where programs of one or several ranks start that need not import anything."""
    server = Warm()
    yield server
    server.close()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with the benchmark samples; a test that uses it carries the marker `shared_data`."""
    if reason := _missing_data():
        pytest.skip(f"{MARKERS['shared_data']}: {reason}")
    return _data_folder()


def _data_folder() -> Path:
    return Path(os.environ.get("SORA_HW_DATA") or REPOSITORY.parent / "shared" / "data")


def _missing_data() -> str | None:
    folder = _data_folder()
    return None if folder.is_dir() else f"{folder} is not a folder"


def _missing_gpu() -> str | None:
    from sora_hw.devices.cuda import CUDA

    return CUDA.is_usable()


def _missing_npu() -> str | None:
    from sora_hw.devices.npu import NPU

    return NPU.is_usable()
