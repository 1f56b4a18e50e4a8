"""Will this job run on that cluster? Asked before a GPU is paid for; each line says ok, or what to do.

    python jobs/doctor.py --config configs/demo.yaml                          # on this machine
    RAY_ADDRESS=http://127.0.0.1:8265 python jobs/doctor.py --config ...       # on the cluster behind that address
    python jobs/doctor.py --config ... --cluster cluster.yaml                  # is the file right, before `ray up`?

Exits with 1 where something is to be done. The last line printed is JSON.
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without being installed

from pipeline.command_line import FAILURE_EXIT_CODE, ConfigurationError, parse, run_job, say, say_summary
from pipeline.config import has_secret
from pipeline.sweep_config import SweepConfig


def main(arguments: list[str]) -> None:
    """Parse, look, tell."""
    optional = {
        "cluster": "a cluster.yaml or a RayJob to look at, instead of a running cluster",
        "trials": "trials of a sweep at once; by default sweep.max_concurrent_trials, or 1",
    }
    options = parse(__doc__ or "", arguments, optional=optional, config_type=SweepConfig)
    config: SweepConfig = options.experiment
    trials = options.trials or str(config.sweep.max_concurrent_trials or 1)
    if not trials.isdigit() or int(trials) < 1:
        raise ConfigurationError(f"--trials {trials}: has to be a whole number of at least 1")

    from pipeline import cluster, doctor
    from pipeline.findings import Finding, fix, well

    started = time.monotonic()
    address = os.environ.get("RAY_ADDRESS")
    if address is not None and (has_secret(address) or "@" in address):
        raise ConfigurationError("RAY_ADDRESS has a password in it; the token goes into RAY_AUTH_TOKEN or its file")
    counts = {True: 0, False: 0}

    def tell(finding: Finding) -> None:
        counts[finding.ok] += 1
        say(finding.line)

    if options.cluster is not None:
        problems = _file_problems(options.cluster, config)
        for problem in problems:
            tell(fix("cluster file", f"{options.cluster}: {problem}"))
        if not problems:
            tell(well("cluster file", f"{options.cluster} is what Ray takes"))
    elif address is not None and address.startswith(("http://", "https://")):
        for finding in doctor.outside_findings(address, "."):
            tell(finding)
        if not counts[False]:
            counts[doctor.send_doctor(address, arguments, say)] += 1
    else:
        head = doctor.head_finding(address)
        if head is not None:
            tell(head)
        if not counts[False]:
            os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "5")  # seconds that Ray tries a wrong token
            try:
                cluster.connect(options.debug, reads_data=False)
            except ConnectionError as error:
                tell(doctor.refused_finding(address, error))
            except RuntimeError as error:
                if not str(error).startswith("Version mismatch"):
                    raise
                tell(doctor.version_finding(address, error))
        if not counts[False]:
            for finding in doctor.inside_findings(config.base(), int(trials)):
                tell(finding)
    say_summary({"well": not counts[False], "seconds": round(time.monotonic() - started, 1)})
    if counts[False]:
        sys.exit(FAILURE_EXIT_CODE)


def _file_problems(path: str, config: SweepConfig) -> list[str]:
    """What is wrong with a cluster.yaml or a RayJob, a line each."""
    from pipeline.cluster_file import cluster_file_problems, placeholders, read_cluster_file, storage_problems
    from pipeline.node_checks import shared_folders
    from pipeline.rayjob_file import rayjob_problems

    content = read_cluster_file(path)
    if content.get("kind") == "RayJob":
        return [*placeholders(content), *rayjob_problems(content)]
    problems = cluster_file_problems(path)
    if not problems and os.path.isabs(config.run.storage_path):  # the default is for one machine
        problems += storage_problems(content, shared_folders(config.base()))
    return problems


if __name__ == "__main__":
    run_job(main)
