"""The documents say what the code does."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from policyserve import VERBS
from serving.config import ServingConfig, build_config
from serving.errors import all_errors
from serving.metrics import ServerMetrics
from tests.processes import ROOT, policyserve, refuse, succeed

DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def read(name: str) -> str:
    return (ROOT / name).read_text()


def test_every_error_code_and_its_status_is_documented() -> None:
    import serving.rollout
    import serving.server

    assert serving.rollout, serving.server  # they define errors of their own
    text = read("docs/errors.md")
    for code, error in all_errors().items():
        assert f"`{code}`" in text, code
        row = re.search(rf"^\| `{code}` \| (\d{{3}}) \|", text, flags=re.MULTILINE)
        assert (int(row[1]) if row else None) == error.http_status, code


@pytest.mark.parametrize("module", ["training.errors", "export.errors"])
def test_every_error_code_of_the_commands_is_documented(module: str) -> None:
    text = read("docs/errors.md")
    for error in vars(importlib.import_module(module)).values():
        if isinstance(error, type) and hasattr(error, "exit_code"):
            assert f"`{error.code}`" in text, error.code


def test_every_metric_is_documented() -> None:
    text = read("docs/metrics.md")
    families = re.findall(r"^# TYPE (\S+)", ServerMetrics().exposition().decode(), re.MULTILINE)
    for name in families:
        if not name.endswith("_created"):
            assert f"`{name}`" in text, name


def test_every_setting_of_the_server_is_documented() -> None:
    text = read("docs/serving.md")
    for name in ServingConfig.model_fields:
        assert f"`{name}`" in text, name


def test_every_command_is_in_the_help_and_the_readme_names_only_commands_that_exist() -> None:
    done = policyserve("--help")
    assert done.returncode == 0
    for verb in VERBS:
        assert f"  {verb} " in done.stdout
    for document in DOCS:
        for verb in re.findall(r"^\$? ?policyserve ([a-z]+)", document.read_text(), re.MULTILINE):
            assert verb in VERBS, f"{document}: policyserve {verb}"


def test_every_relative_link_leads_somewhere() -> None:
    for document in DOCS:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document}: {target}"


def test_no_document_names_a_path_of_somebodys_machine() -> None:
    for document in DOCS:
        assert not re.search(r"/(home|root|work|Users)/", document.read_text()), document


def test_the_example_settings_are_valid() -> None:
    assert build_config(ROOT / "examples" / "serve.yaml", {}).max_batch_size == 128


@pytest.mark.parametrize(
    "arguments",
    [
        ("tran",),
        ("serve", "--no-such-option"),
        ("serve",),
        ("export", "somewhere"),
        ("play", "http://127.0.0.1:1", "--env", "CartPole-v1", "--episodes", "many"),
        ("act", "nowhere", "--observation", "[0]"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(arguments: tuple[str, ...]) -> None:
    refuse(*arguments, exit_code=2, in_new_interpreter=True)


def test_help_and_version_need_nothing() -> None:
    for verb in ("serve", "export"):
        assert "Usage: policyserve" in policyserve(verb, "-h").stdout
    assert policyserve("--version").stdout.startswith("policyserve ")


@pytest.mark.slow
def test_the_readmes_python_plays_against_a_served_policy(server, tmp_path: Path) -> None:
    code = re.search(r"```python\n(.*?)```", read("README.md"), flags=re.DOTALL)
    assert code is not None
    script = tmp_path / "readme.py"
    script.write_text(code[1].replace("http://127.0.0.1:8000", server.url))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) >= 475


@pytest.mark.slow
def test_the_examples_run(server, tmp_path: Path) -> None:
    url = f"{server.url}/v1/policies/cartpole"
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "client_loop.py", url],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("return ")
    run = tmp_path / "run"
    succeed(
        "train",
        "examples/train.yaml",
        "--stop-timesteps",
        "2000",
        "--set",
        "stop.return=null",
        "--run-dir",
        run,
    )
    assert yaml.safe_load((run / "config.yaml").read_text())["env"] == "Acrobot-v1"
    assert json.loads((run / "result.json").read_text())["env_steps"] > 0
