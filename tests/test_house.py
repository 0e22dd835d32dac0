"""The rules of the house that no linter knows: names, layout, packaging."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import sora_hw
from sora_hw.recipes import BENCHMARKS
from sora_hw.versions import SUPPORTED

REPOSITORY = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
LIBRARY = sorted((REPOSITORY / "sora_hw").rglob("*.py"))
KERNELS = sorted((REPOSITORY / "kernels" / "sora_hw_kernels").rglob("*.py"))
LAUNCHERS = sorted((REPOSITORY / "launchers").glob("*.py"))
TOP_LEVEL = {"pyproject.toml", "sora_hw", "launchers", "kernels", "tests", "ci", "README.md", "LICENSE", "Makefile"}
DEVICE_ROOM = [REPOSITORY / "sora_hw" / "hardware.py", *sorted((REPOSITORY / "sora_hw" / "devices").glob("*.py"))]


def _label(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def _tracked(*options: str) -> list[str]:
    """The repository's files as git knows them; skips where there is no git or no repository."""
    if shutil.which("git") is None or not (REPOSITORY / ".git").exists():
        pytest.skip("needs git and the repository")
    command = ["git", "-C", str(REPOSITORY), "ls-files", *options]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def _device_literals(source: str) -> list[str]:
    """The device names in code: strings such as "cuda" or "npu:0", and attributes such as torch.npu."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and re.fullmatch(r"(cuda|npu)(:.*)?", node.value)
        ):
            found.append(f"line {node.lineno}: {node.value!r}")
        if isinstance(node, ast.Attribute) and node.attr in ("cuda", "npu"):
            found.append(f"line {node.lineno}: .{node.attr}")
    return found


def _imports(source: str, *, module_level_only: bool = False) -> Iterator[str]:
    """The full names that a file imports (`from a import b` gives a.b)."""
    tree = ast.parse(source)
    for node in tree.body if module_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{name.name}" for name in node.names)


def test_the_scan_finds_device_literals_and_imports():
    source = 'import a.b\nfrom c import d\nx = "npu:0"\ny = torch.cuda.synchronize()\nz = "npu and cuda"\n'
    assert _device_literals(source) == ["line 3: 'npu:0'", "line 4: .cuda"]
    assert list(_imports(source)) == ["a.b", "c.d"]


@pytest.mark.parametrize("path", [p for p in LIBRARY if p not in DEVICE_ROOM], ids=_label)
def test_no_device_literal_outside_the_device_room(path):
    assert _device_literals(path.read_text()) == []


@pytest.mark.parametrize("path", DEVICE_ROOM, ids=_label)
def test_device_room_imports_only_the_standard_library_at_module_level(path):
    roots = {name.partition(".")[0] for name in _imports(path.read_text(), module_level_only=True)}
    assert roots <= set(sys.stdlib_module_names) | {"sora_hw"}


@pytest.mark.parametrize("path", KERNELS, ids=_label)
def test_kernels_see_the_operators_only(path):
    seen = [name for name in _imports(path.read_text()) if re.match(r"sora_hw(\.|$)", name)]
    assert [name for name in seen if not re.match(r"sora_hw\.ops(\.|$)", name)] == []


def _runs_what_it_reads(source: str) -> list[str]:
    """Calls that may run what a file or a user's text says: unpickling, evaluation, shells, code from the hub."""
    forbidden = r"(eval|exec|compile|__import__|os\.(system|popen)|yaml\.(unsafe_|full_)?load|subprocess\.getoutput)"
    forbidden += r"|((c?[pP]ickle|dill|marshal|shelve|joblib|cloudpickle)\.\w+)"
    wanted = {"weights_only": True, "trust_remote_code": False, "shell": False, "allow_pickle": False}
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name, given = ast.unparse(node.func), {each.arg: ast.unparse(each.value) for each in node.keywords}
        wrong = [arg for arg, value in wanted.items() if arg in given and given[arg] != str(value)]
        if re.fullmatch(forbidden, name) or wrong or (name == "torch.load" and "weights_only" not in given):
            found.append(f"line {node.lineno}: {name}({', '.join(wrong)})")
    return found


def test_the_scan_finds_what_runs_what_it_reads():
    source = """
torch.load(f, weights_only=True), model.eval(), re.compile(x), subprocess.run(["a"]), yaml.safe_load(f)
eval(x), torch.load(f), torch.load(f, weights_only=False), subprocess.run(x, shell=True), os.system(x)
pickle.loads(x), yaml.load(x), np.load(f, allow_pickle=True), A.from_pretrained(x, trust_remote_code=flag)
"""
    found = _runs_what_it_reads(source)
    assert len(found) == 9 and not [each for each in found if each.startswith("line 2:")]


OWN_UNNAMED_FILE = {"sora_hw/data/spool.py": ("marshal.dumps()", "marshal.loads()")}  # nobody else can write into it


@pytest.mark.parametrize("path", LIBRARY + KERNELS + LAUNCHERS, ids=_label)
def test_nothing_runs_what_it_reads(path):
    found = [each.partition(": ")[2] for each in _runs_what_it_reads(path.read_text())]
    assert sorted(found) == sorted(OWN_UNNAMED_FILE.get(_label(path), ()))


@pytest.mark.parametrize("path", LIBRARY, ids=_label)
def test_the_library_imports_no_kernel_package(path):
    assert [
        name for name in _imports(path.read_text()) if re.match(r"(sora_hw_kernels|triton|kernels)(\.|$)", name)
    ] == []


