"""Everything that an evaluation leaves: report.html, report.json, and an MLflow run."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from model.weights import is_import
from pipeline import storage
from pipeline.config import ExperimentConfig
from pipeline.errors import UserError
from pipeline.evaluation import EvaluatedRow
from pipeline.evaluation_analysis import LvisFields, analyse
from pipeline.evaluation_gallery import make_gallery
from pipeline.evaluation_page import render, rounded
from pipeline.evaluation_subject import title_of
from pipeline.initial_weights import Say
from pipeline.mlflow_place import artifacts_folder, tracking_uri
from pipeline.mlflow_runs import flatten
from pipeline.shards import ShardSet
from pipeline.tracking import Tracker

PAGE, NUMBERS = "report.html", "report.json"


def metrics_line(metrics: Mapping[str, float], kind: str) -> str:
    """Metrics of boxes or masks for a person to read; a dash where there is no object that they are about."""
    return "  ".join(f"{name} {rounded(value)}" for name, value in metrics.items() if name.startswith(kind))


def write_report(
    folder: str,
    rows: Sequence[EvaluatedRow],
    shards: ShardSet,
    title: str,
    lvis: LvisFields | None,
    place: str | None = None,
) -> dict[str, Any]:
    """Write the page and its numbers.

    Args:
        folder: absolute path or URL.
        rows: all of the evaluation, in order.
        shards: what was evaluated on.
        title: what was evaluated, in a few words.
        lvis: where the annotations are LVIS's.
        place: path or URL of what was evaluated, where the title is not all of it.

    Returns:
        What report.json holds.
    """
    class_names = shards.manifest.class_names
    report, verdicts = analyse(rows, class_names, lvis)
    gallery = make_gallery(rows, verdicts, shards, class_names)
    files = ", ".join(source.annotations for source in shards.manifest.sources)
    page = render(report, gallery, class_names, title, place, f"Annotations: {files}.")
    storage.write_bytes(storage.join(folder, NUMBERS), json.dumps(report, indent=1).encode())
    storage.write_bytes(storage.join(folder, PAGE), page.encode())
    return report


def lvis_fields(shards: ShardSet) -> LvisFields | None:
    """What the annotation files say in LVIS's format; None where they are not LVIS's, or are not here any more."""
    manifest = shards.manifest
    images: dict[tuple[int, int], dict[str, Any]] = {}
    frequency: dict[int, str] = {}
    class_of = [dict(zip(s.category_ids, s.active_class_ids, strict=True)) for s in manifest.sources]
    for number, source in enumerate(manifest.sources):
        try:
            content = json.loads(storage.read_bytes(source.annotations))
        except (OSError, ValueError):
            return None
        if any("neg_category_ids" not in image for image in content["images"]):
            return None
        if any(category.get("frequency") not in ("r", "c", "f") for category in content["categories"]):
            return None
        images |= {(number, image["id"]): image for image in content["images"]}
        frequency |= {class_of[number][category["id"]]: category["frequency"] for category in content["categories"]}
    negative: dict[int, list[int]] = {}
    not_exhaustive: dict[int, list[int]] = {}
    for values in shards.read_rows(range(len(shards))):
        image, known = images[values["source"], values["image_id"]], class_of[values["source"]]
        for named, key in ((negative, "neg_category_ids"), (not_exhaustive, "not_exhaustive_category_ids")):
            named[values["row"]] = [known[category] for category in image.get(key, []) if category in known]
    return LvisFields(negative, not_exhaustive, frequency)


def record(
    config: ExperimentConfig, folder: str, title: str, metrics: dict[str, float], report: dict[str, Any], say: Say
) -> str | None:
    """Record an evaluation as an MLflow run of its own; what goes wrong is said and stops nothing.

    Returns:
        Id of the run, None where MLflow cannot be reached.
    """
    try:
        uri = tracking_uri(config)
    except UserError as error:
        say(f"warning: not recorded in MLflow: {error}")
        return None
    arguments = (config.run.mlflow_experiment, f"evaluate {title}"[:200], folder, artifacts_folder(config))
    tracker = Tracker(uri, *arguments)
    run_id = tracker.start(None, {"evaluated": title, **flatten(config.model_dump(mode="json"))})
    further = {f"{kind}_{name}": value for kind in ("bbox", "segm") for name, value in _further(report, kind).items()}
    tracker.log(0, {**metrics, **further})
    with tempfile.TemporaryDirectory() as copy:
        for name in (PAGE, NUMBERS):
            Path(copy, name).write_bytes(storage.read_bytes(storage.join(folder, name)))
        tracker.log_folder(copy, "evaluation")
    tracker.finish("FINISHED")
    problem = tracker.get_progress()["problem"]
    if problem:
        say(f"warning: {problem}")
    return run_id


def _further(report: dict[str, Any], kind: str) -> dict[str, float]:
    """Recalls, the calibration error, AP lost by kind of error, and the LVIS protocol, under plain names."""
    values = {name: value for name, value in report[kind]["metrics"].items() if name.startswith("AR")}
    if report[kind]["calibration"] is not None:
        values["calibration_error"] = report[kind]["calibration"]["ece"]
        values |= {f"AP50_lost_{name}": value for name, value in report[kind]["errors"]["delta_ap"].items()}
    values |= {f"lvis_{name.replace('@', '_')}": value for name, value in report.get("lvis", {}).get(kind, {}).items()}
    return {name: value for name, value in values.items() if value is not None}


def report(
    config: ExperimentConfig,
    rows: Sequence[EvaluatedRow],
    shards: ShardSet,
    metrics: dict[str, float],
    source: str,
    output: str | None,
    say: Say,
) -> dict[str, Any]:
    """Write the report of an evaluation and record it in MLflow.

    Args:
        config: run.
        rows: all, in order.
        shards: what was evaluated on.
        metrics: AP.
        source: what was evaluated.
        output: folder of the report; None for one below run.storage_path, by the name of the source.
        say: takes lines for a person to read.

    Returns:
        What the job's summary says of it.
    """
    if importlib.util.find_spec("hotcoco") is None:
        say("evaluate: without hotcoco there is no report; it is installed by `make setup`")
        return {"report": None, "mlflow_run_id": None}
    name = source.rstrip("/").rpartition("/")[2] if not is_import(source) else source
    plain = "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
    digest = hashlib.sha256(source.encode()).hexdigest()[:8]
    default = storage.join(storage.absolute(config.run.storage_path), f"evaluations/{plain}-{digest}")
    folder = default if output is None else storage.absolute(output)
    title = title_of(source)
    place = source if title != source else None
    numbers = write_report(folder, rows, shards, title, lvis_fields(shards), place)
    say(f"evaluate: report in {storage.join(folder, PAGE)}")
    run_id = record(config, folder, title, metrics, numbers, say)
    return {"report": storage.join(folder, PAGE), "mlflow_run_id": run_id}
