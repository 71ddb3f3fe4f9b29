"""From a MODEL as written on the command line to an nn.Module, and how to build it again.

model.pt                          a pickled nn.Module
weights.safetensors --arch NAME   a state_dict or training checkpoint, and its model
timm/vit_base_patch16_224         a name in timm, torchvision or transformers
torchvision/swin3d_t?num_classes=10
transformers/path/to/config.json
package.module:callable           anything importable that returns an nn.Module
"""

from __future__ import annotations

import ast
import inspect
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from torch import Tensor, nn

from rewire.checkpoints import WEIGHT_KEYS, difference, found_in, without_prefixes
from rewire.errors import AlreadyRewired, BadFile
from rewire.fileforms import form_of
from rewire.unpickling import first_line, imported, read_pickle

_FORMS = (
    "a file (.pt, .pth, .safetensors), timm/NAME, torchvision/NAME, "
    "transformers/path/to/config.json or package.module:callable"
)
# Arguments that fetch or read other files: weights come from the file alone.
_FETCHING = ("pretrained", "checkpoint", "weights", "cache", "progress")


@dataclass(frozen=True)
class Recipe:
    """How to build a model again, as plain data.

    Attributes:
        kind: "timm", "torchvision", "transformers" or "import".
        name: Name in that library (transformers: the class), or `package.module:callable`.
        options: Keyword arguments (transformers: the configuration).
    """

    kind: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as a dict of plain values."""
        return {"kind": self.kind, "name": self.name, "options": dict(self.options)}


@dataclass(frozen=True)
class Source:
    """An opened model.

    Attributes:
        module: The model.
        recipe: How to build it again; None for a pickled module.
        description: Where it came from, in words.
    """

    module: nn.Module
    recipe: Recipe | None
    description: str


def open_model(
    spec: str, *, arch: str | None = None, trust: Sequence[str] = (), pretrained: bool = False
) -> Source:
    """Open a model by file or by name.

    Args:
        spec: As in this module's docstring.
        arch: The model that a file of weights belongs to, itself a name.
        trust: Packages whose classes a pickled model may hold.
        pretrained: Fetch the library's pretrained weights for a name.

    Raises:
        BadFile: There is no such model, or the file is not one; one line says why.
    """
    path = Path(spec)
    by_name = not path.exists() and path.suffix not in (".pt", ".pth", ".safetensors")
    if by_name and _named(spec):
        if arch is not None:
            raise BadFile(f"{spec}: --arch goes with a file of weights, not with a name.")
        return _open_name(spec, pretrained)
    if by_name and "/" not in spec and path.suffix == "":
        raise BadFile(f"{spec}: no such model. Give {_FORMS}.")
    if pretrained:
        raise BadFile(f"{spec}: --pretrained goes with a name, not with a file.")
    return _open_file(path, arch, trust)


def parse_recipe(spec: str) -> Recipe:
    """The recipe of a name, e.g. `timm/vit_base_patch16_224?num_classes=10`.

    Raises:
        BadFile: It is no name in a known library.
    """
    if not _named(spec):
        raise BadFile(f"{spec}: no such model. Give a name: {_FORMS.partition('), ')[2]}.")
    name, _, query = spec.partition("?")
    options = {key: _value(text) for key, text in parse_qsl(query)}
    kind, _, rest = name.partition("/")
    if kind not in _BUILDERS:
        return Recipe("import", name, options)
    name = rest
    if kind == "transformers":
        return _transformers_recipe(Path(name), options)
    return Recipe(kind, name, options)


def build(recipe: Recipe, *, pretrained: bool = False) -> nn.Module:
    """Build the model that a recipe describes.

    The caller decides whether a recipe that imports a package is trusted.

    Raises:
        BadFile: The library doesn't know it, or could not build it.
    """
    builder = _BUILDERS.get(recipe.kind)
    if builder is None:
        raise BadFile(f"{recipe.kind}/{recipe.name}: unknown kind of model. Give {_FORMS}.")
    where = recipe.name if recipe.kind == "import" else f"{recipe.kind}/{recipe.name}"
    fetching = [key for key in recipe.options if key.startswith(_FETCHING)]
    if fetching and recipe.kind in ("timm", "torchvision"):
        raise BadFile(f"{where}: {fetching[0]}= is not taken; --pretrained fetches weights.")
    try:
        model = builder(recipe, where, pretrained)
    except BadFile:
        raise
    except Exception as error:  # any library code may run here
        raise BadFile(f"{where}: {_build_failure(error, pretrained)}") from error
    if not isinstance(model, nn.Module):
        raise BadFile(f"{where}: gives {type(model).__name__}, not an nn.Module.")
    return model


def _named(spec: str) -> bool:
    """Whether `spec` has the form of a name rather than of a path."""
    library = spec.startswith(("timm/", "torchvision/", "transformers/"))
    return library or re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*(\?.*)?", spec) is not None


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _open_name(spec: str, pretrained: bool) -> Source:
    kind, _, name = spec.partition("/")
    folder = Path(name)
    if kind == "transformers" and (pretrained or _holds_weights(folder)):
        return _open_transformers_weights(spec, name)
    recipe = parse_recipe(spec)
    weights = "pretrained weights" if pretrained else "random weights"
    weights = "weights as built" if recipe.kind == "import" else weights
    return Source(build(recipe, pretrained=pretrained), recipe, f"{spec}, {weights}")


def _build_timm(recipe: Recipe, where: str, pretrained: bool) -> Any:
    import timm

    if not timm.is_model(recipe.name):
        near = _nearest(recipe.name, timm.list_models())
        raise BadFile(f"{where}: timm {timm.__version__} has no such model.{near}")
    _quieten_hub()
    return timm.create_model(recipe.name, pretrained=pretrained, **recipe.options)


def _build_torchvision(recipe: Recipe, where: str, pretrained: bool) -> Any:
    from torchvision import __version__ as version  # type: ignore[import-untyped, unused-ignore]
    from torchvision.models import (  # type: ignore[import-untyped, unused-ignore]
        get_model_builder,
        list_models,
    )

    if recipe.name not in list_models():
        near = _nearest(recipe.name, list_models())
        raise BadFile(f"{where}: torchvision {version} has no such model.{near}")
    builder = get_model_builder(recipe.name)
    known = inspect.signature(builder).parameters
    weights = {"weights": "DEFAULT" if pretrained else None, "weights_backbone": None}
    return builder(**{key: weights[key] for key in weights if key in known}, **recipe.options)


def _build_import(recipe: Recipe, where: str, pretrained: bool) -> Any:
    if pretrained:
        raise BadFile(f"{where}: --pretrained goes with timm, torchvision or transformers.")
    package, _, path = recipe.name.partition(":")
    found: Any = imported(package, where)
    for part in path.split("."):
        found = getattr(found, part, None)
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise BadFile(f"{where}: {package} has no callable {path!r}.")
    return found(**recipe.options)


def _build_transformers(recipe: Recipe, where: str, pretrained: bool) -> Any:
    import transformers

    # Both can name code on a hub: a model's own module, or an attention kernel.
    options = {key: value for key, value in recipe.options.items() if key != "auto_map"}
    options = {key: value for key, value in options.items() if "attn_implementation" not in key}
    model_type = options.pop("model_type", None)
    if model_type is None:
        raise BadFile(f"{where}: the configuration names no model_type.")
    config = transformers.AutoConfig.for_model(model_type, **options)
    if recipe.name == "AutoModel":
        automatic: Any = transformers.AutoModel
        return automatic.from_config(config, trust_remote_code=False)
    chosen = getattr(transformers, recipe.name, None)
    if not (inspect.isclass(chosen) and issubclass(chosen, transformers.PreTrainedModel)):
        raise BadFile(f"{where}: transformers {transformers.__version__} has no such model.")
    model_class: Any = chosen
    return model_class(config)


_BUILDERS: dict[str, Callable[[Recipe, str, bool], Any]] = {
    "timm": _build_timm,
    "torchvision": _build_torchvision,
    "transformers": _build_transformers,
    "import": _build_import,
}


def _quieten_hub() -> None:
    """Keep the hub's client from reporting each retry; one line at the end says it all."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it sets its own on import


