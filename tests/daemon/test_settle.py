from collections.abc import Callable

import pytest

from pic_daemon.folders import FileStamp
from pic_daemon.settle import SettleTracker

SMALL, LARGE = FileStamp(10, 1, 7), FileStamp(20, 2, 7)


def test_a_file_that_stands_still_is_due_once() -> None:
    tracker = SettleTracker(2.0)
    tracker.wait("a", SMALL, now=100.0, seen_at=5.0)
    assert tracker.due(101.9) == []
    assert tracker.next_due() == 102.0
    assert tracker.due(102.0) == [("a", SMALL)]
    assert tracker.due(103.0) == []
    assert tracker.release("a") == 5.0
    assert len(tracker) == 0


def test_a_file_that_grows_waits_anew_and_keeps_when_it_was_first_seen() -> None:
    tracker = SettleTracker(2.0)
    tracker.wait("a", SMALL, now=100.0, seen_at=5.0)
    tracker.wait("a", LARGE, now=101.0, seen_at=6.0)
    assert tracker.due(102.5) == []
    assert tracker.due(103.0) == [("a", LARGE)]
    assert tracker.release("a") == 5.0


@pytest.mark.parametrize(
    "after",
    [lambda n: FileStamp(n, n, n), lambda n: FileStamp(5 - n % 2, n, 7)],
    ids=["replaced", "written over"],
)
def test_a_file_that_never_stands_still_is_due_after_thirty_waits(
    after: Callable[[int], FileStamp],
) -> None:
    tracker = SettleTracker(2.0)
    for second in range(60):
        stamp = after(second)
        tracker.wait("a", stamp, now=100.0 + second, seen_at=5.0 + second)
        assert tracker.due(100.0 + second) == []
        assert not tracker.overdue("a", 100.0 + second)
    assert tracker.due(160.0) == [("a", stamp)]
    assert tracker.overdue("a", 160.0)
    assert tracker.release("a") == 5.0
    assert not tracker.overdue("a", 160.0)


def test_an_upload_is_waited_for_however_long_it_takes() -> None:
    tracker = SettleTracker(2.0)
    for second in range(600):
        stamp = FileStamp(second, second, 7)
        tracker.wait("a", stamp, now=100.0 + second, seen_at=5.0)
        assert tracker.due(100.0 + second) == []
    assert not tracker.overdue("a", 700.0)
    assert tracker.due(701.0) == [("a", stamp)]


def test_seeing_an_unchanged_file_again_does_not_prolong_its_wait() -> None:
    tracker = SettleTracker(2.0)
    tracker.wait("a", SMALL, now=100.0, seen_at=5.0)
    tracker.wait("a", SMALL, now=101.0, seen_at=6.0)
    assert tracker.due(102.0) == [("a", SMALL)]


def test_a_released_file_is_never_due() -> None:
    tracker = SettleTracker(2.0)
    tracker.wait("a", SMALL, now=100.0, seen_at=5.0)
    tracker.release("a")
    assert tracker.due(200.0) == []
    assert tracker.next_due() is None


def test_a_file_that_met_trouble_waits_longer() -> None:
    tracker = SettleTracker(2.0)
    tracker.wait("a", SMALL, now=100.0, seen_at=5.0, longer=30.0)
    assert tracker.due(131.9) == []
    assert tracker.due(132.0) == [("a", SMALL)]
