"""Opening models by file and by name, and refusing what would run code."""

from __future__ import annotations

import functools
import importlib
import json
import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from rewire.errors import BadFile
from rewire.sources import Recipe, build, open_model, parse_recipe
from tests.broken_files import BROKEN, Calls, with_program

PACKAGE = """
import torch
from torch import nn

class Branch(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.activation = torch.tanh

    def forward(self, x):
        return x + self.activation(self.linear(x))

def build(width=4, depth=3):
    return nn.Sequential(*(Branch(width) for _ in range(depth)))

not_callable = 3
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A user's package, importable from the working directory only."""
    (tmp_path / "mynets.py").write_text(PACKAGE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    importlib.invalidate_caches()
    yield "mynets"
    sys.modules.pop("mynets", None)


def same_state(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[k], theirs[k]) for k in ours)


def timm_net() -> nn.Module:
    return timm.create_model("test_vit")


MODELS = {
    "resnet50": torchvision.models.resnet50,
    "swin_t": torchvision.models.swin_t,
    "swin3d_t": torchvision.models.video.swin3d_t,
    "mvit_v2_s": torchvision.models.video.mvit_v2_s,
    "vit_base": lambda: timm.create_model("vit_base_patch16_224"),
    "convnext_tiny": lambda: timm.create_model("convnext_tiny"),
    "swin_tiny": lambda: timm.create_model("swin_tiny_patch4_window7_224"),
    "efficientnet_b0": lambda: timm.create_model("efficientnet_b0"),
    "fasternet_t0": lambda: timm.create_model("fasternet_t0"),
    "nn_transformer": lambda: nn.TransformerEncoderLayer(8, 2, activation="gelu"),
}


@pytest.mark.parametrize("name", MODELS)
def test_pickled_model_opens_without_trust(name: str, tmp_path: Path) -> None:
    with torch.device("meta"):  # structure only: no time for random weights
        model = MODELS[name]()
    torch.save(model, tmp_path / "model.pt")
    source = open_model(str(tmp_path / "model.pt"))
    assert type(source.module) is type(model)
    assert source.recipe is None
    assert repr(source.module) == repr(model)
    assert list(source.module.state_dict()) == list(model.state_dict())


def test_pickled_model_keeps_its_weights(tmp_path: Path) -> None:
    model = timm_net()
    torch.save(model, tmp_path / "model.pt")
    assert same_state(open_model(str(tmp_path / "model.pt")).module, model)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_gets_one_line(name: str, tmp_path: Path) -> None:
    write, words = BROKEN[name]
    path = tmp_path / "model.pt"
    write(path)
    with pytest.raises(BadFile) as caught:
        open_model(str(path))
    message = str(caught.value)
    assert words in message
    assert message.startswith(str(path))
    assert "\n" not in message


HOSTILE = {
    "os.system": lambda mark: Calls(os.system, f"touch {mark}"),
    "eval": lambda mark: Calls(eval, f"open({str(mark)!r}, 'w')"),
    "exec": lambda mark: Calls(exec, f"open({str(mark)!r}, 'w')"),
    "open": lambda mark: Calls(open, str(mark), "w"),
    "partial of os.system": lambda mark: functools.partial(os.system, f"touch {mark}"),
    "run": lambda mark: Calls(subprocess.run, ["touch", str(mark)]),
    "getattr of a class": lambda mark: Calls(getattr, nn.Module, "load_state_dict"),
    "getattr of a method": lambda mark: Calls(getattr, nn.Linear(1, 1), "register_buffer"),
    "constructor": lambda mark: Calls(nn.Linear, 1, 1),
    "graph module": lambda mark: torch.fx.symbolic_trace(nn.Linear(1, 1)),
    "torch.load": lambda mark: Calls(torch.load, str(mark)),
    "torch.hub": lambda mark: functools.partial(torch.hub.load, "owner/name"),
}


