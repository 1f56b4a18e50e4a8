"""`jobs/doctor.py` as a user runs it, on this machine and on a cluster file."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from pipeline.cluster_access import sent_files
from tests.jobs.running import ROOT, Outcome, run_job, write_small_experiment


def lines(outcome: Outcome) -> dict[str, str]:
    """What was found, by check: all but the JSON at the end."""
    found = {}
    for line in outcome.output.splitlines()[:-1]:
        match = re.match(r"(ok |FIX)  ([\w./ ]+): (.+)$", line)
        assert match, line
        found[match[2]] = line
    return found


def test_a_cluster_file(tmp_path: Path) -> None:
    outcome = run_job("doctor", "--config", "configs/demo.yaml", "--cluster", "cluster.yaml")
    assert outcome.exit_code == 1
    assert "FIX  cluster file: cluster.yaml: docker.image: fill in REPLACE_ME" in outcome.output
    assert outcome.last_line["well"] is False
    text = (
        (ROOT / "cluster.yaml").read_text().replace("REPLACE_ME/", "registry.example/").replace("REPLACE_ME", "given")
    )
    (tmp_path / "cluster.yaml").write_text(text)
    for config in ("configs/demo.yaml", "configs/sweep_anchors.yaml"):
        outcome = run_job("doctor", "--config", config, "--cluster", str(tmp_path / "cluster.yaml"))
        assert outcome.exit_code == 0, outcome.errors
        assert outcome.output.startswith("ok   cluster file: ")
    arguments = ("--config", "configs/demo.yaml", "--run.storage_path", "/elsewhere/runs")
    outcome = run_job("doctor", *arguments, "--cluster", str(tmp_path / "cluster.yaml"))
    assert outcome.exit_code == 1
    assert "run.storage_path: /elsewhere/runs is a folder of one node alone" in outcome.output


def test_a_rayjob(tmp_path: Path) -> None:
    text = (ROOT / "configs/kuberay/rayjob-train.yaml").read_text().replace("REPLACE_ME", "given")
    for content, exit_code in ((text, 0), (text.replace("jobs/train.py --config", "jobs/train.py --confg"), 1)):
        (tmp_path / "job.yaml").write_text(content)
        outcome = run_job("doctor", "--config", "configs/demo.yaml", "--cluster", str(tmp_path / "job.yaml"))
        assert outcome.exit_code == exit_code, outcome.output
    assert "entrypoint: confg: no such key" in outcome.output


def test_a_clean_clone_is_small(tmp_path: Path) -> None:
    """What `ray job submit --working-dir .` sends: what a job needs, and nothing more."""
    subprocess.run(["git", "clone", "--quiet", "--depth", "1", f"file://{ROOT}", str(tmp_path / "clone")], check=True)
    sent = sent_files(str(tmp_path / "clone"))
    assert sum(sent.values()) < 5e6
    assert {"jobs/train.py", "pipeline/worker.py", "model/mask_rcnn.py", "configs/coco_1x.yaml"} <= set(sent)
    assert [name for name in sent if name.startswith(("tests/", ".git/", ".ci/", "runs/"))] == []


def test_trials_are_a_number() -> None:
    outcome = run_job("doctor", "--config", "configs/demo.yaml", "--trials", "many")
    assert outcome.exit_code == 2
    assert outcome.error_lines == ["error: --trials many: has to be a whole number of at least 1"]


@pytest.mark.cluster
def test_this_machine(tmp_path: Path) -> None:
    """One thing is wrong on purpose, the rest is well."""
    config = write_small_experiment(tmp_path, scaling={"num_workers": 500})
    outcome = run_job("doctor", "--config", str(config))
    found = lines(outcome)
    assert outcome.exit_code == 1, outcome.errors
    assert [check for check, line in found.items() if line.startswith("FIX") and check != "memory"] == ["resources"]
    assert "500 workers x (1 CPU) + 1 CPU for reading = 501 CPU" in found["resources"]
    assert {"authentication", "mlflow", "versions", "run.storage_path", "data.root", "shared memory", "disk"} <= set(
        found
    )
    assert outcome.last_line.keys() == {"well", "seconds"}
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [], "a mark was left behind"
    assert json.loads(outcome.output.splitlines()[-1])["well"] is False
