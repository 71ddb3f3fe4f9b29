"""The models of the zoo: how each is built, small, with random weights, and what it is called with.

A `Specimen` names a model of a library; nothing is built until it is asked for. Networks of
transformers come from their default configurations, made small by one rule for all of them.
"""

from __future__ import annotations

import csv
import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

TRUTH = Path(__file__).parent / "records" / "zoo_truth.csv"

Inputs = Callable[[], dict[str, Any] | tuple[Any, ...]]


@dataclass(frozen=True)
class Specimen:
    """A model of a library.

    Attributes:
        library: Where it comes from.
        name: Its own name there.
        family: What it is counted with: for timm the file it stands in.
        build: Makes it.
        inputs: Makes what it is called with; None where rewire finds that by itself.
        size: Side of its pictures where others than its own do: smaller, for speed.
    """

    library: str
    name: str
    family: str
    build: Callable[[], nn.Module] = field(repr=False)
    inputs: Inputs | None = field(default=None, repr=False)
    size: int | None = None

    @property
    def id(self) -> str:
        """Unique in the zoo."""
        return f"{self.library}/{self.name}"


def specimens() -> list[Specimen]:
    """All models of the zoo, library by library."""
    return [*_torch(), *_torchvision(), *_timm(), *_transformers(), *_diffusers(), *_monai()]


def truth() -> dict[str, dict[str, str]]:
    """What is known of some of them, by id: see the README beside this file."""
    with TRUTH.open() as stream:
        return {f"{row['library']}/{row['model']}": row for row in csv.DictReader(stream)}


# ---- torch and torchvision ---------------------------------------------------------------


def _torch() -> Iterator[Specimen]:
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


def _torchvision() -> Iterator[Specimen]:
    import torchvision.models as zoo

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


# ---- timm --------------------------------------------------------------------------------

# One of each model file that the truth has none of, and some of their other families.
_MORE_OF_TIMM = """halonet_h1 lambda_resnet26t lamhalobotnet50ts_256 botnet26t_256
    cpubone_nano csatv2 cspnext_tiny davit_tiny densenet121 dla46x_c dla34 dpn48b
    edgenext_xx_small naflexvit_base_patch16_gap ghostnet_050 ghostnetv2_100 ghostnetv3_050
    hardcorenas_b hiera_tiny_224 sam2_hiera_tiny hrnet_w18_small iformer_t inception_v3
    inception_v4 levit_128s levit_conv_128s lowformer_b0 test_coatnet test_maxvit
    coatnext_nano_rw_224 maxvit_rmlp_pico_rw_256 gmlp_ti16_224 mixer_s32_224 resmlp_12_224
    mobilevit_xxs mobilevitv2_050 pit_ti_224 res2net50_26w_4s res2next50 rexnet_100
    legacy_seresnet18 starnet_s050 swiftformer_xs swinv2_tiny_window8_256 swinv2_cr_tiny_ns_224
    vgg11 visformer_tiny wide_resnet50_2 resnext50_32x4d resnetaa50 convnextv2_femto
    vit_small_patch16_36x1_224 hgnetv2_b0 mobilenetv4_conv_small_035 efficientnet_es
    tf_efficientnetv2_b0 tinynet_e spnasnet_100 test_vit4 deepseek_vit_412m""".split()

_FIXED_SIZE = """vit beit deit eva cait coat convit crossvit flexivit gcvit hiera levit mixer gmlp
    resmlp mvit naflexvit nest pit samvit sam2 sequencer swin tnt twins vitamin volo xcit aimv2
    qwen3 deepseek halonet lambda lamhalobotnet botnet maxvit coatnet coatnext test_ tiny_vit
    efficientformer visformer focalnet davit bat_ inception nasnet pnasnet selecsls mobilenetv5
    efficientvim nextvit csatv2""".split()


def _timm() -> Iterator[Specimen]:
    import timm
    from timm.models import model_entrypoint

    names = [row["model"] for row in truth().values() if row["library"] == "timm"]
    plain = [(name, name, {}) for name in sorted(dict.fromkeys((*names, *_MORE_OF_TIMM)))]
    features = [(f"{name} features_only", name, {"features_only": True}) for name in _TIMM_FEATURES]
    for called, name, keywords in (*plain, *features):
        family = model_entrypoint(name).__module__.rpartition(".")[2]
        size = None if name.startswith(tuple(_FIXED_SIZE)) else 96
        made = functools.partial(timm.create_model, name, **_on_small_pictures(name), **keywords)
        yield Specimen("timm", called, family, made, None, size)


