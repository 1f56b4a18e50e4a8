import pytest
import torch

from model.mask_rcnn import MaskRCNN
from pipeline.ema import averaged_copy, ema_decay, update_average
from tests.pipeline.factories import thin_model


def test_decay_by_hand() -> None:
    assert ema_decay(0, 0.999) == pytest.approx(1 / 10)
    assert ema_decay(1, 0.999) == pytest.approx(2 / 11)
    assert ema_decay(90, 0.999) == pytest.approx(91 / 100)
    assert ema_decay(90, 0.9) == 0.9
    assert ema_decay(10**6, 0.999) == 0.999


def test_average_follows_the_formula() -> None:
    """The average of a sequence w0, w1, ... written out: a = d a + (1 - d) w, d = 0.1, 2/11, 0.2, 0.2."""
    torch.manual_seed(0)
    model = MaskRCNN(thin_model(), 3)
    averaged = averaged_copy(model)
    expected = {name: value.double().clone() for name, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    for updates, d in enumerate((1 / 10, 2 / 11, 0.2, 0.2)):
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.add_(torch.randn(value.shape, generator=generator))
            else:
                value.add_(1)
        update_average(averaged, model, updates, decay=0.2)
        for name, value in model.state_dict().items():
            expected[name] = d * expected[name] + (1 - d) * value if value.is_floating_point() else value.double()
    for name, value in averaged.state_dict().items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6, msg=name)
    assert any("num_batches_tracked" in name for name in expected)
    assert not torch.equal(averaged.rpn.box_deltas.weight, model.rpn.box_deltas.weight)


def test_the_copy_is_apart_and_does_not_learn() -> None:
    model = MaskRCNN(thin_model(), 3)
    averaged = averaged_copy(model)
    assert not any(parameter.requires_grad for parameter in averaged.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        model.rpn.box_deltas.weight.add_(1.0)
    assert not torch.equal(averaged.rpn.box_deltas.weight, model.rpn.box_deltas.weight)
