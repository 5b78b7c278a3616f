"""The selection of latents on the GPU, in Triton: a product that also finds where its largest entries are.

Import this only where there is a GPU, or with TRITON_INTERPRET=1 set before. Bytes and operations as in
`saelib.triton_kernels`; s is the bytes of a score.
"""
import math
from functools import cache
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from saelib.checks import require
from saelib.triton_kernels import INTERPRETED

CELLS_A_WARP = 1024  # numbers of a row that the registers of one warp hold
PIECE = 16 if INTERPRETED else 256  # of a row, written at once
SCORES_AT_ONCE = 2**31  # bounds the buffer of pre-activations, by working through the tokens in parts
# bf16, where `is_large`; programs a core
GEMM = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3, "A_CORE": 1}
# bf16, in less than 96 KiB
GEMM_SMALL = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3, "A_CORE": 1}
GEMM_FP32 = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3, "A_CORE": 1}
GEMM_INTERPRETED = {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 16, "A_CORE": 1}


@cache
def n_cores(device: torch.device) -> int:
    """Multiprocessors; in the interpreter few, so that loops go round."""
    return 3 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


@cache
def is_large(device: torch.device) -> bool:
    """Whether the device has a copy engine, and shared memory for large tiles: data-centre GPUs from Hopper on."""
    return INTERPRETED or torch.cuda.get_device_capability(device)[0] in (9, 10)