# Transformers on small pictures: their depth counts, not their number of patches.
_BY_PATCHES = """vit_base vit_small vit_tiny vit_relpos vit_srelpos beit deit eva aimv2 flexivit
    samvit cait deepseek_vit naflexvit qwen3_vit""".split()
_TIMM_FEATURES = """resnet18 convnext_atto vit_tiny_patch16_224 hrnet_w18_small
    mobilenetv3_small_050""".split()


def _on_small_pictures(name: str) -> dict[str, Any]:
    """What makes a transformer of timm cheap in float64."""
    if not name.startswith(tuple(_BY_PATCHES)) or "_r_s" in name:
        return {}
    patch = re.search(r"patch(\d+)", name)
    size = 6 * int(patch[1]) if patch else 96
    return {"img_size": size, **({"depth": 4} if name == "deepseek_vit_412m" else {})}


# ---- transformers ------------------------------------------------------------------------

_TRANSFORMERS = """afmoe aimv2 albert altclip apertus arcee audio-spectrogram-transformer
    autoformer bamba bart beit bert bert-generation big_bird bigbird_pegasus biogpt bit bitnet
    blenderbot blip bloom camembert canine chinese_clip clip clipseg codegen cohere cohere2
    conditional_detr convbert convnext convnextv2 cpmant ctrl cvt data2vec-audio data2vec-text
    data2vec-vision dbrx deberta deberta-v2 decision_transformer deepseek_v2 deepseek_v3 deit detr
    diffllama dinov2 dinov2_with_registers dinov3_convnext dinov3_vit distilbert doge dots1 dpr dpt
    electra ernie ernie4_5 ernie4_5_moe esm exaone4 falcon falcon_h1 falcon_mamba flaubert fnet
    focalnet fsmt funnel gemma gemma2 gemma3 gemma3_text git glm glm4 glm4_moe glpn gpt2 gpt_bigcode
    gpt_neo gpt_neox gpt_oss gptj granite granitemoe granitemoehybrid groupvit helium hgnet_v2 hiera
    hubert ibert idefics3_vision ijepa imagegpt informer jamba jetmoe layoutlm layoutlmv3 led levit
    lfm2 lilt llama llama4_text llava longformer longt5 luke lxmert m2m_100 mamba mamba2 marian
    markuplm mask2former maskformer maskformer-swin mbart megatron-bert metaclip_2 minimax mistral
    mixtral mobilebert mobilenet_v1 mobilenet_v2 mobilevit mobilevitv2 modernbert modernbert-decoder
    moonshine mpnet mpt mra mt5 mvp nemotron nemotron_h nllb-moe nystromformer olmo olmo2 olmo3
    olmoe openai-gpt opt owlv2 owlvit patchtsmixer patchtst pegasus pegasus_x perceiver persimmon
    phi phi3 phimoe pixtral plbart poolformer prophetnet pvt pvt_v2 qwen2 qwen2_5_vl qwen2_moe
    qwen2_vl qwen3 qwen3_moe qwen3_next qwen3_vl recurrent_gemma reformer regnet rembert resnet
    roberta roberta-prelayernorm roc_bert roformer rt_detr rwkv sam seamless_m4t seed_oss segformer
    seggpt sew sew-d siglip siglip2 smollm3 speech_to_text speecht5 splinter squeezebert stablelm
    starcoder2 swiftformer swin swin2sr swinv2 switch_transformers t5 t5gemma table-transformer
    tapas textnet time_series_transformer timesformer umt5 unispeech unispeech-sat videomae vilt
    visual_bert vit vit_mae vit_msn vitdet vits vivit wav2vec2 wav2vec2-bert wav2vec2-conformer
    wavlm whisper xclip xglm xlm xlm-roberta xlm-roberta-xl xlnet xlstm xmod yolos yoso
    zamba2""".split()

