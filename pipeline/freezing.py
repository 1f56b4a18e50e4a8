"""Which layers learn, by the stages of the ResNet: the original's "heads", "3+", "4+", "5+" and "all"."""

from __future__ import annotations

from model.mask_rcnn import MaskRCNN

_FIRST_TRAINED_STAGE = {"heads": 6, "5+": 5, "4+": 4, "3+": 3}


def freeze(model: MaskRCNN, trainable_layers: str) -> None:
    """Take the lower part of the ResNet out of the training; call it before the optimiser is built.

    Args:
        model: FPN, RPN and heads always learn.
        trainable_layers: "heads" for these alone, "5+", "4+" or "3+" for the ResNet from that stage on, "all". Stage 1
            is the stem, stage 5 gives C5; freezing two stages (detectron2's FREEZE_AT: 2) is "3+".
    """
    if trainable_layers == "all":
        return
    first = _FIRST_TRAINED_STAGE[trainable_layers]
    parts = [model.backbone.stem, *model.backbone.stages]
    for part in parts[: first - 1]:
        part.requires_grad_(False)
