"""What was measured, and the tables made of it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SYSTEMS: Mapping[str, str] = {
    "ours": "policyserve",
    "rllib": "plain RLlib",
    "sb3": "Stable-Baselines3",
}
SPEED_GOAL = 0.8
"""Our environment steps per second over Stable-Baselines3's, at least."""
SOLVED_GOAL = 1.0
"""Our seconds to a solved CartPole-v1 over Stable-Baselines3's, at most."""
COMMAND_GOAL_S = 30.0


@dataclass
class Results:
    """Every single measurement.

    Attributes:
        facts: Machine, versions and load.
        speeds: System to one {env_steps_per_s, env_steps_per_cpu_s} per round.
        solved: System to one {solved_s, solved_cpu_s, env_steps} per seed; the seconds None where
            its budget did not do.
        commands_s: Seconds of the whole `policyserve train ppo-cartpole`, one per seed.
    """

    facts: dict[str, Any]
    speeds: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    solved: dict[str, list[dict[str, float | None]]] = field(default_factory=dict)
    commands_s: list[float] = field(default_factory=list)

    def median_speed(self, system: str, unit: str = "env_steps_per_s") -> float:
        """Median over the rounds."""
        return statistics.median(speed[unit] for speed in self.speeds[system])

    def median_solved(self, system: str, unit: str = "solved_s") -> float | None:
        """Median over the seeds; a run that never got there counts as longer than any other."""
        runs = self.solved[system]
        times = [math.inf if (found := run[unit]) is None else found for run in runs]
        middle = statistics.median(times)
        return None if middle == math.inf else middle


def tables(results: Results) -> list[tuple[str, list[list[str]]]]:
    """Titles and rows, the first of which is the heading."""
    return [
        (f"Environment steps per second (goal: a ratio of {SPEED_GOAL} or more)", _speeds(results)),
        (
            f"Seconds to a return of 475 (goal: a ratio of {SOLVED_GOAL:g} or less)",
            _solved(results),
        ),
        ("The whole command `policyserve train ppo-cartpole`", _command(results)),
    ]


def markdown(results: Results) -> str:
    """The page docs/training-benchmarks.md."""
    facts = results.facts
    lines = [
        "# Training beside Stable-Baselines3 and plain RLlib",
        "",
        "Written by `make bench-training`. Every measurement ran in a process of its own, one at a",
        "time, the systems in turns, each on one thread.",
        "",
        "* Machine: {cpu}, {n_cpus} CPUs, Python {python}.".format(**facts),
        "* Load over a minute: {load_before} at the start, {load_after} at the end.".format(
            **facts
        ),
        "* Versions: {versions}.".format(**facts),
        "* Ratios are to Stable-Baselines3. CPU seconds are the training process's own, which",
        "  other work on the machine disturbs less than the clock.",
    ]
    for title, rows in tables(results):
        lines += ["", f"## {title}", "", *_markdown_table(rows)]
    return "\n".join([*lines, "", _EXPLANATION, ""])


_EXPLANATION = """## How it was measured

* **Speed**: CartPole-v1, 8 environments side by side in one process, two tanh layers of 64 for the
  policy and two for the value, batches of 1,024 steps, minibatches of 256, 10 epochs, Adam at 1e-3.
  The first three iterations are not counted. Plain RLlib is the same RLlib config with RLlib's own
  environment runner and learner.
* **Seconds to 475**: Stable-Baselines3 with RL Zoo's settings for PPO on CartPole-v1 (8
  environments, 32 steps, batch 256, 20 epochs, lambda 0.8, gamma 0.98, learning rate and clip range
  falling to 0 over 100,000 steps); policyserve with its shipped `ppo-cartpole`. Every 2,048 steps
  the policy plays 20 greedy episodes, off the clock; the first mean of 475 ends the run.
* **The command**: from its first import to its exit, Ray's start and the checkpoints included. It
  stops once an evaluation or 20 training episodes reach its `stop`."""


def _speeds(results: Results) -> list[list[str]]:
    rows = [["system", "median", "ratio", "per CPU second", "ratio", "rounds"]]
    for name, rounds in results.speeds.items():
        cells = [SYSTEMS[name]]
        for unit in ("env_steps_per_s", "env_steps_per_cpu_s"):
            median, base = results.median_speed(name, unit), results.median_speed("sb3", unit)
            cells += [f"{median:,.0f}", f"{median / base:.2f}"]
        shown = ", ".join(f"{found['env_steps_per_s']:,.0f}" for found in rounds)
        rows.append([*cells, shown])
    return rows


def _solved(results: Results) -> list[list[str]]:
    rows = [["system", "median s", "ratio", "CPU seconds", "ratio", "each seed: s (steps)"]]
    for name, runs in results.solved.items():
        cells = [SYSTEMS[name]]
        for unit in ("solved_s", "solved_cpu_s"):
            median, base = results.median_solved(name, unit), results.median_solved("sb3", unit)
            cells.append("never" if median is None else f"{median:.1f}")
            cells.append("-" if median is None or base is None else f"{median / base:.2f}")
        rows.append([*cells, ", ".join(map(_run, runs))])
    return rows


def _run(run: Mapping[str, float | None]) -> str:
    seconds = run["solved_s"]
    steps = f"({run['env_steps'] or 0:,.0f})"
    return f"never {steps}" if seconds is None else f"{seconds:.1f} {steps}"


def _command(results: Results) -> list[list[str]]:
    shown = ", ".join(f"{seconds:.1f}" for seconds in results.commands_s)
    median = statistics.median(results.commands_s)
    return [
        ["median s", "each seed", "goal"],
        [f"{median:.1f}", shown, f"under {COMMAND_GOAL_S:g}"],
    ]


def _markdown_table(rows: list[list[str]]) -> list[str]:
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return [head, "|---" * len(rows[0]) + "|", *body]
