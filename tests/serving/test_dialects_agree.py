"""Every dialect gives the answer that the policy itself gives, whatever the spaces.

A dialect is a function in `DIALECTS`: it asks a question and returns the answered arrays by name,
as the graph calls them.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http

from serving.bundle import read_bundle
from serving.client import PolicyClient
from serving.config import ServingConfig
from serving.engines.graph import GraphPolicy, load_graph
from serving.interface import Policy
from serving.manifest import PolicyManifest
from serving.spaces import BoxSpace, DiscreteSpace, MultiDiscreteSpace, flatten, leaves, unflatten
from serving.spaces import rows as rows_of
from serving.stream_client import StreamClient
from tests.serving.conftest import LiveServer, serving_services
from tests.serving.numpy_policies import (
    ACTION_SPACES,
    MEMORY,
    OBSERVATION_SPACES,
    as_json,
    services_of,
    summing_policy,
)
from tests.serving.open_inference import DATATYPES, grpc_serving

Arrays = dict[str, np.ndarray[Any, Any]]
N = 5


@dataclass(frozen=True)
class Question:
    """What is asked of a policy; arrays are named as the graph names them."""

    inputs: Arrays
    outputs: tuple[str, ...] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Served:
    """The same policies behind each kind of server."""

    policies: Mapping[str, GraphPolicy]
    server: LiveServer
    grpc_address: str

    def manifest(self, name: str) -> PolicyManifest:
        return self.policies[name].manifest


def ask_policy(served: Served, name: str, question: Question) -> Arrays:
    """The policy itself, without any server."""
    return asked_of(served.policies[name], served.manifest(name), question)


def asked_of(policy: Policy, manifest: PolicyManifest, question: Question) -> Arrays:
    given = question.inputs
    state = {
        key: given[f"state/{key}"] for key in manifest.state if f"state/{key}" in given
    } or None
    output = policy.compute_actions(
        unflatten(manifest.observation_space, "observation", given),
        outputs=question.outputs,
        state=state,
        rewards=given.get("reward"),
        action_mask=given.get("action_mask"),
        **question.parameters,
    )
    found = flatten(manifest.action_space, "action", output.actions) | output.outputs()
    return found | {f"next_state/{key}": each for key, each in (output.state or {}).items()}


def ask_json(served: Served, name: str, question: Question) -> Arrays:
    """`compute_action` with lists of observations."""
    manifest = served.manifest(name)
    space = manifest.observation_space
    observations = rows_of(space, unflatten(space, "observation", question.inputs))
    body: dict[str, Any] = {
        "observations": as_json(observations),
        "outputs": list(question.outputs),
        **question.parameters,
    }
    if "action_mask" in question.inputs:
        body["action_mask"] = question.inputs["action_mask"].tolist()
    if "reward" in question.inputs:
        body["rewards"] = question.inputs["reward"].tolist()
    state = {
        key: question.inputs[f"state/{key}"].tolist()
        for key in manifest.state
        if f"state/{key}" in question.inputs
    }
    if state:
        body["state"] = [
            dict(zip(state, row, strict=True)) for row in zip(*state.values(), strict=True)
        ]
    response = served.server.post(name, body)
    assert response.status == 200, response.body
    content = response.json()
    actions = [flatten(manifest.action_space, "action", row) for row in content["actions"]]
    found = {key: np.array([row[key] for row in actions]) for key in actions[0]}
    found |= {key: np.array(content[key]) for key in question.outputs}
    for key in manifest.state:
        found[f"next_state/{key}"] = np.array([row[key] for row in content["state"]])
    return found


def open_inference(module: Any, binary: bool | None) -> Callable[[Served, str, Question], Arrays]:
    """Triton's client of a protocol; `binary` for HTTP, which has two forms."""

    def ask(served: Served, name: str, question: Question) -> Arrays:
        manifest = served.manifest(name)
        wanted = [*leaves(manifest.action_space, "action"), *question.outputs]
        wanted += [f"next_state/{key}" for key in manifest.state]
        how = {} if binary is None else {"binary_data": binary}
        inputs = []
        for key, array in question.inputs.items():
            tensor = module.InferInput(key, list(array.shape), DATATYPES[array.dtype.name])
            inputs.append(tensor.set_data_from_numpy(array, **how))
        outputs = [module.InferRequestedOutput(key, **how) for key in wanted]
        host = f"{served.server.host}:{served.server.port}"
        address = served.grpc_address if module is triton_grpc else host
        with module.InferenceServerClient(address) as client:
            result = client.infer(
                name, inputs, outputs=outputs, parameters=dict(question.parameters)
            )
            return {key: result.as_numpy(key) for key in wanted}

    return ask


def through(client_of: Callable[[str], Any]) -> Callable[[Served, str, Question], Arrays]:
    """One of this product's own clients."""

    def ask(served: Served, name: str, question: Question) -> Arrays:
        with client_of(served.server.policy_url(name)) as client:
            return asked_of(client, served.manifest(name), question)

    return ask


DIALECTS: dict[str, Callable[[Served, str, Question], Arrays]] = {
    "json": ask_json,
    "msgpack": through(lambda url: PolicyClient(url, encoding="msgpack")),
    "stream": through(StreamClient),
    "open-inference-json": open_inference(triton_http, binary=False),
    "open-inference-binary": open_inference(triton_http, binary=True),
    "open-inference-grpc": open_inference(triton_grpc, binary=None),
}


