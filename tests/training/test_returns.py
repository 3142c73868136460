from __future__ import annotations

import json

from training.episodes import PlayedEpisode
from training.returns import BestPolicy, ReturnTracker


def episodes(*returns: float, length: int = 1) -> list[PlayedEpisode]:
    return [PlayedEpisode(value, length, terminated=True, truncated=False) for value in returns]


def test_the_recent_mean_is_over_the_newest_episodes():
    tracker = ReturnTracker(stop_window=3, best_window=5)
    assert tracker.recent_mean() is None
    tracker.add(episodes(1.0, 2.0, length=10))
    assert tracker.recent_mean() == 1.5
    tracker.add(episodes(3.0, 7.0, length=30))
    assert tracker.recent() == ([2.0, 3.0, 7.0], [10, 30, 30])
    assert tracker.recent_mean() == 4.0


def test_a_lucky_first_episode_reaches_no_stop_and_is_judged_by_nobody():
    tracker = ReturnTracker(stop_window=3, best_window=3)
    tracker.add(episodes(500.0, 500.0))
    assert not tracker.has_reached(475)
    assert tracker.best_window() == []
    tracker.add(episodes(500.0))
    assert tracker.has_reached(475)
    assert not tracker.has_reached(500.5)
    assert tracker.best_window() == [500.0] * 3


def test_a_restored_tracker_goes_on_where_the_first_was():
    first = ReturnTracker(stop_window=2, best_window=4)
    first.add(episodes(10.0, 20.0, 10.0, 20.0, length=7))
    second = ReturnTracker(stop_window=2, best_window=4)
    second.restore(json.loads(json.dumps(first.state())))
    assert second.recent() == ([10.0, 20.0], [7, 7])
    assert second.best_window() == [10.0, 20.0, 10.0, 20.0]


def test_of_equals_the_later_is_best_and_a_clearly_worse_one_is_not():
    best = BestPolicy()
    assert not best.is_best([])
    assert best.mean is None
    # Mean 15, deviation 5, standard error 2.5: the threshold is 12.5.
    assert best.is_best([10.0, 20.0, 10.0, 20.0])
    assert best.is_best([10.0, 16.0, 10.0, 16.0])  # 13 is within it
    assert best.mean == 13
    # 12 is not, and the threshold did not sink with the 13.
    assert not best.is_best([10.0, 14.0, 10.0, 14.0])
    assert best.mean == 13


def test_a_restored_best_judges_as_the_first_would():
    first = BestPolicy()
    first.is_best([10.0, 20.0, 10.0, 20.0])
    second = BestPolicy()
    second.restore(json.loads(json.dumps(first.state())))
    assert second.mean == 15
    assert not second.is_best([10.0, 14.0, 10.0, 14.0])
    second.forget()
    assert second.is_best([10.0, 14.0, 10.0, 14.0])


def test_a_best_of_nothing_restores_too():
    second = BestPolicy()
    second.restore(json.loads(json.dumps(BestPolicy().state())))
    assert second.mean is None
    assert second.is_best([-1000.0])
