"""Laws of the plan, for any number of rows, workers, batch sizes and canvases (hypothesis)."""

from collections import Counter

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.stream import Step, StreamPlan, planned_blocks

Place = tuple[int, int, int, int]


@st.composite
def plans(draw: st.DrawFn, batch_size: int | None = None) -> StreamPlan:
    num_rows = draw(st.integers(1, 70))
    num_canvases = draw(st.integers(1, 3))
    canvases = draw(st.lists(st.integers(0, num_canvases - 1), min_size=num_rows, max_size=num_rows))
    factors = draw(st.none() | st.lists(st.floats(1, 3.5), min_size=num_rows, max_size=num_rows))
    return StreamPlan(
        np.array(canvases, dtype=np.int64),
        rows_per_shard=draw(st.integers(1, 12)),
        shuffle_window=draw(st.integers(1, 5)),
        global_batch_size=batch_size or draw(st.integers(1, 24)),
        seed=draw(st.integers(0, 2**32)),
        repeat_factors=None if factors is None else np.array(factors),
    )


def places(steps: list[Step]) -> list[Place]:
    return [tuple(int(number) for number in place) for step in steps for place in zip(*step[1:], strict=True)]  # type: ignore[misc]


def of_epochs(plan: StreamPlan, epochs: int) -> Counter[tuple[int, int]]:
    """How often each row has to come in each epoch."""
    planned: Counter[tuple[int, int]] = Counter()
    for epoch in range(epochs):
        for row, count in enumerate(plan.row_counts(epoch).tolist()):
            planned[epoch, row] = count
    return planned


@given(plans())
@settings(max_examples=150, deadline=None)
def test_every_row_stands_in_an_epoch_as_often_as_planned(plan: StreamPlan) -> None:
    for epoch in range(3):
        counts = plan.row_counts(epoch)
        order = plan.epoch_order(epoch)
        np.testing.assert_array_equal(np.bincount(order, minlength=plan.num_rows), counts)
        assert len(order) == plan.epoch_length(epoch)
        factors = np.ones(plan.num_rows) if plan.repeat_factors is None else plan.repeat_factors
        assert (np.abs(counts - factors) < 1 + 1e-5).all()
        assert abs(len(order) - factors.sum()) < 1 + 1e-3
        if plan.repeat_factors is None:
            assert counts.tolist() == [1] * plan.num_rows


@given(plans(), st.integers(1, 4))
@settings(max_examples=150, deadline=None)
def test_a_run_shows_every_row_as_often_as_planned(plan: StreamPlan, epochs: int) -> None:
    """But for what still waits, at the end, to fill a step of its canvas: less than a batch for each."""
    planned = of_epochs(plan, epochs)
    by_canvas: Counter[int] = Counter()
    for (_, row), count in planned.items():
        by_canvas[int(plan.row_canvases[row])] += count
    steps = list(plan.steps(0, sum(count // plan.global_batch_size for count in by_canvas.values())))
    seen = Counter((epoch, row) for epoch, row, _, _ in places(steps))
    assert all(seen[place] <= planned[place] for place in seen)
    left = Counter(planned)
    left.subtract(seen)
    waiting: Counter[int] = Counter()
    for (_, row), count in left.items():
        waiting[int(plan.row_canvases[row])] += count
    assert all(waiting[canvas] == by_canvas[canvas] % plan.global_batch_size for canvas in by_canvas)
    for step in steps:
        assert len(step.rows) == plan.global_batch_size
        assert len(set(plan.row_canvases[step.rows].tolist())) == 1
    for (epoch, row), count in seen.items():
        repeats = sorted(r for e, other, r, _ in places(steps) if (e, other) == (epoch, row))
        assert repeats == list(range(planned[epoch, row]))[: len(repeats)] or count < planned[epoch, row]
        assert len(set(repeats)) == count, "no two places of a run are the same"


@given(plans())
@settings(max_examples=50, deadline=None)
def test_equal_seeds_equal_order(plan: StreamPlan) -> None:
    again = StreamPlan(**{**vars(plan), "row_canvases": plan.row_canvases.copy()})
    assert places(list(plan.steps(0, 12))) == places(list(again.steps(0, 12)))
    other = StreamPlan(**{**vars(plan), "seed": plan.seed + 1})
    if plan.num_rows > 20:
        assert places(list(plan.steps(0, 12))) != places(list(other.steps(0, 12)))


@given(plans())
@settings(max_examples=50, deadline=None)
def test_partners_are_rows_of_the_window_each_as_often_as_planned(plan: StreamPlan) -> None:
    for epoch, windows in ((epoch, plan._windows(epoch)) for epoch in range(2)):
        table, start = plan._places(epoch), 0
        for window in windows:
            part = table[start : start + len(window)]
            assert sorted(part[:, 3].tolist()) == sorted(part[:, 1].tolist()) == sorted(window.tolist())
            start += len(window)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_stopped_anywhere_and_continued_with_other_workers_is_exactly_the_rest(data: st.DataObject) -> None:
    before, after = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 8))
    size = int(np.lcm(before, after)) * data.draw(st.integers(1, 2))
    plan = data.draw(plans(batch_size=size))
    last = data.draw(st.integers(1, 10))
    stop = data.draw(st.integers(0, last))

    def seen(first: int, end: int, workers: int, per_block: int) -> list[tuple[int, ...]]:
        """Positions and places in the order of the steps, put together from what every worker gets."""
        blocks = planned_blocks(plan, first, end, workers, per_block)
        assert len(blocks) % workers == 0
        found: list[tuple[int, ...]] = []
        streams = [
            [tuple(row.values()) for row in pa.concat_tables(blocks[worker::workers]).to_pylist()] if blocks else []
            for worker in range(workers)
        ]
        share = size // workers
        for step in range(end - first):
            for stream in streams:
                found += stream[step * share : (step + 1) * share]
        assert sum(map(len, streams)) == len(found)
        return found

    whole = seen(0, last, 1, 3)
    assert [place[0] for place in whole] == list(range(last * size))
    parts = seen(0, stop, before, data.draw(st.integers(1, 5))) + seen(stop, last, after, data.draw(st.integers(1, 5)))
    assert parts == whole
