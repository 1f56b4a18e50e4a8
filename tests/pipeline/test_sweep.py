"""A sweep's files: what it began with, what it goes on with, and the best configuration that it leaves."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import cluster, run_state, storage
from pipeline.cluster import Placement
from pipeline.command_line import parse
from pipeline.errors import UserError
from pipeline.launch import TrialOfSweep
from pipeline.prepare import PreparedData
from pipeline.search import point_key
from pipeline.space_parsing import parse_space
from pipeline.sweep import concurrent_trials, read_advice, start_points
from pipeline.sweep_config import SweepConfig
from pipeline.sweep_result import BEST_FILE, best_yaml
from pipeline.sweep_state import RESULT_FILE, SWEEP_FILE, budget_of, finished_summary
from pipeline.trial import SweepOfTrials, explain
from pipeline.trials import Trial

SMALL = [4.0, 8.0, 16.0, 32.0, 64.0]
SPACE = {"model.anchors.scales": {"choice": [SMALL]}, "optim.learning_rate": {"loguniform": [1e-4, 1e-2]}}
POINT = {"model.anchors.scales": SMALL, "optim.learning_rate": 0.0031}


def make_config(folder: Path, **sections: dict[str, Any]) -> SweepConfig:
    settings: dict[str, Any] = {"sweep": {"space": SPACE}, "run": {"name": "sweep", "storage_path": str(folder)}}
    for name, values in sections.items():
        settings[name] = {**settings.get(name, {}), **values}
    return SweepConfig.model_validate(settings)


def begin(config: SweepConfig) -> str:
    """The sweep's folder, as `begin_parent` writes it."""
    folder = run_state.run_folder(config)
    content = {"config": config.model_dump(mode="json"), "mlflow_run_id": None}
    storage.write_bytes(storage.join(folder, SWEEP_FILE), json.dumps(content).encode())
    return folder


def test_the_best_configuration_is_whole_and_loads_again(tmp_path: Path) -> None:
    config = make_config(tmp_path, train={"epochs": 7}, data={"root": "/data", "canvases": [[64, 96]]})
    best = Trial(3, POINT, "finished", evaluations=[{"segm_AP": 0.4321, "step": 1, "epoch": 1.0}])
    path = tmp_path / BEST_FILE
    path.write_text(best_yaml(config, best))
    loaded = parse("A job.", ["--config", str(path)]).experiment
    expected = config.base().model_dump(mode="json")
    expected["model"]["anchors"]["scales"] = SMALL
    expected["optim"]["learning_rate"] = 0.0031
    expected["run"]["name"] = "sweep-best"
    assert loaded.model_dump(mode="json") == expected
    head = path.read_text().splitlines()[:3]
    assert "trial-0003, model.anchors.scales [4, 8, 16, 32, 64], optim.learning_rate 0.0031" in head[0]
    assert "segm_AP 0.4321" in head[1]
    assert "python jobs/train.py --config best.yaml" in head[2]
    assert set(yaml.safe_load(path.read_text())) == set(expected)


def test_a_sweep_is_finished_for_its_budget(tmp_path: Path) -> None:
    config, said = make_config(tmp_path), list[str]()
    assert finished_summary(config, said.append) is None
    folder = begin(config)
    assert finished_summary(config, said.append) is None
    result = {"budget": budget_of(config), "summary": {"trials": 8}}
    storage.write_bytes(storage.join(folder, RESULT_FILE), json.dumps(result).encode())
    assert finished_summary(config, said.append) == {"trials": 8}
    assert "is finished (8 trials); nothing to do" in said[0]
    assert finished_summary(make_config(tmp_path, sweep={"max_trials": 9}), said.append) is None, "it goes on"


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"sweep": {"max_trials": 99, "max_hours": 1.0, "keep_checkpoints": 3}}, None),
        ({"checkpoints": {"keep_best": 5}, "data": {"root": "/elsewhere"}}, None),
        ({"train": {"epochs": 3}}, "train.epochs 12.0 -> 3.0"),
        ({"sweep": {"objective": "bbox_AP"}}, "sweep.objective segm_AP -> bbox_AP"),
        ({"sweep": {"space": {**SPACE, "train.seed": {"choice": [1]}}}}, "sweep.space.train.seed"),
        ({"scaling": {"num_workers": 1}}, "scaling.num_workers 2 -> 1"),
    ],
)
def test_going_on_with_another_configuration(tmp_path: Path, sections: dict[str, Any], expected: str | None) -> None:
    begin(make_config(tmp_path))
    changed = make_config(tmp_path, **sections)
    if expected is None:
        assert finished_summary(changed, lambda _: None) is None
        return
    with pytest.raises(UserError, match="was begun with another configuration") as refused:
        finished_summary(changed, lambda _: None)
    assert expected in str(refused.value)


