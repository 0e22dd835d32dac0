"""The launcher under DeepSpeed on simulated NPUs, two ranks over the simulated hccl: the losses are the CPU's.

It shows that placement, dispatch, launcher and ZeRO work for the device; nothing about the numerics of a real NPU.
"""

import json
from functools import cache

import pytest

from sora_hw.devices.npu import NPU

ARGUMENTS = [
    *("--model", "embedded", "--max-steps", 4, "--global-batch", 8, "--micro-batch", 4, "--warmup-steps", 1),
    *("--validation-size", 5, "--dropout", 0, "--dtype", "float32", "--seed", 11, "--save-steps", 100),
]


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory, records_file, train):
    return train(tmp_path_factory.mktemp("cpu") / "out", 0, "--train-data", records_file, *ARGUMENTS)


@pytest.fixture(scope="module")
def on_npu(tmp_path_factory, simulated_npu, records_file, train):
    """`on_npu(stage)`: the run of two ranks, and the folder where each has written down what its device did."""

    def run(stage):
        folder = tmp_path_factory.mktemp("npu")
        variables = {**simulated_npu, "SIMULATED_NPU_LOG": str(folder / "operators")}
        data = ("--train-data", records_file, "--zero-stage", stage, *ARGUMENTS, "--save-steps", 2)
        return train(folder / "out", 2, *data, backend="npu", **variables), folder / "operators"

    return cache(run)


# Stage 2 shards what stage 1 shards, and gradients as well.
@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.full), 2, 3])
def test_losses_and_adapter_equal_those_of_the_cpu(stage, on_cpu, on_npu):
    run, log = on_npu(stage)
    assert run.manifest["device"] == "npu" and "simulated" in run.manifest["device_name"]
    assert run.manifest["results"]["peak_memory_bytes"] > 0
    assert run.manifest["device_settings"] == {
        "jit_compile": False,
        "allow_internal_format": False,
        "matmul.allow_hf32": False,
    }
    assert run.manifest["environment"].items() >= NPU.environment.items()
    assert run.losses == pytest.approx(on_cpu.losses, abs=5e-5) and run.losses[-1] < run.losses[0] - 0.1
    validation = [each.manifest["results"]["validation_loss"] for each in (run, on_cpu)]
    assert validation[0] == pytest.approx(validation[1], abs=5e-5)

    for rank in (0, 1):
        counts = json.loads((log / f"rank-{rank}.json").read_text())
        assert not [name for name in counts["cpu_fallback"] if name.startswith("sora_hw::")]
        assert not counts["composite"]
        # Everything of this rank, parameters and activations, is on the NPU of its number.
        allocated = counts["peak_memory_bytes"]
        assert [index for index, most in enumerate(allocated) if most] == [rank]
        assert counts["settings"] == {"jit_compile": False, "allow_internal_format": False, "allow_hf32": False}
        assert counts["environment"] == dict(NPU.environment)
        for name in ("scale_rank_update", "scale_rank_update_backward", "input_gradient"):
            assert counts["native"][f"sora_hw::{name}"] > 0


@pytest.mark.parametrize(("first", "second"), [("npu", "cpu"), ("cpu", "npu")])
def test_a_checkpoint_of_one_device_goes_on_on_the_other(
    first, second, on_npu, simulated_npu, records_file, train, tmp_path
):
    """The losses are those of the undisturbed run on the device that began; on the CPU it is of one rank."""
    arguments = ["--train-data", records_file, "--zero-stage", 2, *ARGUMENTS, "--save-steps", 2]
    ranks = 2 if first == "npu" else 0
    whole = on_npu(2)[0] if first == "npu" else train(tmp_path / "whole", ranks, *arguments)
    checkpoint = whole.folder / "checkpoint-2"
    device = {"cpu": {}, "npu": {"backend": "npu", **simulated_npu}}[second]
    again = train(tmp_path / "again", ranks, "--resume", checkpoint, *arguments, **device)
    assert again.manifest["device"] == second and again.manifest["resumed_from"] == str(checkpoint)
    assert again.losses[:2] == whole.losses[:2]
    assert again.losses[2:] == pytest.approx(whole.losses[2:], abs=5e-5)


def test_more_ranks_than_npus_are_refused(simulated_npu, records_file, launch, tmp_path):
    arguments = ["--train-data", records_file, *ARGUMENTS, "--output", tmp_path / "out"]
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29417"}
    done = launch(0, *arguments, backend="npu", **simulated_npu, **alone, SIMULATED_NPU_COUNT="1")
    assert done.returncode == 2, done.stderr
    assert "a rank number 2 but has 1 x Ascend NPU: start as many ranks as there are devices" in done.stderr
    assert not (tmp_path / "out").exists()
