"""The kernels compile without a GPU, and what they do are torch operators."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rewire import fused
from rewire.integers import Coefficients
from tests.test_kernels_interpreted import operands

triton = pytest.importorskip("triton")

from rewire import kernels, launching  # noqa: E402


def test_in_the_interpreter() -> None:
    """Values: see test_kernels_interpreted.py."""
    here = Path(__file__)
    tests = here.with_name("test_kernels_interpreted.py")
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "--no-header", str(tests)],
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=here.parents[1],
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout[-4000:]
    assert " passed" in found.stdout, found.stdout
    assert "skipped" not in found.stdout


# ---- operators ---------------------------------------------------------------------------


@pytest.mark.parametrize("trunk", [False, True], ids=["", "trunk"])
def test_operators_follow_torchs_rules(trunk: bool) -> None:
    """Schemas, shapes on fake tensors, and gradients, also under `torch.compile`."""
    on, (newest, older, f, t) = operands((2, 5), torch.float32, torch.float32, trunk)
    leaves = [x if x is None else x.requires_grad_() for x in (newest, older, f, t)]
    check = torch.library.opcheck
    check(torch.ops.rewire.couple.default, (*leaves, 0.5, 0.5, 1.5, on.step, on.inverse))
    check(torch.ops.rewire.merge.default, (newest, older, t))
    x, y, z, u = (v if v is None else v.detach() for v in leaves)
    out = torch.empty_like(x)
    lost = fused.pack(y, 0.5, on, 1, 0).words
    terms = (x, y, z, u, 0.5, 0.5, 1.5, on.step, on.inverse, lost, 1, 0, out)
    check(torch.ops.rewire.uncouple.default, terms)
    check(torch.ops.rewire.pack.default, (x, 0.5, on.step, on.inverse, 1, 0))
    check(torch.ops.rewire.apart.default, (x, y))


def test_the_operators_gradient_is_that_of_the_equation() -> None:
    on, leaves = operands((3, 4), torch.float64, torch.float64, True)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    newest, older, f, t = leaves
    weight = torch.randn(3, 4, dtype=torch.float64)
    value, _ = torch.ops.rewire.couple(*leaves, 0.75, 0.25, 1.25, on.step, on.inverse)
    plain = 0.75 * newest + 0.25 * older + 1.25 * (f + t - newest)
    found = torch.autograd.grad((value * weight).sum(), leaves)
    expected = torch.autograd.grad((plain * weight).sum(), leaves)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)


def _fails(*_: Any) -> Any:
    raise RuntimeError("no compiler")


def _lies(newest: Tensor, older: Tensor, *_: Any) -> Any:
    return older.clone(), older.abs().max()


@pytest.mark.parametrize(
    ("couple", "told"), [(_fails, "no compiler"), (_lies, "not those of torch")], ids=["", "wrong"]
)
def test_without_a_triton_that_works_operations_do_it(
    couple: Any, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told of once; planted."""
    for name in ("pack", "uncouple"):
        monkeypatch.setattr(launching, name, lambda *_: None)
    monkeypatch.setattr(fused, "DEVICES", {"cpu"})
    monkeypatch.setattr(launching, "couple", couple)
    fused._verdicts.clear()
    try:
        with pytest.warns(UserWarning, match=told):
            assert not fused.takes(torch.ones(2), Coefficients(0.0, 1.0, 1.0))
        assert not fused.takes(torch.ones(2))
    finally:
        fused._verdicts.clear()


# ---- compilation -------------------------------------------------------------------------

STREAMS = ("newest", "older", "newer", "out", "value", "step", "inverse", "first")
STEP = {"TRUNK": True, "A": True, "B": True, "C": True, "WHOLE": 2.0**23}
CONSTANTS: dict[str, dict[str, Any]] = {
    "couple_kernel": {**STEP, "INTEGER": None},
    "uncouple_kernel": {**STEP, "WIDTH": 3, "DOUBLE": False},
    "pack_kernel": {"WIDTH": 1, "EACH": 64, "DOUBLE": False},
    "merge_kernel": {"MEAN": True},
    "apart_kernel": {"INTEGER": None},
}
OTHERS = {"largest": "*i32", "found": "*i32", "words": "*i64", "branch": "*bf16", "trunk": "*bf16"}


@pytest.mark.parametrize("wide", [False, True], ids=["", "wide"])
@pytest.mark.parametrize("double", [False, True], ids=["fp32", "fp64"])
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("name", CONSTANTS)
def test_kernels_compile(name: str, architecture: int, double: bool, wide: bool) -> None:
    """Without a GPU; and no product is fused with a sum, which would change bits."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(kernels, name)
    constants = {**CONSTANTS[name], "BLOCK": 1024, "WIDE": wide}
    if "INTEGER" in constants:
        constants["INTEGER"] = triton.language.int64 if double else triton.language.int32
    if "DOUBLE" in constants:
        constants["DOUBLE"] = double
    types = dict.fromkeys(STREAMS, "*fp64" if double else "*fp32") | OTHERS
    if double:
        types |= {"largest": "*i64", "found": "*i64"}
    signature = {
        p.name: "constexpr"
        if p.is_constexpr
        else p.annotation_type or types.get(p.name, "i64" if wide else "i32")
        for p in kernel.params
    }
    source = ASTSource(
        kernel,
        signature,
        constexprs={(kernel.arg_names.index(n),): v for n, v in constants.items()},
    )
    target = GPUTarget("cuda", architecture, 32)
    made = triton.compile(source, target=target, options={"enable_fp_fusion": False})
    assert "fma" not in made.asm["ptx"]
    assert ".local" not in made.asm["ptx"]  # nothing spills
