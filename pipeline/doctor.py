"""Whether a job will run on a cluster, asked before: every check one line, which says ok or what to do.

From outside of a cluster (RAY_ADDRESS is the address of its job server) the door is looked at, and a job is sent in
that looks at the rest; in a job, or without a cluster, everything is looked at from here.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator

from pipeline import cluster, storage
from pipeline.cluster_access import TOKEN_PLACES, job_server_findings, port_finding, working_directory_finding
from pipeline.config import ExperimentConfig
from pipeline.errors import UserError
from pipeline.findings import Finding, fix, well
from pipeline.mlflow_runs import default_uri
from pipeline.mlflow_server import server_finding
from pipeline.node_checks import ask_nodes, machine_findings, sight_findings, version_findings
from pipeline.resource_checks import resource_findings

Say = Callable[[str], None]
SENT_JOB_SECONDS = 120.0
POLL_SECONDS = 0.3


def outside_findings(address: str, folder: str) -> Iterator[Finding]:
    """What can be told from where a job is submitted."""
    yield working_directory_finding(folder)
    yield from job_server_findings(address)


def inside_findings(config: ExperimentConfig, trials: int = 1) -> Iterator[Finding]:
    """What can be told where Ray is running."""
    yield from _authentication()
    yield from _mlflow(config)
    yield from resource_findings(config, cluster.capacity(), trials)
    reports, findings = ask_nodes(config)
    yield from findings
    if reports:
        yield from version_findings(reports)
        yield from sight_findings(reports, config, {finding.check for finding in findings})
        yield from machine_findings(reports)


def head_finding(address: str | None) -> Finding | None:
    """Whether the head node listens, where RAY_ADDRESS names one; asked before Ray waits for it."""
    return port_finding(address) if address and ":" in address else None


def refused_finding(address: str | None, error: ConnectionError) -> Finding:
    """A head node that is reached and does not take this process in: most likely, the token is another one."""
    return fix(
        "authentication",
        f"{address} does not take this process in ({str(error).splitlines()[0]}); "
        f"set RAY_AUTH_MODE as the cluster has it, and put its token into {TOKEN_PLACES}",
    )


def version_finding(address: str | None, error: RuntimeError) -> Finding:
    """A cluster whose Ray or Python is another one than this process's, as Ray says it."""
    said = " ".join(str(error).split())
    return fix("versions", f"{address}: {said}; install the cluster's versions here, or run it in the cluster's image")


def check_at_start(config: ExperimentConfig, say: Say, reads_data: bool = True) -> None:
    """The part of the checks that takes a second or two and that a job does for itself, on a cluster of several nodes.

    Args:
        config: what the job needs.
        say: takes a line for a person to read.
        reads_data: whether it reads the data set of the configuration, and writes into its storage.

    Raises:
        UserError: nodes differ in their versions, or do not see what the job needs.
    """
    if len(cluster.capacity().nodes) < 2:
        return
    reports, findings = ask_nodes(config if reads_data else None)
    unwritten = {finding.check for finding in findings}
    findings += version_findings(reports)
    findings += sight_findings(reports, config, unwritten) if reads_data else []
    wrong = [finding for finding in findings if not finding.ok]
    if wrong:
        more = f" (and {len(wrong) - 1} more: python jobs/doctor.py)" if len(wrong) > 1 else ""
        raise UserError(f"{wrong[0].check}: {wrong[0].text}{more}")
    seen = f" and see {config.run.storage_path}" if reads_data else ""
    say(f"cluster: {len(reports)} nodes have the same versions{seen}")


def _authentication() -> Iterator[Finding]:
    """Whether calls to the cluster that this process belongs to want a token."""
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    if is_token_auth_enabled():
        yield well("authentication", "every call wants the cluster's token")
    elif cluster.capacity().autoscaler or len(cluster.capacity().nodes) > 1 or not _on_loopback():
        yield fix(
            "authentication",
            "off: whoever reaches the cluster can run code on it; start all nodes with RAY_AUTH_MODE=token",
        )
    else:
        yield well("authentication", "off, on one node that listens at the loopback alone")


def _on_loopback() -> bool:
    """Whether the node of this process has the loopback's address."""
    import ray

    return str(ray.util.get_node_ip_address()).startswith("127.")


def _mlflow(config: ExperimentConfig) -> Iterator[Finding]:
    """Whether the tracking server answers, or a sqlite file can be had."""
    try:
        uri = config.run.mlflow_uri or default_uri(storage.absolute(config.run.storage_path))
    except UserError as error:
        yield fix("mlflow", str(error))
        return
    yield server_finding(uri)


def send_doctor(address: str, arguments: list[str], say: Say) -> bool:
    """Submit the doctor as a job, and say what it says.

    Args:
        address: of the job server.
        arguments: of the doctor's command line.
        say: takes its lines.

    Returns:
        Whether it found all well.

    Raises:
        UserError: the job does not begin in time.
    """
    import logging

    from ray.job_submission import JobStatus, JobSubmissionClient

    logging.disable(logging.INFO)  # of Ray, which says what it packs
    client = JobSubmissionClient(address)
    entrypoint = shlex.join(["python", "jobs/doctor.py", *arguments])
    job = client.submit_job(entrypoint=entrypoint, runtime_env={"working_dir": "."})
    deadline = time.monotonic() + SENT_JOB_SECONDS
    told = 0
    while True:
        status = client.get_job_status(job)
        lines = client.get_job_logs(job).splitlines()
        checks = [line for line in lines if line.startswith(("ok ", "FIX ", "error: "))]
        for line in checks[told:]:
            say(line)
        told = len(checks)
        if status not in (JobStatus.PENDING, JobStatus.RUNNING):
            break
        if time.monotonic() > deadline:
            client.stop_job(job)
            raise UserError(
                f"the doctor's own job {job} is {status} after {SENT_JOB_SECONDS:g} seconds; "
                f"look at `ray status` and `ray job logs {job}`"
            )
        time.sleep(POLL_SECONDS)
    named = any(line.startswith(("FIX ", "error: ")) for line in checks)
    if not told or (status != JobStatus.SUCCEEDED and not named):
        say(fix("job", f"{job} ended as {status} before its last check: {lines[-1] if lines else 'no output'}").line)
    return bool(status == JobStatus.SUCCEEDED)
