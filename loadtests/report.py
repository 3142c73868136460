"""What a load test leaves in its directory: report.html, summary.json and windows.csv."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from loadtests.figures import figures, to_svg
from loadtests.steps import Step
from loadtests.summary import windows
from loadtests.verdicts import load_of, remarks

_TEMPLATES = Path(__file__).with_name("templates")


def write_report(
    output: Path, steps: Sequence[Step], summary: Mapping[str, Any], broken: Sequence[str]
) -> None:
    """Write everything.

    Args:
        output: An existing directory.
        steps: What was measured.
        summary: Its figures.
        broken: A line for each limit that was broken.
    """
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    _write_windows(output / "windows.csv", steps)
    (output / "report.html").write_text(render(steps, summary, broken))


def _write_windows(path: Path, steps: Sequence[Step]) -> None:
    with path.open("w", newline="") as file:
        writer = None
        for step in steps:
            load = {"users": step.plan.users, "rate": step.plan.rate}
            for row in windows(step):
                if writer is None:
                    writer = csv.DictWriter(file, [*load, *row])
                    writer.writeheader()
                writer.writerow({**load, **row})


def render(steps: Sequence[Step], summary: Mapping[str, Any], broken: Sequence[str]) -> str:
    """The report as one page of HTML that needs nothing else."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"count": _count, "ms": _ms, "figure": _figure}
    told = summary.get("steps") or [summary]
    drawn = figures(steps, told)
    return environment.get_template("report.html.j2").render(
        summary=summary,
        steps=[{**each, "load": load_of(each)} for each in told],
        broken=broken,
        remarks=remarks(summary),
        figures={title: to_svg(figure) for title, figure in drawn.items()},
    )


def _count(value: float | None) -> str:
    return "unknown" if value is None else f"{value:,.0f}"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:,.2f}"


def _figure(value: Any) -> str:
    """A fact as people write it."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_figure(each)}" for key, each in value.items())
    if isinstance(value, float):
        return f"{value:g}"
    return "-" if value is None else str(getattr(value, "value", value))
