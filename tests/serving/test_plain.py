"""What one turn of the loop has read is one batch, and every caller gets its own answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from serving.batching import Batcher
from serving.engines.graph import GraphPolicy
from serving.errors import OverloadedError, PolicyNotReadyError
from serving.interface import PolicyOutput
from serving.plain import PlainLane, is_finite
from serving.service import PolicyService, PolicyServices
from tests.serving.numpy_policies import (
    ACTION_SPACES,
    OBSERVATION_SPACES,
    Summing,
    manifest_of,
    services_of,
)

SPACES = OBSERVATION_SPACES["vector"], ACTION_SPACES["box"]


class FakeCaller:
    """Keeps what it was answered."""

    def __init__(self, body: bytes = b"") -> None:
        self.body = body
        self.is_gone = False
        self.answers: list[Any] = []

    def succeed(self, body: bytes) -> None:
        self.answers.append(body)


class FakeCodec:
    """An observation is a number, three times; an answer is the action's first number."""

    def __init__(self) -> None:
        self.failing: str | None = None

    def plain(self, body: bytes) -> float:
        return float(body)

    def collect(self, rows: Sequence[float]) -> dict[str, Any] | None:
        if self.failing == "collect":
            raise ZeroDivisionError("collect")
        if any(row != row for row in rows):
            return None
        return {"observation": np.repeat(np.array(rows, np.float32)[:, None], 3, axis=1)}

    def encode_each(self, output: PolicyOutput) -> list[bytes]:
        if self.failing == "encode_each":
            raise ZeroDivisionError("encode_each")
        actions: Any = output.actions
        return [b"%g" % row[0] for row in actions]


class Lane:
    """A lane with everything around it, and what it did."""

    def __init__(self, graph: Summing, manifest: Any, **settings: Any) -> None:
        sizes = {"max_batch_size": 4, "max_queue_size": 6, **settings}
        self.batches: list[int] = []
        self.batcher = Batcher(
            GraphPolicy(manifest, graph),
            on_batch=lambda size, *_: self.batches.append(size),
            **sizes,
        )
        self.codec = FakeCodec()
        self.counted: list[FakeCaller] = []
        self.otherwise: Callable[[FakeCaller], object] = lambda caller: caller.succeed(b"otherwise")
        self.lane = PlainLane(
            self.codec,
            self.batcher,
            is_sound=lambda output: is_finite(output.actions),
            answered=self.counted.extend,
            refuse=lambda caller, error: caller.answers.append(error),
            otherwise=lambda caller: self.otherwise(caller),
        )

    def add(self, *numbers: float) -> list[FakeCaller]:
        callers = [FakeCaller(b"%g" % number) for number in numbers]
        for number, caller in zip(numbers, callers, strict=True):
            self.lane.add(number, caller)
        return callers


@pytest.fixture
def graph() -> Summing:
    return Summing(SPACES[1], manifest_of(*SPACES))


def lane_of(graph: Summing, **settings: Any) -> Lane:
    return Lane(graph, manifest_of(*SPACES), **settings)


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(test())  # type: ignore[arg-type]


async def turn() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


def answers(callers: Sequence[FakeCaller]) -> list[Any]:
    """One answer each; `n` three times sums up to 6 n."""
    assert all(len(caller.answers) == 1 for caller in callers)
    return [caller.answers[0] for caller in callers]


def test_one_turn_is_one_batch_and_each_caller_gets_its_own_row(graph: Summing):
    lane = lane_of(graph)

    async def test() -> None:
        callers = lane.add(1, 2, 3)
        assert not graph.seen, "it waits for who else is read in this turn"
        await turn()
        assert answers(callers) == [b"6", b"12", b"18"]
        assert lane.batches == [3]
        assert lane.counted == callers
        assert answers(await later(lane, 4)) == [b"24"]

    run(test)


async def later(lane: Lane, *numbers: float) -> list[FakeCaller]:
    callers = lane.add(*numbers)
    await turn()
    return callers


def test_a_turn_of_many_is_cut_into_batches_in_order(graph: Summing):
    lane = lane_of(graph, max_queue_size=100)

    async def test() -> None:
        callers = await later(lane, *range(10))
        assert answers(callers) == [b"%d" % (6 * number) for number in range(10)]
        assert lane.batches == [4, 4, 2]

    run(test)


def test_who_finds_no_room_is_refused_and_nobody_else(graph: Summing):
    lane = lane_of(graph, max_queue_size=6)

    async def test() -> None:
        callers = await later(lane, *range(9))
        assert answers(callers)[:6] == [b"%d" % (6 * number) for number in range(6)]
        refused = answers(callers)[6:]
        assert all(isinstance(error, OverloadedError) for error in refused)
        assert "the limit is 6" in refused[0].message
        assert lane.counted == callers[:6]
        assert answers(await later(lane, 1)) == [b"6"]  # there is room again

    run(test)


def test_a_closed_lane_refuses(graph: Summing):
    lane = lane_of(graph)

    async def test() -> None:
        callers = lane.add(1)
        await lane.batcher.close()
        callers += await later(lane, 2)
        assert all(isinstance(error, PolicyNotReadyError) for error in answers(callers))
        assert not graph.seen

    run(test)


