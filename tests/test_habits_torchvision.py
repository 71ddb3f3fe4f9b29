"""What users of torchvision do with a model, done with a rewired one."""

from __future__ import annotations

import functools
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, fx, nn
from torchvision.models import detection
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import misc

import rewire
from benchmarks.outcomes import AsOriginal
from rewire.rewriting import plan_of
from tests.exactness import assert_as_stored, assert_same_bits
from tests.networks import perceptron, rows
from tests.test_habits_timm import assert_close, assert_exact, stepping

NODES = {
    "resnet": {"layer1": "first", "layer2": "second"},
    "vit": {"encoder.layers.encoder_layer_1": "first", "encoder.ln": "second"},
}
X = {
    "resnet": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)),
    "vit": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)),
}


def made(name: str, **options: Any) -> Any:
    """A small random model in train mode, the same one each time."""
    torch.manual_seed(0)
    if name == "vit":
        return torchvision.models.VisionTransformer(16, 4, 3, 2, 16, 24, num_classes=4).train()
    block = torchvision.models.resnet.BasicBlock
    return torchvision.models.ResNet(block, [3, 1, 1, 3], num_classes=4, **options).train()


@functools.cache
def planned(name: str) -> rewire.Plan:
    return rewire.plan(made(name), X[name])


def rewired(name: str) -> Any:
    """A rewired model that has not run yet."""
    return rewire.make_reversible(made(name), plan=planned(name), check="raise")


def unless_declined(attempt: Callable[[], Any], why: str) -> Any:
    """What an attempt gives; None where it is declined for the right reason."""
    try:
        return attempt()
    except rewire.RewireError as error:
        message = str(error)
    assert why in message
    return None


# ---- feature extractors ------------------------------------------------------------------


@pytest.mark.parametrize("name", NODES)
def test_a_feature_extractor_rewired(name: str) -> None:
    """Right in both modes, or declined for a reason. Its train() and eval() compile it anew."""
    model, x = create_feature_extractor(made(name), NODES[name]), X[name].double()
    rewiring = functools.partial(rewire.make_reversible, model.double(), x, check="raise")
    rev = unless_declined(lambda: rewiring(coupling=AsOriginal()), "compile")
    for training in (False, True) if rev is not None else ():
        model.train(training)
        rev.train(training)
        assert list(rev(x)) == list(model(x)) == ["first", "second"]
        assert_close(rev, model, lambda m: m(x))
    if rev is not None:
        assert_exact(rewiring(), lambda m: m(x))


