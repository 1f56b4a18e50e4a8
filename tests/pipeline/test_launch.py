"""What a training asks of Ray Train, and how it is ended."""

import signal
from pathlib import Path

import pytest

from pipeline import run_state
from pipeline.checkpoint import Description, TrainingState, write_state
from pipeline.checkpoint_store import CheckpointStore
from pipeline.config import ScalingSettings
from pipeline.errors import Terminated
from pipeline.launch import (
    _length,
    _starts_while_waiting,
    _where_it_begins,
    _worker_range,
    ending_on_sigterm,
    finished_summary,
)
from tests.pipeline.small import small_config


def test_sigterm_ends_a_training_as_an_interrupt_does() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt) as caught, ending_on_sigterm():
        signal.raise_signal(signal.SIGTERM)
    assert isinstance(caught.value, Terminated)
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_that_ray_made_an_interrupt_of_is_still_one() -> None:
    """As a wait for Ray does, which reads the signal in code that is not Python."""

    def wait() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except Terminated:
            raise KeyboardInterrupt from None

    with pytest.raises(KeyboardInterrupt) as caught, ending_on_sigterm():
        wait()
    assert isinstance(caught.value, Terminated)
    with pytest.raises(KeyboardInterrupt) as caught, ending_on_sigterm():
        raise KeyboardInterrupt  # Ctrl-C
    assert not isinstance(caught.value, Terminated)


def test_the_number_of_workers_may_fall_where_it_is_allowed() -> None:
    assert _worker_range(ScalingSettings(num_workers=4)) == 4
    assert _worker_range(ScalingSettings(num_workers=4, min_workers=4)) == 4
    assert _worker_range(ScalingSettings(num_workers=4, min_workers=2)) == (2, 4)


def test_a_lost_node_is_waited_for_as_long_as_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "15")
    assert _starts_while_waiting(ScalingSettings(wait_for_nodes_minutes=30)) == 120
    assert _starts_while_waiting(ScalingSettings(wait_for_nodes_minutes=0.1)) == 1


def test_a_finished_run_is_finished_for_the_data_that_it_was_trained_on(tmp_path: Path) -> None:
    annotations = tmp_path / "annotations.json"
    annotations.write_text("{}")
    data = {"root": str(tmp_path), "sources": [{"annotations": "annotations.json"}], "validation_fraction": 0.1}
    config = small_config(data=data, run={"name": "mine", "storage_path": str(tmp_path / "runs")})
    folder = run_state.run_folder(config)
    said: list[str] = []
    assert finished_summary(config, said.append, with_data=True) is None
    settings, digests = config.model_dump(mode="json"), run_state.annotation_digests(config)
    run_state.write_run(folder, run_state.RunState(settings, "a", "b", None, digests))
    assert finished_summary(config, said.append, with_data=True) is None
    run_state.write_result(folder, run_state.RunResult(_length(config), {"steps": 20}))
    assert finished_summary(config, said.append, with_data=True) == {"steps": 20}
    annotations.write_text('{"images": []}')
    assert finished_summary(config, said.append, with_data=True) is None, "the job looks at the data and refuses them"
    assert finished_summary(config, said.append) == {"steps": 20}, "a trial of a sweep has its shards"
    annotations.unlink()
    assert finished_summary(config, said.append, with_data=True) == {"steps": 20}, "they may have been put away since"
    elsewhere = small_config(data={**data, "root": str(tmp_path / "typo")}, run=config.run.model_dump())
    assert finished_summary(elsewhere, said.append, with_data=True) is None, "the job says that there is nothing"
    run_state.write_run(folder, run_state.RunState(settings, "a", "b", None))  # of a version that did not write it down
    assert finished_summary(config, said.append, with_data=True) == {"steps": 20}


def test_where_a_run_begins_is_told(tmp_path: Path) -> None:
    config = small_config(train={"epochs": 2.0})
    folder, state = str(tmp_path), run_state.RunState({}, "a", "b", None)
    begins = f"run {config.run.name} in {folder}"
    assert _where_it_begins(config, 40, folder, None) == f"beginning {begins}"
    assert (
        _where_it_begins(config, 40, folder, state)
        == f"going on with {begins}, whose last checkpoint is of step 0 of 40"
    )
    nothing = TrainingState({}, {"state": {}, "param_groups": []})
    description = Description(20, 1.0, 1.0, {}, [], "digest", config.model_dump(mode="json"))
    CheckpointStore(folder).commit(20, lambda place: write_state(place, nothing, description), lambda: None)
    assert _where_it_begins(config, 40, folder, state).endswith(", whose last checkpoint is of step 20 of 40")
    result = run_state.RunResult(_length(small_config(train={"epochs": 1.0})), {"steps": 20})
    run_state.write_result(folder, result)
    assert _where_it_begins(config, 40, folder, state) == (
        f"going on with {begins}, which had finished at step 20 (epochs 1): 20 steps more, since epochs 2 is asked now"
    )
    assert _where_it_begins(config, 10, folder, state) == (
        f"{begins} has 20 steps already, and epochs 2 makes 10: no step is left to train"
    )
    run_state.write_result(folder, run_state.RunResult(result.length, {"steps": 10}))  # went on since, and was killed
    assert _where_it_begins(config, 40, folder, state).endswith(", whose last checkpoint is of step 20 of 40")
