"""What every `serving.interface.Policy` has to do: the engines, the client, RLlib's reference.

A test class inherits `PolicyContract` or `TinyPolicyContract` and gives a fixture `case`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from scipy import special, stats

from serving.errors import InvalidObservationError, InvalidRequestError
from serving.interface import Policy
from serving.spaces import flatten, rows, space_from_json, take
from tests.bundles import HIGH, LOW, LinearPolicy
from tests.tiny_policies import TinyPolicy

# float32 against float64.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@dataclass(frozen=True)
class ContractCase:
    """A policy under test, and the same in NumPy."""

    policy: Policy
    reference: LinearPolicy

    @property
    def is_discrete(self) -> bool:
        return self.reference.kind == "discrete"


class PolicyContract:
    """The suite."""

    def test_satisfies_the_protocol(self, case: ContractCase):
        assert isinstance(case.policy, Policy)

    @pytest.mark.parametrize("n", [1, 2, 33])
    def test_actions_have_the_space_s_shape_and_dtype(self, case: ContractCase, n: int):
        output = case.policy.compute_actions(case.reference.observations(n))
        assert output.actions.shape == ((n,) if case.is_discrete else (n, 2))
        assert output.actions.dtype == (np.int64 if case.is_discrete else np.float32)

    def test_only_what_was_asked_for_is_answered(self, case: ContractCase):
        observations = case.reference.observations(3)
        names = ("action_logp", "value", "action_dist_inputs")
        nothing = case.policy.compute_actions(observations)
        assert [getattr(nothing, name) for name in names] == [None] * 3
        for asked in names:
            output = case.policy.compute_actions(observations, outputs=[asked])
            assert [name for name in names if getattr(output, name) is not None] == [asked]

    @pytest.mark.parametrize("deterministic", [True, False])
    def test_outputs_have_their_shapes_in_float32(self, case: ContractCase, deterministic: bool):
        output = case.policy.compute_actions(
            case.reference.observations(5),
            deterministic=deterministic,
            seed=0,
            outputs=("action_logp", "value", "action_dist_inputs"),
        )
        width = case.reference.weights.shape[1]
        assert output.action_logp is not None
        assert output.value is not None
        assert output.action_dist_inputs is not None
        assert output.action_logp.shape == output.value.shape == (5,)
        assert output.action_dist_inputs.shape == (5, width)
        for values in (output.action_logp, output.value, output.action_dist_inputs):
            assert values.dtype == np.float32

    def test_deterministic_actions_are_the_most_likely_ones(self, case: ContractCase):
        observations = case.reference.observations(50, seed=3)
        inputs = case.reference.inputs(observations)
        output = case.policy.compute_actions(
            observations, outputs=("action_logp", "value", "action_dist_inputs")
        )
        if case.is_discrete:
            np.testing.assert_array_equal(output.actions, inputs.argmax(axis=1))
            logp = special.log_softmax(inputs, axis=1).max(axis=1)
        else:
            mean = inputs[:, :2]
            expected = np.clip(LOW + (mean + 1) * (HIGH - LOW) / 2, LOW, HIGH)
            np.testing.assert_allclose(output.actions, expected, **CLOSE)
            logp = stats.norm.logpdf(mean, mean, np.exp(inputs[:, 2:])).sum(axis=1)
        np.testing.assert_allclose(output.action_logp, logp, **CLOSE)
        np.testing.assert_allclose(output.action_dist_inputs, inputs, **CLOSE)
        value = case.reference.answers(observations, np.zeros((50, case.reference.noise_size)))
        np.testing.assert_allclose(output.value, value["value"], **CLOSE)

    def test_deterministic_answers_repeat_whatever_the_seed(self, case: ContractCase):
        observations = case.reference.observations(20)
        first = case.policy.compute_actions(observations, seed=1)
        second = case.policy.compute_actions(observations, seed=2)
        np.testing.assert_array_equal(first.actions, second.actions)

    def test_a_seed_repeats_a_sample_and_another_seed_differs(self, case: ContractCase):
        observations = case.reference.observations(100)

        def sample(seed: int | None) -> Any:
            return case.policy.compute_actions(observations, deterministic=False, seed=seed).actions

        np.testing.assert_array_equal(sample(7), sample(7))
        assert not np.array_equal(sample(7), sample(8))
        assert not np.array_equal(sample(None), sample(None))

    def test_the_rows_of_one_sample_are_independent(self, case: ContractCase):
        same = np.repeat(case.reference.observations(1), 100, axis=0)
        actions = case.policy.compute_actions(same, deterministic=False, seed=0).actions
        assert len(np.unique(actions, axis=0)) > 1

    def test_a_batch_equals_its_rows_one_by_one(self, case: ContractCase):
        observations = case.reference.observations(9, seed=4)
        asked = ("action_logp", "value", "action_dist_inputs")
        batch = case.policy.compute_actions(observations, outputs=asked)
        for index, observation in enumerate(observations):
            alone = case.policy.compute_actions(observation[None], outputs=asked)
            for name in ("actions", *asked):
                np.testing.assert_allclose(
                    getattr(batch, name)[index], getattr(alone, name)[0], **CLOSE
                )

    def test_sampled_log_probabilities_are_those_of_the_sampled_actions(self, case: ContractCase):
        observations = case.reference.observations(200, seed=5)
        output = case.policy.compute_actions(
            observations, deterministic=False, seed=3, outputs=("action_logp",)
        )
        inputs = case.reference.inputs(observations)
        if case.is_discrete:
            logp = special.log_softmax(inputs, axis=1)[np.arange(200), output.actions]
            np.testing.assert_allclose(output.action_logp, logp, **CLOSE)
            return
        mean, std = inputs[:, :2], np.exp(inputs[:, 2:])
        inside = np.all((output.actions > LOW) & (output.actions < HIGH), axis=1)
        assert inside.sum() > 20  # where nothing was clipped the squashed action can be had back
        squashed = 2 * (output.actions.astype(np.float64) - LOW) / (HIGH - LOW) - 1
        logp = stats.norm.logpdf(squashed, mean, std).sum(axis=1)
        np.testing.assert_allclose(output.action_logp[inside], logp[inside], rtol=1e-4, atol=1e-4)

    def test_samples_follow_the_distribution(self, case: ContractCase):
        n = 1000
        observation = case.reference.observations(1, seed=6)
        inputs = case.reference.inputs(observation)[0]
        sampled = case.policy.compute_actions(
            np.repeat(observation, n, axis=0), deterministic=False, seed=12
        ).actions
        if case.is_discrete:
            counts = np.bincount(sampled, minlength=len(inputs))
            assert stats.chisquare(counts, n * special.softmax(inputs)).pvalue > 1e-3
            return
        for component in range(2):
            mean, std = inputs[component], np.exp(inputs[2 + component])
            squashed = 2 * (sampled[:, component] - LOW[component]) / (HIGH - LOW)[component] - 1
            edges = np.array([-0.5, 0.0, 0.5])  # beyond -1 and 1 actions are clipped
            counts = np.histogram(squashed, [-np.inf, *edges, np.inf])[0]
            shares = np.diff(stats.norm.cdf([-np.inf, *edges, np.inf], mean, std))
            assert stats.chisquare(counts, n * shares).pvalue > 1e-3

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39])
    def test_a_number_not_finite_as_float32_is_refused(self, case: ContractCase, value: float):
        observations = case.reference.observations(3).astype(np.float64)
        observations[1, 0] = value
        with pytest.raises(InvalidObservationError):
            case.policy.compute_actions(observations)

    @pytest.mark.parametrize(
        "reshape",
        [
            pytest.param(lambda rows: rows[:, :-1], id="narrower"),
            pytest.param(lambda rows: np.concatenate([rows, rows], axis=1), id="wider"),
            pytest.param(lambda rows: rows[0], id="no batch axis"),
            pytest.param(lambda rows: rows[:, None], id="an axis too many"),
        ],
    )
    def test_another_shape_is_refused(self, case: ContractCase, reshape: Any):
        with pytest.raises(InvalidObservationError):
            case.policy.compute_actions(reshape(case.reference.observations(3)))

    @pytest.mark.parametrize("dtype", [bool, str, complex, object])
    def test_what_is_no_real_number_is_refused(self, case: ContractCase, dtype: type):
        with pytest.raises(InvalidObservationError):
            case.policy.compute_actions(np.ones((2, *case.reference.observation_shape), dtype))

    @pytest.mark.parametrize("dtype", [np.float64, np.int64, np.int8, np.uint8, np.float16])
    def test_numbers_of_other_widths_are_taken(self, case: ContractCase, dtype: type):
        observations = np.ones((2, *case.reference.observation_shape))
        np.testing.assert_array_equal(
            case.policy.compute_actions(observations.astype(dtype)).actions,
            case.policy.compute_actions(observations.astype(np.float32)).actions,
        )

    def test_the_caller_s_array_is_neither_changed_nor_needs_to_be_contiguous(
        self, case: ContractCase
    ):
        observations = np.asfortranarray(case.reference.observations(8))[::2]
        before = observations.copy()
        output = case.policy.compute_actions(observations)
        np.testing.assert_array_equal(observations, before)
        again = case.policy.compute_actions(np.ascontiguousarray(before))
        np.testing.assert_array_equal(output.actions, again.actions)


@dataclass(frozen=True)
class TinyCase:
    """A policy under test of any spaces, perhaps with memory, and the same in NumPy."""

    policy: Policy
    reference: TinyPolicy

    @property
    def has_mask(self) -> bool:
        return "action_mask" in self.reference.inputs

    def leaves(self, actions: Any) -> dict[str, Any]:
        return flatten(space_from_json(self.reference.action_space), "action", actions)

    def expected(self, n: int, seed: int, **given: Any) -> dict[str, Any]:
        """The twin's answers to the observations of a seed, by output name."""
        inputs = self.reference.observation_arrays(n, seed)
        for name, (_, shape) in self.reference.inputs.items():
            if name in ("noise", "reward"):
                inputs[name] = np.zeros((n, *shape[1:]), np.float32)
            elif name == "action_mask":
                inputs[name] = np.ones((n, *shape[1:]), dtype=np.bool_)
        return self.reference.answers({**inputs, **self.reference.initial_state(n), **given})


