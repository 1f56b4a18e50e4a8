"""No code from data, no shell from configuration, no secret in what is kept, no port that the network reaches."""

import ast
import contextlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.checkpoint import MODEL_FILE, OPTIMIZER_FILE, load_model_state, load_optimizer_state
from pipeline.command_line import ConfigurationError, parse
from pipeline.errors import UserError
from pipeline.initial_weights import load_initial_weights
from pipeline.predict_config import PredictSettings
from pipeline.prediction_inputs import list_inputs, read_column
from pipeline.prediction_schema import read_plain_table
from pipeline.shards import ShardSet
from tests.jobs.running import ROOT, environment, write_small_experiment
from tests.jobs.sockets import beyond_loopback, descendants, listening

SOURCES = [path for folder in ("jobs", "pipeline", "model") for path in sorted((ROOT / folder).glob("*.py"))]


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Every call in a file, by what is called: `torch.load`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def unsafe_calls(path: Path) -> list[str]:
    """Calls that run what they are given: as code, as a pickle, or in a shell."""
    found = []
    for name, call in calls(path):
        keywords = {keyword.arg: keyword.value for keyword in call.keywords}

        def given(argument: str, keywords: dict[str | None, ast.expr] = keywords) -> object:
            value = keywords.get(argument)
            return value.value if isinstance(value, ast.Constant) else value

        bad = name in ("eval", "exec", "compile", "os.system", "os.popen", "subprocess.getoutput", "yaml.load") or (
            name.endswith(("pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load", "marshal.loads"))
        )
        bad |= name == "torch.load" and given("weights_only") is not True
        bad |= name in ("np.load", "numpy.load") and given("allow_pickle") not in (None, False)
        bad |= name.startswith(("subprocess.", "asyncio.create_subprocess")) and (
            given("shell") not in (None, False) or name.endswith("_shell")
        )
        if bad:
            found.append(f"{path.name}:{call.lineno}: {name}")
    return found


def test_nothing_is_unpickled_and_no_shell_is_started() -> None:
    assert len(SOURCES) > 80
    assert [line for path in SOURCES for line in unsafe_calls(path)] == []


@pytest.mark.parametrize(
    "code",
    [
        "torch.load('a')", "torch.load('a', weights_only=False)", "pickle.load(file)", "eval(text)", "yaml.load(text)",
        "subprocess.run(text, shell=True)", "os.system(text)", "np.load(path, allow_pickle=True)", "exec(code)",
        "asyncio.create_subprocess_shell(text)",
    ],
)  # fmt: skip
def test_an_unsafe_call_is_found(code: str, tmp_path: Path) -> None:
    (tmp_path / "file.py").write_text(code)
    assert len(unsafe_calls(tmp_path / "file.py")) == 1
    (tmp_path / "file.py").write_text("torch.load('a', weights_only=True); subprocess.run([text]); np.load(path)")
    assert unsafe_calls(tmp_path / "file.py") == []


