"""Saving and loading rewired models: everything back, nothing run, nothing half-written."""

from __future__ import annotations

import copy
import importlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import rewire
from rewire.errors import BadFile, RewireError
from rewire.rewriting import plan_of
from rewire.sources import Recipe
from rewire.storage import export_state_dict, load, save
from tests.broken_files import BROKEN, Calls

PACKAGE = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, width, linear=None):
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.linear = linear or nn.Linear(width, width)
        self.register_buffer("scale", torch.full((), 0.5), persistent=False)
        self.shift = torch.full((width,), 0.25)  # a plain tensor, in no state_dict
        self.aliases = [self.linear.weight]

    def forward(self, x):
        return x + self.scale * torch.relu(self.linear(self.norm(x)) + self.shift)

class Net(nn.Module):
    def __init__(self, depth=4, tied=False):
        super().__init__()
        shared = nn.Linear(6, 6) if tied else None
        self.stem = nn.Linear(6, 6)
        self.blocks = nn.ModuleList(Block(6, shared) for _ in range(depth))
        self.head = nn.Linear(6, 6, bias=False)
        if tied:
            self.head.weight = self.stem.weight

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

class Stateful(Net):
    def get_extra_state(self):
        return {"step": 1}

    def set_extra_state(self, state):
        pass
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A user's module of networks."""
    (tmp_path / "usernets.py").write_text(PACKAGE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    importlib.invalidate_caches()
    yield importlib.import_module("usernets")
    sys.modules.pop("usernets", None)


def rewired(model: nn.Module) -> nn.Module:
    return rewire.make_reversible(model, torch.randn(3, 6))


def filled(model: nn.Module) -> nn.Module:
    """`model` with every tensor, flag and plain attribute away from its default."""
    torch.manual_seed(1)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.data.add_(torch.rand_like(tensor))
    for number, block in enumerate(model.blocks):
        block.norm.train(number % 2 == 0)
        block.shift = block.shift + number
    model.stem.bias.requires_grad_(False)
    model.head.weight.group = "head"
    return model


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    buffers = dict(model.named_buffers(remove_duplicate=False))
    return {**dict(model.named_parameters(remove_duplicate=False)), **buffers}


def assert_same(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = named_tensors(a), named_tensors(b)
    assert list(ours) == list(theirs)
    assert list(a.state_dict()) == list(b.state_dict())
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
        assert tensor.dtype == theirs[name].dtype
        assert type(tensor) is type(theirs[name])
        assert tensor.requires_grad == theirs[name].requires_grad, name
    flags = [{n: m.training for n, m in model.named_modules()} for model in (a, b)]
    assert flags[0] == flags[1]
    assert plan_of(a) == plan_of(b)


def same_outputs(a: nn.Module, b: nn.Module, x: Tensor) -> bool:
    a, b = copy.deepcopy(a), copy.deepcopy(b)
    return torch.equal(a(x), b(x))


@pytest.mark.parametrize("tied", [False, True])
def test_skeleton_brings_everything_back(nets: Any, tied: bool, tmp_path: Path) -> None:
    rev = rewired(filled(nets.Net(tied=tied)))
    save(rev, tmp_path / "rev.pt")
    again = load(tmp_path / "rev.pt", trust=["usernets"])
    assert_same(rev, again)
    assert isinstance(again, nets.Net)
    assert again.head.weight.group == "head"
    assert torch.equal(again.blocks[2].shift, rev.blocks[2].shift)
    assert all(block.aliases[0] is block.linear.weight for block in again.blocks)
    assert same_outputs(rev, again, torch.randn(5, 6))
    if tied:
        assert again.head.weight is again.stem.weight
        assert again.blocks[0].linear is again.blocks[3].linear


def test_recipe_brings_the_tensors_back(nets: Any, tmp_path: Path) -> None:
    model = filled(nets.Net(depth=3))
    for number, block in enumerate(model.blocks):
        block.shift = block.shift - number  # as built: a recipe knows nothing else
    rev = rewired(model)
    save(rev, tmp_path / "rev.pt", source="usernets:Net?depth=3")
    with pytest.raises(BadFile, match=r"calling usernets:Net.*--trust usernets"):
        load(tmp_path / "rev.pt")
    state = torch.get_rng_state()
    again = load(tmp_path / "rev.pt", trust=["usernets"])
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(rev, again)
    assert again.blocks[0].aliases[0] is again.blocks[0].linear.weight
    assert same_outputs(rev, again, torch.randn(5, 6))


@pytest.mark.parametrize(
    "source", [None, Recipe("timm", "test_vit", {"img_size": 32})], ids=["pickled", "named"]
)
def test_timm_model_needs_no_trust(source: Recipe | None, tmp_path: Path) -> None:
    rev = rewire.make_reversible(timm.create_model("test_vit", img_size=32).eval())
    save(rev, tmp_path / "rev.pt", source=source)
    again = load(tmp_path / "rev.pt")
    assert_same(rev, again)
    image = torch.randn(2, 3, 32, 32)
    assert same_outputs(rev, again, image)
    again(image).sum().backward()
    assert all(p.grad is not None for p in again.parameters())


def test_file_holds_plain_data_only(tmp_path: Path) -> None:
    rev = rewire.make_reversible(timm.create_model("test_vit"))
    save(rev, tmp_path / "rev.pt", source="timm/test_vit")
    content = torch.load(tmp_path / "rev.pt", weights_only=True)  # no allow list
    assert (content["format"], content["version"]) == ("rewire", 1)
    assert content["rebuild"] == {"kind": "timm", "name": "test_vit", "options": {}}
    assert rewire.Plan.from_dict(json.loads(content["plan"])) == plan_of(rev)
    assert list(content["state_dict"]) == list(rev.state_dict())
    assert content["skeleton"] is None
    save(rev, tmp_path / "pickled.pt")
    skeleton = torch.load(tmp_path / "pickled.pt", weights_only=True)["skeleton"]
    weights = sum(p.nbytes for p in rev.parameters())
    assert skeleton.dtype == torch.uint8
    assert skeleton.numel() < weights / 4


def test_half_precision_and_exported_weights(tmp_path: Path) -> None:
    model = timm.create_model("test_vit").bfloat16()
    rev = rewire.make_reversible(model)
    save(rev, tmp_path / "rev.pt", source="timm/test_vit")
    assert_same(rev, load(tmp_path / "rev.pt"))
    for name in ("weights.pt", "weights.safetensors"):
        export_state_dict(rev, tmp_path / name)
        path = tmp_path / name
        weights = load_file(path) if path.suffix == ".safetensors" else torch.load(path)
        fresh = timm.create_model("test_vit").bfloat16()
        fresh.load_state_dict(weights)
        assert all(torch.equal(fresh.state_dict()[k], v) for k, v in model.state_dict().items())


def test_exported_safetensors_of_tied_weights(nets: Any, tmp_path: Path) -> None:
    rev = rewired(nets.Net(tied=True))
    export_state_dict(rev, tmp_path / "weights.safetensors")
    weights = load_file(tmp_path / "weights.safetensors")
    assert weights.keys() == rev.state_dict().keys()


def test_what_can_not_be_saved_says_why(nets: Any, tmp_path: Path) -> None:
    path = tmp_path / "rev.pt"
    with pytest.raises(RewireError, match="not rewired"):
        save(nets.Net(), path)
    model = nets.Net()
    model.callback = lambda x: x
    with pytest.raises(BadFile, match="source="):
        save(rewired(model), path)
    with pytest.raises(BadFile, match="extra state"):
        save(rewired(nets.Stateful()), path, source="usernets:Stateful")
    with pytest.raises(BadFile, match="can't be written"):
        save(rewired(nets.Net()), tmp_path / "nowhere" / "rev.pt")
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "__pycache__") == ["usernets.py"]


def test_failed_write_leaves_the_old_file(
    nets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rev, path = rewired(nets.Net()), tmp_path / "rev.pt"
    path.write_bytes(b"old")

    def full(content: object, stream: Any) -> None:
        stream.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(BadFile, match="No space left"):
        save(rev, path, source="usernets:Net")
    assert path.read_bytes() == b"old"
    assert not list(tmp_path.glob(".*.part"))


def test_existing_file_is_replaced_with_ordinary_permissions(nets: Any, tmp_path: Path) -> None:
    path = tmp_path / "rev.pt"
    path.write_bytes(b"old")
    save(rewired(nets.Net()), path)
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
    assert_same(load(path, trust=["usernets"]), load(path, trust=["usernets"]))


@pytest.mark.parametrize("name", sorted(set(BROKEN) - {"number"}))
def test_broken_file_gets_one_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / "rev.pt"
    BROKEN[name][0](path)
    words = "not one of rewire's" if name == "old_pickle" else BROKEN[name][1]
    with pytest.raises(BadFile) as caught:
        load(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_torch_files_are_told_apart(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "model.pt")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "weights.pt")
    export_state_dict(nn.Linear(2, 2), tmp_path / "weights.safetensors")
    for name in ("model.pt", "weights.pt", "weights.safetensors"):
        with pytest.raises(BadFile, match=r"rewire convert .* -o OUT"):
            load(tmp_path / name)


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The content of a good file."""
    path = tmp_path_factory.mktemp("good") / "rev.pt"
    save(rewire.make_reversible(timm.create_model("test_vit")), path, source="timm/test_vit")
    return torch.load(path, weights_only=True)


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "newer": ({"version": 2}, "written by a newer rewire .file version 2"),
    "no version": ({"version": None}, "newer rewire"),
    "plan is no JSON": ({"plan": "{"}, "plan is damaged"),
    "plan lacks chains": ({"plan": "{}"}, "plan is damaged"),
    "plan is a list": ({"plan": "[1]"}, "plan is damaged"),
    "plan is missing": ({"plan": None}, "damaged .'plan'"),
    "tensors missing": ({"state_dict": {}}, "do not fit"),
    "a tensor of another shape": ({"state_dict": "head.bias"}, r"head\.bias is \[1\]"),
    "recipe of unknown kind": ({"rebuild": {"kind": "x", "name": "y"}}, "unknown kind"),
    "recipe without name": ({"rebuild": {"kind": "timm"}}, "damaged"),
    "recipe is neither": ({"rebuild": None}, "damaged"),
    "recipe that fetches": (
        {"rebuild": {"kind": "timm", "name": "test_vit", "options": {"pretrained": True}}},
        "is not taken",
    ),
    "recipe from a hub": ({"rebuild": {"kind": "timm", "name": "hf-hub:a/b"}}, "no such model"),
    "recipe that calls": ({"rebuild": {"kind": "import", "name": "os:getcwd"}}, "--trust os"),
    "skeleton is noise": ({"skeleton": torch.zeros(9, dtype=torch.uint8)}, "damaged"),
    "ties of nothing": ({"ties": [["a", "b"]]}, "damaged"),
    "ties are numbers": ({"ties": [1]}, "damaged"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_content_gets_one_line(name: str, content: dict[str, Any], tmp_path: Path) -> None:
    changed, words = CHANGES[name]
    if changed.get("state_dict") == "head.bias":
        changed = {"state_dict": {**content["state_dict"], "head.bias": torch.zeros(1)}}
    torch.save({**content, **changed}, tmp_path / "rev.pt")
    with pytest.raises(BadFile, match=words) as caught:
        load(tmp_path / "rev.pt")
    assert "\n" not in str(caught.value)


def test_recipe_can_not_call_the_standard_library(content: dict[str, Any], tmp_path: Path) -> None:
    recipe = {"kind": "import", "name": "os:getcwd", "options": {}}
    torch.save({**content, "rebuild": recipe}, tmp_path / "rev.pt")
    with pytest.raises(BadFile, match="standard library"):
        load(tmp_path / "rev.pt", trust=["os"])


def test_hostile_skeleton_is_not_run(content: dict[str, Any], tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    torch.save(Calls(os.system, f"touch {mark}"), tmp_path / "hostile")
    data = bytearray((tmp_path / "hostile").read_bytes())
    skeleton = torch.frombuffer(data, dtype=torch.uint8)
    torch.save({**content, "skeleton": skeleton}, tmp_path / "rev.pt")
    with pytest.raises(BadFile, match="system"):
        load(tmp_path / "rev.pt")
    assert not mark.exists()
