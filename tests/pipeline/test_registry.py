"""The registry: the best of a name is its champion, a run has one version, and what cannot be compared is not."""

from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.checkpoint_reference import resolve_checkpoint
from pipeline.errors import UserError
from pipeline.mlflow_models import BEST_CHECKPOINT
from pipeline.mlflow_runs import default_uri
from pipeline.registry import CHAMPION, download_registered, register
from pipeline.tracking import Tracker


@pytest.fixture(scope="module")
def uri(folder: Path) -> str:
    """One store for all tests here: making its tables takes seconds."""
    return default_uri(str(folder))


def ended_run(uri: str, folder: Path, name: str, with_checkpoint: bool = True) -> str:
    """A run with a checkpoint that tells its name."""
    tracker = Tracker(uri, "experiment", name, str(folder / name), (folder / "artifacts").as_uri())
    run_id = tracker.start(None, {}, 60.0)
    assert run_id is not None
    if with_checkpoint:
        checkpoint = folder / f"checkpoint-of-{name}"
        checkpoint.mkdir()
        (checkpoint / "checkpoint.json").write_text(name)
        tracker.log_folder(str(checkpoint), BEST_CHECKPOINT)
    link = tracker.link()
    assert link is not None
    assert link.endswith(f"/runs/{run_id}?workflowType=machine_learning after `make ui RUNS={folder}`")
    tracker.finish("FINISHED")
    return run_id


def test_the_best_of_a_name_is_its_champion(uri: str, folder: Path) -> None:
    runs = {name: ended_run(uri, folder, name) for name in ("good", "worse", "better", "elsewhere")}
    first = register(uri, "coco", runs["good"], 0.35, "digest")
    assert (first.version, first.champion, first.reason) == (1, True, "the first, segm_AP 0.3500")
    worse = register(uri, "coco", runs["worse"], 0.35, "digest")
    assert (worse.version, worse.champion) == (2, False)
    assert worse.line == "registered models:/coco/2: segm_AP 0.3500 against 0.3500 of version 1"
    better = register(uri, "coco", runs["better"], 0.36, "digest")
    assert (better.version, better.champion) == (3, True)
    assert (
        better.line
        == "registered models:/coco/3, now models:/coco@champion: segm_AP 0.3600 against 0.3500 of version 1"
    )
    other = register(uri, "coco", runs["elsewhere"], 0.99, "other images")
    assert (other.version, other.champion) == (4, False)
    assert "was evaluated on other images, so the alias stays" in other.reason

    again = register(uri, "coco", runs["better"], 0.36, "digest")  # the same command again
    assert (again.version, again.champion) == (3, True)
    assert not register(uri, "coco", runs["good"], 0.35, "digest").champion
    client = MlflowClient(uri)
    assert len(client.search_model_versions("name = 'coco'")) == 4
    assert client.get_model_version_by_alias("coco", CHAMPION).run_id == runs["better"]

    for reference, name in (("models:/coco@champion", "better"), ("models:/coco/1", "good")):
        assert (Path(download_registered(reference, uri)) / "checkpoint.json").read_text() == name
    found = resolve_checkpoint("models:/coco@champion", str(folder), uri)
    assert (Path(found) / "checkpoint.json").read_text() == "better"
    for reference in ("models:/coco@nobody", "models:/coco/99", "models:/nothing@champion"):
        with pytest.raises(UserError, match=reference):
            download_registered(reference, uri)
    with pytest.raises(UserError, match="models:/NAME@champion or models:/NAME/VERSION"):
        download_registered("models:/coco", uri)


def test_what_cannot_be_registered(uri: str, folder: Path) -> None:
    with pytest.raises(UserError, match="is not in MLflow"):
        register(uri, "empty", None, 0.1, "digest")
    bare = ended_run(uri, folder, "bare", with_checkpoint=False)
    with pytest.raises(UserError, match=f"MLflow run {bare} at .* has no best_checkpoint"):
        register(uri, "empty", bare, 0.1, "digest")
    with pytest.raises(UserError, match="cannot register a/b"):
        register(uri, "a/b", ended_run(uri, folder, "named"), 0.1, "digest")


def test_a_run_that_was_trained_for_longer_is_another_version(uri: str, folder: Path) -> None:
    run_id, rival = ended_run(uri, folder, "short"), ended_run(uri, folder, "rival")
    assert register(uri, "longer", run_id, 0.2, "digest").version == 1
    assert register(uri, "longer", rival, 0.3, "digest").champion
    longer = register(uri, "longer", run_id, 0.5, "digest")
    assert (longer.version, longer.champion) == (3, True)
    assert register(uri, "longer", run_id, 0.5, "digest").version == 3


def test_a_version_that_somebody_made_by_hand_is_left_alone(uri: str, folder: Path) -> None:
    run_id = ended_run(uri, folder, "plain")
    client = MlflowClient(uri)
    client.create_registered_model("by_hand")
    client.create_model_version("by_hand", str(folder), run_id)
    assert register(uri, "by_hand", run_id, 0.2, "digest").version == 2
