"""Prepare and train with data and shards in a bucket: an S3 server on the loopback."""

import io
import json
from pathlib import Path

import pytest
from pyarrow import fs

from pipeline import storage
from pipeline.config import SyntheticSettings
from pipeline.shards import ShardSet, row_digest, row_values
from pipeline.synthetic import write_shapes
from tests.jobs.running import Outcome, run_job, run_until_then_kill, write_small_experiment
from tests.pipeline.factories import tree

pytestmark = pytest.mark.cluster
IMAGES = SyntheticSettings(training_images=64, validation_images=5)


@pytest.fixture(scope="module")
def arguments(bucket: fs.FileSystem, folder: Path) -> tuple[str, ...]:
    """The same images in the bucket and in a local folder."""
    assert write_shapes("s3://bucket/data", IMAGES)
    assert write_shapes(str(folder / "shapes"), IMAGES)
    config = write_small_experiment(folder, data={"synthetic": None, "rows_per_shard": 4})
    return ("--config", str(config))


@pytest.fixture(scope="module")
def local(arguments: tuple[str, ...], folder: Path) -> Outcome:
    outcome = run_job("prepare", *arguments, "--data.shards", str(folder / "shards"))
    assert outcome.exit_code == 0, outcome.errors
    return outcome


def in_bucket(shards: str) -> tuple[str, ...]:
    return ("--data.root", "s3://bucket/data", "--data.shards", f"s3://bucket/{shards}")


def test_killed_and_run_again_gives_the_bytes_of_a_local_disk(
    local: Outcome, arguments: tuple[str, ...], folder: Path
) -> None:
    assert local.exit_code == 0
    shards = "s3://bucket/shards"

    def some_are_there() -> bool:
        return sum(name.endswith(".arrow") for name in storage.list_files(f"{shards}/training")) >= 3

    run_until_then_kill("prepare", *arguments, *in_bucket("shards"), until=some_are_there)
    assert "manifest.json" not in storage.list_files(f"{shards}/training")
    outcome = run_job("prepare", *arguments, *in_bucket("shards"))
    assert outcome.exit_code == 0, outcome.errors
    assert outcome.last_line["report"] == "s3://bucket/shards/report.html"
    names = {name for name in tree(folder / "shards") if name.endswith(".arrow")}
    assert len(names) == 18
    assert names == {name for name in storage.list_files(shards) if name.endswith(".arrow")}
    for name in names:
        assert storage.read_bytes(f"{shards}/{name}") == (folder / "shards" / name).read_bytes(), name
    assert ShardSet(f"{shards}/training").manifest.digest == ShardSet(local.last_line["training"]).manifest.digest


def test_rows_are_read_by_range(local: Outcome) -> None:
    shards = ShardSet("s3://bucket/shards/training")
    entry = shards.manifest.shards[3]
    filesystem, path = storage.open_filesystem(f"s3://bucket/shards/training/{entry['name']}")
    start, end = entry["offsets"][2:4]
    with filesystem.open_input_file(path) as file:
        part = file.read_at(end - start, start)
    values = row_values(io.BytesIO(part).getbuffer())
    assert values["row"] == 14
    assert row_digest(values) == values["digest"]
    row = shards.read_row(14)
    assert row["image"].tobytes() == ShardSet(local.last_line["training"]).read_row(14)["image"].tobytes()


def test_options_of_a_url(bucket: fs.FileSystem) -> None:
    """The server may be named in the URL itself instead of in the environment."""
    with pytest.MonkeyPatch.context() as patch:
        import os

        endpoint = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://")
        patch.delenv("AWS_ENDPOINT_URL")
        url = f"s3://bucket/data?endpoint_override={endpoint}&scheme=http&region=us-east-1"
        content = json.loads(storage.read_bytes(storage.join(url, "annotations/instances_val.json")))
    assert len(content["images"]) == 5


def test_training_reads_from_the_bucket(local: Outcome, arguments: tuple[str, ...], folder: Path) -> None:
    here = run_job("train", *arguments, "--data.shards", str(folder / "shards"), "--train.max_steps", "4")
    assert here.exit_code == 0, here.errors
    named = ("--run.name", "from-bucket", "--train.max_steps", "4")
    there = run_job("train", *arguments, *in_bucket("shards"), *named)
    assert there.exit_code == 0, there.errors
    assert "training shards are there: 64 images in s3://bucket/shards/training" in there.output
    for name in ("steps", "segm_AP", "bbox_AP"):
        assert there.last_line[name] == here.last_line[name]


def test_flipped_byte_is_named(arguments: tuple[str, ...]) -> None:
    """Last in this file: it damages the shards."""
    shard = "s3://bucket/shards/training/rows-000000008-000000012.arrow"
    whole = storage.read_bytes(shard)
    storage.write_bytes(shard, whole[:9000] + bytes([whole[9000] ^ 1]) + whole[9001:])
    outcome = run_job("train", *arguments, *in_bucket("shards"), "--run.name", "damaged")
    assert outcome.exit_code == 1
    assert outcome.error_lines == [
        f"error: {shard}: damaged (its SHA-256 is not the manifest's); delete {shard} and run jobs/prepare.py again"
    ]
