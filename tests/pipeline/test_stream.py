import dataclasses
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import torch

from model.structures import Batch
from pipeline.augment import augment, flip
from pipeline.batches import PlannedBatches
from pipeline.config import AugmentSettings
from pipeline.errors import UserError
from pipeline.prepare import prepare
from pipeline.sample import SAMPLE_SCHEMA, sample_from_row, sample_to_values
from pipeline.shards import MANIFEST, ShardSet
from pipeline.stream import (
    FURTHER_PLACE,
    MAX_BLOCK_BYTES,
    MAX_STEPS_PER_BLOCK,
    LoadBlock,
    PauseBetweenSteps,
    StreamPlan,
    planned_blocks,
    random_key,
    split_stream,
    steps_per_block,
)
from tests.pipeline.factories import CANVASES, Prepared, experiment

Step = tuple[int, list[int], list[int]]


def make_plan(
    num_rows: int = 21, batch: int = 4, seed: int = 0, canvases: Sequence[int] | None = None, window: int = 2
) -> StreamPlan:
    row_canvases = np.zeros(num_rows, dtype=np.int64) if canvases is None else np.array(canvases, dtype=np.int64)
    return StreamPlan(row_canvases, rows_per_shard=4, shuffle_window=window, global_batch_size=batch, seed=seed)


def steps_of(plan: StreamPlan, first: int, last: int) -> list[Step]:
    return [(step, epochs.tolist(), rows.tolist()) for step, epochs, rows in plan.steps(first, last)]


THREE_CANVASES = np.random.default_rng(0).choice(3, size=37, p=[0.6, 0.3, 0.1]).tolist()


@pytest.mark.parametrize("num_rows", [1, 3, 4, 21, 64, 100])
@pytest.mark.parametrize("window", [1, 2, 100])
def test_every_epoch_is_a_permutation(num_rows: int, window: int) -> None:
    plan = make_plan(num_rows, window=window)
    for epoch in range(5):
        assert sorted(plan.epoch_order(epoch).tolist()) == list(range(num_rows))


