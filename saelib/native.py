"""Parts of a step that stock PyTorch has no operation for, compiled for this CPU the first time that they are asked for.

With `path="native"`, TopK's choice passes over a row of pre-activations once, and ReLU's products pass over the latents that are zero, in
whatever number. They need a CPU with AVX-512, g++ and ninja, and half a minute once. `path="sparse"` computes the same without.
"""
import os
import sysconfig
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelib.checks import require

WIDTH = 32  # numbers that a loop takes at once
INSTEAD = "'sparse' where it can't be compiled"


@cache
def compiled() -> ModuleType:
    """The operators of native.cpp. torch keeps what it compiled for the next process.

    Raises:
        ValueError: this is no CPU with AVX-512, or there is no compiler.
    """
    require(torch.backends.cpu.get_cpu_capability() == "AVX512", "path", "native", f"{INSTEAD}: the CPU lacks AVX-512")
    bf16 = getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)  # a name for each kind of CPU, for machines that share a home
    from torch.utils import cpp_extension
    os.environ["PATH"] += os.pathsep + sysconfig.get_path("scripts")  # ninja, where this Python is not the shell's
    try:
        return cpp_extension.load("saelib_native" + "_bf16" * bf16, [str(Path(__file__).with_suffix(".cpp"))],
                                  extra_cflags=["-O3", "-march=x86-64-v4", "-fopenmp"] + ["-mavx512bf16"] * bf16, extra_ldflags=["-fopenmp"])
    except (RuntimeError, OSError) as error:
        raise ValueError(f"path is 'native': it must be {INSTEAD}: {str(error).splitlines()[0]}") from error


def available() -> bool:
    """Whether the operators can be compiled here."""
    try:
        return bool(compiled())
    except ValueError:
        return False


def check(x: Float[Tensor, "batch d"], n_latents: int) -> None:
    """Raise ValueError unless `compiled` takes activations like `x` and this number of latents."""
    require(x.device.type == "cpu" and x.dtype == torch.float32, "path", "native", f"'sparse' for {x.dtype} on {x.device.type}")
    for name, size in (("d_model", x.shape[1]), ("n_latents", n_latents)):
        require(size % WIDTH == 0, name, size, f"a multiple of {WIDTH} with path 'native'")
    compiled()


def largest(values: Float[Tensor, "rows n"], k: int) -> tuple[Float[Tensor, "rows k"], Int[Tensor, "rows k"]]:
    """The k largest of each row and their places (int32), in no particular order; what is not a number is above all.

    Each row is compared with a number a little below the k-th largest of the row before. What lies above is few.
    """
    return compiled().largest(values.contiguous(), k)


def decode(latents: Float[Tensor, "batch n_latents"], rows: Float[Tensor, "n_latents d"]) -> Float[Tensor, "batch d"]:
    """out_b = Σ_j latents_bj rows_j, over the latents that are not zero, in the precision of the latents."""
    return compiled().decode(latents, rows.detach())


def sum_tokens(latents: Float[Tensor, "batch n_latents"], tokens: Float[Tensor, "batch d"]) -> Float[Tensor, "n_latents d"]:
    """out_j = Σ_b latents_bj tokens_b, over the latents that are not zero, in their precision."""
    return compiled().sum_tokens(latents, tokens)


def masked_product(latents: Float[Tensor, "batch n_latents"], tokens: Float[Tensor, "batch d"], rows: Float[Tensor, "n_latents d"],
                   start: Float[Tensor, "batch n_latents"], scratch) -> Float[Tensor, "batch n_latents"]:
    """out_bj = <tokens_b, rows_j> + start_bj where a latent is not zero, and 0 elsewhere, all in the type of the latents."""
    out = scratch.take("grad", latents.shape, latents.dtype, latents.device)
    compiled().masked_product(latents, tokens, rows, start, out)
    return out
