"""The command `plot`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from training.errors import ConfigError
from training.plotting.bands import BandKind
from training.plotting.metrics import RETURN, XAxis, check_metrics
from training.plotting.style import Theme, ThemeName, check_output, save, theme_of
from training.remote_files import is_uri
from training.storage import fetch_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SEARCH, _RUN = "search.json", "run.json"


def plot(
    runs: Annotated[
        list[str],
        typer.Argument(
            help="Run directories of `train`, here or at a URI, or one search directory of `tune`.",
            metavar="RUN_DIR...",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="The figure: .png, .svg or .pdf.", metavar="FILE"),
    ],
    x: Annotated[XAxis, typer.Option(help="What the curves run along.")] = XAxis.steps,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="A column of progress.csv, or `return`: training and evaluation together; "
            "repeatable, a panel each [return].",
            metavar="NAME",
        ),
    ] = None,
    group_by: Annotated[
        str | None,
        typer.Option(
            help="Average the runs with the same value of this setting, e.g. algo_config.lr; `run` "
            "averages none [all that differ by their seed only].",
            metavar="KEY",
        ),
    ] = None,
    band: Annotated[
        BandKind, typer.Option(help="What lies around the mean of several seeds.")
    ] = BandKind.ci95,
    smooth: Annotated[
        int, typer.Option(help="Average each point with so many iterations up to it.", min=1)
    ] = 1,
    title: Annotated[str | None, typer.Option(help="Above the figure.", metavar="TEXT")] = None,
    theme: Annotated[ThemeName, typer.Option(help="Colours.")] = ThemeName.light,
    dpi: Annotated[int, typer.Option(help="Of a .png.", min=30, max=1200)] = 160,
) -> None:
    """Draw learning curves of runs, or the report of a search."""
    check_output(output)
    colours = theme_of(theme)
    with contextlib.ExitStack() as stack:
        directories = [
            stack.enter_context(fetch_run(run, "none")) if is_uri(run) else Path(run)
            for run in runs
        ]
        figure, said = _draw(directories, metric, group_by, (x, band, smooth), title, colours)
    save(figure, output, dpi=dpi, theme=colours)
    print(f"wrote {output}: {said}")


def _draw(
    directories: Sequence[Path],
    metric: Sequence[str] | None,
    group_by: str | None,
    drawing: tuple[XAxis, BandKind, int],
    title: str | None,
    theme: Theme,
) -> tuple[Figure, str]:
    searches = [path for path in directories if (path / _SEARCH).is_file()]
    if not searches:
        return _draw_runs(directories, metric or [RETURN], group_by, drawing, title, theme)
    if len(directories) > 1:
        raise ConfigError(
            f"{searches[0]} is a search, which has a figure of its own: plot it alone, or its "
            f"trials as runs: {searches[0]}/trials/*"
        )
    return _draw_search(searches[0], title, theme)


def _draw_runs(
    directories: Sequence[Path],
    metrics: Sequence[str],
    group_by: str | None,
    drawing: tuple[XAxis, BandKind, int],
    title: str | None,
    theme: Theme,
) -> tuple[Figure, str]:
    from training.plotting.runs import group_runs, read_curve

    for path in directories:
        if not (path / _RUN).is_file():
            found = "there is no such directory" if not path.is_dir() else "it has neither"
            raise ConfigError(
                f"{path} is neither a run of `train` (with {_RUN}) nor a search of `tune` (with "
                f"{_SEARCH}): {found}"
            )
    runs = [read_curve(path) for path in dict.fromkeys(directories)]
    for run in runs:
        if run.n_damaged:
            print(
                f"warning: {run.path / 'progress.csv'}: {run.n_damaged} damaged rows are left out",
                file=sys.stderr,
            )
    check_metrics(metrics, runs)
    groups = group_runs(runs, group_by)
    from training.plotting.learning_figure import CurveOptions, learning_figure

    figure = learning_figure(groups, CurveOptions(metrics, *drawing, title, theme))
    n_groups = f", {len(groups)} groups" if 1 < len(groups) < len(runs) else ""
    return figure, f"{len(runs)} run{'s' if len(runs) != 1 else ''}{n_groups}"


def _draw_search(path: Path, title: str | None, theme: Theme) -> tuple[Figure, str]:
    from training.plotting.search import read_search
    from training.plotting.search_figure import search_figure

    search = read_search(path)
    return search_figure(search, title, theme), search.summary
