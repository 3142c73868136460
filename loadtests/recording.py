"""Every request of a run: when it was due, how long it took, what came of it.

`Recorder` is written to while the load runs, `Recording` is what is read afterwards.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

OK = "ok"
REJECTED = "rejected"
# Further kinds of errors are counted together: a server can make up any number of them.
_MAX_KINDS = 64
_MAX_TEXT = 200


class Recorder:
    """Collects in plain arrays: 24 bytes and some tenths of a microsecond per request."""

    def __init__(self) -> None:
        self._outcomes: dict[str, int] = {OK: 0, REJECTED: 1}
        self._groups: dict[str, int] = {}
        self._due = array("d")
        self._latency = array("d")
        self._outcome = array("H")
        self._group = array("H")
        self._n_observations = array("I")
        self.lateness = array("f")
        self.returns = array("d")
        self.lengths = array("d")

    def ok(self, due: float, latency: float, *, group: int = 0, n_observations: int = 1) -> None:
        """Note a right answer.

        Args:
            due: When the request should have been sent, in seconds of `time.perf_counter()`.
            latency: Seconds from then to the answer.
            group: From `group`.
            n_observations: For which actions were answered.
        """
        self._due.append(due)
        self._latency.append(latency)
        self._outcome.append(0)
        self._group.append(group)
        self._n_observations.append(n_observations)

    def failed(self, due: float, latency: float, why: str, *, group: int = 0) -> None:
        """Note a request without a right answer; `why` is REJECTED for a 503."""
        kind = why[:_MAX_TEXT]
        number = self._outcomes.get(kind)
        if number is None:
            kind = kind if len(self._outcomes) < _MAX_KINDS else "other errors"
            number = self._outcomes.setdefault(kind, len(self._outcomes))
        self._due.append(due)
        self._latency.append(latency)
        self._outcome.append(number)
        self._group.append(group)
        self._n_observations.append(0)

    def group(self, name: str) -> int:
        """The number of a group of requests, such as "env step"."""
        return self._groups.setdefault(name, len(self._groups))

    def __len__(self) -> int:
        """Requests noted."""
        return len(self._due)

    def save(self, path: Path, *, started: float, ended: float, **facts: Any) -> None:
        """Write what was recorded.

        Args:
            path: An .npz file.
            started: When the load began, in seconds of `time.perf_counter()`.
            ended: When the last answer was there.
            facts: About the driver; JSON.
        """
        about = {
            "started": started,
            "duration_s": ended - started,
            "outcomes": list(self._outcomes),
            "groups": list(self._groups) or ["requests"],
            "driver": facts,
        }
        with path.open("wb") as file:
            np.savez(
                file,
                about=np.array(json.dumps(about)),
                due_s=np.frombuffer(self._due) - started if self._due else np.zeros(0),
                latency_ms=np.frombuffer(self._latency) * 1e3 if self._latency else np.zeros(0),
                outcome=np.array(self._outcome, np.uint16),
                group=np.array(self._group, np.uint16),
                n_observations=np.array(self._n_observations, np.uint32),
                lateness_ms=np.array(self.lateness, np.float32) * 1e3,
                returns=np.array(self.returns),
                lengths=np.array(self.lengths),
            )


@dataclass(frozen=True)
class Recording:
    """What a run left; N requests in no particular order.

    Attributes:
        started: When the load began, in seconds of the machine's monotonic clock.
        duration_s: From then to the last answer.
        due_s: (N,) when each request was due, since the start.
        latency_ms: (N,) from then to its answer or its failure.
        outcome: (N,) index into `outcomes`.
        group: (N,) index into `groups`.
        n_observations: (N,) for which actions were answered.
        lateness_ms: (M,) how late the driver itself was, measured independently of the server.
        returns: (E,) of finished episodes.
        lengths: (E,) steps of them.
        outcomes: OK, REJECTED, then kinds of errors.
        groups: Names of the kinds of requests.
        driver: Facts about the driver: `cpu_percent`, `n_connections`, `n_retries`.
    """

    started: float
    duration_s: float
    due_s: NDArray[np.float64]
    latency_ms: NDArray[np.float64]
    outcome: NDArray[np.uint16]
    group: NDArray[np.uint16]
    n_observations: NDArray[np.uint32]
    lateness_ms: NDArray[np.float32]
    returns: NDArray[np.float64]
    lengths: NDArray[np.float64]
    outcomes: list[str]
    groups: list[str]
    driver: Mapping[str, Any]

    @property
    def is_ok(self) -> NDArray[np.bool_]:
        """(N,) which requests got a right answer."""
        return np.equal(self.outcome, 0)

    @property
    def ok_latency_ms(self) -> NDArray[np.float64]:
        """Of right answers."""
        return self.latency_ms[self.is_ok]

    def errors(self) -> dict[str, int]:
        """How many of each kind, most first; rejected ones among them."""
        counts = np.bincount(self.outcome, minlength=len(self.outcomes)).tolist()
        found = {name: n for name, n in zip(self.outcomes, counts, strict=True) if n}
        found.pop(OK, None)
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def read_recording(path: Path) -> Recording:
    """What `Recorder.save` wrote."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    about = json.loads(str(arrays.pop("about")))
    return Recording(**about, **arrays)
