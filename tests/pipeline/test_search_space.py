"""Search spaces: what they mean, and that a bad one is refused with the name of its knob."""

import subprocess
import sys
import time
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from pipeline.anchor_advice import search_space
from pipeline.command_line import ConfigurationError
from pipeline.config import ExperimentConfig
from pipeline.evaluation import AP_METRICS
from pipeline.proposal_recall import RECALL_METRICS
from pipeline.search_space import Knob, Space, advised_points, apply_point, configured_value, label, shard_knobs
from pipeline.space_parsing import (
    best_possible_iou,
    check_search,
    check_start_points,
    combinations,
    parse_space,
    with_advice,
)
from pipeline.sweep_config import OBJECTIVES, RECALL_OBJECTIVES, SweepConfig, SweepSettings
from pipeline.training import STEP_METRICS
from tests.jobs.running import ROOT

BASE = ExperimentConfig.model_validate({"data": {"canvases": [[64, 64]]}})
SMALL, LARGE = [4, 8, 16, 32, 64], [8, 16, 32, 64, 128]
ADVICE: list[dict[str, Any]] = [
    {"scales": [32, 64, 128, 256, 512], "ratios": [0.5, 1.0, 2.0]},
    {"scales": SMALL, "ratios": [0.5, 1.0, 2.0]},
    {"scales": SMALL, "ratios": [0.8, 1.0, 1.2]},
]


def test_every_kind_is_read() -> None:
    space = parse_space(
        {
            "model.anchors.scales": {"choice": [SMALL, LARGE]},
            "model.detections.max_per_image": {"grid": [50, 100]},
            "model.rpn.nms_threshold": {"uniform": [0.5, 0.9]},
            "optim.learning_rate": {"loguniform": [1e-4, 1e-2]},
            "model.rpn.pre_nms_top_k": {"integer": [100, 1000]},
        },
        BASE,
    )
    assert [knob.kind for knob in space.knobs] == ["choice", "grid", "uniform", "loguniform", "integer"]
    assert space["model.anchors.scales"].values == (SMALL, LARGE)
    assert (space["model.rpn.nms_threshold"].low, space["model.rpn.nms_threshold"].high) == (0.5, 0.9)
    assert not space.is_finite
    assert space.points(["grid"]) == [
        {"model.detections.max_per_image": 50},
        {"model.detections.max_per_image": 100},
    ]


def test_a_point_becomes_a_configuration() -> None:
    point = {"model.anchors.scales": SMALL, "model.rpn.nms_threshold": 0.6, "data.synthetic.seed": 3}
    config = apply_point(BASE, point)
    assert list(config.model.anchors.scales) == SMALL
    assert config.model.rpn.nms_threshold == 0.6
    assert configured_value(config, "data.synthetic.seed") == 3
    assert apply_point(BASE, {}) == BASE
    assert configured_value(config, "model.anchors.scales") == [4, 8, 16, 32, 64]
    assert configured_value(BASE, "data.synthetic.seed") is None


def test_points_are_all_combinations_the_last_knob_fastest() -> None:
    space = Space((Knob("a", "choice", (1, 2)), Knob("b", "grid", ("x", "y"))))
    assert [tuple(point.values()) for point in space.points()] == [(1, "x"), (1, "y"), (2, "x"), (2, "y")]
    assert Space((Knob("c", "uniform", low=0, high=1),)).points() == [{}]


