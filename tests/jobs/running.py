"""Runs jobs as a user does: another process, its output and exit code."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.pipeline.small import SMALL_MODEL

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_SECONDS = 420


@dataclass(frozen=True)
class Outcome:
    """What a job printed and how it ended."""

    exit_code: int
    output: str
    errors: str

    @property
    def last_line(self) -> dict[str, Any]:
        """The JSON that a job ends with."""
        lines = self.output.strip().splitlines()
        assert lines, f"no output; errors: {self.errors}"
        summary: dict[str, Any] = json.loads(lines[-1])
        return summary

    @property
    def error_lines(self) -> list[str]:
        """Lines on standard error."""
        return self.errors.strip().splitlines()


def environment() -> dict[str, str]:
    """Of a job that starts a Ray of its own."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return {**kept, "RAY_USAGE_STATS_ENABLED": "0"}


def run_job(name: str, *arguments: str, **variables: str) -> Outcome:
    """Run `python jobs/NAME.py ARGUMENTS` to its end, with further variables of the environment."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *arguments],
        capture_output=True, text=True, env={**environment(), **variables}, cwd=ROOT, timeout=TIMEOUT_SECONDS,
        check=False,
    )  # fmt: skip
    return Outcome(done.returncode, done.stdout, done.stderr)


def run_until_then_kill(name: str, *arguments: str, until: Callable[[], bool]) -> None:
    """Start a job in a process group of its own and `kill -9` the group as soon as the condition holds."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *arguments],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment(), cwd=ROOT, start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not until():
            assert process.poll() is None, "the job ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def write_small_experiment(folder: Path, **changes: dict[str, Any]) -> Path:
    """Configuration of a training that takes seconds; `changes` are merged into its sections."""
    settings: dict[str, dict[str, Any]] = {
        # Batch norm, whose statistics the workers have to agree on before they evaluate.
        "model": {**SMALL_MODEL, "backbone": {"depth": 18, "norm": "batch"}},
        "data": {
            "root": str(folder / "shapes"),
            "synthetic": {"training_images": 24, "validation_images": 7, "seed": 0},
            "canvases": [[128, 128]],
            "rows_per_shard": 8,
        },
        "optim": {"name": "adamw", "learning_rate": 0.001, "warmup_steps": 2},
        "train": {"epochs": 3, "batch_size_per_worker": 2, "log_every_steps": 2, "precision": "fp32"},
        "scaling": {"num_workers": 2},
        "run": {"name": "small", "storage_path": str(folder / "runs")},
    }
    for section, values in changes.items():
        settings[section] = {**settings.get(section, {}), **values}
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path
