"""Reading torch files without running code from them.

torch's weights-only unpickler calls whatever stands on its allow list. A pickled model
needs module classes there, so before it runs, the pickle's program is followed here
(`pickles.Follower`): classes may be *made* (`__new__`) and filled, but only a short list of plain
constructors may be *called*. Two locks, then: names outside torch.nn, torchvision and timm
are refused, and of the names inside none of the modules' constructors runs.
"""

from __future__ import annotations

import enum
import functools
import inspect
import io
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from rewire.errors import BadFile
from rewire.pickles import REBUILDS, Follower, Name

_PACKAGES = ("torch.nn", "torchvision.models", "torchvision.ops", "timm.models", "timm.layers")
# Constructors in these build code from what they are given, or talk to other processes.
_NEVER = ("timm.models._features_fx", "torch.nn.parallel", "torch.nn.utils.parametrize")
_BLOCKED = ("sys", "os", "posix", "nt")
# fmt: off
_ACTIVATIONS = frozenset((
    "celu", "elu", "gelu", "glu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu",
    "log_softmax", "logsigmoid", "mish", "relu", "relu6", "selu", "sigmoid", "silu", "softmax",
    "softmin", "softplus", "softsign", "tanh", "tanhshrink",
))
# fmt: on
_LISTED = frozenset(
    {
        "functools.partial",
        "timm.layers.format.Format",
        "torch.nn.utils.spectral_norm.SpectralNorm",
        "torch.nn.utils.spectral_norm.SpectralNormLoadStateDictPreHook",
        "torch.nn.utils.spectral_norm.SpectralNormStateDictHook",
        "torch.nn.utils.weight_norm.WeightNorm",
        "torchvision.models.detection._utils.BalancedPositiveNegativeSampler",
        "torchvision.models.detection._utils.BoxCoder",
        "torchvision.models.detection._utils.BoxLinearCoder",
        "torchvision.models.detection._utils.Matcher",
        "torchvision.models.detection._utils.SSDMatcher",
        "torchvision.models.optical_flow.raft._pass_through_h",
        "torchvision.ops.boxes.box_iou",
    }
)
_CALLABLE = frozenset(
    {
        "_codecs.encode",
        "builtins.bytearray",
        "builtins.complex",
        "builtins.getattr",
        "functools.partial",
        "torch.Size",
        "torch.device",
        "torch.serialization._get_layout",
    }
)