# What a small network has where its configuration has a number under that name.
_SMALL = {
    name: number
    for number, names in {
        3: """num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers
            num_encoder_layers num_decoder_layers encoder_num_hidden_layers depth num_blocks
            num_hidden_groups speech_encoder_layers t2u_encoder_layers t2u_decoder_layers""",
        64: """hidden_size d_model n_embd dim embed_dim encoder_hidden_size decoder_hidden_size
            hidden_dim word_embed_proj_dim embedding_size out_hidden_size encoder_embed_dim
            image_size emb_dim projection_dim entity_emb_size
            mit_hidden_size""",
        96: """intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff n_inner d_inner dff
            encoder_intermediate_size decoder_intermediate_size moe_intermediate_size
            shared_expert_intermediate_size expert_ffn_hidden_size ffn_hidden_size
            speech_encoder_intermediate_size dim_feedforward dim_ff mlp_dim decoder_linear_units
            encoder_linear_units feed_forward_size projection_intermediate_dim
            t2u_encoder_ffn_dim t2u_decoder_ffn_dim moe_shared_expert_intermediate_size
            mit_intermediate_size""",
        4: """num_attention_heads n_head n_heads num_heads encoder_attention_heads
            decoder_attention_heads num_local_experts num_experts n_routed_experts moe_num_experts
            mamba_num_heads
            speech_encoder_attention_heads t2u_encoder_attention_heads""",
        2: "num_key_value_heads num_experts_per_tok num_kv_heads n_group moe_k",
        1: "topk_group first_k_dense_replace",
        128: """vocab_size vocab_size_per_layer_input n_words entity_vocab_size src_vocab_size
            tgt_vocab_size t2u_vocab_size num_hash_buckets""",
        16: """head_dim d_kv d_head dim_head qk_nope_head_dim v_head_dim qk_rope_head_dim
            kv_lora_rank q_lora_rank""",
    }.items()
    for name in names.split()
}
# Of networks in stages: numbers of layers, and widths.
_DEPTHS = frozenset("depths num_blocks layers_per_stage block_sizes blocks_per_stage".split())
_WIDTHS = frozenset(
    """hidden_sizes embed_dim embed_dims hidden_size conv_dim embedding_size neck_hidden_sizes
    upsample_initial_channel patch_embeds_hidden_size embed_dim_per_stage
    backbone_channel_list""".split()
)
# What the configurations of some do not allow otherwise.
_RESNET = {
    "model_type": "resnet",
    "depths": [2, 2],
    "hidden_sizes": [16, 32],
    "embedding_size": 16,
    "layer_type": "basic",
    "out_features": ["stage2"],
}
_RESNET4 = {
    **_RESNET,
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [16, 24, 32, 48],
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
_DETR = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "backbone_config": _RESNET,
    "num_queries": 10,
}
_MULTIMODAL_ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
_FORECAST = {"prediction_length": 8, "context_length": 16, "num_time_features": 2}
_ALSO: dict[str, dict[str, Any]] = {
    "bit": {"num_groups": 8},
    "autoformer": {**_FORECAST, "moving_average": 5, "label_length": 8},
    "bamba": {
        "attn_layer_indices": [1],
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
    },
    "codegen": {"rotary_dim": 8},
    "conditional_detr": _DETR,
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v2": {"n_group": 1, "num_experts_per_tok": 2, "topk_group": 1},
    "detr": _DETR,
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "esm": {"vocab_size": 64, "pad_token_id": 1, "mask_token_id": 2},
    "falcon_h1": {
        "mamba_d_ssm": 128,
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_chunk_size": 16,
    },
    "funnel": {"architectures": ["FunnelModel"]},
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention", "mamba"],
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "num_local_experts": 4,
    },
    "gptj": {"rotary_dim": 8},
    "informer": _FORECAST,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 8},
    "layoutlmv3": {"coordinate_size": 12, "shape_size": 8, "input_size": 64},
    "lxmert": {"l_layers": 3, "r_layers": 2, "x_layers": 2, "visual_feat_dim": 32},
    "lilt": {"hidden_size": 96},
    "mamba2": {"num_heads": 8, "n_groups": 2, "state_size": 16},
    "mask2former": {"backbone_config": _RESNET4, "feature_size": 64, "mask_feature_size": 64},
    "maskformer": {
        "backbone_config": _RESNET4,
        "fpn_feature_size": 64,
        "mask_feature_size": 64,
    },
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 16},
    "perceiver": {"d_latents": 64, "num_latents": 16, "num_self_attends_per_block": 4},
    "qwen2_5_vl": {"text_config": {"rope_parameters": _MULTIMODAL_ROPE}},
    "qwen2_vl": {"text_config": {"rope_parameters": _MULTIMODAL_ROPE}},
    "qwen3_next": {
        "num_hidden_layers": 4,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "reformer": {
        "attn_layers": ["local", "lsh", "local"],
        "axial_pos_embds_dim": [16, 48],
        "axial_pos_shape": [8, 16],
        "max_position_embeddings": 128,
        "attention_head_size": 16,
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "num_buckets": 4,
    },
    "rt_detr": {
        "backbone_config": {
            **_RESNET4,
            "model_type": "rt_detr_resnet",
            "out_features": ["stage2", "stage3", "stage4"],
        },
        "encoder_in_channels": [24, 32, 48],
        "encoder_hidden_dim": 64,
        "decoder_in_channels": [64, 64, 64],
        "feat_strides": [8, 16, 32],
        "num_queries": 10,
    },
    "sam": {
        "vision_config": {"output_channels": 64, "num_pos_feats": 32, "global_attn_indexes": [1]},
        "prompt_encoder_config": {"image_embedding_size": 4},
    },
    "seggpt": {
        "num_hidden_layers": 5,
        "intermediate_hidden_state_indices": [1, 2, 3, 4],
        "merge_index": 0,
        "image_size": [64, 32],
        "pretrain_image_size": 32,
    },
    "seamless_m4t": {
        "unit_embed_dim": 64,
        "lang_embed_dim": 16,
        "spkr_embed_dim": 16,
        "upsample_initial_channel": 64,
    },
    "speecht5": {"num_conv_pos_embeddings": 16},
    "swin": {"image_size": 224},
    "swin2sr": {"embed_dim": 48, "depths": [2, 2], "num_heads": [4, 4]},
    "table-transformer": _DETR,
    "textnet": {"stem_out_channels": 16, "image_size": [64, 64]},
    "time_series_transformer": _FORECAST,
    "vits": {"upsample_initial_channel": 64},
    "xlstm": {"use_cache": False},
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
    },
    "xmod": {"default_language": "en_XX"},
}