class TinyPolicyContract:
    """The suite for other spaces, masks and memory."""

    def check_actions(self, case: TinyCase, output: Any, expected: dict[str, Any]) -> None:
        for name, values in case.leaves(output.actions).items():
            np.testing.assert_allclose(values, expected[name], **CLOSE)
            assert values.dtype == expected[name].dtype

    def test_satisfies_the_protocol(self, case: TinyCase):
        assert isinstance(case.policy, Policy)

    @pytest.mark.parametrize("n", [1, 2, 33])
    def test_actions_are_those_of_the_twin(self, case: TinyCase, n: int):
        output = case.policy.compute_actions(case.reference.observations(n, seed=n))
        assert len(output) == n
        self.check_actions(case, output, case.expected(n, seed=n))

    def test_a_list_of_observations_is_taken_as_a_batch_is(self, case: TinyCase):
        batch = case.reference.observations(5)
        output = case.policy.compute_actions(rows(case.reference.space, batch))
        self.check_actions(case, output, case.expected(5, seed=0))

    def test_asked_outputs_are_answered_and_no_others(self, case: TinyCase):
        names = ("action_logp", "value", "action_dist_inputs", "q_values")
        asked = [name for name in names if name in case.reference.outputs]
        output = case.policy.compute_actions(case.reference.observations(4), outputs=asked)
        expected = case.expected(4, seed=0)
        for name in names:
            values = getattr(output, name)
            assert (values is not None) == (name in asked)
            if values is not None:
                assert values.dtype == np.float32
                np.testing.assert_allclose(values, expected[name], **CLOSE)

    def test_a_seed_repeats_a_sample_and_another_seed_differs(self, case: TinyCase):
        observations = case.reference.observations(60)

        def sample(seed: int) -> list[Any]:
            output = case.policy.compute_actions(observations, deterministic=False, seed=seed)
            return list(case.leaves(output.actions).values())

        if not case.reference.noise_size:
            with pytest.raises(InvalidRequestError, match="distribution"):
                sample(7)
            return
        for one, same, other in zip(sample(7), sample(7), sample(8), strict=True):
            np.testing.assert_array_equal(one, same)
            assert not np.array_equal(one, other)

    def test_a_batch_equals_its_rows_one_by_one(self, case: TinyCase):
        batch = case.reference.observations(4, seed=4)
        together = case.leaves(case.policy.compute_actions(batch).actions)
        for index in range(4):
            alone = case.policy.compute_actions(take(batch, slice(index, index + 1)))
            for name, values in case.leaves(alone.actions).items():
                np.testing.assert_allclose(values[0], together[name][index], **CLOSE)

    def test_a_mask_forbids_actions(self, case: TinyCase):
        observations = case.reference.observations(9)
        if not case.has_mask:
            with pytest.raises(InvalidRequestError, match="action_mask"):
                case.policy.compute_actions(observations, action_mask=np.ones((9, 3)))
            return
        mask = np.ones((9, case.reference.inputs["action_mask"][1][1]), np.int8)
        mask[::2, 0] = 0
        output = case.policy.compute_actions(observations, action_mask=mask)
        expected = case.expected(9, seed=0, action_mask=mask.astype(np.bool_))
        self.check_actions(case, output, expected)
        first = case.leaves(output.actions)["action"].reshape(9, -1)[:, 0]
        assert (first[::2] != 0).all()
        some = case.policy.compute_actions(
            observations,
            action_mask=[row if index % 2 == 0 else None for index, row in enumerate(mask)],
        )
        self.check_actions(case, some, expected)

    def test_a_state_is_answered_and_goes_on_from_where_it_was(self, case: TinyCase):
        output = case.policy.compute_actions(case.reference.observations(3))
        if not case.reference.state:
            assert output.state is None
            return
        expected = case.expected(3, seed=0)
        assert set(output.state) == set(case.reference.state)
        for name, values in output.state.items():
            assert values.dtype == np.float32
            np.testing.assert_allclose(values, expected[f"next_state/{name}"], **CLOSE)
        rewards = np.array([1.0, -2.0, 0.5], np.float32)
        second = case.policy.compute_actions(
            case.reference.observations(3, seed=1), state=output.state, rewards=rewards
        )
        given = {f"state/{name}": values for name, values in output.state.items()}
        self.check_actions(case, second, case.expected(3, seed=1, reward=rewards, **given))
        by_row = [None, take(dict(output.state), 1), None]
        mixed = case.policy.compute_actions(case.reference.observations(3), state=by_row)
        again = case.policy.compute_actions(case.reference.observations(3), state=output.state)
        for name, values in mixed.state.items():
            np.testing.assert_array_equal(values[[0, 2]], output.state[name][[0, 2]])
            np.testing.assert_array_equal(values[1], again.state[name][1])

    def test_a_state_that_is_not_the_policy_s_is_refused(self, case: TinyCase):
        with pytest.raises(InvalidRequestError):
            case.policy.compute_actions(
                case.reference.observations(1), state={"other": np.zeros((1, 2))}
            )