@pytest.mark.parametrize("path", LAUNCHERS, ids=_label)
def test_launchers_are_thin(path):
    """They import the rooms below them, and shadow no module: their folder comes first on sys.path."""
    assert path.stem not in {*sys.stdlib_module_names, "evaluate"}
    allowed = r"(sora_hw\.(recipes|training|finished)|before_torch)(\.|$)"
    others = {name.partition(".")[0] for name in _imports(path.read_text()) if not re.match(allowed, name)}
    assert others <= set(sys.stdlib_module_names)
    assert len(path.read_text().splitlines()) <= 40


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_has_its_launcher(name):
    assert f"main({name})" in (REPOSITORY / "launchers" / f"{name}.py").read_text()


def test_the_top_level_is_fixed():
    entries = {name.partition("/")[0] for name in _tracked()}
    assert {name for name in entries if not name.startswith(".")} <= TOP_LEVEL
    assert not (REPOSITORY / "kernels" / "__init__.py").exists()


def test_third_party_imports_are_declared():
    declared = {_normal(Requirement(text).name) for text in PYPROJECT["project"]["dependencies"]}
    declared |= {"triton", "torch_npu", "liger_kernel", "lm_eval"}  # of the extras; imported inside guards
    distributions = metadata.packages_distributions()
    undeclared = set()
    for path in LIBRARY + KERNELS:
        for root in {name.partition(".")[0] for name in _imports(path.read_text())} - set(sys.stdlib_module_names):
            names = {_normal(name) for name in distributions.get(root, [root])}
            if not names & (declared | {"sora_hw"}):
                undeclared.add(f"{_label(path)}: {root}")
    assert undeclared == set()


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "_", name).lower()


def test_versions_are_told_once():
    project = PYPROJECT["project"]
    assert project["version"] == sora_hw.__version__
    ranges = {r.name: r.specifier for r in map(Requirement, project["dependencies"])}
    ranges["python"] = Requirement(f"python{project['requires-python']}").specifier
    for name, support in SUPPORTED.items():
        assert ranges[name] == Requirement(f"{name}{support.versions}").specifier, name


def test_constraints_pin_the_tested_versions():
    lines = (REPOSITORY / "ci" / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert {name: pins[name] for name in SUPPORTED if name != "python"} == {
        name: support.tested for name, support in SUPPORTED.items() if name != "python"
    }
    assert not [pin for pin in pins.values() if "+" in pin or "/" in pin]


def test_every_dependency_that_is_installed_is_the_pinned_one():
    """All that a declared requirement brings with it, and nothing but the versions that have been looked at."""
    lines = (REPOSITORY / "ci" / "constraints.txt").read_text().splitlines()
    pins = {
        _normal(name): pin for name, pin in (line.split("==") for line in lines if line and not line.startswith("#"))
    }
    project = PYPROJECT["project"]
    waiting = [Requirement(text) for text in (*project["dependencies"], *project["optional-dependencies"]["dev"])]
    versions = {}
    while waiting:
        requirement = waiting.pop()
        name = _normal(requirement.name)
        if name in versions or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        try:
            found = metadata.distribution(requirement.name)
        except metadata.PackageNotFoundError:
            continue  # of another platform or build of torch
        versions[name] = found.version.partition("+")[0]
        waiting += map(Requirement, found.requires or ())
    assert len(versions) > 60
    assert {name: version for name, version in versions.items() if pins.get(name) != version} == {}


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """The wheel that `pip install .` builds, from a copy of the files that git has or would take."""
    source = tmp_path_factory.mktemp("source")
    for name in _tracked("--cached", "--others", "--exclude-standard"):
        if (REPOSITORY / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", "out", "."]
    subprocess.run(command, cwd=source, check=True, capture_output=True, text=True)
    return next((source / "out").glob("*.whl"))


def test_the_wheel_holds_two_packages_and_the_embedded_model(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    dist_info = f"sora_hw-{sora_hw.__version__}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"sora_hw", "sora_hw_kernels", dist_info}
    assert f"{dist_info}/licenses/LICENSE" in names
    modules = {_label(path).removeprefix("kernels/") for path in LIBRARY + KERNELS}
    assert {name for name in names if name.endswith(".py")} == modules
    assert {f"sora_hw/finished/report/page.{kind}" for kind in ("html", "css")} <= set(names)
    model = {Path(name).name for name in names if name.startswith("sora_hw/data/embedded_model/")}
    assert {Path(name).parts[3] for name in names if name.startswith("sora_hw/recipes/models/")} == {
        *("Meta-Llama-3-8B", "gemma-7b", "deberta-v3-base")
    }
    tasks = {Path(name).name for name in names if name.startswith("sora_hw/evaluation/harness_tasks/")}
    assert tasks == {file.name for file in (REPOSITORY / "sora_hw" / "evaluation" / "harness_tasks").glob("*.yaml")}
    assert model >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def test_the_installed_wheel_works_away_from_the_repository(wheel, tmp_path):
    """Its own kernel package and recipes are found: nothing leans on the repository's folders."""
    site = tmp_path / "site"
    site.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    command = [sys.executable, "-m", "sora_hw.cli", "doctor"]
    environment = {"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin", "COLUMNS": "300", "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert str(site / "sora_hw_kernels" / "reference") in answer.stdout
    assert re.search(r"commonsense .* ok", answer.stdout)
    assert "Ready" in answer.stdout
