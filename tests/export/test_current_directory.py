"""A file of the current directory may be named, and never stands for an installed package."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

from export import checkpoint, cli
from export.config_source import current_directory_importable
from serving.environments import OUR_WRAPPERS, described_environment, make_env

INSTALLED = "pygame"  # what CartPole imports when it first renders


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Holds a module of the user's, and one by the name of an installed package."""
    (tmp_path / "users_module.py").write_text(
        "import gymnasium\n\n\nclass Thing:\n    pass\n\n\n"
        "def pole():\n    return gymnasium.make('CartPole-v1')\n"
    )
    (tmp_path / f"{INSTALLED}.py").write_text("raise RuntimeError('of the current directory')\n")
    monkeypatch.chdir(tmp_path)
    roots = {"", str(Path.cwd())}
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in roots])
    yield tmp_path
    sys.modules.pop("users_module", None)
    importlib.invalidate_caches()


def is_findable(name: str, directory: Path) -> bool:
    spec = PathFinder.find_spec(name)
    return spec is not None and Path(str(spec.origin)).parent == directory


def test_a_wrapper_that_a_bundle_may_name_opens_nothing(directory: Path) -> None:
    wrappers = [[OUR_WRAPPERS[0], {"components": [0]}]]
    said = {"environment": {"id": "CartPole-v1", "kwargs": {}, "wrappers": wrappers}}
    named = described_environment(said)
    assert named is not None
    named.make().close()
    assert not is_findable("users_module", directory)
    assert not is_findable(INSTALLED, directory)


def _unpickled() -> None:
    Path("a.pkl").write_bytes(b"cusers_module\nThing\n.")  # protocol 0: a class by its name
    assert checkpoint._unpickle(Path("a.pkl")).__name__ == "Thing"


@pytest.mark.parametrize("way", ["env", "twins", "checkpoint", "config"])
def test_what_the_user_names_is_found_behind_what_is_installed(way: str, directory: Path) -> None:
    with contextlib.ExitStack() as stack:
        if way == "env":
            make_env("users_module:pole").close()
        elif way == "twins":
            cli._import_twins("users_module")
        elif way == "checkpoint":
            _unpickled()
        else:
            stack.enter_context(current_directory_importable())
        assert is_findable("users_module", directory)
        assert not is_findable(INSTALLED, directory)