def _nearest(name: str, names: Sequence[str]) -> str:
    from difflib import get_close_matches

    near = get_close_matches(name, names, n=3)
    return f" Near it: {', '.join(near)}." if near else " See its list_models()."


def _build_failure(error: Exception, pretrained: bool) -> str:
    offline = isinstance(error, OSError) or "onnect" in str(error) or "offline" in str(error)
    if pretrained and offline:
        return (
            "no model hub can be reached for the pretrained weights. "
            "Fetch them where there is a network, and give the file with --arch."
        )
    return f"could not be built ({type(error).__name__}: {first_line(error)[:160]})."


def _transformers_recipe(path: Path, options: Mapping[str, Any]) -> Recipe:
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadFile(
            f"transformers/{path}: no configuration there. Give the path of a config.json."
        ) from error
    except ValueError as error:
        raise BadFile(f"{file}: not JSON ({first_line(error)}).") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise BadFile(f"{file}: no transformers configuration (it has no model_type).")
    names = config.get("architectures") or ["AutoModel"]
    return Recipe("transformers", str(names[0]), {**config, **options})


def _holds_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))


def _open_transformers_weights(spec: str, name: str) -> Source:
    import transformers

    _quieten_hub()
    local = Path(name).is_dir()
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        names = getattr(config, "architectures", None) or ["AutoModel"]
        chosen = getattr(transformers, names[0], transformers.AutoModel)
        module = chosen.from_pretrained(name, config=config, local_files_only=local)
    except Exception as error:  # hub, files and library code all raise their own
        raise BadFile(f"{spec}: {_build_failure(error, pretrained=not local)}") from error
    options = json.loads(module.config.to_json_string(use_diff=False))
    recipe = Recipe("transformers", type(module).__name__, options)
    return Source(module, recipe, f"{spec}, weights of its directory")