class Hostile:
    """Writes a file where it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.proof),)


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_a_hostile_checkpoint_runs_nothing(form: str, tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    hostile = tmp_path / "hostile"
    if form == "torch":
        torch.save({"state": Hostile(proof)}, hostile)
    else:
        hostile.write_bytes(pickle.dumps(Hostile(proof)))
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in (MODEL_FILE, OPTIMIZER_FILE):
        (folder / name).write_bytes(hostile.read_bytes())
    model = torch.nn.Linear(1, 1)
    with pytest.raises(UserError, match=MODEL_FILE):
        load_model_state(str(folder), model)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=OPTIMIZER_FILE):
        load_optimizer_state(str(folder), torch.optim.SGD(model.parameters()))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_initial_weights(str(folder / MODEL_FILE), model)  # type: ignore[arg-type]
    (folder / "manifest.json").write_bytes(hostile.read_bytes())
    with pytest.raises((UserError, ValueError)):
        ShardSet(str(folder))
    assert not proof.exists()
    with open(hostile, "rb") as file:  # and it is hostile: this is what a careless reader does
        torch.load(file, weights_only=False) if form == "torch" else pickle.load(file)
    assert proof.exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("run.mlflow_uri", "http://me:hunter2@mlflow:5000"),
        ("run.storage_path", "s3://AKIA:hunter2@bucket/runs"),
        ("data.root", "s3://bucket/data?region=a&secret_key=hunter2"),
        ("data.root", "s3://AKIA:wJalr/hunter2@bucket/data"),
        ("run.mlflow_uri", "http://me:hun/hunter2@mlflow:5000"),
        *[
            ("data.root", f"https://host/data{mark}=hunter2")
            for mark in ("?pwd", "?a=b&pass", "?sas", "?AWSAccessKeyId", "#token", "?a=b;password")
        ],
        ("data.root", "https://host/data?X-Amz-Signature=hunter2"),
        ("data.root", "https://host/data?X-Amz-Credential=hunter2"),
        ("data.root", "https://host/data?sig=hunter2"),
        ("data.root", "https://host/data?a=b&api_key=hunter2"),
        ("run.mlflow_uri", "http://hunter2@mlflow"),
        ("run.mlflow_uri", "postgresql://me:hunt/er2hunter2@database/mlflow"),
    ],
)
def test_a_secret_in_the_configuration_is_refused_and_not_shown(key: str, value: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{key} has a password or key in its address") as caught:
        parse("", [f"--{key}", value])
    assert "hunter2" not in str(caught.value)
    assert "MLFLOW_TRACKING_USERNAME" in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [
        "s3://bucket/data?endpoint_override=127.0.0.1:9000&scheme=http",
        "http://mlflow:5000/a:b",
        "gs://b@c/d",
        "http://mlflow:5000/a@b",
        "http://mlflow:5000",
        "s3://bucket/a:b@c",
        "https://host/data?compass=north",
    ],
)
def test_addresses_without_a_secret_are_taken(value: str) -> None:
    assert parse("", ["--data.root", value]).experiment.data.root == value


SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "secret-of-the-bucket",
    "MLFLOW_TRACKING_PASSWORD": "secret-of-mlflow",
    "RAY_AUTH_TOKEN": "secret-of-the-cluster-0123456789",
}


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """For Ray, whose unix sockets below it may have 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.cluster
def test_a_training_hears_the_loopback_alone_and_keeps_no_secret(tmp_path: Path, short_folder: Path) -> None:
    """The store with which torch's workers find each other is the one exception: PyTorch binds it to every address."""
    config = write_small_experiment(tmp_path, train={"epochs": 1})
    seen: dict[str, str] = {}
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "jobs/train.py", "--config", str(config), "--debug"],
            stdout=log, stderr=log, cwd=ROOT, start_new_session=True,
            env={**environment(), **SECRETS, "RAY_AUTH_MODE": "token", "RAY_TMPDIR": str(short_folder)},
        )  # fmt: skip
        try:
            while process.poll() is None:
                seen |= listening(descendants(process.pid))
                time.sleep(0.2)
        finally:  # nothing is left where the test is interrupted
            for started in descendants(process.pid) if process.poll() is None else ():
                os.kill(started, signal.SIGKILL)
    text = (tmp_path / "log").read_text(errors="replace")
    assert process.returncode == 0, text[-3000:]
    assert any("raylet" in holder for holder in seen.values())
    assert any("gcs_server" in holder for holder in seen.values())
    reached = beyond_loopback(seen)
    assert {name: holder for name, holder in reached.items() if "TrainWorker" not in holder} == {}
    assert len(reached) <= 1, reached
    kept = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert {"mlflow.db", "run.json", "result.json", "config.json"} <= {path.name for path in kept}
    logs = [path for path in short_folder.rglob("logs/*") if path.is_file()]
    assert len(logs) > 5
    for secret in SECRETS.values():
        assert secret not in text
        assert [str(path) for path in [*kept, *logs] if secret.encode() in path.read_bytes()] == []
    summaries = [line for line in text.splitlines() if line.startswith("{")]
    assert json.loads(summaries[-1])["steps"] > 0


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize("column", ["bytes", "path", "key"])
def test_a_hostile_table_runs_nothing(suffix: str, column: str, tmp_path: Path) -> None:
    """Ray Data keeps Python objects as pickles under an extension type that it registers with Arrow."""
    import ray.data  # noqa: F401 - registers it

    proof, path = tmp_path / "proof", tmp_path / f"hostile.{suffix}"
    stored = pa.array([pickle.dumps(Hostile(proof))], type=pa.large_binary())
    mark = {b"ARROW:extension:name": b"ray.data.arrow_pickled_object", b"ARROW:extension:metadata": b""}
    schema = pa.schema([pa.field(column, pa.large_binary(), metadata=mark), pa.field("plain", pa.string())])
    table = pa.table([stored, pa.array(["a"])], schema=schema)
    if suffix == "parquet":
        pq.write_table(table, path, store_schema=True)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
            writer.write_table(table)
    assert read_column(str(path), "plain") == ["a"], "what is plain in it can be read"
    with pytest.raises(UserError, match=f"column {column} is of the extension type ray.data.arrow_pickled_object"):
        read_column(str(path), column)
    settings = PredictSettings(key_column="key" if column == "key" else None, path_column="path", bytes_column="plain")
    with contextlib.suppress(UserError):
        list_inputs(str(path), settings)
    if suffix == "parquet":
        with pytest.raises(UserError, match="which may hold code"):
            read_plain_table(path.read_bytes(), str(path))
    assert not proof.exists()
    careless = pq.read_table(path) if suffix == "parquet" else pa.ipc.open_file(path).read_all()
    careless[column].to_pylist()
    assert proof.exists(), "and it is hostile"


@pytest.mark.parametrize("option", ["images", "output"])
def test_a_secret_in_an_option_of_a_job_is_refused_and_not_shown(option: str) -> None:
    with pytest.raises(ConfigurationError, match=f"--{option} has a password or key in its address") as caught:
        parse("", [f"--{option}", "s3://AKIA:hunter2@bucket/x"], optional={option: ""})
    assert "hunter2" not in str(caught.value)


def test_a_secret_in_the_wrong_place_is_not_shown() -> None:
    with pytest.raises(ConfigurationError, match=r"train\.epochs: ") as caught:
        parse("", ["--train.epochs", "http://me:hunter2@mlflow"])
    assert "hunter2" not in str(caught.value)
