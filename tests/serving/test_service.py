"""A policy with its codec and batcher: callers that meet in one batch, and every refusal's form."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from serving.config import PolicySource, ServingConfig
from serving.engines.graph import GraphPolicy
from serving.errors import (
    BundleError,
    InvalidObservationError,
    OverloadedError,
    PolicyNotReadyError,
    UnknownPolicyError,
)
from serving.service import PolicyServices, load_services, problem_answer, unexpected_answer
from tests.serving.numpy_policies import (
    ACTION_SPACES,
    MEMORY,
    OBSERVATION_SPACES,
    Summing,
    action_of,
    as_json,
    manifest_of,
    sample,
    services_of,
    summing_policy,
    total_of,
)


@pytest.fixture
def services(bundles: dict[str, Path]) -> Iterator[PolicyServices]:
    sources = [PolicySource(name=name, path=path, version=3) for name, path in bundles.items()]
    found = load_services(sources, ServingConfig(max_queue_size=4, retry_after_s=7), "cpu")
    yield found
    asyncio.run(found.close())


def answers(services: PolicyServices, name: str, *bodies: Any) -> list[tuple[int, Any]]:
    """The answers to bodies that arrive in the same turn of the event loop: one batch."""

    async def main() -> list[Any]:
        service = services.require(name)
        calls = [service.answer(json.dumps(as_json(body)).encode()) for body in bodies]
        return await asyncio.wait_for(asyncio.gather(*calls), 10)

    return [(answer.status, json.loads(answer.body)) for answer in asyncio.run(main())]


ZEROS = [0.0] * 4


def test_a_caller_who_asks_for_what_a_policy_has_not_does_not_fail_its_neighbours(services):
    good = {"observation": ZEROS}
    bad = {"observation": ZEROS, "outputs": ["value"]}
    first, second, third = answers(services, "no-critic", good, bad, good)
    assert (second[0], second[1]["code"]) == (422, "invalid_request")
    assert second[1]["pointer"] == "/outputs"
    assert [first[0], third[0]] == [200, 200]


def test_one_bad_observation_does_not_fail_its_neighbours(services):
    good = {"observation": ZEROS}
    bad: list[Any] = [{"observation": [1]}, {"observation": ["a"] * 4}, {}]
    found = answers(services, "discrete", good, *bad, good)
    assert [status for status, _ in found] == [200, 422, 422, 422, 200]


def test_a_version_that_is_not_served_is_unknown(services):
    (right,), (wrong,) = (
        answers(services, "discrete", {"observation": ZEROS, "version": version})
        for version in (3, 2)
    )
    assert (right[0], right[1]["version"]) == (200, 3)
    assert (wrong[0], wrong[1]["code"], wrong[1]["pointer"]) == (404, "unknown_policy", "/version")


def test_an_overloaded_policy_says_when_to_come_again(services):
    async def main() -> list[Any]:
        body = json.dumps({"observations": [ZEROS] * 3}).encode()
        service = services.require("discrete")
        return await asyncio.gather(service.answer(body), service.answer(body))

    fine, refused = asyncio.run(main())
    assert (fine.status, refused.status) == (200, 503)
    assert json.loads(refused.body)["code"] == "overloaded"
    assert dict(refused.headers)[b"retry-after"] == b"7"


def test_a_closed_service_refuses(services):
    services.require_ready()
    asyncio.run(services.close())
    with pytest.raises(PolicyNotReadyError):
        services.require_ready()
    ((status, body),) = answers(services, "discrete", {"observation": ZEROS})
    assert (status, body["code"]) == (503, "policy_not_ready")


def test_an_unknown_policy_is_told_which_there_are(services):
    with pytest.raises(UnknownPolicyError, match="there is box, discrete, no-critic"):
        services.require("nobody")
    assert services.get("nobody") is None
    assert [service.name for service in services] == ["box", "discrete", "no-critic"]


def test_a_policy_s_description_states_what_may_be_asked(services):
    described = services.require("discrete").describe()
    assert described["outputs"] == ["action_dist_inputs", "action_logp", "value"]
    assert described["summary"] == "Box(4,) float32 -> Discrete(3)"
    assert described["version"] == 3
    assert described["takes"] == {
        "action_mask": True,
        "reward": False,
        "state": False,
        "stochastic": True,
    }
    assert described["state"] == {}
    assert services.require("box").describe()["takes"]["action_mask"] is False
    assert services.require("no-critic").describe()["outputs"] == [
        "action_dist_inputs",
        "action_logp",
    ]


def test_a_damaged_bundle_is_never_served(tmp_path: Path, discrete):
    def damage(golden: dict[str, Any]) -> None:
        golden["value"] += 1

    path = discrete.save(tmp_path / "bundle", damage_golden=damage)
    with pytest.raises(BundleError):
        load_services([PolicySource(name="bad", path=path)], ServingConfig(), "cpu")


def test_retry_after_is_said_of_503_alone():
    assert dict(problem_answer(OverloadedError("full")).headers) == {b"retry-after": b"1"}
    assert problem_answer(InvalidObservationError("bad")).headers == ()


def test_a_mistake_of_ours_says_nothing_of_its_inside():
    answer = unexpected_answer()
    assert (answer.status, answer.content_type) == (500, b"application/problem+json")
    assert json.loads(answer.body)["code"] == "inference_failed"


def one_service(*args: Any, **kwargs: Any) -> PolicyServices:
    return services_of({"p": summing_policy(*args, **kwargs)})


@pytest.mark.parametrize("action", ACTION_SPACES)
@pytest.mark.parametrize("observation", OBSERVATION_SPACES)
def test_any_space_is_served_one_by_one_and_together(observation: str, action: str):
    services = one_service(OBSERVATION_SPACES[observation], ACTION_SPACES[action])
    rows = sample(OBSERVATION_SPACES[observation], 4)
    space = ACTION_SPACES[action]
    greedy = [as_json(action_of(space, total_of(row))) for row in rows]
    sampled = [as_json(action_of(space, total_of(row) + 1)) for row in rows]
    many, one, mixed = answers(
        services,
        "p",
        {"observations": rows},
        {"observation": rows[1], "outputs": ["q_values"]},
        {"observations": rows[2:], "deterministic": False},
    )
    assert [status for status, _ in (many, one, mixed)] == [200] * 3
    assert many[1]["actions"] == greedy
    assert one[1]["action"] == greedy[1]
    assert one[1]["q_values"] == [pytest.approx(total_of(rows[1]))]
    assert mixed[1]["actions"] == sampled[2:]


VECTOR = gym.spaces.Box(-1, 1, (2,), np.float32)


def test_a_remote_loop_with_its_state_equals_a_local_one():
    services = one_service(VECTOR, ACTION_SPACES["box"], state=MEMORY, has_reward=True)
    rng = np.random.default_rng(0)
    episode = [(np.round(rng.normal(size=2) * 4) / 4, float(step)) for step in range(20)]
    remembered = MEMORY["total"]["initial"]
    body: dict[str, Any] = {}
    for row, reward in episode:
        remembered += total_of(row) + 10 * body.get("reward", 0)
        ((status, answer),) = answers(services, "p", {"observation": row, **body})
        assert (status, answer["state"]["total"]) == (200, remembered)
        assert answer["action"] == [remembered, remembered + 1]
        body = {"state": answer["state"], "reward": reward}


def test_callers_in_one_batch_keep_their_own_states():
    services = one_service(VECTOR, ACTION_SPACES["discrete"], state=MEMORY)
    n = 6
    states: list[Any] = [None] * n
    totals = [0.5] * n
    for step in range(5):
        rows = [[caller / 4, step / 4] for caller in range(n)]
        bodies = [
            {"observation": row, "state": state} for row, state in zip(rows, states, strict=True)
        ]
        found = answers(services, "p", *bodies)
        totals = [total + total_of(row) for total, row in zip(totals, rows, strict=True)]
        states = [answer["state"] for _, answer in found]
        assert [state["total"] for state in states] == totals
    batches = services.require("p").policy.graph.seen
    assert len(batches[-1]["state/total"]) == n  # they did meet


def test_rows_of_one_request_may_start_while_others_go_on():
    services = one_service(VECTOR, ACTION_SPACES["discrete"], state=MEMORY)
    first = answers(services, "p", {"observations": [[1, 0], [2, 0]]})[0][1]["state"]
    body = {"observations": [[1, 0]] * 3, "state": [first[1], None, first[0]]}
    second = answers(services, "p", body)[0][1]["state"]
    assert [row["total"] for row in second] == [0.5 + 2 + 1, 0.5 + 1, 0.5 + 1 + 1]
    assert second[1]["frames"] == [[-1.0] * 3, [1.0] * 3]


@pytest.mark.parametrize(
    "body",
    [
        {"observation": ZEROS, "action_mask": [0, 0, 0]},
        {"observation": ZEROS, "state": {"h": 1}},
        {"observation": ZEROS, "reward": 1},
    ],
    ids=["all forbidden", "state", "reward"],
)
def test_what_one_caller_may_not_say_does_not_harm_its_neighbours(services, body: Any):
    good = {"observation": ZEROS}
    first, second, third = answers(services, "discrete", good, body, good)
    assert [status for status, _ in (first, second, third)] == [200, 422, 200]
    assert second[1]["code"] == "invalid_request"
    assert second[1]["pointer"] == f"/{list(body)[1]}"


def test_a_forbidden_action_is_never_taken_and_a_neighbour_is_unaffected(services, discrete):
    rows = discrete.observations(4, seed=1)
    masked = {"observations": rows, "deterministic": False, "action_mask": [[0, 1, 1]] * 4}
    free = {"observations": rows, "outputs": ["action_logp"]}
    alone = answers(services, "discrete", free)[0][1]
    for seed in range(100):
        hidden, beside = (
            answers(services, "discrete", {**masked, "seed": seed})[0],
            answers(services, "discrete", free)[0],
        )
        assert 0 not in hidden[1]["actions"]
        assert beside[1] == alone


def test_a_forbidden_action_is_never_taken_in_any_component_or_mode():
    services = one_service(VECTOR, ACTION_SPACES["multi-discrete"], has_mask=True)
    rng = np.random.default_rng(0)
    for _ in range(50):
        masks = rng.integers(0, 2, (4, 7))
        masks[:, [rng.integers(3), 3 + rng.integers(4)]] = 1  # one of each at least
        body = {
            "observations": rng.integers(0, 9, (4, 2)),
            "action_mask": masks,
            "deterministic": bool(rng.integers(2)),
        }
        ((status, answer),) = answers(services, "p", body)
        assert status == 200
        for (left, right), mask in zip(answer["actions"], masks, strict=True):
            assert mask[left] == 1
            assert mask[3 + right] == 1


def test_a_policy_without_a_distribution_refuses_to_sample():
    services = one_service(VECTOR, ACTION_SPACES["discrete"], is_stochastic=False)
    fine, refused = answers(
        services,
        "p",
        {"observation": [1, 0]},
        {"observation": [1, 0], "deterministic": False},
    )
    assert (fine[0], fine[1]["action"]) == (200, 5 + 1)
    assert (refused[0], refused[1]["code"]) == (422, "invalid_request")
    assert refused[1]["pointer"] == "/deterministic"
    assert services.require("p").describe()["takes"]["stochastic"] is False


def test_a_description_states_inputs_and_state():
    services = one_service(
        OBSERVATION_SPACES["dict"],
        ACTION_SPACES["tuple"],
        state=MEMORY,
        has_reward=True,
    )
    described = services.require("p").describe()
    assert described["takes"] == {
        "action_mask": False,
        "reward": True,
        "state": True,
        "stochastic": True,
    }
    assert described["state"] == MEMORY
    # Keys in sorted order, escaped as in a JSON pointer.
    assert [each["name"] for each in described["inputs"]] == [
        "observation/a.b[0] `c` ~0",
        "observation/class/0",
        "observation/class/self",
        "observation/z~1last",
        "state/total",
        "state/frames",
        "reward",
        "noise",
    ]
    assert described["observation_space"]["type"] == "Dict"
    assert described["summary"].startswith("Dict(")


@pytest.mark.parametrize("name", ["next_state/total", "action/a~1b"])
def test_an_overflow_anywhere_is_an_error_not_null(name: str):
    class Overflowing(Summing):
        def run(self, names: Any, inputs: Any) -> dict[str, Any]:
            found = super().run(names, inputs)
            return {**found, name: np.full_like(found[name], np.inf)}

    policy = summing_policy(VECTOR, ACTION_SPACES["dict"], state=MEMORY)
    policy = GraphPolicy(policy.manifest, Overflowing(ACTION_SPACES["dict"], policy.manifest))
    ((status, body),) = answers(services_of({"p": policy}), "p", {"observation": [0, 0]})
    assert (status, body["code"]) == (500, "inference_failed")
    assert "overflowed" in body["detail"]


class Broken(Summing):
    """Answers `values` in the named outputs to the rows whose first number is 1."""

    values: dict[str, Any]

    def run(self, names: Any, inputs: Any) -> dict[str, Any]:
        found = super().run(names, inputs)
        hit = inputs["observation"][:, 0] == 1
        for name, value in self.values.items():
            if name in found:
                found[name] = found[name].copy()
                found[name][hit] = value
        return found


def broken_service(action: Any, values: dict[str, Any], **kwargs: Any) -> PolicyServices:
    manifest = manifest_of(VECTOR, action, **kwargs)
    graph = Broken(action, manifest)
    graph.values = values
    return services_of({"p": GraphPolicy(manifest, graph)})


HIT, SPARED = {"observation": [1, 0]}, {"observation": [0, 0]}


@pytest.mark.parametrize("name", ["q_values", "action_logp"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_output_that_is_no_number_fails_who_asked_and_nobody_else(name: str, value: float):
    services = broken_service(ACTION_SPACES["discrete"], {name: value})
    hit, spared, many = answers(
        services,
        "p",
        {**HIT, "outputs": [name]},
        {**SPARED, "outputs": [name]},
        {"observations": [[0, 0], [1, 0]], "outputs": [name]},
    )
    assert [hit[0], spared[0], many[0]] == [500, 200, 500]
    assert (hit[1]["code"], f"`{name}`" in hit[1]["detail"]) == ("inference_failed", True)
    assert answers(services, "p", HIT)[0][0] == 200  # nobody asked for it


@pytest.mark.parametrize("name", ["q_values", "action_logp"])
def test_a_logit_of_minus_infinity_is_answered_as_the_lowest_float32(name: str):
    services = broken_service(ACTION_SPACES["discrete"], {name: -np.inf})
    hit, many = answers(
        services,
        "p",
        {**HIT, "outputs": [name]},
        {"observations": [[0, 0], [1, 0]], "outputs": [name]},
    )
    lowest = float(np.nextafter(np.float32(-np.inf), np.float32(0)))
    assert hit[0] == many[0] == 200
    assert np.ravel(hit[1][name]).tolist() == [lowest]
    assert np.ravel(many[1][name]).tolist() == [0.0, lowest]


def test_minus_infinity_beside_nan_is_an_error():
    both = GraphPolicy(manifest_of(VECTOR, ACTION_SPACES["discrete"]), _TwoColumns())
    found = answers(services_of({"p": both}), "p", {**HIT, "outputs": ["q_values"]})
    assert found[0][0] == 500


class _TwoColumns:
    name = "numpy"
    device = "cpu"

    def run(self, names: Any, inputs: Any) -> dict[str, Any]:
        n = len(inputs["observation"])
        found = {
            "action": np.zeros(n, np.int64),
            "q_values": np.full((n, 2), [-np.inf, np.nan], np.float32),
        }
        return {name: found[name] for name in names}


@pytest.mark.parametrize(
    ("action", "answered", "mask", "is_allowed"),
    [
        (gym.spaces.Discrete(3), 0, [0, 1, 1], False),
        (gym.spaces.Discrete(3), 0, [1, 0, 0], True),
        (gym.spaces.Discrete(3), 2, [1, 1, 0], False),
        (gym.spaces.Discrete(3), 3, [1, 1, 1], False),
        (gym.spaces.Discrete(3), -1, [1, 1, 1], False),
        # RLlib's actions count from 0 whatever the space's start.
        (gym.spaces.Discrete(3, start=5), 2, [0, 0, 1], True),
        (gym.spaces.MultiDiscrete([3, 4]), [0, 0], [1, 0, 0, 0, 1, 1, 1], False),
        (gym.spaces.MultiDiscrete([3, 4]), [0, 0], [0, 1, 1, 1, 1, 1, 1], False),
        (gym.spaces.MultiDiscrete([3, 4]), [2, 3], [0, 0, 1, 0, 0, 0, 1], True),
    ],
)
def test_a_forbidden_action_is_an_error_even_if_the_network_answers_it(
    action: Any, answered: Any, mask: Any, is_allowed: bool
):
    services = broken_service(action, {"action": answered}, has_mask=True)
    for deterministic in (True, False):
        services.require("p").policy.graph.values = {
            "action" if deterministic else "sampled_action": answered
        }
        how = {"deterministic": deterministic, "action_mask": mask}
        (status, body), (alone, _) = answers(services, "p", {**HIT, **how}, SPARED)
        assert alone == 200
        assert status == (200 if is_allowed else 500)
        assert body.get("action") == (answered if is_allowed else None)
        if not is_allowed:
            assert (body["code"], "action_mask" in body["detail"]) == ("inference_failed", True)
