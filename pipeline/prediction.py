"""A prediction from the driver's side: plan it or find its plan, compute the parts that are missing, sum them up."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import prediction_plan, storage
from pipeline.cluster import Placement, most_workers, place_workers
from pipeline.coco_results import write_coco_results
from pipeline.config import ExperimentConfig
from pipeline.doctor import check_at_start
from pipeline.errors import UserError
from pipeline.inference import Predictor
from pipeline.prediction_inputs import list_inputs
from pipeline.prediction_model import model_id
from pipeline.prediction_parts import PartSettings
from pipeline.prediction_pictures import PictureSettings
from pipeline.prediction_plan import ERRORS_FILE, MANIFEST_FILE, Plan
from pipeline.prediction_pool import Part, Pool
from pipeline.prediction_schema import ERRORS_SCHEMA, PARTS, SCHEMA_VERSION, PartSummary, inspect_part, part_name
from pipeline.progress import duration

Say = Callable[[str], None]
PROGRESS_SECONDS = 10.0
INSPECTIONS_AT_ONCE = 64
NO_EFFECT = ("num_workers", "timeout_seconds", "max_error_fraction", "max_failures", "coco_results")
"""Settings that may differ between the calls of one prediction: its rows are the same."""


def predict(config: ExperimentConfig, predictor: Predictor, images: str, output: str, say: Say) -> dict[str, Any]:
    """Predict all images, or those that an earlier call has left; Ray has to be running.

    Args:
        config: predict, scaling.
        predictor: the model, on the CPU.
        images: see `pipeline.prediction_inputs`.
        output: folder or bucket.
        say: takes lines for a person to read.

    Returns:
        The summary that the job prints as JSON.

    Raises:
        UserError: what the user can mend.
    """
    started = time.monotonic()
    plan = find_plan(config, predictor, images, output, say)
    summaries = _parts_that_are_there(plan, say)
    _check_budget(config, plan, summaries.values())
    missing = [Part(number, entries) for number, entries in enumerate(plan.parts) if number not in summaries]
    computed = 0
    if missing:
        storage.delete_file(storage.join(plan.output, MANIFEST_FILE))  # of a part that was whole once, and is gone
        placement = _place(config, len(missing), say)
        most = min(config.predict.num_workers or len(missing), len(missing))
        settings = part_settings(config, predictor, plan)
        progress = _Progress(plan, summaries.values(), say)
        with Pool(predictor.model, settings, placement, most, config.predict.max_failures, say) as pool:
            for summary in pool.predict(missing):
                summaries[summary.part] = summary
                computed += summary.num_images
                progress.show(summary)
                _check_budget(config, plan, summaries.values())
    manifest = _finish(config, plan, list(summaries.values()), predictor.class_names)
    seconds = time.monotonic() - started
    if manifest["num_errors"]:
        failed, all_images = manifest["num_errors"], counted(manifest["num_images"], "image")
        say(f"predict: {failed} of {all_images} could not be predicted; which, and why: {ERRORS_FILE} in the output")
    counts = {name: manifest[name] for name in ("num_images", "num_predicted", "num_errors", "num_detections")}
    return {
        **counts,
        "computed_now": computed,
        "images_per_second": round(computed / seconds, 2),
        "seconds": round(seconds, 1),
        "model_id": plan.model_id,
        "output": plan.output,
    }


def settings_of(config: ExperimentConfig, predictor: Predictor) -> dict[str, Any]:
    """All that the results are a function of, beside weights and images."""
    own = config.predict.model_dump(mode="json")
    viewing = asdict(predictor.viewing)
    viewing["tiling"] = own["tiling"]
    return {
        "predict": {name: value for name, value in own.items() if name not in NO_EFFECT},
        "viewing": json.loads(json.dumps(viewing)),
        "model": predictor.model.config.model_dump(mode="json"),
        "class_names": list(predictor.class_names),
    }


def find_plan(config: ExperimentConfig, predictor: Predictor, images: str, output: str, say: Say) -> Plan:
    """The plan of this output, made now where there is none.

    Raises:
        UserError: there are no images, or the output was begun otherwise.
    """
    place, images_place = storage.absolute(output), storage.absolute(images)
    run = {"model_id": model_id(predictor), "settings": settings_of(config, predictor)}
    plan = prediction_plan.resume(place, images_place, run)
    if plan is not None:
        size, parts = counted(plan.num_images, "image"), counted(len(plan.parts), "part")
        say(f"predict: going on with the plan in {place}: {size} in {parts}")
        _tell_changes(plan, images, config, say)
        return plan
    inputs = list_inputs(images, config.predict)
    if config.predict.tiling is not None and inputs.kind == "shards":
        raise UserError(f"{images}: shards hold resized images; leave predict.tiling out, or name the image files")
    settings = config.predict
    num_processes = settings.num_workers or most_workers(config.scaling)
    part_size = prediction_plan.images_per_part(
        len(inputs.entries), num_processes, settings.images_per_part, settings.batch_size
    )
    plan = prediction_plan.begin(place, images_place, inputs, part_size, run)
    size, parts = counted(plan.num_images, "image"), counted(len(plan.parts), "part")
    say(f"predict: {size} of {images}, in {parts} to {place}")
    return plan


def counted(number: int, name: str) -> str:
    """A number of things, in the singular or the plural."""
    return f"{number} {name}" if number == 1 else f"{number} {name}{'es' if name.endswith('s') else 's'}"


def _tell_changes(plan: Plan, images: str, config: ExperimentConfig, say: Say) -> None:
    """Say where there are other images now than were planned; the plan counts."""
    try:
        present = {entry.key for entry in list_inputs(images, config.predict).entries}
    except UserError as error:
        say(f"warning: predict: the images cannot be listed any more: {error}")
        return
    planned = {entry.key for part in plan.parts for entry in part}
    for names, what in ((present - planned, "came"), (planned - present, "vanished")):
        if names:
            number = counted(len(names), "image")
            told = f"{number} {what} since the plan was made ({min(names)})"
            say(f"warning: predict: {told}; another --output begins anew")


def part_settings(config: ExperimentConfig, predictor: Predictor, plan: Plan) -> PartSettings:
    """What the processes of the pool have to know."""
    settings = config.predict
    return PartSettings(
        plan.output,
        plan.kind,
        plan.identity,
        plan.model_id,
        plan.config_digest,
        tuple(predictor.class_names),
        predictor.viewing,
        settings.precision,
        settings.batch_size,
        settings.timeout_seconds,
        settings.bytes_column,
        PictureSettings(settings.overlays, settings.cutouts, settings.picture_score),
    )


def _place(config: ExperimentConfig, num_parts: int, say: Say) -> Placement:
    """Where the processes go; with a number that is asked for, nodes that an autoscaler may bring are waited for."""
    size = min(config.predict.num_workers or most_workers(config.scaling), num_parts)
    placement = place_workers(config.scaling.model_copy(update={"num_workers": size}), say)
    check_at_start(config, say, reads_data=False)
    device = "GPU" if placement.use_gpu else f"CPU, {counted(config.scaling.cpus_per_worker, 'thread')} each"
    say(f"predict: {counted(size, 'process')} with the model ({device})")
    return placement


def _parts_that_are_there(plan: Plan, say: Say) -> dict[int, PartSummary]:
    """Summaries of whole parts of this plan, by their number."""
    import ray

    names = {f"{PARTS}/{name}" for name in storage.list_files(storage.join(plan.output, PARTS))}
    present = [number for number in range(len(plan.parts)) if part_name(number) in names]
    inspect = ray.remote(inspect_part).options(num_cpus=1)
    summaries: dict[int, PartSummary] = {}
    for start in range(0, len(present), INSPECTIONS_AT_ONCE):
        tasks = [
            inspect.remote(plan.output, number, plan.identity, [entry.key for entry in plan.parts[number]])
            for number in present[start : start + INSPECTIONS_AT_ONCE]
        ]
        summaries |= {summary.part: summary for summary in ray.get(tasks) if summary is not None}
    if present:
        say(f"predict: there already: {len(summaries)} of {counted(len(plan.parts), 'part')}")
    return summaries


def _check_budget(config: ExperimentConfig, plan: Plan, summaries: Iterable[PartSummary]) -> None:
    """Stop where more images have failed than may.

    Raises:
        UserError: with what failed, and where all of it stands.
    """
    done = list(summaries)
    num_errors = sum(len(summary.errors) for summary in done)
    if num_errors / plan.num_images <= config.predict.max_error_fraction:
        return
    _write_errors(plan, done)
    kinds = Counter(error.kind for summary in done for error in summary.errors)
    first = next(error for summary in sorted(done, key=_number) for error in summary.errors)
    raise UserError(
        f"stopped: {num_errors} of {plan.num_images} images failed "
        f"({', '.join(f'{number} {kind}' for kind, number in kinds.most_common())}), more than "
        f"predict.max_error_fraction {config.predict.max_error_fraction:g} allows; the first: {first.path} "
        f"{first.reason}; all of them: {storage.join(plan.output, ERRORS_FILE)}. "
        "The same command with a larger fraction goes on"
    )


def _number(summary: PartSummary) -> int:
    return summary.part


def _write_errors(plan: Plan, summaries: Sequence[PartSummary]) -> str:
    """Write the errors table; returns its SHA-256."""
    rows = [
        {**asdict(error), "part": summary.name}
        for summary in sorted(summaries, key=_number)
        for error in summary.errors
    ]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=ERRORS_SCHEMA), sink, compression="zstd")
    content = sink.getvalue().to_pybytes()
    storage.write_bytes(storage.join(plan.output, ERRORS_FILE), content)
    return hashlib.sha256(content).hexdigest()


def _finish(
    config: ExperimentConfig, plan: Plan, summaries: list[PartSummary], class_names: Sequence[str]
) -> dict[str, Any]:
    """Count everything once more, and write the errors table, further formats and last the manifest."""
    summaries.sort(key=_number)
    num_errors = sum(len(summary.errors) for summary in summaries)
    num_images = sum(summary.num_images for summary in summaries)
    if [summary.part for summary in summaries] != list(range(len(plan.parts))) or num_images != plan.num_images:
        raise RuntimeError(
            f"{plan.output}: {plan.num_images} images in {len(plan.parts)} parts became {num_images} in "
            f"{len(summaries)}; this is a defect of the program"
        )
    for name in storage.list_files(storage.join(plan.output, PARTS)):
        if name.endswith(".partial"):  # what a killed process left half done
            storage.delete_file(storage.join(plan.output, f"{PARTS}/{name}"))
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "model_id": plan.model_id,
        "config_digest": plan.config_digest,
        "num_images": num_images,
        "num_predicted": num_images - num_errors,
        "num_errors": num_errors,
        "errors_by_kind": dict(sorted(Counter(e.kind for summary in summaries for e in summary.errors).items())),
        "num_detections": sum(summary.num_detections for summary in summaries),
        "kind": plan.kind,
        "parts": [{**asdict(summary), "errors": len(summary.errors)} for summary in summaries],
        "errors_sha256": _write_errors(plan, summaries),
    }
    if config.predict.coco_results:
        manifest["coco_results"] = write_coco_results(plan, [summary.name for summary in summaries], class_names)
    storage.write_bytes(storage.join(plan.output, MANIFEST_FILE), json.dumps(manifest, indent=1).encode())
    return manifest


class _Progress:
    """Says now and then how far it has come."""

    def __init__(self, plan: Plan, there: Iterable[PartSummary], say: Say) -> None:
        self._total, self._say = plan.num_images, say
        self._before = self._done = sum(summary.num_images for summary in there)
        self._errors = sum(len(summary.errors) for summary in there)
        self._started = self._said = time.monotonic()

    def show(self, summary: PartSummary) -> None:
        """Count a part that has got done."""
        self._done += summary.num_images
        self._errors += len(summary.errors)
        now = time.monotonic()
        if now - self._said >= PROGRESS_SECONDS:
            self._said = now
            pace = (self._done - self._before) / (now - self._started)
            left = duration((self._total - self._done) / pace)
            self._say(
                f"predict: {self._done} of {counted(self._total, 'image')}  {counted(self._errors, 'error')}  "
                f"{pace:.1f} images/s  {left} left"
            )
