"""A closed-loop HTTP driver: C kept-alive connections, each asking again when it has its answer.

wrk where it is installed, as it is the lightest; else the asyncio driver below, which costs more
of the machine and so understates a fast server (the report marks what it limits). Both check the
status of every answer.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from urllib.parse import urlsplit

import numpy as np

from loadtests.benchmark.results import DriverResult
from loadtests.errors import LoadTestError

_TIMEOUT_S = 10


@dataclass(frozen=True)
class Requests:
    """What a driver sends.

    Attributes:
        url: Where, by POST.
        bodies: In turn.
        content_type: Of all of them.
    """

    url: str
    bodies: Sequence[bytes]
    content_type: str = "application/json"


def driver_name() -> str:
    """Which driver `drive_http` uses here."""
    return "wrk" if shutil.which("wrk") else "asyncio"


def drive_http(
    requests: Requests, *, connections: int, duration_s: float, driver: str | None = None
) -> DriverResult:
    """Load a URL.

    Args:
        requests: What to send.
        connections: Kept-alive connections.
        duration_s: How long.
        driver: `wrk` or `asyncio`; None: what `driver_name` says.

    Raises:
        LoadTestError: The driver itself failed.
    """
    if (driver or driver_name()) == "wrk":
        return _drive_with_wrk(requests, connections, duration_s)
    order = {
        "url": requests.url,
        "bodies": [base64.b64encode(body).decode() for body in requests.bodies],
        "content_type": requests.content_type,
        "connections": connections,
        "duration_s": duration_s,
    }
    return run_driver("loadtests.benchmark.http_driver", order)


def run_driver(module: str, order: dict[str, object]) -> DriverResult:
    """Run a driver of ours as a process of its own: JSON in, JSON out.

    Raises:
        LoadTestError: It failed.
    """
    done = subprocess.run(
        [sys.executable, "-m", module],
        input=json.dumps(order),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit {done.returncode}"]
        raise LoadTestError(lines[-1])
    return DriverResult(**json.loads(done.stdout))


# --- wrk ---

_UNITS_MS = {"us": 1e-3, "ms": 1.0, "s": 1e3, "m": 60e3}
# The requests are written before the clock starts; wrk then only takes the next.
_WRK_SCRIPT = """
local bodies = {%s}
local requests = {}
local last = 0
init = function(_)
  for index, body in ipairs(bodies) do
    requests[index] = wrk.format("POST", nil, {["content-type"] = "%s"}, body)
  end
end
request = function()
  last = last %% #requests + 1
  return requests[last]
