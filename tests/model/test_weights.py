"""Weights of a file fitted to a model: parts, classes, norms, what is said; nothing is loaded partly."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import FrozenBatchNorm2d

from model.config import BackboneConfig, FpnConfig, ModelConfig, NormConfig
from model.mask_rcnn import MaskRCNN
from model.source_weights import SourceTensor, SourceWeights, WeightsError
from model.weights import COUNTER, NUMBERS_PER_CLASS, fit_weights, import_weights, read_weights
from tests.model.factories import tiny_config

NAMES = ("cat", "dog", "owl")
CLASS_LAYERS = ("box_head.class_logits", "box_head.box_deltas", "mask_head.mask_logits")


def random_model(config: ModelConfig | None = None, num_classes: int = 4, seed: int = 0) -> MaskRCNN:
    """A model in which no two numbers are the same, statistics of norms included."""
    with torch.device("meta"):  # without the time that initial values take
        model = MaskRCNN(config or tiny_config(), num_classes)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if name.endswith(COUNTER):
            tensor.zero_()
        else:
            tensor.uniform_(0.5, 1.5, generator=generator)
    return model


def source_of(model: MaskRCNN, **more: Any) -> SourceWeights:
    tensors = {name: SourceTensor(f"their.{name}", tensor) for name, tensor in model.state_dict().items()}
    return SourceWeights("file", tensors, **more)


def without(weights: SourceWeights, unwanted: Callable[[str], bool]) -> SourceWeights:
    return replace(weights, tensors={name: tensor for name, tensor in weights.tensors.items() if not unwanted(name)})


def class_rows(state: dict[str, Tensor], index: int) -> list[Tensor]:
    """All numbers of one class."""
    rows = []
    for layer in CLASS_LAYERS:
        numbers = 4 if layer == "box_head.box_deltas" else 1
        for kind in ("weight", "bias"):
            rows.append(state[f"{layer}.{kind}"][numbers * index : numbers * (index + 1)])
    return rows


def assert_same_rows(ours: dict[str, Tensor], index: int, theirs: dict[str, Tensor], their_index: int) -> None:
    for a, b in zip(class_rows(ours, index), class_rows(theirs, their_index), strict=True):
        assert len(a) in (1, 4)
        assert torch.equal(a, b)


def test_all_of_it_is_loaded_into_the_same_architecture() -> None:
    theirs, ours = random_model(seed=1), random_model(seed=2)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    state, report = fit_weights(source_of(theirs), ours, NAMES)
    assert state.keys() == before.keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(state[name], tensor), name
        assert torch.equal(ours.state_dict()[name], before[name]), "the model stays as it is"
    assert sum(report.loaded.values()) == len([name for name in state if not name.endswith(COUNTER)])
    assert report.initial_parts == ()
    state["box_head.class_logits.bias"].zero_()
    assert theirs.state_dict()["box_head.class_logits.bias"].all(), "nothing is shared with the source"


@pytest.mark.parametrize("part", ["fpn", "rpn", "box_head", "mask_head"])
def test_a_part_that_the_file_does_not_have_keeps_its_initial_values(part: str) -> None:
    theirs, ours = random_model(seed=1), random_model(seed=2)
    state, report = fit_weights(without(source_of(theirs), lambda name: name.startswith(part)), ours, NAMES)
    assert report.initial_parts == (part,)
    assert report.loaded[part] == 0
    assert f"weights: not in the file, at initial values: {part}" in report.lines()
    for name, tensor in state.items():
        expected = ours if name.startswith(part) else theirs
        assert torch.equal(tensor, expected.state_dict()[name]), name


def test_a_backbone_alone() -> None:
    theirs, ours = random_model(seed=1), random_model(seed=2)
    weights = without(source_of(theirs), lambda name: not name.startswith("backbone."))
    _, report = fit_weights(weights, ours, NAMES)
    assert report.initial_parts == ("fpn", "rpn", "box_head", "mask_head")
    assert (report.class_rule, report.classes_loaded, report.classes_initial) == ("", (), ())


def refusal(weights: SourceWeights, config: ModelConfig | None = None) -> str:
    model = random_model(config, seed=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        fit_weights(weights, model, NAMES)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_backbone_is_refused() -> None:
    message = refusal(without(source_of(random_model()), lambda name: name.startswith("backbone.")))
    assert message.startswith("file: has no ResNet as its backbone (it holds their.fpn.laterals.0.weight, ")


@pytest.mark.parametrize(
    ("missing", "key"),
    [
        ("fpn.smoothing.2.bias", "model.fpn.norm"),
        ("rpn.shared.0.weight", "model.rpn.num_convolutions"),
        ("box_head.convolutions.1.weight", "model.box_head.kind"),
        ("box_head.norms.0.bias", "model.box_head.norm"),
        ("mask_head.convolutions.1.weight", "model.mask_head.num_convolutions"),
    ],
)
def test_half_a_part_is_another_architecture(missing: str, key: str) -> None:
    message = refusal(without(source_of(random_model()), lambda name: name == missing))
    assert f"of another architecture, or not whole: nothing in it is the configured model's {missing}" in message
    assert f"; see {key}" in message


def test_a_layer_of_a_known_backbone_is_missing() -> None:
    message = refusal(without(source_of(random_model()), lambda name: name.startswith("backbone.stages.1.0.down")))
    assert message == (
        "file: not whole: it lacks what would be the model's backbone.stages.1.0.downsample.0.weight, "
        "backbone.stages.1.0.downsample.1.weight, backbone.stages.1.0.downsample.1.bias and 2 more; save the model anew"
    )


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"norms": NormConfig(convolution_bias=True)}, ", or not whole: nothing in it is the configured model's "
         "backbone.stem.0.bias, backbone.stages.0.0.conv1.bias, backbone.stages.0.0.conv2.bias and 21 more; "
         "see model.norms.convolution_bias"),
        ({"backbone": BackboneConfig(depth=18, norm="group")}, ": their.backbone.stem.1.running_mean has no place in "
         "the configured model; see model.backbone.norm"),
        ({"fpn": FpnConfig(channels=16, norm="batch")}, ": their.fpn.laterals.0.weight has no place in the configured "
         "model; see model.fpn.norm"),
    ],
)  # fmt: skip
def test_another_architecture_names_the_key(changes: dict[str, Any], found: str) -> None:
    message = refusal(replace(source_of(random_model()), preset="configs/x.yaml"), tiny_config(**changes))
    assert message == f"file: of another architecture{found} (configs/x.yaml fits)"


def test_another_depth_is_named_as_such() -> None:
    config = tiny_config()
    deeper = config.model_copy(update={"backbone": config.backbone.model_copy(update={"depth": 34})})
    message = refusal(source_of(random_model(deeper)))
    assert "its backbone is a ResNet-34, the configured one a ResNet-18; see model.backbone.depth" in message


def test_a_wrong_shape_names_the_layer_and_both_shapes() -> None:
    weights = source_of(random_model())
    wrong = SourceTensor("conv1/kernel:0", torch.zeros(64, 3, 5, 5), (3, 2, 0, 1))
    message = refusal(replace(weights, tensors={**weights.tensors, "backbone.stem.0.weight": wrong}))
    assert message == "file: conv1/kernel:0 has shape (5, 5, 3, 64), the configured model needs (7, 7, 3, 64)"


@pytest.mark.parametrize(
    ("tensor", "found"),
    [
        (torch.full((64,), -1.0), "holds variances below zero"),
        (torch.full((64,), 1e200, dtype=torch.float64), "holds numbers that are not finite"),  # in float32
        (torch.ones(64).to_sparse(), "is no plain tensor with its numbers; save them dense"),
        (torch.ones(64, device="meta"), "is no plain tensor with its numbers; save them dense"),
        (torch.ones(64, dtype=torch.int64), "holds torch.int64, no floating-point numbers"),
    ],
)
def test_numbers_that_no_norm_can_have_are_refused(tensor: Tensor, found: str) -> None:
    weights, name = source_of(random_model()), "backbone.stem.1.running_var"
    message = refusal(replace(weights, tensors={**weights.tensors, name: SourceTensor("bn1.running_var", tensor)}))
    assert message == f"file: bn1.running_var {found}"


def test_classes_without_a_row_are_refused() -> None:
    weights = source_of(random_model())
    empty = {
        name: replace(source, tensor=source.tensor[:0])
        for name, source in weights.tensors.items()
        if name.rpartition(".")[0] in NUMBERS_PER_CLASS
    }
    message = refusal(replace(weights, tensors={**weights.tensors, **empty}))
    assert message == "file: its layers for classes have no row, not even for background"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(value: float) -> None:
    model = random_model()
    model.state_dict()["rpn.class_logits.bias"][0] = value
    assert refusal(source_of(model)) == "file: their.rpn.class_logits.bias holds numbers that are not finite"


def test_class_layers_that_disagree_are_refused() -> None:
    weights = source_of(random_model())
    masks = SourceTensor("masks", torch.zeros(3))
    message = refusal(replace(weights, tensors={**weights.tensors, "mask_head.mask_logits.bias": masks}))
    assert message == "file: masks has shape (3,), the configured model needs (4,)"


class TestClasses:
    def fit(
        self, theirs: Sequence[str] | None, ours: Sequence[str], num_theirs: int = 4, **more: Any
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], Any]:
        """The file's, the initial and the new state, and the report."""
        configured = more.pop("weights_classes", None)
        source = random_model(num_classes=num_theirs, seed=1)
        model = random_model(tiny_config(weights_classes=configured), len(ours) + 1, seed=2)
        names = tuple(theirs) if theirs is not None else None
        state, report = fit_weights(source_of(source, class_names=names, **more), model, ours)
        return source.state_dict(), model.state_dict(), state, report

    def test_the_same_name_keeps_its_rows(self) -> None:
        source, initial, state, report = self.fit(NAMES, ("fox", "owl", "cat", "ant", "bee"))
        for ours, theirs in ((0, 0), (2, 3), (3, 1)):
            assert_same_rows(state, ours, source, theirs)
        for ours in (1, 4, 5):
            assert_same_rows(state, ours, initial, ours)
        assert report.classes_loaded == ("background", "owl", "cat")
        assert report.classes_initial == ("fox", "ant", "bee")
        assert "weights: rows from the file: background, owl, cat" in report.lines()
        assert "weights: rows at initial values: fox, ant, bee" in report.lines()
        assert any("by name" in line and "2 of 5" in line for line in report.lines())

    def test_all_else_is_loaded_with_another_number_of_classes(self) -> None:
        source, _, state, _ = self.fit(NAMES, ("fox",))
        for name, tensor in source.items():
            if name.rpartition(".")[0] not in CLASS_LAYERS:
                assert torch.equal(state[name], tensor), name

    def test_unused_ids_never_match(self) -> None:
        source, initial, state, report = self.fit(("N/A", "dog", "__background__"), ("N/A", "__background__", "dog"))
        assert report.classes_loaded == ("background", "dog")
        assert_same_rows(state, 1, initial, 1)
        assert_same_rows(state, 2, initial, 2)
        assert_same_rows(state, 3, source, 2)

    def test_a_name_of_two_rows_takes_the_first(self) -> None:
        source, _, state, _ = self.fit(("cat", "cat", "dog"), ("dog", "cat"))
        assert_same_rows(state, 2, source, 1)

    def test_unknown_names_of_the_same_number_are_taken_in_order(self) -> None:
        source, _, state, report = self.fit(None, NAMES)
        for index in range(4):
            assert_same_rows(state, index, source, index)
        assert "does not name its 3: taken in order" in report.class_rule

    def test_unknown_names_of_another_number_leave_initial_rows(self) -> None:
        source, initial, state, report = self.fit(None, ("cat", "dog"))
        assert_same_rows(state, 0, source, 0)
        for index in (1, 2):
            assert_same_rows(state, index, initial, index)
        assert (report.classes_loaded, report.classes_initial) == (("background",), ("cat", "dog"))
        assert "background alone" in report.class_rule

    def test_configured_names_are_for_files_without(self) -> None:
        source, _, state, report = self.fit(None, ("owl",), weights_classes=NAMES)
        assert_same_rows(state, 1, source, 3)
        assert "model.weights_classes" in report.class_rule

    def test_configured_names_go_before_guessed_ones(self) -> None:
        guessed: dict[str, Any] = {"class_names_guessed": True, "weights_classes": ("a", "b", "c")}
        _, _, _, report = self.fit(NAMES, ("b", "cat"), **guessed)
        assert report.classes_loaded == ("background", "b")

    def test_configured_names_do_not_go_before_known_ones(self) -> None:
        _, _, _, report = self.fit(NAMES, ("b", "cat"), weights_classes=("a", "b"))
        assert report.classes_loaded == ("background", "cat")

    def test_configured_names_have_to_be_as_many(self) -> None:
        with pytest.raises(
            WeightsError, match=r"has 3 classes beside background, but there are 2 names from model\.weights_classes"
        ):
            self.fit(None, NAMES, weights_classes=("a", "b"))

    def test_the_model_has_to_have_as_many_names(self) -> None:
        with pytest.raises(ValueError, match="2 class names for a model of 3 classes"):
            fit_weights(source_of(random_model()), random_model(), ("a", "b"))


