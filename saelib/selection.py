"""The k largest numbers of each row of a matrix, by looking through fewer numbers than there are, and faster."""
import importlib.util
import math
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelib.checks import require

LEAF = 512  # numbers in a row that are looked through at once
SIZES = 1, 2, 4, 8, 16  # of the groups that longer rows are cut into


@cache
def has_kernels(device: torch.device) -> bool:
    """Whether there are kernels in Triton for this device: an NVIDIA GPU of the Ampere generation or newer, and a
    Triton of version 3.4 or newer."""
    return (device.type == "cuda" and torch.version.cuda is not None
            and torch.cuda.get_device_capability(device)[0] >= 8
            and importlib.util.find_spec("triton") is not None
            and importlib.util.find_spec("triton.tools.tensor_descriptor") is not None)


def largest(values: Float[Tensor, "rows n"], k: int) -> tuple[Float[Tensor, "rows k"], Int[Tensor, "rows k"]]:
    """The k largest of each row and their places, in no particular order.

    Cut a row into groups and take the maximum of each. The k largest lie in the k groups with the largest maxima, so
    it is enough to find those among n / size maxima, and then the largest among k size candidates; both in the same
    way, until a row is short. Groups are strided, so that their maxima are taken of whole vectors at once; their size
    is the one that leaves the least to look through.
    """
    if has_kernels(values.device):
        from saelib import triton_select
        return triton_select.largest(values, k)
    rows, n = values.shape
    require(1 <= k <= n, "k", k, f"from 1 to {n}")
    size = min((size for size in SIZES if n % size == 0 and k * size <= n),
               key=lambda size: n / size + (size > 1) * k * size)
    if n <= LEAF or size == 1:
        return topk(values, k)
    best = largest(values.view(rows, size, n // size).amax(1), k)[1]
    candidates = (best[:, None] + torch.arange(0, n, n // size, device=values.device)[:, None]).view(rows, size * k)
    found, place = largest(values.gather(1, candidates), k)
    return found, candidates.gather(1, place)


def topk(values: Float[Tensor, "rows n"], k: int) -> tuple[Float[Tensor, "rows k"], Int[Tensor, "rows k"]]:
    """`torch.topk` in no particular order.

    In bfloat16 a value and its place fit into one whole number of 32 bits, and numpy partitions rows of such numbers
    faster than torch does rows of pairs. What is not a number comes back as infinite.
    """
    if values.is_cuda or values.dtype != torch.bfloat16 or values.shape[1] > 2**16:
        return values.topk(k, dim=1, sorted=False)
    keys = in_order(values.nan_to_num(math.inf, math.inf, -math.inf).view(torch.int16)).int()
    keys.bitwise_left_shift_(16).bitwise_or_(torch.arange(values.shape[1], dtype=torch.int32))
    keys.numpy().partition(-k, axis=1)
    best = keys[:, -k:]
    return in_order((best >> 16).short()).view(torch.bfloat16), (best & 0xFFFF).long()


def in_order(bits: Int[Tensor, "rows n"]) -> Int[Tensor, "rows n"]:
    """The bits of bfloat16 as whole numbers in the order of the values that they stand for; and back again."""
    return bits ^ ((bits >> 15) & 0x7FFF)
