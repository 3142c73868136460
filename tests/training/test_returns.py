from __future__ import annotations

import json

from training.returns import ReturnTracker


def test_the_recent_mean_is_over_the_newest_episodes():
    tracker = ReturnTracker(stop_window=3, best_window=5)
    assert tracker.recent_mean() is None
    tracker.add([1.0, 2.0], [10, 20])
    assert tracker.recent_mean() == 1.5
    tracker.add([3.0, 7.0], [30, 40])
    assert tracker.recent() == ([2.0, 3.0, 7.0], [20, 30, 40])
    assert tracker.recent_mean() == 4.0


def test_a_lucky_first_episode_reaches_no_stop_and_is_no_best():
    tracker = ReturnTracker(stop_window=3, best_window=3)
    tracker.add([500.0, 500.0], [1, 1])
    assert not tracker.has_reached(475)
    assert not tracker.is_best()
    assert tracker.best is None
    tracker.add([500.0], [1])
    assert tracker.has_reached(475)
    assert not tracker.has_reached(500.5)
    assert tracker.is_best()
    assert tracker.best == 500


def test_of_equals_the_later_is_best_and_a_clearly_worse_one_is_not():
    tracker = ReturnTracker(stop_window=2, best_window=4)
    tracker.add([10.0, 20.0, 10.0, 20.0], [1] * 4)
    assert tracker.is_best()  # mean 15, deviation 5, standard error 2.5: the threshold is 12.5
    tracker.add([10.0, 16.0, 10.0, 16.0], [1] * 4)
    assert tracker.is_best()  # 13 is within it
    assert tracker.best == 13
    tracker.add([10.0, 14.0, 10.0, 14.0], [1] * 4)
    assert not tracker.is_best()  # 12 is not, and the threshold did not sink with the 13
    assert tracker.best == 13


def test_a_restored_tracker_judges_as_the_first_would():
    first = ReturnTracker(stop_window=2, best_window=4)
    first.add([10.0, 20.0, 10.0, 20.0], [5, 6, 7, 8])
    first.is_best()
    second = ReturnTracker(stop_window=2, best_window=4)
    second.restore(json.loads(json.dumps(first.state())))
    assert second.recent() == ([10.0, 20.0], [7, 8])
    assert second.best == 15
    second.add([10.0, 14.0, 10.0, 14.0], [1] * 4)
    assert not second.is_best()
    second.forget_best()
    assert second.is_best()


def test_a_tracker_without_a_best_restores_too():
    first = ReturnTracker(stop_window=2, best_window=4)
    second = ReturnTracker(stop_window=2, best_window=4)
    second.restore(json.loads(json.dumps(first.state())))
    assert second.best is None
    assert second.recent_mean() is None