def test_order_is_a_function_of_seed_and_epoch() -> None:
    orders = [make_plan(64, seed=seed).epoch_order(epoch).tolist() for seed in range(3) for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 9
    assert orders == [make_plan(64, seed=seed).epoch_order(epoch).tolist() for seed in range(3) for epoch in range(3)]


def test_rows_of_a_window_are_shuffled_together_and_windows_kept_apart() -> None:
    """What is read at the same time lies in a few shards."""
    order = make_plan(64, window=4).epoch_order(0)  # 16 shards of 4 rows in windows of 4 shards
    windows = order.reshape(4, 16)
    for rows in windows:
        assert len(set((rows // 4).tolist())) == 4
        shards_in_turn = rows // 4
        assert (np.diff(shards_in_turn) != 0).sum() > 3  # rows of a shard do not stand together
    assert sorted((windows // 4).ravel().tolist()) == sorted([shard for shard in range(16) for _ in range(4)])
    # Windows are drawn anew in every epoch.
    other = make_plan(64, window=4).epoch_order(1).reshape(4, 16)
    assert {frozenset((rows // 4).tolist()) for rows in windows} != {frozenset((rows // 4).tolist()) for rows in other}


def test_every_row_comes_about_equally_often_at_every_place() -> None:
    first = Counter(int(make_plan(8, seed=seed).epoch_order(0)[0]) for seed in range(2000))
    np.testing.assert_allclose([first[row] for row in range(8)], 250, atol=75)  # five standard deviations


def test_rows_stand_in_an_epoch_as_often_as_their_repeats_say() -> None:
    repeats = np.array([1.0, 3.0, 0.5, 1.5] * 5 + [0.0])
    plan = dataclasses.replace(make_plan(21), row_repeats=repeats)
    assert plan.num_rows == 30
    assert plan.steps_of_epochs(2) == 15
    for epoch in range(10):
        counts = np.bincount(plan.epoch_order(epoch), minlength=21)
        assert counts.sum() == 30
        assert (np.floor(repeats) <= counts).all()
        assert (counts <= np.ceil(repeats)).all()
    # Every place has draws of its own: no (epoch, row) twice, further places far from any real epoch.
    places = [(e, r) for _, epochs, rows in steps_of(plan, 0, 15) for e, r in zip(epochs, rows, strict=True)]
    assert len(set(places)) == len(places) == 60
    assert {epoch % FURTHER_PLACE for epoch, _ in places} == {0, 1}
    assert {epoch // FURTHER_PLACE for epoch, row in places if row % 4 == 1 and row < 20} == {0, 1, 2}
    assert len({random_key(0, epoch, row) for epoch, row in places}) == 60


@pytest.mark.parametrize("batch", [1, 2, 4, 5, 21, 50])
def test_the_run_is_the_concatenation_of_its_epochs(batch: int) -> None:
    plan = make_plan(21, batch=batch)
    steps = steps_of(plan, 0, 60)
    assert [step for step, _, _ in steps] == list(range(60))
    rows = [row for _, _, rows in steps for row in rows]
    epochs = [epoch for _, epochs, _ in steps for epoch in epochs]
    whole = np.concatenate([plan.epoch_order(epoch) for epoch in range(60 * batch // 21 + 1)])
    assert rows == whole[: 60 * batch].tolist()
    assert epochs == [place // 21 for place in range(60 * batch)]


@pytest.mark.parametrize("batch", [1, 2, 3, 6, 8])
def test_every_row_is_seen_exactly_as_planned(batch: int) -> None:
    """With several canvases: once an epoch, but for what still waits to fill a step of its canvas."""
    plan = make_plan(37, batch=batch, canvases=THREE_CANVASES)
    num_epochs = 7
    counts = np.bincount(THREE_CANVASES, minlength=3)
    full_steps = sum(int(number) * num_epochs // batch for number in counts)
    seen: Counter[tuple[int, int]] = Counter()
    for _, epochs, rows in plan.steps(0, full_steps):
        assert len(set(plan.row_canvases[rows].tolist())) == 1  # all rows of a step share a canvas
        seen.update(zip(epochs.tolist(), rows.tolist(), strict=True))
    assert set(seen.values()) == {1}
    expected = {(epoch, row) for epoch in range(num_epochs) for row in range(37)}
    assert set(seen) <= expected
    left = Counter(THREE_CANVASES[row] for _, row in expected - set(seen))
    assert left == Counter({canvas: int(n) * num_epochs % batch for canvas, n in enumerate(counts)})


def test_waiting_rows_come_in_their_order() -> None:
    plan = make_plan(37, batch=5, canvases=THREE_CANVASES)
    whole = [(epoch, int(row)) for epoch in range(12) for row in plan.epoch_order(epoch)]
    for canvas in range(3):
        planned = [place for place in whole if THREE_CANVASES[place[1]] == canvas]
        found = [
            place
            for _, epochs, rows in steps_of(plan, 0, 60)
            for place in zip(epochs, rows, strict=True)
            if THREE_CANVASES[place[1]] == canvas
        ]
        assert found == planned[: len(found)]
        assert len(found) > 20


def test_steps_are_taken_when_they_are_full() -> None:
    """By hand: rows 0, 1 on one canvas, 2 on another; batches of two."""
    plan = make_plan(3, batch=2, canvases=[0, 0, 1])
    orders = [plan.epoch_order(epoch).tolist() for epoch in range(2)]
    first = [row for row in orders[0] if row < 2]
    second = [row for row in orders[1] if row < 2]
    steps = steps_of(plan, 0, 3)
    assert steps[0] == (0, [0, 0], first)
    later = [(step[1], step[2]) for step in steps[1:]]
    mixed, pure = ([0, 1], [2, 2]), ([1, 1], second)
    last_pure = max(orders[1].index(row) for row in second)
    assert later == ([mixed, pure] if orders[1].index(2) < last_pure else [pure, mixed])


@pytest.mark.parametrize("canvases", [None, THREE_CANVASES])
@pytest.mark.parametrize("step", [0, 1, 7, 29, 40])
def test_going_on_at_a_step_gives_exactly_the_rest(canvases: list[int] | None, step: int) -> None:
    plan = make_plan(37, batch=4, canvases=canvases)
    assert steps_of(plan, step, 40) == steps_of(plan, 0, 40)[step:]


def test_seed_decides_the_order() -> None:
    for canvases in (None, THREE_CANVASES):
        first, again, other = (steps_of(make_plan(37, seed=seed, canvases=canvases), 0, 20) for seed in (1, 1, 2))
        assert first == again
        assert first != other


@pytest.mark.parametrize(
    ("rows", "batch", "epochs", "steps"),
    [(21, 4, 1, 6), (21, 4, 4, 21), (20, 4, 1, 5), (20, 4, 0.5, 3), (1500, 8, 5, 938), (3, 8, 1, 1), (10, 1, 0.1, 1)],
)
def test_steps_of_epochs_by_hand(rows: int, batch: int, epochs: float, steps: int) -> None:
    assert make_plan(rows, batch=batch).steps_of_epochs(epochs) == steps


@pytest.mark.parametrize("num_workers", [1, 2, 3])
@pytest.mark.parametrize("batch", [6, 12])
@pytest.mark.parametrize("per_block", [1, 4, 100])
@pytest.mark.parametrize("canvases", [None, THREE_CANVASES])
def test_blocks_of_all_workers_are_the_order_of_one(
    num_workers: int, batch: int, per_block: int, canvases: list[int] | None
) -> None:
    plan = make_plan(37, batch=batch, canvases=canvases)
    blocks = planned_blocks(plan, 3, 14, num_workers, per_block)
    assert len(blocks) % num_workers == 0
    size = batch // num_workers
    streams = [pa.concat_tables(blocks[worker::num_workers]).to_pydict() for worker in range(num_workers)]
    for block in blocks:
        assert block.num_rows <= per_block * size
    for stream in streams:
        assert len(stream["position"]) == 11 * size
    for index, (step, epochs, rows) in enumerate(steps_of(plan, 3, 14)):
        part = slice(index * size, (index + 1) * size)
        joined = {name: [value for stream in streams for value in stream[name][part]] for name in streams[0]}
        assert joined == {
            "position": list(range(step * batch, (step + 1) * batch)),
            "epoch": epochs,
            "row": rows,
        }


def test_the_first_blocks_are_small_so_that_the_first_batch_comes_soon() -> None:
    blocks = planned_blocks(make_plan(), 3, 17, 2, 4)
    assert [block.num_rows // 2 for block in blocks[::2]] == [1, 1, 2, 4, 4, 2]


def test_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="a global batch of 4 does not divide by 3 workers"):
        planned_blocks(make_plan(batch=4), 0, 5, 3, 1)


def test_no_steps_no_blocks() -> None:
    assert planned_blocks(make_plan(), 5, 5, 2, 1) == []


def test_size_of_blocks_by_hand() -> None:
    assert steps_per_block(((128, 128),), 4) == MAX_STEPS_PER_BLOCK  # 196,608 bytes a step: 170 would fit
    assert steps_per_block(((800, 1344), (1088, 1088)), 2) == MAX_BLOCK_BYTES // (1088 * 1088 * 3 * 2) == 4
    assert steps_per_block(((4096, 4096),), 8) == 1


def test_random_keys_are_different_and_the_same_every_time() -> None:
    places = [(seed, epoch, row) for seed in range(3) for epoch in range(3) for row in range(50)]
    keys = [random_key(*place) for place in places]
    assert len(set(keys)) == len(keys)
    assert keys == [random_key(*place) for place in places]
    assert all(0 <= key < 2**63 for key in keys)
    assert max(keys) > 2**62  # all bits are used


ALWAYS = AugmentSettings(horizontal_flip=1, vertical_flip=0)


def loader(prepared: Prepared, settings: AugmentSettings | None = None, seed: int = 3) -> LoadBlock:
    digest = ShardSet(prepared.data.training).manifest.digest
    return LoadBlock(prepared.data.training, digest, settings or prepared.config.augment, seed)


def real_plan(prepared: Prepared, batch: int) -> StreamPlan:
    """The plan as a worker makes it."""
    manifest = ShardSet(prepared.data.training).manifest
    data = prepared.config.data
    return StreamPlan(manifest.row_canvases(), data.rows_per_shard, data.shuffle_window, batch, seed=3)


@pytest.mark.cluster
def test_loaded_row_is_the_augmented_row_of_the_shards(prepared: Prepared) -> None:
    shards = ShardSet(prepared.data.training)
    load = loader(prepared, ALWAYS)
    for row in range(len(shards)):
        values = shards.read_row(row)
        found = load.load(shards, 17, 2, row)
        assert (found["position"], found["row"], found["random_key"]) == (17, row, random_key(3, 2, row))
        assert found["source"] == values["source"]
        assert (found["canvas_height"], found["canvas_width"]) == CANVASES[values["canvas"]]
        for name, value in sample_to_values(flip(sample_from_row(values), axis=1)).items():
            np.testing.assert_array_equal(found[name], value)


@pytest.mark.cluster
def test_augmentation_is_a_function_of_seed_epoch_and_row(prepared: Prepared) -> None:
    shards = ShardSet(prepared.data.training)

    def image(seed: int, epoch: int, row: int) -> bytes:
        return bytes(loader(prepared, seed=seed).load(shards, 0, epoch, row)["image"])

    variants = {}
    for row in range(4):
        sample = sample_from_row(shards.read_row(row))
        for seed in range(3):
            for epoch in range(4):
                found = image(seed, epoch, row)
                assert found == image(seed, epoch, row)
                settings = prepared.config.augment
                expected = augment(sample, settings, np.random.default_rng([seed, epoch, row]))
                assert found == expected.image.tobytes()
                variants[row, seed, epoch] = found
    for row in range(4):
        assert len({variants[row, 0, epoch] for epoch in range(4)}) > 1
        assert len({variants[row, seed, epoch] for seed in range(3) for epoch in range(4)}) > 2


@pytest.mark.cluster
def test_copy_paste_is_a_function_of_seed_epoch_and_row(prepared: Prepared) -> None:
    """A share of the rows gets objects, always the same in an epoch, only of its own source."""
    shards = ShardSet(prepared.data.training)
    settings = AugmentSettings(horizontal_flip=0, large_scale_jitter=(0.5, 1.5), copy_paste=0.5)
    alone = dataclasses.replace(loader(prepared), augment_settings=settings.model_copy(update={"copy_paste": 0.0}))
    pasting = dataclasses.replace(loader(prepared), augment_settings=settings)
    active = shards.manifest.active_classes()
    changed = set()
    for epoch in range(6):
        for row in range(len(shards)):
            found, again = (pasting.load(shards, 0, epoch, row) for _ in range(2))
            before = alone.load(shards, 0, epoch, row)
            assert found["image"] == again["image"]
            assert active[found["source"]][found["classes"]].all()
            if found["image"] != before["image"]:
                changed.add((epoch, row))
    assert len({row for _, row in changed}) > 8
    assert 0.1 < len(changed) / (6 * len(shards)) < 0.5  # some partners have no objects, or are of the other source


@pytest.mark.cluster
@pytest.mark.parametrize("short_side", [None, 40])
def test_training_rows_kept_for_jitter_come_at_their_size_on_the_canvas(
    prepared: Prepared, tmp_path: Path, short_side: int | None
) -> None:
    """Images of 48 x 64 pixels are not enlarged in the shards, validation images have their size on the canvas."""
    config = experiment(prepared.root, tmp_path, short_side=short_side)
    jitter = AugmentSettings(large_scale_jitter=(0.5, 2.0))
    plain = prepare(config, lambda line: None)
    kept = prepare(config.model_copy(update={"augment": jitter}), lambda line: None)
    assert kept.training != plain.training
    digests = [ShardSet(data.validation).manifest.digest for data in (plain, kept)]
    assert digests[0] == digests[1]
    shards = ShardSet(kept.training)
    flip_only = LoadBlock(kept.training, shards.manifest.digest, ALWAYS, 3)
    expected = LoadBlock(plain.training, ShardSet(plain.training).manifest.digest, ALWAYS, 3)
    on_canvas = {(64, 85), (85, 64)} if short_side is None else {(40, 53), (53, 40)}
    sizes = set()
    for row, values in enumerate(shards.read_rows(range(len(shards)))):
        assert (values["image_height"], values["image_width"]) == (values["height"], values["width"])
        found, other = flip_only.load(shards, 0, 0, row), expected.load(ShardSet(plain.training), 0, 0, row)
        sizes.add((found["image_height"], found["image_width"]))
        np.testing.assert_allclose(found["boxes"], other["boxes"], atol=1e-4)
        np.testing.assert_array_equal(found["mask_bits"], other["mask_bits"])
        difference = np.frombuffer(found["image"], np.uint8).astype(int) - np.frombuffer(other["image"], np.uint8)
        assert np.abs(difference).max() <= 1  # resized here, or when it was stored
    assert sizes == on_canvas


@pytest.mark.cluster
def test_shards_that_were_prepared_anew_are_noticed(prepared: Prepared, tmp_path: Path) -> None:
    shutil.copytree(prepared.data.training, tmp_path / "shards")
    load = dataclasses.replace(loader(prepared), folder=str(tmp_path / "shards"))
    manifest = tmp_path / "shards" / MANIFEST
    manifest.write_text(manifest.read_text().replace('"cat"', '"tom"'))
    block = planned_blocks(real_plan(prepared, 4), 0, 1, 1, 1)[0]
    with pytest.raises(RuntimeError, match="the shards were prepared anew while a training reads them"):
        load(block)


def consume(
    prepared: Prepared, num_workers: int, first: int, last: int, batch: int = 6, per_block: int = 2, cpus: float = 2
) -> list[list[Batch]]:
    """Read the stream as the workers of a training do, each in a thread of its own."""
    plan = real_plan(prepared, batch)
    blocks = planned_blocks(plan, first, last, num_workers, per_block)
    iterators = split_stream(blocks, loader(prepared), num_workers, cpus, object_store_bytes=64 * 1024 * 1024)
    active = ShardSet(prepared.data.training).manifest.active_classes()
    workers = [
        PlannedBatches(iterator, active, first, last, worker, batch // num_workers, num_workers)
        for worker, iterator in enumerate(iterators)
    ]
    with ThreadPoolExecutor(num_workers) as pool:
        return list(pool.map(list, workers))


@pytest.mark.cluster
def test_it_goes_on_where_others_have_all_cpus(prepared: Prepared, batches_of_one_worker: list[Batch]) -> None:
    """As when a node is lost and the workers take what is left; asking for a CPU, a task would wait for ever."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    everything = placement_group([{"CPU": ray.cluster_resources()["CPU"]}])
    ray.get(everything.ready())
    try:
        (found,) = consume(prepared, 1, 0, 4, cpus=0)
    finally:
        remove_placement_group(everything)
    for batch, expected in zip(found, batches_of_one_worker[:4], strict=True):
        assert torch.equal(batch.random_keys, expected.random_keys)
        assert torch.equal(batch.images, expected.images)


@pytest.mark.cluster
def test_damaged_row_is_named_by_the_stream(prepared: Prepared, tmp_path: Path) -> None:
    """Also where nobody compared the shards before, or one was damaged since."""
    shutil.copytree(prepared.data.training, tmp_path / "shards")
    moved = dataclasses.replace(prepared.data, training=str(tmp_path / "shards"))
    shard = ShardSet(moved.training).manifest.shards[2]
    path = tmp_path / "shards" / shard["name"]
    content = bytearray(path.read_bytes())
    content[(shard["offsets"][1] + shard["offsets"][2]) // 2] ^= 1  # in the pixels of the second row
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        consume(dataclasses.replace(prepared, data=moved), 2, 0, 20)
    assert str(caught.value).startswith(f"{path}: row 9 is damaged (its content does not have its digest); delete")
    assert ShardSet(moved.training).read_row(8)["row"] == 8


@pytest.fixture(scope="module")
def batches_of_one_worker(prepared: Prepared) -> list[Batch]:
    return consume(prepared, 1, 0, 20)[0]


def joined(batches: Sequence[Batch], name: str) -> torch.Tensor:
    """A field of the workers' batches of one step together; padded alike by cutting to the fewest slots."""
    values = [getattr(batch, name) for batch in batches]
    if name in ("boxes", "classes", "is_crowd", "mask_boxes", "mask_sizes"):
        slots = max(value.shape[1] for value in values)
        values = [
            torch.cat([value, value.new_zeros(value.shape[0], slots - value.shape[1], *value.shape[2:])], dim=1)
            for value in values
        ]
    return torch.cat(values)


@pytest.mark.cluster
@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_workers_together_see_what_one_worker_sees(
    prepared: Prepared, batches_of_one_worker: list[Batch], num_workers: int
) -> None:
    """Through Ray Data; every image by its key, its pixels and its ground truth, in its place."""
    first = 4
    found = consume(prepared, num_workers, first, 20)  # goes on at step 4
    assert [len(batches) for batches in found] == [16] * num_workers
    planned = list(real_plan(prepared, 6).steps(first, 20))
    active = ShardSet(prepared.data.training).manifest.active_classes()
    sources = [values["source"] for values in ShardSet(prepared.data.training).read_rows(range(21))]
    for index, (_, epochs, rows) in enumerate(planned):
        step = [batches[index] for batches in found]
        assert [batch.num_images for batch in step] == [6 // num_workers] * num_workers
        keys = [random_key(3, int(epoch), int(row)) for epoch, row in zip(epochs, rows, strict=True)]
        assert joined(step, "random_keys").tolist() == keys
        np.testing.assert_array_equal(joined(step, "active_class_ids"), active[[sources[row] for row in rows]])
        alone = batches_of_one_worker[first + index]
        for name in ("images", "image_sizes", "random_keys", "active_class_ids"):
            torch.testing.assert_close(joined(step, name), getattr(alone, name), rtol=0, atol=0)
        for name in ("boxes", "classes", "is_crowd", "mask_boxes", "mask_sizes"):
            torch.testing.assert_close(joined(step, name), joined([alone], name), rtol=0, atol=0)
        bits = torch.cat([batch.mask_bits[:-1] for batch in step])
        torch.testing.assert_close(bits, alone.mask_bits[:-1], rtol=0, atol=0)


@pytest.mark.cluster
def test_both_sources_and_both_canvases_come_through(batches_of_one_worker: list[Batch]) -> None:
    shapes = {tuple(batch.images.shape[2:]) for batch in batches_of_one_worker}
    assert shapes == set(CANVASES)
    active = {tuple(row) for batch in batches_of_one_worker for row in batch.active_class_ids.tolist()}
    assert active == {(True, True, True, False), (True, False, True, True)}
    # An object's class is always one that its source has labelled.
    for batch in batches_of_one_worker:
        assert torch.gather(batch.active_class_ids, 1, batch.classes).all()
    assert any(not batch.classes[index].any() for batch in batches_of_one_worker for index in range(6))


@pytest.mark.cluster
def test_other_data_sets_are_left_alone(batches_of_one_worker: list[Batch]) -> None:
    """What the stream asks of Ray Data holds for the stream alone, however often it is built."""
    import ray.data

    context = ray.data.DataContext.get_current()
    assert context.custom_execution_callback_classes == []
    assert not context.execution_options.preserve_order
    fresh = ray.data.range(3)
    assert fresh.context.custom_execution_callback_classes == []
    assert not fresh.context.execution_options.preserve_order


@pytest.mark.cluster
def test_each_worker_that_gets_rows_of_another_stops(prepared: Prepared) -> None:
    plan = real_plan(prepared, 6)
    blocks = planned_blocks(plan, 0, 4, 2, 2)
    iterators = split_stream(blocks, loader(prepared), 2, cpus=2, object_store_bytes=64 * 1024 * 1024)
    active = ShardSet(prepared.data.training).manifest.active_classes()
    exchanged = [PlannedBatches(iterators[1 - worker], active, 0, 4, worker, 3, 2) for worker in range(2)]

    def outcome(batches: PlannedBatches) -> str:
        with pytest.raises(RuntimeError) as caught:
            next(iter(batches))
        return str(caught.value)

    with ThreadPoolExecutor(2) as pool:
        messages = list(pool.map(outcome, exchanged))
    assert messages == [
        "worker 0, step 0: rows of positions [3, 4, 5], not 0 on",
        "worker 1, step 0: rows of positions [0, 1, 2], not 3 on",
    ]


@dataclasses.dataclass
class FromTables:
    """Stands for Ray Data: the same tables, in batches."""

    tables: list[Any]

    def iter_batches(self, batch_size: int, **_: object) -> Iterator[Any]:
        rows = pa.concat_tables(self.tables)
        return (rows.slice(start, batch_size) for start in range(0, rows.num_rows, batch_size))


def tiny_rows(positions: Sequence[int]) -> Any:
    """Rows of the stream with an image of one pixel."""
    numbers: npt.NDArray[np.float32] = np.zeros(0, dtype=np.float32)
    names = {"random_key": 0, "source": 0, "canvas_height": 1, "canvas_width": 1, "image_height": 1, "image_width": 1}
    lists = dict.fromkeys(("classes", "is_crowd", "boxes", "mask_boxes", "mask_sizes"), numbers)
    rows = [
        {"position": position, "row": position, "image": b"abc", "mask_bits": b"", **names, **lists}
        for position in positions
    ]
    return pa.Table.from_pylist(rows, schema=SAMPLE_SCHEMA)


def batches_from(positions: Sequence[int], first: int, last: int, worker: int, num_workers: int) -> list[Batch]:
    active = np.ones((1, 2), dtype=bool)
    return list(PlannedBatches(FromTables([tiny_rows(positions)]), active, first, last, worker, 2, num_workers))


def test_rows_as_planned_are_taken() -> None:
    # Two workers of two rows: worker 1 has the last two of every four.
    batches = batches_from([10, 11, 14, 15, 18, 19], first=2, last=5, worker=1, num_workers=2)
    assert [batch.num_images for batch in batches] == [2, 2, 2]


def test_a_step_comes_in_as_many_batches_as_it_accumulates() -> None:
    # Two workers, two passes of two rows: worker 1 has the last four of every eight.
    active = np.ones((1, 2), dtype=bool)
    rows = FromTables([tiny_rows([20, 21, 22, 23, 28, 29, 30, 31])])
    batches = list(PlannedBatches(rows, active, 2, 4, 1, 2, 2, accumulation_steps=2))
    assert [batch.num_images for batch in batches] == [2, 2, 2, 2]
    cut_off = FromTables([tiny_rows([20, 21, 22, 23, 28, 29])])
    with pytest.raises(RuntimeError, match="the stream ended before step 3, not 4"):
        list(PlannedBatches(cut_off, active, 2, 4, 1, 2, 2, accumulation_steps=2))


def test_the_loop_rests_longer_once_it_is_ahead_of_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    executor, pause = mock.Mock(), PauseBetweenSteps()
    slept: list[float] = []
    monkeypatch.setattr("pipeline.stream.time.sleep", slept.append)
    executor._consumer_idling.side_effect = [True] * 3 + [False] * 12 + [True] + [False]
    for _ in range(17):
        pause.on_execution_step(executor)
    assert slept == [0.02] * 13 + [0.25] * 2 + [0.02] * 2


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([10, 11, 15, 14, 18, 19], r"worker 1, step 3: rows of positions \[15, 14\], not 14 on"),
        ([14, 15, 10, 11, 18, 19], r"worker 1, step 2: rows of positions \[14, 15\], not 10 on"),
        ([10, 11, 10, 11, 18, 19], r"worker 1, step 3: rows of positions \[10, 11\], not 14 on"),
        ([8, 9], r"worker 1, step 2: rows of positions \[8, 9\], not 10 on"),
        ([10, 11, 14], r"worker 1, step 3: rows of positions \[14\], not 14 on"),
        ([10, 11, 14, 15], r"worker 1: the stream ended before step 4, not 5"),
        ([], r"worker 1: the stream ended before step 2, not 5"),
        ([10, 11, 14, 15, 18, 19, 22, 23], r"worker 1: the stream ended before step 6, not 5"),
    ],
)
def test_rows_of_another_place_are_an_error(positions: list[int], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"^{message}$"):
        batches_from(positions, first=2, last=5, worker=1, num_workers=2)
