"""What each operation does with a dimension of its operands: keeps its indices apart or mixes them.

A product of matrices keeps its rows apart, a softmax all dimensions but its own; an operation that
is not known is taken to mix them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


class Mixed(Exception):
    """The indices are not kept apart; the message says by what."""


class Coarser(Exception):
    """They are where blocks of them are taken together: `factor` times as many as tried."""

    def __init__(self, factor: int) -> None:
        super().__init__(factor)
        self.factor = factor


class Label(NamedTuple):
    """Where the followed indices are in a tensor: its dimension `dim` is (outer, index, inner)."""

    dim: int
    outer: int
    inner: int


class Call(NamedTuple):
    """One operation, as a rule sees it.

    Attributes:
        name: Of the operation.
        given: Its arguments by the names of its schema.
        labels: Of all tensors among them that have one.
        result: What it gave.
        length: How many indices are followed.
    """

    name: str
    given: dict[str, Any]
    labels: Callable[[Any], Label | None]
    result: Any
    length: int

    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments."""
        return [leaf for leaf in tree_leaves(self.given) if isinstance(leaf, Tensor)]

    def only(self, name: str) -> Label:
        """The label of one argument, where no other has one."""
        own = self.labels(self.given[name])
        others = [t for t in self.tensors() if t is not self.given[name] and self.labels(t)]
        if own is None or others:
            raise Mixed(f"{self.name} brings two parts of the stream together")
        return own

    def mixed(self, how: str = "mixes") -> Mixed:
        """That this operation mixes what is followed."""
        shapes = ", ".join(str(list(t.shape)) for t in self.tensors())
        return Mixed(f"{self.name} of {shapes} {how} what would be cut")


Labels = Label | None | tuple["Label | None", ...]
Rule = Callable[[Call], Labels]


# ---- rules -------------------------------------------------------------------------------


def _aligned(call: Call, result: Tensor, tensors: Sequence[Tensor]) -> Label | None:
    """Of a result to which tensors are broadcast."""
    labels = ((call.labels(tensor), tensor.dim()) for tensor in tensors)
    moved = (a._replace(dim=a.dim - dims + result.dim()) for a, dims in labels if a is not None)
    found = next(moved, None)
    if found is not None:
        for tensor in tensors:
            _with(call, found, tensor, result)
    return found


def pointwise(call: Call) -> Labels:
    """Element by element, operands broadcast; several results are laid out alike."""
    tensors = call.tensors()
    if isinstance(call.result, Tensor):
        return _aligned(call, call.result, tensors)
    return tuple(_aligned(call, result, tensors) for result in call.result)


