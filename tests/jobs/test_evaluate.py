"""jobs/evaluate.py: a checkpoint evaluated directly, with augmentation, and from predictions; its page in a browser."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.jobs.running import Outcome, run_job, write_small_experiment
from tests.pipeline.small import write_small_checkpoint

pytestmark = pytest.mark.cluster
CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def folder(folder: Path) -> Path:
    write_small_checkpoint(folder / "checkpoint", ["circle", "square", "triangle"])
    write_small_experiment(folder, model={"backbone": {"depth": 18, "norm": "frozen"}, "detections": {
        "max_per_image": 10, "score_threshold": 0.0,
    }})  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def evaluated(folder: Path) -> Outcome:
    arguments = ("--config", str(folder / "small.yaml"), "--checkpoint", str(folder / "checkpoint"))
    outcome = run_job("evaluate", *arguments, "--output", str(folder / "report"))
    assert outcome.exit_code == 0, outcome.errors
    return outcome


def test_it_leaves_a_report_and_an_mlflow_run(evaluated: Outcome, folder: Path) -> None:
    from mlflow import MlflowClient

    summary = evaluated.last_line
    assert summary["report"] == str(folder / "report" / "report.html")
    report = json.loads((folder / "report" / "report.json").read_text())
    assert (report["num_images"], report["num_detections"]) == (7, 70)
    assert [entry["class"] for entry in report["per_class"]] == ["circle", "square", "triangle"]
    client = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    run = client.get_run(summary["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["segm_AP"] == pytest.approx(report["segm"]["metrics"]["AP"])
    assert {"bbox_AR100", "segm_calibration_error", "segm_AP50_lost_Miss"} <= run.data.metrics.keys()
    assert {file.path for file in client.list_artifacts(run.info.run_id, "evaluation")} == {
        "evaluation/report.html", "evaluation/report.json",
    }  # fmt: skip


def test_predictions_give_the_same_report(evaluated: Outcome, folder: Path) -> None:
    shapes = folder / "shapes"
    outcome = run_job(
        "predict", "--checkpoint", str(folder / "checkpoint"),
        "--images", str(shapes / "annotations/instances_val.json"),
        "--predict.images_folder", "../images", "--output", str(folder / "predictions"),
        "--predict.precision", "fp32", "--predict.images_per_part", "7", "--predict.num_workers", "1",
    )  # fmt: skip
    assert outcome.exit_code == 0, outcome.errors
    again = run_job(
        "evaluate", "--config", str(folder / "small.yaml"), "--predictions", str(folder / "predictions"),
        "--output", str(folder / "again"),
    )  # fmt: skip
    assert again.exit_code == 0, again.errors
    ours, theirs = (json.loads((folder / name / "report.json").read_text()) for name in ("again", "report"))
    for kind in ("bbox", "segm"):
        assert ours[kind]["metrics"] == pytest.approx(theirs[kind]["metrics"], abs=1e-6)
        assert ours[kind]["confusion"] == theirs[kind]["confusion"]
    assert ours["num_detections"] == theirs["num_detections"]
    assert evaluated.exit_code == 0


def test_augmentation_and_contradictions(folder: Path) -> None:
    arguments = ("--config", str(folder / "small.yaml"), "--checkpoint", str(folder / "checkpoint"))
    outcome = run_job("evaluate", *arguments, "--predict.flip", "true", "--output", str(folder / "flipped"))
    assert outcome.exit_code == 0, outcome.errors
    flipped, plain = (json.loads((folder / name / "report.json").read_text()) for name in ("flipped", "report"))
    assert flipped["num_images"] == plain["num_images"]
    outcome = run_job("evaluate", *arguments, "--predictions", str(folder / "predictions"))
    assert outcome.exit_code == 2
    assert outcome.error_lines == ["error: --checkpoint and --predictions: only one of them can be evaluated"]


@pytest.mark.skipif(CHROMIUM is None, reason="only a browser can tell that the page draws; no Chromium here")
def test_the_page_shows_its_pictures_without_a_network(evaluated: Outcome, tmp_path: Path) -> None:
    text = Path(evaluated.last_line["report"]).read_text()
    assert "http://" not in text
    assert "https://" not in text
    # A page's own script says what the browser could draw; the network is a proxy that nobody answers at.
    probe = tmp_path / "probe.html"
    script = (
        "<script>onload = () => { const all = [...document.images];"
        "document.title = all.length + ' ' + all.filter(i => i.complete && i.naturalWidth > 100).length }</script>"
    )
    probe.write_text(text.replace("</body>", script + "</body>"))
    assert CHROMIUM is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--proxy-server=127.0.0.1:9"]
    drawn = subprocess.run(
        [CHROMIUM, *options, "--dump-dom", f"file://{probe}"], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    assert "<title>17 17</title>" in drawn  # three figures, and seven images that miss everything, twice
