"""`make bench`: its drivers against servers that others wrote, its figures against ones by hand."""

from __future__ import annotations

import contextlib
import http.server
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import msgpack
import numpy as np
import psutil
import pytest
from websockets.sync.server import ServerConnection, serve

from loadtests.bench import choose
from loadtests.benchmark import environments, processes
from loadtests.benchmark.bodies import (
    Answers,
    json_action,
    json_body,
    msgpack_actions,
    msgpack_body,
)
from loadtests.benchmark.goals import Goal, judge
from loadtests.benchmark.http_driver import Requests, drive_http, parse_wrk
from loadtests.benchmark.policy import ServedPolicy
from loadtests.benchmark.report import render
from loadtests.benchmark.results import DriverResult, Measurement, Results, Turn, read_results
from loadtests.benchmark.stream_driver import Messages, drive_stream
from loadtests.benchmark.targets import OURS, OURS_HAPROXY, TARGETS, Load, Target
from loadtests.benchmark.turns import Workshop, take_turn
from loadtests.errors import LoadTestError, LoadTestUsageError
from tests.processes import wait_until

MACHINE = {
    "cpu": "Abacus",
    "cores": "2",
    "system": "Linux 6",
    "python": "3.11.7",
    "driver": "wrk",
    "commit": "abc1234",
    "ray": "2.60.0",
    "onnxruntime": "1.31.1",
    "uvicorn": "0.54.0",
    "numpy": "2.4.6",
}
WRK = """Running 2s test @ http://127.0.0.1:8123/compute_action
  1 threads and 16 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency     1.35ms    2.06ms  29.26ms   95.55%
    Req/Sec    16.05k     4.41k   22.45k    65.00%
  Latency Distribution
     50%  844.00us
     75%    1.30ms
     90%    2.15ms
     99%    1.20s
  40000 requests in 2.00s, 7.48MB read
  Socket errors: connect 0, read 1, write 0, timeout 2
  Non-2xx or 3xx responses: 10000
Requests/sec:  20000.00
Transfer/sec:      3.74MB
"""


def results(**rates: float) -> Results:
    """Results of JSON at c=16, 64 and 256, with p50 and p99 of 1000 s / rate."""
    found = Results(MACHINE, {"rounds": 1, "duration_s": 5.0})
    for key, rate in rates.items():
        result = DriverResult(rate, 1e6 / rate, 1e6 / rate, 0)
        loads = {f"json c={c}": Measurement(result) for c in (1, 16, 64, 256)}
        found.turns[key.replace("_", "-")] = [Turn(loads)]
    return found


def goal(found: Results, name: str) -> Goal:
    return next(each for each in judge(found) if each.name.startswith(name))


# --- reading and writing ---


def test_wrks_answers_are_those_with_a_good_status() -> None:
    result = parse_wrk(WRK)
    assert result.requests_per_s == pytest.approx(20000 * 30000 / 40000)
    assert result.p50_ms == pytest.approx(0.844)
    assert result.p99_ms == pytest.approx(1200)
    assert result.n_errors == 10000 + 3
    with pytest.raises(LoadTestError, match="unable to connect"):
        parse_wrk("unable to connect to 127.0.0.1:1 Connection refused")


@pytest.mark.parametrize(
    ("style", "answer"),
    [
        ("plain", b'{"action":1,"policy":"cartpole"}'),
        ("rows", b"[1]"),
        ("open_inference", b'{"outputs":[{"name":"action","data":[[1]]}]}'),
    ],
)
def test_the_action_is_found_in_every_style_and_missed_where_there_is_none(style, answer) -> None:
    assert json_action(answer, style) == 1
    with pytest.raises(ValueError, match="no action"):
        json_action(b'{"error":"busy"}', style)
    assert b"0.25" in json_body([0.25, 1.0, 2.0, 3.0], style)


def test_binary_bodies_are_msgpack_as_another_library_reads_it() -> None:
    rows = np.arange(8, dtype=np.float32).reshape(2, 4)
    assert msgpack.unpackb(msgpack_body(rows[:1].tolist())) == {"observation": rows[0].tobytes()}
    assert msgpack.unpackb(msgpack_body(rows.tolist())) == {"observations": rows.tobytes()}
    for dtype in ("<i8", "<i4"):
        packed = msgpack.packb({"actions": np.array([3, -1], dtype=dtype).tobytes()})
        assert msgpack_actions(packed, 2) == [3, -1]
    with pytest.raises(ValueError, match="no 1 actions"):
        msgpack_actions(msgpack.packb({"error": {}}), 1)


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    found = results(policyserve=100.0)
    found.turns["triton"] = [Turn(problem="no Python", was_quiet=False)]
    found.steps.append({"step": {"1": 6.5}})
    found.write(tmp_path / "results.json")
    assert read_results(tmp_path / "results.json") == found


# --- drivers ---


