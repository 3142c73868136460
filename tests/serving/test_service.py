"""A policy with its codec and batcher: callers that meet in one batch, and every refusal's form."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serving.config import PolicySource, ServingConfig
from serving.errors import (
    BundleError,
    InvalidObservationError,
    OverloadedError,
    PolicyNotReadyError,
    UnknownPolicyError,
)
from serving.service import PolicyServices, load_services, problem_answer, unexpected_answer


@pytest.fixture
def services(bundles: dict[str, Path]) -> Iterator[PolicyServices]:
    sources = [PolicySource(name=name, path=path, version=3) for name, path in bundles.items()]
    found = load_services(sources, ServingConfig(max_queue_size=4, retry_after_s=7), "cpu")
    yield found
    asyncio.run(found.close())


def answers(services: PolicyServices, name: str, *bodies: Any) -> list[tuple[int, Any]]:
    """The answers to bodies that arrive in the same turn of the event loop."""

    async def main() -> list[Any]:
        service = services.require(name)
        calls = [service.answer(json.dumps(body).encode()) for body in bodies]
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