@pytest.mark.parametrize("name", NODES)
def test_a_feature_extractor_of_a_rewired_model(name: str) -> None:
    """Homes are leaves of its graph."""
    rev, x = rewired(name), X[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        extractor = create_feature_extractor(rev, NODES[name])
    expected: dict[str, Tensor] = {}
    for node, key in NODES[name].items():
        keep = functools.partial(expected.__setitem__, key)
        rev.get_submodule(node).register_forward_hook(lambda m, a, out, keep=keep: keep(out))
    rev(x)
    found = extractor(x)
    assert_same_bits([found["first"], found["second"]], [expected["first"], expected["second"]])
    assert_exact(extractor, lambda m: m(x))


@pytest.mark.parametrize("name", NODES)
def test_a_traced_model_rewired(name: str) -> None:
    model = fx.symbolic_trace(made(name))
    rev = rewire.make_reversible(model, X[name], check="raise")
    assert [len(chain) for chain in plan_of(rev).chains] == [len(c) for c in planned(name).chains]
    assert_exact(rev, lambda m: m(X[name]))


def test_a_traced_model_compiled_anew() -> None:
    """Right, or refused: never again the original's code, or none that runs."""
    rev = rewire.make_reversible(fx.symbolic_trace(made("vit")), X["vit"]).eval()
    before = rev(X["vit"])
    unless_declined(rev.recompile, "compile")
    assert torch.equal(rev(X["vit"]), before)


class Stages(nn.Module):
    """The result of its own residual loop, by name and in order."""

    def __init__(self, kind: Callable[[], Any]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(perceptron() for _ in range(3))
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        found = self.kind()
        for number, branch in enumerate(self.branches):
            x = x + branch(x)
            found[f"stage{number}"] = x
        return found


@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_results_by_name(kind: Any) -> None:
    """torchvision's backbones and segmentation models return an OrderedDict."""
    torch.manual_seed(0)
    model, x = Stages(kind).double(), rows().double()
    rev = rewire.make_reversible(model, x, coupling=AsOriginal(), check="raise")
    assert type(rev(x)) is kind
    assert_close(rev, model, lambda m: m(x))


# ---- detection ---------------------------------------------------------------------------

BUILDERS: dict[str, Callable[..., Any]] = {
    "fasterrcnn": detection.fasterrcnn_resnet50_fpn,
    "maskrcnn": detection.maskrcnn_resnet50_fpn,
    "retinanet": detection.retinanet_resnet50_fpn,
    "fcos": detection.fcos_resnet50_fpn,
    "mobilenet": detection.fasterrcnn_mobilenet_v3_large_fpn,
}


def small(kind: str) -> Any:
    """A detector on a small ResNet."""
    torch.manual_seed(0)
    body = made("resnet", norm_layer=misc.FrozenBatchNorm2d)
    stages = {f"layer{n}": str(n) for n in range(1, 5)}
    backbone = detection.backbone_utils.BackboneWithFPN(body, stages, [64, 128, 256, 512], 16)
    options = {"num_classes": 3, "min_size": 64, "max_size": 96}
    if kind == "retinanet":
        return detection.RetinaNet(backbone, **options).train()
    return detection.FasterRCNN(backbone, rpn_post_nms_top_n_train=40, **options).train()


def scenes() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Two images of different sizes with boxes, labels and masks."""
    draw = torch.Generator().manual_seed(2)
    images = [torch.rand(3, 64, 64, generator=draw), torch.rand(3, 64, 80, generator=draw)]
    boxes = [[[4.0, 4.0, 30.0, 30.0], [10.0, 12.0, 50.0, 60.0]], [[5.0, 8.0, 40.0, 44.0]]]
    targets = [
        {
            "boxes": torch.tensor(rows),
            "labels": torch.arange(1, len(rows) + 1),
            "masks": torch.ones(len(rows), *image.shape[1:], dtype=torch.uint8),
        }
        for image, rows in zip(images, boxes, strict=True)
    ]
    return images, targets


def prove(model: Any) -> None:
    """All losses' gradients are the twin's; the detections are there in eval mode."""
    images, targets = scenes()
    rev = rewire.make_reversible(model, (images, targets), check="raise")
    assert max(len(chain) for chain in plan_of(rev).chains) >= 2
    step = stepping(rev, lambda m: m(images, targets))
    assert_as_stored(rev, step)
    assert len(rev(images, targets)) >= 2
    found = rev.eval()(images)
    assert [set(row) >= {"boxes", "labels", "scores"} for row in found] == [True, True]


@pytest.mark.parametrize("kind", ["fasterrcnn", "retinanet"])
def test_small_detectors(kind: str) -> None:
    prove(small(kind))


def test_a_detectors_losses_are_the_originals() -> None:
    """Under (1, 0, 1), in float64, proposals and their sampling included."""
    images, targets = scenes()
    images = [image.double() for image in images]
    targets = [{**row, "boxes": row["boxes"].double()} for row in targets]
    model = small("fasterrcnn").double()
    rev = rewire.make_reversible(model, (images, targets), coupling=AsOriginal(), check="raise")
    assert_close(rev, model, lambda m: m(images, targets))


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILDERS)
def test_detectors(name: str) -> None:
    torch.manual_seed(0)
    options = {"weights": None, "weights_backbone": None, "num_classes": 3}
    prove(BUILDERS[name](min_size=64, max_size=96, **options).train())


def test_plans_of_these_models() -> None:
    """So that the tests above test something."""
    lengths = {name: [len(chain) for chain in planned(name).chains] for name in NODES}
    assert lengths == {"resnet": [3, 2], "vit": [6]}
