"""What a load test is to do: one frozen record, written beside its results."""

from __future__ import annotations

import enum
import json
from dataclasses import asdict, dataclass, fields
from typing import Literal

from loadtests.errors import LoadTestUsageError

DEFAULT_USERS = 8
DEFAULT_DURATION_S = 10.0
DEFAULT_SOAK_S = 600.0


class Kind(str, enum.Enum):
    """Which users run."""

    queries = "queries"
    env_loops = "env-loops"
    vector_env_loops = "vector-env-loops"
    both = "both"


class Protocol(str, enum.Enum):
    """How the users speak to the server."""

    http = "http"
    msgpack = "msgpack"
    ws = "ws"

    @property
    def encoding(self) -> Literal["json", "msgpack"]:
        """Of bodies and frames."""
        return "json" if self is Protocol.http else "msgpack"


class Arrivals(str, enum.Enum):
    """When the requests of an open loop are due."""

    poisson = "poisson"
    constant = "constant"


@dataclass(frozen=True)
class LoadPlan:
    """One step of a load test.

    Attributes:
        url: `http://HOST:PORT/v1/policies/NAME`.
        users: Users of a closed loop; in an open loop the connections at its start.
        duration_s: Seconds in which requests are sent.
        rate: Requests per second of an open loop; None: a closed loop.
        arrivals: Of an open loop.
        kind: What is asked.
        protocol: How.
        batch_size: Observations in a query.
        num_envs: Environments of one vectorised loop.
        env: Environment of the loops; None: the policy's own.
        seed: Of observations, arrivals and environments.
        max_connections: Of an open loop.
        timeout_s: What is not answered in this time has failed.
    """

    url: str
    users: int = DEFAULT_USERS
    duration_s: float = DEFAULT_DURATION_S
    rate: float | None = None
    arrivals: Arrivals = Arrivals.poisson
    kind: Kind = Kind.queries
    protocol: Protocol = Protocol.http
    batch_size: int = 1
    num_envs: int = 8
    env: str | None = None
    seed: int = 0
    max_connections: int = 1000
    timeout_s: float = 10.0

    @property
    def is_open(self) -> bool:
        """Whether requests are due at times of their own, whatever the server does."""
        return self.rate is not None

    @property
    def loop(self) -> str:
        """For people."""
        return f"open ({self.arrivals.value} arrivals)" if self.is_open else "closed"

    @property
    def load(self) -> str:
        """How much, for people."""
        return load_text(self.users, self.rate)

    def check(self) -> None:
        """Refuse what cannot be.

        Raises:
            LoadTestUsageError: Says what does not go together.
        """
        if self.is_open and self.kind is not Kind.queries:
            raise LoadTestUsageError(
                f"found a rate with --kind {self.kind.value}, expected --kind queries: an "
                "environment asks again when it has its answer, so its loop is a closed one"
            )

    def to_json(self) -> str:
        """For another process."""
        return json.dumps(asdict(self))


def load_text(users: int, rate: float | None) -> str:
    """How much load, for people."""
    if rate is not None:
        return f"{rate:,.10g} requests/s"
    return f"{users} user{'s' if users != 1 else ''}"


def plan_from_json(text: str) -> LoadPlan:
    """The plan that `LoadPlan.to_json` wrote."""
    values = json.loads(text)
    names = {field.name for field in fields(LoadPlan)}
    values |= {
        "arrivals": Arrivals(values["arrivals"]),
        "kind": Kind(values["kind"]),
        "protocol": Protocol(values["protocol"]),
    }
    return LoadPlan(**{name: values[name] for name in names & values.keys()})
