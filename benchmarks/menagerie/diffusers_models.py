"""Models of diffusers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.menagerie.specimen import Inputs, Specimen, network

_NARROW: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "norm_num_groups": 8,
    "layers_per_block": 2,
}
_HEADS: dict[str, Any] = {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 3}


def specimens() -> Iterator[Specimen]:
    """Convolutional ones and transformers, of pictures and of videos."""
    yield from _convolutional()
    yield from _transformers()


def _of(kind: str, inputs: Inputs, **keywords: Any) -> Specimen:
    return Specimen("diffusers", kind, "diffusion", network("diffusers", kind, keywords), inputs)


def _time(batch: int = 2) -> Tensor:
    return torch.arange(10, 10 + batch)


def _convolutional() -> Iterator[Specimen]:
    yield _of(
        "UNet2DModel",
        lambda: {"sample": torch.randn(2, 3, 32, 32), "timestep": _time()},
        **_NARROW,
        sample_size=32,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    yield _of(
        "UNet2DConditionModel",
        lambda: {
            "sample": torch.randn(2, 4, 32, 32),
            "timestep": _time(),
            "encoder_hidden_states": torch.randn(2, 7, 32),
        },
        **_NARROW,
        sample_size=32,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
    )
    yield _of(
        "UNet3DConditionModel",
        lambda: {
            "sample": torch.randn(1, 4, 4, 16, 16),
            "timestep": _time(1),
            "encoder_hidden_states": torch.randn(1, 7, 32),
        },
        **_NARROW,
        sample_size=16,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=32,
        attention_head_dim=8,
    )
    yield _of(
        "AutoencoderKL",
        lambda: {"sample": torch.randn(1, 3, 32, 32)},
        block_out_channels=(32, 64),
        norm_num_groups=8,
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )


def _transformers() -> Iterator[Specimen]:
    yield _of(
        "DiTTransformer2DModel",
        lambda: {
            "hidden_states": torch.randn(2, 4, 16, 16),
            "timestep": _time(),
            "class_labels": torch.tensor([1, 2]),
        },
        **_HEADS,
        in_channels=4,
        out_channels=8,
        sample_size=16,
        num_embeds_ada_norm=10,
    )
    yield _of(
        "PixArtTransformer2DModel",
        lambda: {
            "hidden_states": torch.randn(2, 4, 16, 16),
            "encoder_hidden_states": torch.randn(2, 7, 32),
            "timestep": _time(),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
        **_HEADS,
        in_channels=4,
        out_channels=8,
        sample_size=16,
        cross_attention_dim=64,
        caption_channels=32,
    )
    yield _of(
        "SD3Transformer2DModel",
        lambda: {
            "hidden_states": torch.randn(2, 4, 16, 16),
            "encoder_hidden_states": torch.randn(2, 7, 32),
            "pooled_projections": torch.randn(2, 48),
            "timestep": _time(),
        },
        **_HEADS,
        sample_size=16,
        in_channels=4,
        out_channels=4,
        joint_attention_dim=32,
        caption_projection_dim=64,
        pooled_projection_dim=48,
        pos_embed_max_size=16,
    )
    yield _of(
        "FluxTransformer2DModel",
        lambda: {
            "hidden_states": torch.randn(2, 16, 8),
            "encoder_hidden_states": torch.randn(2, 7, 32),
            "pooled_projections": torch.randn(2, 48),
            "timestep": torch.tensor([0.5, 0.7]),
            "img_ids": torch.zeros(16, 3),
            "txt_ids": torch.zeros(7, 3),
        },
        in_channels=8,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        pooled_projection_dim=48,
        axes_dims_rope=(4, 4, 8),
    )
    yield _of(
        "LatteTransformer3DModel",
        lambda: {
            "hidden_states": torch.randn(1, 4, 4, 16, 16),
            "encoder_hidden_states": torch.randn(1, 7, 32),
            "timestep": _time(1),
        },
        **_HEADS,
        sample_size=16,
        in_channels=4,
        out_channels=8,
        patch_size=2,
        cross_attention_dim=64,
        caption_channels=32,
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        video_length=4,
    )
    yield _of(
        "CogVideoXTransformer3DModel",
        lambda: {
            "hidden_states": torch.randn(1, 2, 4, 8, 8),
            "encoder_hidden_states": torch.randn(1, 7, 32),
            "timestep": _time(1),
        },
        **_HEADS,
        in_channels=4,
        out_channels=4,
        text_embed_dim=32,
        max_text_seq_length=7,
        sample_width=8,
        sample_height=8,
        sample_frames=5,
        time_embed_dim=8,
    )
    yield _of(
        "WanTransformer3DModel",
        lambda: {
            "hidden_states": torch.randn(1, 4, 2, 16, 16),
            "encoder_hidden_states": torch.randn(1, 7, 32),
            "timestep": _time(1),
        },
        **_HEADS,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=96,
    )
