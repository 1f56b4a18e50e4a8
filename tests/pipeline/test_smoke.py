"""The smoke test: ten steps as a run of its own, begun anew each time, and nothing else is ever removed."""

from pathlib import Path

import pytest

from jobs.train import main
from pipeline.command_line import ConfigurationError, parse
from pipeline.errors import UserError
from pipeline.run_state import RunState, write_run
from pipeline.smoke import forecast, forget_last_smoke, smoke_config
from tests.pipeline.factories import Prepared
from tests.pipeline.small import small_config


def test_ten_steps_beside_the_real_run(tmp_path: Path) -> None:
    config = small_config(
        run={"name": "real", "storage_path": str(tmp_path)}, train={"epochs": 12, "max_steps": 90_000}
    )
    smoke = smoke_config(config)
    assert (smoke.run.name, smoke.train.max_steps, smoke.train.log_every_steps) == ("real-smoke", 10, 1)
    assert smoke.model == config.model
    assert smoke.data == config.data
    assert config.train.max_steps == 90_000


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (2.5, "smoke: all 1440 steps of real would take about 1:00:00, without evaluations and checkpoints"),
        (None, "smoke: too few steps were timed to tell how long the 1440 of real would take"),
    ],
)
def test_the_forecast_by_hand(prepared: Prepared, seconds: float | None, told: str) -> None:
    config = small_config(run={"name": "real"}, train={"epochs": 1e6, "max_steps": 1440})
    assert forecast(config, prepared.data, {"seconds_a_step": seconds}) == told


def test_an_earlier_smoke_test_is_forgotten(tmp_path: Path) -> None:
    smoke = smoke_config(small_config(run={"name": "real", "storage_path": str(tmp_path)}))
    forget_last_smoke(smoke)  # there is none
    folder = tmp_path / "real-smoke"
    (folder / "checkpoint-0000010").mkdir(parents=True)
    with pytest.raises(UserError, match="is not the run of a smoke test"):
        forget_last_smoke(smoke)
    write_run(str(folder), RunState(smoke.model_dump(mode="json"), "a", "b", None))
    (tmp_path / "real").mkdir()
    forget_last_smoke(smoke)
    assert [path.name for path in tmp_path.iterdir()] == ["real"]


def test_a_real_run_of_such_a_name_is_kept(tmp_path: Path) -> None:
    real = small_config(run={"name": "real-smoke", "storage_path": str(tmp_path)})
    write_run(str(tmp_path / "real-smoke"), RunState(real.model_dump(mode="json"), "a", "b", None))
    smoke = smoke_config(small_config(run={"name": "real", "storage_path": str(tmp_path)}))
    with pytest.raises(UserError, match=r"take another --run\.name"):
        forget_last_smoke(smoke)
    with pytest.raises(UserError, match="is not the run of a smoke test"):
        forget_last_smoke(real)
    assert (tmp_path / "real-smoke" / "run.json").exists()


def test_a_smoke_test_registers_nothing() -> None:
    with pytest.raises(ConfigurationError, match="leave one of them out"):
        main(["--smoke", "--register", "name"])


def test_flags_are_off_unless_given() -> None:
    assert parse("", [], flags={"smoke": ""}).smoke is False
    assert parse("", ["--smoke", "--train.epochs", "3"], flags={"smoke": ""}).smoke is True
