from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import nms

from model.boxes import clip_boxes, decode_boxes
from model.config import RpnConfig
from model.proposals import propose


def logits_of(scores: Tensor) -> Tensor:
    """(B, A) scores to (B, A, 2) logits with an arbitrary background."""
    background = torch.linspace(-1, 1, scores.shape[1]).expand_as(scores)
    return torch.stack([background, background + scores], dim=2)


def random_input(images: int = 2, num: int = 60) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    corner = torch.rand(num, 2, generator=generator) * 50 - 5
    anchors = torch.cat([corner, corner + 6 + torch.rand(num, 2, generator=generator) * 20], dim=1)
    logits = torch.randn(images, num, 2, generator=generator)
    deltas = torch.randn(images, num, 4, generator=generator)
    windows = torch.tensor([[0, 0, 64, 48], [0, 0, 40, 64], [0, 0, 30, 30]])[:images]
    return logits, deltas, anchors, windows


def run(
    logits: Tensor,
    deltas: Tensor,
    anchors: Tensor,
    windows: Tensor,
    num_proposals: int = 40,
    pre_nms_top_k: int = 6000,
    levels: Sequence[int] | None = None,
    **config: Any,
) -> tuple[Tensor, Tensor]:
    levels = [len(anchors)] if levels is None else levels
    return propose(logits, deltas, anchors, levels, windows, RpnConfig(**config), pre_nms_top_k, num_proposals)


def test_by_hand() -> None:
    anchors = torch.tensor(
        [
            [0.0, 0, 10, 10],  # worse copy of the next but one: IoU 0.8, dropped
            [-6, 20, 14, 40],  # leaves the image on the left: clipped
            [0, 0, 10, 8],
            [70, 0, 90, 20],  # right of the image: nothing is left of it
            [0, 50, 10, 70],  # leaves the image below
        ]
    )
    scores = torch.tensor([[1.0, 4.0, 2.0, 9.0, 3.0]])
    proposals, valid = run(
        logits_of(scores), torch.zeros(1, 5, 4), anchors, torch.tensor([[0, 0, 64, 60]]), num_proposals=5
    )
    expected = torch.tensor([[0.0, 20, 14, 40], [0, 50, 10, 60], [0, 0, 10, 8], [0, 0, 0, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(proposals, expected[None])
    torch.testing.assert_close(valid, torch.tensor([[True, True, True, False, False]]))


def test_equals_the_steps_one_after_the_other() -> None:
    logits, deltas, anchors, windows = random_input()
    proposals, valid = run(logits, deltas, anchors, windows, pre_nms_top_k=30, nms_threshold=0.4, num_proposals=8)
    for image in range(2):
        score = logits[image].softmax(dim=1)[:, 1]
        best = score.argsort(descending=True)[:30]
        boxes = decode_boxes(deltas[image, best], anchors[best], (0.1, 0.1, 0.2, 0.2))
        boxes = clip_boxes(boxes, windows[image])
        large = ((boxes[:, 2:] - boxes[:, :2]) >= 0.01).all(dim=1)
        boxes, best = boxes[large], best[large]
        keep = nms(boxes, score[best], 0.4)[:8]
        assert len(keep) == 8
        assert valid[image].all()
        torch.testing.assert_close(proposals[image], boxes[keep])


def test_top_k_comes_before_nms() -> None:
    # Three copies of the best box and another box: the copies use up the top 3.
    anchors = torch.tensor([[0.0, 0, 10, 10]] * 3 + [[30.0, 30, 40, 40]])
    scores = torch.tensor([[9.0, 8, 7, 6]])
    window = torch.tensor([[0, 0, 64, 64]])
    _, valid = run(logits_of(scores), torch.zeros(1, 4, 4), anchors, window, pre_nms_top_k=3)
    assert valid.sum() == 1
    _, valid = run(logits_of(scores), torch.zeros(1, 4, 4), anchors, window, pre_nms_top_k=4)
    assert valid.sum() == 2


def test_slivers_suppress_nothing_and_take_no_place() -> None:
    # The first sliver has IoU 0.75 with the box behind it; the limit of 2 is for real ones.
    anchors = torch.tensor([[0.0, 0, 10, 0.9], [0, 0, 10, 1.2], [20, 20, 30, 30], [40, 40, 40.5, 60]])
    scores = torch.tensor([[9.0, 8, 7, 10]])
    window = torch.tensor([[0, 0, 64, 64]])
    proposals, valid = run(logits_of(scores), torch.zeros(1, 4, 4), anchors, window, num_proposals=2, min_size=1.0)
    torch.testing.assert_close(proposals, anchors[None, 1:3])
    assert valid.all()
    proposals, valid = run(logits_of(scores), torch.zeros(1, 4, 4), anchors, window, num_proposals=4, min_size=1.0)
    torch.testing.assert_close(valid, torch.tensor([[True, True, False, False]]))
    torch.testing.assert_close(proposals[0, 2:], torch.zeros(2, 4))


def test_alone_equals_batched_and_order_does_not_matter() -> None:
    logits, deltas, anchors, windows = random_input(3)
    proposals, valid = run(logits, deltas, anchors, windows)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(
        run(logits[order], deltas[order], anchors, windows[order]), (proposals[order], valid[order])
    )
    for i in range(3):
        alone = run(logits[i : i + 1], deltas[i : i + 1], anchors, windows[i : i + 1])
        torch.testing.assert_close(alone, (proposals[i : i + 1], valid[i : i + 1]))


def test_no_proposals_at_all() -> None:
    anchors = torch.tensor([[70.0, 0, 90, 20], [0, 80, 20, 90]])
    proposals, valid = run(torch.zeros(2, 2, 2), torch.zeros(2, 2, 4), anchors, torch.tensor([[0, 0, 64, 64]] * 2))
    torch.testing.assert_close(proposals, torch.zeros(2, 40, 4))
    assert not valid.any()


def test_no_gradient_flows_through() -> None:
    logits, deltas, anchors, windows = random_input()
    proposals, _ = run(logits.requires_grad_(), deltas.requires_grad_(), anchors, windows)
    assert not proposals.requires_grad
