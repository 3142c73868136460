"""What can go wrong while a figure is made."""

from __future__ import annotations

from training.errors import TrainingError


class PlotError(TrainingError):
    """There is nothing to draw, what there is can't be read, or the file can't be written."""

    code = "plot_failed"