def _forecast() -> dict[str, Tensor]:
    past, future = 16 + 7, 8  # the context with its lags
    return {
        "past_values": torch.randn(2, past),
        "past_time_features": torch.randn(2, past, 2),
        "past_observed_mask": torch.ones(2, past),
        "future_values": torch.randn(2, future),
        "future_time_features": torch.randn(2, future, 2),
    }


def _episode() -> dict[str, Tensor]:
    return {
        "states": torch.randn(2, 5, 17),
        "actions": torch.randn(2, 5, 4),
        "rewards": torch.randn(2, 5, 1),
        "returns_to_go": torch.randn(2, 5, 1),
        "timesteps": torch.arange(5).repeat(2, 1),
        "attention_mask": torch.ones(2, 5),
    }


def _prompted() -> dict[str, Tensor]:
    names = ("pixel_values", "prompt_pixel_values", "prompt_masks")
    return {name: torch.randn(1, 3, 32, 32) for name in names}


def _regions() -> dict[str, Tensor]:
    return {
        "input_ids": torch.randint(3, 100, (2, 16)),
        "visual_feats": torch.randn(2, 5, 32),
        "visual_pos": torch.rand(2, 5, 4),
    }


def _hidden() -> dict[str, Tensor]:
    names = ("input_values", "decoder_input_values")
    return {name: torch.randn(2, 12, 64) for name in names}


def _patches() -> dict[str, Tensor]:
    return {
        "input_ids": torch.randint(3, 100, (2, 16)),
        "pixel_values": torch.randn(2, 16, 768),
        "pixel_attention_mask": torch.ones(2, 16),
        "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
    }


_GIVEN: dict[str, Inputs] = {
    "autoformer": _forecast,
    "decision_transformer": _episode,
    "informer": _forecast,
    "lxmert": _regions,
    "perceiver": lambda: {"inputs": torch.randn(2, 20, 64)},
    "reformer": lambda: {"input_ids": torch.randint(3, 100, (2, 128))},
    "seggpt": _prompted,
    "siglip2": _patches,
    "speecht5": _hidden,
    "time_series_transformer": _forecast,
}


def _transformers() -> Iterator[Specimen]:
    import transformers

    known = set(transformers.CONFIG_MAPPING)
    for name in _TRANSFORMERS:
        if name in known:
            family = _family_of_transformer(name)
            made = functools.partial(small_transformer, name)
            yield Specimen("transformers", name, family, made, _GIVEN.get(name))


