from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_iou

from model.config import BoxHeadConfig, DetectionConfig, ModelConfig
from model.postprocess import final_scores, select_detections, to_original
from model.structures import Detections

WINDOW = torch.tensor([0, 0, 80, 60])


def logits_for(probabilities: list[list[float]]) -> Tensor:
    return torch.tensor(probabilities).log()


def select(logits: Tensor, deltas: Tensor, proposals: Tensor, **config: Any) -> tuple[Tensor, Tensor, Tensor]:
    return select_detections(logits, deltas, proposals, WINDOW, BoxHeadConfig(), DetectionConfig(**config))


def test_by_hand() -> None:
    logits = logits_for([[0.1, 0.6, 0.3], [0.2, 0.7, 0.1], [0.96, 0.01, 0.03]])
    deltas = torch.zeros(3, 3, 4)
    deltas[0, 2] = torch.tensor([10.0, 0, 0, 0])  # class 2 of the first region: one width to the right
    proposals = torch.tensor([[0.0, 0, 20, 20], [30, 30, 50, 70], [5, 5, 9, 9]])
    boxes, scores, classes = select(logits, deltas, proposals)
    torch.testing.assert_close(scores, torch.tensor([0.7, 0.6, 0.3, 0.1]))
    assert classes.tolist() == [1, 1, 2, 2]
    # The second region is clipped to the 60 rows of the image; the third has no class above 0.05.
    expected = torch.tensor([[30.0, 30, 50, 60], [0, 0, 20, 20], [20, 0, 40, 20], [30, 30, 50, 60]])
    torch.testing.assert_close(boxes, expected, rtol=1e-5, atol=1e-4)


def test_nms_works_within_a_class() -> None:
    # IoU of the two regions is 0.9.
    proposals = torch.tensor([[0.0, 0, 20, 20], [0, 0, 20, 18]])
    same = logits_for([[0.1, 0.5, 0.4], [0.1, 0.6, 0.3]])
    boxes, scores, classes = select(same, torch.zeros(2, 3, 4), proposals)
    # Class 1 keeps the second region, class 2 the first.
    torch.testing.assert_close(scores, torch.tensor([0.6, 0.4]))
    assert classes.tolist() == [1, 2]
    torch.testing.assert_close(boxes, proposals[[1, 0]])
    _, scores, _ = select(same, torch.zeros(2, 3, 4), proposals, nms_threshold=0.95)
    torch.testing.assert_close(scores, torch.tensor([0.6, 0.5, 0.4, 0.3]))


def test_a_mask_in_doubt_takes_score_away_by_hand() -> None:
    masks = torch.tensor([[[0.9, 0.7], [0.1, 0.0]], [[0.5, 0.4], [0.4, 0.4]], [[0.2, 0.4], [0.3, 0.0]]])
    scores, config = torch.tensor([0.5, 0.9, 1.0]), DetectionConfig(score="class_times_mask")
    # Cells of a half or more count: (0.9 + 0.7) / 2 and 0.5; the last mask has none, so its largest, 0.4.
    torch.testing.assert_close(final_scores(scores, masks, config), torch.tensor([0.4, 0.45, 0.4]))
    assert final_scores(scores, masks, DetectionConfig()) is scores
    assert final_scores(torch.zeros(0), torch.zeros(0, 2, 2), config).shape == (0,)


def random_head_output(num: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(num, 2, generator=generator) * 40
    proposals = torch.cat([corner, corner + 5 + torch.rand(num, 2, generator=generator) * 30], dim=1)
    return torch.randn(num, 4, generator=generator), torch.randn(num, 4, 4, generator=generator), proposals


def test_laws_of_the_result() -> None:
    boxes, scores, classes = select(*random_head_output(), max_per_image=15)
    assert len(scores) == 15
    assert (scores[:-1] >= scores[1:]).all()
    assert ((classes >= 1) & (classes <= 3)).all()
    assert (boxes >= 0).all()
    assert (boxes[:, 2] <= 80).all()
    assert (boxes[:, 3] <= 60).all()
    iou = torch.triu(box_iou(boxes, boxes), diagonal=1)
    assert not ((iou > 0.5) & (classes[:, None] == classes)).any()
    everything = select(*random_head_output(), max_per_image=1000)
    torch.testing.assert_close((boxes, scores, classes), tuple(x[:15] for x in everything))


def test_order_of_the_regions_does_not_matter() -> None:
    logits, deltas, proposals = random_head_output()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        select(logits[order], deltas[order], proposals[order]), select(logits, deltas, proposals)
    )


def test_score_threshold() -> None:
    output = random_head_output()
    _, scores, _ = select(*output, score_threshold=0.4, max_per_image=1000)
    everything = select(*output, score_threshold=0.0, max_per_image=1000, nms_threshold=1.0)[1]
    assert len(everything) == 120
    assert 0 < len(scores) < 120
    assert (scores > 0.4).all()


def test_small_detections_are_dropped() -> None:
    proposals = torch.tensor([[0.0, 0, 20, 3.9], [0, 20, 4, 24], [79, 0, 99, 20]])
    logits = logits_for([[0.1, 0.9]] * 3)
    boxes, _, _ = select(logits, torch.zeros(3, 2, 4), proposals, min_size=4.0)
    torch.testing.assert_close(boxes, proposals[1:2])


