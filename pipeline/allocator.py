"""How a process that computes keeps its memory: freed tensors stay with it instead of going back to the kernel."""

from __future__ import annotations

import os
import sys
from typing import Any

VARIABLE = "GLIBC_TUNABLES"
KEEP_FREED_MEMORY = ":".join(
    (
        "glibc.malloc.mmap_max=0",  # no block is so large that it is mapped, and unmapped, alone
        "glibc.malloc.trim_threshold=8589934592",
        "glibc.malloc.hugetlb=1",  # huge pages where the kernel gives them on request
        "glibc.malloc.arena_max=1",  # else a thread has heaps of 64 MB of its own, too small for a batch's features
    )
)
"""Without it every step maps the memory of its activations anew, a page fault for every 4 KB: a tenth of a step.

Read by glibc 2.26 and later (huge pages: 2.35) when a process starts; other C libraries ignore it. A process that has
it never shrinks: it stays at the largest size that it ever had.
"""


def runtime_environment() -> dict[str, Any]:
    """Ray's `runtime_env` of workers that compute, and of the tasks that they start.

    A setting of the variable that the driver has from its user stays.
    """
    return {"env_vars": {VARIABLE: os.environ.get(VARIABLE, KEEP_FREED_MEMORY)}}


def restart_keeping_freed_memory() -> None:
    """Start this Python program anew with the variable set, where it is not: for programs that Ray does not start."""
    if VARIABLE not in os.environ:
        os.environ[VARIABLE] = KEEP_FREED_MEMORY
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
