"""Every job through `ray job submit` from a clean clone onto two nodes with a token; what is wrong is named in time."""

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient

from pipeline.mlflow_runs import default_uri
from tests.jobs.running import ROOT, Outcome, write_small_experiment
from tests.simulation.nodes import HEAD, RAY, WORKER, Nodes

pytestmark = pytest.mark.simulation
NAMED_SECONDS = 20.0
TOKEN = "a-token-of-the-simulation-0123456789"


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Short, since unix sockets below it may have 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="two-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def clone(folder: Path) -> Path:
    """What somebody has after `git clone`: what is committed."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder / "clone")], check=True)
    return folder / "clone"


@pytest.fixture(scope="module")
def nodes(folder: Path) -> Iterator[Nodes]:
    nodes = Nodes(folder, TOKEN)
    try:
        nodes.start_head()
        nodes.start_worker(cpus=4)
        yield nodes
    finally:
        nodes.stop_all()


@pytest.fixture(scope="module")
def config(folder: Path) -> str:
    return str(write_small_experiment(folder, train={"epochs": 1}))


def doctor(nodes: Nodes, clone: Path, *arguments: str, **changes: str) -> Outcome:
    """Asked from outside."""
    return nodes.run((sys.executable, "jobs/doctor.py", *arguments), clone, **changes)


def first_fix_after(nodes: Nodes, clone: Path, pattern: str, *arguments: str) -> float:
    """Seconds until the doctor has printed a line; it is read as it comes."""
    started = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-u", "jobs/doctor.py", *arguments],
        cwd=clone, env=nodes.client_environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        named, lines = None, []
        for line in process.stdout:
            lines.append(line)
            if re.search(pattern, line) and named is None:
                named = time.monotonic() - started
    assert named is not None, "".join(lines)
    assert process.returncode == 1
    return named


def test_all_is_well(nodes: Nodes, clone: Path, config: str) -> None:
    deadline = time.monotonic() + 120
    while (outcome := doctor(nodes, clone, "--config", config)).exit_code != 0 and time.monotonic() < deadline:
        time.sleep(1)  # the second node is on its way
    assert outcome.exit_code == 0, outcome.output + outcome.errors
    assert "ok   authentication: token accepted" in outcome.output
    assert "run.storage_path: " in outcome.output
    assert "read on all 2 nodes" in outcome.output


def test_jobs(nodes: Nodes, clone: Path, config: str, folder: Path) -> None:
    """Prepare, try, train, train again."""
    outcome = nodes.submit(clone, "python", "jobs/prepare.py", "--config", config)
    assert outcome.exit_code == 0, outcome.output + outcome.errors
    outcome = nodes.submit(clone, "python", "jobs/train.py", "--config", config, "--smoke")
    assert outcome.exit_code == 0, outcome.output + outcome.errors
    assert (folder / "runs/small-smoke/result.json").exists()
    outcome = nodes.submit(clone, "python", "jobs/train.py", "--config", config, "--register", "shapes")
    assert outcome.exit_code == 0, outcome.output + outcome.errors
    assert "cluster: 2 nodes have the same versions" in outcome.output
    assert "models:/shapes@champion" in outcome.output
    again = nodes.submit(clone, "python", "jobs/train.py", "--config", config, "--register", "shapes")
    assert again.exit_code == 0, again.output + again.errors
    assert "nothing to do" in again.output
    assert "models:/shapes/1" in again.output
    wrong = nodes.submit(clone, "python", "jobs/train.py", "--config", config, "--optim.learning_rate", "0.5")
    assert wrong.exit_code == 1
    assert "was begun with another configuration" in wrong.output + wrong.errors


def test_sweep(nodes: Nodes, clone: Path, config: str, folder: Path) -> None:
    """Two trials, whose workers take turns on the node that has CPUs; the best configuration is left for a training."""
    space = json.dumps({"model.rpn.nms_threshold": {"grid": [0.6, 0.8]}})
    options = ("--sweep.search", "grid", "--sweep.max_trials", "2", "--scaling.num_workers", "1")
    sweep = ("python", "jobs/tune.py", "--config", config, "--run.name", "sweep", "--sweep.space", space, *options)
    outcome = nodes.submit(clone, *sweep)
    assert outcome.exit_code == 0, outcome.output + outcome.errors
    assert (folder / "runs/sweep/best.yaml").exists()
    table = pq.read_table(folder / "runs/sweep/trials.parquet")
    assert table["state"].to_pylist() == ["finished", "finished"]
    assert sorted(table["model.rpn.nms_threshold"].to_pylist()) == [0.6, 0.8]


def test_prediction(nodes: Nodes, clone: Path, config: str, folder: Path) -> None:
    """All 31 images of the data set by the model that was trained here."""
    output = folder / "found"
    options = ("--images", str(folder / "shapes/images"), "--output", str(output), "--predict.images_per_part", "8")
    outcome = nodes.submit(
        clone, "python", "jobs/predict.py", "--config", config, "--checkpoint", str(folder / "runs/small"), *options
    )
    assert outcome.exit_code == 0, outcome.output + outcome.errors
    manifest = json.loads((output / "manifest.json").read_text())
    assert (manifest["num_images"], manifest["num_errors"]) == (31, 0)
    assert sum(pq.read_metadata(path).num_rows for path in (output / "parts").glob("*.parquet")) == 31


def test_stopped_and_begun_again(nodes: Nodes, clone: Path, config: str, folder: Path) -> None:
    """`ray job stop` leaves three seconds, enough to end the MLflow run; the same command goes on."""
    train = ("python", "jobs/train.py", "--config", config, "--run.name", "stopped", "--train.epochs")
    submit = ("job", "submit", "--no-wait", "--submission-id", "stop-me", "--working-dir", ".", "--")
    assert nodes.run((*RAY, *submit, *train, "200"), clone).exit_code == 0
    deadline = time.monotonic() + 240
    while not list((folder / "runs/stopped").glob("checkpoint-*/checkpoint.json")):
        assert time.monotonic() < deadline, nodes.run((*RAY, "job", "logs", "stop-me"), clone).output
        time.sleep(0.5)
    assert nodes.run((*RAY, "job", "stop", "stop-me"), clone).exit_code == 0
    assert "STOPPED" in nodes.run((*RAY, "job", "status", "stop-me"), clone).output.upper()
    client = MlflowClient(default_uri(str(folder / "runs")))
    experiment = client.get_experiment_by_name("mask-rcnn")
    assert experiment is not None
    found = {run.info.run_name: run.info.status for run in client.search_runs([experiment.experiment_id])}
    assert found["stopped"] == "KILLED"
    again = nodes.submit(clone, *train, "2")
    assert again.exit_code == 0, again.output + again.errors
    assert "going on with run stopped" in again.output


def test_a_wrong_token(nodes: Nodes, clone: Path, config: str) -> None:
    started = time.monotonic()
    outcome = doctor(nodes, clone, "--config", config, RAY_AUTH_TOKEN="another-token-0123456789")
    assert outcome.exit_code == 1
    assert "FIX  authentication: the token was refused" in outcome.output
    assert time.monotonic() - started < NAMED_SECONDS
    started = time.monotonic()
    inside = f"{HEAD}:{nodes.gcs}"
    outcome = doctor(nodes, clone, "--config", config, RAY_AUTH_TOKEN="another-token-0123456789", RAY_ADDRESS=inside)
    assert outcome.exit_code == 1
    assert f"FIX  authentication: {inside} does not take this process in" in outcome.output
    assert time.monotonic() - started < NAMED_SECONDS


def test_too_little_cpu(nodes: Nodes, clone: Path, config: str) -> None:
    named = first_fix_after(
        nodes, clone, r"FIX  resources: 40 workers", "--config", config, "--scaling.num_workers", "40"
    )
    assert named < NAMED_SECONDS


def test_another_version_and_a_folder_that_one_node_does_not_see(
    nodes: Nodes, clone: Path, config: str, folder: Path
) -> None:
    """The node is replaced by one with a faked version of torch, in a mount namespace of its own without the runs."""
    fake = folder / "fake" / "torch-1.0.0.dist-info"
    fake.mkdir(parents=True)
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 1.0.0\n")
    hide = f'mount -t tmpfs none {folder / "runs"} && exec "$@"'
    wrap = ("unshare", "--mount", "sh", "-c", hide, "sh")
    hidden = subprocess.run([*wrap, "true"], capture_output=True, check=False).returncode == 0
    nodes.stop("worker")
    nodes.start_worker(cpus=4, wrap=wrap if hidden else (), python_path=str(fake.parent))
    deadline = time.monotonic() + 180
    while "1.0.0" not in (outcome := doctor(nodes, clone, "--config", config)).output and time.monotonic() < deadline:
        time.sleep(1)  # the old node is declared dead, the new one comes up
    assert outcome.exit_code == 1
    assert re.search(rf"FIX  versions: torch differs: .*1\.0\.0 on node {WORKER}", outcome.output), outcome.output
    if hidden:
        assert f"FIX  run.storage_path: what is written here is not seen by node {WORKER}" in outcome.output
    refused = nodes.submit(clone, "python", "jobs/prepare.py", "--config", config)
    assert refused.exit_code == 1
    assert "versions: torch differs" in refused.output + refused.errors
    named = first_fix_after(nodes, clone, r"FIX  (versions|run\.storage_path)", "--config", config)
    print(json.dumps({"named_after_seconds": round(named, 1), "mount_namespace": hidden}))  # noqa: T201 - with -s
    assert named < NAMED_SECONDS