@pytest.mark.parametrize(
    ("space", "parts"),
    [
        ({}, ["sweep.space: is empty"]),
        ({"model.rpn.nms_treshold": {"choice": [0.5]}}, ["model.rpn.nms_treshold: no such key", "nms_threshold?"]),
        ({"model.rpn": {"choice": [1]}}, ["model.rpn: is a section; name one of its keys, such as model.rpn."]),
        ({"model": {"rpn": {"nms_threshold": {"choice": [0.5]}}}}, ["model: is a section; name one of its keys"]),
        (
            {
                "model.rpn.nms_threshold": {"choice": [n / 999 for n in range(1, 150)] + ["high"] + [0.9]},
                "optim.learning_rate": {"uniform": [0.001, 0.1]},
            },
            ["model.rpn.nms_threshold", "high", "valid number"],
        ),
        ({"model.rpn.pre_nms_top_k": {"integer": [1, 10**400]}}, ["model.rpn.pre_nms_top_k: a whole number is larger"]),
        ({"model.rpn.pre_nms_top_k": {"choice": [10**30, 5]}}, ["model.rpn.pre_nms_top_k: a whole number is larger"]),
        ({"optim.learning_rate": {"uniform": [1, 10**400]}}, ["optim.learning_rate: a whole number is larger"]),
        ({"optim.name": {"choice": [b"sgd"]}}, ["optim.name: a bytes is no value"]),
        ({"data.validation_fraction": {"choice": [0.1, 0.2]}}, ["data.validation_fraction", "the same for all trials"]),
        ({"model.rpn.nms_threshold": {"uniform": [0.5, 1.7]}}, ["model.rpn.nms_threshold", "1.7", "<= 1"]),
        ({"model.rpn.nms_threshold": {"uniform": [0.9, 0.5]}}, ["model.rpn.nms_threshold", "low and high"]),
        ({"model.rpn.nms_threshold": {"uniform": [0.5]}}, ["model.rpn.nms_threshold", "low and high"]),
        ({"model.rpn.nms_threshold": {"uniform": ["a", "b"]}}, ["model.rpn.nms_threshold", "two numbers"]),
        ({"model.rpn.nms_threshold": [0.5, 0.7]}, ["model.rpn.nms_threshold", "expected one of choice, grid"]),
        ({"model.rpn.nms_threshold": {"normal": [0.5, 0.7]}}, ["model.rpn.nms_threshold", "expected one of"]),
        ({"model.rpn.nms_threshold": {"choice": []}}, ["model.rpn.nms_threshold", "needs a list"]),
        ({"model.rpn.nms_threshold": {"choice": [0.5, 0.50]}}, ["model.rpn.nms_threshold", "twice"]),
        ({"model.rpn.nms_threshold": {"choice": ["high"]}}, ["model.rpn.nms_threshold", "high", "valid number"]),
        ({"model.rpn.nms_threshold": {"choice": "advised"}}, ["model.rpn.nms_threshold", "can be advised"]),
        ({"model.rpn.pre_nms_top_k": {"uniform": [100, 1000]}}, ["model.rpn.pre_nms_top_k", "whole numbers"]),
        ({"model.rpn.pre_nms_top_k": {"integer": [0, 1000]}}, ["model.rpn.pre_nms_top_k", ">= 1"]),
        ({"model.rpn.pre_nms_top_k": {"integer": [1, 10.5]}}, ["model.rpn.pre_nms_top_k", "two whole numbers"]),
        ({"optim.learning_rate": {"loguniform": [0, 1]}}, ["optim.learning_rate", "above 0"]),
        ({"run.name": {"choice": ["a", "b"]}}, ["run.name", "the same for all trials"]),
        ({"scaling.num_workers": {"choice": [1, 2]}}, ["scaling.num_workers", "the same for all trials"]),
        ({"data.jpeg_quality": {"integer": [50, 90]}}, ["data.jpeg_quality", "choice"]),
        ({"model.anchors.scales": {"choice": [[4, 8, 16, 32]]}}, ["model.anchors.scales", "lists of 5 numbers"]),
        ({"model.anchors.scales": {"choice": [4, 8]}}, ["model.anchors.scales", "lists of 5 numbers"]),
        ({"model.anchors.scales": {"choice": [[0, 8, 16, 32, 64]]}}, ["model.anchors.scales", "greater than 0"]),
        ({"model.anchors.scales": {"choice": [[128, 64, 32, 16, 8]]}}, ["model.anchors.scales", "have to rise"]),
        ({"model.anchors.scales": {"choice": [[8, 16, 32, 64, 1e30]]}}, ["model.anchors.scales", "impossible anchors"]),
        ({"model.anchors.scales": {"choice": [[1e-320] * 4 + [16]]}}, ["model.anchors.scales", "impossible anchors"]),
        ({"model.anchors.ratios": {"choice": [[]]}}, ["model.anchors.ratios", "at least 1"]),
        (
            {"model.anchors.scales": {"choice": [SMALL, [100, 200, 400, 800, 1600]]}},
            ["model.anchors.scales", "impossible anchors", "[[64, 64]]", "positive_iou is 0.7"],
        ),
        (
            {"model.anchors.scales": {"choice": [[0.1, 0.2, 0.3, 0.4, 0.5]]}},
            ["model.anchors.scales", "impossible anchors"],
        ),
        ({"model.anchors.ratios": {"choice": [[90.0]]}}, ["model.anchors.ratios", "impossible anchors"]),
        (
            {"model.rpn.positive_iou": {"choice": [0.4]}, "model.rpn.negative_iou": {"choice": [0.3, 0.6]}},
            ["model.rpn.positive_iou 0.4, model.rpn.negative_iou 0.6", "is above"],
        ),
    ],
)
def test_a_bad_space_is_refused_with_the_name(space: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigurationError) as refused:
        parse_space(space, BASE)
    assert "\n" not in str(refused.value)
    for part in parts:
        assert part in str(refused.value)


