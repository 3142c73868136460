"""Every algorithm x observation space x action space x connector x format, exported and compared.

`python -m tests.export.matrix` runs the diagonal, in which each value occurs; `--full` every
sensible pair; `--write docs/export-matrix.md` makes the table that the documentation shows. A cell
passes if the export passes its own parity gate against RLlib, or is refused for the reason that
the cell expects.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.export.cells import Cell, diagonal, every_cell

FORMATS = ("onnx", "torchscript", "pt2")


@dataclass(frozen=True)
class Outcome:
    """What became of one cell.

    Attributes:
        name: The cell's.
        passed: It was exported as expected, or refused as expected.
        message: The refusal, or what went wrong; empty for an export.
        differences: Format -> the largest difference from RLlib over all outputs.
        seconds: Of the checkpoint, the export and its parity gate.
    """

    name: str
    passed: bool
    message: str = ""
    differences: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0


def run_cell(cell: Cell, directory: Path, formats: Sequence[Any] = FORMATS) -> Outcome:
    """Write the cell's checkpoint, export it, and compare with what the cell expects.

    Args:
        cell: What to export.
        directory: An empty directory for the checkpoint and the bundle.
        formats: What to write; ONNX among them.
    """
    from export.convert import export_policy
    from export.errors import ExportError
    from tests.export.checkpoints import write_checkpoint

    begin = time.perf_counter()
    checkpoint = write_checkpoint(directory / "checkpoint", cell.case)
    if cell.spoil is not None:
        cell.spoil(checkpoint)
    bundle = directory / "bundle"
    try:
        manifest = export_policy(
            checkpoint,
            bundle,
            formats=formats,
            trust_checkpoint=True,
            **({"module_id": cell.module_id} if cell.module_id else {}),
        )
    except ExportError as exc:
        passed = cell.refused is not None and re.search(cell.refused, exc.message) is not None
        if bundle.exists():
            return Outcome(cell.name, False, f"a refused export left {bundle.name} behind")
        # The table is no place for a temporary directory's name.
        message = exc.message.replace(f"{directory.resolve()}/", "")
        return Outcome(cell.name, passed, message, {}, time.perf_counter() - begin)
    seconds = time.perf_counter() - begin
    if cell.refused is not None:
        message = f"exported, but expected to be refused with {cell.refused!r}"
        return Outcome(cell.name, False, message, {}, seconds)
    reports = manifest.raw["parity"]
    differences = {
        name: max(reports[name]["max_difference"].values(), default=0.0) for name in formats
    }
    return Outcome(cell.name, True, "", differences, seconds)


def _run_in_worker(name: str, full: bool) -> Outcome:
    warnings.filterwarnings("ignore")
    cell = next(cell for cell in (every_cell() if full else diagonal()) if cell.name == name)
    with tempfile.TemporaryDirectory(prefix="export-matrix-") as directory:
        try:
            return run_cell(cell, Path(directory))
        except Exception as exc:  # a cell must not end the whole run; it counts as failed
            return Outcome(cell.name, False, f"{type(exc).__name__}: {exc}")


def _prepare_worker() -> None:
    import logging

    import torch

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)


def run_cells(names: Sequence[str], *, full: bool, jobs: int) -> Iterator[Outcome]:
    """Run cells in `jobs` processes; outcomes come as they are ready."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_prepare_worker) as pool:
        futures = [pool.submit(_run_in_worker, name, full) for name in names]
        for future in as_completed(futures):
            yield future.result()


_INTRODUCTION = """\
`make test-export-matrix` writes this page. Each row is one checkpoint: RLlib's own RLModule and
connector pipelines with drawn weights, exported in three formats and compared with RLlib's own
answers at B = 1, 7 and 64, and over several steps where there is state. A number is the largest
absolute difference over all float outputs, sampled actions, log-probabilities and values
included; the gate allows 1e-5 (1 + |RLlib's answer|). Integer actions are equal, or as good
within that tolerance."""


def table(cells: Sequence[Cell], outcomes: Mapping[str, Outcome]) -> str:
    """The outcomes as Markdown, one section per group of cells."""
    n_exported = sum(1 for cell in cells if cell.refused is None)
    largest = max((max(o.differences.values(), default=0.0) for o in outcomes.values()), default=0)
    versions = ", ".join(f"{name} {version(name)}" for name in ("ray", "torch", "onnxruntime"))
    summary = (
        f"{n_exported} exported, {len(cells) - n_exported} refused as expected; the largest "
        f"difference is {largest:.1e}. With {versions}."
    )
    lines = [
        "# What was exported, and how closely",
        "",
        _INTRODUCTION,
        "",
        summary,
    ]
    for group in dict.fromkeys(cell.group for cell in cells):
        members = [cell for cell in cells if cell.group == group]
        lines += ["", f"## {group}", "", *_rows(members, outcomes)]
    return "\n".join(lines) + "\n"


def _rows(cells: Sequence[Cell], outcomes: Mapping[str, Outcome]) -> Iterator[str]:
    if cells[0].refused is not None:
        yield "| Policy | Refused, because |"
        yield "|---|---|"
        for cell in cells:
            yield f"| {_escape(cell.name)} | {_escape(outcomes[cell.name].message)} |"
        return
    yield "| Policy | ONNX | TorchScript | pt2 |"
    yield "|---|---|---|---|"
    for cell in cells:
        outcome = outcomes[cell.name]
        numbers = " | ".join(
            f"{outcome.differences[name]:.1e}" if name in outcome.differences else "failed"
            for name in FORMATS
        )
        yield f"| {_escape(cell.name)} | {numbers} |"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the matrix; 1 if a cell failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.export.matrix", description=__doc__)
    parser.add_argument("--full", action="store_true", help="every sensible pair")
    parser.add_argument("--only", default="", help="regular expression of cells' names")
    parser.add_argument("--write", type=Path, help="write the table to this file")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="print the cells' names and stop")
    options = parser.parse_args(arguments)
    cells = [
        cell
        for cell in (every_cell() if options.full else diagonal())
        if re.search(options.only, cell.name)
    ]
    if options.list:
        print("\n".join(cell.name for cell in cells))
        return 0
    outcomes = _with_progress(cells, options)
    failed = [outcome for outcome in outcomes.values() if not outcome.passed]
    if options.write and not failed:
        options.write.write_text(table(cells, outcomes))
    seconds = sum(outcome.seconds for outcome in outcomes.values())
    print(f"{len(outcomes) - len(failed)} passed, {len(failed)} failed, {seconds:.0f} s of work")
    return 1 if failed else 0


def _with_progress(cells: Sequence[Cell], options: argparse.Namespace) -> dict[str, Outcome]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    outcomes: dict[str, Outcome] = {}
    console = Console(stderr=True)
    quiet = not console.is_terminal
    with Progress(*columns, TimeElapsedColumn(), console=console, disable=quiet) as progress:
        task = progress.add_task("export matrix", total=len(cells))
        names = [cell.name for cell in cells]
        for outcome in run_cells(names, full=options.full, jobs=options.jobs):
            outcomes[outcome.name] = outcome
            if not outcome.passed:
                console.print(f"FAILED {outcome.name}: {outcome.message}", markup=False)
            progress.update(task, advance=1, description=outcome.name[:50])
    return outcomes


if __name__ == "__main__":
    sys.exit(main())
