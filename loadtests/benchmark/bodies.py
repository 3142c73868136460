"""Requests as each kind of server takes them, and the actions in their answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from loadtests.benchmark.targets import Style

JSON = "application/json"
MSGPACK = "application/msgpack"


@dataclass(frozen=True)
class Answers:
    """Observations, and what ONNX Runtime itself answers to them.

    Attributes:
        observations: float32 vectors, as the decimals that a client would send.
        actions: One for each.
    """

    observations: tuple[tuple[float, ...], ...]
    actions: tuple[int, ...]


def read_answers(path: Path) -> Answers:
    """Read what `loadtests.ladder.greedy_model` wrote."""
    found = json.loads(path.read_text())
    return Answers(tuple(map(tuple, found["observations"])), tuple(found["actions"]))


def json_body(observation: Sequence[float], style: Style) -> bytes:
    """One observation as JSON."""
    row = list(observation)
    body: dict[str, Any] = {"observation": row}
    if style == "rows":
        body = {"observation": [row]}
    elif style == "open_inference":
        entry = {"name": "observation", "shape": [1, len(row)], "datatype": "FP32", "data": row}
        body = {"inputs": [entry]}
    return json.dumps(body, separators=(",", ":")).encode()


def json_action(answer: bytes, style: Style) -> int:
    """The action in a JSON answer.

    Raises:
        ValueError: There is none.
    """
    found = json.loads(answer)
    try:
        if style == "rows":
            return int(found[0])
        if style == "open_inference":
            return int(np.ravel(found["outputs"][0]["data"])[0])
        return int(found["action"])
    except (KeyError, IndexError, TypeError) as exc:
        raise ValueError(f"no action in the answer {answer[:200]!r}") from exc


def msgpack_body(observations: Sequence[Sequence[float]]) -> bytes:
    """Observations as msgpack: one alone, or the rows of several one after the other."""
    rows = np.array(observations, dtype="<f4").tobytes()
    key = "observation" if len(observations) == 1 else "observations"
    return msgspec.msgpack.encode({key: rows})


def msgpack_actions(answer: bytes, n: int) -> list[int]:
    """The n actions in a msgpack answer, integers of whatever width they are.

    Raises:
        ValueError: There are not n.
    """
    found = msgspec.msgpack.decode(answer)
    raw = found.get("action" if n == 1 else "actions") if isinstance(found, dict) else None
    if not isinstance(raw, bytes) or len(raw) % n or len(raw) // n not in (1, 2, 4, 8):
        raise ValueError(f"no {n} actions in the answer {answer[:200]!r}")
    return [int(value) for value in np.frombuffer(raw, dtype=f"<i{len(raw) // n}")]