def test_the_folder_of_a_training_is_refused(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    run_state.write_run(run_state.run_folder(config), run_state.RunState({}, "", "", None))
    with pytest.raises(UserError, match=r"is the run of a training; name the sweep with --run\.name"):
        finished_summary(config, lambda _: None)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    folder = begin(config)
    Path(folder, SWEEP_FILE).write_text("{")
    with pytest.raises(UserError, match=r"sweep\.json: damaged"):
        finished_summary(config, lambda _: None)


def test_the_advice_comes_from_the_report(tmp_path: Path) -> None:
    assert read_advice(str(tmp_path)) == []
    configured, other = {"scales": [1.0], "ratios": [1.0]}, {"scales": [2.0], "ratios": [1.0]}
    report = {"anchors": {"configured": configured, "candidates": [other]}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert read_advice(str(tmp_path)) == [configured, other]


def test_given_points_come_before_the_advice(tmp_path: Path) -> None:
    config = make_config(tmp_path, sweep={"start_points": [{"optim.learning_rate": 0.001}]})
    space = parse_space(config.sweep.space, config.base())
    advice = [{"scales": SMALL, "ratios": [1.0]}]
    points = start_points(config, space, advice)
    assert points == [{"optim.learning_rate": 0.001}, {"model.anchors.scales": SMALL}]
    without = make_config(tmp_path, sweep={"advised_anchors": False})
    assert start_points(without, space, advice) == []


def test_a_local_ray_counts_cpus_for_trials_that_have_a_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "local_cpus", lambda: 9)  # eight cores
    assert concurrent_trials(make_config(tmp_path, scaling={"num_workers": 2, "cpus_per_worker": 2})) == 2
    assert concurrent_trials(make_config(tmp_path, scaling={"num_workers": 16})) == 1
    assert concurrent_trials(make_config(tmp_path, sweep={"max_concurrent_trials": 3})) == 3


def test_a_trial_is_a_run_in_the_folder_of_the_sweep(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    data = {point_key({"optim.learning_rate": rate}): PreparedData(str(rate), "") for rate in (0.0031, 0.1)}
    trial = TrialOfSweep(0, "ledger", Placement(False, {"CPU": 1.0}, 1.0), None)
    dumped = config.base().model_dump(mode="json")
    sweep = SweepOfTrials(dumped, "/runs/sweep", data, ("optim.learning_rate",), "ledger", trial, "/")
    of_trial = sweep.config_of(7, POINT)
    assert (of_trial.run.name, of_trial.run.storage_path) == ("trial-0007", "/runs/sweep")
    assert of_trial.model.anchors.scales == tuple(SMALL)
    assert of_trial.train == config.train
    assert sweep.data_of(POINT).training == "0.0031"


def test_failures_in_a_line() -> None:
    class WrappedError(Exception):
        cause = UserError("training failed: step 12: loss = nan")

    assert explain(WrappedError("a traceback\nof many lines")) == "training failed: step 12: loss = nan"
    assert explain(MemoryError("no room\nfor it")) == "MemoryError: for it"
    assert explain(ValueError()) == "ValueError: no message"