def _viewed(call: Call) -> Labels:
    """The same elements in the same order under another shape."""
    label, shape = call.only("self"), call.given["self"].shape
    step = label.inner * math.prod(shape[label.dim + 1 :])
    for factor in (f for f in range(1, call.length) if call.length % f == 0):
        found = _placed(call.result.shape, step * factor, call.length // factor)
        if found is not None and factor > 1:
            raise Coarser(factor)
        if found is not None:
            return found
    raise call.mixed()


def _placed(shape: Sequence[int], step: int, length: int) -> Label | None:
    """Where `length` indices that are `step` elements apart lie in a shape, in one dimension."""
    below = 1
    for dim in reversed(range(len(shape))):
        if step % below == 0 and (below * shape[dim]) % (step * length) == 0:
            return Label(dim, below * shape[dim] // (step * length), step // below)
        below *= shape[dim]
    return None


def _permuted(call: Call) -> Labels:
    label, dims = call.only("self"), call.given["self"].dim()
    order = [dim % dims for dim in call.given["dims"]]
    return label._replace(dim=order.index(label.dim))


def _transposed(call: Call) -> Labels:
    label, dims = call.only("self"), call.given["self"].dim()
    pair = (0, 1) if "dim0" not in call.given else (call.given["dim0"], call.given["dim1"])
    a, b = (dim % dims for dim in pair)
    return label._replace(dim={a: b, b: a}.get(label.dim, label.dim))


def _unsqueezed(call: Call) -> Labels:
    label = call.only("self")
    dim = call.given["dim"] % call.result.dim()
    return label._replace(dim=label.dim + (dim <= label.dim))


def _squeezed(call: Call) -> Labels:
    source = call.given["self"]
    label = call.only("self")
    dims = call.given.get("dim", range(source.dim()))
    dims = {d % source.dim() for d in ((dims,) if isinstance(dims, int) else dims)}
    gone = sum(d < label.dim and source.shape[d] == 1 for d in dims)
    return label._replace(dim=label.dim - gone)


def _expanded(call: Call) -> Labels:
    label = call.only("self")
    return label._replace(dim=label.dim + call.result.dim() - call.given["self"].dim())


def _sliced(call: Call) -> Labels:
    label, source = call.only("self"), call.given["self"]
    if call.result.shape[label.dim] != source.shape[label.dim]:
        raise call.mixed("takes a part of")
    return label


def _selected(call: Call) -> Labels:
    label = call.only("self")
    dim = call.given["dim"] % call.given["self"].dim()
    if dim == label.dim:
        raise call.mixed("takes a part of")
    return label._replace(dim=label.dim - (dim < label.dim))


def _split(call: Call) -> Labels:
    label = call.only("self")
    dim = call.given.get("dim", 0) % call.given["self"].dim()
    if dim == label.dim:
        raise call.mixed("takes parts of")
    if call.name.startswith("unbind"):
        label = label._replace(dim=label.dim - (dim < label.dim))
    return (label,) * len(call.result)


def _concatenated(call: Call) -> Labels:
    tensors = call.given["tensors"]
    label = next(found for found in map(call.labels, tensors) if found is not None)
    if any(call.labels(t) != label for t in tensors):
        raise call.mixed("puts other tensors beside")
    dim = call.given.get("dim", 0)
    if call.name.startswith("stack"):
        dim %= call.result.dim()
        return label._replace(dim=label.dim + (dim <= label.dim))
    if dim % tensors[0].dim() == label.dim:
        raise call.mixed("lengthens")
    return label


def _matrices(call: Call) -> Labels:
    """Products of matrices, one or many, with a summand or without."""
    left, right = (
        (call.given["mat1"], call.given["mat2"])
        if "mat1" in call.given
        else (call.given["batch1"], call.given["batch2"])
        if "batch1" in call.given
        else (call.given["self"], call.given["mat2"])
    )
    a, b, last = call.labels(left), call.labels(right), left.dim() - 1
    many = left.dim() == 3
    if a is not None and b is not None:
        if not (many and a == b and a.dim == 0):
            raise call.mixed()
        found = a
    elif a is not None and a.dim == last - 1:
        found = a
    elif b is not None and b.dim == last:
        found = b
    else:
        raise call.mixed("sums over")
    summand = call.given["self"] if left is not call.given["self"] else None
    return found if summand is None else _with(call, found, summand, call.result)


def _with(call: Call, label: Label, operand: Tensor, result: Tensor) -> Label:
    """A label of the result, and an operand that is broadcast to it: of its own or of none."""
    own = label.dim - result.dim() + operand.dim()
    theirs = call.labels(operand)
    if theirs is not None and theirs != label._replace(dim=own):
        raise call.mixed("brings together different parts of")
    if theirs is None and own >= 0 and operand.shape[own] > 1:
        raise call.mixed("reads a tensor of its own for each index of")
    return label


def _linear(call: Call) -> Labels:
    label = call.only("input")
    if label.dim == call.given["input"].dim() - 1:
        raise call.mixed("sums over")
    return label


def _convolved(call: Call) -> Labels:
    """Samples stay apart; positions do where the kernel is a single one that moves one by one."""
    label = call.only("input")
    place = label.dim - 2
    if label.dim == 0:
        return label
    if label.dim == 1 or call.given["weight"].shape[label.dim] != 1:
        raise call.mixed()
    if _of(call.given["stride"], place) != 1 or _of(call.given["padding"], place) != 0:
        raise call.mixed()
    return label


def _of(values: Any, place: int) -> Any:
    return values[place if len(values) > 1 else 0]


def _normalised(call: Call) -> Labels:
    """Over the last dimensions."""
    label = call.only("input")
    if label.dim >= call.given["input"].dim() - len(call.given["normalized_shape"]):
        raise call.mixed("normalises over")
    return (label,) * len(call.result) if isinstance(call.result, tuple) else label


def _of_samples(call: Call) -> Labels:
    """What works on one sample, its channels and positions together."""
    name = "input" if "input" in call.given else "self"
    label = call.only(name)
    if label.dim != 0:
        raise call.mixed()
    return (label,) * len(call.result) if isinstance(call.result, (tuple, list)) else label


def _batch_normalised(call: Call) -> Labels:
    label = call.only("input")
    if call.given.get("training", False) or "with_update" in call.name:
        raise call.mixed("takes statistics over")
    if label.dim == 1:
        raise call.mixed()
    return (label, *(None,) * (len(call.result) - 1))


def _over_its_dims(call: Call) -> Labels:
    """Reductions, softmax, sorting, Fourier transforms: over dimensions that they name."""
    source = call.given["self"]
    label = call.only("self")
    dims = call.given.get("dim")
    if dims is None or dims == []:
        raise call.mixed("reduces all of")
    named = {d % source.dim() for d in ((dims,) if isinstance(dims, int) else dims)}
    if label.dim in named:
        raise call.mixed()
    shape = call.result if isinstance(call.result, Tensor) else call.result[0]
    if shape.dim() < source.dim():
        label = label._replace(dim=label.dim - sum(d < label.dim for d in named))
    return label if isinstance(call.result, Tensor) else (label,) * len(call.result)


def _attention(call: Call) -> Labels:
    """softmax(q k) v: samples and heads stay apart, and queries of other keys and values."""
    q, k, v = (call.labels(call.given[name]) for name in ("query", "key", "value"))
    alone = k is None and v is None and not call.given.get("is_causal", False)
    if q is None or not ((q == k == v and q.dim < 2) or (alone and q.dim == 2)):
        raise call.mixed()
    for name in ("attn_mask", "attn_bias"):
        if call.given.get(name) is not None:
            _with(call, q, call.given[name], call.given["query"])
    return (q, q, *(None,) * (len(call.result) - 2))


def _rolled(call: Call) -> Labels:
    source = call.given["self"]
    label = call.only("self")
    dims, shifts = call.given.get("dims", []), call.given["shifts"]
    moved = {d % source.dim() for d, s in zip(dims, shifts, strict=True) if s % source.shape[d]}
    if label.dim in moved or not dims:
        raise call.mixed("moves")
    return label


def _padded(call: Call) -> Labels:
    label = call.only("self")
    last = 2 * (call.result.dim() - 1 - label.dim)  # pads begin with the last dimension
    if any(call.given["pad"][last : last + 2]):
        raise call.mixed("pads")
    return label


def _indexed(call: Call) -> Labels:
    """Taking indices of one other dimension."""
    label, indices = call.only("self"), call.given["indices"]
    used = [dim for dim, index in enumerate(indices) if index is not None]
    if len(used) != 1 or label.dim in used or indices[used[0]].dtype == torch.bool:
        raise call.mixed("takes single indices of")
    return label._replace(dim=label.dim + (used[0] < label.dim) * (indices[used[0]].dim() - 1))


def _rules() -> dict[str, Rule]:
    groups: dict[Rule, str] = {
        pointwise: """clone _to_copy copy_ copy native_dropout bernoulli_ bernoulli lift_fresh
            detach alias where masked_fill fill_ zero_ contiguous _conj_physical empty_like
            zeros_like ones_like rand_like randn_like full_like dropout normal_ uniform_ glu_""",
        _viewed: "view _unsafe_view reshape _reshape_alias",
        _permuted: "permute",
        _transposed: "transpose t",
        _unsqueezed: "unsqueeze",
        _squeezed: "squeeze",
        _expanded: "expand",
        _sliced: "slice narrow",
        _selected: "select",
        _split: "split split_with_sizes unbind chunk unsafe_split unsafe_chunk",
        _concatenated: "cat stack",
        _matrices: "mm bmm addmm baddbmm",
        _linear: "linear",
        _convolved: "convolution",
        _normalised: "native_layer_norm _fused_rms_norm rms_norm",
        _of_samples: """native_group_norm max_pool2d_with_indices max_pool3d_with_indices
            avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d upsample_nearest2d
            upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d pixel_shuffle
            pixel_unshuffle reflection_pad2d replication_pad2d""",
        _batch_normalised: """native_batch_norm _native_batch_norm_legit cudnn_batch_norm
            _native_batch_norm_legit_no_training _batch_norm_no_update _batch_norm_with_update
            miopen_batch_norm""",
        _over_its_dims: """sum mean amax amin var std var_mean prod linalg_vector_norm norm
            _softmax _log_softmax cumsum cumprod logsumexp sort topk _fft_r2c _fft_c2c _fft_c2r
            any all argmax argmin flip _safe_softmax""",
        _attention: """_scaled_dot_product_flash_attention_for_cpu
            _scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention
            _scaled_dot_product_cudnn_attention _scaled_dot_product_fused_attention_overrideable""",
        _rolled: "roll",
        _padded: "constant_pad_nd",
        _indexed: "index",
    }
    return {name: rule for rule, names in groups.items() for name in names.split()}


RULES = _rules()
# These make tensors that are the same, or equally random, at every index.
UNIFORM = frozenset(
    """empty new_empty zeros new_zeros ones new_ones full new_full scalar_tensor expand rand randn
    bernoulli new_empty_strided empty_strided""".split()
)


def rule_for(func: Any) -> Rule:
    """What is known of an operation."""
    rule = RULES.get(name_of(func))
    if rule is not None:
        return rule
    if torch.Tag.pointwise in func.tags:
        return pointwise
    return _unknown


def name_of(func: Any) -> str:
    """Its name without namespace and overload."""
    return str(func._schema.name).partition("::")[2]


def _unknown(call: Call) -> Labels:
    raise Mixed(f"what {call.name} does with it is not known")
