"""The device double itself: it behaves as an accelerator, and it stays out of every process that has not asked for it.

The checks that need it run in processes of their own; most stand in device_checks.py beside this file.
"""

import sys
import threading
from pathlib import Path

import pytest
from simulated_npu import building
from simulated_npu.building import run, run_checks

HERE = Path(__file__).parent


def test_every_check_on_the_device(simulated_npu):
    assert run_checks(simulated_npu, HERE / "device_checks.py") > 30


def test_two_ranks_over_hccl(simulated_npu):
    done = run(simulated_npu, "-m", "torch.distributed.run", "--nproc-per-node", 2, HERE / "hccl_program.py")
    assert "rank 0 is done" in done.stdout and "rank 1 is done" in done.stdout


END_AFTER_A_BACKWARD_PASS = """
import os, sys, torch
for _ in range(6):
    if os.fork() == 0:
        sys.setswitchinterval(100.0)  # the main thread keeps the GIL from its return of `backward` until it ends Python
        x = torch.ones(3, device="npu", requires_grad=True)
        (x * 2).sum().backward()
        sys.exit()
    assert os.wait()[1] == 0
"""


def test_a_program_ends_while_a_thread_of_autograd_waits_for_the_gil(simulated_npu):
    """Without `wait_for_autograd`, about half of such ends abort; see csrc/autograd.cpp."""
    run(simulated_npu, "-c", END_AFTER_A_BACKWARD_PASS)


COUNT_IN_FORKS = """
import os, sys, torch
for visible in sys.argv[1:]:
    if os.fork() == 0:
        os.environ["ASCEND_RT_VISIBLE_DEVICES"] = visible
        print(torch.npu.device_count(), torch.npu.is_available(), flush=True)
        os._exit(0)
    os.wait()
"""


def test_visible_devices_are_a_strictly_ascending_list(simulated_npu):
    counts = {"0,1,2,3": 4, "1,7": 2, "5": 1, "1,0": 0, "0,0": 0, "": 0, "8": 0, "0,x": 0, "0,,1": 0, "-1": 0}
    done = run(simulated_npu, "-c", COUNT_IN_FORKS, *counts)
    assert done.stdout.splitlines() == [f"{count} {count > 0}" for count in counts.values()]


def test_it_says_what_it_is_and_its_number_of_devices_can_be_set(simulated_npu):
    done = run(simulated_npu, "-c", "import torch; print(torch.npu.device_count())", SIMULATED_NPU_COUNT="3")
    assert done.stdout == "3\n" and done.stderr == "simulated NPU: host memory, no Ascend hardware\n"
    assert run(simulated_npu, "-c", "import torch", RANK="1").stderr == "", "one rank says it for all"


def test_it_stays_out_of_processes_that_have_not_asked_for_it(simulated_npu):
    assert not hasattr(sys.modules.get("torch_npu"), "simulation")
    question = "import sys, torch; print('torch_npu' in sys.modules)"
    assert run(simulated_npu, "-c", question).stdout == "True\n"
    assert run(simulated_npu, "-c", question, TORCH_DEVICE_BACKEND_AUTOLOAD="0").stdout == "False\n"


@pytest.fixture
def builds(tmp_path, monkeypatch):
    """The folders of the builds that were started; the compiler is replaced by a file."""
    monkeypatch.setattr(building, "CACHE", tmp_path / "cache")
    builds = []

    def compile_slowly(sources, folder):
        builds.append(folder)
        threading.Event().wait(0.2)
        (folder / "_C.so").write_text("built")

    monkeypatch.setattr(building, "_compile", compile_slowly)
    return builds


def test_two_workers_build_it_once(builds):
    found = []
    workers = [threading.Thread(target=lambda: found.append(building.build_extension())) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(builds) == 1 and found[0] == found[1] and found[0].read_text() == "built"


def test_a_build_that_breaks_off_leaves_nothing(builds, monkeypatch):
    def compile_half(sources, folder):
        (folder / "half.o").write_text("")
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(building, "_compile", compile_half)
        with pytest.raises(KeyboardInterrupt):
            building.build_extension()
    assert [path.name for path in building.CACHE.iterdir()] == ["lock"]
    assert building.build_extension().read_text() == "built"