end
"""


def _drive_with_wrk(requests: Requests, connections: int, duration_s: float) -> DriverResult:
    bodies = ",".join(map(_lua_string, requests.bodies))
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as file:
        file.write(_WRK_SCRIPT % (bodies, requests.content_type))
        file.flush()
        command = ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(duration_s))}s", "--latency"]
        done = subprocess.run(
            [*command, "--timeout", f"{_TIMEOUT_S}s", "-s", file.name, requests.url],
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode != 0:
        raise LoadTestError(f"wrk failed: {(done.stderr or done.stdout).strip()}")
    return parse_wrk(done.stdout)


def _lua_string(data: bytes) -> str:
    return '"' + "".join(f"\\{byte:03d}" for byte in data) + '"'


def parse_wrk(text: str) -> DriverResult:
    """Read what wrk prints.

    Raises:
        LoadTestError: It is not that.
    """
    rate = re.search(r"Requests/sec:\s+([\d.]+)", text)
    total = re.search(r"(\d+) requests in ([\d.]+)(us|ms|s|m)\b", text)
    if rate is None or total is None:
        raise LoadTestError(f"wrk printed no result: {text[:200]!r}")
    n_bad = sum(map(int, re.findall(r"Non-2xx or 3xx responses: (\d+)", text)))
    good = 1.0 - n_bad / max(1, int(total[1]))
    return DriverResult(
        requests_per_s=float(rate[1]) * good,
        p50_ms=_wrk_percentile(text, "50"),
        p99_ms=_wrk_percentile(text, "99"),
        n_errors=n_bad + _wrk_socket_errors(text),
    )


def _wrk_percentile(text: str, percent: str) -> float | None:
    match = re.search(rf"^\s+{percent}%\s+([\d.]+)(us|ms|s|m)\s*$", text, flags=re.MULTILINE)
    value = float(match[1]) * _UNITS_MS[match[2]] if match else 0.0
    return value or None  # wrk prints 0 where nothing was answered


def _wrk_socket_errors(text: str) -> int:
    counts: list[str] = []
    for line in re.findall(r"Socket errors: (.*)", text):
        counts += re.findall(r"\d+", line)
    return sum(map(int, counts))


# --- asyncio ---


class _Connection(asyncio.Protocol):
    def __init__(self, run: _Run) -> None:
        self._run = run
        self._buffer = b""
        self._sent = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._send()

    def _send(self) -> None:
        self._sent = time.perf_counter()
        self._transport.write(next(self._run.requests))

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        length = re.search(rb"content-length: (\d+)", self._buffer[:end].lower())
        if length is None or len(self._buffer) < end + 4 + int(length[1]):
            return
        is_ok = self._buffer.startswith(b"HTTP/1.1 200")
        self._buffer = b""
        self._run.note(time.perf_counter() - self._sent, is_ok=is_ok)
        if time.perf_counter() < self._run.deadline:
            self._send()
        else:
            self._transport.close()

    def connection_lost(self, _: Exception | None) -> None:
        self._run.lost()


class _Run:
    def __init__(self, requests: Sequence[bytes], connections: int, duration_s: float) -> None:
        self.requests = itertools.cycle(requests)
        self.started = time.perf_counter()
        self.deadline = self.started + duration_s
        self.done = asyncio.get_running_loop().create_future()
        self._open = connections
        self._latencies: list[float] = []
        self._n_errors = 0

    def note(self, latency_s: float, *, is_ok: bool) -> None:
        if is_ok:
            self._latencies.append(latency_s)
        else:
            self._n_errors += 1

    def lost(self) -> None:
        self._open -= 1
        if time.perf_counter() < self.deadline:
            self._n_errors += 1
        if self._open == 0 and not self.done.done():
            self.done.set_result(None)

    def result(self) -> DriverResult:
        rate = len(self._latencies) / (time.perf_counter() - self.started)
        return DriverResult(rate, *percentiles_ms(self._latencies), self._n_errors)


def percentiles_ms(latencies_s: Sequence[float]) -> tuple[float | None, float | None]:
    """Median and 99th percentile in milliseconds; None of nothing."""
    if not latencies_s:
        return None, None
    p50, p99 = np.percentile(latencies_s, [50, 99]) * 1e3
    return float(p50), float(p99)


async def _drive_with_asyncio(
    requests: Requests, connections: int, duration_s: float
) -> DriverResult:
    parts = urlsplit(requests.url)
    whole = [
        f"POST {parts.path} HTTP/1.1\r\nhost: {parts.netloc}\r\n"
        f"content-type: {requests.content_type}\r\ncontent-length: {len(body)}\r\n\r\n".encode()
        + body
        for body in requests.bodies
    ]
    run = _Run(whole, connections, duration_s)
    loop = asyncio.get_running_loop()
    for _ in range(connections):
        await loop.create_connection(
            lambda: _Connection(run), parts.hostname or "127.0.0.1", parts.port or 80
        )
    await asyncio.wait_for(run.done, duration_s + _TIMEOUT_S)
    return run.result()


def main() -> None:
    """The asyncio driver as a process of its own."""
    order = json.load(sys.stdin)
    bodies = [base64.b64decode(body) for body in order["bodies"]]
    requests = Requests(order["url"], bodies, order["content_type"])
    result = asyncio.run(_drive_with_asyncio(requests, order["connections"], order["duration_s"]))
    print(json.dumps(asdict(result)))


if __name__ == "__main__":
    main()
