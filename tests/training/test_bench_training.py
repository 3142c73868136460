from __future__ import annotations

import ast
from pathlib import Path

import pytest

from training.bench import rllib_driver
from training.bench.peer_environment import pinned
from training.bench.results import Results, markdown, tables

FACTS = {
    "cpu": "a processor",
    "n_cpus": 2,
    "python": "3.11.7",
    "versions": "ray 2.60.0",
    "load_before": "0.1",
    "load_after": "2.0",
}


def speeds(*pairs):
    return [{"env_steps_per_s": wall, "env_steps_per_cpu_s": cpu} for wall, cpu in pairs]


def solved(seconds, cpu, n_steps=16_384):
    return {"solved_s": seconds, "solved_cpu_s": cpu, "env_steps": n_steps}


@pytest.fixture
def results():
    return Results(
        FACTS,
        speeds={
            "ours": speeds((9000, 9500), (8000, 9000), (1000, 8000)),
            "rllib": speeds((4000, 4500)),
            "sb3": speeds((10_000, 12_000), (1, 12_000), (10_000, 12_000)),
        },
        solved={
            "ours": [solved(4.0, 3.0), solved(4.0, 3.0), solved(None, None, 100_000)],
            "sb3": [solved(10.0, 6.0), solved(4.0, 3.0), solved(10.0, 6.0)],
        },
        commands_s=[14.0, 13.0, 99.0],
    )


def test_one_round_that_was_disturbed_does_not_move_the_median(results):
    assert results.median_speed("ours") == 8000
    assert results.median_speed("sb3", "env_steps_per_cpu_s") == 12_000


def test_a_run_that_never_solved_its_task_counts_as_the_longest(results):
    assert results.median_solved("ours") == 4.0
    results.solved["ours"].append(solved(None, None))
    results.solved["ours"].append(solved(None, None))
    assert results.median_solved("ours") is None
    assert "| policyserve | never | - | never | - |" in markdown(results)


def test_the_page_names_every_system_and_its_ratios(results):
    page = markdown(results)
    assert "| policyserve | 8,000 | 0.80 | 9,000 | 0.75 | 9,000, 8,000, 1,000 |" in page
    assert "| plain RLlib | 4,000 | 0.40 | 4,500 | 0.38 | 4,000 |" in page
    assert "| policyserve | 4.0 | 0.40 | 3.0 | 0.50 | 4.0 (16,384), 4.0 (16,384), never" in page
    assert "| 14.0 | 14.0, 13.0, 99.0 | under 30 |" in page
    assert "0.1 at the start, 2.0 at the end" in page
    for _, rows in tables(results):
        assert len({len(row) for row in rows}) == 1


def test_both_sides_are_measured_by_the_same_rules():
    # The peer's driver runs where nothing of ours can be imported, so it has its own copies.
    source = (Path(rllib_driver.__file__).parent / "sb3_driver.py").read_text()
    found = {}
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Tuple):
            names = [name.id for name in statement.targets[0].elts]
            found |= dict(zip(names, map(ast.literal_eval, statement.value.elts), strict=True))
        elif isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant):
            found[statement.targets[0].id] = statement.value.value
    for name in ("BAR", "EVALUATION_EPISODES", "STEPS_PER_LOOK", "WARM_UP_ITERATIONS"):
        assert found[name] == getattr(rllib_driver, name), name
    assert pinned("torch").startswith("2.")
