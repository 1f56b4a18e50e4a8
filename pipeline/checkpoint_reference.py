"""The checkpoint that a user means: a folder, a run, an MLflow run, a model of the registry."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from pipeline import storage
from pipeline.checkpoint import DESCRIPTION_FILE, read_description
from pipeline.errors import UserError
from pipeline.run_state import RESULT_FILE, RUN_FILE

MAX_RUNS_TOLD = 5


def resolve_checkpoint(reference: str, storage_path: str, mlflow_uri: str | None = None) -> str:
    """Local folder of the checkpoint that a user means.

    Args:
        reference: a checkpoint folder, a run folder or the name of a run in storage_path (its best checkpoint), or the
            id of an MLflow run (likewise), or models:/NAME@ALIAS or models:/NAME/VERSION of MLflow's registry, or a
            model that an MLflow run has logged (`models:/m-...`).
        storage_path: where runs are.
        mlflow_uri: tracking server or store of an MLflow run; by default the sqlite file in storage_path.

    Raises:
        UserError: there is no such thing.
    """
    if os.path.exists(os.path.join(reference, DESCRIPTION_FILE)):
        return os.path.abspath(reference)
    for run_folder in (reference, os.path.join(storage_path, reference)):
        checkpoint = best_checkpoint_of_run(run_folder)
        if checkpoint is not None:
            return checkpoint
    if reference.startswith("models:/m-"):
        from pipeline.mlflow_models import download_model

        return download_model(reference, _store(reference, storage_path, mlflow_uri))
    if re.fullmatch(r"[0-9a-f]{32}", reference):
        from pipeline.mlflow_models import download_checkpoint

        return download_checkpoint(reference, _store(reference, storage_path, mlflow_uri))
    if reference.startswith("models:"):
        from pipeline.registry import download_registered

        return download_registered(reference, _store(reference, storage_path, mlflow_uri))
    raise UserError(
        f"{reference}: neither a checkpoint folder, nor a run (folder, or name in {storage_path}) with a checkpoint, "
        f"nor the id of an MLflow run, nor models:/NAME@ALIAS{_runs_in(storage_path, reference)}"
    )


def _runs_in(storage_path: str, reference: str) -> str:
    """The finished runs that there are, those first whose name is like the one asked for."""
    if not os.path.isdir(storage_path):
        return ""
    finished = (path.parent for path in Path(storage_path).glob(f"*/{RESULT_FILE}"))
    runs = sorted(folder.name for folder in finished if (folder / RUN_FILE).exists())  # else a sweep
    runs.sort(key=lambda name: -difflib.SequenceMatcher(None, name, os.path.basename(reference)).ratio())
    more = f" and {len(runs) - MAX_RUNS_TOLD} more" if len(runs) > MAX_RUNS_TOLD else ""
    return f"; runs there: {', '.join(runs[:MAX_RUNS_TOLD])}{more}" if runs else ""


def _store(reference: str, storage_path: str, mlflow_uri: str | None) -> str:
    """Where to ask for what MLflow holds; a store that is not there is not made by asking."""
    from pipeline.mlflow_runs import default_uri

    if mlflow_uri is not None:
        return mlflow_uri
    uri = default_uri(storage.absolute(storage_path))
    if not os.path.exists(uri.removeprefix("sqlite:///")):
        raise UserError(
            f"{reference}: no MLflow store in {storage_path} to look in; set run.storage_path or run.mlflow_uri"
        )
    return uri


def best_checkpoint_of_run(run_folder: str) -> str | None:
    """The whole checkpoint of a run with the largest segm_AP, the latest of equals; None where there is none."""
    if not os.path.isdir(run_folder):
        return None
    candidates = []
    for name in os.listdir(run_folder):
        folder = os.path.join(run_folder, name)
        if os.path.exists(os.path.join(folder, DESCRIPTION_FILE)):
            try:
                description = read_description(folder)
            except UserError:
                continue  # cut off while it was written
            candidates.append((description.metrics.get("segm_AP", -1.0), description.step, os.path.abspath(folder)))
    return max(candidates)[2] if candidates else None
