"""The products of the sparse path on the GPU, in Triton.

Import this only where there is a GPU, or with TRITON_INTERPRET=1 set before: Triton is not needed otherwise. The stock
twins are in `saelib.pairs`. Every function is deterministic: no atomics. Indices are trusted to be in range, because
checking them would wait for the device. Bytes and operations are counted for B tokens, n latents, k of them active, and
d dimensions; a gathered row counts each time that it is read, though the L2 cache answers most of that.
"""
import os
from functools import partial
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelib.checks import require

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CHUNK = 16 if INTERPRETED else 64  # pairs of one latent that one program adds up
# of what a program gathers at once; it is one warp, which waits for no other and keeps 16 bytes a lane on their way
ROWS, COLUMNS = 4, 256


def block(size: int, on_gpu: int, interpreted: int = 16) -> int:
    """The least power of two that covers `size`, up to a limit; a low one in the interpreter, so that loops loop."""
    return min(triton.next_power_of_2(size), interpreted if INTERPRETED else on_gpu)


@triton.jit
@no_type_check
def _centre(x, bias, out, size, d, BLOCK: tl.constexpr):
    """Some numbers."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + place, mask=place < size, other=0.0) - tl.load(bias + place % d, mask=place < size, other=0.0)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=place < size)


def centre(x: Float[Tensor, "batch d"], bias: Float[Tensor, " d"], dtype: torch.dtype) -> Float[Tensor, "batch d"]:
    """x - bias, subtracted in fp32 and given as `dtype`. Bytes: (4 + s) B d."""
    out, size = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format), block(x.numel(), 1024, 64)
    _centre[(triton.cdiv(x.numel(), size),)](x.contiguous(), bias.contiguous(), out, x.numel(), x.shape[1], size)
    return out


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
        other = tl.load(rows + row[:, None] * d + column[None, :], mask=(slot < k)[:, None] & (column < d)[None, :],
                        other=0.0)
        total += own[None, :] * other.to(tl.float32)
    tl.store(out + token * k + slot, tl.sum(total, 1), mask=slot < k)


def dot(tokens: Float[Tensor, "batch d"], indices: Int[Tensor, "batch k"],
        rows: Float[Tensor, "n_latents d"]) -> Float[Tensor, "batch k"]:
    """out_bj = <tokens_b, rows[indices_bj]>, summed in fp32. Twin: `Active.dot`.

    Bytes: s B k d + 4 B (d + 2 k), the rows gathered, s bytes a number. Operations: 2 B k d.
    """
    (batch, k), d = indices.shape, rows.shape[1]
    require(tokens.shape == (batch, d), "tokens", list(tokens.shape), f"[{batch}, {d}], as indices and rows are")
    out, size = torch.empty(batch, k, device=rows.device), block(k, ROWS, 4)
    _dot[(batch, triton.cdiv(k, size))](tokens.contiguous(), indices.contiguous(), rows.contiguous(), out, k, d, size,
                                        block(d, COLUMNS), num_warps=1)
    return out


@triton.jit
@no_type_check
def _decode(values, indices, rows, bias, out, k, d, BIASED: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    """One block of one token. Tokens vary fastest: so all read the same columns of `rows`, few enough for the L2."""
    token, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for start in range(0, k, BLOCK_P):
        slot = start + tl.arange(0, BLOCK_P)
        pick = tl.load(indices + token * k + slot, mask=slot < k, other=0).to(tl.int64)
        value = tl.load(values + token * k + slot, mask=slot < k, other=0.0)
        total += value[:, None] * tl.load(rows + pick[:, None] * d + column[None, :],
                                          mask=(slot < k)[:, None] & (column < d)[None, :], other=0.0).to(tl.float32)
    total = tl.sum(total, 0)
    if BIASED:
        total += tl.load(bias + column, mask=column < d, other=0.0)
    tl.store(out + token * d + column, total, mask=column < d)


def decode(values: Float[Tensor, "batch k"], indices: Int[Tensor, "batch k"], rows: Float[Tensor, "n_latents d"],
           bias: Float[Tensor, " d"] | None = None) -> Float[Tensor, "batch d"]:
    """out_b = Σ_j values_bj rows[indices_bj] + bias, summed in fp32. Twin: `Active.decode`.

    Bytes: s B k d + 4 B (d + 2 k), the rows gathered, s bytes a number. Operations: 2 B k d.
    """
    (batch, k), d = indices.shape, rows.shape[1]
    require(values.shape == (batch, k), "values", list(values.shape), f"{[batch, k]}, as indices is")
    out, size = torch.empty(batch, d, device=rows.device), block(d, COLUMNS)
    _decode[(batch, triton.cdiv(d, size))](values.contiguous(), indices.contiguous(), rows.contiguous(),
                                           values if bias is None else bias.contiguous(),
                                           out, k, d, bias is not None, block(k, ROWS, 4), size, num_warps=1)
    return out


def group_by_latent(indices: Int[Tensor, "batch k"], n_latents: int,
                    ) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"], Int[Tensor, " n_starts"],
                               Int[Tensor, " pairs"]]:
    """The pairs in order of latent, and of token within one: order, tokens (int32), starts (int32, n_latents + 1 with
    the end), latents.

    Never waits for the device, as `torch.bincount` does. Bytes: two or four passes of a radix sort over 10 B k. Twin:
    `Active.by_latent`.
    """
    flat, k = indices.reshape(-1), indices.shape[1]
    latents, order = torch.sort(flat.to(torch.int16) if n_latents <= 2**15 else flat, stable=True)
    starts = torch.searchsorted(latents.int(), torch.arange(n_latents + 1, dtype=torch.int32, device=flat.device),
                                out_int32=True)
    return order, (order // k).int(), starts, latents


@triton.jit
@no_type_check
def _fired(values, indices, out, n_pairs, BLOCK: tl.constexpr):
    """Marks the latents of some of the pairs. Programs that mark the same one write the same."""
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    fires = tl.load(values + pair, mask=pair < n_pairs, other=0.0) > 0
    tl.store(out + tl.load(indices + pair, mask=fires, other=0), fires.to(tl.int8), mask=fires)


def fired(values: Float[Tensor, "batch k"], indices: Int[Tensor, "batch k"],
          n_latents: int) -> Bool[Tensor, " n_latents"]:
    """Which latents have a positive value for any token. Twin: `Active.fired`. Bytes: 8 B k + n."""
    out, size = torch.zeros(n_latents, dtype=torch.int8, device=values.device), block(values.numel(), 1024)
    _fired[(triton.cdiv(values.numel(), size),)](values.contiguous(), indices.contiguous(), out, values.numel(), size)
    return out.bool()


@triton.jit
@no_type_check
def _add_both(sums, order, token_of, grad, centred, values, grad_out, first, last, d, column, BLOCK_P: tl.constexpr):
    """The three sums plus Σ_p grad_p centred_p, Σ_p grad_p and Σ_p values_p grad_out_p, p from `first` to `last` in the
    order of latents."""
    enc, bias, dec = sums
    for start in range(first, last, BLOCK_P):
        pair = start + tl.arange(0, BLOCK_P)
        source, there = tl.load(order + pair, mask=pair < last, other=0), (pair < last)[:, None] & (column < d)[None, :]
        place = tl.load(token_of + pair, mask=pair < last, other=0).to(tl.int64)[:, None] * d + column[None, :]
        slope = tl.load(grad + source, mask=pair < last, other=0.0)
        value = tl.load(values + source, mask=pair < last, other=0.0)
        enc += slope[:, None] * tl.load(centred + place, mask=there, other=0.0).to(tl.float32)
        dec += value[:, None] * tl.load(grad_out + place, mask=there, other=0.0).to(tl.float32)
        bias += slope
    return enc, bias, dec


@triton.jit
@no_type_check
def _store_both(sums, out_enc, out_bias, out_dec, row, d, column):
    """One block of a row of each."""
    enc, bias, dec = sums
    place = row.to(tl.int64) * d + column
    tl.store(out_enc + place, tl.sum(enc, 0), mask=column < d)
    tl.store(out_dec + place, tl.sum(dec, 0), mask=column < d)
    tl.store(out_bias + row, tl.sum(bias, 0), mask=tl.program_id(1) == 0)


@triton.jit
@no_type_check
def _whole_chunks(order, token_of, latents, grad, centred, values, grad_out, enc, bias, dec, d,
                  CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    """The sums over one chunk of pairs, where all of them are of one latent."""
    chunk, column = tl.program_id(0), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    end = chunk * CHUNK + CHUNK
    if tl.load(latents + end - 1) == tl.load(latents + end - CHUNK):
        whole, vector = tl.zeros((BLOCK_P, BLOCK_D), tl.float32), tl.zeros((BLOCK_P,), tl.float32)
        sums = whole, vector, whole
        sums = _add_both(sums, order, token_of, grad, centred, values, grad_out, end - CHUNK, end, d, column, BLOCK_P)
        _store_both(sums, enc, bias, dec, chunk, d, column)


@triton.jit
@no_type_check
def _gradients(order, token_of, starts, grad, centred, values, grad_out, enc, bias, dec, out_enc, out_bias, out_dec, d,
               CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    """One block of one latent: its pairs before its first whole chunk, its whole chunks' sums, its pairs after them."""
    latent, column = tl.program_id(0), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first, last = tl.load(starts + latent), tl.load(starts + latent + 1)
    first_chunk, last_chunk = tl.cdiv(first, CHUNK), last // CHUNK
    is_long = first_chunk < last_chunk
    head, tail = tl.where(is_long, first_chunk * CHUNK, last), tl.where(is_long, last_chunk * CHUNK, last)
    whole, vector = tl.zeros((BLOCK_P, BLOCK_D), tl.float32), tl.zeros((BLOCK_P,), tl.float32)
    sums = whole, vector, whole
    sums = _add_both(sums, order, token_of, grad, centred, values, grad_out, first, head, d, column, BLOCK_P)
    total_enc, total_bias, total_dec = sums
    for start in range(first_chunk, last_chunk, BLOCK_P):
        chunk = start + tl.arange(0, BLOCK_P)
        place = chunk[:, None].to(tl.int64) * d + column[None, :]
        there = (chunk < last_chunk)[:, None] & (column < d)[None, :]
        total_enc += tl.load(enc + place, mask=there, other=0.0)
        total_dec += tl.load(dec + place, mask=there, other=0.0)
        total_bias += tl.load(bias + chunk, mask=chunk < last_chunk, other=0.0)
    sums = total_enc, total_bias, total_dec
    sums = _add_both(sums, order, token_of, grad, centred, values, grad_out, tail, last, d, column, BLOCK_P)
    _store_both(sums, out_enc, out_bias, out_dec, latent, d, column)