def test_best_class_only_by_hand() -> None:
    logits = logits_for([[0.1, 0.5, 0.4], [0.6, 0.3, 0.1], [0.25, 0.3, 0.45], [0.35, 0.3, 0.35]])
    proposals = torch.tensor([[0.0, 0, 20, 20], [30, 0, 50, 20], [0, 30, 20, 50], [30, 30, 50, 50]])
    knobs: dict[str, Any] = {"best_class_only": True, "score_threshold": 0.45}
    boxes, scores, classes = select(logits, torch.zeros(4, 3, 4), proposals, **knobs)
    # The second is background; of the others each is its best class, and the threshold itself counts.
    assert classes.tolist() == [1, 2]
    torch.testing.assert_close(scores, torch.tensor([0.5, 0.45]))
    torch.testing.assert_close(boxes, proposals[[0, 2]])
    knobs["score_threshold"] = 0.0
    assert select(logits, torch.zeros(4, 3, 4), proposals, **knobs)[2].tolist() == [1, 2]
    assert len(select(logits, torch.zeros(4, 3, 4), proposals, score_threshold=0.0)[2]) == 8


def test_windows_in_the_middle_of_the_canvas() -> None:
    boxes, _, _ = select_detections(
        logits_for([[0.1, 0.9]]),
        torch.zeros(1, 2, 4),
        torch.tensor([[0.0, 5, 50, 70]]),
        torch.tensor([10, 20, 40, 50]),
        BoxHeadConfig(),
        DetectionConfig(),
    )
    torch.testing.assert_close(boxes, torch.tensor([[10.0, 20, 40, 50]]))


def test_nothing_found() -> None:
    nothing = (torch.zeros(0, 4), (0,), (0,))
    for logits, deltas, proposals in [
        (torch.zeros(0, 3), torch.zeros(0, 3, 4), torch.zeros(0, 4)),
        (logits_for([[0.98, 0.01, 0.01]]), torch.zeros(1, 3, 4), torch.tensor([[0.0, 0, 9, 9]])),
    ]:
        boxes, scores, classes = select(logits, deltas, proposals)
        assert (boxes.shape, scores.shape, classes.shape) == (nothing[0].shape, *nothing[1:])
        assert classes.dtype == torch.int64


class TestToOriginal:
    def detections(self, boxes: list[list[float]]) -> Detections:
        num = len(boxes)
        return Detections(
            torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            torch.linspace(1, 0.5, num),
            torch.arange(1, num + 1),
            torch.rand(num, 28, 28),
        )

    def test_by_hand(self) -> None:
        # 60 x 80 input pixels show an image of 120 x 240: factors 2 and 3.
        found = self.detections([[10, 20, 30, 40], [0, 0, 80, 60]])
        moved = to_original(found, (60, 80), (120, 240), ModelConfig())
        torch.testing.assert_close(moved.boxes, torch.tensor([[30.0, 40, 90, 80], [0, 0, 240, 120]]))
        torch.testing.assert_close(moved.scores, found.scores)
        torch.testing.assert_close(moved.classes, found.classes)
        torch.testing.assert_close(moved.mask_probabilities, found.mask_probabilities)

    def test_the_same_size_changes_nothing_and_clips(self) -> None:
        found = self.detections([[10, 20, 30, 40], [-3, 5, 90, 70]])
        moved = to_original(found, (60, 80), (60, 80), ModelConfig())
        torch.testing.assert_close(moved.boxes, torch.tensor([[10.0, 20, 30, 40], [0, 5, 80, 60]]))

    def test_no_detections(self) -> None:
        assert to_original(self.detections([]), (60, 80), (120, 240), ModelConfig()).boxes.shape == (0, 4)

    def test_whole_pixels_by_hand(self) -> None:
        config = ModelConfig(detections=DetectionConfig(whole_pixels=True))
        # Factors 1.5 and 2. The second is rounded to no width; the third leaves the image.
        found = self.detections([[10.2, 20.3, 30.4, 40.2], [10.1, 5, 10.2, 30], [-3, 50, 90, 70]])
        moved = to_original(found, (60, 80), (90, 160), config)
        torch.testing.assert_close(moved.boxes, torch.tensor([[20.0, 30, 61, 60], [0, 75, 160, 90]]))
        torch.testing.assert_close(moved.scores, found.scores[[0, 2]])
        torch.testing.assert_close(moved.classes, found.classes[[0, 2]])
        torch.testing.assert_close(moved.mask_probabilities, found.mask_probabilities[[0, 2]])
        assert len(to_original(self.detections([]), (60, 80), (90, 160), config)) == 0

    def test_the_last_pixel_inside_by_hand(self) -> None:
        # 61 x 81 input pixels show 121 x 241: counted from the first to the last pixel, 60 are 120 and 80 are 240.
        config = ModelConfig(boxes="inclusive")
        found = self.detections([[10, 20, 31, 41], [0, 0, 81, 61], [5, 5, 6, 6]])
        moved = to_original(found, (61, 81), (121, 241), config)
        expected = torch.tensor([[30.0, 40, 91, 81], [0, 0, 241, 121], [15, 10, 16, 11]])
        torch.testing.assert_close(moved.boxes, expected)
