"""Which versions are refused, and by which words."""

import platform
from importlib import metadata

import pytest

from sora_hw import versions
from sora_hw.errors import UserError


@pytest.fixture
def installed(monkeypatch):
    """The installed versions, all tested ones to begin with; a test changes what it likes."""
    found = {name: support.tested for name, support in versions.SUPPORTED.items()}

    def version(name):
        if found[name] is None:
            raise metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(platform, "python_version", lambda: found["python"])
    return found


def test_the_tested_versions_are_supported(installed):
    installed["torch"] += "+cpu"
    versions.check_versions()
    assert [verdict.installed for verdict in versions.verdicts()] == list(installed.values())


@pytest.mark.parametrize(
    ("name", "version", "message"),
    [
        ("torch", "2.10.1+cu128", "torch 2.10.1+cu128 is not supported: pip install 'torch>=2.11,<2.14'"),
        ("torch", "2.14.0.dev20260901", "torch 2.14.0.dev20260901 is not supported"),
        ("transformers", "4.57.0", "transformers 4.57.0 is not supported"),
        ("peft", "0.22.0", "peft 0.22.0 is not supported"),
        ("deepspeed", None, "deepspeed is not installed: pip install 'deepspeed>=0.19,<0.20'"),
        ("python", "3.14.0", "Python 3.14.0 is not supported: use >=3.11,<3.14"),
    ],
)
def test_a_version_outside_the_range_is_refused_by_name(installed, name, version, message):
    installed[name] = version
    with pytest.raises(UserError) as caught:
        versions.check_versions()
    assert str(caught.value).startswith(message)
    assert ";" not in str(caught.value)


def test_every_problem_is_named(installed):
    installed["torch"], installed["peft"] = "2.9.0", "0.17.0"
    with pytest.raises(UserError, match=r"torch 2\.9\.0 is not supported.*; peft 0\.17\.0 is not supported"):
        versions.check_versions()


def test_what_runs_this_test_is_supported():
    versions.check_versions()