@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in a model"])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickle_is_refused_and_not_run(name: str, inside: bool, tmp_path: Path) -> None:
    mark, path = tmp_path / "ran", tmp_path / "model.pt"
    hostile = HOSTILE[name](mark)
    model = nn.Sequential(nn.Linear(2, 2))
    model.extra = hostile
    torch.save(model if inside else hostile, path)
    with pytest.raises(BadFile) as caught:
        open_model(str(path))
    assert not mark.exists()
    assert "\n" not in str(caught.value)
    with pytest.raises(BadFile):  # nor where unknown classes are replaced by empty objects
        open_model(str(path), arch="timm/test_vit")
    assert not mark.exists()


def test_mapping_constructor_can_not_call_a_modules_keys(tmp_path: Path) -> None:
    bait = nn.Identity()
    bait.__dict__["keys"] = functools.partial(nn.Linear, 1, 1)
    torch.save(Calls(OrderedDict, bait), tmp_path / "model.pt")
    with pytest.raises(BadFile, match="OrderedDict"):
        open_model(str(tmp_path / "model.pt"))


def test_standard_library_can_not_be_trusted(tmp_path: Path) -> None:
    torch.save(Calls(os.getcwd), tmp_path / "model.pt")
    for package in ("builtins", "os", "subprocess", "importlib.util"):
        with pytest.raises(BadFile, match="standard library"):
            open_model(str(tmp_path / "model.pt"), trust=[package])


def test_unknown_class_is_named_with_its_trust(package: str, tmp_path: Path) -> None:
    path = str(tmp_path / "model.pt")
    model = open_model("mynets:build").module
    torch.save(model, path)
    with pytest.raises(BadFile, match=r"mynets\.Branch.*--trust mynets"):
        open_model(path)
    with pytest.raises(BadFile, match=r"mynets\.Branch"):
        open_model(path, trust=["mynet", "other"])
    assert same_state(open_model(path, trust=[package]).module, model)


def test_trust_does_not_reach_what_the_package_imports(package: str, tmp_path: Path) -> None:
    (tmp_path / "mynets.py").write_text(PACKAGE + "\nimport os\nfrom os import system\n")
    path, mark = tmp_path / "model.pt", tmp_path / "ran"
    for name in (b"system", b"os.system"):
        with_program(
            path,
            b"cmynets\n"
            + name
            + b"\nX%c\x00\x00\x00touch %b\x85R" % (len(f"touch {mark}"), str(mark).encode()),
        )
        with pytest.raises(BadFile, match="no class of the trusted package"):
            open_model(str(path), trust=[package])
        assert not mark.exists()


