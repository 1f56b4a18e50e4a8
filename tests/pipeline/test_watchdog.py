"""Who hangs: found out from signs of life, by a clock of the test's own."""

import threading
from dataclasses import replace

import pytest

from pipeline.watchdog import BEAT_SECONDS, SILENT_BEATS, Beat, Hang, Pulse, Watch, explain, first_beat

LIMIT = 60.0
SILENCE = SILENT_BEATS * BEAT_SECONDS


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def watch(clock: Clock) -> Watch:
    return Watch(LIMIT, clock)


def beat(rank: int, still: float = 0.0, waiting: bool = False, activity: str = "step", group: str = "a") -> Beat:
    return Beat(group, rank, 2, 12, activity, still, "pipeline/stream.py:300 (__iter__)", waiting, 4000 + rank, "node")


def ranks(hangs: list[Hang]) -> list[tuple[int, bool]]:
    return [(hang.beat.rank, hang.is_silent) for hang in hangs]


def test_nobody_hangs_while_all_move(watch: Watch, clock: Clock) -> None:
    assert watch.hanging() == []
    for _ in range(100):
        clock.now += 1
        watch.hear(beat(0, 3.0))
        watch.hear(beat(1, 59.0, waiting=True))
        assert watch.hanging() == []


def test_a_frozen_process_is_told_from_those_that_wait_for_it(watch: Watch, clock: Clock) -> None:
    watch.hear(beat(1))
    for second in range(int(LIMIT)):
        watch.hear(beat(0, float(second), waiting=True))
        assert watch.hanging() == []
        clock.now += 1
    watch.hear(beat(0, LIMIT, waiting=True))
    assert ranks(watch.hanging()) == [(1, True)]


def test_a_worker_that_computes_for_ever_is_told_from_those_that_wait_for_it(watch: Watch) -> None:
    watch.hear(beat(0, LIMIT + 1, waiting=True))
    watch.hear(beat(1, LIMIT + 1))
    assert ranks(watch.hanging()) == [(1, False)]


def test_where_all_wait_for_each_other_all_are_ended(watch: Watch) -> None:
    for rank in (0, 1):
        watch.hear(beat(rank, LIMIT, waiting=True))
    assert ranks(watch.hanging()) == [(0, False), (1, False)]


def test_an_evaluation_may_take_its_time_unless_its_process_is_frozen(watch: Watch, clock: Clock) -> None:
    watch.hear(beat(0, 10 * LIMIT, activity="evaluation"))
    watch.hear(beat(1, 10 * LIMIT, activity="evaluation", waiting=True))
    assert watch.hanging() == []
    clock.now += SILENCE + 1
    watch.hear(beat(0, 10 * LIMIT, activity="evaluation"))
    assert ranks(watch.hanging()) == [(1, True)]


def test_silence_alone_is_no_hang(watch: Watch, clock: Clock) -> None:
    """A busy machine may keep a thread waiting for long, as long as the training moves."""
    watch.hear(beat(0))
    watch.hear(beat(1))
    clock.now += LIMIT - 1
    assert watch.hanging() == []


def test_a_new_group_makes_the_old_one_forgotten(watch: Watch, clock: Clock) -> None:
    for rank in (0, 1):
        watch.hear(beat(rank))
    clock.now += LIMIT + 1
    watch.hear(beat(0, group="b"))
    assert watch.hanging() == []
    clock.now += LIMIT + 1
    watch.forget()
    assert watch.hanging() == []


def test_a_pulse_says_where_its_thread_stands() -> None:
    beats: list[Beat] = []
    heard, go_on = threading.Event(), threading.Event()

    def hear(beat: Beat) -> None:
        beats.append(beat)
        heard.set()

    def train() -> None:
        pulse = Pulse(first_beat("a", 1, 2, "node"), hear)
        pulse.at(7, "step")
        go_on.wait(60)
        pulse.stop()

    thread = threading.Thread(target=train)
    thread.start()
    assert heard.wait(60)
    go_on.set()
    thread.join()
    assert (beats[0].rank, beats[0].step, beats[0].activity, beats[0].is_waiting) == (1, 7, "step", False)
    assert beats[0].where.startswith("tests/pipeline/test_watchdog.py:")
    assert beats[0].where.endswith("(train)")
    assert 0 <= beats[0].seconds_still < 60


def test_what_the_user_is_told() -> None:
    told = explain(Hang(replace(beat(1), node_id="abcdef0123456"), True, 61.4), "images 17, 23")
    assert told.startswith(
        "worker 1 (process 4001 on node abcdef01) hangs in step 12, on images 17, 23: it gives no sign of life"
    )
    assert "nothing has moved for 61 s" in told
    assert "stands in pipeline/stream.py:300" in explain(Hang(beat(1), False, 61.4), "images 17")
