from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig, RoiConfig, RpnConfig
from model.structures import Batch
from model.targets import RegionTargets, draw_samples, match_anchors, sample_anchors, sample_regions
from tests.model.factories import box_batch, fill_empty_slots, take_images

CONFIG = ModelConfig()
EMPTY = [0.0, 0, 0, 0]


def random_boxes(num: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(num, 2, generator=generator) * 180
    return torch.cat([corner, corner + 10 + torch.rand(num, 2, generator=generator) * 60], dim=1)


def three_images() -> Batch:
    """Two objects; an object and a crowd; nothing."""
    return box_batch(
        [
            [[10, 10, 60, 60], [100, 90, 160, 130], EMPTY],
            [[30, 20, 70, 80], [120, 120, 240, 240], EMPTY],
            [EMPTY, EMPTY, EMPTY],
        ],
        [[2, 1, 0], [3, 1, 0], [0, 0, 0]],
        [[False, False, False], [False, True, False], [False, False, False]],
        keys=[11, 12, 13],
    )


def proposals_of(batch: Batch, num: int = 80) -> Tensor:
    """Random boxes, among them shifted copies of the ground truth."""
    boxes = random_boxes(batch.num_images * num, 5).reshape(batch.num_images, num, 4)
    slots = batch.boxes.shape[1]
    for copy in range(4):
        boxes[:, copy * slots : (copy + 1) * slots] = batch.boxes + torch.tensor([2.0, 1, 4, -1]) * copy
    return boxes


def assert_same_regions(a: RegionTargets, b: RegionTargets) -> None:
    """Equal wherever a slot is filled."""
    torch.testing.assert_close(a.valid, b.valid)
    torch.testing.assert_close(a.boxes[a.valid], b.boxes[b.valid])
    torch.testing.assert_close(a.classes, b.classes)
    positive = a.classes > 0
    torch.testing.assert_close(a.matched_gt_index[positive], b.matched_gt_index[positive])
    assert a.num_positive_slots == b.num_positive_slots


@pytest.fixture(params=["image by image", "in the fixed slots of a GPU"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.targets._sizes_may_vary", lambda _: request.param == "image by image")


@pytest.mark.usefixtures("form")
class TestMatchAnchors:
    def test_by_hand(self) -> None:
        anchors = torch.tensor(
            [
                [0.0, 0, 10, 10],  # IoU 1: positive
                [0, 0, 10, 7],  # 0.7: positive, the threshold counts
                [0, 0, 10, 6.9],  # 0.69: neither
                [0, 0, 10, 3],  # 0.3: neither, the threshold counts
                [0, 0, 10, 2.9],  # 0.29: negative
                [50, 50, 60, 60],  # 0: negative
            ]
        )
        positive, negative, matched = match_anchors(anchors, box_batch([[[0, 0, 10, 10], EMPTY]], [[5, 0]]), CONFIG)
        assert positive.tolist() == [[True, True, False, False, False, False]]
        assert negative.tolist() == [[False, False, False, False, True, True]]
        assert matched[0, :5].tolist() == [0] * 5

    def test_the_anchors_that_fit_an_object_best_are_positive_below_the_threshold(self) -> None:
        # Both overlap by half (IoU 1/3), and the third by a tenth.
        anchors = torch.tensor([[0.0, 0, 10, 10], [10, 0, 20, 10], [14, 0, 34, 10]])
        positive, negative, _ = match_anchors(anchors, box_batch([[[5, 0, 15, 10]]], [[1]]), CONFIG)
        assert positive.tolist() == [[True, True, False]]
        assert negative.tolist() == [[False, False, True]]

    def test_the_best_for_an_object_counts_also_where_another_object_is_nearer(self) -> None:
        # Object 0 equals the anchor; object 1 has no other anchor, so the only one is best for both.
        batch = box_batch([[[0, 0, 10, 10], [0, 0, 10, 4]]], [[1, 2]])
        positive, _, matched = match_anchors(torch.tensor([[0.0, 0, 10, 10], [90, 90, 99, 99]]), batch, CONFIG)
        assert positive.tolist() == [[True, False]]
        assert matched[0, 0] == 0

    def test_an_object_that_overlaps_no_anchor_makes_none_positive(self) -> None:
        anchors = torch.tensor([[0.0, 0, 10, 10], [10, 0, 20, 10]])
        positive, negative, _ = match_anchors(anchors, box_batch([[[50, 50, 60, 60]]], [[1]]), CONFIG)
        assert not positive.any()
        assert negative.all()

    def test_a_crowd_makes_anchors_neither_positive_nor_negative(self) -> None:
        # A crowd of 100 x 100; small anchors inside of it have IoU area / 10,000.
        anchors = torch.tensor(
            [
                [0.0, 0, 100, 100],  # the crowd itself
                [0, 0, 50, 50],
                [0, 0, 5, 2],  # exactly 0.001: not a negative
                [0, 0, 3, 3],  # 0.0009: a negative
                [200, 200, 220, 220],
            ]
        )
        batch = box_batch([[[0, 0, 100, 100]]], [[1]], [[True]])
        positive, negative, _ = match_anchors(anchors, batch, CONFIG)
        assert not positive.any()
        assert negative.tolist() == [[False, False, False, True, True]]

    def test_an_object_inside_a_crowd_still_has_positives(self) -> None:
        batch = box_batch([[[0, 0, 100, 100], [20, 20, 40, 40]]], [[1, 1]], [[True, False]])
        positive, negative, matched = match_anchors(torch.tensor([[20.0, 20, 40, 40]]), batch, CONFIG)
        assert positive.all()
        assert not negative.any()
        assert matched[0, 0] == 1

    def test_no_objects_at_all(self) -> None:
        batch = box_batch([[EMPTY], [EMPTY]], [[0], [0]])
        positive, negative, _ = match_anchors(random_boxes(20, 0), batch, CONFIG)
        assert not positive.any()
        assert negative.all()

    def test_empty_slots_change_nothing(self) -> None:
        batch = three_images()
        anchors = torch.cat([random_boxes(60, 1), torch.tensor([[3.0, 5, 40, 50], [0, 0, 0, 0]])])
        positive, negative, matched = match_anchors(anchors, batch, CONFIG)
        for as_crowd in (False, True):
            filled = match_anchors(anchors, fill_empty_slots(batch, as_crowd), CONFIG)
            torch.testing.assert_close(filled[:2], (positive, negative))
            torch.testing.assert_close(filled[2][positive], matched[positive])

    def test_images_do_not_see_each_other(self) -> None:
        batch, anchors = three_images(), random_boxes(60, 1)
        positive, negative, _ = match_anchors(anchors, batch, CONFIG)
        assert positive.any(dim=1).tolist() == [True, True, False]
        for order in ([2, 0, 1], [0], [1], [2]):
            again = match_anchors(anchors, take_images(batch, order), CONFIG)
            torch.testing.assert_close(again[:2], (positive[order], negative[order]))


class TestDrawSamples:
    KEYS = torch.tensor([3, 4, 5])

    def test_rows_are_distinct_and_of_their_kind(self) -> None:
        generator = torch.Generator().manual_seed(0)
        positive = torch.rand(3, 50, generator=generator) < 0.4
        negative = ~positive & (torch.rand(3, 50, generator=generator) < 0.6)
        samples = draw_samples(positive, negative, self.KEYS, 1, 6, 12, 12)
        assert samples.num_positive_slots == 6
        assert samples.valid.sum(dim=1).tolist() == [12, 12, 12]
        for image in range(3):
            first, valid = samples.index[image, :6], samples.valid[image]
            assert positive[image, first[valid[:6]]].all()
            assert negative[image, samples.index[image, 6:][valid[6:]]].all()
            rows = samples.index[image, valid].tolist()
            assert len(set(rows)) == 12

    @pytest.mark.parametrize(
        ("positives", "negatives", "drawn_positives", "drawn_negatives"),
        [
            (20, 70, 4, 6),  # negatives fill up to 10 in all
            (2, 70, 2, 8),
            (0, 70, 0, 8),  # no more negatives than slots
            (20, 1, 4, 1),
            (20, 0, 4, 0),
            (0, 0, 0, 0),
        ],
    )
    def test_counts_by_hand(self, positives: int, negatives: int, drawn_positives: int, drawn_negatives: int) -> None:
        row = torch.arange(100)[None]
        positive, negative = row < positives, (row >= 100 - negatives)
        samples = draw_samples(positive, negative, torch.tensor([1]), 1, 4, 8, 10)
        assert samples.index.shape == samples.valid.shape == (1, 12)
        assert samples.valid[0, :4].sum() == drawn_positives
        assert samples.valid[0, 4:].sum() == drawn_negatives

    @pytest.mark.parametrize(
        ("positives", "negatives", "fraction", "drawn_negatives"),
        [
            (20, 70, 0.33, 8),  # 4 * 3.03 = 12.1: 12 in all
            (2, 70, 0.33, 4),  # 2 * 3.03 = 6.06
            (1, 70, 0.33, 2),
            (2, 70, 0.5, 2),
            (2, 1, 0.33, 1),
            (0, 70, 0.33, 0),  # no positives, no negatives
        ],
    )
    def test_a_fixed_ratio_by_hand(self, positives: int, negatives: int, fraction: float, drawn_negatives: int) -> None:
        row = torch.arange(100)[None]
        positive, negative = row < positives, (row >= 100 - negatives)
        samples = draw_samples(positive, negative, torch.tensor([1]), 1, 4, 8, 12, positive_fraction=fraction)
        assert samples.valid[0, :4].sum() == min(positives, 4)
        assert samples.valid[0, 4:].sum() == drawn_negatives
        assert negative[0, samples.index[0, 4:][samples.valid[0, 4:]]].all()

    def test_fewer_candidates_than_slots(self) -> None:
        samples = draw_samples(torch.tensor([[True, False]]), torch.tensor([[False, True]]), self.KEYS[:1], 1, 5, 9, 9)
        assert samples.num_positive_slots == 2
        assert samples.index[samples.valid].tolist() == [0, 1]

    def test_same_key_same_draw_alone_and_in_any_batch(self) -> None:
        generator = torch.Generator().manual_seed(0)
        positive = torch.rand(3, 50, generator=generator) < 0.4
        together = draw_samples(positive, ~positive, self.KEYS, 1, 6, 12, 12)
        for i in range(3):
            rows = slice(i, i + 1)
            alone = draw_samples(positive[rows], ~positive[rows], self.KEYS[rows], 1, 6, 12, 12)
            torch.testing.assert_close(alone.index, together.index[rows])
            torch.testing.assert_close(alone.valid, together.valid[rows])

    def test_another_key_or_salt_is_another_draw(self) -> None:
        positive = torch.ones(2, 50, dtype=torch.bool)
        a = draw_samples(positive, ~positive, torch.tensor([1, 2]), 1, 6, 6, 6)
        b = draw_samples(positive, ~positive, torch.tensor([1, 2]), 2, 6, 6, 6)
        assert set(a.index[0, :6].tolist()) != set(a.index[1, :6].tolist())
        assert set(a.index[0, :6].tolist()) != set(b.index[0, :6].tolist())

    def test_every_row_is_drawn_equally_often(self) -> None:
        keys = torch.arange(8000)
        positive = (torch.arange(20) % 2 == 0).expand(8000, 20)
        samples = draw_samples(positive, ~positive, keys, 1, 2, 3, 5)
        # 2 of 10 positives and 3 of 10 negatives; five standard deviations are 5 * sqrt(8000 * 0.2 * 0.8) = 179
        # and 5 * sqrt(8000 * 0.3 * 0.7) = 205.
        counts_positive = torch.bincount(samples.index[:, :2].flatten(), minlength=20)
        counts_negative = torch.bincount(samples.index[:, 2:].flatten(), minlength=20)
        torch.testing.assert_close(counts_positive[::2], torch.full((10,), 1600), rtol=0, atol=179)
        torch.testing.assert_close(counts_negative[1::2], torch.full((10,), 2400), rtol=0, atol=205)
        assert counts_positive[1::2].sum() == 0


class TestSampleAnchors:
    def test_half_of_the_anchors_at_most_are_positive(self) -> None:
        config = ModelConfig(rpn=RpnConfig(anchors_per_image=10))
        positive = torch.arange(60)[None] < 20
        samples = sample_anchors(positive, ~positive, box_batch([[EMPTY]], [[0]]), config)
        assert samples.num_positive_slots == 5
        assert samples.valid.sum() == 10
        assert positive[0, samples.index[samples.valid]].sum() == 5

    def test_negatives_fill_up(self) -> None:
        config = ModelConfig(rpn=RpnConfig(anchors_per_image=10))
        positive = torch.arange(60)[None] < 1
        samples = sample_anchors(positive, ~positive, box_batch([[EMPTY]], [[0]]), config)
        assert samples.valid.sum() == 10
        assert positive[0, samples.index[samples.valid]].sum() == 1


class TestSampleRegions:
    CONFIG = ModelConfig(roi=RoiConfig(rois_per_image=16))
    WITHOUT = ModelConfig(roi=RoiConfig(rois_per_image=16, add_ground_truth=False))

    def sample(self, batch: Batch, config: ModelConfig | None = None, proposals: Tensor | None = None) -> RegionTargets:
        proposals = proposals_of(batch) if proposals is None else proposals
        valid = torch.ones(proposals.shape[:2], dtype=torch.bool)
        return sample_regions(proposals, valid, batch, config or self.CONFIG)

    def test_by_hand(self) -> None:
        batch = box_batch([[[0, 0, 10, 10], [50, 50, 60, 60]]], [[4, 7]])
        proposals = torch.tensor(
            [
                [
                    [0.0, 0, 10, 5],  # IoU 0.5 with the first object: positive, the threshold counts
                    [0, 0, 10, 4.9],  # 0.49: negative
                    [50, 50, 60, 59],  # 0.9 with the second object
                    [90, 90, 99, 99],  # negative
                ]
            ]
        )
        targets = self.sample(batch, self.WITHOUT, proposals)
        found = {
            tuple(box): (class_id, gt)
            for box, class_id, gt, valid in zip(
                targets.boxes[0].tolist(),
                targets.classes[0].tolist(),
                targets.matched_gt_index[0].tolist(),
                targets.valid[0].tolist(),
                strict=True,
            )
            if valid
        }
        assert len(found) == 4
        assert found[(0, 0, 10, 5)] == (4, 0)
        assert found[(50, 50, 60, 59)] == (7, 1)
        assert found[(0, 0, 10, torch.tensor(4.9).item())][0] == 0
        assert found[(90, 90, 99, 99)][0] == 0

    def test_positives_come_first_and_are_a_quarter_at_most(self) -> None:
        batch = three_images()
        targets = self.sample(batch)
        assert targets.num_positive_slots == 4
        assert targets.boxes.shape == (3, 16, 4)
        assert targets.valid.all()
        assert (targets.classes[:, 4:] == 0).all()
        assert (targets.classes[:, :4] > 0).sum(dim=1).tolist() == [4, 4, 0]

    @pytest.mark.parametrize(
        ("positives", "negatives", "drawn_positives", "drawn_negatives"),
        [
            (9, 40, 4, 12),
            (3, 40, 3, 13),  # the free slots of positives go to negatives
            (1, 40, 1, 15),
            (0, 40, 0, 16),
            (2, 5, 2, 5),  # and stay empty where there are no more
            (9, 3, 4, 3),
        ],
    )
    def test_counts_by_hand(self, positives: int, negatives: int, drawn_positives: int, drawn_negatives: int) -> None:
        """As torchvision and detectron2 fill up their 512."""
        batch = box_batch([[[0, 0, 10, 10]]], [[4]])
        rows = torch.arange(positives + negatives, dtype=torch.float32)
        # The object itself, each time a hair smaller, and boxes far from it.
        near = torch.stack([0 * rows, 0 * rows, 10 - rows / 100, 10 + 0 * rows], dim=1)
        proposals = torch.where((rows < positives)[:, None], near, near + 50)[None]
        targets = self.sample(batch, self.WITHOUT, proposals)
        total = drawn_positives + drawn_negatives
        assert targets.classes[0].tolist() == [4] * drawn_positives + [0] * (targets.boxes.shape[1] - drawn_positives)
        assert targets.valid[0].tolist() == [True] * total + [False] * (targets.boxes.shape[1] - total)
        drawn = targets.boxes[0, :total]
        assert (drawn[:drawn_positives, 0] == 0).all()
        assert (drawn[drawn_positives:, 0] == 50).all()
        assert len({tuple(box) for box in drawn.tolist()}) == total

    def test_few_positives_change_nothing_of_what_is_drawn_beside_them(self) -> None:
        """The negatives of an image with all its positives stay, whatever an image of the batch lacks."""
        batch = three_images()
        alone = self.sample(take_images(batch, [0]), proposals=proposals_of(batch)[:1])
        together = self.sample(batch, proposals=proposals_of(batch))
        assert torch.equal(alone.boxes[0], together.boxes[0])

    def test_ground_truth_joins_where_there_are_no_proposals(self) -> None:
        batch = three_images()
        proposals, valid = torch.rand(3, 5, 4), torch.zeros(3, 5, dtype=torch.bool)
        targets = sample_regions(proposals, valid, batch, self.CONFIG)
        assert targets.valid.sum(dim=1).tolist() == [2, 1, 0]  # neither the crowd nor the empty slots
        assert sorted(targets.classes[0].tolist())[-2:] == [1, 2]
        assert targets.classes[1].max() == 3
        index = targets.matched_gt_index[targets.valid]
        torch.testing.assert_close(targets.boxes[targets.valid], batch.boxes[torch.tensor([0, 0, 1]), index])

    def test_ground_truth_stays_out_on_request(self) -> None:
        targets = sample_regions(torch.rand(3, 5, 4), torch.zeros(3, 5, dtype=torch.bool), three_images(), self.WITHOUT)
        assert not targets.valid.any()
        assert not targets.classes.any()

    def test_no_proposals_at_all(self) -> None:
        empty = torch.zeros(3, 0, 4), torch.zeros(3, 0, dtype=torch.bool)
        targets = sample_regions(*empty, three_images(), self.CONFIG)
        assert targets.valid.sum(dim=1).tolist() == [2, 1, 0]
        targets = sample_regions(*empty, three_images(), self.WITHOUT)
        assert targets.boxes.shape == (3, 0, 4)

    def test_invalid_proposals_are_never_drawn(self) -> None:
        batch = three_images()
        proposals = proposals_of(batch)
        valid = torch.arange(proposals.shape[1]).expand(3, -1) % 3 == 0
        targets = sample_regions(proposals, valid, batch, self.WITHOUT)
        allowed = {tuple(box) for box in proposals[valid].tolist()}
        drawn = [tuple(box) for box in targets.boxes[targets.valid].tolist()]
        assert len(drawn) > 20
        assert set(drawn) <= allowed

    def test_crowds_are_neither_positive_nor_negative(self) -> None:
        batch = box_batch([[[0, 0, 100, 100], [120, 0, 140, 20]]], [[1, 2]], [[True, False]])
        proposals = torch.tensor(
            [
                [
                    [0.0, 0, 100, 100],  # the crowd
                    [0, 0, 50, 50],  # 0.25 with the crowd
                    [0, 0, 5, 2],  # exactly 0.001
                    [0, 0, 3, 3],  # 0.0009: a negative
                    [120, 0, 140, 18],  # the object
                    [200, 200, 210, 210],  # a negative
                ]
            ]
        )
        targets = self.sample(batch, self.CONFIG, proposals)
        drawn = sorted(targets.boxes[targets.valid].tolist())
        # The ground truth box of the object is the fourth; that of the crowd does not join.
        assert drawn == [[0, 0, 3, 3], [120, 0, 140, 18], [120, 0, 140, 20], [200, 200, 210, 210]]
        assert sorted(targets.classes[targets.valid].tolist()) == [0, 0, 2, 2]

    def test_a_crowd_does_not_join_the_proposals(self) -> None:
        # Its box overlaps the object by 0.9, so it would be a positive.
        batch = box_batch([[[0, 0, 100, 100], [0, 0, 100, 90]]], [[1, 2]], [[True, False]])
        targets = sample_regions(torch.zeros(1, 4, 4), torch.zeros(1, 4, dtype=torch.bool), batch, self.CONFIG)
        assert targets.boxes[targets.valid].tolist() == [[0, 0, 100, 90]]

    def test_no_objects_gives_negatives_alone(self) -> None:
        batch = box_batch([[EMPTY], [EMPTY]], [[0], [0]])
        targets = self.sample(batch)
        assert not targets.classes.any()
        assert targets.valid.all()

    def test_a_fixed_ratio_leaves_an_image_without_objects_without_regions(self) -> None:
        config = ModelConfig(roi=RoiConfig(rois_per_image=16, positive_fraction=0.33, fixed_ratio=True))
        batch = three_images()
        targets = self.sample(batch, config)
        assert targets.num_positive_slots == 5
        assert (targets.classes > 0).sum(dim=1).tolist() == [5, 5, 0]
        assert targets.valid.sum(dim=1).tolist() == [15, 15, 0]  # 5 * 3.03
        one = take_images(batch, [1])
        proposals = torch.cat([one.boxes[:, :1], random_boxes(40, 9)[None] + 1000], dim=1)
        without = config.model_copy(update={"roi": config.roi.model_copy(update={"add_ground_truth": False})})
        targets = self.sample(one, without, proposals)
        assert targets.valid.sum() == 3
        assert targets.classes[targets.valid].tolist() == [3, 0, 0]

    def test_empty_slots_change_nothing(self) -> None:
        batch = three_images()
        proposals = proposals_of(batch)
        proposals[:, 30] = torch.tensor([3.0, 5, 40, 50])  # what garbage holds
        expected = self.sample(batch, self.CONFIG, proposals)
        for as_crowd in (False, True):
            assert_same_regions(self.sample(fill_empty_slots(batch, as_crowd), self.CONFIG, proposals), expected)

    def test_more_slots_change_nothing(self) -> None:
        batch = three_images()
        wider = replace(
            batch,
            boxes=torch.cat([batch.boxes, torch.zeros(3, 5, 4)], dim=1),
            classes=torch.cat([batch.classes, torch.zeros(3, 5, dtype=torch.int64)], dim=1),
            is_crowd=torch.cat([batch.is_crowd, torch.zeros(3, 5, dtype=torch.bool)], dim=1),
        )
        proposals = proposals_of(batch)
        assert_same_regions(self.sample(batch, self.CONFIG, proposals), self.sample(wider, self.CONFIG, proposals))

    def test_images_do_not_see_each_other(self) -> None:
        batch = three_images()
        proposals = proposals_of(batch)
        together = self.sample(batch, self.CONFIG, proposals)
        for order in ([2, 0, 1], [0], [1], [2]):
            expected = RegionTargets(
                together.boxes[order],
                together.valid[order],
                together.classes[order],
                together.matched_gt_index[order],
                together.num_positive_slots,
            )
            assert_same_regions(self.sample(take_images(batch, order), self.CONFIG, proposals[order]), expected)

    def test_regions_and_anchors_draw_apart(self) -> None:
        # The same candidates and keys: another salt, another draw.
        config = ModelConfig(
            rpn=RpnConfig(anchors_per_image=16, positive_fraction=0.25), roi=RoiConfig(rois_per_image=16)
        )
        batch = box_batch([[EMPTY]], [[0]], keys=[5])
        proposals = random_boxes(80, 0)[None]
        config = config.model_copy(update={"roi": RoiConfig(rois_per_image=16, add_ground_truth=False)})
        regions = self.sample(batch, config, proposals)
        anchors = sample_anchors(*match_anchors(proposals[0], batch, config)[:2], batch, config)
        best_anchors = {tuple(box) for box in proposals[0, anchors.index[anchors.valid]].tolist()}
        best_regions = {tuple(box) for box in regions.boxes[regions.valid].tolist()}
        assert len(best_anchors) == 16
        assert len(best_regions) == 16
        assert best_anchors != best_regions
