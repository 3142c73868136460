"""A closed-loop HTTP driver: C kept-alive connections, each asking again when it has its answer.

wrk where it is installed, as it is the lightest; else the asyncio driver below, which costs more
of the machine and so understates a fast server. Both check the status of every answer.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from urllib.parse import urlsplit

import numpy as np

from loadtests.errors import LoadTestError


@dataclass(frozen=True)
class DriverResult:
    """What one run measured.

    Attributes:
        requests_per_s: Answers with status 200 per second.
        p50_ms: Median latency.
        p99_ms: 99th percentile.
        n_errors: Other answers, and broken connections.
    """

    requests_per_s: float
    p50_ms: float
    p99_ms: float
    n_errors: int


def driver_name() -> str:
    """Which driver `drive` uses here."""
    return "wrk" if shutil.which("wrk") else "asyncio"


def drive(url: str, body: bytes, *, connections: int, duration_s: float) -> DriverResult:
    """Load a URL with POST requests of one JSON body.

    Raises:
        LoadTestError: The driver itself failed.
    """
    if driver_name() == "wrk":
        return _drive_with_wrk(url, body, connections, duration_s)
    arguments = [url, body.decode(), str(connections), str(duration_s)]
    done = subprocess.run(
        [sys.executable, "-m", "loadtests.driver", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise LoadTestError(f"the driver failed: {done.stderr.strip().splitlines()[-1:]}")
    return DriverResult(**json.loads(done.stdout))


_UNITS_MS = {"us": 1e-3, "ms": 1.0, "s": 1e3, "m": 60e3}


def _drive_with_wrk(url: str, body: bytes, connections: int, duration_s: float) -> DriverResult:
    script = (
        'wrk.method = "POST"\n'
        'wrk.headers["content-type"] = "application/json"\n'
        f"wrk.body = [==[{body.decode()}]==]\n"
    )
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as file:
        file.write(script)
        file.flush()
        command = ["wrk", "-t1", f"-c{connections}", f"-d{round(duration_s)}s", "--latency"]
        done = subprocess.run(
            [*command, "--timeout", "10s", "-s", file.name, url],
            capture_output=True,
            text=True,
            check=False,
        )
    text = done.stdout
    rate = re.search(r"Requests/sec:\s+([\d.]+)", text)
    if done.returncode != 0 or rate is None:
        raise LoadTestError(f"wrk failed: {done.stderr or text}")
    return DriverResult(
        requests_per_s=float(rate[1]),
        p50_ms=_wrk_percentile(text, "50"),
        p99_ms=_wrk_percentile(text, "99"),
        n_errors=_wrk_errors(text),
    )


def _wrk_percentile(text: str, percent: str) -> float:
    match = re.search(rf"^\s+{percent}%\s+([\d.]+)(us|ms|s|m)\s*$", text, flags=re.MULTILINE)
    return float(match[1]) * _UNITS_MS[match[2]] if match else float("nan")


def _wrk_errors(text: str) -> int:
    counts = re.findall(r"Non-2xx or 3xx responses: (\d+)", text)
    for line in re.findall(r"Socket errors: (.*)", text):
        counts += re.findall(r"\d+", line)
    return sum(map(int, counts))


class _Connection(asyncio.Protocol):
    def __init__(self, request: bytes, run: _Run) -> None:
        self._request = request
        self._run = run
        self._buffer = b""
        self._sent = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._send()

    def _send(self) -> None:
        self._sent = time.perf_counter()
        self._transport.write(self._request)

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
    def __init__(self, connections: int, duration_s: float) -> None:
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
        latencies = np.array(self._latencies or [np.nan])
        p50, p99 = np.percentile(latencies, [50, 99]) * 1e3
        rate = len(self._latencies) / (time.perf_counter() - self.started)
        return DriverResult(rate, float(p50), float(p99), self._n_errors)


async def _drive_with_asyncio(
    url: str, body: bytes, connections: int, duration_s: float
) -> DriverResult:
    parts = urlsplit(url)
    head = (
        f"POST {parts.path} HTTP/1.1\r\nhost: {parts.netloc}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    run = _Run(connections, duration_s)
    loop = asyncio.get_running_loop()
    for _ in range(connections):
        await loop.create_connection(
            lambda: _Connection(head.encode() + body, run),
            parts.hostname or "127.0.0.1",
            parts.port or 80,
        )
    await asyncio.wait_for(run.done, duration_s + 15.0)
    return run.result()


def main() -> None:
    """The asyncio driver as a process of its own: URL BODY CONNECTIONS DURATION_S."""
    url, body, connections, duration_s = sys.argv[1:]
    result = asyncio.run(
        _drive_with_asyncio(url, body.encode(), int(connections), float(duration_s))
    )
    print(json.dumps(asdict(result)))


if __name__ == "__main__":
    main()
