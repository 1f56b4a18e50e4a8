"""The doctor's checks without a cluster: what is not well is named, with what to do; what is well is said."""

import contextlib
import json
import re
import socket
import threading
import urllib.error
from collections.abc import Iterator
from dataclasses import replace
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import ray

from jobs.doctor import main
from pipeline import cluster, cluster_access, doctor
from pipeline.cluster import Capacity
from pipeline.cluster_access import job_server_findings, port_finding, sent_files, working_directory_finding
from pipeline.command_line import ConfigurationError
from pipeline.errors import UserError
from pipeline.findings import Finding, fix, well
from pipeline.mlflow_server import server_finding
from pipeline.node_checks import (
    NodeReport,
    ask_nodes,
    machine_findings,
    needed_paths,
    shared_folders,
    sight_findings,
    version_findings,
)
from pipeline.resource_checks import resource_findings
from tests.pipeline.small import small_config

TOKEN = "a-token-of-a-test"


class Head:
    """What answers at the job server's address."""

    mode: str | None = "token"  # None: as a Ray that knows of no tokens
    ray_version = ray.__version__


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, type[Head]]]:
    """An HTTP server that answers as Ray's dashboard does, and MLflow's version."""

    class Settings(Head):
        pass

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answers = {
                "/api/authentication_mode": {"authentication_mode": Settings.mode},
                "/api/version": {"ray_version": Settings.ray_version},
            }
            authorised = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            refused = Settings.mode == "token" and self.path == "/api/version" and not authorised
            unknown = Settings.mode is None and self.path == "/api/authentication_mode"
            refusal = 403 if self.headers.get("Authorization") else 401
            self.send_response(404 if unknown else refusal if refused else 200)
            self.end_headers()
            self.wfile.write(b"3.99.0" if self.path == "/version" else json.dumps(answers.get(self.path, {})).encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    yield f"http://127.0.0.1:{server.server_port}", Settings
    server.shutdown()
    server.server_close()


def wrong(findings: Iterator[Finding]) -> list[str]:
    return [f"{finding.check}: {finding.text}" for finding in findings if not finding.ok]


def test_a_door_that_opens(head: tuple[str, type[Head]]) -> None:
    findings = list(job_server_findings(head[0]))
    assert [finding.check for finding in findings if finding.ok] == ["job server", "authentication", "ray"]
    assert len(findings) == 3


@pytest.mark.parametrize(("token", "code"), [("another", 403), ("", 401)])
def test_a_wrong_or_missing_token(
    head: tuple[str, type[Head]], token: str, code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    (line,) = wrong(job_server_findings(head[0]))
    assert f"HTTP {code}" in line
    assert "put the cluster's into RAY_AUTH_TOKEN" in line
    assert "another" not in line, "a token in a log"


def test_the_token_of_a_file(head: tuple[str, type[Head]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    (tmp_path / "token").write_text(TOKEN + "\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert wrong(job_server_findings(head[0])) == []
    monkeypatch.delenv("RAY_AUTH_MODE")
    assert "export RAY_AUTH_MODE=token" in wrong(job_server_findings(head[0]))[0]


def test_another_ray(head: tuple[str, type[Head]]) -> None:
    head[1].ray_version = "2.59.0"
    assert wrong(job_server_findings(head[0]))[0].startswith(f"ray: 2.59.0 there, {ray.__version__} here")


def test_a_cluster_without_a_token(head: tuple[str, type[Head]], monkeypatch: pytest.MonkeyPatch) -> None:
    head[1].mode = "disabled"
    assert wrong(job_server_findings(head[0])) == []  # on the loopback
    monkeypatch.setattr("pipeline.cluster_access.LOOPBACK", ("nowhere",))
    assert "whoever reaches the cluster can run code" in wrong(job_server_findings(head[0]))[0]


def test_nobody_listens() -> None:
    (line,) = wrong(job_server_findings("http://127.0.0.1:1"))
    assert "http://127.0.0.1:1 does not answer" in line
    assert not port_finding("127.0.0.1:1").ok
    assert not port_finding("nonsense").ok
    refused = doctor.refused_finding("127.0.0.2:6379", ConnectionError("Failed to connect\nand more"))
    assert refused.line.startswith(
        "FIX  authentication: 127.0.0.2:6379 does not take this process in (Failed to connect)"
    )
    assert doctor.head_finding(None) is None
    assert doctor.head_finding("auto") is None


@pytest.fixture
def other_server() -> Iterator[str]:
    """HOST:PORT of something that answers, but not in HTTP: as the port of a head node's own protocol does."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection:
                        connection.recv(1000)
                        connection.sendall(b"\0\0\x06\4\0\0\0\0\0\0\5\0\0\x40\0")

        threading.Thread(target=answer, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)


def test_the_port_of_something_else(other_server: str) -> None:
    (line,) = wrong(job_server_findings(f"http://{other_server}"))
    assert "RAY_ADDRESS has to be the dashboard's address" in line
    assert "does not answer" in server_finding(f"http://{other_server}").text


def test_a_server_that_is_no_dashboard(head: tuple[str, type[Head]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy's error is no matter of tokens."""

    def ask(address: str, path: str, token: str | None) -> dict[str, str]:
        if path == "/api/version":
            raise urllib.error.HTTPError(address, 502, "bad gateway", Message(), None)
        return {"authentication_mode": "token"}

    monkeypatch.setattr(cluster_access, "_ask", ask)
    (line,) = wrong(job_server_findings(head[0]))
    assert line.startswith("job server: ")
    assert "HTTP 502" in line


def test_another_python(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("Version mismatch: The cluster was started with:\n  Ray: 2.59.0\nThis process:\n  Ray: 2.60.0")
    finding = doctor.version_finding("head:6379", error)
    assert (finding.ok, finding.check) == (False, "versions")
    assert "Ray: 2.59.0 This process: Ray: 2.60.0; install" in finding.text


@pytest.mark.parametrize("address", ["http://me:hunter2@head:8265", "me:hunter2@head:6379"])
def test_a_password_in_the_address_is_not_shown(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigurationError, match="RAY_ADDRESS has a password in it") as caught:
        main([])
    assert "hunter2" not in str(caught.value)


def test_the_working_directory_is_what_ray_would_send(tmp_path: Path) -> None:
    for name, size in (("jobs/a.py", 10), ("runs/big", 5000), (".git/x", 3000), ("a.pyc", 20), ("data/b.dat", 400)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
    (tmp_path / ".gitignore").write_text("runs/\n")
    (tmp_path / ".rayignore").write_text("*.pyc\n")
    assert {name: size for name, size in sent_files(str(tmp_path)).items() if size > 9 and name[0] != "."} == {
        "jobs/a.py": 10, "data/b.dat": 400,
    }  # fmt: skip
    assert working_directory_finding(str(tmp_path)).ok
    with open(tmp_path / "weights.h5", "wb") as file:
        file.truncate(60_000_000)
    finding = working_directory_finding(str(tmp_path))
    assert not finding.ok
    assert "weights.h5 60.0 MB" in finding.text
    assert ".rayignore" in finding.text


REPORT = NodeReport(
    name="node 10.0.0.1 (head)",
    versions={"python": "3.11.7", "ray": "2.60.0", "torch": "2.15.0"},
    cuda="13.0",
    driver=None,
    gpus=(),
    shared_memory_bytes=30 * 10**9,
    disk_free_bytes=100 * 10**9,
    disk_used_fraction=0.3,
    unseen={},
    resources={"object_store_memory": 20e9},
)
GPU_NODE = replace(
    REPORT,
    name="node 10.0.0.2",
    driver="580.65.06",
    gpus=("NVIDIA L4", "NVIDIA L4"),
    resources={"CPU": 48.0, "GPU": 2.0, "object_store_memory": 20e9},
)


def test_versions() -> None:
    assert list(version_findings([REPORT, GPU_NODE])) == [
        well("versions", "python 3.11.7, ray 2.60.0, torch 2.15.0 on all 2 nodes")
    ]
    other = replace(GPU_NODE, versions={**GPU_NODE.versions, "torch": "2.14.1"})
    assert wrong(version_findings([REPORT, other])) == [
        "versions: torch differs: 2.15.0 on node 10.0.0.1 (head); 2.14.1 on node 10.0.0.2; give all nodes one image"
    ]
    without = replace(GPU_NODE, versions={"python": "3.11.7", "ray": "2.60.0"})
    assert "none on node 10.0.0.2" in wrong(version_findings([REPORT, without]))[0]


def test_folders_and_data_that_a_node_does_not_see(tmp_path: Path) -> None:
    config = small_config(data={"root": "s3://bucket/coco"}, run={"storage_path": str(tmp_path)})
    assert list(shared_folders(config)) == ["run.storage_path"]
    assert needed_paths(config)["data.sources.0.annotations"] == "s3://bucket/coco/annotations/instances_train.json"
    assert needed_paths(config)["data.validation_sources.0.images"] == "s3://bucket/coco/images"
    seen = list(sight_findings([REPORT, GPU_NODE], config))
    assert all(finding.ok for finding in seen)
    assert [finding.check for finding in seen] == ["run.storage_path", "data"]
    blind = replace(GPU_NODE, unseen={"run.storage_path": "gone", "data.sources.0.images": "Access Denied"})
    first, second = wrong(sight_findings([REPORT, blind], config))
    assert first.startswith("run.storage_path: what is written here is not seen by node 10.0.0.2 (gone)")
    assert second.startswith("data.sources.0.images: not seen by node 10.0.0.2 (Access Denied)")
    shapes = small_config(data={"root": "shapes", "synthetic": {}, "shards": "s3://bucket/shards"})
    assert needed_paths(shapes) == {}
    one_file = small_config(data={"root": "s3://bucket/coco", "validation_fraction": 0.1})
    assert not any("validation" in key for key in needed_paths(one_file))
    assert list(shared_folders(shapes)) == ["run.storage_path", "data.root", "data.shards"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"shared_memory_bytes": 64 * 2**20}, "shared memory: .*.2: /dev/shm has 0.1 GB for .* 20.0 GB; .*--shm-size"),
        ({"disk_free_bytes": 10**9}, "disk: node 10.0.0.2: 1 GB free"),
        ({"disk_used_fraction": 0.97}, "disk: node 10.0.0.2: 100 GB free, 97% used"),
        ({"driver": None, "gpus": ()}, "GPUs: node 10.0.0.2 offers 2, nvidia-smi shows 0"),
        ({"gpus": ("NVIDIA L4",)}, "GPUs: node 10.0.0.2 offers 2, nvidia-smi shows 1"),
        ({"driver": "535.10"}, "GPUs: node 10.0.0.2: driver 535.10 is too old for CUDA 13.0, which needs 580"),
        ({"cuda": None}, "GPUs: node 10.0.0.2: its torch is built for CPUs"),
    ],
)  # fmt: skip
def test_machines(changes: dict[str, object], expected: str) -> None:
    found = list(machine_findings([REPORT, GPU_NODE]))
    assert all(finding.ok for finding in found)
    assert found[-1].text == "2 x NVIDIA L4, driver 580.65.06, CUDA 13.0"
    (line,) = wrong(machine_findings([REPORT, replace(GPU_NODE, **changes)]))  # type: ignore[arg-type]
    assert re.match(expected, line), line


def test_drivers_that_differ() -> None:
    other = replace(GPU_NODE, name="node 10.0.0.3", driver="590.1")
    (line,) = wrong(machine_findings([GPU_NODE, other]))
    assert "580.65.06 on node 10.0.0.2, 590.1 on node 10.0.0.3" in line


NODES = [{"CPU": 3.0, "memory": 12e9, "object_store_memory": 4e9}]


def room(
    nodes: list[dict[str, float]], trials: int = 1, most: dict[str, float] | None = None, autoscaler: bool = False,
    **scaling: object,
) -> list[Finding]:  # fmt: skip
    config = small_config(scaling=scaling, data={"canvases": [[128, 128]], "object_store_megabytes": 512})
    return list(resource_findings(config, Capacity(nodes, autoscaler, most), trials))


def test_the_arithmetic_of_workers() -> None:
    first, second = room(NODES, num_workers=2)
    assert first == well("resources", "2 workers x (1 CPU) + 1 CPU for reading = 3 CPU; 1 nodes have 3 CPU")
    assert second.ok
    (finding,) = [finding for finding in room(NODES, num_workers=4) if not finding.ok]
    assert finding.text == (
        "4 workers x (1 CPU) + 1 CPU for reading = 5 CPU; 1 nodes have 3 CPU, room for 3 workers, "
        "and no autoscaler adds nodes; take --scaling.num_workers 2"
    )
    assert "lower --scaling.cpus_per_worker" in room(NODES, num_workers=1, cpus_per_worker=8)[0].text
    assert room(NODES, num_workers=3, min_workers=2)[0].ok, "it begins with fewer"


def test_the_arithmetic_of_trials() -> None:
    nodes = [{"CPU": 16.0, "memory": 64e9}]
    first = room(nodes, trials=4, num_workers=2)[0]
    assert first.ok
    assert "4 trials x (2 workers x (1 CPU) + 1 CPU for reading) = 12 CPU" in first.text
    assert "run 5 trials at once" in room(nodes, trials=6, num_workers=2)[0].text


def test_a_worker_never_spans_nodes() -> None:
    two = [NODES[0], NODES[0]]
    assert room(two, num_workers=2, cpus_per_worker=2)[0].ok
    (finding,) = [finding for finding in room(two, num_workers=1, cpus_per_worker=4) if not finding.ok]
    assert "= 5 CPU; 2 nodes have 6 CPU, room for 0 workers" in finding.text


def test_gpus_that_an_autoscaler_may_bring() -> None:
    head = [{"CPU": 0.0, "memory": 20e9}]
    most = {"CPU": 96.0, "GPU": 8.0}
    found = room(head, most=most, autoscaler=True, num_workers=8)
    assert found[0] == fix(
        "accelerator",
        "auto would train on CPUs: 0 GPUs are up now, the autoscaler may bring 8; say --scaling.accelerator gpu",
    )
    found = room(head, most=most, autoscaler=True, num_workers=8, accelerator="gpu")
    assert found[0].ok
    assert "= 9 CPU and 8 GPU" in found[0].text
    found = room(head, most=most, autoscaler=True, num_workers=16, accelerator="gpu")
    assert not found[0].ok
    assert "the autoscaler may bring 96 CPU and 8 GPU: raise its max_workers" in found[0].text
    assert room(head, autoscaler=True, num_workers=16)[0].ok


def test_memory() -> None:
    tight = [{"CPU": 8.0, "memory": 6e9, "object_store_memory": 256 * 2.0**20}]
    _, store, memory = room(tight, num_workers=4)
    assert store.text == "1 x data.object_store_megabytes 512 is more than the 256 MB of all nodes; lower it"
    assert memory.text.startswith("a node has 6 GB for 4 workers of about 2 GB")
    assert not store.ok
    assert not memory.ok


def test_mlflow(head: tuple[str, type[Head]], tmp_path: Path) -> None:
    assert "MLflow 3.99.0 there" in server_finding(head[0]).text
    assert server_finding(head[0]).ok
    away = server_finding("http://127.0.0.1:1")
    assert (away.ok, away.check) == (False, "mlflow")
    assert "see to run.mlflow_uri" in away.text
    assert server_finding(f"sqlite:///{tmp_path}/mlflow.db").ok
    (tmp_path / "file").touch()
    for uri, part in (
        ("htp://mlflow:5000", "has to begin with http://, https:// or sqlite:///"),
        ("mlflow:5000", "has to begin with http://"),
        (f"sqlite:///{tmp_path}/file/mlflow.db", "file is no folder that can be written to"),
        ("postgresql://me@127.0.0.1:1/db", "postgresql at 127.0.0.1 does not answer"),
    ):
        finding = server_finding(uri)
        assert (finding.ok, part in finding.text) == (False, True), finding
    bucket = small_config(run={"storage_path": "s3://bucket/runs"})
    (line,) = wrong(doctor._mlflow(bucket))
    assert "name a server with --run.mlflow_uri" in line


def test_a_job_looks_for_itself_where_there_are_several_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    config = small_config()
    monkeypatch.setattr(doctor, "ask_nodes", lambda _: ([REPORT, GPU_NODE], []))
    monkeypatch.setattr(cluster, "capacity", lambda: Capacity(NODES, False, None))
    doctor.check_at_start(config, said.append)
    assert said == []
    monkeypatch.setattr(cluster, "capacity", lambda: Capacity(NODES * 2, False, None))
    doctor.check_at_start(config, said.append)
    assert said == ["cluster: 2 nodes have the same versions and see runs"]
    blind = replace(GPU_NODE, versions={}, unseen={"run.storage_path": "gone"})
    monkeypatch.setattr(doctor, "ask_nodes", lambda _: ([REPORT, blind], []))
    with pytest.raises(UserError, match=r"^versions: python differs: .* \(and 3 more: python jobs/doctor\.py\)$"):
        doctor.check_at_start(config, said.append)


@pytest.mark.cluster
def test_nodes_are_asked(local_ray: None, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "train.json").write_text("{}")
    sources = {"sources": [{"annotations": "train.json"}], "validation_sources": [{"annotations": "val.json"}]}
    config = small_config(data={"root": str(tmp_path), **sources}, run={"storage_path": str(tmp_path / "runs")})
    (report,), findings = ask_nodes(config)
    assert findings == []
    assert report.unseen == {"data.validation_sources.0.annotations": f"{tmp_path}/val.json is not there"}
    assert report.versions["ray"] == ray.__version__
    assert report.resources["CPU"] == 3.0
    assert report.disk_free_bytes > 0
    assert list((tmp_path / "runs").iterdir()) == [], "a mark was left behind"

    blocked = small_config(data={"root": str(tmp_path), **sources}, run={"storage_path": str(tmp_path / "train.json")})
    reports, (finding,) = ask_nodes(blocked)
    assert finding.text.startswith(f"{tmp_path}/train.json cannot be written")
    seen = list(sight_findings(reports, blocked, {finding.check}))
    assert [line.check for line in seen] == ["data.validation_sources.0.annotations"]


def test_authentication_seen_from_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that waits for nodes, or that others can reach, is no laptop."""
    from ray._private.authentication import authentication_utils

    def found(nodes: list[dict[str, float]], autoscaler: bool, address: str, token: bool = False) -> bool:
        monkeypatch.setattr(authentication_utils, "is_token_auth_enabled", lambda: token)
        monkeypatch.setattr(cluster, "capacity", lambda: Capacity(nodes, autoscaler, None))
        monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: address)
        (finding,) = doctor._authentication()
        return finding.ok

    one = [{"CPU": 2.0}]
    assert found(one, False, "127.0.0.1")
    assert not found(one, True, "127.0.0.1")
    assert not found(one, False, "10.0.0.5")
    assert not found(one * 2, False, "127.0.0.1")
    assert found(one * 2, True, "10.0.0.5", token=True)


def test_shards_alone_need_no_annotations(tmp_path: Path) -> None:
    config = small_config(data={"root": str(tmp_path / "coco"), "shards": str(tmp_path / "shards")})
    assert "data.sources.0.annotations" in needed_paths(config), "neither is there"
    for split in ("training", "validation"):
        assert needed_paths(config) != {}, "half a data set"
        (tmp_path / "shards" / split).mkdir(parents=True)
        (tmp_path / "shards" / split / "manifest.json").write_text("{}")
    assert needed_paths(config) == {}
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    (tmp_path / "coco" / "annotations" / "instances_train.json").write_text("{}")
    assert "data.sources.0.images" in needed_paths(config)


def test_a_head_that_knows_of_no_tokens_is_asked_for_its_version(head: tuple[str, type[Head]]) -> None:
    head[1].mode = None
    head[1].ray_version = "2.40.0"
    assert wrong(job_server_findings(head[0])) == [
        f"ray: 2.40.0 there, {ray.__version__} here; install the cluster's version, or use its image"
    ]
