"""The newest numbers of a training among Ray's own metrics, for Prometheus and Grafana.

MLflow keeps every step; these are what an operator looks at beside CPUs, GPUs and memory, on the dashboard of
configs/grafana/dashboard.json.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

PREFIX = "mask_rcnn_"
PROMETHEUS_PREFIX = "ray_" + PREFIX  # Ray puts its own before
RUN_TAG = "run"


class ClusterMetrics:
    """Gauges of one run, named as its metrics in MLflow, in lower case."""

    def __init__(self, run_name: str) -> None:
        self._tags = {RUN_TAG: run_name}
        self._gauges: dict[str, Any] = {}

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        """Set the gauges of a step; numbers that are not finite leave theirs as they are."""
        from ray.util.metrics import Gauge

        for name, value in {**metrics, "step": float(step)}.items():
            if not math.isfinite(value):
                continue
            if name not in self._gauges:
                # Ray's exporter writes names in lower case, so they are given so.
                self._gauges[name] = Gauge(PREFIX + name.lower(), description=f"{name} of the run", tag_keys=(RUN_TAG,))
            self._gauges[name].set(value, tags=self._tags)
