"""The MLflow model registry: a run's best checkpoint under a name, and the alias `champion` for the best of the name.

Beside tracking.py, which is an actor that records one run while it goes: this is asked by a driver, once, about runs
that have ended.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from pipeline.errors import UserError
from pipeline.mlflow_models import BEST_CHECKPOINT, download_checkpoint, download_model, served_models

CHAMPION = "champion"
JUDGED_METRIC = "segm_AP"
DIGEST_TAG, AP_TAG = "mask_rcnn.validation_digest", "mask_rcnn.segm_AP"
REFERENCE = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")


@dataclass(frozen=True)
class Registered:
    """A version of a registered model."""

    name: str
    version: int
    champion: bool
    """Whether the alias is on it now."""
    reason: str
    """Why, or why not."""

    @property
    def line(self) -> str:
        """What a job says of it."""
        place = f"models:/{self.name}/{self.version}"
        return f"registered {place}{f', now models:/{self.name}@{CHAMPION}' if self.champion else ''}: {self.reason}"


def register(uri: str, name: str, run_id: str | None, segm_ap: float, validation_digest: str) -> Registered:
    """Make a version of a run's best checkpoint, and the champion where its mask AP is above the present one's.

    A run that is registered already keeps its version, so the same command may be given again.

    Args:
        uri: of the MLflow server or store.
        name: of the registered model, made where there is none.
        run_id: of an ended run, None where MLflow did not record it.
        segm_ap: of its best checkpoint.
        validation_digest: of the shards that gave this AP; APs on others cannot be compared.

    Raises:
        UserError: the run has no checkpoint in MLflow, or the registry refuses.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    if run_id is None:
        raise UserError(f"the run is not in MLflow at {uri}, so it cannot be registered as {name}")
    client = MlflowClient(uri)
    try:
        if not client.list_artifacts(run_id, BEST_CHECKPOINT):
            raise UserError(
                f"MLflow run {run_id} at {uri} has no {BEST_CHECKPOINT}, so it cannot be registered as {name}"
            )
        version = _version_of_run(client, name, run_id, segm_ap, validation_digest)
        held = _champion(client, name)
        wins, reason = _beats(version, held)
        if wins:
            client.set_registered_model_alias(name, CHAMPION, version.version)
    except MlflowException as error:
        raise UserError(f"MLflow at {uri} cannot register {name}: {' '.join(str(error).split())[:300]}") from error
    return Registered(name, int(version.version), wins or _same(version, held), reason)


def _version_of_run(client: Any, name: str, run_id: str, segm_ap: float, validation_digest: str) -> Any:
    """The version that the run has, or a new one."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    for version in client.search_model_versions(f"name = '{name}'"):
        # A run that was trained for longer has another best checkpoint since: that is another version.
        if version.run_id == run_id and version.tags.get(AP_TAG) == repr(float(segm_ap)):
            return version
    tags = {AP_TAG: repr(float(segm_ap)), DIGEST_TAG: validation_digest}
    served = served_models(client, run_id)
    if served:  # what MLflow can serve, of the same checkpoint
        source = client.get_logged_model(served[-1]).artifact_location
        return client.create_model_version(name, source, run_id, tags=tags, model_id=served[-1])
    run = client.get_run(run_id)
    return client.create_model_version(name, f"{run.info.artifact_uri}/{BEST_CHECKPOINT}", run_id, tags=tags)


def _champion(client: Any, name: str) -> Any:
    """The version that holds the alias, or None."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def _same(version: Any, held: Any) -> bool:
    return held is not None and str(held.version) == str(version.version)


def _beats(version: Any, held: Any) -> tuple[bool, str]:
    """Whether a version takes the alias, and why."""
    ours = float(version.tags[AP_TAG])
    if held is None:
        return True, f"the first, {JUDGED_METRIC} {ours:.4f}"
    if _same(version, held):
        return False, f"it was before, {JUDGED_METRIC} {ours:.4f}"
    theirs = float(held.tags.get(AP_TAG, "nan"))
    comparison = f"{JUDGED_METRIC} {ours:.4f} against {theirs:.4f} of version {held.version}"
    if held.tags.get(DIGEST_TAG) != version.tags[DIGEST_TAG]:
        return False, f"{comparison}, which was evaluated on other images, so the alias stays"
    return ours > theirs, comparison


def download_registered(reference: str, uri: str) -> str:
    """Local folder of the checkpoint that `models:/NAME@ALIAS` or `models:/NAME/VERSION` means.

    Raises:
        UserError: it is spelled otherwise, or there is no such version.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    match = REFERENCE.fullmatch(reference)
    if match is None:
        raise UserError(f"{reference}: a registered model is models:/NAME@{CHAMPION} or models:/NAME/VERSION")
    client = MlflowClient(uri)
    try:
        if match["alias"]:
            version = client.get_model_version_by_alias(match["name"], match["alias"])
        else:
            version = client.get_model_version(match["name"], match["version"])
    except MlflowException as error:
        raise UserError(f"{reference} at {uri}: {' '.join(str(error).split())[:300]}") from error
    if getattr(version, "model_id", None):  # what was registered, whatever its run has come to since
        return download_model(f"models:/{version.model_id}", uri)
    return download_checkpoint(version.run_id, uri)
