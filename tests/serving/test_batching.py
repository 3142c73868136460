"""Requests to batches: who runs with whom, and that nobody harms a neighbour."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from serving.batching import Batcher, BatchItem
from serving.bundle import PolicyManifest
from serving.engines.graph import GraphPolicy
from serving.errors import (
    DeadlineExceededError,
    InferenceError,
    OverloadedError,
    PolicyNotReadyError,
    PolicyServingError,
)
from serving.interface import PolicyOutput
from serving.spaces import flatten
from tests.bundles import LinearPolicy
from tests.serving.deadline import DEADLINE_S
from tests.serving.numpy_policies import (
    ACTION_SPACES,
    MEMORY,
    OBSERVATION_SPACES,
    action_of,
    manifest_of,
    summing_policy,
    total_of,
)


class RecordingGraph:
    """The policy in NumPy; remembers its batches, can be held up and can fail."""

    name = "numpy"
    device = "cpu"

    def __init__(self, reference: LinearPolicy) -> None:
        self.reference = reference
        self.batches: list[list[float]] = []
        self.threads: set[int] = set()
        self.failure: Exception | None = None
        self.began = threading.Event()
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.duration_s = 0.0

    def run(self, names: Sequence[str], inputs: Mapping[str, Any]) -> dict[str, Any]:
        observation, noise = inputs["observation"], inputs["noise"]
        # The first number of an observation tells whose it is.
        self.batches.append(observation[:, 0].tolist())
        self.threads.add(threading.get_ident())
        self.began.set()
        assert self.may_go_on.wait(DEADLINE_S)
        if self.duration_s:
            threading.Event().wait(self.duration_s)
        if self.failure is not None:
            raise self.failure
        answers = self.reference.answers(observation, noise, inputs["action_mask"])
        return {name: answers[name] for name in names}


@pytest.fixture
def graph(discrete: LinearPolicy) -> RecordingGraph:
    return RecordingGraph(discrete)


@pytest.fixture
def manifest(graph_policies: dict[str, GraphPolicy]) -> PolicyManifest:
    return graph_policies["discrete"].manifest


def batcher_of(
    graph: Any,
    manifest: PolicyManifest,
    *,
    max_batch_size: int = 8,
    max_queue_size: int = 16,
    **kwargs: Any,
) -> Batcher:
    return Batcher(
        GraphPolicy(manifest, graph),
        max_batch_size=max_batch_size,
        max_queue_size=max_queue_size,
        **kwargs,
    )


def threaded_batcher_of(graph: RecordingGraph, manifest: PolicyManifest, **kwargs: Any) -> Batcher:
    """One that found at calibration that its policy is slow."""
    batcher = batcher_of(graph, manifest, **kwargs)
    graph.duration_s = 2e-3
    batcher.calibrate()
    assert not batcher.runs_inline
    graph.duration_s = 0.0
    graph.batches.clear()
    graph.threads.clear()
    graph.began.clear()
    return batcher


def item(first: float, n: int = 1, *, noise: Any = None, outputs: Any = frozenset()) -> BatchItem:
    observations = np.random.default_rng(int(first)).normal(size=(n, 4)).astype(np.float32)
    observations[:, 0] = first
    return item_of(observations, noise, outputs)


def item_of(observations: Any, noise: Any = None, outputs: Any = frozenset()) -> BatchItem:
    inputs = {"observation": observations}
    if noise is not None:
        inputs["noise"] = noise
    return BatchItem(inputs, len(observations), noise is not None, outputs)


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, DEADLINE_S))


async def until(is_true: Any) -> None:
    # Bounded by the deadline of `run`.
    while not is_true():
        await asyncio.sleep(0)


async def all_of(*calls: Coroutine[Any, Any, PolicyOutput]) -> list[Any]:
    return await asyncio.gather(*calls, return_exceptions=True)


def test_what_waits_together_runs_together(graph, manifest, discrete):
    batcher = batcher_of(graph, manifest)
    items = [item(k, n=1 + k % 2) for k in range(5)]
    outputs = run(all_of(*(batcher.compute(each) for each in items)))
    assert graph.batches == [[0, 1, 1, 2, 3, 3, 4]]
    for each, output in zip(items, outputs, strict=True):
        expected = discrete.inputs(each.inputs["observation"]).argmax(axis=1)
        np.testing.assert_array_equal(output.actions, expected)


def test_one_caller_alone_waits_for_nobody(graph, manifest):
    async def main() -> None:
        batcher = batcher_of(graph, manifest)
        for k in range(3):
            await batcher.compute(item(k))

    run(main())
    assert graph.batches == [[0], [1], [2]]


def test_a_batch_keeps_its_limit_and_the_order_of_arrival(graph, manifest):
    batcher = batcher_of(graph, manifest, max_batch_size=4, max_queue_size=100)
    run(all_of(*(batcher.compute(item(k, n=3 if k == 1 else 1)) for k in range(6))))
    assert graph.batches == [[0, 1, 1, 1], [2, 3, 4, 5]]


def test_a_request_larger_than_a_batch_runs_alone(graph, manifest):
    batcher = batcher_of(graph, manifest, max_batch_size=4, max_queue_size=100)
    outputs = run(all_of(*(batcher.compute(item(k, n=9 if k == 1 else 1)) for k in range(3))))
    assert [len(batch) for batch in graph.batches] == [1, 9, 1]
    assert [len(output) for output in outputs] == [1, 9, 1]


def test_a_request_larger_than_the_queue_is_served_when_nothing_waits(graph, manifest):
    batcher = batcher_of(graph, manifest, max_queue_size=2)
    assert len(run(batcher.compute(item(0, n=5)))) == 5


def test_a_full_queue_refuses_and_recovers(graph, manifest):
    async def main() -> None:
        batcher = batcher_of(graph, manifest, max_queue_size=2)
        outputs = await all_of(*(batcher.compute(item(k)) for k in range(4)))
        assert [type(output) for output in outputs] == [
            *[PolicyOutput] * 2,
            *[OverloadedError] * 2,
        ]
        assert batcher.queue_size == 0
        again = await all_of(*(batcher.compute(item(k)) for k in range(2)))
        assert all(isinstance(output, PolicyOutput) for output in again)

    run(main())
    assert graph.batches == [[0, 1], [0, 1]]


def test_the_queue_counts_observations_not_requests(graph, manifest):
    batcher = batcher_of(graph, manifest, max_queue_size=8)
    sizes = [5, 3, 1]
    outputs = run(all_of(*(batcher.compute(item(k, n=n)) for k, n in enumerate(sizes))))
    assert [isinstance(output, PolicyServingError) for output in outputs] == [False, False, True]


def test_a_cancelled_caller_is_left_out_and_its_neighbours_are_answered(graph, manifest):
    async def main() -> list[Any]:
        batcher = batcher_of(graph, manifest)
        tasks = [asyncio.ensure_future(batcher.compute(item(k))) for k in range(3)]
        asyncio.get_running_loop().call_soon(tasks[1].cancel)
        await until(lambda: batcher.queue_size > 0)
        return await asyncio.gather(*tasks, return_exceptions=True)

    outputs = run(main())
    assert isinstance(outputs[1], asyncio.CancelledError)
    assert [len(outputs[k]) for k in (0, 2)] == [1, 1]
    assert graph.batches[0] == [0, 2]


def test_a_batcher_whose_callers_are_all_gone_serves_the_next(graph, manifest):
    async def main() -> PolicyOutput:
        batcher = batcher_of(graph, manifest)
        task = asyncio.ensure_future(batcher.compute(item(0)))
        asyncio.get_running_loop().call_soon(task.cancel)
        await asyncio.gather(task, return_exceptions=True)
        return await batcher.compute(item(1))

    assert len(run(main())) == 1
    assert graph.batches == [[1]]


def test_a_deadline_that_passes_first_keeps_the_request_from_ever_running(graph, manifest):
    async def main() -> list[Any]:
        batcher = threaded_batcher_of(graph, manifest)
        graph.may_go_on.clear()
        running = asyncio.ensure_future(batcher.compute(item(0)))
        await until(graph.began.is_set)
        late = await all_of(batcher.compute(item(1), timeout_s=1e-3))
        neighbour = asyncio.ensure_future(batcher.compute(item(2), timeout_s=DEADLINE_S))
        await until(lambda: batcher.queue_size == 2)
        graph.may_go_on.set()
        outputs = [await running, *late, await neighbour]
        await batcher.close()
        return outputs

    outputs = run(main())
    assert isinstance(outputs[1], DeadlineExceededError)
    assert "timeout_ms = 1" in outputs[1].message
    assert [len(outputs[k]) for k in (0, 2)] == [1, 1]
    assert graph.batches == [[0], [2]]


def test_a_deadline_that_passes_while_running_answers_its_caller_at_once(graph, manifest):
    async def main() -> list[Any]:
        batcher = threaded_batcher_of(graph, manifest)
        graph.may_go_on.clear()
        patient = asyncio.ensure_future(batcher.compute(item(0)))
        hasty = asyncio.ensure_future(batcher.compute(item(1), timeout_s=1e-3))
        late = await all_of(hasty)
        assert not patient.done()
        graph.may_go_on.set()
        outputs = [await patient, *late]
        await batcher.close()
        return outputs

    outputs = run(main())
    assert len(outputs[0]) == 1
    assert isinstance(outputs[1], DeadlineExceededError)


def test_an_engine_s_failure_reaches_all_of_its_batch_and_the_next_batch_is_fine(graph, manifest):
    async def main() -> tuple[list[Any], PolicyOutput]:
        batcher = batcher_of(graph, manifest)
        graph.failure = ValueError("broken")
        failed = await all_of(*(batcher.compute(item(k)) for k in range(3)))
        graph.failure = None
        return failed, await batcher.compute(item(3))

    failed, fine = run(main())
    assert [type(error) for error in failed] == [InferenceError] * 3
    assert "broken" in failed[0].message
    assert len(fine) == 1


def test_an_engine_that_answers_too_little_is_an_inference_error_not_a_hang(graph, manifest):
    class Incomplete(RecordingGraph):
        def run(self, *_: Any) -> dict[str, Any]:
            return {}

    batcher = batcher_of(Incomplete(graph.reference), manifest)
    failed = run(all_of(*(batcher.compute(item(k)) for k in range(2))))
    assert [type(error) for error in failed] == [InferenceError] * 2


def test_modes_and_outputs_mixed_in_a_batch_equal_each_alone(graph, manifest):
    def noise(seed: int, n: int) -> Any:
        return np.random.default_rng(seed).gumbel(size=(n, 3)).astype(np.float32)

    items = [
        item(0, n=2),
        item(1, n=3, noise=noise(1, 3), outputs=frozenset({"action_logp"})),
        item(2, n=1, outputs=frozenset({"value", "action_logp"})),
        item(3, n=2, noise=noise(3, 2)),
        item(4, n=4, outputs=frozenset({"action_dist_inputs"})),
    ]

    async def main() -> tuple[list[Any], list[Any]]:
        batcher = batcher_of(graph, manifest, max_batch_size=64)
        together = await all_of(*(batcher.compute(each) for each in items))
        return together, [await batcher.compute(each) for each in items]

    together, alone = run(main())
    assert [len(batch) for batch in graph.batches] == [12, 2, 3, 1, 2, 4]
    for each, left, right in zip(items, together, alone, strict=True):
        for name in ("actions", "action_logp", "value", "action_dist_inputs"):
            if name != "actions" and name not in each.outputs:
                assert getattr(left, name) is None
            else:
                np.testing.assert_allclose(getattr(left, name), getattr(right, name), rtol=1e-6)
    # And the sample is the one that its own noise makes.
    expected = graph.reference.answers(items[1].inputs["observation"], items[1].inputs["noise"])
    np.testing.assert_array_equal(together[1].actions, expected["sampled_action"])
    np.testing.assert_allclose(together[1].action_logp, expected["sampled_action_logp"], rtol=1e-5)


def test_a_mixed_batch_of_box_actions_equals_each_alone(graph_policies, box):
    policy = graph_policies["box"]
    observations = box.observations(4)
    noise = np.random.default_rng(0).normal(size=(2, 2)).astype(np.float32)

    async def main() -> list[Any]:
        batcher = Batcher(policy, max_batch_size=8, max_queue_size=8)
        return await all_of(
            batcher.compute(item_of(observations[:2])),
            batcher.compute(item_of(observations[2:], noise)),
        )

    greedy, sampled = run(main())
    expected = box.answers(observations[:2], noise)["action"]
    np.testing.assert_allclose(greedy.actions, expected, rtol=1e-5, atol=1e-6)
    expected = box.answers(observations[2:], noise)["sampled_action"]
    np.testing.assert_allclose(sampled.actions, expected, rtol=1e-5, atol=1e-6)


def test_a_fast_policy_runs_on_the_event_loop(graph, manifest):
    batcher = batcher_of(graph, manifest)
    durations = batcher.calibrate()
    assert sorted(durations) == [1, 8]
    run(batcher.compute(item(0)))
    assert batcher.runs_inline
    assert graph.threads == {threading.get_ident()}


def test_a_slow_policy_runs_in_a_thread_while_the_next_batch_forms(graph, manifest):
    async def main() -> None:
        batcher = threaded_batcher_of(graph, manifest)
        graph.may_go_on.clear()
        first = asyncio.ensure_future(batcher.compute(item(0)))
        await until(graph.began.is_set)
        rest = [asyncio.ensure_future(batcher.compute(item(k))) for k in (1, 2, 3)]
        await until(lambda: batcher.queue_size == 3)
        graph.may_go_on.set()
        await asyncio.gather(first, *rest)
        await batcher.close()

    run(main())
    assert graph.batches == [[0], [1, 2, 3]]
    assert threading.get_ident() not in graph.threads


def test_a_failure_in_the_thread_reaches_its_callers_and_the_next_batch_is_fine(graph, manifest):
    async def main() -> tuple[list[Any], PolicyOutput]:
        batcher = threaded_batcher_of(graph, manifest)
        graph.failure = RuntimeError("broken")
        failed = await all_of(*(batcher.compute(item(k)) for k in range(2)))
        graph.failure = None
        fine = await batcher.compute(item(2))
        await batcher.close()
        return failed, fine

    failed, fine = run(main())
    assert [type(error) for error in failed] == [InferenceError] * 2
    assert len(fine) == 1


def test_closing_answers_what_waits_and_refuses_what_comes(graph, manifest):
    async def main() -> None:
        batcher = threaded_batcher_of(graph, manifest)
        graph.may_go_on.clear()
        running = [asyncio.ensure_future(batcher.compute(item(0)))]
        await until(graph.began.is_set)
        running.append(asyncio.ensure_future(batcher.compute(item(1))))
        await until(lambda: batcher.queue_size == 1)
        closing = asyncio.ensure_future(batcher.close())
        await asyncio.sleep(0)
        with pytest.raises(PolicyNotReadyError):
            await batcher.compute(item(2))
        graph.may_go_on.set()
        assert [len(output) for output in await asyncio.gather(*running)] == [1, 1]
        await closing

    run(main())


def test_each_batch_is_reported_with_its_size_and_duration(graph, manifest):
    reports: list[tuple[int, float, float]] = []
    batcher = batcher_of(graph, manifest, on_batch=lambda *report: reports.append(report))
    run(all_of(*(batcher.compute(item(k, n=2)) for k in range(5))))
    assert [size for size, _, _ in reports] == [8, 2]
    assert all(0 < each < DEADLINE_S for report in reports for each in report[1:])


def test_an_answer_s_owner_may_change_it_without_changing_a_neighbour_s(graph_policies):
    # Callers share one array of the batch: their rows must not overlap.
    async def main() -> list[Any]:
        batcher = Batcher(graph_policies["box"], max_batch_size=8, max_queue_size=8)
        rows = np.ones((1, 3), dtype=np.float32)
        return await all_of(*(batcher.compute(item_of(rows)) for _ in range(2)))

    left, right = run(main())
    before = right.actions.copy()
    left.actions[:] = 99
    np.testing.assert_array_equal(right.actions, before)


VECTOR = gym.spaces.Box(-1, 1, (2,), np.float32)
ROWS = np.array([[0.25, 0.5], [1.0, -0.25], [2.0, 0.75]], np.float32)


def together(policy: GraphPolicy, *items: BatchItem) -> list[PolicyOutput]:
    """The outputs of items that share one batch."""

    async def main() -> list[PolicyOutput]:
        batcher = Batcher(policy, max_batch_size=64, max_queue_size=64)
        return await asyncio.gather(*(batcher.compute(each) for each in items))

    outputs = run(main())
    assert len(policy.graph.seen) == 1
    return outputs


def test_state_comes_back_to_its_owner_and_whoever_gave_none_starts_an_episode():
    policy = summing_policy(VECTOR, ACTION_SPACES["discrete"], state=MEMORY)
    frames = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
    state = {"state/total": np.array([7], np.float32), "state/frames": frames}
    starts, goes_on = together(
        policy,
        BatchItem({"observation": ROWS[:2]}, 2),
        BatchItem({"observation": ROWS[2:], **state}, 1),
    )
    totals = [total_of(row) for row in ROWS]
    assert starts.state["total"].tolist() == [0.5 + totals[0], 0.5 + totals[1]]
    assert goes_on.state["total"].tolist() == [7 + totals[2]]
    # The frames have moved up by one; at the start they are all -1.
    assert starts.state["frames"][:, 0].tolist() == [[-1] * 3] * 2
    assert goes_on.state["frames"].tolist() == [[[3, 4, 5], [totals[2]] * 3]]


@pytest.mark.parametrize(
    ("name", "given", "default"),
    [
        ("reward", np.array([2.5], np.float32), 0.0),
        ("action_mask", np.array([[False, False, True]]), True),
        ("state/total", np.array([3.0], np.float32), 0.5),
    ],
)
def test_what_a_neighbour_gave_is_for_others_as_if_nobody_had(name, given, default):
    policy = summing_policy(
        VECTOR, ACTION_SPACES["discrete"], state=MEMORY, has_reward=True, has_mask=True
    )
    plain = BatchItem({"observation": ROWS[:2]}, 2)
    alone = together(policy, plain)[0]
    policy.graph.seen.clear()
    beside, _ = together(policy, plain, BatchItem({"observation": ROWS[2:], name: given}, 1))
    np.testing.assert_array_equal(beside.actions, alone.actions)
    np.testing.assert_array_equal(beside.state["total"], alone.state["total"])
    (seen,) = policy.graph.seen
    assert (seen[name][:2] == default).all()
    np.testing.assert_array_equal(seen[name][2:], given)


@pytest.mark.parametrize("space", ["dict", "tuple"])
def test_nested_observations_and_actions_are_cut_at_the_right_rows(space: str):
    policy = summing_policy(OBSERVATION_SPACES[space], ACTION_SPACES[space])
    names = [spec for spec in policy.manifest.inputs if spec.role == "observation"]
    rng = np.random.default_rng(0)
    sizes = [1, 3, 2]
    parts = [
        {spec.name: rng.integers(0, 2, (n, *spec.shape)).astype(spec.dtype) for spec in names}
        for n in sizes
    ]
    noise = np.zeros((3, policy.manifest.noise.size), np.float32)
    outputs = together(
        policy,
        BatchItem(parts[0], 1),
        BatchItem({**parts[1], "noise": noise}, 3, is_sampled=True),
        BatchItem(parts[2], 2),
    )
    for part, output, n, shift in zip(parts, outputs, sizes, (0, 1, 0), strict=True):
        assert len(output) == n
        for index in range(n):
            total = total_of(tuple(array[index] for array in part.values())) + shift
            expected = action_of(ACTION_SPACES[space], total)
            np.testing.assert_equal(output[index], expected)


def test_every_kind_of_input_is_timed_at_load():
    policy = summing_policy(
        OBSERVATION_SPACES["dict"],
        ACTION_SPACES["discrete"],
        state=MEMORY,
        has_reward=True,
        has_mask=True,
    )
    assert sorted(Batcher(policy, max_batch_size=4, max_queue_size=4).calibrate()) == [1, 4]


def lowest(space: gym.Space[Any]) -> Any:
    """The lowest element of a space, by Gymnasium's own account; 0 for floats."""
    if isinstance(space, gym.spaces.Dict):
        return {key: lowest(child) for key, child in space.items()}
    if isinstance(space, gym.spaces.Tuple):
        return tuple(map(lowest, space))
    if isinstance(space, gym.spaces.Discrete | gym.spaces.MultiDiscrete):
        return space.start
    if isinstance(space, gym.spaces.Box) and space.dtype.kind != "f":
        return space.low
    return np.zeros(space.shape, space.dtype)


