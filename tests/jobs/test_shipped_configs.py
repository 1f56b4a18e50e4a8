"""The shipped configurations, a few steps each: on real microscopy images where they are there, else on shapes."""

import os
from pathlib import Path

import pytest

from pipeline.evaluation import coco_average_precision, ground_truth
from pipeline.shards import ShardSet
from tests.jobs.running import ROOT, run_job

pytestmark = pytest.mark.cluster

NUCLEI = Path(os.environ.get("NUCLEI_DIR", ROOT.parent / "shared" / "data" / "nuclei"))


def _arguments(tmp_path: Path) -> tuple[str, ...]:
    """The nuclei with their configuration, or the demo's with few images."""
    kept = ("--run.storage_path", str(tmp_path / "runs"))
    if NUCLEI.is_dir():
        return ("--config", "configs/nuclei.yaml", "--data.root", str(NUCLEI), *kept)
    few = ("--data.synthetic.training_images", "60", "--data.synthetic.validation_images", "20")
    return ("--config", "configs/demo.yaml", "--data.root", str(tmp_path / "shapes"), *few, *kept)


def test_prepared_ground_truth_is_perfect_against_itself(tmp_path: Path) -> None:
    outcome = run_job("prepare", *_arguments(tmp_path))
    assert outcome.exit_code == 0, outcome.errors
    summary = outcome.last_line
    expected = (120, 40, ["nucleus"]) if NUCLEI.is_dir() else (60, 20, ["circle", "square", "triangle"])
    assert (summary["training_images"], summary["validation_images"], summary["classes"]) == expected
    assert (summary["quarantined_images"], summary["quarantined_annotations"]) == (0, 0)
    shards = ShardSet(summary["validation"])
    rows = list(shards.read_rows(range(len(shards))))
    truth = [annotation for row in rows for annotation in ground_truth(row)]
    assert len(truth) == (880 if NUCLEI.is_dir() else len(truth)) > 0
    images = [{"id": row["row"], "height": row["height"], "width": row["width"]} for row in rows]
    results = [{**annotation, "score": 1.0} for annotation in truth]
    metrics = coco_average_precision(images, range(1, shards.manifest.num_classes), truth, results)
    assert metrics["bbox_AP"] == pytest.approx(1.0)
    assert metrics["segm_AP"] == pytest.approx(1.0)


def test_a_few_steps_of_training(tmp_path: Path) -> None:
    outcome = run_job("train", *_arguments(tmp_path), "--train.max_steps", "3")
    assert outcome.exit_code == 0, outcome.errors
    assert outcome.last_line["steps"] == 3
    again = run_job("train", *_arguments(tmp_path), "--train.max_steps", "3")
    assert "nothing to do" in again.output