def _family_of_transformer(name: str) -> str:
    from transformers.models.auto import modeling_auto as auto

    kinds = {
        "encoder-decoder": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "video": auto.MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES,
        "audio": {
            **auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
            **auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
            **auto.MODEL_FOR_CTC_MAPPING_NAMES,
        },
        "vision": auto.MODEL_FOR_IMAGE_MAPPING_NAMES,
        "decoder": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "encoder": auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    }
    return next((kind for kind, names in kinds.items() if name in names), "other")


def small_transformer(name: str) -> nn.Module:
    """A small random network of one of transformers' model types."""
    import transformers

    kind = transformers.CONFIG_MAPPING[name]
    config = kind(**_merged(_shrunk(kind()), _ALSO.get(name, {})))
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return transformers.AutoModel.from_config(config, **eager)


def _shrunk(config: Any) -> dict[str, Any]:
    """Settings that make a configuration's network small."""
    settings = vars(config)
    staged = any(isinstance(settings.get(name), (list, tuple)) for name in _DEPTHS)
    small: dict[str, Any] = {}
    for key, value in settings.items():
        if hasattr(value, "model_type") and hasattr(value, "to_dict"):
            small[key] = {**_shrunk(value), "model_type": value.model_type}
        elif _whole(value) and key.endswith("_token_id") and value >= _SMALL["vocab_size"]:
            small[key] = _SMALL["vocab_size"] - 1 - len(small) % 16
        elif _whole(value) and key.endswith("vocab_size"):
            small[key] = min(_SMALL["vocab_size"], value)
        else:
            smaller = _smaller(key, value, staged)
            small |= {} if smaller == value else {key: smaller}
    heads = settings.get("num_attention_heads")
    if heads and heads == settings.get("num_key_value_heads"):  # some have no groups of heads
        small["num_key_value_heads"] = small.get("num_attention_heads", heads)
    return small


