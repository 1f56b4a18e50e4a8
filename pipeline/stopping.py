"""When a training ends before its last step: a target is reached, or nothing is gained any more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.config import TrainSettings

JUDGED_METRICS = ("bbox_AP", "segm_AP")
"""What is kept of every evaluation."""


def stop_reason(evaluations: Sequence[Mapping[str, float]], settings: TrainSettings) -> str | None:
    """Why to stop after the latest of these evaluations, None to go on.

    Args:
        evaluations: `JUDGED_METRICS` of all of them, the first one first.
        settings: targets and patience.
    """
    if not evaluations:
        return None
    latest = evaluations[-1]
    targets = {"bbox_AP": settings.target_bbox_AP, "segm_AP": settings.target_segm_AP}
    wanted = {name: target for name, target in targets.items() if target is not None}
    if wanted and all(latest[name] >= target for name, target in wanted.items()):
        return "reached " + " and ".join(f"{name} {latest[name]:.4f} >= {target:g}" for name, target in wanted.items())
    values = [metrics["segm_AP"] for metrics in evaluations]
    best = values.index(max(values))
    if settings.patience is not None and len(values) - 1 - best >= settings.patience:
        return f"no segm_AP above {values[best]:.4f} in the last {len(values) - 1 - best} evaluations"
    return None
