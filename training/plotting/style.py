"""How figures look: colours, ticks, and the file that they go to."""

from __future__ import annotations

import enum
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from training.errors import ConfigError
from training.plotting.errors import PlotError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")


class ThemeName(str, enum.Enum):
    """A light figure for paper, a dark one for screens."""

    light = "light"
    dark = "dark"


class Theme(NamedTuple):
    """Colours of a figure.

    Attributes:
        background: Of everything.
        text: Titles and labels.
        muted: Subtitles, ticks and what is only a frame of reference.
        grid: Grid lines.
        lines: For groups of runs, in their order; told apart with any colour vision.
        scale: The part of viridis to colour values by, from the end next to the background.
        bad: Of what failed.
    """

    background: str
    text: str
    muted: str
    grid: str
    lines: tuple[str, ...]
    scale: tuple[float, float]
    bad: str


# Okabe and Ito's colours; their yellow is darkened for paper and their blue lightened for screens.
_THEMES = {
    ThemeName.light: Theme(
        background="#ffffff",
        text="#1c1e21",
        muted="#5f6670",
        grid="#e4e7eb",
        lines=("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5d5d5d"),
        scale=(0.93, 0.0),
        bad="#d55e00",
    ),
    ThemeName.dark: Theme(
        background="#16181d",
        text="#f0f1f3",
        muted="#a4abb6",
        grid="#2c3038",
        lines=("#56b4e9", "#e69f00", "#2fc79a", "#e59bc4", "#f0e442", "#ff7f3f", "#b5b9c0"),
        scale=(0.22, 1.0),
        bad="#ff7f3f",
    ),
}
# Beyond the colours the lines differ by their dashes.
DASHES = ("solid", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.5, 1.2, 1.5)))


def theme_of(name: ThemeName) -> Theme:
    """The colours of a theme."""
    return _THEMES[name]


def line_style(index: int, theme: Theme) -> dict[str, Any]:
    """Colour and dashes of the group with this number."""
    n = len(theme.lines)
    return {"color": theme.lines[index % n], "linestyle": DASHES[index // n % len(DASHES)]}


def rc_of(theme: Theme) -> Mapping[str, Any]:
    """Matplotlib's settings for a theme."""
    return {
        "font.size": 10.0,
        "axes.labelsize": 10.0,
        "axes.titlesize": 10.0,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": theme.muted,
        "axes.labelcolor": theme.text,
        "axes.facecolor": theme.background,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "figure.facecolor": theme.background,
        "savefig.facecolor": theme.background,
        "text.color": theme.text,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "xtick.labelcolor": theme.text,
        "ytick.labelcolor": theme.text,
        "legend.frameon": False,
        "legend.fontsize": 9.5,
        "lines.solid_capstyle": "round",
        "pdf.fonttype": 42,  # text stays text
        "svg.hashsalt": "policyserve",  # the same figure twice is the same file
    }


def count_text(value: float) -> str:
    """A count as ticks show it: 500, 10k, 2.5M."""
    for unit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.4g}{suffix}"
    return f"{value:.4g}"


def check_output(path: Path) -> None:
    """Refuse an output that can't be written, before anything is read or drawn.

    Raises:
        ConfigError: An unknown suffix, no such directory, or not one to write into.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(
            f"-o {path}: the suffix says which kind of file; expected {', '.join(SUFFIXES)}"
        )
    if not path.parent.is_dir():
        raise ConfigError(f"-o {path}: there is no directory {path.parent}; make it first")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError(f"-o {path} can't be written there")


def save(figure: Figure, path: Path, *, dpi: int, theme: Theme) -> None:
    """Write a figure; it appears under its name once it is whole.

    Raises:
        PlotError: It can't be written.
    """
    import matplotlib as mpl

    kind = path.suffix.lower()[1:]
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp.{kind}")
    dateless = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
    try:
        with mpl.rc_context(rc_of(theme)):  # type: ignore[arg-type]  # its keys are literals
            figure.savefig(temporary, format=kind, dpi=dpi, metadata=dateless)
        temporary.replace(path)
    except OSError as exc:
        raise PlotError(f"{path} can't be written: {exc}") from exc
    finally:
        temporary.unlink(missing_ok=True)