def _smaller(key: str, value: Any, staged: bool) -> Any:
    """A setting's value in a small network; in stages the proportions of widths are kept."""
    if isinstance(value, (list, tuple)) and all(map(_whole, value)):
        if key in _DEPTHS:
            return [min(2, n) for n in value]
        return [max(n // 4, 1) for n in value] if key in _WIDTHS else value
    if not _whole(value):
        return value
    if staged and key in _WIDTHS:
        return max(value // 4, 1)
    return min(_SMALL.get(key, value), value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _merged(settings: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Settings with others in their place, in sub-configurations too."""
    nested = {k: _merged(settings.get(k, {}), v) for k, v in more.items() if isinstance(v, dict)}
    return {**settings, **more, **nested}


# ---- diffusers and monai -----------------------------------------------------------------


def _diffusers() -> Iterator[Specimen]:
    def of(kind: str, inputs: Inputs, **keywords: Any) -> Specimen:
        def build() -> nn.Module:
            import diffusers

            return getattr(diffusers, kind)(**keywords)

        return Specimen("diffusers", kind, "diffusion", build, inputs)

    def time(batch: int = 2) -> Tensor:
        return torch.arange(10, 10 + batch)

    narrow = {"block_out_channels": (32, 64), "norm_num_groups": 8, "layers_per_block": 2}
    heads = {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 3}
    yield of(
        "UNet2DModel",
        lambda: {"sample": torch.randn(2, 3, 32, 32), "timestep": time()},
        **narrow,
        sample_size=32,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    yield of(
        "UNet2DConditionModel",
        lambda: {
            "sample": torch.randn(2, 4, 32, 32),
            "timestep": time(),
            "encoder_hidden_states": torch.randn(2, 7, 32),
        },
        **narrow,
        sample_size=32,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
    )
    yield of(
        "UNet3DConditionModel",
        lambda: {
            "sample": torch.randn(1, 4, 4, 16, 16),
            "timestep": time(1),
            "encoder_hidden_states": torch.randn(1, 7, 32),
        },
        **narrow,
        sample_size=16,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=32,
        attention_head_dim=8,
    )
    yield of(
        "DiTTransformer2DModel",
        lambda: {
            "hidden_states": torch.randn(2, 4, 16, 16),
            "timestep": time(),
            "class_labels": torch.tensor([1, 2]),
        },
        **heads,
        in_channels=4,
        out_channels=8,
        sample_size=16,
        num_embeds_ada_norm=10,
    )
    yield of(
        "PixArtTransformer2DModel",
        lambda: {
            "hidden_states": torch.randn(2, 4, 16, 16),
            "encoder_hidden_states": torch.randn(2, 7, 32),
            "timestep": time(),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
        **heads,
        in_channels=4,
        out_channels=8,
        sample_size=16,
        cross_attention_dim=64,
        caption_channels=32,
    )
    yield of(
        "SD3Transformer2DModel",
        lambda: {
            "hidden_states": torch.randn(2, 4, 16, 16),
            "encoder_hidden_states": torch.randn(2, 7, 32),
            "pooled_projections": torch.randn(2, 48),
            "timestep": time(),
        },
        **heads,
        sample_size=16,
        in_channels=4,
        out_channels=4,
        joint_attention_dim=32,
        caption_projection_dim=64,
        pooled_projection_dim=48,
        pos_embed_max_size=16,
    )
    yield of(
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
    yield of(
        "LatteTransformer3DModel",
        lambda: {
            "hidden_states": torch.randn(1, 4, 4, 16, 16),
            "encoder_hidden_states": torch.randn(1, 7, 32),
            "timestep": time(1),
        },
        **heads,
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
    yield of(
        "CogVideoXTransformer3DModel",
        lambda: {
            "hidden_states": torch.randn(1, 2, 4, 8, 8),
            "encoder_hidden_states": torch.randn(1, 7, 32),
            "timestep": time(1),
        },
        **heads,
        in_channels=4,
        out_channels=4,
        text_embed_dim=32,
        max_text_seq_length=7,
        sample_width=8,
        sample_height=8,
        sample_frames=5,
        time_embed_dim=8,
    )
    yield of(
        "WanTransformer3DModel",
        lambda: {
            "hidden_states": torch.randn(1, 4, 2, 16, 16),
            "encoder_hidden_states": torch.randn(1, 7, 32),
            "timestep": time(1),
        },
        **heads,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=96,
    )
    yield of(
        "AutoencoderKL",
        lambda: {"sample": torch.randn(1, 3, 32, 32)},
        block_out_channels=(32, 64),
        norm_num_groups=8,
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )


def _monai() -> Iterator[Specimen]:
    volume: Inputs = lambda: (torch.randn(1, 1, 32, 32, 32),)  # noqa: E731

    def of(kind: str, inputs: Inputs = volume, **keywords: Any) -> Specimen:
        def build() -> nn.Module:
            import monai.networks.nets as nets

            return getattr(nets, kind)(**keywords)

        return Specimen("monai", kind, "volumes", build, inputs)

    plain = {"in_channels": 1, "out_channels": 2}
    three = {"spatial_dims": 3, **plain}
    yield of("SwinUNETR", lambda: (torch.randn(1, 1, 64, 64, 64),), **plain, feature_size=12)
    yield of(
        "UNETR",
        **plain,
        img_size=(32, 32, 32),
        feature_size=8,
        hidden_size=48,
        mlp_dim=96,
        num_heads=4,
    )
    yield of("SegResNet", init_filters=8, **plain)
    yield of("SegResNetDS", init_filters=8, **plain)
    yield of("UNet", **three, channels=(8, 16, 32), strides=(2, 2), num_res_units=2)
    yield of("VNet", lambda: (torch.randn(1, 1, 32, 32, 32),))
    yield of("HighResNet", **three)
    yield of(
        "DynUNet",
        **three,
        kernel_size=[3, 3, 3],
        strides=[1, 2, 2],
        upsample_kernel_size=[2, 2],
        res_block=True,
    )
    yield of(
        "ViT", in_channels=1, img_size=(32, 32, 32), patch_size=16, hidden_size=48, mlp_dim=96,
        num_layers=4, num_heads=4,
    )  # fmt: skip
    yield of("MedNeXtSmall", **three)
    yield of(
        "ResNet",
        block="basic",
        layers=[2, 2, 2, 2],
        block_inplanes=[8, 16, 32, 64],
        n_input_channels=1,
    )
    yield of(
        "DiffusionModelUNet",
        lambda: (torch.randn(1, 1, 16, 16, 16), torch.tensor([3])),
        **three,
        channels=[8, 16],
        num_res_blocks=2,
        attention_levels=[False, True],
        norm_num_groups=8,
        num_head_channels=8,
    )
