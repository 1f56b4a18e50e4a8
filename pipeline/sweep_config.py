"""Every knob of a sweep; the other sections are the configuration that its trials vary."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from model.config import Config, PositiveFloat, PositiveInt
from pipeline.config import ExperimentConfig, NonNegativeInt

RECALL_OBJECTIVES = ("rpn_AR_100", "rpn_AR_1000")
OBJECTIVES = (
    "bbox_AP", "bbox_AP50", "bbox_AP75", "bbox_AP_small", "bbox_AP_medium", "bbox_AP_large",
    "segm_AP", "segm_AP50", "segm_AP75", "segm_AP_small", "segm_AP_medium", "segm_AP_large",
    *RECALL_OBJECTIVES,
    "loss", "rpn_class_loss", "rpn_bbox_loss", "mrcnn_class_loss", "mrcnn_bbox_loss", "mrcnn_mask_loss",
    "gradient_norm", "learning_rate", "images_per_second", "data_wait_fraction",
)  # fmt: skip
"""Metrics that a training logs; of those of a step, an evaluation is judged by the latest."""
SMALL_IS_GOOD = (
    "loss", "rpn_class_loss", "rpn_bbox_loss", "mrcnn_class_loss", "mrcnn_bbox_loss", "mrcnn_mask_loss",
    "gradient_norm", "data_wait_fraction",
)  # fmt: skip


class SweepSettings(Config):
    """What is varied, how the next values are chosen, how good a trial is, and when to stop."""

    space: dict[str, Any] = {}  # noqa: RUF012 - pydantic copies defaults
    """Knobs by dotted name: {choice: [...]}, {grid: [...]}, {uniform|loguniform|integer: [low, high]}."""
    start_points: tuple[dict[str, Any], ...] = ()
    """Points that are tried first; knobs that one leaves out are drawn."""
    advised_anchors: bool = True
    """After them, try the configured anchors and those that the data suggest, where the space has anchors."""
    search: Literal["random", "grid", "tpe"] = "random"
    """Further points: drawn, all of a finite space in order, or by Optuna's TPE from what trials have reached."""
    scheduler: Literal["asha", "none"] = "asha"
    """asha ends trials early that are not among the best at their evaluation; none trains all to their end."""
    grace_evaluations: PositiveInt = 1
    """Evaluation at which asha compares trials first."""
    reduction_factor: Annotated[float, Field(gt=1.0)] = 3.0
    """Of the trials that asha compares, one in so many goes on, to so many times as many evaluations."""
    objective: str = "segm_AP"
    """Logged metric that trials are judged by; a trial counts with its best evaluation."""
    mode: Literal["max", "min"] | None = None
    """Whether a large or a small objective is good; null: a small one of losses and waiting, else a large one."""
    early_objective: str | None = None
    """Metric that asha compares by at first instead (a large one is good), such as rpn_AR_100; null: the objective."""
    early_evaluations: PositiveInt = 1
    """Last evaluation that early_objective decides."""
    max_trials: PositiveInt = 8
    """Most trials."""
    max_worker_hours: PositiveFloat | None = None
    """Most hours of all workers together; running trials end at their next evaluation then."""
    max_hours: PositiveFloat | None = None
    """Most hours on the clock, interruptions left out; running trials end at their next evaluation then."""
    max_concurrent_trials: PositiveInt | None = None
    """Trials at the same time; null: as many as the cluster holds."""
    keep_checkpoints: PositiveInt = 1
    """Best trials whose checkpoints are kept."""
    seed: NonNegativeInt = 0
    """What drawn points are a function of."""
    checkpoint: str | None = None
    """Vary thresholds of this checkpoint (folder, run or MLflow id) without training; null: train each trial."""

    @property
    def larger_is_better(self) -> bool:
        """What `mode` comes to."""
        return self.mode == "max" or (self.mode is None and self.objective not in SMALL_IS_GOOD)

    @model_validator(mode="after")
    def _objectives_are_logged(self) -> Self:
        for name, value in (("objective", self.objective), ("early_objective", self.early_objective)):
            if value is not None and value not in OBJECTIVES:
                raise ValueError(f"{name} {value}: no metric of that name is logged; there are {', '.join(OBJECTIVES)}")
        if self.early_objective in SMALL_IS_GOOD:
            raise ValueError(f"early_objective {self.early_objective}: a large one has to be good, such as rpn_AR_100")
        return self

    @model_validator(mode="after")
    def _a_sweep_without_training_knows_its_points(self) -> Self:
        if self.checkpoint is not None and self.search == "tpe":
            raise ValueError("search tpe: with checkpoint all points are looked at together; take random or grid")
        if self.checkpoint is not None and not self.objective.startswith(("bbox_", "segm_")):
            raise ValueError(f"objective {self.objective}: with checkpoint only box and mask AP are there to judge by")
        return self


class SweepConfig(ExperimentConfig):
    """An experiment and how it is varied."""

    sweep: SweepSettings = SweepSettings()
    """Search space, search, scheduler, budget."""

    def base(self) -> ExperimentConfig:
        """The experiment alone."""
        return ExperimentConfig(**{name: getattr(self, name) for name in ExperimentConfig.model_fields})

    @model_validator(mode="after")
    def _objectives_fit_the_training(self) -> Self:
        wanted = [name for name in RECALL_OBJECTIVES if name in (self.sweep.objective, self.sweep.early_objective)]
        if wanted and not self.train.rpn_recall:
            raise ValueError(f"sweep.objective {', '.join(wanted)} needs train.rpn_recall true")
        return self
