"""Raw gates to weights in registers, and the lists of vectors that the kernels are written in.

A list here is a list of tensors over the lanes of one program, known in length when the kernel is compiled: a row of
M + 1 raw gates, a state of M components. Nothing is ever indexed while a kernel runs. In triton a comprehension leaks
its variable, which may not change its dtype in a loop: hence the small functions of lists here.
"""

# mypy: ignore-errors, because what triton compiles is no Python
# ruff: noqa: RUF005, SIM108 (triton compiles no `[*x, y]`, and no list in a conditional expression)

import triton
import triton.language as tl
from triton.language.target_info import is_cuda

from statemix.gates import RELU_FLOOR

_RELU_FLOOR = tl.constexpr(RELU_FLOOR)
_TINY = tl.constexpr(1.1754943508222875e-38)  # the smallest normal float32
_LOG2_E = tl.constexpr(1.4426950408889634)
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # which runs no machine code


@triton.jit
def _exp(x):
    """e^x, on NVIDIA cards in one instruction, which gives 0 for what is below the normal numbers."""
    if _INTERPRETED or not is_cuda():
        return tl.exp(x)
    else:
        code: tl.constexpr = "ex2.approx.ftz.f32 $0, $1;"
        return tl.inline_asm_elementwise(code, "=f,f", [x * _LOG2_E], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _inverse(x):
    """1 / x for a normal x, on NVIDIA cards in one instruction, which gives 0 for what is below the normal numbers."""
    if _INTERPRETED or not is_cuda():
        return 1.0 / x
    else:
        code: tl.constexpr = "rcp.approx.ftz.f32 $0, $1;"
        return tl.inline_asm_elementwise(code, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def total_of(x, COUNT: tl.constexpr):
    """x[0] + ... + x[COUNT - 1]."""
    total = x[0]
    for j in tl.static_range(1, COUNT):
        total += x[j]
    return total


@triton.jit
def sigmoid_of(z):
    """1 / (1 + e^-z) and one minus it, each without cancellation."""
    e = tl.exp(-z)
    s = 1.0 / (1.0 + e)
    return s, tl.where(z > 0, e * s, 1.0 - s)


@triton.jit
def tanh_of(z):
    """tanh, by its series (Cephes) where 1 - e^-2|z| would cancel."""
    square, e = z * z, tl.exp(-2.0 * tl.abs(z))
    series = -5.70498872745e-3 * square + 2.06390887954e-2
    series = (series * square - 5.37397155531e-2) * square + 1.33314422036e-1
    small = (series * square - 3.33332819422e-1) * square * z + z
    large = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(z) < 0.625, small, tl.where(z < 0, -large, large))


@triton.jit
def weigh(z, COUNT: tl.constexpr, NORMALIZATION: tl.constexpr, SLOPES: tl.constexpr):
    """Weights p = f(z) / S of a row with S = sum |f(z)|; if SLOPES also d = f'(z) / S and g = sign(f(z)), else p again.

    They are what `statemix.gates.normalize` computes, zero rows and far-out gates too: tests/test_gpu.py.
    """
    if NORMALIZATION == "none":
        one = tl.full(z[0].shape, 1.0, tl.float32)
        return z, [one for x in z], [0.0 * one for x in z]
    if NORMALIZATION == "softmax" or NORMALIZATION == "sigmoid":
        peak = z[0]
        for j in tl.static_range(1, COUNT):
            peak = tl.maximum(peak, z[j])
    f, slopes = [], []
    if NORMALIZATION == "softmax":
        f = [_exp(x - peak) for x in z]
        slopes = f
    elif NORMALIZATION == "sigmoid":
        # below -80 the sigmoid is exp to the last bit, and a row of exp may be shifted
        shift = tl.maximum(-80.0 - peak, 0.0)
        for j in tl.static_range(COUNT):
            s, complement = sigmoid_of(z[j] + shift)
            f = f + [s]
            slopes = slopes + [s * complement]
    elif NORMALIZATION == "relu":
        f = [tl.where(x < 0, 0.0, x) for x in z]
        slopes = [tl.where(x > 0, 1.0, 0.0) for x in z]
    elif NORMALIZATION == "tanh":
        f = [tanh_of(x) for x in z]
        slopes = [1.0 - x * x for x in f]
    elif NORMALIZATION == "silu":
        for j in tl.static_range(COUNT):
            s, complement = sigmoid_of(z[j])
            f = f + [z[j] * s]
            slopes = slopes + [s * (1.0 + z[j] * complement)]
    else:
        tl.static_assert(NORMALIZATION == "linear")
        f = z
        slopes = [tl.full(x.shape, 1.0, tl.float32) for x in z]

    SIGNED: tl.constexpr = NORMALIZATION == "tanh" or NORMALIZATION == "silu" or NORMALIZATION == "linear"
    if SIGNED:
        total = total_of([tl.abs(x) for x in f], COUNT)
    else:
        total = total_of(f, COUNT)
    if NORMALIZATION == "relu":
        total += _RELU_FLOOR * COUNT
    if NORMALIZATION == "softmax":
        inverse = _inverse(total)  # of 1 to COUNT
    else:
        inverse = 1.0 / tl.where(total < _TINY, 1.0, total)
    p = [x * inverse for x in f]
    if not SLOPES:
        return p, p, p
    if SIGNED:
        signs = [tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0)) for x in f]
    else:
        signs = [tl.full(x.shape, 1.0, tl.float32) for x in f]
    return p, [x * inverse for x in slopes], signs


@triton.jit
def as_float(x):
    """The list in float32."""
    return [y.to(tl.float32) for y in x]


@triton.jit
def where_all(condition, x, y, COUNT: tl.constexpr):
    """A list that is x where the condition holds, and y elsewhere."""
    chosen = []
    for i in tl.static_range(COUNT):
        chosen = chosen + [tl.where(condition, x[i], y[i])]
    return chosen


@triton.jit
def cleared(condition, x):
    """A list of zeros where the condition holds, and x elsewhere."""
    return [tl.where(condition, 0.0, y) for y in x]


@triton.jit
def load_list(at, stride, mask, COUNT: tl.constexpr):
    """COUNT vectors `stride` apart, as float32, zero outside the mask."""
    x = []
    for i in tl.static_range(COUNT):
        x = x + [tl.load(at + i * stride, mask=mask, other=0.0).to(tl.float32)]
    return x


@triton.jit
def store_list(at, stride, mask, x, COUNT: tl.constexpr):
    """Store COUNT vectors `stride` apart."""
    for i in tl.static_range(COUNT):
        tl.store(at + i * stride, x[i].to(at.dtype.element_ty), mask=mask)