@pytest.fixture(scope="module")
def served(bundles: dict[str, Path], tiny_bundles: dict[str, Path]) -> Iterator[Served]:
    def make() -> dict[str, GraphPolicy]:
        found = {name: read_bundle(path) for name, path in {**bundles, **tiny_bundles}.items()}
        policies = {
            name: GraphPolicy(bundle.manifest, load_graph(bundle)) for name, bundle in found.items()
        }
        for (name, space), action in zip(
            OBSERVATION_SPACES.items(), itertools.cycle(ACTION_SPACES.values()), strict=False
        ):
            policies[f"sum-{name}"] = summing_policy(space, action)
        policies["sum-full"] = summing_policy(
            OBSERVATION_SPACES["dict"],
            ACTION_SPACES["multi-discrete"],
            state=MEMORY,
            has_reward=True,
            has_mask=True,
        )
        return policies

    # A small batch is quick to time.
    http, rpc = (services_of(make(), max_batch_size=8) for _ in range(2))
    with serving_services(http, ServingConfig()) as server, grpc_serving(rpc) as address:
        yield Served(make(), server, address)


def observations(manifest: PolicyManifest, seed: int = 0) -> Arrays:
    """N observations; numbers that float32 has exactly."""
    generator = np.random.default_rng(seed)
    found = {}
    specs = {spec.name: spec for spec in manifest.inputs}
    for name, leaf in leaves(manifest.observation_space, "observation").items():
        shape, dtype = (N, *leaf.shape), specs[name].dtype
        if isinstance(leaf, DiscreteSpace):
            values = generator.integers(leaf.start, leaf.start + leaf.n, shape)
        elif isinstance(leaf, MultiDiscreteSpace):
            values = generator.integers(leaf.start, leaf.start + leaf.nvec, shape)
        elif isinstance(leaf, BoxSpace) and np.dtype(dtype).kind == "f":
            values = generator.integers(-8, 9, shape) / 4
        else:
            values = generator.integers(0, 2, shape)
        found[name] = np.asarray(values, dtype)
    return found


def masks_of(manifest: PolicyManifest, seed: int = 0) -> Arrays:
    """Masks that allow the first action of each component and some others."""
    masks = np.random.default_rng(seed).random((N, manifest.mask_size)) < 0.5
    space = manifest.action_space
    sizes = space.nvec.ravel() if isinstance(space, MultiDiscreteSpace) else np.array([space.n])
    masks[:, np.cumsum(sizes) - sizes] = True
    return {"action_mask": masks}


def memory_of(manifest: PolicyManifest, seed: int = 0) -> Arrays:
    """States that a policy may have come to, and rewards."""
    generator = np.random.default_rng(seed)
    found = {
        f"state/{name}": np.asarray(
            generator.integers(0, 2, (N, *spec.shape)), np.dtype(spec.dtype)
        )
        for name, spec in manifest.state.items()
    }
    if manifest.has_reward:
        found["reward"] = (generator.integers(-8, 9, N) / 4).astype(np.float32)
    return found


def questions(policy: GraphPolicy) -> Iterator[tuple[str, Question]]:
    """What can be asked of a policy."""
    manifest = policy.manifest
    plain = observations(manifest)
    yield "plain", Question(plain)
    yield "outputs", Question(plain, policy.available_outputs)
    if manifest.noise.size:
        sampled = {"deterministic": False, "seed": 11}
        yield "seed", Question(plain, policy.available_outputs, sampled)
    if manifest.mask_size:
        yield "mask", Question({**plain, **masks_of(manifest)}, policy.available_outputs)
    if manifest.state:
        memory = {**plain, **memory_of(manifest)}
        yield "memory", Question(memory)
        if manifest.mask_size:
            everything = {**memory, **masks_of(manifest)}
            parameters = {"deterministic": False, "seed": 12}
            yield "everything", Question(everything, policy.available_outputs, parameters)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_dialect_answers_as_the_policy_does(served: Served, dialect: str):
    n_asked = 0
    for name, policy in served.policies.items():
        for what, question in questions(policy):
            expected = ask_policy(served, name, question)
            found = DIALECTS[dialect](served, name, question)
            assert found.keys() == expected.keys(), (name, what)
            for key, values in expected.items():
                message = f"{dialect}: {key} of {name} ({what})"
                np.testing.assert_allclose(
                    found[key], values, rtol=1e-5, atol=1e-6, err_msg=message
                )
            n_asked += 1
    assert n_asked > 50


@pytest.mark.parametrize(("one", "other"), [*itertools.pairwise(DIALECTS)])
def test_two_dialects_answer_with_the_same_bits(served: Served, one: str, other: str):
    for name, policy in served.policies.items():
        for what, question in questions(policy):
            first, second = (DIALECTS[each](served, name, question) for each in (one, other))
            for key, values in first.items():
                message = f"{one}, {other}: {key} of {name} ({what})"
                np.testing.assert_array_equal(values, second[key], err_msg=message)


def test_the_questions_have_different_answers(served: Served):
    """Else their equality would say nothing."""
    differ = 0
    for name, policy in served.policies.items():
        asked = dict(questions(policy))
        plain = ask_policy(served, name, asked["plain"])
        for what in ("seed", "mask", "memory"):
            if what in asked:
                other = ask_policy(served, name, asked[what])
                differ += any((plain[key] != other[key]).any() for key in plain)
    assert differ >= 12


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_question_in_json_is_the_same_text_for_any_order_of_its_keys(dialect: str, served):
    name = "sum-dict"
    question = dict(questions(served.policies[name]))["plain"]
    backwards = Question(dict(reversed(question.inputs.items())))
    first, second = (DIALECTS[dialect](served, name, each) for each in (question, backwards))
    assert json.dumps(as_json(first)) == json.dumps(as_json(second))
