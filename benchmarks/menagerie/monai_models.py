"""Models of monai: volumes, where memory hurts most."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.menagerie.specimen import Inputs, Specimen, network


def specimens() -> Iterator[Specimen]:
    """Segmentation, classification and diffusion in three dimensions."""
    plain = {"in_channels": 1, "out_channels": 2}
    three = {"spatial_dims": 3, **plain}
    yield _of("SwinUNETR", lambda: (torch.randn(1, 1, 64, 64, 64),), **plain, feature_size=12)
    yield _of(
        "UNETR",
        **plain,
        img_size=(32, 32, 32),
        feature_size=8,
        hidden_size=48,
        mlp_dim=96,
        num_heads=4,
    )
    yield _of("SegResNet", init_filters=8, **plain)
    yield _of("SegResNetDS", init_filters=8, **plain)
    yield _of("UNet", **three, channels=(8, 16, 32), strides=(2, 2), num_res_units=2)
    yield _of("VNet", lambda: (torch.randn(1, 1, 32, 32, 32),))
    yield _of("HighResNet", **three)
    yield _of(
        "DynUNet",
        **three,
        kernel_size=[3, 3, 3],
        strides=[1, 2, 2],
        upsample_kernel_size=[2, 2],
        res_block=True,
    )
    yield _of(
        "ViT", in_channels=1, img_size=(32, 32, 32), patch_size=16, hidden_size=48, mlp_dim=96,
        num_layers=4, num_heads=4,
    )  # fmt: skip
    yield _of("MedNeXtSmall", **three)
    yield _of(
        "ResNet",
        block="basic",
        layers=[2, 2, 2, 2],
        block_inplanes=[8, 16, 32, 64],
        n_input_channels=1,
    )
    yield _of(
        "DiffusionModelUNet",
        lambda: (torch.randn(1, 1, 16, 16, 16), torch.tensor([3])),
        **three,
        channels=[8, 16],
        num_res_blocks=2,
        attention_levels=[False, True],
        norm_num_groups=8,
        num_head_channels=8,
    )


def _volume() -> tuple[Tensor]:
    return (torch.randn(1, 1, 32, 32, 32),)


def _of(kind: str, inputs: Inputs = _volume, **keywords: Any) -> Specimen:
    return Specimen(
        "monai", kind, "volumes", network("monai.networks.nets", kind, keywords), inputs
    )
