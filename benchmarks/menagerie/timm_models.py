"""Models of timm."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any

from benchmarks.menagerie.specimen import Specimen, truth

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


def specimens() -> Iterator[Specimen]:
    """At least one model of every file of timm."""
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
