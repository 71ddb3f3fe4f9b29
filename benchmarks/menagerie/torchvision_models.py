"""Models of torchvision, and the transformers of torch itself."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from benchmarks.menagerie.specimen import Inputs, Specimen


def _torch_itself() -> Iterator[Specimen]:
    def encoder(norm_first: bool) -> nn.Module:
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, norm_first=norm_first)
        return nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)

    def inputs() -> tuple[Any, ...]:
        return (torch.randn(2, 10, 64),)

    for name, first in (("norm_first", True), ("post", False)):
        called = f"nn.TransformerEncoder[{name}]"
        yield Specimen("torch", called, "TransformerEncoder", lambda f=first: encoder(f), inputs)
    yield Specimen(
        "torch",
        "nn.Transformer",
        "Transformer",
        lambda: nn.Transformer(64, 4, 3, 3, 128, batch_first=True),
        lambda: (torch.randn(2, 10, 64), torch.randn(2, 7, 64)),
    )


# Torchvision's own names, by what they are called with; sizes keep float64 affordable.
_DETECTION = """fasterrcnn_mobilenet_v3_large_320_fpn fasterrcnn_mobilenet_v3_large_fpn
    fasterrcnn_resnet50_fpn fasterrcnn_resnet50_fpn_v2 fcos_resnet50_fpn keypointrcnn_resnet50_fpn
    maskrcnn_resnet50_fpn maskrcnn_resnet50_fpn_v2 retinanet_resnet50_fpn retinanet_resnet50_fpn_v2
    ssd300_vgg16 ssdlite320_mobilenet_v3_large""".split()
_PROPOSALS = """rpn_post_nms_top_n_train rpn_post_nms_top_n_test box_detections_per_img
    box_batch_size_per_image""".split()  # each is a run of its heads
_NO_SMALLER = ("vit_", "maxvit_", "inception_v3", "mvit_", "raft_", "s3d", *_DETECTION)
_QUANTIZABLE = ("resnet18", "mobilenet_v3_large", "googlenet")  # before quantization


def specimens() -> Iterator[Specimen]:
    """Its models, and the transformers of torch itself."""
    import torchvision.models as zoo

    yield from _torch_itself()

    def build(name: str, **more: Any) -> nn.Module:
        return zoo.get_model(name, weights=None, **_keywords_of(name), **more)

    for name in zoo.list_models():
        if not name.startswith("quantized_"):
            size = None if name.startswith(_NO_SMALLER) else 64
            made = functools.partial(build, name)
            yield Specimen("torchvision", name, _family_of(name), made, _inputs_of(name), size)
    for name in _QUANTIZABLE:
        made = functools.partial(build, f"quantized_{name}", quantize=False)
        yield Specimen("torchvision", f"quantizable {name}", "quantizable", made, None, 64)
    yield Specimen("torchvision", "resnet50_fpn_backbone", "detection", _fpn, None, 64)


def _family_of(name: str) -> str:
    import torchvision.models as zoo

    for family in (zoo.video, zoo.segmentation, zoo.detection, zoo.optical_flow):
        if name in zoo.list_models(module=family):
            return family.__name__.rpartition(".")[2].replace("_", " ")
    return "classification"


def _keywords_of(name: str) -> dict[str, Any]:
    """What keeps a model from the network, and from minutes of building."""
    if name in _DETECTION and not name.startswith("ssd"):  # others than ssd scale their pictures
        few = dict.fromkeys(_PROPOSALS, 16) if "rcnn" in name else {}
        return {"weights_backbone": None, "min_size": 96, "max_size": 96, **few}
    if _family_of(name) in ("detection", "segmentation"):
        return {"weights_backbone": None}
    if name in ("vit_h_14", "vit_l_16", "vit_l_32"):  # their depth counts, not their area
        return {"image_size": 2 * int(name[-2:])}
    if name.endswith(("inception_v3", "googlenet")):  # scipy's truncated normal takes minutes
        return {"init_weights": False}
    return {}


def _inputs_of(name: str) -> Inputs | None:
    if name in _DETECTION:
        return _pictures
    if name.startswith("raft_"):
        return lambda: (torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128))
    return None


def _pictures() -> tuple[Any, ...]:
    """Two pictures and what is in them, which counts in training."""
    images = [torch.rand(3, 96, 96), torch.rand(3, 96, 96)]
    seen = {
        "boxes": torch.tensor([[10.0, 10.0, 60.0, 70.0]]),
        "labels": torch.tensor([1]),
        "masks": torch.ones(1, 96, 96, dtype=torch.uint8),
        "keypoints": torch.full((1, 17, 3), 20.0),
    }
    return images, [seen, seen]


def _fpn() -> nn.Module:
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    return resnet_fpn_backbone(backbone_name="resnet50", weights=None)
