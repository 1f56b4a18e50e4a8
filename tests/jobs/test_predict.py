"""jobs/predict.py as a user runs it: killed at any moment and run again, the same rows, on a disk and in a bucket."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pyarrow import fs

from pipeline import storage
from pipeline.prediction_schema import read_predictions
from tests.jobs.running import ROOT, TIMEOUT_SECONDS, Outcome, environment, run_job, run_until_then_kill
from tests.pipeline.factories import Json, noise, png
from tests.pipeline.small import write_small_checkpoint

pytestmark = pytest.mark.cluster
NUM_IMAGES, NUM_BROKEN, IMAGES_PER_PART = 240, 3, 8


@pytest.fixture(scope="module")
def folder(folder: Path) -> Path:
    """Images in subfolders, three of them broken, and a checkpoint."""
    write_small_checkpoint(folder / "checkpoint")
    for index in range(NUM_IMAGES):
        path = folder / "images" / f"{index % 7}" / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        content = png(noise(80, 60 + index % 30, seed=index))
        path.write_bytes(content[:700] if index in (17, 18, 200) else content)
    return folder


def arguments(folder: Path, output: str, images: str | None = None) -> tuple[str, ...]:
    return (
        "--config", "configs/predict.yaml", "--checkpoint", str(folder / "checkpoint"),
        "--images", images or str(folder / "images"), "--output", output,
        "--predict.images_per_part", str(IMAGES_PER_PART), "--predict.batch_size", "4", "--predict.precision", "fp32",
    )  # fmt: skip


def rows_of(output: str) -> dict[str, Json]:
    """Rows by key, after a look whether all images are there once."""
    manifest = json.loads(storage.read_bytes(storage.join(output, "manifest.json")))
    rows = list(read_predictions(output, [part["name"] for part in manifest["parts"]]))
    by_key = {row["key"]: row for row in rows}
    assert len(by_key) == len(rows) == NUM_IMAGES - NUM_BROKEN
    assert (manifest["num_images"], manifest["num_errors"]) == (NUM_IMAGES, NUM_BROKEN)
    return by_key


def parts(output: str) -> dict[str, str]:
    """Whole parts with their time."""
    stamps = storage.list_stamps(storage.join(output, "parts"))
    return {name: stamp for name, stamp in stamps.items() if name.endswith(".parquet")}


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Outcome:
    outcome = run_job("predict", *arguments(folder, str(folder / "undisturbed")))
    assert outcome.exit_code == 0, outcome.errors
    return outcome


def test_it_ends_with_its_counts(undisturbed: Outcome, folder: Path) -> None:
    summary = undisturbed.last_line
    assert (summary["num_images"], summary["num_predicted"], summary["num_errors"]) == (240, 237, 3)
    assert summary["computed_now"] == 240
    assert summary["output"] == str(folder / "undisturbed")
    assert len(parts(summary["output"])) == 30


def kill_at(output: str, numbers: tuple[int, ...], arguments: tuple[str, ...]) -> None:
    """Kill the job when so many parts are there, each time anew; what was done is left as it was."""
    before: dict[str, str] = {}

    def reached(number: int) -> Callable[[], bool]:
        return lambda: len(parts(output)) >= number

    for number in numbers:
        run_until_then_kill("predict", *arguments, until=reached(number))
        now = parts(output)
        assert number <= len(now) < NUM_IMAGES // IMAGES_PER_PART
        assert not storage.exists(storage.join(output, "manifest.json"))
        assert {name: now[name] for name in before} == before, "done parts are not computed again"
        before = now
    outcome = run_job("predict", *arguments)
    assert outcome.exit_code == 0, outcome.errors
    assert outcome.last_line["computed_now"] == NUM_IMAGES - IMAGES_PER_PART * len(before)
    now = parts(output)
    assert {name: now[name] for name in before} == before


def test_killed_three_times_it_gives_the_same_rows(undisturbed: Outcome, folder: Path) -> None:
    output = str(folder / "killed")
    kill_at(output, (1, 7, 16), arguments(folder, output))
    assert rows_of(output) == rows_of(undisturbed.last_line["output"])
    for name in ("manifest.json", "errors.parquet", "plan.parquet"):
        assert (folder / "killed" / name).read_bytes() == (folder / "undisturbed" / name).read_bytes()
    assert not list((folder / "killed").rglob("*.partial"))


def test_a_lost_node_loses_nothing(undisturbed: Outcome, folder: Path) -> None:
    """With it go processes with the model, decoded images, and the CPUs for decoding."""
    output = str(folder / "lost-node")
    arguments = [str(folder / "checkpoint"), str(folder / "images"), output]
    done = subprocess.run(
        [sys.executable, "-m", "tests.jobs.losing_node", *arguments], capture_output=True, text=True,
        env=environment(), cwd=ROOT, timeout=TIMEOUT_SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "it is tried again" in done.stdout
    assert f"alive 2 computed {NUM_IMAGES}" in done.stdout.splitlines()  # among what the lost node's processes say
    ours, theirs = rows_of(output), rows_of(undisturbed.last_line["output"])
    assert {key: {**row, "config_digest": ""} for key, row in ours.items()} == {
        key: {**row, "config_digest": ""} for key, row in theirs.items()
    }


def test_from_a_bucket_to_a_bucket(bucket: fs.FileSystem, undisturbed: Outcome, folder: Path) -> None:
    """Killed once on the way."""
    for path in sorted((folder / "images").rglob("*.png")):
        storage.write_bytes(f"s3://bucket/images/{path.relative_to(folder / 'images')}", path.read_bytes())
    output = "s3://bucket/predictions"
    kill_at(output, (3,), arguments(folder, output, "s3://bucket/images"))
    here, there = rows_of(undisturbed.last_line["output"]), rows_of(output)
    assert there == here
    for name in parts(output):
        # Errors name where their images lie; all other bytes are the same.
        same = storage.read_bytes(f"{output}/parts/{name}") == (folder / "undisturbed" / "parts" / name).read_bytes()
        assert same or any(error in name for error in errors_of(undisturbed.last_line["output"]))


def errors_of(output: str) -> set[str]:
    """Names of the parts with errors."""
    manifest = json.loads(storage.read_bytes(storage.join(output, "manifest.json")))
    return {os.path.basename(part["name"]) for part in manifest["parts"] if part["errors"]}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("--images", "nowhere"), "nowhere: no such folder, or nothing in it"),
        (("--checkpoint", "nothing"), "error: nothing: neither a checkpoint folder, nor a run"),
        (("--predict.tiling.overlap", "0.95"), "predict.tiling.overlap: "),
    ],
)
def test_mistakes_are_one_line(folder: Path, tmp_path: Path, change: tuple[str, str], told: str) -> None:
    outcome = run_job("predict", *arguments(folder, str(tmp_path / "out")), *change)
    assert outcome.exit_code != 0
    assert len(outcome.error_lines) == 1
    assert told in outcome.error_lines[0]
    assert not (tmp_path / "out").exists()
