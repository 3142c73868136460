"""Golden vectors: a policy that differs in any output, anywhere, is refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.bundle import read_bundle
from serving.engines.graph import load_graph
from serving.errors import BundleError, VerificationError
from serving.parity import TOLERANCE
from serving.verification import load_verified_policy, verify_graph
from tests.bundles import OUTPUTS, LinearPolicy, box_policy, discrete_policy
from tests.tiny_policies import TINY_POLICIES, TinyPolicy, memory_policy


@pytest.mark.parametrize("kind", ["discrete", "box", "no-critic"])
def test_a_sound_bundle_is_verified(bundles: dict[str, Path], kind: str):
    bundle = read_bundle(bundles[kind])
    report = verify_graph(bundle, load_graph(bundle))
    assert (report.engine, report.device) == ("onnxruntime", "cpu")
    assert report.n_observations == 70
    assert report.batch_sizes == (1, 7, 64)
    assert set(report.max_difference) == set(bundle.manifest.outputs)
    assert 0 < report.max_error < TOLERANCE


@pytest.mark.parametrize("make", [discrete_policy, box_policy])
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("row", [0, 37, 69])
def test_one_wrong_answer_in_any_output_is_found_and_named(
    tmp_path: Path, make: Any, output: str, row: int
):
    def damage(golden: dict[str, Any]) -> None:
        values = golden[output]
        if values.dtype.kind == "i":
            values[row] = (values[row] + 1) % 3
        else:
            # Ten times the tolerance, relative to 1 + |value|.
            values[row] += 10 * TOLERANCE * (1 + np.abs(values[row]))

    path = make().save(tmp_path / "bundle", damage_golden=damage)
    with pytest.raises(VerificationError, match=f"(: |; ){output} differs in 1 of 70") as caught:
        load_verified_policy(path)
    assert f"(row {row}:" in caught.value.message


@pytest.mark.parametrize("output", OUTPUTS[1:2] + OUTPUTS[3:])
def test_a_difference_within_the_tolerance_passes(tmp_path: Path, output: str):
    def damage(golden: dict[str, Any]) -> None:
        golden[output] += 0.5 * TOLERANCE * (1 + np.abs(golden[output]))

    load_verified_policy(discrete_policy().save(tmp_path / "bundle", damage_golden=damage))


def test_an_answer_that_is_not_a_number_is_a_mismatch(tmp_path: Path):
    def damage(golden: dict[str, Any]) -> None:
        golden["value"][3] = np.nan

    path = discrete_policy().save(tmp_path / "bundle", damage_golden=damage)
    with pytest.raises(VerificationError, match="value differs in 1"):
        load_verified_policy(path)


@pytest.mark.parametrize("weight", ["weights", "bias", "value_weights", "value_bias"])
def test_a_changed_weight_is_found(tmp_path: Path, weight: str):
    def damage(model: Any) -> None:
        entry = next(each for each in model.graph.initializer if each.name == weight)
        values = np.frombuffer(entry.raw_data, dtype=np.float32).copy()
        values[0] += 1e-3
        entry.raw_data = values.tobytes()

    path = box_policy().save(tmp_path / "bundle", damage_model=damage)
    with pytest.raises(VerificationError):
        load_verified_policy(path)


class WrongWhenAlone:
    """Right as a whole graph, wrong where only greedy actions are computed."""

    name = "odd"
    device = "cpu"

    def __init__(self, reference: LinearPolicy, wrong_at: int | None = None) -> None:
        self.reference = reference
        self.wrong_at = wrong_at

    def run(self, names: Sequence[str], inputs: Any) -> dict[str, Any]:
        noise = inputs["noise"]
        answers = self.reference.answers(inputs["observation"], noise, inputs["action_mask"])
        if (list(names) == ["action"]) if self.wrong_at is None else len(noise) == self.wrong_at:
            answers["action"] = (answers["action"] + 1) % 3
        return {name: answers[name] for name in names}


def test_both_ways_of_running_a_graph_are_verified(bundles: dict[str, Path], discrete):
    with pytest.raises(VerificationError, match="action differs in 70 of 70"):
        verify_graph(read_bundle(bundles["discrete"]), WrongWhenAlone(discrete))


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_an_error_at_one_batch_size_alone_is_found(
    bundles: dict[str, Path], discrete, batch_size: int
):
    with pytest.raises(VerificationError, match="action differs"):
        verify_graph(read_bundle(bundles["discrete"]), WrongWhenAlone(discrete, batch_size))


@pytest.mark.parametrize("missing", ["observation", "noise", "value", "action_dist_inputs"])
def test_golden_vectors_that_lack_an_array_are_refused(tmp_path: Path, missing: str):
    path = discrete_policy().save(
        tmp_path / "bundle", damage_golden=lambda golden: golden.__delitem__(missing)
    )
    with pytest.raises(BundleError, match=missing):
        load_verified_policy(path)


def test_no_golden_vectors_prove_nothing(tmp_path: Path):
    def damage(golden: dict[str, Any]) -> None:
        golden.update({name: values[:0] for name, values in golden.items()})

    path = discrete_policy().save(tmp_path / "bundle", damage_golden=damage)
    with pytest.raises(BundleError):
        load_verified_policy(path)


@pytest.mark.parametrize("name", ["observation", "noise", "action_mask", "action", "value"])
def test_golden_vectors_of_unequal_lengths_are_refused(tmp_path: Path, name: str):
    def damage(golden: dict[str, Any]) -> None:
        golden[name] = golden[name][:-1]

    path = discrete_policy().save(tmp_path / "bundle", damage_golden=damage)
    with pytest.raises(BundleError):
        load_verified_policy(path)


def test_a_graph_of_another_observation_width_is_refused(tmp_path: Path):
    narrow = discrete_policy(observation_shape=(3,)).facts()["observation_space"]
    other = discrete_policy(observation_shape=(3,)).golden()
    path = discrete_policy().save(
        tmp_path / "bundle",
        damage_golden=lambda golden: golden.update(observation=other["observation"]),
        facts={
            "observation_space": narrow,
            "inputs": discrete_policy(observation_shape=(3,)).facts()["inputs"],
        },
    )
    with pytest.raises(BundleError):
        load_verified_policy(path)


@pytest.mark.parametrize("name", TINY_POLICIES)
def test_every_kind_of_policy_is_verified(tiny_bundles: dict[str, Path], name: str):
    bundle = read_bundle(tiny_bundles[name])
    report = verify_graph(bundle, load_graph(bundle))
    assert set(report.max_difference) == set(bundle.manifest.outputs)
    assert report.n_observations == (54 if name == "memory" else 70)
    assert report.max_error < TOLERANCE


@pytest.mark.parametrize("name", TINY_POLICIES)
def test_one_wrong_answer_in_any_output_of_any_policy_is_found(tmp_path: Path, name: str):
    policy = TINY_POLICIES[name]()
    for output in policy.outputs:

        def damage(golden: dict[str, Any], output: str = output) -> None:
            row = (7, 4) if name == "memory" else (60,)
            if golden[output].dtype.kind == "i":
                golden[output][row] = (golden[output][row] + 1) % 2
            else:
                golden[output][row] += 1e-3

        path = policy.save(tmp_path / "bundle", damage_golden=damage)
        where = r"of 54 steps \(row 7, step 4:" if name == "memory" else r"of 70 rows \(row 60:"
        with pytest.raises(VerificationError, match=f"(: |; ){output} differs in 1 {where}"):
            load_verified_policy(path)


@pytest.mark.parametrize("name", ["dict", "image", "memory"])
def test_masked_rows_are_replayed_with_their_masks(tmp_path: Path, name: str):
    policy = TINY_POLICIES[name]()
    path = policy.save(
        tmp_path / "bundle",
        damage_golden=lambda golden: golden.__delitem__("action_mask"),  # now: all are allowed
    )
    with pytest.raises(VerificationError, match="action"):
        load_verified_policy(path)


def test_golden_vectors_without_masks_mean_that_all_actions_are_allowed(tmp_path: Path):
    def damage(golden: dict[str, Any]) -> None:
        del golden["action_mask"]
        golden.update(policy.answers(golden["observation"], golden["noise"]))

    policy = discrete_policy()
    load_verified_policy(policy.save(tmp_path / "bundle", damage_golden=damage))


def test_states_that_rllib_does_not_show_are_not_compared_but_used(tmp_path: Path):
    def hide(golden: dict[str, Any]) -> None:
        for name in [name for name in golden if "next_state" in name]:
            del golden[name]

    path = memory_policy().save(tmp_path / "bundle", damage_golden=hide)
    bundle = read_bundle(path)
    report = verify_graph(bundle, load_graph(bundle))
    assert set(report.max_difference) == {
        name for name in bundle.manifest.outputs if "next_state" not in name
    }


@pytest.mark.parametrize(
    "missing", ["is_sampled", "reward", "observation", "noise", "sampled_action"]
)
def test_golden_episodes_that_lack_an_array_are_refused(tmp_path: Path, missing: str):
    path = memory_policy().save(
        tmp_path / "bundle", damage_golden=lambda golden: golden.__delitem__(missing)
    )
    with pytest.raises(BundleError, match=missing):
        load_verified_policy(path)


@pytest.mark.parametrize(
    "change",
    [
        {"reward": np.zeros((9, 5), np.float32)},
        {"observation": np.zeros((9, 6, 2), np.complex64)},
        {"noise": np.zeros((9, 6, 3), np.float32)},
        {"is_sampled": np.zeros((9, 6), np.float32)},
        {"action": np.zeros(9, np.int64)},
        {"action": np.full((9, 6), "left")},
    ],
    ids=str,
)
def test_golden_episodes_of_another_form_are_refused(tmp_path: Path, change: dict[str, Any]):
    path = memory_policy().save(
        tmp_path / "bundle", damage_golden=lambda golden: golden.update(change)
    )
    with pytest.raises(BundleError, match=next(iter(change))) as caught:
        load_verified_policy(path)
    assert not isinstance(caught.value, VerificationError)


def test_an_answer_of_another_shape_is_a_mismatch(tmp_path: Path):
    def damage(golden: dict[str, Any]) -> None:
        golden["action_dist_inputs"] = golden["action_dist_inputs"][:, :2]

    path = discrete_policy().save(tmp_path / "bundle", damage_golden=damage)
    with pytest.raises(VerificationError, match="action_dist_inputs has the shape"):
        load_verified_policy(path)


class Forgetful:
    """The twin of a policy with memory, wrong in one way."""

    name = "odd"
    device = "cpu"

    def __init__(self, reference: TinyPolicy, change: Any) -> None:
        self.reference = reference
        self.change = change

    def run(self, names: Sequence[str], inputs: Any) -> dict[str, Any]:
        answers = self.change(self.reference, dict(inputs), list(names))
        return {name: answers[name] for name in names}


def forgets(reference: TinyPolicy, inputs: Any, _: list[str]) -> Any:
    return reference.answers({**inputs, "state/h": inputs["state/h"] * 0 + 0.25})


def starts_elsewhere(reference: TinyPolicy, inputs: Any, _: list[str]) -> Any:
    is_start = (inputs["state/previous"] == 0).all(axis=1, keepdims=True)
    return reference.answers({**inputs, "state/h": np.where(is_start, 0.0, inputs["state/h"])})


def takes_the_greedy_for_the_sampled(reference: TinyPolicy, inputs: Any, _: list[str]) -> Any:
    answers = reference.answers(inputs)
    return {**answers, "sampled_next_state/previous": answers["next_state/previous"]}


def ignores_the_reward(reference: TinyPolicy, inputs: Any, _: list[str]) -> Any:
    return reference.answers({**inputs, "reward": inputs["reward"] * 0})


def keeps_another_state_when_greedy(reference: TinyPolicy, inputs: Any, names: list[str]) -> Any:
    answers = reference.answers(inputs)
    if len(names) == 3:  # the action and two next states
        answers["next_state/h"] = answers["next_state/h"] + 1.0
    return answers


def is_right(reference: TinyPolicy, inputs: Any, _: list[str]) -> Any:
    return reference.answers(inputs)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (forgets, "next_state/h"),
        (starts_elsewhere, "next_state/h"),
        (takes_the_greedy_for_the_sampled, "sampled_next_state/previous"),
        (ignores_the_reward, "action_dist_inputs"),
        (keeps_another_state_when_greedy, "next_state/h"),
    ],
)
@pytest.mark.parametrize("is_shown", [True, False])
def test_a_memory_that_goes_wrong_is_found(tmp_path: Path, change: Any, named: str, is_shown: bool):
    def hide(golden: dict[str, Any]) -> None:
        for name in [name for name in golden if "next_state" in name and not is_shown]:
            del golden[name]

    bundle = read_bundle(memory_policy().save(tmp_path / "bundle", damage_golden=hide))
    verify_graph(bundle, Forgetful(memory_policy(), is_right))
    with pytest.raises(VerificationError, match=named if is_shown else "differs") as caught:
        verify_graph(bundle, Forgetful(memory_policy(), change))
    assert "step" in caught.value.message


def test_a_bundle_is_held_to_the_tolerance_that_it_states(tmp_path: Path):
    def damage(golden: dict[str, Any]) -> None:
        golden["value"] += 5e-3

    for tolerance, is_sound in ((1e-5, False), (1e-3, False), (1e-2, True)):
        path = discrete_policy().save(
            tmp_path / "bundle", damage_golden=damage, facts={"tolerance": tolerance}
        )
        if is_sound:
            load_verified_policy(path)
            continue
        with pytest.raises(VerificationError, match="value differs in"):
            load_verified_policy(path)
