"""Rewired models in files: how to build the model, the plan and the tensors; no code.

A file is a dict written by `torch.save`, readable with `torch.load(weights_only=True)`:

    format, version     "rewire", 1
    rebuild             the recipe (see `sources`), or None: then there is a skeleton
    plan                the plan as JSON
    state_dict          parameters and persistent buffers, under their qualified names
    buffers             the other buffers, which a state_dict leaves out
    ties                groups of names that are one tensor
    training, frozen    names of the modules in training mode, of parameters without gradient
    skeleton            bytes (as uint8): the pickled original module, tensors on "meta"
    versions            of the packages it was written with
"""

from __future__ import annotations

import copy
import io
import json
import os
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from rewire.coupling import Coupling
from rewire.errors import BadFile
from rewire.fileforms import form_of
from rewire.plans import Plan
from rewire.sources import Recipe, build, parse_recipe
from rewire.unpickling import check_trust, first_line, read_pickle

_VERSION = 1
_TYPES: dict[str, type | tuple[type, ...]] = {
    "rebuild": (dict, type(None)),
    "plan": str,
    "state_dict": dict,
    "buffers": dict,
    "ties": list,
    "training": list,
    "frozen": list,
    "skeleton": (Tensor, type(None)),
    "versions": dict,
}


def save(rev: nn.Module, path: str | Path, *, source: Recipe | str | None = None) -> None:
    """Write a rewired model to a file that holds no code.

    Args:
        rev: What `make_reversible` gave.
        path: Where to; an existing file is replaced in one step or not at all.
        source: How the original was built, a `Recipe` or a name as for `rewire convert`
            (`"timm/..."`, `"package.module:callable"`). Without it the original module is
            stored as a skeleton that refers to its classes by name.

    Raises:
        RewireError: `rev` was not rewired.
        BadFile: It can't be stored, or not there.
    """
    from rewire.rewriting import plan_of, restored

    plan = plan_of(rev)
    original = restored(rev)
    recipe = parse_recipe(source) if isinstance(source, str) else source
    persistent, others = _tensors(original)
    content = {
        "format": "rewire",
        "version": _VERSION,
        "rebuild": None if recipe is None else recipe.to_dict(),
        "plan": json.dumps(plan.to_dict()),
        "state_dict": {name: tensor.detach() for name, tensor in persistent.items()},
        "buffers": {name: tensor.detach() for name, tensor in others.items()},
        "ties": _ties({**persistent, **others}),
        "training": [name for name, module in original.named_modules() if module.training],
        "frozen": [name for name, p in original.named_parameters() if not p.requires_grad],
        "skeleton": _skeleton(original) if recipe is None else None,
        "versions": _versions(),
    }
    if recipe is not None:
        _refuse_extra_state(original)
    _write(Path(path), lambda stream: torch.save(content, stream))


def load(
    path: str | Path, *, trust: Sequence[str] = (), coupling: str | Coupling | None = None
) -> nn.Module:
    """Read a rewired model back, on the CPU, running no code from the file.

    Args:
        path: A file that `save` or `rewire convert` wrote.
        trust: Packages whose classes (or builder function) the file may name, beyond those
            of torch.nn, torchvision and timm; models of transformers may need "transformers".
        coupling: As for `make_reversible`: another than the file names, or the one of your own
            that it was saved with.

    Returns:
        The rewired module, as `make_reversible` would give it.

    Raises:
        BadFile: It is not such a file, is damaged, or names what is not trusted.
    """
    from rewire.making import make_reversible

    where = str(path)
    content = _read(Path(path))
    plan = _plan(content["plan"], where)
    try:
        original = _original(content, where, trust)
        _set_flags(original, content)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        detail = f"{type(error).__name__}: {first_line(error)}"
        raise BadFile(f"{where}: damaged ({detail}). Convert the model again.") from error
    return make_reversible(original, plan=plan, coupling=coupling)


def stored_plan(path: str | Path) -> Plan:
    """The plan in a file of `save`, without its model.

    Raises:
        BadFile: It is not such a file, or is damaged.
    """
    return _plan(_read(Path(path))["plan"], str(path))


