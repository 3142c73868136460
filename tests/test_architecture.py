"""Who may import whom, what a light client loads, and where the names come from."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes import ROOT

OURS = ("training", "export", "serving", "loadtests")
ALLOWED = {
    "training": {"training"},
    "serving": {"serving"},
    "export": {"export", "training", "serving"},
    "loadtests": {"loadtests", "serving"},
}
# What the load tests may import of serving: the caller's side of it.
CLIENT_PARTS = tuple(
    f"serving.{name}"
    for name in (
        *("calls", "client", "endpoint", "environments", "errors", "rollout", "schemas"),
        *("stream_client", "stream_wire"),
    )
)
# A heavy package may be imported only in these files.
HOMES = {
    "ray.rllib": ("training/", "export/", "loadtests/peers/"),
    "torch": (
        "training/",
        "export/",
        "serving/engines/torch_engine.py",
        "loadtests/peers/",
    ),
    "onnxruntime": (
        "serving/engines/onnx_engine.py",
        "export/",
        "loadtests/peers/",
        "loadtests/ladder/",
    ),
    "locust": ("loadtests/locustfile.py",),
    "ray.serve": (
        *("serving/deployment.py", "serving/server.py", "serving/ray_hooks.py"),
        "loadtests/peers/",
    ),
}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", OURS)
def test_a_package_imports_only_those_it_may(package: str) -> None:
    for path in sources(package):
        for name in imports(path):
            top = name.split(".")[0]
            if top in OURS:
                assert top in ALLOWED[package], f"{path} imports {name}"
            # The ladder times the server's own parts.
            is_ladder = "ladder" in path.parts
            if package == "loadtests" and top == "serving" and not is_ladder:
                assert name.startswith(CLIENT_PARTS), f"{path}: {name}"


@pytest.mark.parametrize("heavy", HOMES)
def test_a_heavy_library_is_imported_only_where_it_belongs(heavy: str) -> None:
    for package in OURS:
        for path in sources(package):
            relative = path.relative_to(ROOT).as_posix()
            if relative.startswith(HOMES[heavy]):
                continue
            for name in imports(path):
                assert name != heavy, relative
                assert not name.startswith(heavy + "."), relative


@pytest.mark.parametrize("package", OURS)
def test_an_init_file_holds_a_docstring_and_no_import(package: str) -> None:
    for path in (ROOT / package).rglob("__init__.py"):
        body = ast.parse(path.read_text()).body
        assert len(body) == 1, path
        assert isinstance(body[0], ast.Expr), path


def loaded_by(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(' '.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import serving.client", {"ray", "torch", "onnxruntime", "gymnasium"}),
        (
            "import serving.stream_client, serving.async_stream_client",
            {"ray", "torch", "onnxruntime", "gymnasium", "fastapi", "pydantic"},
        ),
        ("import serving.rollout", {"ray", "torch", "onnxruntime"}),
        ("import serving.verification", {"ray", "torch", "fastapi", "pydantic", "gymnasium"}),
        ("import serving.service", {"ray", "torch", "fastapi"}),
        ("import training.run_directory, training.provenance", {"ray", "torch"}),
        ("import policyserve, serving.cli, export.cli, training.cli", {"ray", "torch"}),
    ],
)
def test_a_module_loads_no_library_that_it_can_do_without(statement: str, absent: set[str]) -> None:
    assert not loaded_by(statement) & absent


def test_the_package_names_resolve_to_this_checkout_and_to_no_other_distribution() -> None:
    for name in (*OURS, "policyserve"):
        done = subprocess.run(
            [sys.executable, "-c", f"import {name}; print({name}.__file__)"],
            capture_output=True,
            text=True,
            check=True,
            cwd="/",
        )
        assert Path(done.stdout.strip()).is_relative_to(ROOT)
        owners = importlib.metadata.packages_distributions().get(name, [])
        assert set(owners) <= {"policyserve"}