def test_values_that_only_go_together_with_others_of_the_space_are_allowed() -> None:
    """A negative_iou of 0.75 is above the configured positive_iou, but not above those of the space."""
    given = {"model.rpn.negative_iou": {"choice": [0.75]}, "model.rpn.positive_iou": {"choice": [0.8, 0.9]}}
    space = parse_space(given, BASE)
    assert {knob.name: list(knob.values) for knob in space.knobs} == {k: v["choice"] for k, v in given.items()}


def test_best_possible_iou_by_hand() -> None:
    assert best_possible_iou(16, 1.0, (64, 64)) == 1.0
    assert best_possible_iou(128, 1.0, (64, 64)) == pytest.approx(0.25)  # the whole canvas in an anchor of 4 times it
    assert best_possible_iou(64, 4.0, (64, 64)) == pytest.approx(0.5)  # 128 x 32, half of it outside
    assert best_possible_iou(64, 4.0, (64, 128)) == 1.0
    assert best_possible_iou(0.5, 1.0, (64, 64)) == pytest.approx(0.25)  # in an object of one pixel


def test_many_knobs_are_checked_by_some_combinations() -> None:
    knobs = tuple(Knob(f"k{i}", "uniform", low=0.0, high=1.0) for i in range(12))
    found = list(combinations(Space(knobs)))
    assert len(found) == 66 * 4, "the ends of every two knobs"
    assert all({point[knob.name] for point in found} == {0.0, 1.0} for knob in knobs)


def test_knobs_of_the_data_are_known() -> None:
    space = parse_space(
        {
            "data.canvases": {"choice": [[[64, 64]], [[96, 96]]]},
            "augment.short_side": {"choice": [None, [32, 64]]},
            "data.repeat_threshold": {"uniform": [0.0, 0.1]},
            "augment.brightness": {"uniform": [0.0, 0.3]},
        },
        BASE,
    )
    assert [knob.name for knob in shard_knobs(space).knobs] == ["data.canvases", "augment.short_side"]


def test_start_points_have_to_lie_in_the_space() -> None:
    space = parse_space(
        {"model.anchors.scales": {"choice": [SMALL]}, "model.rpn.nms_threshold": {"uniform": [0.5, 0.9]}}, BASE
    )
    check_start_points([{"model.anchors.scales": [4.0, 8, 16, 32, 64]}, {"model.rpn.nms_threshold": 0.5}, {}], space)
    for point, part in (
        ({"model.anchors.scales": LARGE}, "sweep.start_points.0: model.anchors.scales: [8, 16, 32, 64, 128] is not in"),
        ({"model.rpn.nms_threshold": 0.95}, "0.95 is not in the space, uniform [0.5, 0.9]"),
        ({"model.rpn.nms_threshold": True}, "true is not in the space"),
        ({"optim.learning_rate": 0.1}, "optim.learning_rate: is not in sweep.space"),
    ):
        with pytest.raises(ConfigurationError) as refused:
            check_start_points([point], space)
        assert part in str(refused.value)