def export_state_dict(rev: nn.Module, path: str | Path) -> None:
    """Write plain weights for the original class, as `.safetensors` or by `torch.save`.

    Raises:
        BadFile: The file can't be written.
    """
    weights = {name: tensor.detach() for name, tensor in rev.state_dict().items()}
    if Path(path).suffix != ".safetensors":
        _write(Path(path), lambda stream: torch.save(weights, stream))
        return
    from safetensors.torch import save as to_bytes

    # safetensors refuses tensors that share memory: a tied weight is written twice.
    apart = {name: tensor.contiguous().clone() for name, tensor in weights.items()}
    _write(Path(path), lambda stream: stream.write(to_bytes(apart)))


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors by qualified name: those a state_dict holds, and the other buffers."""
    saved = model.state_dict(keep_vars=True)
    buffers = dict(model.named_buffers(remove_duplicate=False))
    kept = {name: tensor for name, tensor in buffers.items() if name in saved}
    others = {name: tensor for name, tensor in buffers.items() if name not in saved}
    return {**dict(model.named_parameters(remove_duplicate=False)), **kept}, others


def _ties(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    groups: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(id(tensor), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _skeleton(original: nn.Module) -> Tensor:
    """`original` pickled with its named tensors on the meta device.

    Plain attributes that are tensors stay as they are: no state_dict has them.
    """
    _check_importable(original)
    persistent, others = _tensors(original)
    memo: dict[int, Any] = {}
    for tensor in [*persistent.values(), *others.values()]:
        memo[id(tensor)] = _like(tensor, torch.empty_like(tensor, device="meta"))
    stream = io.BytesIO()
    try:
        torch.save(copy.deepcopy(original, memo), stream)
    except Exception as error:  # pickling asks any object in the model
        raise BadFile(
            f"{type(original).__name__}: can't be stored by reference to its classes "
            f"({first_line(error)[:160]}). Say how it is built: "
            'rewire.save(..., source="package.module:callable").'
        ) from error
    return torch.frombuffer(bytearray(stream.getvalue()), dtype=torch.uint8)


def _check_importable(original: nn.Module) -> None:
    """A class that another process can't import by name would make a file nobody can load."""
    for name, module in original.named_modules():
        cls = type(module)
        if cls.__module__ == "__main__" or "." in cls.__qualname__:
            raise BadFile(
                f"{name or 'the model'} is of class {cls.__module__}.{cls.__qualname__}, which a "
                "file can't refer to. Move the class to the top level of a module, or say how the "
                'model is built: rewire.save(..., source="package.module:callable").'
            )


def _like(old: Tensor, value: Tensor) -> Tensor:
    """`value` as what `old` is: a parameter, with the attributes that a user gave it."""
    new = nn.Parameter(value, False) if isinstance(old, nn.Parameter) else value.detach()
    vars(new).update(vars(old))
    return new.requires_grad_(old.requires_grad)


def _refuse_extra_state(original: nn.Module) -> None:
    for name, module in original.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise BadFile(
                f"{name}: {type(module).__name__} keeps extra state, which building the model "
                "again can't bring back. Save without source=."
            )


