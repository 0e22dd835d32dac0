"""Several machines: the hostfile, the variables for the others, and runs of two nodes that agree, or say why not.

The nodes are two launchers on this machine, joined over its loopback, or where it can be had over a network.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from deepspeed.accelerator import cpu_accelerator, cuda_accelerator, npu_accelerator
from deepspeed.launcher import runner
from warm import with_programs

from sora_hw.devices import DEVICES
from sora_hw.devices.cpu import CPU
from sora_hw.devices.npu import NPU
from sora_hw.errors import UserError
from sora_hw.hardware import PROFILES
from sora_hw.recipes import commonsense
from sora_hw.training import machines
from sora_hw.training.arguments import parse
from sora_hw.training.machines import (
    Machine,
    Report,
    common_facts,
    find_difference,
    needed_elsewhere,
    read_hostfile,
    where,
    write_deepspeed_env,
)
from sora_hw.training.plan import make_plan
from sora_hw.training.run import check

LAUNCHER = Path(__file__).resolve().parents[2] / "launchers" / "commonsense.py"
NODES = ("node-a", "node-b")
HOSTS = "# two machines\n\nnode-a slots=2\n  node-b\tslots=16 # the big one\n"

# A node's name, and versions that only it believes to have.
SITE = """
import importlib.metadata, os, socket
if "NODE_NAME" in os.environ:
    socket.gethostname = lambda: os.environ["NODE_NAME"]
if "OTHER_VERSION" in os.environ:
    package, _, other = os.environ["OTHER_VERSION"].partition("=")
    told = importlib.metadata.version
    importlib.metadata.version = lambda name: other if name == package else told(name)
"""

# The launcher on a node, in a process that need not import anything (see `warm`).
NODE = f"""
import ctypes, sys
{SITE}
if "NAMESPACE" in os.environ:
    with open("/run/netns/" + os.environ["NAMESPACE"]) as namespace:
        assert ctypes.CDLL(None).setns(namespace.fileno(), 0) == 0
