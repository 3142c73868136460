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
from serving.parity import TOLERANCE, compare, describe_mismatches, run_in_batches
from serving.verification import load_verified_policy, verify_graph
from tests.bundles import OUTPUTS, LinearPolicy, box_policy, discrete_policy


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

    def run(self, names: Sequence[str], observation: Any, noise: Any) -> dict[str, Any]:
        answers = self.reference.answers(observation, noise)
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


@pytest.mark.parametrize("name", ["observation", "noise", "action", "value"])
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
        facts={"observation_space": narrow},
    )
    with pytest.raises(BundleError):
        load_verified_policy(path)


def test_where_two_actions_tie_either_is_right():
    noise = np.zeros((2, 3), np.float32)
    near, far = 0.5 * TOLERANCE, 10 * TOLERANCE
    scores = np.array([[0.0, 1.0, 1.0 + near], [0.0, 1.0, 1.0 + far]], np.float32)
    expected = {"action": np.array([2, 2])}
    (same,) = compare(expected, {"action": np.array([2, 2])}, noise, scores)
    (tie,) = compare(expected, {"action": np.array([1, 2])}, noise, scores)
    (mistake,) = compare(expected, {"action": np.array([2, 1])}, noise, scores)
    assert [item.n_mismatched for item in (same, tie, mistake)] == [0, 0, 1]
    assert mistake.first_mismatch == 1


def test_in_a_tie_an_action_that_is_neither_of_the_two_best_is_wrong():
    scores = np.array([[-9.0, 1.0, 1.0]], np.float32)
    noise = np.zeros((1, 3), np.float32)
    (found,) = compare({"action": np.array([2])}, {"action": np.array([0])}, noise, scores)
    assert found.n_mismatched == 1


def test_ties_of_sampled_actions_are_judged_with_their_noise():
    scores = np.array([[0.0, 1.0, 5.0]], np.float32)
    noise = np.array([[6.0, 5.0, 0.0]], np.float32)  # 6, 6, 5
    found = {"sampled_action": np.array([0]), "action": np.array([1])}
    expected = {"sampled_action": np.array([1]), "action": np.array([2])}
    sampled, greedy = compare(expected, found, noise, scores)
    assert (sampled.n_mismatched, greedy.n_mismatched) == (0, 1)


def test_a_mismatch_is_described_with_both_values():
    noise = np.zeros((3, 1), np.float32)
    expected = {"value": np.array([1.0, 2.0, 3.0], np.float32)}
    found = {"value": np.array([1.0, 2.5, 3.5], np.float32)}
    comparisons = compare(expected, found, noise, noise)
    assert comparisons[0].max_difference == 0.5
    assert comparisons[0].max_error == pytest.approx(0.5 / 3)
    assert describe_mismatches(comparisons, expected, found) == (
        "value differs in 2 of 3 rows (row 1: RLlib 2., found 2.5)"
    )


@pytest.mark.parametrize("batch_size", [1, 3, 10, 64])
def test_rows_run_in_batches_come_back_in_order(batch_size: int):
    sizes: list[int] = []

    def runner(rows: Any, noise: Any) -> dict[str, Any]:
        sizes.append(len(rows))
        assert len(noise) == len(rows)
        return {"sum": rows[:, 0] + noise[:, 0]}

    rows = np.arange(10, dtype=np.float32)[:, None]
    found = run_in_batches(runner, rows, rows * 10, batch_size)
    np.testing.assert_array_equal(found["sum"], np.arange(10) * 11)
    assert max(sizes) == min(batch_size, 10)
    assert sum(sizes) == 10