@pytest.mark.parametrize(
    "space",
    [
        *OBSERVATION_SPACES.values(),
        gym.spaces.Discrete(3, start=10),
        gym.spaces.Box(np.array([3, -7]), np.array([9, -5]), dtype=np.int64),
        gym.spaces.Box(-(2**63), 2**63 - 1, (1,), np.int64),
        gym.spaces.Box(2, 9, (2,), np.uint8),
        gym.spaces.Box(-np.inf, np.inf, (2,), np.float16),
    ],
    ids=str,
)
def test_timing_feeds_elements_of_the_space(space: gym.Space[Any]):
    policy = summing_policy(space, ACTION_SPACES["box"])
    Batcher(policy, max_batch_size=4, max_queue_size=4).calibrate()
    element = lowest(space)
    expected = flatten(policy.manifest.observation_space, "observation", element)
    assert {len(seen[name]) for seen in policy.graph.seen for name in expected} == {1, 4}
    for seen in policy.graph.seen:
        for name, values in expected.items():
            for row in seen[name]:
                np.testing.assert_array_equal(row, values)


def test_a_table_without_a_row_for_zero_can_be_timed():
    class Table:
        """One row for each element of Discrete(3, start=10), as a Gather in a graph."""

        name = "numpy"
        device = "cpu"

        def run(self, names: Sequence[str], inputs: Mapping[str, Any]) -> dict[str, Any]:
            rows = inputs["observation"] - 10
            if rows.min() < 0:
                raise IndexError("Gather: out of bounds")
            return {name: np.array([2, 0, 1])[rows] for name in names}

    manifest = manifest_of(gym.spaces.Discrete(3, start=10), gym.spaces.Discrete(3))
    batcher = Batcher(GraphPolicy(manifest, Table()), max_batch_size=4, max_queue_size=4)
    assert sorted(batcher.calibrate()) == [1, 4]
