"""Models of transformers: their default configurations, made small by one rule for all."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.menagerie.specimen import Inputs, Specimen

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


def specimens() -> Iterator[Specimen]:
    """Those of the model types that the installed version has."""
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
