"""Search spaces: which settings of a search file vary, and the values that they are given."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from training.errors import ConfigError

Path = tuple[str, ...]
LISTS, RANGES = ("grid", "choice"), ("uniform", "loguniform", "randint")
KINDS = (*LISTS, *RANGES)
_DIGITS = 6  # of a sampled number: enough for any search, and legible in a config
_FREE = ("env_config",)  # mappings whose keys are the user's own


@dataclass(frozen=True)
class Parameter:
    """One setting that varies over a search.

    Attributes:
        path: Where the setting stands in the config, e.g. ("algo_config", "lr").
        kind: grid, choice, uniform, loguniform or randint.
        values: Of a grid or choice, in the file's order; () for a range.
        low: Lowest value of a range, possible itself; None for a list.
        high: Highest value of a range, possible itself; None for a list.
        source: Where it stands, for messages, e.g. "search.yaml line 5".
    """

    path: Path
    kind: str
    values: tuple[Any, ...] = ()
    low: float | int | None = None
    high: float | int | None = None
    source: str = "the search"

    @property
    def key(self) -> str:
        """The path, dotted."""
        return ".".join(self.path)

    @property
    def extremes(self) -> tuple[Any, ...]:
        """The values whose validity says that of all: every one of a list, both ends of a range."""
        return self.values if self.kind in LISTS else (self.low, self.high)

    def sample(self, rng: np.random.Generator) -> Any:
        """Draw a value; of a grid too, each with the same probability."""
        if self.kind in LISTS:
            return self.values[int(rng.integers(len(self.values)))]
        assert self.low is not None
        assert self.high is not None
        if self.kind == "randint":
            return int(rng.integers(int(self.low), int(self.high), endpoint=True))
        if self.kind == "uniform":
            drawn = rng.uniform(self.low, self.high)
        else:
            drawn = math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
        return self.bounded(float(f"{drawn:.{_DIGITS}g}"))

    def bounded(self, value: Any) -> Any:
        """The nearest value that is in the space: PBT multiplies values past a range's ends."""
        if self.kind in LISTS:
            return value
        assert self.low is not None
        assert self.high is not None
        inside = min(max(value, self.low), self.high)
        return round(inside) if self.kind == "randint" else float(f"{inside:.{_DIGITS}g}")

    def describe(self) -> dict[str, Any]:
        """What `search.json` says about it."""
        if self.kind in LISTS:
            return {"kind": self.kind, "values": list(self.values)}
        return {"kind": self.kind, "low": self.low, "high": self.high}


def find_parameters(document: Mapping[str, Any], sources: Mapping[Path, str]) -> list[Parameter]:
    """Find the search spaces in a search file, in its order.

    Args:
        document: The file's content, without its `tune` section.
        sources: Where each key stands, by its path.

    Raises:
        ConfigError: A search space is misspelt or its values make no sense.
    """
    return list(_walk(document, (), sources))


def _walk(node: Any, path: Path, sources: Mapping[Path, str]) -> Iterator[Parameter]:
    if not isinstance(node, dict):
        return
    where = _source(sources, path)
    if path and len(node) == 1 and next(iter(node)) in KINDS:
        kind, content = next(iter(node.items()))
        yield _parameter(path, kind, content, where)
        return
    if path and path[0] not in _FREE:
        _refuse_misspelt(node, ".".join(path), where)
    for name, child in node.items():
        yield from _walk(child, (*path, str(name)), sources)


def _refuse_misspelt(node: Mapping[Any, Any], key: str, where: str) -> None:
    if kinds := [name for name in node if name in KINDS]:
        raise ConfigError(
            f"`{key}` ({where}) has a search space and other keys beside it "
            f"({', '.join(map(str, node))}), expected `{kinds[0]}` alone"
        )
    name = str(next(iter(node), ""))
    near = difflib.get_close_matches(name, KINDS, n=1, cutoff=0.75)
    if len(node) == 1 and near and isinstance(node.get(name), list):
        raise ConfigError(
            f"no search space `{name}` at `{key}` ({where}); did you mean `{near[0]}`?"
        )


def _parameter(path: Path, kind: str, content: Any, where: str) -> Parameter:
    key = ".".join(path)
    if not isinstance(content, list) or not content:
        expected = "[value, ...]" if kind in LISTS else "[low, high]"
        raise ConfigError(f"`{key}` is {{{kind}: {content!r}}} ({where}), expected {expected}")
    if kind in LISTS:
        twice = [value for index, value in enumerate(content) if _is_in(value, content[:index])]
        if kind == "grid" and twice:
            raise ConfigError(f"`{key}` has {twice[0]!r} twice in its grid ({where})")
        return Parameter(path, kind, values=tuple(content), source=where)
    low, high = _ends(key, kind, content, where)
    return Parameter(path, kind, low=low, high=high, source=where)


def _is_in(value: Any, others: list[Any]) -> bool:
    # 1 and True are equal to Python, and different settings.
    return any(type(value) is type(other) and value == other for other in others)


def _ends(key: str, kind: str, content: list[Any], where: str) -> tuple[Any, Any]:
    numbers = int if kind == "randint" else (int, float)
    what = "whole numbers" if kind == "randint" else "numbers"
    are_numbers = all(
        isinstance(value, numbers) and not isinstance(value, bool) and math.isfinite(value)
        for value in content
    )
    if len(content) != 2 or not are_numbers:
        raise ConfigError(
            f"`{key}` is {{{kind}: {content}}} ({where}), expected two {what}, [low, high]"
        )
    low, high = content
    if low >= high:
        raise ConfigError(
            f"`{key}` is {{{kind}: {content}}} ({where}), expected [low, high] with low below high"
        )
    if kind == "loguniform" and low <= 0:
        raise ConfigError(
            f"`{key}` is {{loguniform: {content}}} ({where}), expected a low end above 0: its "
            "logarithm is drawn"
        )
    return low, high


def _source(sources: Mapping[Path, str], path: Path) -> str:
    for end in range(len(path), 0, -1):
        if path[:end] in sources:
            return sources[path[:end]]
    return "the search"