PROGRAMS = {
    "the result of a call is called": (
        b"cfunctools\npartial\nctorch.nn.modules.linear\nLinear\n\x85RK\x01K\x01\x86R",
        "calls a computed value",
    ),
    "a rebuild that calls a class": (
        b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch.nn.modules.linear\nLinear\n"
        b"ctorch\nTensor\nK\x01K\x01\x86Nt" + b"R",
        "calls torch._tensor._rebuild_from_type_v2",
    ),
    "a set of a module": (
        b"c__builtin__\nset\nctorch.nn.modules.linear\nIdentity\n)\x81\x85R",
        "calls builtins.set",
    ),
    "Python 2's name": (b"c__builtin__\neval\nX\x01\x00\x00\x001\x85R", "builtins.eval"),
    "another protocol": (b"\x8c\x02os\x8c\x06system\x93", "another protocol"),
    "an empty stack": (b"\x85", "damaged"),
    "an unknown memo": (b"h\x07", "damaged"),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_hostile_program(name: str, tmp_path: Path) -> None:
    program, words = PROGRAMS[name]
    with_program(tmp_path / "model.pt", program)
    with pytest.raises(BadFile) as caught:
        open_model(str(tmp_path / "model.pt"))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


WRAPPED = {
    "plain": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model": lambda state: {"epoch": 3, "model": state, "optimizer": {"state": {}}},
    "model_state_dict": lambda state: {"model_state_dict": state},
    "ema": lambda state: {"ema": state},
    "nested": lambda state: {"model": {"state_dict": state}},
    "ddp": lambda state: {f"module.{key}": value for key, value in state.items()},
    "compiled": lambda state: {f"_orig_mod.{key}": value for key, value in state.items()},
    "both": lambda state: {"model": {f"module._orig_mod.{k}": v for k, v in state.items()}},
}


@pytest.mark.parametrize("name", WRAPPED)
def test_checkpoint_of_weights(name: str, tmp_path: Path) -> None:
    model = timm_net()
    torch.save(WRAPPED[name](model.state_dict()), tmp_path / "checkpoint.pth")
    source = open_model(str(tmp_path / "checkpoint.pth"), arch="timm/test_vit")
    assert same_state(source.module, model)
    assert source.recipe == Recipe("timm", "test_vit")
    if name in ("state_dict", "model", "model_state_dict", "ema"):
        assert f"under {name!r}" in source.description


def test_checkpoint_with_foreign_objects(package: str, tmp_path: Path) -> None:
    """Arguments, configurations and metrics in a checkpoint are no reason to refuse weights."""
    import argparse
    from collections import defaultdict

    import numpy

    model = timm_net()
    extras = {
        "args": argparse.Namespace(lr=0.1, path=Path("x")),
        "metrics": defaultdict(list, loss=[1.0]),
        "best": numpy.float64(0.5),
        "layer": open_model("mynets:build").module,
        "model": model.state_dict(),
    }
    torch.save(extras, tmp_path / "checkpoint.pth")
    source = open_model(str(tmp_path / "checkpoint.pth"), arch="timm/test_vit")
    assert same_state(source.module, model)


def test_safetensors_and_old_torch_files(tmp_path: Path) -> None:
    model = timm_net()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    old = tmp_path / "old.pth"
    torch.save(model.state_dict(), old, _use_new_zipfile_serialization=False)
    for path in (tmp_path / "weights.safetensors", old):
        assert same_state(open_model(str(path), arch="timm/test_vit").module, model)


def test_model_in_a_checkpoint(tmp_path: Path) -> None:
    model = timm_net()
    torch.save({"epoch": 1, "model": model}, tmp_path / "checkpoint.pth")
    source = open_model(str(tmp_path / "checkpoint.pth"))
    assert same_state(source.module, model)
    assert "under 'model'" in source.description


def test_weights_need_their_model_and_must_fit(tmp_path: Path) -> None:
    path = str(tmp_path / "weights.pt")
    torch.save({"model": timm.create_model("test_vit", num_classes=5).state_dict()}, path)
    with pytest.raises(BadFile, match=r"without their model.*--arch"):
        open_model(path)
    with pytest.raises(BadFile, match=r"head\.weight is \[5, .*num_classes=10"):
        open_model(path, arch="timm/test_vit")
    with pytest.raises(BadFile, match=r"\d+ keys are missing and \d+ are unknown"):
        open_model(path, arch="torchvision/resnet18")
    assert open_model(path, arch="timm/test_vit?num_classes=5").module.num_classes == 5


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("nothing", "no such model"),
        ("timm/vit_bse_patch16_224", "Near it: vit_base_patch16_224"),
        ("timm/hf-hub:owner/name", "no such model"),
        ("torchvision/resnet51", "Near it: resnet"),
        ("torchvision/resnet18?weights=DEFAULT", "--pretrained fetches"),
        ("timm/test_vit?checkpoint_path=x", "--pretrained fetches"),
        ("timm/test_vit?depth_of=3", "could not be built"),
        ("transformers/nowhere/config.json", "no configuration"),
        ("nopackage.models:build", "can't be imported"),
        ("mynets:not_callable", "no callable"),
        ("mynets:build?width=x", "could not be built"),
        ("builtins:dict", "gives dict, not an nn.Module"),
    ],
)
def test_names_that_fail(spec: str, words: str, package: str) -> None:
    with pytest.raises(BadFile) as caught:
        open_model(spec)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_give_recipes_that_build(package: str) -> None:
    for spec, recipe in {
        "timm/test_vit?num_classes=3": Recipe("timm", "test_vit", {"num_classes": 3}),
        "torchvision/resnet18": Recipe("torchvision", "resnet18"),
        "mynets:build?depth=2": Recipe("import", "mynets:build", {"depth": 2}),
    }.items():
        source = open_model(spec)
        assert source.recipe == recipe == parse_recipe(spec)
        again = build(Recipe(**json.loads(json.dumps(recipe.to_dict()))))
        assert list(again.state_dict()) == list(source.module.state_dict())


