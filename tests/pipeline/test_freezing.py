import pytest
from pydantic import ValidationError

from model.mask_rcnn import MaskRCNN
from pipeline.freezing import freeze
from pipeline.optim import build_optimizer
from tests.pipeline.small import small_config

STAGES = ["backbone.stem", "backbone.stages.0", "backbone.stages.1", "backbone.stages.2", "backbone.stages.3"]


@pytest.mark.parametrize(("layers", "frozen"), [("all", 0), ("3+", 2), ("4+", 3), ("5+", 4), ("heads", 5)])
def test_stages_that_learn_are_those_of_the_original(layers: str, frozen: int) -> None:
    config = small_config(train={"trainable_layers": layers})
    model = MaskRCNN(config.model, 3)
    freeze(model, layers)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for index, stage in enumerate(STAGES):
        of_stage = {name for name, _ in model.named_parameters() if name.startswith(stage)}
        assert of_stage
        assert of_stage & learning == (set() if index < frozen else of_stage)
    others = {name for name, _ in model.named_parameters() if not name.startswith("backbone")}
    assert others <= learning
    groups = build_optimizer(model, config.optim).param_groups
    assert sum(len(group["params"]) for group in groups) == len(learning)


def test_batch_norm_that_would_change_frozen_layers_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"trainable_layers heads needs model\.backbone\.norm frozen"):
        small_config(model={"backbone": {"depth": 18, "norm": "batch"}}, train={"trainable_layers": "heads"})