class _Inert:
    """Stands for any unknown class where only a checkpoint's tensors are wanted."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


def read_pickle(
    file: str | Path | io.BytesIO,
    where: str,
    *,
    trust: Sequence[str] = (),
    inert: bool = False,
) -> Any:
    """Load what `torch.save` wrote, on the CPU, running no code from the file.

    Args:
        file: Path or buffer; files of torch before 1.6 may hold tensors only.
        where: What errors call it.
        trust: Packages whose classes and functions are admitted too.
        inert: Put an empty object in place of every class that is not admitted
            (for training checkpoints, of which only the tensors are wanted).

    Raises:
        BadFile: The file is damaged, or holds what is not admitted.
    """
    admitted: list[tuple[Any, str]] = []
    if _is_archive(file):
        admitted = _admitted(file, where, trust, inert)
    with torch.serialization.safe_globals(admitted):  # type: ignore[arg-type]
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a hostile program may end in any of them
            raise BadFile(f"{where}: {_cause(error)}") from error


def imported(name: str, where: str) -> ModuleType:
    """Import a module that the user named; the working directory counts as on `sys.path`."""
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
    try:
        return import_module(name)
    except Exception as error:  # user code may raise anything while it is imported
        raise BadFile(
            f"{where}: {name} can't be imported ({type(error).__name__}: {first_line(error)}). "
            "Run where its package is installed, or in its directory."
        ) from error


def check_trust(trust: Sequence[str]) -> None:
    """Refuse to trust Python's standard library, whose functions can do anything."""
    for package in trust:
        if package.split(".")[0] in sys.stdlib_module_names:
            raise BadFile(
                f"trust {package}: it is part of Python's standard library, whose functions can "
                "run anything. Trust the package that defines the model's classes."
            )


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for one-line reports."""
    return next(iter(str(error).splitlines()), "no message")


def _is_archive(file: str | Path | io.BytesIO) -> bool:
    if isinstance(file, io.BytesIO):
        return file.getvalue()[:4] == b"PK\x03\x04"
    with open(file, "rb") as stream:
        return stream.read(4) == b"PK\x03\x04"


def _cause(error: Exception) -> str:
    """Why a pickle did not load, in one line."""
    message = str(error)
    if "Unsupported global" in message or "is blocked" in message:
        return (
            "an old file (torch before 1.6) that holds more than tensors. Load it in a "
            "session you trust and write it again with torch.save."
        )
    last = [line for line in message.splitlines() if line.strip() and "http" not in line]
    detail = last[-1].strip() if last else type(error).__name__
    return f"damaged, or not written by torch.save ({detail[:160]}). Write it again."


def _admitted(
    file: str | Path | io.BytesIO, where: str, trust: Sequence[str], inert: bool
) -> list[tuple[Any, str]]:
    """The allow list for one file: every global it names, resolved or refused."""
    check_trust(trust)
    follower = Follower(where)
    try:
        reader = torch._C.PyTorchFileReader(file if isinstance(file, io.BytesIO) else str(file))
        follower.follow(reader.get_record("data.pkl"))
    except BadFile:
        raise
    except Exception as error:
        raise BadFile(f"{where}: {_cause(error)}") from error
    if isinstance(file, io.BytesIO):
        file.seek(0)
    allowed: dict[str, Any] = {}
    for name in sorted(follower.names):
        if str(name) not in _tensor_names():
            allowed[str(name)] = _resolved(name, where, trust, inert)
    for name in sorted(follower.called):
        _check_called(name, allowed.get(str(name)), where, trust)
    return [(value, name) for name, value in allowed.items()]


@functools.cache
def _tensor_names() -> frozenset[str]:
    """Names the weights-only unpickler admits by itself."""
    from torch._weights_only_unpickler import _get_allowed_globals

    return frozenset(_get_allowed_globals())


def _resolved(name: Name, where: str, trust: Sequence[str], inert: bool) -> Any:
    """What a name stands for, if it is admitted."""
    found = _listed(name)
    if found is None and _is_trusted(name, trust):
        found = _lookup(name, imported(name.module, where))
        if found is None or not _is_trusted(Name(str(found.__module__), ""), trust):
            raise BadFile(
                f"{where}: {name} is no class of the trusted package. "
                "The file does not fit the installed version."
            )
    if found is None and inert and name.module not in _BLOCKED:
        found = _plain_dict if str(name) == "collections.defaultdict" else _Inert
    if found is None:
        raise BadFile(f"{where}: {_refusal(name)}")
    return found


def _listed(name: Name) -> Any:
    """The object of a name on the list, else None."""
    if str(name) in _STAND_INS:
        return _STAND_INS[str(name)]
    if name.module in ("torch.nn.functional", "torch._C._nn"):
        return getattr(nn.functional, name.qualname) if name.qualname in _ACTIVATIONS else None
    if str(name) not in _LISTED and not (_within(name.module, _PACKAGES)):
        return None
    if _within(name.module, _NEVER):
        return None
    try:
        found = _lookup(name, import_module(name.module))
    except ImportError:
        return None
    if str(name) in _LISTED:
        return found
    is_module = inspect.isclass(found) and issubclass(found, nn.Module)
    unsafe = (torch.fx.GraphModule, torch.jit.ScriptModule)
    return found if is_module and not issubclass(found, unsafe) else None


def _lookup(name: Name, module: ModuleType) -> Any:
    """`module.qualname` where that is defined in `module` itself, else None."""
    found: Any = module
    for part in name.qualname.split("."):
        found = getattr(found, part, None)
    if getattr(found, "__module__", None) != name.module or isinstance(found, ModuleType):
        return None
    return found


def _within(module: str, packages: Sequence[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def _is_trusted(name: Name, trust: Sequence[str]) -> bool:
    return name.module not in _BLOCKED and _within(name.module, trust)


def _refusal(name: Name) -> str:
    package = name.module.split(".")[0]
    if package in sys.stdlib_module_names:
        return (
            f"refers to {name}, which could run code; nothing was run. "
            "If the file is yours, rebuild the model from its class and a state_dict (--arch)."
        )
    return (
        f"holds {name}, which is none of the module classes of torch.nn, torchvision and timm. "
        f'If you trust that code, add --trust {package} (in Python trust=["{package}"]); '
        "if only the weights matter, add --arch."
    )


def _check_called(name: Name, found: Any, where: str, trust: Sequence[str]) -> None:
    """Refuse a pickle that calls a class or function which may only be referred to."""
    plain = str(name) in _CALLABLE or str(name).startswith(REBUILDS)
    data = found in (_Inert, _plain_dict) or (
        inspect.isclass(found) and issubclass(found, enum.Enum)
    )
    if not (plain or data or _is_trusted(name, trust)):
        raise BadFile(
            f"{where}: calls {name} while loading, which torch.save never asks for. Refused."
        )


class _TorchFunctions:
    """In place of torch's own function table, from which pickles fetch torch.relu."""


def _fetched(owner: Any, name: str) -> Callable[..., Any]:
    """In place of `getattr`: an activation, or a module's bound forward (timm's FasterNet)."""
    if owner is _TorchFunctions and name in _ACTIVATIONS:
        return getattr(torch, name)  # type: ignore[no-any-return]
    method = getattr(type(owner), name, None)
    if not isinstance(owner, nn.Module) or not name.startswith("forward"):
        raise BadFile(f"{name!r} of {type(owner).__name__} is no forward method of a module")
    if not inspect.isfunction(method):
        raise BadFile(f"{name!r} of {type(owner).__name__} is no method")
    return MethodType(method, owner)


_STAND_INS: dict[str, Any] = {
    "builtins.getattr": _fetched,
    "torch._C._VariableFunctionsClass": _TorchFunctions,
}


def _plain_dict(*args: Any) -> dict[Any, Any]:
    return {}
