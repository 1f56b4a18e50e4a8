"""Checkpoints of a run in a bucket: an S3 server on the loopback."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from moto.server import ThreadedMotoServer
from pyarrow import fs

from pipeline import storage
from pipeline.checkpoint import DESCRIPTION_FILE, MODEL_FILE, OPTIMIZER_FILE, verify_checkpoint
from pipeline.checkpoint_store import CheckpointStore, best, check_writable, local_folder
from pipeline.errors import UserError
from tests.pipeline.test_checkpoint_store import commit, nothing, steps


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        storage._bucket_filesystem.cache_clear()
        fs.S3FileSystem(
            endpoint_override=f"{host}:{port}", scheme="http", region="us-east-1", allow_bucket_creation=True
        ).create_dir("runs")
        yield "s3://runs"
    storage._bucket_filesystem.cache_clear()
    server.stop()


@pytest.fixture(params=["s3", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> CheckpointStore:
    if request.param == "file":
        return CheckpointStore(f"file://{tmp_path}/run")
    return CheckpointStore(f"{request.getfixturevalue('bucket')}/{tmp_path.name}")


def test_it_comes_whole_is_kept_and_is_removed(store: CheckpointStore) -> None:
    assert store.list() == []
    assert store.newest_whole(pytest.fail) is None
    paths = [commit(store, step, **metrics) for step, metrics in ((1, {"segm_AP": 0.2}), (2, {}), (3, {}))]
    assert paths[0] == f"{store.run_folder}/checkpoint-0000001"
    assert store.newest_whole(pytest.fail) == paths[2]
    with local_folder(paths[2]) as folder:
        assert verify_checkpoint(folder).step == 3
        assert {path.name for path in Path(folder).iterdir()} == {DESCRIPTION_FILE, MODEL_FILE, OPTIMIZER_FILE}
    store.prune(keep_best=1, keep_last=1)
    assert steps(store) == [1, 3]
    chosen = best(store.list())
    assert chosen is not None
    assert chosen.path == paths[0]
    assert all("0000002" not in name for name in storage.list_files(store.run_folder))


def test_damaged_or_half_written_it_is_refused(store: CheckpointStore) -> None:
    first, second = commit(store, 1), commit(store, 2)
    content = bytearray(storage.read_bytes(f"{second}/{MODEL_FILE}"))
    content[200] ^= 1
    storage.write_bytes(f"{second}/{MODEL_FILE}", bytes(content))
    refused: list[str] = []
    assert store.newest_whole(refused.append) == first
    assert len(refused) == 1
    assert refused[0].startswith(f"{second} is refused: ")
    assert MODEL_FILE in refused[0]

    def upload_half(folder: str) -> None:
        torch.save({}, f"{folder}/{OPTIMIZER_FILE}")
        raise OSError("the network is gone")

    with pytest.raises(UserError, match=r"checkpoint-0000003: cannot be written \(the network is gone\); the last"):
        store.commit(3, upload_half, nothing)
    assert store.newest_whole(refused.append) == first


def test_a_bucket_that_is_not_there_is_named(bucket: str) -> None:
    check_writable(f"{bucket}/run")
    with pytest.raises(UserError, match=r"^run\.storage_path: s3://nowhere/run cannot be written \("):
        check_writable("s3://nowhere/run")
    with pytest.raises(UserError, match="no checkpoint"), local_folder(f"{bucket}/nothing"):
        pass