def test_the_advice_fills_the_space_and_comes_first() -> None:
    space = parse_space(
        {"model.anchors.scales": {"choice": "advised"}, "model.rpn.nms_threshold": {"uniform": [0.5, 0.9]}}, BASE
    )
    assert space["model.anchors.scales"].is_advised
    with pytest.raises(ConfigurationError, match=r"sweep\.space\.model\.anchors\.scales: advised, but .* no report"):
        with_advice(space, [], BASE)
    known = with_advice(space, ADVICE, BASE)
    assert known["model.anchors.scales"].values == ([32, 64, 128, 256, 512], SMALL)
    assert advised_points(known, ADVICE, BASE) == [
        {"model.anchors.scales": [32, 64, 128, 256, 512], "model.rpn.nms_threshold": 0.7},
        {"model.anchors.scales": SMALL, "model.rpn.nms_threshold": 0.7},
    ], "the third differs from the second only in ratios, which the space does not vary"


def test_advised_points_leave_out_what_the_space_has_not() -> None:
    space = parse_space(
        {
            "model.anchors.scales": {"choice": [SMALL, LARGE]},
            "model.anchors.ratios": {"choice": "advised"},
            "model.rpn.nms_threshold": {"uniform": [0.8, 0.9]},
        },
        BASE,
    )
    points = advised_points(with_advice(space, ADVICE, BASE), ADVICE, BASE)
    assert points == [
        {"model.anchors.scales": SMALL, "model.anchors.ratios": [0.5, 1.0, 2.0]},
        {"model.anchors.scales": SMALL, "model.anchors.ratios": [0.8, 1.0, 1.2]},
    ], "the configured scales and NMS threshold are not in the space"
    assert advised_points(parse_space({"train.seed": {"choice": [1, 2]}}, BASE), ADVICE, BASE) == []


def test_the_advisor_writes_a_search_space() -> None:
    recalls = {"recall_50": 0.5, "recall_70": 0.25}
    entries = [{"name": str(index), **entry, **recalls} for index, entry in enumerate(ADVICE)]
    text = search_space({"configured": entries[0], "candidates": entries[1:]})
    space = parse_space(yaml.safe_load(text), BASE)
    assert space["model.anchors.ratios"].values == ([0.5, 1.0, 2.0], [0.8, 1.0, 1.2])


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([32, 64.0, 0.5], "[32, 64, 0.5]"),
        (0.1 + 0.2, repr(0.1 + 0.2)),
        ("sgd", "sgd"),
        (True, "true"),
        (None, "null"),
        (7, "7"),
        (1e6, "1000000"),
        (1e300, "1e+300"),
    ],
)
def test_labels(value: Any, expected: str) -> None:
    assert label(value) == expected


def test_the_check_needs_neither_torch_nor_ray() -> None:
    """So a mistake in the space shows in about a second."""
    code = "import sys, pipeline.space_parsing; print({'torch', 'ray', 'mlflow'} & set(sys.modules))"
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    assert time.monotonic() - started < 20  # of a busy machine


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"search": "grid"}, "sweep.space.model.rpn.nms_threshold: uniform [0.5, 0.9]: a grid search needs a choice"),
        ({"search": "tpe"}, "sweep.space.model.rpn.proposals_inference: tpe does not walk a grid"),
        ({"checkpoint": "demo"}, "sweep.space.model.anchors.scales: needs a training"),
        ({"start_points": [{"model.rpn.nms_threshold": 0.2}]}, "sweep.start_points.0: model.rpn.nms_threshold: 0.2"),
    ],
)
def test_searches_that_cannot_be_made(settings: dict[str, Any], part: str) -> None:
    space = parse_space(
        {
            "model.rpn.nms_threshold": {"uniform": [0.5, 0.9]},
            "model.rpn.proposals_inference": {"grid": [100, 200]},
            "model.anchors.scales": {"choice": [SMALL, LARGE]},
        },
        BASE,
    )
    check_search(space, SweepSettings(), BASE)
    with pytest.raises(ConfigurationError) as refused:
        check_search(space, SweepSettings.model_validate(settings), BASE)
    assert part in str(refused.value)


