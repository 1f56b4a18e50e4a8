"""The parts of the model that a GPU runs faster when torch.compile has fused their small operations."""

from __future__ import annotations

from model.mask_rcnn import MaskRCNN


def compile_parts(model: MaskRCNN) -> None:
    """Compile networks in place, names of parameters unchanged; the first step of each shape takes a minute or more.

    On a CPU it was measured slower than without.
    """
    for part in (model.backbone, model.fpn, model.rpn, model.box_head, model.mask_head):
        part.compile(dynamic=False)
