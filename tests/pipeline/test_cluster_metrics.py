"""Our numbers among Ray's metrics, and the Grafana dashboard that shows them."""

import json
import math
import re
import time
import urllib.request
from pathlib import Path

import pytest
import ray
import ray.dashboard

from pipeline.cluster_metrics import PROMETHEUS_PREFIX, ClusterMetrics
from pipeline.evaluation import AP_METRICS
from pipeline.training import STEP_METRICS

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = json.loads((ROOT / "configs/grafana/dashboard.json").read_text())
SHOWN = {*STEP_METRICS, *AP_METRICS, "learning_rate", "images_per_second", "data_wait_fraction", "epoch", "step"}


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    asked = {name for panel in DASHBOARD["panels"] for target in panel["targets"] for name in _names(target["expr"])}
    ours = {name.removeprefix(PROMETHEUS_PREFIX) for name in asked if name.startswith(PROMETHEUS_PREFIX)}
    assert ours <= {name.lower() for name in SHOWN}
    assert ours >= {"images_per_second", "data_wait_fraction", "loss", "segm_ap", "bbox_ap", "step"}
    folder = Path(ray.dashboard.__file__).parent / "modules"
    rays = "".join(path.read_text() for path in folder.rglob("*.py"))
    theirs = {name for name in asked if not name.startswith(PROMETHEUS_PREFIX)}
    assert len(theirs) >= 6
    assert [name for name in theirs if name not in rays and name.removeprefix("ray_") not in rays] == []


def _names(expression: str) -> set[str]:
    return set(re.findall(r"\bray_\w+", expression))


def test_the_dashboard_is_whole() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) == 12
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == len(panels)
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(panels))) == variables
    assert all(panel["description"] for panel in panels)


@pytest.mark.cluster
def test_prometheus_finds_them(local_ray: None) -> None:
    metrics = ClusterMetrics("a-run")
    metrics.show(6, {"loss": 0.75, "segm_AP": 0.25})
    metrics.show(7, {"loss": 0.5, "gradient_norm": math.nan, "segm_AP": math.inf})
    port = ray.nodes()[0]["MetricsExportPort"]
    deadline = time.monotonic() + 60
    found: dict[str, float] = {}
    while found.get("step") != 7 and time.monotonic() < deadline:
        time.sleep(0.5)
        address = f"http://{ray.nodes()[0]['NodeManagerAddress']}:{port}/metrics"
        text = urllib.request.urlopen(address, timeout=5).read().decode()
        lines = re.findall(rf'^{PROMETHEUS_PREFIX}(\w+){{.*run="a-run".*}} (\S+)$', text, flags=re.MULTILINE)
        found = {name: float(value) for name, value in lines}
    assert found == {"loss": 0.5, "segm_ap": 0.25, "step": 7.0}
