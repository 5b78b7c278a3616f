"""Adam row by row on the GPU, in Triton: gradient, clipping, step and unit norm in one pass over a matrix.

Import this only where there is a GPU, or with TRITON_INTERPRET=1 set before. The plain twin is `loop.Loop.update` on a
CPU. Every function is deterministic. Bytes and operations are counted for n rows of d numbers.
"""
import math
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from saelib.checks import require


@triton.jit
@no_type_check
def _gradient(grad, rows, d, row, column, UNIT: tl.constexpr):
    """One row, and its gradient; UNIT: without the part parallel to the row."""
    place = row.to(tl.int64) * d + column
    own, slope = tl.load(rows + place, mask=column < d, other=0.0), tl.load(grad + place, mask=column < d, other=0.0)
    if UNIT:
        slope -= tl.sum(slope * own, 0) * own
    return place, own, slope


@triton.jit
@no_type_check
def _square_norms(grad, rows, out, d, UNIT: tl.constexpr, BLOCK_D: tl.constexpr):
    """The squared norm of one row's gradient."""
    row, column = tl.program_id(0), tl.arange(0, BLOCK_D)
    _, _, slope = _gradient(grad, rows, d, row, column, UNIT)
    tl.store(out + row, tl.sum(slope * slope, 0))


def in_rows(tensor: Tensor) -> Tensor:
    """A vector, or a number, as a matrix, for the functions that go row by row."""
    return tensor if tensor.dim() == 2 else tensor.view(-1, math.gcd(tensor.numel(), 1024))


def square_norm(grad: Float[Tensor, "n_latents d"], rows: Float[Tensor, "n_latents d"],
                unit: bool) -> Float[Tensor, ""]:
    """‖t‖², the squared norm of what `adam_rows` will use of `grad`, for the global norm: t = g, or g_i - <g_i, w_i>
    w_i for unit rows.

    Bytes: 4 n d, or 8 n d for unit rows. Operations: 2 n d, or 6 n d.
    """
    require(grad.is_contiguous() and rows.is_contiguous(), "grad and rows", "strided", "contiguous")
    out = torch.empty(len(rows), device=rows.device)
    _square_norms[(len(rows),)](grad, rows, out, rows.shape[1], unit, triton.next_power_of_2(rows.shape[1]))
    return out.sum()


@triton.jit
@no_type_check
def _adam_rows(rows, grad, m, v, copy, clip, factors, d, beta1, rest1, beta2, rest2, eps, tiny, UNIT: tl.constexpr,
               COPY: tl.constexpr, BLOCK_D: tl.constexpr):
    """One row."""
    step_size, root = tl.load(factors), tl.load(factors + 1)
    row, column = tl.program_id(0), tl.arange(0, BLOCK_D)
    place, own, slope = _gradient(grad, rows, d, row, column, UNIT)
    slope *= tl.load(clip)
    mean = beta1 * tl.load(m + place, mask=column < d, other=0.0) + rest1 * slope
    square = beta2 * tl.load(v + place, mask=column < d, other=0.0) + rest2 * slope * slope
    own -= step_size * mean / (tl.sqrt(square) / root + eps)
    if UNIT:
        own = tl.where(column < d, own, 0.0)
        own /= tl.maximum(tl.sqrt(tl.sum(own * own, 0)), tiny)
    tl.store(m + place, mean, mask=column < d)
    tl.store(v + place, square, mask=column < d)
    tl.store(rows + place, own, mask=column < d)
    if COPY:
        tl.store(copy + place, own.to(copy.dtype.element_ty), mask=column < d)


@torch.no_grad()
def adam_rows(rows: Float[Tensor, "n_latents d"], grad: Float[Tensor, "n_latents d"], m: Float[Tensor, "n_latents d"],
              v: Float[Tensor, "n_latents d"], clip: Float[Tensor, ""], factors: Float[Tensor, "2"], *, beta1: float,
              beta2: float, eps: float, unit: bool, copy: Float[Tensor, "n_latents d"] | None = None) -> None:
    """One step of Adam in place on `rows`, `m` and `v`, in one pass: tangent gradient, clipping, Adam and unit norm.

    t = clip (g - <g, w> w);  m <- β1 m + (1 - β1) t;  v <- β2 v + (1 - β2) t²;
    w <- w - lr m̂ / (√v̂ + eps);  w <- w / ‖w‖

    Args:
        rows, grad, m, v: float32, contiguous; `grad` is left as it is.
        clip: what multiplies the gradient, min(1, 1 / global norm), where it was computed (see `square_norm`).
        factors: from `adam_factors`.
        unit: whether the rows have unit norm and keep it. If not, t = clip g, and the last step is left out.
        copy: becomes what the rows become, in its own type.

    Bytes: 28 n d, and 2 n d for a copy in bfloat16. Operations: 20 n d.
    Paper: Appendix A.1
    """
    require(copy is None or copy.is_contiguous() and copy.shape == rows.shape, "copy", copy, "contiguous, as rows are")
    for name, tensor in {"rows": rows, "grad": grad, "m": m, "v": v}.items():
        require(tensor.is_contiguous() and tensor.dtype == torch.float32, name,
                f"{tensor.dtype} with strides {tensor.stride()}", "float32 and contiguous")
    n, d = rows.shape
    _adam_rows[(n,)](rows, grad, m, v, rows if copy is None else copy, clip, factors, d, beta1, 1 - beta1, beta2,
                     1 - beta2, eps, torch.finfo(torch.float32).tiny, unit, copy is not None, triton.next_power_of_2(d),
                     num_warps=8)


def adam_factors(lr: Float[Tensor, ""], step: Float[Tensor, ""], beta1: float, beta2: float) -> Float[Tensor, "2"]:
    """lr / (1 - β1^step) and √(1 - β2^step): what corrects the moments for their start at 0. `step` counts from 1."""
    step = step.double()
    return torch.stack([lr / (1 - beta1**step), (1 - beta2**step).sqrt()]).float()
