import dataclasses

import numpy as np

from pipeline.copy_paste import copy_paste, draw_mask, planned_partner
from pipeline.jitter import scale_and_crop
from pipeline.sample import Sample
from tests.pipeline.factories import Bitmap, bitmap_of, ellipse_polygon, noise, pack_sample
from tests.pipeline.test_augment import assert_same
from tests.pipeline.test_jitter import drawn, tight


def block(height: int, width: int, top: int, left: int, bottom: int, right: int) -> Bitmap:
    bitmap = np.zeros((height, width), dtype=bool)
    bitmap[top:bottom, left:right] = True
    return bitmap


def test_occlusion_by_hand() -> None:
    """Three objects: one is covered whole, one in part, one not at all; of the partner's two one is chosen."""
    below = [block(6, 8, 1, 1, 3, 3), block(6, 8, 0, 2, 4, 6), block(6, 8, 5, 0, 6, 8)]
    above = [block(6, 8, 1, 1, 3, 4), block(6, 8, 0, 0, 6, 8)]
    sample, partner = pack_sample(noise(6, 8, 1), below), pack_sample(noise(6, 8, 2), above)
    found = copy_paste(sample, partner, np.array([True, False]))
    assert found.classes.tolist() == [2, 3, 1]
    assert found.boxes.tolist() == [[2, 0, 6, 4], [0, 5, 8, 6], [1, 1, 4, 3]]
    expected = [below[1] & ~above[0], below[2], above[0]]
    for bitmap, mask in zip(drawn(found), expected, strict=True):
        np.testing.assert_array_equal(bitmap, mask)
    np.testing.assert_array_equal(found.image, np.where(above[0][..., None], partner.image, sample.image))
    np.testing.assert_array_equal(sample.image, noise(6, 8, 1))  # left alone


def test_the_box_of_what_is_covered_shrinks() -> None:
    sample = pack_sample(noise(6, 8), [block(6, 8, 0, 0, 4, 8)])
    partner = pack_sample(noise(6, 8), [block(6, 8, 0, 5, 6, 8)])
    assert copy_paste(sample, partner, np.array([True])).boxes.tolist() == [[0, 0, 5, 4], [5, 0, 8, 6]]


def test_an_object_smaller_than_a_pixel_is_covered_too() -> None:
    """It has the centre of no pixel, so no pixel of its mask could be covered."""
    speck = pack_sample(noise(8, 8), [block(8, 8, 0, 0, 2, 2)])
    box = np.array([[2.6, 2.6, 3.4, 3.4]])
    speck = dataclasses.replace(speck, boxes=box.astype(np.float32), mask_boxes=box.astype(np.float32))
    assert not draw_mask(speck, 0)[1].any()
    for right, number in ((8, 1), (3, 2)):  # all four pixels that it touches, or two of them
        over = pack_sample(noise(8, 8), [block(8, 8, 0, 0, 8, right)])
        pasted = copy_paste(speck, over, np.array([True]))
        assert len(pasted.classes) == number


def random_sample(seed: int, height: int, width: int, scale: float) -> Sample:
    rng = np.random.default_rng(seed)
    bitmaps = [bitmap_of([ellipse_polygon(rng, height, width)], height, width) for _ in range(5)]
    return scale_and_crop(pack_sample(noise(height, width, seed), bitmaps), scale, (1000, 1000), (0, 0))


def test_every_pixel_belongs_to_what_is_seen_there() -> None:
    """Masks of other resolutions than the image's, partner smaller and larger than the sample."""
    for seed in range(10):
        sample = random_sample(seed, 48, 64, 1.3)
        partner = random_sample(100 + seed, 40, 50, 0.7 + 0.2 * seed)
        chosen = np.random.default_rng(seed).random(5) < 0.6
        found = copy_paste(sample, partner, chosen)
        height, width = sample.image.shape[:2]
        cover = np.zeros((height, width), dtype=bool)
        pasted = []
        for bitmap in np.array(drawn(partner))[chosen]:
            part = np.zeros((height, width), dtype=bool)
            part[: bitmap.shape[0], : bitmap.shape[1]] = bitmap[:height, :width]
            cover |= part
            pasted.append(part)
        expected = [mask & ~cover for mask in drawn(sample)] + pasted
        expected = [mask for mask in expected if mask.any()]
        assert len(found.classes) == len(expected)
        for index, (bitmap, mask) in enumerate(zip(drawn(found), expected, strict=True)):
            np.testing.assert_array_equal(bitmap, mask)
            assert np.abs(found.boxes[index] - tight(mask)).max() <= 1.2  # a cell of 1.3 pixels may end between
        assert (found.image[~cover] == sample.image[~cover]).all()


def test_nothing_chosen_is_nothing_changed() -> None:
    sample, partner = random_sample(0, 48, 64, 1.0), random_sample(1, 48, 64, 1.0)
    assert_same(copy_paste(sample, partner, np.zeros(5, dtype=bool)), sample)
    empty = pack_sample(noise(48, 64), [])
    assert_same(copy_paste(sample, empty, np.zeros(0, dtype=bool)), sample)
    onto_empty = copy_paste(empty, partner, np.ones(5, dtype=bool))
    assert onto_empty.classes.tolist() == [1, 2, 3, 4, 5]


def test_crowds_are_not_pasted_but_covered() -> None:
    crowd = pack_sample(noise(6, 8), [block(6, 8, 0, 0, 6, 8)], is_crowd=True)
    objects = pack_sample(noise(6, 8), [block(6, 8, 0, 0, 3, 8)])
    assert_same(copy_paste(objects, crowd, np.array([True])), objects)
    found = copy_paste(crowd, objects, np.array([True]))
    assert found.is_crowd.tolist() == [True, False]
    assert found.boxes.tolist() == [[0, 3, 8, 6], [0, 0, 8, 3]]


def test_partners_are_a_function_of_seed_epoch_and_row() -> None:
    places = [(seed, epoch, row) for seed in range(2) for epoch in range(5) for row in range(200)]
    partners = [planned_partner(*place, num_rows=50, share=0.3) for place in places]
    assert partners == [planned_partner(*place, num_rows=50, share=0.3) for place in places]
    chosen = [partner for partner in partners if partner is not None]
    assert abs(len(chosen) / len(places) - 0.3) < 0.05  # five standard deviations
    assert set(chosen) == set(range(50))
    epochs = [tuple(partners[first : first + 200]) for first in range(0, len(places), 200)]
    assert len(set(epochs)) == len(epochs) == 10
    assert {planned_partner(*place, num_rows=50, share=0.0) for place in places} == {None}
