"""The model on a GPU: what a CPU gives, without waits inside a step, and as a CUDA graph. Skipped without a GPU."""

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from model.config import LossConfig, MaskHeadConfig, ModelConfig, NormKind, RpnConfig
from model.mask_rcnn import MaskRCNN
from model.nms import kept_by_batched_nms
from model.structures import Batch
from pipeline.cuda_graph import EAGER_STEPS, GraphedGradients
from pipeline.training import accumulate_gradients
from tests.model.factories import Thing, ellipse, make_batch, painted_scene, rectangle, tiny_config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="the CUDA path runs on a GPU alone")
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    """No TF32, which would hide differences."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def batch_of_two(key: int = 3) -> Batch:
    return make_batch(
        [
            painted_scene(
                [Thing(rectangle((4, 6, 30, 40), 64, 64), 1), Thing(ellipse((34, 20, 62, 60), 64, 64), 2)], key=key
            ),
            painted_scene([Thing(ellipse((2, 4, 40, 44), 48, 56), 2)], height=48, width=56, key=key + 1),
        ]
    )


def on_both(config: ModelConfig) -> tuple[MaskRCNN, MaskRCNN]:
    torch.manual_seed(0)
    one, other = MaskRCNN(config, 3), MaskRCNN(config, 3)
    other.load_state_dict(one.state_dict())
    return one, other.to(device=CUDA, memory_format=torch.channels_last)  # type: ignore[call-overload]


def gradients(model: MaskRCNN) -> dict[str, Tensor]:
    return {name: parameter.grad.cpu() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_close_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        difference = float((found[name] - gradient).norm())
        assert difference <= tolerance * max(float(gradient.norm()), 1e-3), f"{name}: {difference}"


@pytest.mark.parametrize("per_level", [False, True])
@pytest.mark.parametrize("head_norm", ["none", "batch", "group"])
def test_losses_and_gradients_equal_those_of_a_cpu(head_norm: NormKind, per_level: bool) -> None:
    config = tiny_config(head_norm=head_norm)
    config = config.model_copy(update={"rpn": RpnConfig(**(config.rpn.model_dump() | {"per_level": per_level}))})
    on_cpu, on_gpu = on_both(config)
    batch = batch_of_two()
    expected = accumulate_gradients(on_cpu.train(), [batch], LossConfig(), None)
    values = accumulate_gradients(on_gpu.train(), [batch.to(CUDA)], LossConfig(), None)
    torch.testing.assert_close(values.cpu(), expected, rtol=1e-3, atol=1e-4)
    assert_close_gradients(gradients(on_gpu), gradients(on_cpu), 2e-2)


@pytest.mark.parametrize("targets", ["soft", "crop_and_resize"])
def test_other_mask_targets_equal_those_of_a_cpu(targets: str) -> None:
    config = tiny_config(head_norm="none")
    mask_head = MaskHeadConfig.model_validate(config.mask_head.model_dump() | {"targets": targets})
    on_cpu, on_gpu = on_both(config.model_copy(update={"mask_head": mask_head}))
    batch = batch_of_two()
    expected = accumulate_gradients(on_cpu.train(), [batch], LossConfig(), None)
    values = accumulate_gradients(on_gpu.train(), [batch.to(CUDA)], LossConfig(), None)
    torch.testing.assert_close(values.cpu(), expected, rtol=1e-3, atol=1e-4)


def test_detections_equal_those_of_a_cpu() -> None:
    on_cpu, on_gpu = on_both(tiny_config(head_norm="none"))
    batch = batch_of_two()
    expected = on_cpu.eval().detect(batch.images, batch.image_sizes)
    found = on_gpu.eval().detect(batch.images.to(CUDA), batch.image_sizes.to(CUDA))
    for one, other in zip(found, expected, strict=True):
        assert len(other) > 0
        torch.testing.assert_close(one.scores.cpu(), other.scores, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(one.boxes.cpu(), other.boxes, rtol=1e-3, atol=1e-2)
        torch.testing.assert_close(one.mask_probabilities.cpu(), other.mask_probabilities, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("number", [1, 64, 2000])
def test_nms_of_many_groups_keeps_what_the_operator_keeps(number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    sizes = [number, max(1, number // 3)]
    corner = torch.rand(2, sum(sizes), 2, generator=generator) * 300
    boxes = torch.cat([corner, corner + 20 + torch.rand(2, sum(sizes), 2, generator=generator) * 60], dim=2)
    boxes[:, ::9] = 0
    scores = torch.cat([torch.arange(size, 0, -1.0) for size in sizes]).expand(2, -1)
    expected = kept_by_batched_nms(boxes, scores, sizes, 0.5)
    kept = kept_by_batched_nms(boxes.to(CUDA), scores.to(CUDA), sizes, 0.5)
    assert int((kept.cpu() != expected).sum()) <= number // 500  # an IoU may lie within rounding of the threshold


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_nothing_in_a_step_waits_for_the_device(dtype: torch.dtype | None) -> None:
    _, model = on_both(tiny_config(head_norm="batch"))
    batch = batch_of_two().to(CUDA)
    optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-3, momentum=0.9, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        accumulate_gradients(model, [batch], LossConfig(), dtype)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [f"{w.filename}:{w.lineno}" for w in caught if "synchronizing CUDA operation" in str(w.message)]
    assert not waits, "\n".join(waits)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_graph_gives_the_gradients_of_the_steps_it_replaces(dtype: torch.dtype | None) -> None:
    _, model = on_both(tiny_config(head_norm="none"))
    graphed = GraphedGradients(model.train(), LossConfig(), dtype)
    for key in range(EAGER_STEPS + 3):
        batch = batch_of_two(key)
        model.zero_grad(set_to_none=True)
        expected_values = accumulate_gradients(model, [batch.to(CUDA)], LossConfig(), dtype)
        expected = gradients(model)
        values = graphed(batch.pin_memory())
        torch.testing.assert_close(values, expected_values, rtol=1e-2, atol=1e-3)
        assert_close_gradients(gradients(model), expected, 2e-2 if dtype is None else 1e-1)
    assert len(graphed.captured) == 1
