"""What a load test says: its limits, its remarks and its report."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from loadtests.recording import OK, REJECTED
from loadtests.report import render, write_report
from loadtests.steps import Step
from loadtests.summary import summarise
from loadtests.verdicts import Limits, broken_limits, limit_note, remarks
from tests.loadtests.conftest import recording_of, step_of

DESCRIBED = {"policy": "cartpole", "version": 1, "policy_id": "0123456789ab"}


def summary_of(*steps: Step) -> dict[str, Any]:
    return summarise(steps, DESCRIBED)


def failing(n_rejected: int, n_failed: int, *, n: int = 100, latency_ms: float = 7.0) -> Step:
    outcomes = [OK] * (n - n_rejected - n_failed) + [REJECTED] * n_rejected + ["boom"] * n_failed
    return step_of(recording_of([latency_ms] * n, outcomes=outcomes))


def test_a_run_within_its_limits_breaks_none() -> None:
    summary = summary_of(failing(0, 2))
    assert broken_limits(summary, Limits(max_p99_ms=8.0, max_error_rate=0.02)) == []


def test_errors_over_the_limit_are_told_with_their_share_and_the_most_frequent() -> None:
    (line,) = broken_limits(summary_of(failing(0, 3)), Limits(max_error_rate=0.02))
    assert "3 of 100" in line
    assert "3.00%" in line
    assert "2.00%" in line
    assert "boom" in line


def test_a_slow_tail_is_told_with_how_much_it_is_over() -> None:
    (line,) = broken_limits(summary_of(failing(0, 0)), Limits(max_p99_ms=3.5))
    assert "7.00 ms" in line
    assert "2.0 times the limit of 3.5 ms" in line


def test_rejected_requests_are_errors_unless_they_are_allowed() -> None:
    summary = summary_of(failing(30, 0))
    assert len(broken_limits(summary, Limits())) == 1
    assert broken_limits(summary, Limits(allow_rejected=True)) == []
    assert len(broken_limits(summary_of(failing(30, 1)), Limits(allow_rejected=True))) == 1


def test_a_run_without_an_answer_is_never_within_its_limits() -> None:
    for step in (failing(0, 100), failing(100, 0), step_of(recording_of([]))):
        (line,) = broken_limits(summary_of(step), Limits(max_error_rate=1.0, allow_rejected=True))
        assert "none of" in line


def test_a_sweep_names_the_step_that_broke_a_limit() -> None:
    fast = step_of(recording_of([1.0] * 10), users=1)
    slow = step_of(recording_of([9.0] * 10), users=16)
    (line,) = broken_limits(summary_of(fast, slow), Limits(max_p99_ms=5.0))
    assert "at 16 users" in line


def test_memory_that_grows_too_fast_breaks_its_limit() -> None:
    step = step_of(recording_of([1.0] * 10, duration_s=100.0))
    step.samples.rss_mb[:] = [100.0 + second / 36.0 for second in range(100)]  # 100 MB/h
    summary = summary_of(step)
    (line,) = broken_limits(summary, Limits(max_memory_growth_mb_per_h=50.0))
    assert "100.0 MB/h" in line
    assert broken_limits(summary, Limits(max_memory_growth_mb_per_h=150.0)) == []
    assert any("memory grew" in each for each in remarks(summary))


def test_a_run_whose_driver_was_the_limit_says_that_it_is_void() -> None:
    good = summary_of(step_of(recording_of([1.0] * 10)))
    assert limit_note(good) == ""
    assert not any("Void" in line for line in remarks(good))
    bad = summary_of(step_of(recording_of([1.0] * 10, cpu_percent=97.0)))
    assert "driver" in limit_note(bad)
    (line,) = [line for line in remarks(bad) if "Void" in line]
    assert "97 % of a core" in line


def test_a_small_sample_is_said_to_have_no_last_percentile() -> None:
    assert any("10,000" in line for line in remarks(summary_of(failing(0, 0))))
    large = step_of(recording_of([1.0] * 10_000))
    assert not any("10,000" in line for line in remarks(summary_of(large)))


class _Page(HTMLParser):
    """Collects what a page would load, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href") and not (value or "").startswith("#"):
                self.loads.append(f"{tag} {name}={value}")

    def handle_data(self, data: str) -> None:
        self.text += f" {data}"


def page_of(text: str) -> _Page:
    page = _Page()
    page.feed(text)
    return page


STEPS = {
    "single": [step_of(recording_of([1.0 + n % 7 for n in range(500)], returns=(9.0, 10.0, 30.0)))],
    "open": [step_of(recording_of([1.0 + n % 7 for n in range(500)]), rate=50.0)],
    "sweep": [
        step_of(recording_of([float(users)] * 100 * users, cpu_percent=60.0 * users), users=users)
        for users in (1, 2)
    ],
    "failed": [failing(0, 100)],
    "nothing": [step_of(recording_of([]))],
    "one": [step_of(recording_of([1.0], duration_s=0.05))],
}


N_FIGURES = {"single": 4, "open": 3, "sweep": 3, "failed": 2, "nothing": 2, "one": 1}


@pytest.mark.parametrize("name", STEPS)
def test_a_report_of_any_run_stands_alone(name: str) -> None:
    steps = STEPS[name]
    summary = summary_of(*steps)
    page = page_of(render(steps, summary, broken_limits(summary, Limits())))
    assert page.loads == []
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert "cartpole" in page.text
    assert page.tags.count("svg") == N_FIGURES[name]


def test_a_report_tells_figures_verdicts_and_errors() -> None:
    steps = [failing(3, 2)]
    summary = summary_of(*steps)
    broken = broken_limits(summary, Limits(max_p99_ms=1.0))
    text = re.sub(r"\s+", " ", page_of(render(steps, summary, broken)).text)
    for line in broken:
        assert line in text
    assert "rejected (HTTP 503) 3" in text
    assert "boom 2" in text
    assert "7.00" in text
    assert "Every limit was kept" not in text


def test_what_a_server_says_is_no_html_in_the_report() -> None:
    evil = "<script>alert(1)</script>"
    step = step_of(recording_of([1.0, 1.0], outcomes=[OK, evil]))
    text = render([step], summarise([step], {**DESCRIBED, "policy": "<b>x</b>"}), [evil])
    assert "<script" not in text
    assert "<b>x" not in text
    assert evil in page_of(text).text


def test_everything_that_is_left_agrees(tmp_path: Path) -> None:
    steps = STEPS["sweep"]
    summary = summary_of(*steps)
    write_report(tmp_path, steps, summary, [])
    assert json.loads((tmp_path / "summary.json").read_text()) == json.loads(json.dumps(summary))
    with (tmp_path / "windows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sum(int(row["n_requests"]) for row in rows) == summary["n_requests"] == 300
    assert {row["users"] for row in rows} == {"1", "2"}
    assert "Latency against throughput" in (tmp_path / "report.html").read_text()