def test_another_epsilon_of_frozen_norms_gives_the_same_numbers() -> None:
    config = tiny_config()
    theirs, ours = random_model(config, seed=1).eval(), random_model(config, seed=2).eval()
    for module in theirs.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.eps = 0.0
    theirs.state_dict()["backbone.stem.1.running_var"].mul_(1e-4)  # where epsilon matters
    state, report = fit_weights(source_of(theirs, norm_epsilon=0.0), ours, NAMES)
    weight, variance = (theirs.state_dict()[f"backbone.stem.1.{name}"] for name in ("weight", "running_var"))
    torch.testing.assert_close(state["backbone.stem.1.weight"], weight * ((variance + 1e-5) / variance).sqrt())
    ours.load_state_dict(state)
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for a, b in zip(ours.backbone(images), theirs.backbone(images), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert any("epsilon 0: the weights of 20 norms were rescaled to 1e-05" in line for line in report.lines())


@pytest.mark.parametrize(("theirs", "ours"), [("batch", "frozen"), ("frozen", "batch")])
def test_frozen_and_batch_norms_take_each_other_s_numbers(theirs: Any, ours: Any) -> None:
    source = random_model(tiny_config(backbone_norm=theirs), seed=1)
    model = random_model(tiny_config(backbone_norm=ours), seed=2)
    state, _ = fit_weights(source_of(source), model, NAMES)
    model.load_state_dict(state)
    for name, tensor in state.items():
        expected = source.state_dict().get(name, torch.tensor(0))
        assert torch.equal(tensor, expected), name


def test_knobs_that_change_numbers_alone_are_noted() -> None:
    knobs = {"norms.epsilon": 1e-3, "backbone.variant": "torchvision"}
    _, report = fit_weights(source_of(random_model(), knobs=knobs, preset="configs/x.yaml"), random_model(), NAMES)
    assert report.lines()[-1] == (
        "weights: the model computes otherwise than the one these weights were trained in: model.norms.epsilon 1e-05 "
        "(there 0.001); configs/x.yaml has the values of the original"
    )


def test_long_lists_are_cut_unless_asked_for() -> None:
    skipped = {f"layer_{number}": "no layer of the model" for number in range(10)}
    _, report = fit_weights(source_of(random_model(), skipped=skipped), random_model(), NAMES)
    short = "layer_0, layer_1, layer_2, layer_3, layer_4, layer_5, layer_6, layer_7"
    assert f"weights: skipped, no layer of the model: {short} and 2 more" in report.lines()
    assert f"weights: skipped, no layer of the model: {short}, layer_8, layer_9" in report.lines(most_names=None)


@pytest.mark.parametrize("source", ["weights.h5", "keras:weights.h5", ""])
def test_a_source_of_another_kind_is_refused(source: str) -> None:
    with pytest.raises(WeightsError, match=r"neither matterport:FILE\.h5 nor torchvision:FILE nor torchvision:NAME"):
        read_weights(source, tiny_config())


def test_what_cannot_be_read_leaves_the_model_as_it_is() -> None:
    model = random_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(WeightsError, match="no such file"):
        import_weights("matterport:nowhere.h5", model, NAMES)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