@pytest.mark.parametrize("scales", [5, "abc", None, [1, 2], [-8, 16, 32, 64, 128], [1e5] * 5, [64, 32, 16, 8, 4]])
def test_start_points_on_advised_anchors_are_looked_at_before_the_advice(scales: Any) -> None:
    space = parse_space({"model.anchors.scales": {"choice": "advised"}}, BASE)
    check_search(space, SweepSettings(start_points=({"model.anchors.scales": SMALL},)), BASE)
    with pytest.raises(ConfigurationError, match=r"^sweep\.start_points\.0: model\.anchors\.scales: "):
        check_search(space, SweepSettings(start_points=({"model.anchors.scales": scales},)), BASE)


def test_start_points_have_to_go_together() -> None:
    given = {"model.rpn.positive_iou": {"uniform": [0.3, 0.9]}, "model.rpn.negative_iou": {"uniform": [0.1, 0.3]}}
    space = parse_space({**given, "model.anchors.scales": {"choice": "advised"}}, BASE)
    assert len(space.knobs) == 3
    point = {"model.rpn.positive_iou": 0.35, "model.rpn.negative_iou": 0.2, "model.anchors.scales": SMALL}
    check_search(space, SweepSettings(start_points=(point,)), BASE)
    with pytest.raises(ConfigurationError, match=r"^sweep\.start_points\.0: .*impossible anchors"):
        check_search(space, SweepSettings(start_points=({**point, "model.anchors.scales": [600] * 5},)), BASE)


@pytest.mark.parametrize("values", [[True, False], [False]])
def test_a_recall_that_is_not_logged_is_no_objective(values: list[bool]) -> None:
    space = parse_space({"train.rpn_recall": {"choice": values}}, BASE)
    check_search(space, SweepSettings(), BASE)
    with pytest.raises(ConfigurationError, match=r"sweep\.space\.train\.rpn_recall: sweep\.objective rpn_AR_100"):
        check_search(space, SweepSettings(early_objective="rpn_AR_100"), BASE)


def test_whole_numbers_between_the_ends_are_combined_too() -> None:
    """3 and 6 images on each of 4 workers can be divided among 3, but not 4 or 5."""
    base = ExperimentConfig.model_validate(
        {"scaling": {"num_workers": 4, "min_workers": 3}, "train": {"batch_size_per_worker": 3}}
    )
    with pytest.raises(ConfigurationError, match=r"train\.batch_size_per_worker"):
        parse_space({"train.batch_size_per_worker": {"integer": [3, 6]}}, base)


def test_bad_configured_anchors_may_be_replaced_by_advised_ones() -> None:
    """Of the candidates those are left out that could not match on this canvas."""
    base = apply_point(BASE, {"model.anchors.scales": [600, 700, 800, 900, 1000]})
    space = parse_space({"model.anchors.scales": {"choice": "advised"}}, base)
    with pytest.raises(ConfigurationError, match=r"^model\.anchors\.scales: impossible anchors"):
        parse_space({"model.rpn.nms_threshold": {"uniform": [0.5, 0.9]}}, base)
    configured = {"scales": [600, 700, 800, 900, 1000], "ratios": [0.5, 1.0, 2.0]}
    assert with_advice(space, [configured, ADVICE[1]], base)["model.anchors.scales"].values == (SMALL,)
    with pytest.raises(ConfigurationError, match="none of the advised anchors could match"):
        with_advice(space, [configured], base)


