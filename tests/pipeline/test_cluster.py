"""Placing workers: what can never be had is an error, what an autoscaler may bring is waited for."""

import itertools
import time

import pytest

from pipeline import cluster
from pipeline.config import ScalingSettings
from pipeline.errors import UserError


def set_cluster(
    monkeypatch: pytest.MonkeyPatch,
    *stages: list[dict[str, float]],
    autoscaler: bool = False,
    most: dict[str, float] | None = None,
) -> list[object]:
    """A cluster that has these nodes, one stage after the other with every pause; returns what is asked for."""
    asked: list[object] = []
    stage = iter(itertools.chain(stages[1:], itertools.repeat(stages[-1])))
    now = [stages[0]]

    def sleep(_: float) -> None:
        now[0] = next(stage)

    monkeypatch.setattr(cluster, "_nodes", lambda: now[0])
    monkeypatch.setattr(cluster, "_has_autoscaler", lambda: autoscaler)
    monkeypatch.setattr(cluster, "_most_that_autoscaler_brings", lambda: most)
    monkeypatch.setattr(cluster, "_request", asked.append)
    monkeypatch.setattr(time, "sleep", sleep)
    return asked


def place(**settings: object) -> cluster.Placement:
    return cluster.place_workers(ScalingSettings.model_validate(settings), lambda _: None)


def test_workers_leave_a_cpu_for_reading_data(monkeypatch: pytest.MonkeyPatch) -> None:
    set_cluster(monkeypatch, [{"CPU": 3.0}])
    assert place(num_workers=2) == cluster.Placement(False, {"CPU": 1.0}, 1.0)
    with pytest.raises(UserError, match="3 workers of 1 CPU each leave no CPU for reading data"):
        place(num_workers=3)


def test_cpus_beside_the_workers_of_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    set_cluster(monkeypatch, [{"CPU": 3.0}, {"CPU": 1.0}, {}])
    assert cluster.cpus_beside(2.0) == 2.0
    assert cluster.cpus_beside(5.0) == 0.0


def test_a_worker_never_spans_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    set_cluster(monkeypatch, [{"CPU": 3.0}, {"CPU": 3.0}])
    assert place(num_workers=2, cpus_per_worker=2).cpus_for_data == 2.0
    with pytest.raises(UserError, match="which holds 2"):
        place(num_workers=3, cpus_per_worker=2)


def test_gpus_are_taken_where_every_worker_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    set_cluster(monkeypatch, [{"CPU": 8.0, "GPU": 2.0}])
    assert place(num_workers=2) == cluster.Placement(True, {"CPU": 1.0, "GPU": 1.0}, 6.0)
    said: list[str] = []
    assert not cluster.place_workers(ScalingSettings(num_workers=3), said.append).use_gpu
    assert said == ["cluster: 2 GPUs for 3 workers, so all train on CPUs; see --scaling.accelerator"]
    assert not place(num_workers=2, accelerator="cpu").use_gpu
    with pytest.raises(UserError, match="3 workers of 1 CPU and 1 GPU each do not fit into the cluster, which holds 2"):
        place(num_workers=3, accelerator="gpu")


def test_without_an_autoscaler_the_error_comes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = set_cluster(monkeypatch, [{"CPU": 3.0}])
    with pytest.raises(UserError, match=r"64 workers .* no autoscaler can add nodes; lower --scaling.num_workers"):
        place(num_workers=64)
    assert asked == []


def test_with_an_autoscaler_it_is_asked_once_and_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = [{"CPU": 3.0}], [{"CPU": 3.0}, {"CPU": 4.0}]
    asked = set_cluster(monkeypatch, small, small, large, autoscaler=True)
    said: list[str] = []
    placement = cluster.place_workers(ScalingSettings(num_workers=4), said.append)
    assert placement.cpus_for_data == 3.0
    assert asked == [[{"CPU": 1.0}] * 5, []], "asked once, and withdrawn: a request would hold for ever"
    assert len(said) == 1
    assert "waiting up to 30 minutes" in said[0]


def test_waiting_has_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = set_cluster(monkeypatch, [{"CPU": 3.0}], autoscaler=True)
    clock = itertools.count(0, 20)
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    with pytest.raises(UserError, match="after 1 minutes of waiting for the autoscaler"):
        place(num_workers=4, wait_for_nodes_minutes=1)
    assert asked[-1] == []


def test_more_than_the_autoscaler_may_bring_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = set_cluster(monkeypatch, [{"CPU": 3.0}], autoscaler=True, most={"CPU": 16.0})
    with pytest.raises(UserError, match="64 workers need 64 CPU, the autoscaler may bring at most 16"):
        place(num_workers=64)
    assert asked == []
