"""Laws of the plan, for any number of rows, workers, batch sizes and canvases (hypothesis)."""

from collections import Counter

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.stream import StreamPlan, planned_blocks


@st.composite
def plans(draw: st.DrawFn, batch_size: int | None = None) -> StreamPlan:
    num_rows = draw(st.integers(1, 70))
    num_canvases = draw(st.integers(1, 3))
    canvases = draw(st.lists(st.integers(0, num_canvases - 1), min_size=num_rows, max_size=num_rows))
    return StreamPlan(
        np.array(canvases, dtype=np.int64),
        rows_per_shard=draw(st.integers(1, 12)),
        shuffle_window=draw(st.integers(1, 5)),
        global_batch_size=batch_size or draw(st.integers(1, 24)),
        seed=draw(st.integers(0, 2**32)),
    )


def seen(plan: StreamPlan, first: int, end: int, workers: int, per_block: int) -> list[tuple[int, ...]]:
    """Position and place of every row in the order of the steps, put together from what each worker gets."""
    blocks = planned_blocks(plan, first, end, workers, per_block)
    assert len(blocks) % workers == 0
    streams = [
        [tuple(row.values()) for row in pa.concat_tables(blocks[worker::workers]).to_pylist()] if blocks else []
        for worker in range(workers)
    ]
    share = plan.global_batch_size // workers
    found = [
        place
        for step in range(end - first)
        for stream in streams
        for place in stream[step * share : (step + 1) * share]
    ]
    assert sum(map(len, streams)) == len(found)
    return found


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_every_row_as_often_as_planned(data: st.DataObject) -> None:
    """Over all workers, once in each epoch; but for what still waits, at the end, to fill a step of its canvas."""
    workers = data.draw(st.integers(1, 8))
    plan = data.draw(plans(batch_size=workers * data.draw(st.integers(1, 5))))
    epochs = data.draw(st.integers(1, 4))
    planned = Counter((epoch, int(row)) for epoch in range(epochs) for row in plan.epoch_order(epoch))
    assert set(planned.values()) == {1}
    assert len(planned) == epochs * plan.num_rows
    of_canvas = Counter(int(plan.row_canvases[row]) for _, row in planned.elements())
    num_steps = sum(count // plan.global_batch_size for count in of_canvas.values())
    places = seen(plan, 0, num_steps, workers, data.draw(st.integers(1, 5)))
    assert [place[0] for place in places] == list(range(num_steps * plan.global_batch_size))
    came = Counter((epoch, row) for _, epoch, row in places)
    assert not came - planned
    waiting = Counter(int(plan.row_canvases[row]) for _, row in (planned - came).elements())
    assert all(waiting[canvas] == count % plan.global_batch_size for canvas, count in of_canvas.items())
    for start in range(0, len(places), plan.global_batch_size):
        rows = [row for _, _, row in places[start : start + plan.global_batch_size]]
        assert len(set(plan.row_canvases[rows].tolist())) == 1, "the rows of a step share a canvas"


@given(plans(), st.integers(1, 12))
@settings(max_examples=100, deadline=None)
def test_equal_seeds_equal_order(plan: StreamPlan, steps: int) -> None:
    again = StreamPlan(**{**vars(plan), "row_canvases": plan.row_canvases.copy()})
    assert seen(plan, 0, steps, 1, 2) == seen(again, 0, steps, 1, 2)
    other = StreamPlan(**{**vars(plan), "seed": plan.seed + 1})
    if plan.num_rows > 20:
        assert plan.epoch_order(0).tolist() != other.epoch_order(0).tolist()


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_stopped_anywhere_and_continued_with_other_workers_is_exactly_the_rest(data: st.DataObject) -> None:
    before, after = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 8))
    plan = data.draw(plans(batch_size=int(np.lcm(before, after)) * data.draw(st.integers(1, 2))))
    last = data.draw(st.integers(1, 10))
    stop = data.draw(st.integers(0, last))
    first_part = seen(plan, 0, stop, before, data.draw(st.integers(1, 5)))
    second_part = seen(plan, stop, last, after, data.draw(st.integers(1, 5)))
    assert first_part + second_part == seen(plan, 0, last, 1, 3)
