import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.allocator import KEEP_FREED_MEMORY, VARIABLE, runtime_environment

ROOT = Path(__file__).resolve().parents[2]
COUNT_FAULTS = """
import resource
import torch
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(64 << 20, dtype=torch.uint8).fill_(1)  # and free it
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for _ in range(20):  # until the heap is as large as it gets
    faults()
print(sum(faults() for _ in range(10)))
"""


def run(code: str, *arguments: str, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE} | variables
    command = [sys.executable, "-c", code] if not arguments else [sys.executable, *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_freed_memory_is_used_again_without_page_faults() -> None:
    assert int(run(COUNT_FAULTS, **{VARIABLE: KEEP_FREED_MEMORY})) < 100
    assert int(run(COUNT_FAULTS)) > 100  # 16,384 pages each time, or 32 where all pages are huge


def test_a_users_own_setting_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert runtime_environment() == {"env_vars": {VARIABLE: KEEP_FREED_MEMORY}}
    monkeypatch.setenv(VARIABLE, "glibc.malloc.arena_max=2")
    assert runtime_environment() == {"env_vars": {VARIABLE: "glibc.malloc.arena_max=2"}}


def test_a_program_starts_anew_once_with_its_arguments(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from pipeline import allocator\n"
        "print('started')\n"
        "allocator.restart_keeping_freed_memory()\n"
        "print(sys.argv[1:], os.environ[allocator.VARIABLE])\n"
    )
    again = run("", str(script), "--size", "3")
    assert again.splitlines() == ["started", "started", f"['--size', '3'] {KEEP_FREED_MEMORY}"]
    assert run("", str(script), "x", **{VARIABLE: "own"}).splitlines() == ["started", "['x'] own"]


@pytest.mark.cluster
@pytest.mark.usefixtures("local_ray")
def test_a_ray_task_starts_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.delenv(VARIABLE, raising=False)
    look = ray.remote(lambda: os.environ.get(VARIABLE)).options(runtime_env=runtime_environment())
    assert ray.get(look.remote()) == KEEP_FREED_MEMORY