def _open_file(path: Path, arch: str | None, trust: Sequence[str]) -> Source:
    form = form_of(path)
    if form == "safetensors":
        from safetensors.torch import load_file

        try:
            loaded: Any = load_file(path)
        except Exception as error:  # safetensors raises its own, undocumented kinds
            raise BadFile(f"{path}: damaged safetensors ({first_line(error)}).") from error
    else:
        loaded = read_pickle(path, str(path), trust=trust, inert=arch is not None)
    if isinstance(loaded, Mapping) and loaded.get("format") == "rewire":
        raise AlreadyRewired(path)
    module, weights, where = found_in(loaded)
    if arch is not None:
        return _open_weights(path, weights or _state_of(module, path), where, arch)
    if module is not None:
        return Source(module, None, f"{path}, a pickled {type(module).__name__}{where}")
    if weights:
        raise BadFile(
            f"{path}: weights without their model ({len(weights)} tensors{where}). "
            "Say which model they belong to, e.g. --arch timm/vit_base_patch16_224."
        )
    raise BadFile(f"{path}: holds {type(loaded).__name__}, neither a model nor a state_dict.")


def _state_of(module: nn.Module | None, path: Path) -> dict[str, Tensor]:
    """The weights of a pickled model that was found where weights were expected."""
    try:
        return {} if module is None else module.state_dict()
    except AttributeError as error:  # an inert object stands in place of a submodule
        raise BadFile(
            f"{path}: a pickled {type(module).__name__} with parts of classes that are not "
            "admitted. Leave out --arch to see which, or give a state_dict."
        ) from error


def _open_weights(path: Path, weights: dict[str, Tensor], where: str, arch: str) -> Source:
    if not weights:
        raise BadFile(
            f"{path}: no state_dict found, neither the file itself nor under the keys "
            f"{', '.join(WEIGHT_KEYS[:5])}, ... "
            "Save one with torch.save(model.state_dict(), path)."
        )
    recipe = parse_recipe(arch)
    module = build(recipe)
    expected = module.state_dict()
    weights, stripped = without_prefixes(weights, expected)
    if problem := difference(weights, expected):
        raise BadFile(f"{path}: does not fit {arch}: {problem}")
    module.load_state_dict(weights)
    return Source(module, recipe, f"{path}, state_dict{where}{stripped}, in {arch}")