def test_who_is_gone_is_left_out(graph: Summing):
    lane = lane_of(graph, max_queue_size=3)

    async def test() -> None:
        callers = lane.add(1, 2, 3, 4, 5)
        callers[1].is_gone = callers[2].is_gone = True
        await turn()
        assert [len(caller.answers) for caller in callers] == [1, 0, 0, 1, 1]
        assert answers([callers[0], *callers[3:]]) == [b"6", b"24", b"30"]
        assert lane.batches == [3]  # nor do they take anybody's room

    run(test)


def test_all_gone_is_no_batch(graph: Summing):
    lane = lane_of(graph)

    async def test() -> None:
        for caller in lane.add(1, 2):
            caller.is_gone = True
        await turn()
        assert not graph.seen
        assert lane.batcher.queue_size == 0
        assert answers(await later(lane, 3)) == [b"18"]

    run(test)


def test_where_a_row_does_not_conform_each_goes_its_own_way(graph: Summing):
    lane = lane_of(graph)

    async def test() -> None:
        callers = lane.add(1, float("nan"), 3, 4, 5)
        callers[2].is_gone = True  # seen when the batch is made
        await turn()
        assert answers([*callers[:2], callers[3]]) == [b"otherwise"] * 3
        assert callers[2].answers == []

    run(test)


def test_a_way_that_fails_for_one_caller_fails_for_it_alone(
    graph: Summing, caplog: pytest.LogCaptureFixture
):
    lane = lane_of(graph, max_queue_size=100)

    def otherwise(caller: FakeCaller) -> None:
        if caller.body == b"2":
            raise ZeroDivisionError("otherwise")
        caller.succeed(b"otherwise")

    lane.otherwise = otherwise

    async def test() -> None:
        callers = await later(lane, float("nan"), 2, 3, 4, 5, 6)
        found = answers(callers)
        assert found[0] == found[2] == found[3] == b"otherwise"
        assert (found[1].http_status, found[1].code) == (500, "inference_failed")
        assert found[4:] == [b"30", b"36"]  # the next batch of the same turn
        assert "ZeroDivisionError" in caplog.text

    run(test)


@pytest.mark.parametrize("place", ["collect", "encode_each"])
def test_where_the_codec_fails_everybody_is_told(
    graph: Summing, caplog: pytest.LogCaptureFixture, place: str
):
    lane = lane_of(graph)
    lane.codec.failing = place

    async def test() -> None:
        callers = await later(lane, 1, 2, 3, 4, 5)
        assert {error.http_status for error in answers(callers)} == {500}
        assert not lane.counted
        assert "ZeroDivisionError" in caplog.text
        lane.codec.failing = None
        assert answers(await later(lane, 3)) == [b"18"]

    run(test)


class Failing(Summing):
    """Fails, or answers NaN, for rows that begin with -1."""

    is_broken = False

    def run(self, names: Sequence[str], inputs: Mapping[str, Any]) -> dict[str, Any]:
        found = super().run(names, inputs)
        if self.is_broken:
            raise ZeroDivisionError("a secret of the inside")
        found["action"][inputs["observation"][:, 0] == -1] = np.nan
        return found


def test_where_the_engine_fails_everybody_is_told():
    graph = Failing(SPACES[1], manifest_of(*SPACES))
    lane = lane_of(graph)

    async def test() -> None:
        graph.is_broken = True
        callers = await later(lane, 1, 2, 3)
        assert {error.code for error in answers(callers)} == {"inference_failed"}
        graph.is_broken = False
        assert answers(await later(lane, 3)) == [b"18"]

    run(test)


# --- the lane of a real service ---


class ServiceCaller(FakeCaller):
    """A caller as the hot protocol's: it is answered with an action or with an `Answer`."""

    arrived = 0.0

    def reply(self, answer: Any) -> None:
        self.answers.append(answer)

    def age_s(self) -> float:
        return 0.0


def service_with(graph: Summing) -> tuple[PolicyServices, PolicyService]:
    services = services_of({"p": GraphPolicy(manifest_of(*SPACES), graph)})
    return services, services.require("p")


def test_a_row_that_the_network_answers_with_nan_fails_alone():
    services, service = service_with(Failing(SPACES[1], manifest_of(*SPACES)))
    lane = service.dialects[None].lane
    firsts = [0.5, -1.0, 0.25]

    async def test() -> None:
        callers = [ServiceCaller(b'{"observation":[%g,0,0]}' % first) for first in firsts]
        for caller in callers:
            lane.add(lane.plain(caller.body), caller)
        await turn()
        found = answers(callers)
        assert [answer.status for answer in found] == [200, 500, 200]
        assert b'"action":[0.5,1.5]' in found[0].body
        assert b"inference_failed" in found[1].body
        assert b'"action":[0.25,1.25]' in found[2].body

    run(test)
    text = services.metrics.exposition().decode()
    assert 'policyserve_requests_total{code="ok",policy="p"} 2.0' in text
    assert 'policyserve_requests_total{code="inference_failed",policy="p"} 1.0' in text


@pytest.mark.parametrize(
    ("nested", "expected"),
    [
        (np.array([1.0, np.inf]), False),
        (np.array([1, 2]), True),
        ((np.array([1.0]), {"a": np.array([np.nan])}), False),
        ({"a": (np.array([1.0]), np.array([True]))}, True),
        (None, True),
    ],
)
def test_every_number_of_a_nested_answer_has_to_be_finite(nested: Any, expected: bool):
    assert is_finite(nested) is expected
