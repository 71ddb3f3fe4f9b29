"""One step of the two streams on the grid as one Triton kernel each: `rewire.integers` fused.

Every kernel reads each operand once and writes each result once, in place where the caller
says so; operands are dense and laid out alike, and are gone through in the order of memory. The
values are those of `rewire.integers` bit for bit, but for the sign of a zero and the division by
a |b| that is no power of two, where torch multiplies by the reciprocal on a GPU. Compilation must
not fuse products with sums (`enable_fp_fusion=False`): backward has to find the bits of forward.
"""

# No `from __future__ import annotations`: Triton reads types of scalars from the annotations.

import triton
import triton.language as tl

# ---- parts -------------------------------------------------------------------------------


@triton.jit
def _nearest(v, WHOLE: tl.constexpr):
    """To the nearest integer, ties to even."""
    size = tl.abs(v)
    near = (size + WHOLE) - WHOLE
    return tl.where(size < WHOLE, tl.where(v < 0, -near, near), v)


@triton.jit
def _over(v, divisor, DOUBLE: tl.constexpr):
    """v / divisor, rounded correctly."""
    if DOUBLE:
        return v / divisor
    else:  # both are compiled where a return stands between them
        return tl.div_rn(v, divisor)


@triton.jit
def _guess(share, sign, size, DOUBLE: tl.constexpr):
    """The smallest x_{i-1} / g that has this share."""
    return tl.ceil(_over(share * sign, size, DOUBLE))


@triton.jit
def _places(size, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """The elements of this program, and which of them exist."""
    first = tl.program_id(0)
    if WIDE:
        first = first.to(tl.int64)
    at = first * BLOCK + tl.arange(0, BLOCK)
    return at, at < size


@triton.jit
def _change(
    at,
    inside,
    newest,
    branch,
    trunk,
    inverse,
    a,
    c,
    TRUNK: tl.constexpr,
    A: tl.constexpr,
    C: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """round((a x_i + c (F + T - x_i)) / g)."""
    total = tl.load(branch + at, inside, 0).to(inverse.dtype)
    if TRUNK or A:
        x = tl.load(newest + at, inside, 0)
    if TRUNK:
        total = total + (tl.load(trunk + at, inside, 0).to(inverse.dtype) - x)
    if C:
        total = total * tl.full((1,), c, inverse.dtype)
    if A:
        total = total + x * tl.full((1,), a, inverse.dtype)
    return _nearest(total * inverse, WHOLE)


@triton.jit
def _raise_to(largest, values, INTEGER: tl.constexpr):
    """Raise a cell to the largest absolute value: bits of floats are ordered as they are.

    NaN is larger than all.
    """
    tl.atomic_max(largest, tl.max(tl.abs(values).to(INTEGER, bitcast=True), 0), sem="relaxed")


# ---- kernels -----------------------------------------------------------------------------


@triton.jit
def couple_kernel(
    value,
    largest,
    newest,
    older,
    branch,
    trunk,
    step,
    inverse,
    size,
    a: "fp64",
    b: "fp64",
    c: "fp64",
    TRUNK: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    WHOLE: tl.constexpr,
    INTEGER: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """x_{i+1}, and its largest absolute value."""
    at, inside = _places(size, BLOCK, WIDE)
    g, per = tl.load(step), tl.load(inverse)
    change = _change(at, inside, newest, branch, trunk, per, a, c, TRUNK, A, C, WHOLE)
    x = tl.load(older + at, inside, 0)
    if B:  # b is not one
        b = tl.full((1,), b, g.dtype)
        sign = tl.where(b < 0, -1.0, 1.0).to(g.dtype)
        following = (change + tl.floor(x * per * tl.abs(b)) * sign) * g
    else:
        following = x + change * g
    tl.store(value + at, following, inside)
    _raise_to(largest, tl.where(inside, following, 0.0), INTEGER)


@triton.jit
def uncouple_kernel(
    out,
    newer,
    newest,
    branch,
    trunk,
    words,
    step,
    inverse,
    size,
    count,
    slack,
    a: "fp64",
    b: "fp64",
    c: "fp64",
    TRUNK: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    WHOLE: tl.constexpr,
    DOUBLE: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """x_{i-1}, with its digits."""
    at, inside = _places(size, BLOCK, WIDE)
    g, per = tl.load(step), tl.load(inverse)
    change = _change(at, inside, newest, branch, trunk, per, a, c, TRUNK, A, C, WHOLE)
    x = tl.load(newer + at, inside, 0)
    if B:
        b = tl.full((1,), b, g.dtype)
        sign = tl.where(b < 0, -1.0, 1.0).to(g.dtype)
        steps = _guess(x * per - change, sign, tl.abs(b), DOUBLE)
        if WIDTH > 0:
            word = tl.load(words + at % count, inside, 0)
            digit = (word >> ((at // count) * WIDTH).to(tl.int64)) & ((1 << WIDTH) - 1)
            steps = (steps - slack) + digit.to(g.dtype)
        older = steps * g
    else:
        older = x - change * g
    tl.store(out + at, older, inside)


@triton.jit
def pack_kernel(
    words,
    older,
    inverse,
    size,
    count,
    slack,
    b: "fp64",
    WIDTH: tl.constexpr,
    EACH: tl.constexpr,
    DOUBLE: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The digits of x_{i-1}: how far it is above the smallest candidate that has its share."""
    at, inside = _places(count, BLOCK, WIDE)
    per = tl.load(inverse)
    b = tl.full((1,), b, per.dtype)
    sign = tl.where(b < 0, -1.0, 1.0).to(per.dtype)
    packed = tl.zeros((BLOCK,), tl.int64)
    here = at
    # Not unrolled: at one bit that spills, and compiles for seconds.
    for place in tl.range(0, EACH):
        exists = inside & (here < size)
        steps = tl.load(older + here, exists, 0) * per
        share = tl.floor(steps * tl.abs(b)) * sign
        digit = (steps - _guess(share, sign, tl.abs(b), DOUBLE)) + slack
        bits = (digit.to(tl.int64) & ((1 << WIDTH) - 1)) << (place * WIDTH)
        packed |= tl.where(exists, bits, 0)
        here += count
    tl.store(words + at, packed, inside)


@triton.jit
def merge_kernel(
    out,
    newest,
    older,
    first,
    size,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """(x_n + x_{n-1}) / 2, or x_n + x_{n-1} - x_0."""
    at, inside = _places(size, BLOCK, WIDE)
    total = tl.load(newest + at, inside, 0) + tl.load(older + at, inside, 0)
    if MEAN:
        total = total * 0.5
    else:
        total = total - tl.load(first + at, inside, 0)
    tl.store(out + at, total, inside)


@triton.jit
def apart_kernel(
    found,
    newest,
    older,
    size,
    INTEGER: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Largest absolute value of x, and of x - y."""
    at, inside = _places(size, BLOCK, WIDE)
    x = tl.load(newest + at, inside, 0)
    _raise_to(found, x, INTEGER)
    _raise_to(found + 1, x - tl.load(older + at, inside, 0), INTEGER)
