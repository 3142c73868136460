"""`python -m serving.bench`: its figures, its errors, and what it can do without."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from serving.bench import BARE, BATCHER, POLICY, main, measure, parse_batch_sizes
from serving.errors import UsageError
from tests.processes import ROOT

QUICK = ("--duration-s", "0.005")


def run_in_process(*arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "serving.bench", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )


def test_every_batch_size_is_measured_in_three_ways(
    bundles: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(bundles["discrete"]), "--batch-sizes", "8,1", "--json", *QUICK]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert not captured.err
    report = json.loads(captured.out.splitlines()[-1])
    assert (report["engine"], report["device"]) == ("onnx", "cpu")
    assert report["reason"] == "onnx on cpu: as configured"
    assert {"processor", "cores", "Python", "onnxruntime", "numpy"} <= report["machine"].keys()
    paths = [(each["batch_size"], each["path"]) for each in report["results"]]
    assert paths == [(n, path) for n in (1, 8) for path in (BARE, POLICY, BATCHER)]
    for each in report["results"]:
        assert 0.0 < each["p50_us"] <= each["p99_us"]
        assert each["actions_per_s"] > 0.0
        assert each["n_calls"] >= 3
    for bare in report["results"][::3]:
        assert bare["ratio"] == 1.0


def test_the_table_names_what_was_measured_and_where(
    tiny_bundles: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main([str(tiny_bundles["memory"]), "--batch-sizes", "2", "--device", "auto", *QUICK]) == 0
    )
    text = capsys.readouterr().out
    assert text.startswith("memory (")
    for part in (BARE, POLICY, BATCHER, "p50 µs", "p99 µs", "actions/s", "onnxruntime"):
        assert part in text


@pytest.mark.parametrize("name", ["dict", "image", "nested", "q", "memory"])
def test_every_kind_of_policy_can_be_measured(tiny_policies: dict[str, Any], name: str) -> None:
    results = measure(tiny_policies[name], 4, duration_s=0.001)
    assert [each.path for each in results] == [BARE, POLICY, BATCHER]
    # Each of the callers at the batcher is answered at least so often.
    assert results[2].n_calls >= 4 * 3


@pytest.mark.parametrize("text", ["", "0", "-1", "1,x", "1.5", "65537", "1,,8"])
def test_batch_sizes_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"expected numbers 1\.\.65536"):
        parse_batch_sizes(text)


def test_batch_sizes_are_taken_once_and_in_order() -> None:
    assert parse_batch_sizes("64, 1,8,8") == [1, 8, 64]


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        ((), 2, "BUNDLE"),
        (("--no-such-option",), 2, "--no-such-option"),
        (("nowhere",), 1, "nowhere is no bundle"),
        (("nowhere", "--device", "tpu"), 2, "'tpu' is not one of"),
        (("nowhere", "--duration-s", "0"), 2, "--duration-s"),
        (("nowhere", "--batch-sizes", "many"), 2, "--batch-sizes 'many'"),
    ],
)
def test_an_error_is_one_line_and_a_status(
    arguments: tuple[str, ...], status: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == status
    captured = capsys.readouterr()
    assert not captured.out
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("serving.bench: error: ")
    assert text in captured.err


def test_an_engine_without_its_file_is_an_error_and_debug_shows_where(
    bundles: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(bundles["box"]), "--engine", "torchscript"]
    assert main(arguments) == 1
    assert "has no policy.torchscript.pt" in capsys.readouterr().err
    assert main([*arguments, "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_the_command_needs_neither_ray_nor_a_web_server(bundles: dict[str, Path]) -> None:
    code = (
        "import sys\n"
        "from serving.bench import main\n"
        f"status = main([{str(bundles['box'])!r}, '--batch-sizes', '1', '--duration-s', '0.005'])\n"
        "heavy = {'ray', 'torch', 'fastapi', 'uvicorn', 'msgspec', 'gymnasium', "
        "'prometheus_client', 'httpx', 'orjson', 'onnx'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


def test_it_runs_as_a_module_and_helps() -> None:
    done = run_in_process("--help")
    assert done.returncode == 0
    assert "Usage: python -m serving.bench" in done.stdout
    for option in ("--device", "--engine", "--batch-sizes", "--duration-s", "--json"):
        assert option in done.stdout
    failed = run_in_process("nowhere")
    assert failed.returncode == 1
    assert failed.stderr.startswith("serving.bench: error: ")
