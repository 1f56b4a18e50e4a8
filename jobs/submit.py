"""Submit a training as a Ray job to a head node of its own on the loopback, follow it, and end what was started.

    python jobs/submit.py --config configs/demo.yaml --storage_path runs [further arguments of jobs/train.py]

Shows on one machine what `ray job submit -- python jobs/train.py` does on a cluster. Ends with the job's result.
"""

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without being installed

from pipeline.cluster import HEALTH_CHECKS, LOOPBACK_ONLY, local_cpus
from pipeline.command_line import parse, run_job
from pipeline.rayjob_file import OPTIONS

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS = 120.0


def main(arguments: list[str]) -> None:
    """Start a head node, submit, follow, end the node, with the job's exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", action="append", help="file, relative to the repository (configs/demo.yaml); may be repeated"
    )
    parser.add_argument("--storage_path", default="runs", help="where runs are kept")
    options, further = parser.parse_known_args(arguments)
    storage_path = Path(options.storage_path).resolve()
    configs = options.config or ["configs/demo.yaml"]
    data_root = _data_root(configs, storage_path, further)  # a wrong configuration shows before Ray starts
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the head node is ended then, too

    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: unix sockets below it may have 107 bytes
    ports = _free_ports(4)
    environment = {
        **HEALTH_CHECKS,
        **os.environ,
        **LOOPBACK_ONLY,
        # Whether Ray asks for a token depends on files of the machine unless it is said.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": uuid.uuid4().hex + uuid.uuid4().hex,
        "RAY_ADDRESS": f"http://127.0.0.1:{ports[1]}",
    }
    print(f"submit: node folder {folder}", flush=True)
    head = _start_head(ports, folder, environment)
    try:
        _wait_for_head(head, ports[1])
        command = [
            *_ray("job", "submit", "--working-dir", str(ROOT), "--"),
            *("python", "jobs/train.py", *_options_of(configs)),
            *further,
            *("--run.storage_path", str(storage_path), "--data.root", str(data_root)),
        ]
        print("submit:", " ".join(command[3:]), flush=True)
        sys.exit(subprocess.run(command, env=environment, check=False).returncode)
    finally:
        _end(head)
        shutil.rmtree(folder, ignore_errors=True)


def _options_of(configs: Iterable[str]) -> list[str]:
    """Configuration files as options of a job."""
    return [word for config in configs for word in ("--config", config)]


def _data_root(configs: list[str], storage_path: Path, further: list[str]) -> str:
    """Where the job finds or makes its data: the job's own folder is thrown away, so an absolute path outside of it."""
    there = _options_of(str(ROOT / config) for config in configs)
    root = str(parse("", [*there, *further], **OPTIONS["train"]).experiment.data.root)
    if "://" in root or Path(root).is_absolute():
        return root
    inside_runs = Path(root).parts[:1] == ("runs",)
    return str(storage_path.joinpath(*Path(root).parts[1:]) if inside_runs else Path(root).resolve())


def _ray(*arguments: str) -> list[str]:
    """Command line of the Ray that belongs to this Python."""
    return [sys.executable, "-m", "ray.scripts.scripts", *arguments]


def _start_head(ports: list[int], folder: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """A head node in a process group of its own, reachable from this machine alone."""
    command = _ray(
        *("start", "--head", "--block", "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1"),
        *(f"--num-cpus={local_cpus()}", f"--temp-dir={folder}", "--disable-usage-stats", "--include-dashboard=true"),
        *(f"--port={ports[0]}", f"--dashboard-port={ports[1]}", f"--dashboard-agent-listen-port={ports[2]}"),
        f"--ray-client-server-port={ports[3]}",
    )
    path = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    started = {**environment, "PATH": path}
    started.pop("RAY_ADDRESS")
    log = open(folder / "head.log", "wb")  # noqa: SIM115 - the head keeps it
    return subprocess.Popen(command, env=started, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def _wait_for_head(head: subprocess.Popen[bytes], port: int) -> None:
    """Until the job server listens.

    Raises:
        SystemExit: the head node ended, or does not come up in time.
    """
    deadline = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        if head.poll() is not None:
            raise SystemExit(f"error: the head node ended with code {head.returncode}")
        if time.monotonic() > deadline:
            raise SystemExit(f"error: the head node did not come up within {START_SECONDS:g} seconds")
        time.sleep(0.5)


def _free_ports(number: int) -> list[int]:
    """Ports that nobody listens on, below the range that Ray gives its workers."""
    ports: list[int] = []
    for candidate in range(20000 + os.getpid() % 5000, 32000):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", candidate))
            ports.append(candidate)
        if len(ports) == number:
            return ports
    raise SystemExit("error: no free ports on the loopback")


def _end(head: subprocess.Popen[bytes]) -> None:
    """End the head node and what it started, by its process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(head.pid, signal.SIGTERM)
    try:
        head.wait(timeout=20)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGKILL)
        head.wait()


if __name__ == "__main__":
    run_job(main)
