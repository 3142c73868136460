"""progress.csv and trials.csv as columns, whatever state they are in."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from training.plotting.errors import PlotError


class Progress(NamedTuple):
    """The readable rows of a progress.csv.

    Attributes:
        columns: Name to (n_rows,) float64; NaN where a cell is empty.
        n_damaged: Rows that were left out. A last line without its end isn't counted: the run is
            writing it, or was killed while it was.
    """

    columns: dict[str, NDArray[np.float64]]
    n_damaged: int


def read_progress(path: Path) -> Progress:
    """Read a progress.csv, also that of a run in progress.

    Raises:
        PlotError: It is missing, has no row, lacks `iteration` or `env_steps`, or no row of it can
            be read.
    """
    header, rows, is_cut = read_rows(path)
    for name in ("iteration", "env_steps"):
        if name not in header:
            raise PlotError(f"{path} has no column {name!r}: it is not a run's progress")
    if not rows and not is_cut:
        raise PlotError(f"{path} has no row: the run's first iteration is not over")
    read = [_numbers(row, header) for row in rows]
    whole = [row for row in read if row is not None]
    n_damaged = len(read) - len(whole) - (is_cut and bool(read) and read[-1] is None)
    if not whole:
        raise PlotError(f"{path} has no row that can be read: it is damaged")
    table = np.array(whole, dtype=np.float64)
    columns = {name: table[:, index] for index, name in enumerate(header)}
    return Progress(columns, n_damaged)


def read_rows(path: Path) -> tuple[list[str], list[list[str]], bool]:
    """A CSV file's header, its rows, and whether its last line has no end.

    Raises:
        PlotError: The file is missing, empty, or no text.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise PlotError(f"there is no {path}: the run has not come that far") from None
    except (OSError, UnicodeDecodeError) as exc:
        raise PlotError(f"{path} can't be read: {exc}") from exc
    try:
        lines = [row for row in csv.reader(text.splitlines(keepends=True)) if row]
    except csv.Error as exc:
        raise PlotError(f"{path} is damaged: {exc}") from exc
    if not lines:
        raise PlotError(f"{path} is empty: the run's first iteration is not over")
    return lines[0], lines[1:], not text.endswith("\n")


def _numbers(row: list[str], header: list[str]) -> list[float] | None:
    """A row's numbers; None if it is damaged."""
    if len(row) != len(header):
        return None
    try:
        numbers = [float(cell) if cell else math.nan for cell in row]
    except ValueError:
        return None
    is_placed = all(
        math.isfinite(number)
        for name, number in zip(header, numbers, strict=True)
        if name in ("iteration", "env_steps")
    )
    return numbers if is_placed else None
