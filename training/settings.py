"""The kinds of values that settings take, each with what is wrong about another value."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictInt


class Section(BaseModel):
    """A part of a config: its keys are known, and it never changes."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, populate_by_name=True
    )


def _whole(value: Any) -> Any:
    # `--stop-timesteps 1e5` is a float to YAML and a count to its user.
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected a number")
    return value


def _check_schedule(value: Any) -> Any:
    if not isinstance(value, (list, tuple)):
        return value
    points = [point for point in value if isinstance(point, (list, tuple)) and len(point) == 2]
    if len(points) != len(value) or len(points) < 2:
        raise ValueError("expected a number or a schedule [[0, value], [timestep, value], ...]")
    timesteps = [point[0] for point in points]
    if timesteps[0] != 0 or any(a >= b for a, b in pairwise(timesteps)):
        raise ValueError("a schedule's timesteps start at 0 and rise")
    return value


def _check_filters(value: Any) -> Any:
    is_list = isinstance(value, (list, tuple)) and len(value) > 0
    if is_list and all(isinstance(item, (list, tuple)) and len(item) == 3 for item in value):
        return value
    raise ValueError("expected [[channels, kernel, stride], ...], e.g. [[16, 4, 2], [32, 4, 2]]")


def _check_import_path(value: Any) -> Any:
    module, colon, name = value.partition(":") if isinstance(value, str) else ("", "", "")
    if not (colon and module and name.isidentifier()):
        raise ValueError('expected an import path "module:Name"')
    return value


Count = Annotated[int, BeforeValidator(_whole), Field(strict=True)]
PositiveCount = Annotated[Count, Field(ge=1)]
NonNegativeCount = Annotated[Count, Field(ge=0)]
Number = Annotated[float, BeforeValidator(_not_bool), Field(allow_inf_nan=False)]
PositiveNumber = Annotated[Number, Field(gt=0)]
NonNegativeNumber = Annotated[Number, Field(ge=0)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
Switch = Annotated[bool, Field(strict=True)]
Layers = tuple[Annotated[StrictInt, Field(ge=1)], ...]
Activation = Literal["tanh", "relu", "swish", "silu", "linear"]
SchedulePoint = tuple[Count, NonNegativeNumber]
ConvSize = PositiveCount | tuple[PositiveCount, PositiveCount]
ConvFilters = Annotated[
    tuple[tuple[PositiveCount, ConvSize, ConvSize], ...], BeforeValidator(_check_filters)
]
Schedule = Annotated[
    NonNegativeNumber | tuple[SchedulePoint, ...], BeforeValidator(_check_schedule)
]
ImportPath = Annotated[str, BeforeValidator(_check_import_path)]