def gradients(order: Int[Tensor, " pairs"], token_of: Int[Tensor, " pairs"], starts: Int[Tensor, " n_starts"],
              latents: Int[Tensor, " pairs"], grad: Float[Tensor, "batch k"], centred: Float[Tensor, "batch d"],
              values: Float[Tensor, "batch k"], grad_out: Float[Tensor, "batch d"], n_latents: int,
              ) -> tuple[Float[Tensor, "n_latents d"], Float[Tensor, " n_latents"], Float[Tensor, "n_latents d"]]:
    """Of W_enc, Σ grad_p centred_p, of b_enc, Σ grad_p, and of W_dec, Σ values_p grad_out_p, over the pairs p of each
    latent. Twin: `Active.gradients`.

    Load balance: some latents fire for half of the tokens and many for none. The grouped pairs are cut into chunks of
    `CHUNK` wherever latents begin. A first launch adds up the chunks that belong to one latent alone; a second has a
    program for each latent, which adds those sums and fewer than 2 `CHUNK` pairs. So no program adds more than 2
    `CHUNK` + B / `CHUNK` rows.

    Args:
        order, token_of, starts, latents: from `group_by_latent`.
        grad, values: of the pairs, in the order of the tokens: gradients of the latents, and the latents.
        centred, grad_out: one row a token: x - b_pre, and the gradient of x_hat.
        n_latents: rows of the results; those of latents without a pair are 0.

    Bytes: 2 s B k d + 4 (6 B k + 2 n d), the tokens gathered, s bytes a number. Operations: 4 B k d.
    """
    n_pairs, d = len(order), centred.shape[1]
    for name, tensor, size in (("grad", grad, n_pairs), ("values", values, n_pairs),
                               ("grad_out", grad_out, centred.numel())):
        require(tensor.numel() == size and tensor.is_contiguous(), name, list(tensor.shape),
                f"{size} numbers, contiguous")
    require(len(starts) == n_latents + 1, "starts", len(starts), f"{n_latents + 1} numbers")
    new, size = partial(torch.empty, device=centred.device), block(d, COLUMNS)
    chunks, out = ((new(n, d), new(n), new(n, d)) for n in (n_pairs // CHUNK, n_latents))
    tensors, shape = (grad, centred.contiguous(), values, grad_out), (d, CHUNK, block(CHUNK, ROWS // 2, 4), size)
    if n_pairs >= CHUNK:
        _whole_chunks[(n_pairs // CHUNK, triton.cdiv(d, size))](order, token_of, latents, *tensors, *chunks, *shape,
                                                                num_warps=1)
    _gradients[(n_latents, triton.cdiv(d, size))](order, token_of, starts, *tensors, *chunks, *out, *shape, num_warps=1)
    return out