sys.path.insert(0, {str(LAUNCHER.parent)!r})
import before_torch
from sora_hw.recipes import commonsense
from sora_hw.training import launch
sys.exit(launch.main(commonsense))
"""

# pdsh without a network: runs the command as if on each host, %n being its number, in an environment that has nothing
# but what a login shell gives, and what the command itself exports.
PDSH = """#!/bin/bash
while getopts Sf:w: option; do [[ $option == w ]] && hosts=${OPTARG//,/ }; done
shift $((OPTIND - 1))
number=0
for host in $hosts; do
    command="$*"
    env -i PATH=/usr/bin:/bin HOME="$HOME" NODE_NAME="$host" bash -c "${command//%n/$number}" &
    running+=($!)
    number=$((number + 1))
done
for each in "${running[@]}"; do wait "$each" || failed=1; done
exit ${failed:-0}
"""


def hostfile(folder, text):
    file = folder / "hostfile"
    file.write_text(text)
    return file


def test_a_hostfile_reads_as_deepspeed_reads_it(tmp_path):
    file = hostfile(tmp_path, HOSTS)
    assert read_hostfile(file) == [Machine("node-a", 2), Machine("node-b", 16)]
    assert {machine.name: machine.slots for machine in read_hostfile(file)} == runner.fetch_hostfile(str(file))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("node-a slots=1\nnode-b\n", r"line 2: 'node-b' is not of the form `name slots=n`"),
        ("node-a slots=two\n", "line 1: 'node-a slots=two' is not of the form"),
        ("node-a slots=2x\n", "line 1: 'node-a slots=2x' is not of the form"),
        ("node-a slots = 2\n", "line 1: .* is not of the form"),
        ("node-a slots=1\n\nnode-a slots=2\n", "line 3: node-a stands there a second time"),
        ("node-a slots=0\n", "line 1: node-a has 0 slots"),
        ("# nothing\n\n", "names no machine; write a line"),
        (None, "hostfile: cannot be read .No such file"),
    ],
)
def test_a_bad_hostfile_is_refused_by_line(tmp_path, text, message):
    file = hostfile(tmp_path, text) if text is not None else tmp_path / "hostfile"
    with pytest.raises(UserError, match=message) as error:
        read_hostfile(file)
    assert "\n" not in str(error.value) and str(file) in str(error.value)


def test_the_prefixes_are_those_of_deepspeed():
    """Each accelerator of DeepSpeed tells them; the records repeat them, as DeepSpeed loads only the chosen one."""
    assert list(machines.EXPORTED) == runner.EXPORT_ENVS
    theirs = {
        "cpu": cpu_accelerator.CPU_Accelerator,
        "cuda": cuda_accelerator.CUDA_Accelerator,
        "npu": npu_accelerator.NPU_Accelerator,
    }
    for name, device in DEVICES.items():
        assert list(device.exported_prefixes) == theirs[name].export_envs(None)


def test_which_variables_go_to_the_other_machines():
    mine = {
        "HF_HOME": "/data/hf",
        "HF_TOKEN": "hf_secret",
        "OMP_NUM_THREADS": "4",
        "TASK_QUEUE_ENABLE": "1",
        "HCCL_CONNECT_TIMEOUT": "99",
        "DS_ACCELERATOR": "cuda",
        "SHELL": "/bin/sh",
    }
    assert needed_elsewhere(NPU, PROFILES["8x910c"], mine) == {
        "DS_ACCELERATOR": "npu",
        "HF_HOME": "/data/hf",
        "OMP_NUM_THREADS": "4",
        "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True",
        "TASK_QUEUE_ENABLE": "1",
        "CPU_AFFINITY_CONF": "1",
        "INF_NAN_MODE_ENABLE": "1",
    }
    assert needed_elsewhere(CPU, PROFILES["4x4090"], {})["NCCL_P2P_DISABLE"] == "1"


def test_a_value_that_would_not_arrive_is_refused_and_nothing_is_written(tmp_path):
    for value in ("a\nHF_TOKEN=x", "a\rb", " a", "a ", 'a"b', "$HOME", "`id`", "a\\b", "/home/%h", "http://me:pw@hub"):
        with pytest.raises(UserError, match="HF_HOME cannot be passed to other machines"):
            write_deepspeed_env({"DS_ACCELERATOR": "cpu", "HF_HOME": value}, tmp_path)
    with pytest.raises(ValueError, match="HF_TOKEN"):
        write_deepspeed_env({"DS_ACCELERATOR": "cpu", "HF_TOKEN": "hf_secret"}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_only_our_own_file_is_replaced(tmp_path, monkeypatch):
    file = write_deepspeed_env({"HF_HOME": "/a", "TASK_QUEUE_ENABLE": "1"}, tmp_path)
    assert write_deepspeed_env({"DS_ACCELERATOR": "cpu"}, tmp_path) == file == tmp_path / ".deepspeed_env"
    assert file.read_text() == "DS_ACCELERATOR=cpu\n"
    for foreign in ("NCCL_DEBUG=INFO\nHF_HOME=/a\n", "HF_HOME=/a\n\n"):
        file.write_text(foreign)
        with pytest.raises(UserError, match=r"was written by somebody else \(it has .*: move its lines to ~/"):
            write_deepspeed_env({"DS_ACCELERATOR": "cpu"}, tmp_path)
        assert file.read_text() == foreign and list(tmp_path.iterdir()) == [file]
    monkeypatch.setenv("DS_ENV_FILE", "other_env")
    assert write_deepspeed_env({"DS_ACCELERATOR": "cpu"}, tmp_path) == tmp_path / "other_env"


def test_a_file_that_cannot_be_written(tmp_path):
    with pytest.raises(UserError, match=r"cannot be written .No such file"):
        write_deepspeed_env({"DS_ACCELERATOR": "cpu"}, tmp_path / "gone")


def test_the_first_difference_is_told_in_one_line():
    def report(machine, versions=(), **plan):
        return Report(machine, {"versions": dict(versions), "plan": plan, "data": {}, "base model": {}})

    new, old = {"transformers": "5.23.0"}, {"transformers": "5.20.0"}
    assert find_difference([report("a", new, seed=1), report("b", new, seed=1)]) is None
    line = find_difference([report("a", new), report("a", new), report("b", old), report("b", new)])
    assert line == ("rank 2 on b has transformers 5.20.0, the rest 5.23.0: install the same versions on every machine")
    assert find_difference([report("a", old), report("b", new), report("b", new)]).startswith("rank 0 on a has")
    line = find_difference([report("a", seed=1), report("b", seed=2), report("c", seed=3), report("d", seed=3)])
    assert line == "rank 0 on a has seed 1, most 3: start every machine with the same arguments"
    checkout = report("a", {"git commit": "f00"})
    assert find_difference([report("b"), checkout, checkout]) is None
    assert "git commit bad" in find_difference([report("b"), checkout, report("c", {"git commit": "bad"})])


def test_machines_are_told_in_a_line():
    assert where({"a": [0, 1], "b": [2, 3]}) == "machines: a (2 ranks), b (2 ranks)"


@pytest.fixture(scope="module")
def arguments(tiny_model, records_file):
    """Of a short run whose losses do not depend on its ranks."""
    return [
        *("--model", tiny_model, "--train-data", records_file, "--backend", "cpu", "--max-steps", 4, "--seed", 11),
        *("--global-batch", 8, "--micro-batch", 2, "--warmup-steps", 1, "--learning-rate", 5e-3, "--dropout", 0),
        *("--validation-size", 5, "--max-length", 320, "--rank", 4, "--save-steps", 100, "--eval-steps", 100),
    ]


@pytest.fixture(scope="module")
def alone(arguments, tmp_path_factory, train):
    """The run of one rank, without any launcher."""
    return train(tmp_path_factory.mktemp("alone") / "out", 0, *arguments)


@pytest.fixture
def site(tmp_path):
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SITE)
    return str(folder)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass(frozen=True)
class Network:
    """How two nodes reach each other: the first one's address, and the variables of each."""

    address: str
    variables: tuple[dict[str, str], dict[str, str]]


LOOPBACK = Network("127.0.0.1", ({}, {}))


@pytest.fixture
def cable():
    """Two network namespaces joined by a cable, and by nothing else: what only a loopback hides would show."""
    names = [f"sora-hw-{os.getpid()}-{end}" for end in "ab"]
    steps = [f"ip netns add {name}" for name in names]
    steps += ["ip link add data netns {} type veth peer name data netns {}".format(*names)]
    for number, name in enumerate(names, start=1):
        steps += [f"ip -n {name} addr add 10.77.0.{number}/24 dev data", f"ip -n {name} link set data up"]
        steps += [f"ip -n {name} link set lo up"]
    try:
        for step in steps:
            done = subprocess.run(step.split(), capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"no network namespaces here: `{step}` says {done.stderr.strip()}")
        first, second = ({"NAMESPACE": name, "GLOO_SOCKET_IFNAME": "data"} for name in names)
        yield Network("10.77.0.1", (first, second))
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@pytest.fixture
def two_nodes(tmp_path, arguments, warm):
    """`two_nodes(launcher, second=(), network=LOOPBACK, **variables)`: what both printed, their exit codes.

    With `launcher` DeepSpeed's starts each node's rank, otherwise the rank is started bare, which is faster. `second`
    and the variables are the second node's alone. Both nodes have ended, or the test fails.
    """
    program = tmp_path / "node.py"
    program.write_text(NODE)

    def run(launcher, second=(), network=LOOPBACK, **variables):
        port = str(free_port())
        file = hostfile(tmp_path, "node-a slots=1\nnode-b slots=1\n")
        by_deepspeed = [Path(sys.executable).with_name("deepspeed"), "--hostfile", file, "--no_ssh"]
        by_deepspeed += ["--master_addr", network.address, "--master_port", port, "--node_rank"]
        with ExitStack() as nodes:
            processes = []
            for number, name in enumerate(NODES):
                own, said = second if number else (), tmp_path / name
                said.mkdir()
                command = [*([*by_deepspeed, number] if launcher else ()), program, *arguments]
                command += ["--output", tmp_path / "out", *own]
                environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "NODE_NAME": name}
                environment |= {**network.variables[number], **(variables if number else {})}
                if not launcher:
                    environment |= {"RANK": str(number), "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
                    environment |= {"MASTER_ADDR": network.address, "MASTER_PORT": port}
                node = warm.begun(list(map(str, command)), tmp_path, with_programs(environment), said)
                processes.append(nodes.enter_context(node))
            codes = [warm.end(process) for process in processes]
        told = ["".join((tmp_path / name / each).read_text() for each in ("stdout", "stderr")) for name in NODES]
        return list(zip(told, codes, strict=True))

    return run


def errors(text):
    return [line for line in text.splitlines() if line.startswith("error:")]


def test_two_nodes_train_as_one_process_does(two_nodes, alone, tmp_path):
    nodes = two_nodes(launcher=True)
    assert [code for _, code in nodes] == [0, 0], nodes
    run = type(alone)(tmp_path / "out", nodes[0][0])
    assert len(alone.losses) == 4 and run.losses == pytest.approx(alone.losses, abs=5e-5)
    assert run.manifest["machines"] == {"node-a": [0], "node-b": [1]}
    assert run.manifest["batch"]["world_size"] == 2
    assert run.stdout.count("machines: node-a (1 ranks), node-b (1 ranks)") == 1
    assert "machines:" not in nodes[1][0] and "machines:" not in alone.stdout
    assert list(alone.manifest["machines"].values()) == [[0]]


@pytest.mark.full
def test_the_readmes_command_and_the_variables_that_it_carries(tmp_path, site, alone, arguments, finish, monkeypatch):
    """`deepspeed --hostfile`, two ranks on each of two machines, through DeepSpeed's default transport but for ssh.

    The ranks start in an empty environment: what they have of ours has come through .deepspeed_env.
    """
    pdsh = tmp_path / "bin" / "pdsh"
    pdsh.parent.mkdir()
    pdsh.write_text(PDSH)
    pdsh.chmod(0o755)
    file = hostfile(tmp_path, "node-a slots=2\nnode-b slots=2\n")
    mine = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "a folder"), "HF_TOKEN": "secret"}
    written = write_deepspeed_env(needed_elsewhere(CPU, PROFILES["cpu"], mine), tmp_path)
    monkeypatch.setenv(
        "PATH", f"{pdsh.parent}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    monkeypatch.setenv("PYTHONPATH", site)
    for name in mine:
        monkeypatch.delenv(name, raising=False)
    show = tmp_path / "show.py"
    show.write_text("import json, os; json.dump(dict(os.environ), open('rank-' + os.environ['RANK'], 'w'))")
    common = ["deepspeed", "--hostfile", str(file), "--no_ssh_check", "--master_addr", "127.0.0.1"]
    common += ["--master_port", str(free_port())]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    assert finish(subprocess.Popen([*common, str(show)], cwd=tmp_path, **pipes)).returncode == 0
    for number in range(4):
        seen = json.loads((tmp_path / f"rank-{number}").read_text())
        assert {name: seen.get(name) for name in mine} == {**mine, "HF_TOKEN": None}
    command = [*common, str(LAUNCHER), *map(str, arguments), "--output", str(tmp_path / "out")]
    done = finish(subprocess.Popen(command, cwd=tmp_path, **pipes))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert str(written.name) in done.stdout + done.stderr
    run = type(alone)(tmp_path / "out", done.stdout)
    assert run.losses == pytest.approx(alone.losses, abs=5e-5)
    assert run.manifest["machines"] == {"node-a": [0, 1], "node-b": [2, 3]}


@pytest.mark.skipif(shutil.which("ip") is None, reason="no network namespaces here: there is no program `ip`")
def test_two_nodes_train_over_a_network(two_nodes, alone, tmp_path, cable):
    nodes = two_nodes(launcher=False, network=cable)
    assert [code for _, code in nodes] == [0, 0], nodes
    run = type(alone)(tmp_path / "out", nodes[0][0])
    assert run.losses == pytest.approx(alone.losses, abs=5e-5)
    assert run.manifest["machines"] == {"node-a": [0], "node-b": [1]}


def refused_by_both(nodes, tmp_path):
    """The line that both nodes end with; nothing was created."""
    told = [errors(text) for text, _ in nodes]
    assert all(code for _, code in nodes) and told[0] == told[1] and len(told[0]) == 1, nodes
    assert not any("Traceback" in text for text, _ in nodes)
    assert not (tmp_path / "out").exists()
    return told[0][0]


def test_another_seed_on_one_node(arguments, tmp_path):
    """By what each rank would tell; in the tests below two nodes do tell one another."""

    def report(machine, *more):
        request = parse(commonsense, [*map(str, arguments), "--output", str(tmp_path / "out"), *more])
        job = check(request, make_plan(request, commonsense))
        return Report(machine, common_facts({}, None, job.plan, job.data, job.fingerprint["base_weights"], None))

    line = find_difference([report("node-a"), report("node-b", "--seed", "7")])
    assert line == "rank 1 on node-b has seed 7, the rest 11: start every machine with the same arguments"


def test_another_base_model_on_one_node(tmp_path, tiny_model, records_file):
    """Of the same shapes, in the same folder of two machines."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    arguments = ["--backend", "cpu", "--model", model, "--train-data", records_file, "--validation-size", 0]
    arguments += ["--output", tmp_path / "out"]

    def report(machine):
        request = parse(commonsense, [*map(str, arguments)])
        job = check(request, make_plan(request, commonsense))
        return Report(machine, common_facts({}, None, job.plan, job.data, job.fingerprint["base_weights"], None))

    first, file = report("node-a"), model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    line = find_difference([first, report("node-b")])
    assert re.fullmatch(
        r"rank 1 on node-b has base weights with checksum \w+, the rest \w+: give every machine the same one", line
    )


def test_other_data_on_one_node(two_nodes, tmp_path, records_file):
    """A file of the same name and size that says something else."""
    other = tmp_path / "elsewhere" / records_file.name
    other.parent.mkdir()
    shutil.copy(records_file, other)
    other.write_text(other.read_text().replace("Is 7 even?", "Is 9 even?"))
    line = refused_by_both(two_nodes(launcher=False, second=["--train-data", other]), tmp_path)
    checksum = r"[0-9a-f]{16,}"
    assert re.fullmatch(
        f"error: rank 1 on node-b has training data with checksum {checksum}, the rest {checksum}: "
        "give every machine the same data files",
        line,
    )


def test_another_version_on_one_node(two_nodes, tmp_path):
    line = refused_by_both(two_nodes(launcher=False, OTHER_VERSION="accelerate=1.14.0"), tmp_path)
    assert line.startswith("error: rank 1 on node-b has accelerate 1.14.0, the rest ")
    assert line.endswith(": install the same versions on every machine")
