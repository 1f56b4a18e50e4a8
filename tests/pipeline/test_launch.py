"""What a training asks of Ray Train, and how it is ended."""

import signal

import pytest

from pipeline.config import ScalingSettings
from pipeline.errors import Terminated
from pipeline.launch import _starts_while_waiting, _worker_range, ending_on_sigterm


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