@triton.jit
@no_type_check
def _scores(x, weight, bias, scores, maxima, batch, n, d, GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
            BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr, TMA_OUT: tl.constexpr,
            UPCAST: tl.constexpr):
    """Tiles of x weight^T + bias, and the maximum of each group of their columns. A program goes on from tile to tile,
    so that what a tile leaves is written while the next one is read."""
    n_down, n_across = tl.cdiv(batch, BLOCK_M), tl.cdiv(n, BLOCK_N)
    band = 16 * n_across  # of 16 tiles down: neighbours in time share rows of both inputs in the L2
    for tile in tl.range(tl.program_id(0), n_down * n_across, tl.num_programs(0), flatten=TMA):
        n_rows = min(n_down - tile // band * 16, 16)
        first_row = (tile // band * 16 + tile % band % n_rows) * BLOCK_M
        first_column = (tile % band // n_rows) * BLOCK_N
        row, column = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, d, BLOCK_K):
            if TMA:
                left, right = x.load([first_row, start]), weight.load([first_column, start])
            else:
                inner = start + tl.arange(0, BLOCK_K)
                left = tl.load(x + row[:, None].to(tl.int64) * d + inner[None, :],
                               mask=(row < batch)[:, None] & (inner < d)[None, :], other=0.0)
                right = tl.load(weight + column[:, None].to(tl.int64) * d + inner[None, :],
                                mask=(column < n)[:, None] & (inner < d)[None, :], other=0.0)
            if UPCAST:  # the interpreter multiplies the bits of bfloat16, not its values
                left, right = left.to(tl.float32), right.to(tl.float32)
            total = tl.dot(left, right.T, total, input_precision="tf32x3")
        total += tl.load(bias + column, mask=column < n, other=0.0)[None, :]
        if TMA_OUT:
            scores.store([first_row, first_column], total.to(maxima.dtype.element_ty))
        else:
            place = row[:, None].to(tl.int64) * n + column[None, :]
            tl.store(scores + place, total.to(maxima.dtype.element_ty),
                     mask=(row < batch)[:, None] & (column < n)[None, :])
        total = tl.where((column < n)[None, :], total, float("-inf"))
        highest = tl.max(tl.reshape(total, (BLOCK_M, BLOCK_N // GROUP, GROUP)), 2)
        n_groups, group = tl.cdiv(n, GROUP), first_column // GROUP + tl.arange(0, BLOCK_N // GROUP)
        tl.store(maxima + row[:, None].to(tl.int64) * n_groups + group[None, :], highest.to(maxima.dtype.element_ty),
                 mask=(row < batch)[:, None] & (group < n_groups)[None, :])


def scores(x: Float[Tensor, "batch d"], weight: Float[Tensor, "n d"], bias: Float[Tensor, " n"], group: int = 32,
           tma: bool | None = None, **config) -> tuple[Float[Tensor, "batch n"], Float[Tensor, "batch n_groups"]]:
    """x weight^T + bias in the type of x, summed in fp32, and the maximum of each `group` columns of it. A float32
    product is made of three on the tensor cores (TF32 of the leading digits and of what they leave), which keeps its
    precision.

    `tma` goes through tensor descriptors (rows must be whole 16 bytes); None: in bf16 where the device `is_large` and
    it can be done. Bytes: s (B d + n d + B n + B n / group). Operations: 2 B n d.
    """
    (batch, d), n = x.shape, len(weight)
    require(x.dtype == weight.dtype and x.dtype in (torch.float32, torch.bfloat16), "weight.dtype", weight.dtype,
            "that of x, float32 or bfloat16")
    is_bf16, rows_are_whole = x.dtype == torch.bfloat16, d * x.element_size() % 16 == 0
    require(rows_are_whole or not tma, "tma", tma, "False where a row is not a whole number of 16 bytes")
    large = is_large(x.device)
    tma = is_bf16 and rows_are_whole and large if tma is None else tma
    config = {**(GEMM_INTERPRETED if INTERPRETED else GEMM_FP32 if not is_bf16 else GEMM if large else GEMM_SMALL),
              **config}
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.float().contiguous()
    out, maxima = x.new_empty(batch, n), x.new_empty(batch, triton.cdiv(n, group))
    place, tma_out = out, tma and n * out.element_size() % 16 == 0
    if tma:
        x = TensorDescriptor.from_tensor(x, [config["BLOCK_M"], config["BLOCK_K"]])
        weight = TensorDescriptor.from_tensor(weight, [config["BLOCK_N"], config["BLOCK_K"]])
    if tma_out:
        place = TensorDescriptor.from_tensor(out, [config["BLOCK_M"], config["BLOCK_N"]])
    n_tiles = triton.cdiv(batch, config["BLOCK_M"]) * triton.cdiv(n, config["BLOCK_N"])
    n_programs = min(n_tiles, n_cores(bias.device) * config.pop("A_CORE"))
    _scores[(n_programs,)](x, weight, bias, place, maxima, batch, n, d, group, TMA=tma, TMA_OUT=tma_out,
                           UPCAST=INTERPRETED, **config)
    return out, maxima


@triton.jit
@no_type_check
def _keys(values, groups, cell, width, n, GROUP: tl.constexpr, BITS: tl.constexpr):
    """For some cells of a row: their places in it, integers in the order of their values, and whether they exist."""
    place = cell if GROUP == 1 else tl.load(groups + cell // GROUP, mask=cell < width, other=0) * GROUP + cell % GROUP
    there = (cell < width) & (place < n)
    bits = tl.load(values + place, mask=there, other=0.0).to(tl.float32).to(tl.int32, bitcast=True)
    return place, (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> (32 - BITS), there


@triton.jit
@no_type_check
def _largest(values, groups, out_values, out_places, width, n, k, GROUP: tl.constexpr, BITS: tl.constexpr,
             SIZE: tl.constexpr, PIECE: tl.constexpr):
    """The k largest of one row: the k-th largest key, bit by bit from counts over registers; then all above it, and
    ties until k are full."""
    row = tl.program_id(0).to(tl.int64)
    values, groups = values + row * n, groups + row * (width // GROUP)
    out_values, out_places = out_values + row * k, out_places + row * k
    least, n_above, one = tl.full((), -(1 << (BITS - 1)), tl.int32), tl.full((), 0, tl.int32), tl.full((), 1, tl.int32)
    _, keys, exist = _keys(values, groups, tl.arange(0, SIZE), width, n, GROUP, BITS)
    for step in range(BITS):
        trial = tl.where(step == 0, 0, least | (one << (BITS - 1 - step)))
        count = tl.sum((exist & (keys >= trial)).to(tl.int32), 0)
        least = tl.where(count >= k, trial, least)
        n_above = tl.where(count >= k, n_above, count)  # the last trial that failed is least + 1
    done, n_equal = tl.full((), 0, tl.int32), n_above
    # read again, from the cache: addresses of a whole row would crowd the registers
    for start in range(0, width, PIECE):
        place, key, there = _keys(values, groups, start + tl.arange(0, PIECE), width, n, GROUP, BITS)
        above, equal = (there & (key > least)).to(tl.int32), (there & (key == least)).to(tl.int32)
        slot = tl.where(above > 0, done + tl.cumsum(above, 0), n_equal + tl.cumsum(equal, 0)) - 1
        keep = (above > 0) | ((equal > 0) & (slot < k))
        bits = key << (32 - BITS)
        value = bits ^ ((key >> 31) & (0x7FFFFFFF >> (32 - BITS) << (32 - BITS)))
        tl.store(out_values + slot, value.to(tl.float32, bitcast=True), mask=keep)
        tl.store(out_places + slot, place, mask=keep)
        done, n_equal = done + tl.sum(above, 0), n_equal + tl.sum(equal, 0)


def largest(values: Float[Tensor, "batch n"], k: int, groups: Int[Tensor, "batch n_kept"] | None = None, group: int = 1,
            **config) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """The k largest values (fp32) of each row and their places (int32), in no particular order; of these groups of
    `group` only, if given.

    Bytes: s B n read, or s B n_kept group, and 8 B k written.
    """
    batch, n = values.shape
    width = n if groups is None else groups.shape[1] * group
    require(1 <= k <= min(n, width), "k", k, f"from 1 to {min(n, width)}")
    values, groups = values.contiguous(), values if groups is None else groups.contiguous()
    out = torch.empty(batch, k, device=values.device), torch.empty(batch, k, dtype=torch.int32, device=values.device)
    cells = max(32, triton.next_power_of_2(width))
    config = {"num_warps": min(32, max(1, cells // CELLS_A_WARP)), **config}
    _largest[(batch,)](values, groups, *out, width, n, k, group, 16 if values.dtype == torch.bfloat16 else 32, cells,
                       min(cells, PIECE), **config)
    return out


@torch.no_grad()
def select(x: Float[Tensor, "batch d"], W_enc: Float[Tensor, "n_latents d"], b_enc: Float[Tensor, " n_latents"],
           k: int) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """The k largest of W_enc x + b_enc for each token, in no particular order, with their latents. Twin:
    `kernels.select`.

    The product writes every pre-activation once, and the maximum of each group of them. At least k values reach the
    k-th largest maximum, so the k largest lie in the k groups with the largest maxima, and only those are read back. In
    bfloat16 pre-activations are summed in float32 and then rounded to 8 bits.

    Groups of √(n / k) leave the fewest to look through twice.

    Bytes: those of `scores`, then s B (n / group + k group). Operations: 2 B n d.
    Paper: §2.3, Eq. (2)
    """
    n = len(W_enc)
    require(1 <= k <= n, "k", k, f"from 1 to n_latents = {n}")
    group, parts = min(128, max(16, 2 ** round(math.log2(math.sqrt(n / k))))), []
    for part in x.split(max(1, SCORES_AT_ONCE // n)):
        pre_acts, maxima = scores(part, W_enc, b_enc, group)
        groups = largest(maxima, min(k, maxima.shape[1]))[1]
        parts.append(largest(pre_acts, k, groups, group))
    return parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts)))