def _versions() -> dict[str, str]:
    found = {}
    for package in ("rewire", "torch", "torchvision", "timm", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _write(path: Path, writer: Callable[[BinaryIO], Any]) -> None:
    """Write beside `path` and move into place: never a half-written file."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(part, "xb") as stream:
            writer(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, path)
    except OSError as error:
        raise BadFile(f"{path}: can't be written ({error.strerror}).") from error
    finally:
        part.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    """The content of a rewire file, its form checked."""
    advice = f"rewire.load reads what rewire convert wrote: rewire convert {path} -o OUT."
    if form_of(path) != "torch":
        raise BadFile(f"{path}: weights without a plan (safetensors). {advice}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        _explain(path, error, advice)
    if not isinstance(content, dict) or content.get("format") != "rewire":
        raise BadFile(f"{path}: a torch file, but not one of rewire's. {advice}")
    written = content.get("version")
    if not isinstance(written, int) or written > _VERSION:
        raise BadFile(
            f"{path}: written by a newer rewire (file version {written}; this one reads "
            f"{_VERSION}). Upgrade rewire, or convert the model again."
        )
    for key, kind in _TYPES.items():
        if not isinstance(content.get(key), kind):
            raise BadFile(f"{path}: damaged ({key!r} is missing). Convert the model again.")
    return content


def _explain(path: Path, error: Exception, advice: str) -> None:
    """Say why the tensors-only reader refused a file: a model's pickle, or damage."""
    if "Unsupported global" in str(error):
        raise BadFile(f"{path}: a pickled model, not one of rewire's files. {advice}") from error
    read_pickle(path, str(path))
    raise BadFile(f"{path}: can't be read ({first_line(error)[:160]}).") from error


def _plan(text: str, where: str) -> Plan:
    try:
        return Plan.from_dict(json.loads(text))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadFile(f"{where}: its plan is damaged. Convert the model again.") from error


def _original(content: Mapping[str, Any], where: str, trust: Sequence[str]) -> nn.Module:
    """The original-class module with the tensors of the file."""
    if content["skeleton"] is not None:
        packed = io.BytesIO(content["skeleton"].numpy().tobytes())
        model = read_pickle(packed, where, trust=trust)
        if not isinstance(model, nn.Module):
            raise BadFile(f"{where}: its skeleton is no module. Convert the model again.")
    else:
        model = _rebuilt(Recipe(**content["rebuild"]), where, trust)
    tensors = {**content["state_dict"], **content["buffers"]}
    for names in content["ties"]:
        tensors.update(dict.fromkeys(names, tensors[names[0]]))
    return _grafted(model, tensors, where)


def _rebuilt(recipe: Recipe, where: str, trust: Sequence[str]) -> nn.Module:
    """The model built anew; the caller's random numbers stay as they were."""
    if recipe.kind == "import":
        check_trust(trust)
        module = recipe.name.partition(":")[0]
        if not any(module == package or module.startswith(f"{package}.") for package in trust):
            package = module.split(".")[0]
            raise BadFile(
                f"{where}: is built by calling {recipe.name}. If you trust that code, add "
                f'--trust {package} (in Python trust=["{package}"]).'
            )
    with torch.random.fork_rng(devices=[]):
        return build(recipe)


def _grafted(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> nn.Module:
    """A copy of `model` with the file's tensors wherever it held its own."""
    persistent, others = _tensors(model)
    held = {**persistent, **others}
    if held.keys() != tensors.keys():
        odd = sorted(held.keys() ^ tensors.keys())
        raise BadFile(
            f"{where}: its tensors do not fit the model as built here ({len(odd)} names differ, "
            f"first {odd[0]}). Use the package versions it was written with."
        )
    memo: dict[int, Any] = {}
    made: dict[int, Tensor] = {}
    for name, old in held.items():
        new = tensors[name]
        if old.shape != new.shape:
            raise BadFile(
                f"{where}: {name} is {list(new.shape)} in the file and {list(old.shape)} in the "
                "model as built here. Use the package versions it was written with."
            )
        if id(new) not in made:
            made[id(new)] = _like(old, new)
        if memo.setdefault(id(old), made[id(new)]) is not made[id(new)]:
            raise BadFile(f"{where}: {name} is tied in the model as built here, not in the file.")
    return copy.deepcopy(model, memo)


def _set_flags(model: nn.Module, content: Mapping[str, Any]) -> None:
    training = frozenset(content["training"])
    for name, module in model.named_modules():
        module.training = name in training
    frozen = frozenset(content["frozen"])
    for name, parameter in _floating(model.named_parameters()):
        parameter.requires_grad_(name not in frozen)


def _floating(
    parameters: Iterable[tuple[str, nn.Parameter]],
) -> Iterable[tuple[str, nn.Parameter]]:
    """Parameters that can carry a gradient; quantised integers can't."""
    return (pair for pair in parameters if pair[1].is_floating_point() or pair[1].is_complex())
