"""The sparse path on the GPU, in Triton: the three sparse products, and Adam row by row.

Import this only where there is a GPU, or with TRITON_INTERPRET=1 set before: Triton is not needed otherwise. The plain twins
are in `saelib.kernels`. Every function is deterministic: no atomics. Indices are trusted to be in range, because checking
them would wait for the device. Bytes and operations are counted for B tokens, n latents, k of them active, and d dimensions;
a gathered row counts each time that it is read, though the L2 cache answers most of that.
"""
import math
import os
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelib.checks import require

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CHUNK = 16 if INTERPRETED else 64  # pairs of one latent that one program adds up
ROWS, COLUMNS = 4, 256  # of what a program gathers at once; it is one warp, which waits for no other and keeps 16 bytes a lane on their way


def block(size: int, on_gpu: int, interpreted: int = 16) -> int:
    """The least power of two that covers `size`, up to a limit; a low one in the interpreter, so that loops go round."""
    return min(triton.next_power_of_2(size), interpreted if INTERPRETED else on_gpu)


@triton.jit
@no_type_check
def _dot(tokens, indices, rows, out, k, d, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    """Some of one token's products."""
    token, slot = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    row = tl.load(indices + token * k + slot, mask=slot < k, other=0).to(tl.int64)
    total = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    for start in range(0, d, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        own = tl.load(tokens + token * d + column, mask=column < d, other=0.0).to(tl.float32)
        other = tl.load(rows + row[:, None] * d + column[None, :], mask=(slot < k)[:, None] & (column < d)[None, :], other=0.0)
        total += own[None, :] * other.to(tl.float32)
    tl.store(out + token * k + slot, tl.sum(total, 1), mask=slot < k)


def dot(tokens: Float[Tensor, "batch d"], indices: Int[Tensor, "batch k"], rows: Float[Tensor, "n_latents d"]) -> Float[Tensor, "batch k"]:
    """out_bj = <tokens_b, rows[indices_bj]>, summed in fp32. Twin: `Active.dot`.

    Bytes: s B k d + 4 B (d + 2 k), the rows gathered, s bytes a number. Operations: 2 B k d.
    """
    (batch, k), d = indices.shape, rows.shape[1]
    require(tokens.shape == (batch, d), "tokens", list(tokens.shape), f"[{batch}, {d}], as indices and rows are")
    out, size = torch.empty(batch, k, device=rows.device), block(k, ROWS, 4)
    _dot[(batch, triton.cdiv(k, size))](tokens.contiguous(), indices.contiguous(), rows.contiguous(), out, k, d, size, block(d, COLUMNS), num_warps=1)
    return out


@triton.jit
@no_type_check
def _add_rows(total, weight, values, order, picks, rows, first, last, d, column, ORDERED: tl.constexpr, BLOCK_P: tl.constexpr):
    """total plus Σ_p values_p rows[picks_p] and weight plus Σ_p values_p, p from `first` to `last`; ORDERED: the values are those of order_p."""
    for start in range(first, last, BLOCK_P):
        pair = start + tl.arange(0, BLOCK_P)
        pick = tl.load(picks + pair, mask=pair < last, other=0).to(tl.int64)
        source = tl.load(order + pair, mask=pair < last, other=0) if ORDERED else pair
        value = tl.load(values + source, mask=pair < last, other=0.0).to(tl.float32)
        row = tl.load(rows + pick[:, None] * d + column[None, :], mask=(pair < last)[:, None] & (column < d)[None, :], other=0.0)
        total += value[:, None] * row.to(tl.float32)
        weight += value
    return total, weight


@triton.jit
@no_type_check
def _decode(values, indices, rows, bias, out, k, d, BIASED: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    """One block of one token. Tokens vary fastest, so that all read the same columns of `rows`, few enough for the L2."""
    token, column = tl.program_id(0), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total, weight = tl.zeros((BLOCK_P, BLOCK_D), tl.float32), tl.zeros((BLOCK_P,), tl.float32)
    total, _ = _add_rows(total, weight, values, values, indices, rows, token * k, token * k + k, d, column, False, BLOCK_P)
    total = tl.sum(total, 0)
    if BIASED:
        total += tl.load(bias + column, mask=column < d, other=0.0)
    tl.store(out + token.to(tl.int64) * d + column, total, mask=column < d)


def decode(values: Float[Tensor, "batch k"], indices: Int[Tensor, "batch k"], rows: Float[Tensor, "n_latents d"],
           bias: Float[Tensor, " d"] | None = None) -> Float[Tensor, "batch d"]:
    """out_b = Σ_j values_bj rows[indices_bj] + bias, summed in fp32. Twin: `Active.decode`.

    Bytes: s B k d + 4 B (d + 2 k), the rows gathered, s bytes a number. Operations: 2 B k d.
    """
    (batch, k), d = indices.shape, rows.shape[1]
    require(values.shape == (batch, k), "values", list(values.shape), f"{[batch, k]}, as indices is")
    out, size = torch.empty(batch, d, device=rows.device), block(d, COLUMNS)
    _decode[(batch, triton.cdiv(d, size))](values.contiguous(), indices.contiguous(), rows.contiguous(), values if bias is None else bias.contiguous(),
                                           out, k, d, bias is not None, block(k, ROWS, 4), size, num_warps=1)
    return out


def group_by_latent(indices: Int[Tensor, "batch k"],
                    n_latents: int) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"], Int[Tensor, " n_starts"], Int[Tensor, " pairs"]]:
    """The pairs in order of latent, and of token within one: order, tokens (int32), starts (int32, n_latents + 1 with the end), latents.

    Never waits for the device, as `torch.bincount` does. Bytes: two or four passes of a radix sort over 10 B k. Twin: `Active.by_latent`.
    """
    flat, k = indices.reshape(-1), indices.shape[1]
    latents, order = torch.sort(flat.to(torch.int16) if n_latents <= 2**15 else flat, stable=True)
    starts = torch.searchsorted(latents.int(), torch.arange(n_latents + 1, dtype=torch.int32, device=flat.device), out_int32=True)
    return order, (order // k).int(), starts, latents


@triton.jit
@no_type_check
def _fired(values, indices, out, n_pairs, BLOCK: tl.constexpr):
    """Marks the latents of some of the pairs. Programs that mark the same one write the same."""
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    fires = tl.load(values + pair, mask=pair < n_pairs, other=0.0) > 0
    tl.store(out + tl.load(indices + pair, mask=fires, other=0), fires.to(tl.int8), mask=fires)


def fired(values: Float[Tensor, "batch k"], indices: Int[Tensor, "batch k"], n_latents: int) -> Bool[Tensor, " n_latents"]:
    """Which latents have a positive value for any token. Twin: `Active.fired`. Bytes: 8 B k + n."""
    out, size = torch.zeros(n_latents, dtype=torch.int8, device=values.device), block(values.numel(), 1024)
    _fired[(triton.cdiv(values.numel(), size),)](values.contiguous(), indices.contiguous(), out, values.numel(), size)
    return out.bool()


@triton.jit
@no_type_check
def _whole_chunks(order, token_of, latents, values, tokens, starts, sums, weights, d, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    """The sum over one chunk of pairs, where all of them are of one latent."""
    chunk, column = tl.program_id(0), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    end = chunk * CHUNK + CHUNK
    if tl.load(latents + end - 1) == tl.load(latents + end - CHUNK):
        total, weight = tl.zeros((BLOCK_P, BLOCK_D), tl.float32), tl.zeros((BLOCK_P,), tl.float32)
        total, weight = _add_rows(total, weight, values, order, token_of, tokens, end - CHUNK, end, d, column, True, BLOCK_P)
        tl.store(sums + chunk.to(tl.int64) * d + column, tl.sum(total, 0), mask=column < d)
        tl.store(weights + chunk, tl.sum(weight, 0), mask=tl.program_id(1) == 0)


@triton.jit
@no_type_check
def _sum_pairs(order, token_of, values, tokens, starts, sums, weights, out, out_weights, d, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    """One block of one latent: its pairs before its first whole chunk, the sums of its whole chunks, its pairs after them."""
    latent, column = tl.program_id(0), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first, last = tl.load(starts + latent), tl.load(starts + latent + 1)
    first_chunk, last_chunk = tl.cdiv(first, CHUNK), last // CHUNK
    is_long = first_chunk < last_chunk
    total, weight = tl.zeros((BLOCK_P, BLOCK_D), tl.float32), tl.zeros((BLOCK_P,), tl.float32)
    head, tail = tl.where(is_long, first_chunk * CHUNK, last), tl.where(is_long, last_chunk * CHUNK, last)
    total, weight = _add_rows(total, weight, values, order, token_of, tokens, first, head, d, column, True, BLOCK_P)
    for start in range(first_chunk, last_chunk, BLOCK_P):
        chunk = start + tl.arange(0, BLOCK_P)
        total += tl.load(sums + chunk[:, None].to(tl.int64) * d + column[None, :],
                         mask=(chunk < last_chunk)[:, None] & (column < d)[None, :], other=0.0)
        weight += tl.load(weights + chunk, mask=chunk < last_chunk, other=0.0)
    total, weight = _add_rows(total, weight, values, order, token_of, tokens, tail, last, d, column, True, BLOCK_P)
    tl.store(out + latent.to(tl.int64) * d + column, tl.sum(total, 0), mask=column < d)
    tl.store(out_weights + latent, tl.sum(weight, 0), mask=tl.program_id(1) == 0)


def sum_pairs(order: Int[Tensor, " pairs"], token_of: Int[Tensor, " pairs"], starts: Int[Tensor, " n_starts"], latents: Int[Tensor, " pairs"],
              values: Float[Tensor, "batch k"],
              tokens: Float[Tensor, "batch d"], n_latents: int) -> tuple[Float[Tensor, "n_latents d"], Float[Tensor, " n_latents"]]:
    """Σ values_p tokens[token_of_p] and Σ values_p over the pairs p of each latent, summed in fp32. Twin: `Active.sum_pairs`.

    Load balance: some latents fire for half of the tokens and many for none. The grouped pairs are cut into chunks of `CHUNK`
    wherever latents begin. A first launch adds up the chunks that belong to one latent alone; a second has a program for each
    latent, which adds those sums and fewer than 2 `CHUNK` pairs. So no program adds more than 2 `CHUNK` + B / `CHUNK` rows.

    Args:
        order, token_of, starts, latents: from `group_by_latent`.
        values: of the pairs, in the order of the tokens.
        tokens: one row a token.
        n_latents: rows of the results; those of latents without a pair are 0.

    Bytes: s B k d + 4 (4 B k + n d), the tokens gathered, s bytes a number. Operations: 2 B k d.
    """
    n_pairs, d = len(order), tokens.shape[1]
    require(values.numel() == n_pairs, "values", list(values.shape), f"{n_pairs} values, as order has")
    require(len(starts) == n_latents + 1, "starts", len(starts), f"{n_latents + 1} numbers")
    starts, values, tokens = starts.contiguous(), values.contiguous(), tokens.contiguous()
    n_chunks, size, picks = n_pairs // CHUNK, block(d, COLUMNS), block(CHUNK, ROWS, 4)
    sums, weights = torch.empty(n_chunks, d, device=tokens.device), torch.empty(n_chunks, device=tokens.device)
    out, out_weights = torch.empty(n_latents, d, device=tokens.device), torch.empty(n_latents, device=tokens.device)
    shape = d, CHUNK, picks, size
    if n_chunks:
        _whole_chunks[(n_chunks, triton.cdiv(d, size))](order, token_of, latents, values, tokens, starts, sums, weights, *shape, num_warps=1)
    _sum_pairs[(n_latents, triton.cdiv(d, size))](order, token_of, values, tokens, starts, sums, weights, out, out_weights, *shape, num_warps=1)
    return out, out_weights


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
    """A vector as a matrix, for the functions that go row by row."""
    return tensor if tensor.dim() == 2 else tensor.view(-1, math.gcd(len(tensor), 1024))


def square_norm(grad: Float[Tensor, "n_latents d"], rows: Float[Tensor, "n_latents d"], unit: bool) -> Float[Tensor, ""]:
    """‖t‖², the squared norm of what `adam_rows` will use of `grad`, for the global norm: t = g, or g_i - <g_i, w_i> w_i for unit rows.

    Bytes: 4 n d, or 8 n d for unit rows. Operations: 2 n d, or 6 n d.
    """
    require(grad.is_contiguous() and rows.is_contiguous(), "grad and rows", "strided", "contiguous")
    out = torch.empty(len(rows), device=rows.device)
    _square_norms[(len(rows),)](grad, rows, out, rows.shape[1], unit, triton.next_power_of_2(rows.shape[1]))
    return out.sum()


@triton.jit
@no_type_check
def _adam_rows(rows, grad, m, v, clip, factors, d, beta1, rest1, beta2, rest2, eps, tiny, UNIT: tl.constexpr, BLOCK_D: tl.constexpr):
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


@torch.no_grad()
def adam_rows(rows: Float[Tensor, "n_latents d"], grad: Float[Tensor, "n_latents d"], m: Float[Tensor, "n_latents d"],
              v: Float[Tensor, "n_latents d"], clip: Float[Tensor, ""], factors: Float[Tensor, "2"], *, beta1: float,
              beta2: float, eps: float, unit: bool) -> None:
    """One step of Adam in place on `rows`, `m` and `v`, in one pass: tangent gradient, clipping, Adam and unit norm.

    t = clip (g - <g, w> w);  m <- β1 m + (1 - β1) t;  v <- β2 v + (1 - β2) t²;  w <- w - lr m̂ / (√v̂ + eps);  w <- w / ‖w‖

    Args:
        rows, grad, m, v: float32, contiguous; `grad` is left as it is.
        clip: what multiplies the gradient, min(1, 1 / global norm), where it was computed (see `square_norm`).
        factors: from `adam_factors`.
        unit: whether the rows have unit norm and keep it. If not, t = clip g, and the last step is left out.

    Bytes: 28 n d. Operations: 20 n d.
    Paper: Appendix A.1
    """
    for name, tensor in {"rows": rows, "grad": grad, "m": m, "v": v}.items():
        require(tensor.is_contiguous() and tensor.dtype == torch.float32, name, f"{tensor.dtype} with strides {tensor.stride()}",
                "float32 and contiguous")
    n, d = rows.shape
    _adam_rows[(n,)](rows, grad, m, v, clip, factors, d, beta1, 1 - beta1, beta2, 1 - beta2, eps, torch.finfo(torch.float32).tiny, unit,
                     triton.next_power_of_2(d), num_warps=8)


def adam_factors(lr: Float[Tensor, ""], step: Float[Tensor, ""], beta1: float, beta2: float) -> Float[Tensor, "2"]:
    """lr / (1 - β1^step) and √(1 - β2^step): what corrects the moments for their start at 0. `step` counts from 1."""
    step = step.double()
    return torch.stack([lr / (1 - beta1**step), (1 - beta2**step).sqrt()]).float()