class _Half(http.server.BaseHTTPRequestHandler):
    """Refuses every body but one."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200 if body == b"good" else 422)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        """Nothing."""


@contextlib.contextmanager
def http_server() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Half)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_the_built_in_driver_counts_good_answers_apart_from_others() -> None:
    with http_server() as url:
        good = drive_http(Requests(url, [b"good"]), connections=2, duration_s=0.3, driver="asyncio")
        bad = drive_http(Requests(url, [b"bad"]), connections=2, duration_s=0.3, driver="asyncio")
    assert good.requests_per_s > 0
    assert good.n_errors == 0
    assert good.p50_ms is not None
    assert good.p99_ms is not None
    assert good.p50_ms <= good.p99_ms
    assert bad.requests_per_s == 0
    assert bad.p50_ms is None
    assert bad.n_errors > 0


@contextlib.contextmanager
def websocket_server(answer) -> Iterator[str]:
    """A stream of the `websockets` library: a greeting, then what `answer` says to a message."""

    def handle(connection: ServerConnection) -> None:
        connection.send(msgpack.packb({"policy": "tiny"}))
        for index, message in enumerate(connection):
            connection.send(answer(msgpack.unpackb(message), index))

    with serve(handle, "127.0.0.1", 0, compression=None) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.socket.getsockname()[1]}/stream"
        finally:
            server.shutdown()
            thread.join()


def signs(request: dict[str, bytes], _: int) -> bytes:
    """1 for every row whose first number is positive."""
    rows = np.frombuffer(request.get("observation") or request["observations"], "<f4")
    actions = (rows.reshape(-1, 4)[:, 0] > 0).astype("<i8").tobytes()
    return msgpack.packb({"action" if "observation" in request else "actions": actions})


@pytest.mark.parametrize(("connections", "depth", "batch"), [(1, 1, 1), (3, 4, 40)])
def test_the_stream_driver_is_understood_by_another_websocket_library(
    connections: int, depth: int, batch: int
) -> None:
    rows = [[(-1.0) ** index, 0.0, 0.0, 0.0] for index in range(batch)]
    expected = [1 - index % 2 for index in range(batch)]
    with websocket_server(signs) as url:
        messages = Messages(url, [msgpack_body(rows)], [expected], has_greeting=True)
        result = drive_stream(messages, connections=connections, depth=depth, duration_s=0.2)
        assert result.requests_per_s > 0
        assert result.p50_ms is not None
        wrong = Messages(url, [msgpack_body(rows)], [[0] * batch], has_greeting=True)
        with pytest.raises(LoadTestError, match="not ONNX Runtime's"):
            drive_stream(wrong, connections=1, depth=1, duration_s=0.2)


def test_the_stream_driver_stops_at_an_answer_that_differs() -> None:
    with websocket_server(lambda request, index: signs(request, 0) + b"!" * (index > 5)) as url:
        messages = Messages(url, [msgpack_body([[1.0] * 4])], [[1]], has_greeting=True)
        with pytest.raises(LoadTestError, match="an answer differs"):
            drive_stream(messages, connections=1, depth=1, duration_s=5.0)


# --- judgement ---


def test_a_goal_is_met_or_missed_against_the_best_peer_of_that_load() -> None:
    found = results(policyserve=800.0, mosec=200.0, litserve=100.0, prototype=1000.0)
    met = goal(found, "JSON, c=16")
    assert met.is_met
    assert met.found == "4.0 x (800 against 200, mosec, batches of 64)"
    assert not goal(results(policyserve=799.0, mosec=200.0), "JSON, c=16").is_met
    # A bare program is no peer.
    assert goal(found, "JSON, c=1:").is_met
    overhead = goal(found, "JSON, c=64: what checks")
    assert (overhead.is_met, overhead.found) == (True, "80% (800 of 1,000 requests/s)")
    assert not goal(results(policyserve=66.0, prototype=100.0), "JSON, c=64: what checks").is_met


def test_what_was_not_measured_is_neither_met_nor_missed() -> None:
    assert {each.is_met for each in judge(results())} == {None}
    assert goal(results(policyserve=9.0), "JSON, c=16").is_met is None


def test_a_faster_server_with_a_longer_tail_misses_the_tails_goal() -> None:
    found = results(mosec=100.0)
    slow_tail = DriverResult(500.0, 1.0, 10_001.0, 0)
    found.turns[OURS] = [Turn({"json c=256": Measurement(slow_tail)})]
    assert goal(found, "JSON, c=256: requests/s, direct").is_met
    assert goal(found, "JSON, c=256: p99, direct").is_met is False


# --- the page ---


def test_every_server_has_its_row_and_a_failed_one_its_reason() -> None:
    found = results(policyserve=100.0)
    found.turns["triton"] = [Turn(problem="triton embeds Python")]
    page = render(found)
    for target in TARGETS:
        assert f"| {target.title} |" in page.replace("**", "")
        assert f"* {target.title}" in page
    assert "* Triton (PyTriton): not measured: triton embeds Python" in page
    assert "* LitServe: not measured: not asked for" in page


def test_errors_the_spread_and_a_driver_that_was_the_limit_are_marked() -> None:
    def turn(rate: float, n_errors: int, driver: float) -> Turn:
        result = DriverResult(rate, 1.0, 2.0, n_errors)
        return Turn({"json c=16": Measurement(result, driver_cores=driver, server_cores=0.5)})

    found = Results(MACHINE, {"rounds": 3, "duration_s": 5.0})
    found.turns[OURS] = [turn(3000.0, 0, 0.2), turn(1000.0, 7, 0.99), turn(2000.0, 0, 0.2)]
    found.turns[OURS_HAPROXY] = [turn(5.0, 0, 0.2)]
    page = render(found)
    assert "2,000† (1,000-3,000), 7 errors" in page
    assert "| 5 |" in page


def test_only_known_servers_are_measured_in_the_order_of_the_table() -> None:
    assert choose("mosec, policyserve") == ["policyserve", "mosec"]
    assert len(choose("")) == len(TARGETS) + 1
    with pytest.raises(LoadTestUsageError, match=r"no server 'help'.*policyserve-haproxy"):
        choose("help")


# --- peers ---


def test_every_peer_has_its_file_and_exact_requirements() -> None:
    for target in TARGETS:
        assert len({each.key for each in TARGETS}) == len(TARGETS)
        for part in target.command:
            if part.startswith("{peers}"):
                assert Path(part.replace("{peers}", "loadtests/peers")).is_file()
        if target.environment is not None and target.package is not None:
            assert environments.pinned_version(target.environment, target.package)
            file = environments.REQUIREMENTS / f"{target.environment}.txt"
            assert all("==" in line for line in file.read_text().splitlines())


@pytest.mark.slow
def test_an_environment_is_made_once_and_again_when_its_requirements_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environments, "REQUIREMENTS", tmp_path)
    requirements = tmp_path / "tiny.txt"
    requirements.write_text("")
    python = environments.prepare_environment("tiny", tmp_path / "made")
    assert python.exists()
    trace = python.with_name("trace")
    trace.touch()
    environments.prepare_environment("tiny", tmp_path / "made")
    assert trace.exists()
    requirements.write_text("./no-such-package\n")
    with pytest.raises(LoadTestError, match="tiny could not be installed: ERROR"):
        environments.prepare_environment("tiny", tmp_path / "made")
    assert not trace.exists()


_ORPHAN = """
import os, signal, subprocess, sys
code = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); signal.pause()"
child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
print(child.pid, flush=True)
signal.pause()
"""


@pytest.mark.slow
def test_what_a_server_left_in_the_background_is_ended_with_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with processes.running([sys.executable, "-c", _ORPHAN], tmp_path, log) as server:
        wait_until(lambda: log.read_text().endswith("\n"), "it has told its child's number")
        orphan = psutil.Process(int(log.read_text()))
        assert orphan.pid in {member.pid for member in server.members()}
        assert not {"PYTHONPATH", "RAY_ADDRESS"} & set(orphan.environ())
        assert orphan.environ()["HOME"] == str(tmp_path)
    assert not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE


def check_until_it_ends(server: processes.ServerProcess) -> None:
    def goes_on() -> bool:
        server.check()
        return False

    wait_until(goes_on, "the server ends")


def test_a_server_that_ends_by_itself_says_why(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('no model')"]
    log = tmp_path / "log"
    with (
        pytest.raises(LoadTestError, match="exit 1: no model"),
        processes.running(command, tmp_path, log) as server,
    ):
        check_until_it_ends(server)


@pytest.mark.slow
@pytest.mark.parametrize("actions", [(0, 0), (0, 1)])
def test_a_server_whose_actions_are_wrong_is_not_measured(
    tmp_path: Path, actions: tuple[int, ...]
) -> None:
    # A server that answers action 0 to everybody.
    command = ("{python}", "-m", "loadtests.ladder.bare_asyncio", "none", "{port}", "constant")
    target = Target("zero", "Zero", "bare", "", command, loads=(Load("json", 1),))
    answers = Answers(((0.0,) * 4, (1.0,) * 4), actions)
    policy = ServedPolicy(tmp_path, tmp_path, tmp_path, answers)
    lines: list[str] = []
    turn = take_turn(target, Workshop(policy, tmp_path, 1.0, 0.0), lines.append)
    if any(actions):
        assert turn.problem is not None
        assert "is not ONNX Runtime's own, 1" in turn.problem
        assert turn.loads == {}
    else:
        assert turn.problem is None
        result = turn.loads["json c=1"].result
        assert result is not None
        assert result.requests_per_s > 0
        assert turn.memory_mib is not None
        assert turn.start_s is not None
