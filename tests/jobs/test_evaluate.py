"""jobs/evaluate.py: a checkpoint evaluated directly, with augmentation, and from predictions; its page in a browser."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from pipeline.checkpoint import DESCRIPTION_FILE
from pipeline.command_line import parse
from pipeline.evaluation import AP_METRICS
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


@pytest.fixture(scope="module")
def run_folder(folder: Path) -> Path:
    """A run of the experiment, whose checkpoint is the same."""
    checkpoint = folder / "runs" / "own_data" / "checkpoint-0000972"
    shutil.copytree(folder / "checkpoint", checkpoint)
    config = parse("", ["--config", str(folder / "small.yaml"), "--run.name", "own_data"]).experiment
    description = json.loads((checkpoint / DESCRIPTION_FILE).read_text())
    changes = {"step": 972, "config": config.model_dump(mode="json")}
    (checkpoint / DESCRIPTION_FILE).write_text(json.dumps({**description, **changes}))
    (checkpoint.parent / "run.json").write_text("{}")
    return checkpoint.parent


def test_a_run_is_evaluated_by_its_own_configuration_and_data(
    evaluated: Outcome, run_folder: Path, folder: Path
) -> None:
    from mlflow import MlflowClient

    outcome = run_job("evaluate", "--checkpoint", "own_data", "--run.storage_path", str(run_folder.parent))
    assert outcome.exit_code == 0, outcome.errors
    assert outcome.output.splitlines()[0] == (
        "evaluate: own_data, checkpoint 972: configuration of its training, --run.storage_path; "
        f"data in {folder / 'shapes'}"
    )
    summary = outcome.last_line
    assert {name: summary[name] for name in AP_METRICS} == {name: evaluated.last_line[name] for name in AP_METRICS}
    page = Path(summary["report"]).read_text()
    assert Path(summary["report"]).parent.parent == run_folder.parent / "evaluations"
    assert "<title>Evaluation: own_data, checkpoint 972</title>" in page
    assert f'<p class="place">{run_folder / "checkpoint-0000972"}</p>' in page
    recorded = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db").get_run(summary["mlflow_run_id"])
    assert recorded.info.run_name == "evaluate own_data, checkpoint 972"
    nowhere = [{"annotations": "gone.json"}]
    path = run_folder / "checkpoint-0000972" / DESCRIPTION_FILE
    description = json.loads(path.read_text())
    description["config"]["data"] |= {"synthetic": None, "sources": nowhere}
    path.write_text(json.dumps(description))
    outcome = run_job("evaluate", "--checkpoint", str(run_folder))
    assert outcome.exit_code == 1
    assert outcome.error_lines == [
        f"error: own_data, checkpoint 972: what it was trained on is not there (no {folder / 'shapes' / 'gone.json'}); "
        "say with --data.root where it lies, or with --config on what else to evaluate"
    ]


def test_help_begins_with_the_plain_command() -> None:
    outcome = run_job("evaluate", "--help", "--checkpoint", "nothing")
    assert outcome.exit_code == 0, outcome.errors
    assert outcome.output.splitlines()[4].strip() == "python jobs/evaluate.py --checkpoint own_data"


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