def test_arch_and_pretrained_go_with_the_right_kind(package: str, tmp_path: Path) -> None:
    torch.save(timm_net(), tmp_path / "model.pt")
    with pytest.raises(BadFile, match="--arch goes with a file"):
        open_model("timm/test_vit", arch="timm/test_vit")
    with pytest.raises(BadFile, match="--pretrained goes with a name"):
        open_model(str(tmp_path / "model.pt"), pretrained=True)
    with pytest.raises(BadFile, match="--pretrained goes with timm"):
        open_model("mynets:build", pretrained=True)


def test_pretrained_weights_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise OSError("[Errno -2] Name or service not known")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(BadFile, match="no model hub can be reached"):
        open_model("timm/test_vit", pretrained=True)


def _bert(folder: Path, **kinds: object) -> dict[str, object]:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = {"model_type": "bert", **sizes, "intermediate_size": 32, "vocab_size": 50, **kinds}
    (folder / "config.json").write_text(json.dumps(config))
    return config


def test_transformers_by_config(tmp_path: Path) -> None:
    _bert(tmp_path)
    assert type(open_model(f"transformers/{tmp_path}/config.json").module).__name__ == "BertModel"
    _bert(tmp_path, architectures=["BertForMaskedLM"])
    source = open_model(f"transformers/{tmp_path}")
    assert type(source.module).__name__ == "BertForMaskedLM"
    assert source.recipe is not None
    assert source.recipe.name == "BertForMaskedLM"
    source.module.save_pretrained(tmp_path / "saved")
    again = open_model(f"transformers/{tmp_path / 'saved'}")
    assert same_state(again.module, source.module)
    assert again.recipe is not None
    assert list(build(again.recipe).state_dict()) == list(source.module.state_dict())


def test_transformers_config_runs_no_code_of_a_hub(tmp_path: Path) -> None:
    code = {"auto_map": {"AutoModel": "owner/name--modeling.Evil"}}
    kernel = {"_attn_implementation": "owner/kernel", "attn_implementation": "owner/kernel"}
    _bert(tmp_path, **code, **kernel)
    model = open_model(f"transformers/{tmp_path}").module
    assert type(model).__module__.startswith("transformers.models.bert")
    assert "owner" not in str(model.config._attn_implementation)
    _bert(tmp_path, architectures=["pipeline"])
    with pytest.raises(BadFile, match="no such model"):
        open_model(f"transformers/{tmp_path}")
    (tmp_path / "config.json").write_text("{ no json")
    with pytest.raises(BadFile, match="not JSON"):
        open_model(f"transformers/{tmp_path}/config.json")


def test_random_state_of_tensors_only(tmp_path: Path) -> None:
    """A dict of tensors is weights, also where some entry is extra state."""
    state: dict[str, Tensor | dict[str, int]] = {"a": torch.zeros(1), "b._extra_state": {}}
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(BadFile, match="weights without their model"):
        open_model(str(tmp_path / "weights.pt"))
