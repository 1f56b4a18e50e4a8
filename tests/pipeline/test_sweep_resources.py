"""Room for trials: by hand, and what does not fit is refused with the arithmetic."""

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from model.mask_rcnn import MaskRCNN
from pipeline.checkpoint import Description, write_checkpoint
from pipeline.cluster import Placement
from pipeline.errors import UserError
from pipeline.optim import build_optimizer
from pipeline.search_space import Knob, Space, apply_point
from pipeline.sweep_config import SweepSettings
from pipeline.sweep_resources import check_disk, checkpoint_bytes, disk_bytes, max_concurrent, trial_placement
from tests.pipeline.small import small_config

CPU, GPU = {"CPU": 1.0}, {"CPU": 1.0, "GPU": 1.0}


@pytest.mark.parametrize(
    ("nodes", "num_workers", "resources", "expected"),
    [
        ([{"CPU": 3.0}], 2, CPU, 1),
        ([{"CPU": 4.0}], 1, CPU, 2),
        ([{"CPU": 5.0}], 1, CPU, 2),  # 2 x (1 + 1) = 4
        ([{"CPU": 2.0}], 2, CPU, 0),  # nothing to read data with
        ([{"CPU": 8.0}], 2, {"CPU": 2.0}, 1),  # 2 x 2 + 1 = 5
        ([{"CPU": 3.0}, {"CPU": 3.0}], 1, {"CPU": 2.0}, 2),
        ([{"CPU": 3.0}, {"CPU": 3.0}], 3, {"CPU": 2.0}, 0),  # a worker never spans nodes
        ([{"CPU": 64.0, "GPU": 8.0}], 2, GPU, 4),
        ([{"CPU": 8.0, "GPU": 8.0}], 2, GPU, 2),  # 2 x (2 + 1) = 6 CPU
        ([{"CPU": 64.0}], 1, GPU, 0),
    ],
)
def test_trials_that_fit(nodes: list[dict[str, float]], num_workers: int, resources: Any, expected: int) -> None:
    assert max_concurrent(nodes, num_workers, resources) == expected


def test_what_a_trial_gets() -> None:
    alone = Placement(False, CPU, 7.0)
    assert trial_placement([{"CPU": 8.0}], 1, alone, None, 8) == (4, Placement(False, CPU, 1.0))
    assert trial_placement([{"CPU": 8.0}], 1, alone, 2, 8) == (2, Placement(False, CPU, 3.0))


def test_no_more_at_once_than_there_can_be() -> None:
    assert trial_placement([{"CPU": 8.0}], 1, Placement(False, CPU, 7.0), None, 1) == (1, Placement(False, CPU, 7.0))


def test_what_does_not_fit_is_refused_with_the_arithmetic() -> None:
    alone = Placement(True, GPU, 1.0)
    with pytest.raises(UserError) as refused:
        trial_placement([{"CPU": 8.0, "GPU": 4.0}], 2, alone, 3, 8)
    assert str(refused.value) == (
        "3 trials at once do not fit: a trial takes 2 workers x (1 CPU + 1 GPU) + 1 CPU for reading data = 3 CPU and "
        "2 GPU, the cluster has 8 CPU and 4 GPU on 1 nodes, which hold 2; "
        "lower --sweep.max_concurrent_trials or --scaling.num_workers"
    )
    with pytest.raises(UserError, match=r"1 trials at once do not fit: .* = 3 CPU, the cluster has 2 CPU and 0 GPU"):
        trial_placement([{"CPU": 2.0}], 2, Placement(False, CPU, 0.0), None, 8)


@pytest.mark.parametrize(
    "optim", [{"name": "sgd"}, {"name": "sgd", "momentum": 0.0}, {"name": "adamw", "ema_decay": 0.9}]
)
def test_the_size_of_a_checkpoint_is_that_of_its_files(tmp_path: Path, optim: dict[str, Any]) -> None:
    config = small_config(optim=optim)
    model = MaskRCNN(config.model, 4)
    optimizer = build_optimizer(model, config.optim)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    description = Description(1, 0.1, 1.0, {}, ["a", "b", "c"], "", {})
    averaged = MaskRCNN(config.model, 4) if config.optim.ema_decay else None
    write_checkpoint(str(tmp_path), model, optimizer, description, averaged)
    written = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert checkpoint_bytes(config, 4) == pytest.approx(written, rel=0.03)


def test_the_largest_checkpoint_of_the_space_counts() -> None:
    config = small_config()
    settings = SweepSettings(keep_checkpoints=2)
    space = Space(
        (
            Knob("model.fpn.channels", "choice", (64, 32)),
            Knob("optim.ema_decay", "choice", (None, 0.9)),
            Knob("model.rpn.nms_threshold", "uniform", low=0.5, high=0.9),
        )
    )
    largest = apply_point(config, {"model.fpn.channels": 64, "optim.ema_decay": 0.9})
    assert checkpoint_bytes(largest, 4) > checkpoint_bytes(apply_point(config, {"model.fpn.channels": 64}), 4)
    assert disk_bytes(config, space, settings, 3, 4) == checkpoint_bytes(largest, 4) * (3 * 4 + 2 * 3)


def test_checkpoints_that_the_sweep_has_already_are_not_counted_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**10, 0, 1000))
    for place in ("trial-0000/checkpoint-0000100", "trial-0001"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "model.safetensors").write_bytes(bytes(500))
    check_disk(str(tmp_path), 1500, lambda line: None)
    with pytest.raises(UserError, match="the checkpoints of the sweep take up to"):
        check_disk(str(tmp_path), 1501, lambda line: None)


def test_a_disk_that_is_too_small_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**10, 0, 2 * 10**9))
    said: list[str] = []
    check_disk(str(tmp_path / "not" / "there"), 10**9, said.append)
    assert said == ["sweep: checkpoints take up to 1.0 GB, 2.0 GB are free"]
    with pytest.raises(UserError, match=r"take up to 3\.0 GB, 2\.0 GB are free; lower --checkpoints\.keep"):
        check_disk(str(tmp_path), 3 * 10**9, said.append)