def test_a_grid_search_draws_nothing() -> None:
    space = parse_space({"train.seed": {"choice": [1, 2]}, "model.detections.max_per_image": {"grid": [5, 6]}}, BASE)
    check_search(space, SweepSettings(search="grid"), BASE)
    with pytest.raises(ConfigurationError, match=r"start_points\.0: a grid search draws nothing"):
        check_search(space, SweepSettings(search="grid", start_points=({"train.seed": 1},)), BASE)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"sweep": {"objective": "mAP"}}, "mAP: no metric of that name is logged; there are bbox_AP, "),
        ({"sweep": {"early_objective": "recall"}}, "early_objective recall: no metric"),
        ({"sweep": {"checkpoint": "demo", "search": "tpe"}}, "take random or grid"),
        ({"sweep": {"checkpoint": "demo", "objective": "loss"}}, "only box and mask AP"),
        ({"sweep": {"early_objective": "rpn_AR_100"}, "train": {"rpn_recall": False}}, "needs train.rpn_recall true"),
    ],
)
def test_settings_of_a_sweep_that_do_not_go_together(changes: dict[str, Any], part: str) -> None:
    with pytest.raises(ValidationError) as refused:
        SweepConfig.model_validate(changes)
    assert part in str(refused.value)


def test_the_objectives_are_what_a_training_logs() -> None:
    step = (*STEP_METRICS, "learning_rate", "images_per_second", "data_wait_fraction")
    assert sorted(OBJECTIVES) == sorted({*AP_METRICS, *RECALL_METRICS, *step})
    assert RECALL_OBJECTIVES == RECALL_METRICS


def test_every_two_extremes_meet() -> None:
    """Two long lists of which a single pair does not go together."""
    values = [index / 20 for index in range(1, 20)]
    given = {"model.rpn.positive_iou": {"choice": [0.4, *values[9:]]}, "model.rpn.negative_iou": {"choice": values[:9]}}
    assert max(values[:9]) > 0.4
    with pytest.raises(ConfigurationError, match=r"sweep\.space: .*negative_iou 0\.45 is above positive_iou 0\.4"):
        parse_space({**given, "train.seed": {"choice": list(range(20))}}, BASE)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"model.backbone.depth": {"integer": [18, 50]}}, "sweep.space.model.backbone.depth: integer [18, 50]: 19: "),
        ({"data.synthetic.seed": {"choice": [0, 1]}}, "sweep.space.data.synthetic.seed: is the same for all trials"),
        ({"predict.batch_size": {"choice": [1, 2]}}, "sweep.space.predict.batch_size: is the same for all trials"),
        ({"model.rpn.nms_threshold": [0.5, 0.7]}, "sweep.space.model.rpn.nms_threshold: expected one of choice"),
    ],
)
def test_what_no_trial_could_use_is_refused_by_name(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        parse_space(SweepSettings.model_validate({"space": given}).space, BASE)
    assert str(refused.value).startswith(told)


def test_how_many_points_there_are() -> None:
    integer, listed = Knob("a", "integer", low=3, high=5), Knob("b", "choice", ("x", "y"))
    assert Space((integer, listed)).num_points == 6
    assert [(point["a"], point["b"]) for point in Space((integer, listed)).all_points()] == [
        (3, "x"), (3, "y"), (4, "x"), (4, "y"), (5, "x"), (5, "y"),
    ]  # fmt: skip
    assert Space((Knob("a", "integer", low=0, high=10**9),)).num_points is None
    assert Space((integer, Knob("c", "uniform", low=0.0, high=1.0))).num_points is None


def test_a_small_loss_is_good_without_being_told() -> None:
    assert SweepSettings().larger_is_better
    assert not SweepSettings(objective="loss").larger_is_better
    assert SweepSettings(objective="loss", mode="max").larger_is_better
    with pytest.raises(ValidationError, match="early_objective loss: a large one has to be good"):
        SweepSettings(early_objective="loss")
