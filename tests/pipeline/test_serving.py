"""The model that MLflow serves finds what the model called directly finds."""

import base64
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.masks import encode_detections
from pipeline.checkpoint_reference import resolve_checkpoint
from pipeline.errors import UserError
from pipeline.inference import Predictor, load
from pipeline.mlflow_models import BEST_CHECKPOINT
from pipeline.mlflow_runs import default_uri
from pipeline.preprocess import decode_image
from pipeline.registry import register
from pipeline.serving import ServedModel
from pipeline.tracking import Tracker
from tests.pipeline.factories import noise, png
from tests.pipeline.small import write_small_checkpoint

IMAGES = [png(noise(60, 90)), png(noise(100, 50, seed=2))]
START_SECONDS = 120.0


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Path:
    return write_small_checkpoint(folder / "checkpoint")


@pytest.fixture(scope="module")
def predictor(checkpoint: Path) -> Predictor:
    return load(str(checkpoint))


@pytest.fixture(scope="module")
def storage(checkpoint: Path) -> Path:
    """Runs with an MLflow store that has the model as version 1 of `cells`."""
    folder = checkpoint.parent / "runs"
    folder.mkdir()
    tracker = Tracker(default_uri(str(folder)), "test", "run", str(folder / "run"), (folder / "artifacts").as_uri())
    run_id = tracker.start(None, {}, 60.0)
    tracker.log_folder(str(checkpoint), BEST_CHECKPOINT)
    tracker.log_model(str(checkpoint))
    tracker.finish("FINISHED")
    assert tracker.get_progress()["problem"] is None
    (stored,) = (path for path in folder.rglob("MLmodel"))
    assert stored.is_relative_to(folder / "artifacts"), "with the run, not below the working directory"
    assert register(default_uri(str(folder)), "cells", run_id, 0.5, "digest").version == 1
    return folder


def assert_found(answer: dict[str, Any], content: bytes, predictor: Predictor) -> None:
    pixels = decode_image(content)
    alone = predictor.predict(pixels)
    assert len(alone) == 10
    assert (answer["height"], answer["width"]) == pixels.shape[:2]
    np.testing.assert_allclose(answer["boxes"], alone.boxes.numpy(), rtol=0, atol=1e-3)
    np.testing.assert_allclose(answer["scores"], alone.scores.numpy(), rtol=0, atol=1e-6)
    assert answer["class_ids"] == alone.classes.tolist()
    assert answer["class_names"] == ["abc"[class_id - 1] for class_id in answer["class_ids"]]
    assert answer["masks"] == encode_detections(alone, *pixels.shape[:2])


@pytest.mark.parametrize(
    "given",
    [
        IMAGES,
        [base64.b64encode(content).decode() for content in IMAGES],
        [{"image": content} for content in IMAGES],
        {"image": ["data:image/png;base64," + base64.b64encode(content).decode() for content in IMAGES]},
    ],
)
def test_images_come_in_many_wrappings(predictor: Predictor, given: Any) -> None:
    answers = ServedModel(predictor).predict(given)
    assert len(answers) == 2
    for answer, content in zip(answers, IMAGES, strict=True):
        assert_found(answer, content, predictor)


def test_what_cannot_be_read_is_answered_in_its_place(predictor: Predictor) -> None:
    answers = ServedModel(predictor).predict([b"no image", IMAGES[0], "no base64!", 5])
    assert answers[0] == {
        "error": "cannot be decoded (no image format that Pillow knows)", "kind": "unreadable_image",
    }  # fmt: skip
    assert_found(answers[1], IMAGES[0], predictor)
    assert answers[2]["error"].startswith("is no base64")
    assert answers[3]["error"] == "is neither bytes nor base64 but int"
    assert ServedModel(predictor).predict([]) == []
    with pytest.raises(ValueError, match="expected a column 'image'"):
        ServedModel(predictor).predict({"picture": []})


def test_pyfunc(storage: Path, predictor: Predictor) -> None:
    import mlflow.pyfunc
    import pandas as pd

    mlflow.set_tracking_uri(default_uri(str(storage)))
    model = mlflow.pyfunc.load_model("models:/cells/1")
    table = pd.DataFrame({"image": [IMAGES[0], base64.b64encode(IMAGES[1]).decode()]})
    for answer, content in zip(model.predict(table), IMAGES, strict=True):
        assert_found(answer, content, predictor)
    # Nothing in it is a pickle.
    assert not [path for path in storage.rglob("*") if path.suffix in (".pkl", ".pickle", ".pt", ".pth")]


def test_registered_model_is_a_checkpoint(storage: Path, predictor: Predictor) -> None:
    again = load("models:/cells/1", str(storage))
    for name, tensor in predictor.model.state_dict().items():
        np.testing.assert_array_equal(again.model.state_dict()[name].numpy(), tensor.numpy())
    with pytest.raises(UserError, match="models:/cells/7 at sqlite"):
        resolve_checkpoint("models:/cells/7", str(storage))


@pytest.mark.cluster
def test_the_server_answers_the_same(storage: Path, predictor: Predictor, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/cells/1", "--env-manager", "local"]
    environment = {
        **os.environ, "MLFLOW_TRACKING_URI": default_uri(str(storage)),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }  # fmt: skip
    log = tmp_path / "server.log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [*command, "-h", "127.0.0.1", "-p", str(port)], env=environment, cwd=tmp_path, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            with contextlib.suppress(OSError, http.client.HTTPException):
                if ask(port, "GET", "/ping")[0] == 200:
                    break
            time.sleep(0.3)
        records = [{"image": base64.b64encode(content).decode()} for content in IMAGES]
        status, answer = ask(port, "POST", "/invocations", json.dumps({"dataframe_records": records}))
        assert status == 200, answer
        for found, content in zip(json.loads(answer)["predictions"], IMAGES, strict=True):
            assert_found(found, content, predictor)
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def ask(port: int, method: str, path: str, body: str | None = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def test_base64_may_be_wrapped_into_lines(predictor: Predictor) -> None:
    (answer,) = ServedModel(predictor).predict([base64.encodebytes(IMAGES[0]).decode()])
    assert_found(answer, IMAGES[0], predictor)


def test_letters_beyond_ascii_are_no_base64_and_spoil_no_other_image(predictor: Predictor) -> None:
    bad, good = ServedModel(predictor).predict(["é", IMAGES[0]])
    assert "is no base64" in bad["error"]
    assert_found(good, IMAGES[0], predictor)
