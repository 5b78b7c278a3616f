"""Parts of a step that are faster in C++ than in stock operations, compiled for this CPU the first time that they are
asked for.

With `path="native"` TopK's choice reads a row of pre-activations about once and its gradients go latent by latent, and
ReLU's products skip the latents that are zero. It needs a CPU with AVX-512, a C++ compiler and half a minute once.
`path="sparse"` computes the same without.
"""
import hashlib
import importlib.util
import os
import shutil
import sys
import sysconfig
import threading
from contextlib import suppress
from functools import cache, cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from saelib import pairs
from saelib.cache import cache_folder
from saelib.checks import require
from saelib.files import write_whole
from saelib.products import cpu_has

WIDTH = 32  # a multiple of this are the sizes that the products take
SOURCES = sorted((Path(__file__).parent / "cpp").glob("*.[ch]*"))
FLAGS = ["-O3", "-fopenmp", "-mfma", "-mbmi", "-mpopcnt", *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl"))]
BUILDING = threading.Lock()


@cache
def build() -> ModuleType | str:
    """The operators of cpp/native.cpp, or why there are none. What was compiled is kept under a name that says from
    what, and is moved there once it is whole: torch's own place for it has a lock that a killed build leaves behind,
    for which all later ones wait."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return "the CPU lacks AVX-512"
    flags = FLAGS + ["-mavx512bf16"] * cpu_has("avx512_bf16")
    name = hashlib.sha256(b"".join(map(Path.read_bytes, SOURCES))
                          + " ".join([torch.__version__, sys.version, *flags]).encode()).hexdigest()[:12]
    module = f"saelib_native_{name}"
    try:
        kept = cache_folder() / f"{module}.so"
        if kept.exists():
            with suppress(ImportError, OSError):  # of a file that a power cut left damaged
                return load(module, kept)
        # where pip puts ninja
        os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])
        from torch.utils import cpp_extension
        if not shutil.which(cpp_extension.get_cxx_compiler()):
            return f"there is no C++ compiler called {cpp_extension.get_cxx_compiler()}"
        tqdm.write("saelib compiles parts of the training step for this processor: half a minute, once",
                   file=sys.stderr)
        with TemporaryDirectory() as folder:
            cpp_extension.load(module, [str(path) for path in SOURCES if path.suffix == ".cpp"], extra_cflags=flags,
                               extra_ldflags=["-fopenmp"], build_directory=folder, is_python_module=False)
            made = Path(folder) / kept.name
            with suppress(OSError, ValueError):  # where nothing can be kept, each process compiles anew
                write_whole({kept: lambda partial: shutil.copy(made, partial)})
            return load(module, made)
    except Exception as error:  # whatever keeps a compiler from its work, there is a path without it
        lines = str(error).splitlines() or [type(error).__name__]
        why = next((line for line in lines if " error: " in line or "not found" in line), lines[0])
        tqdm.write(f"saelib goes on without them: {why}", file=sys.stderr)
        return why


def load(module: str, path: Path) -> ModuleType:
    """The operators in a file that was compiled."""
    spec = importlib.util.spec_from_file_location(module, path)
    operators = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(operators)
    return operators


def compiled() -> ModuleType:
    """The operators.

    Raises:
        ValueError: they can't be compiled here; the message says why.
    """
    with BUILDING:
        built = build()
    require(not isinstance(built, str), "path", "native", f"'sparse' where it can't be compiled: {built}")
    return built


def available() -> bool:
    """Whether the operators can be compiled here."""
    with BUILDING:
        return not isinstance(build(), str)


def check(x: Float[Tensor, "batch d"], weights: Float[Tensor, "n_latents d"]) -> None:
    """Raise ValueError unless there are operators, and they take such activations and weights."""
    for name, tensor in (("W_enc", weights), ("x", x)):
        require(tensor.device.type == "cpu" and tensor.dtype == torch.float32, f"{name}.dtype", tensor.dtype,
                "torch.float32, on the CPU, with path 'native'")
    compiled()


def check_sizes(d_model: int, n_latents: int) -> None:
    """Raise ValueError unless the products take these sizes."""
    for name, size in (("d_model", d_model), ("n_latents", n_latents)):
        require(size % WIDTH == 0, name, size, f"a multiple of {WIDTH} for ReLU with path 'native'")


class Active(pairs.Active):
    """The pairs of a TopK step, with what is faster compiled: the search, their order, and the gradients by latent."""

    @staticmethod
    def largest(values, k):
        return largest(values, k)

    @cached_property
    def by_latent(self):
        return compiled().group(self.indices.reshape(-1), self.starts, self.n_latents)

    def dot(self, tokens, rows):
        return compiled().dot(tokens.contiguous(), rows.detach().contiguous(), self.indices.reshape(-1),
                              self.starts).view_as(self.indices)

    def backward(self, grad_out, decoder, grad_values, centred, values):
        extra = None if grad_values is None else grad_values.to(values.dtype).contiguous().view(-1)
        grad, *weights = compiled().gradients(*self.by_latent, values.reshape(-1), extra, centred.contiguous(),
                                              grad_out, decoder.detach().contiguous())
        return grad.view_as(values), *weights


def largest(values: Float[Tensor, "rows n"], k: int) -> tuple[Float[Tensor, "rows k"], Int[Tensor, "rows k"]]:
    """The k largest of each row and their places (int32), in no particular order; what is not a number is above all.

    Each row is compared with a number a little below the k-th largest of the row before. The choice is made among what
    lies above.
    """
    require(1 <= k <= values.shape[1], "k", k, f"from 1 to {values.shape[1]}")
    return compiled().largest(values.contiguous(), k)


def decode(latents: Float[Tensor, "batch n_latents"], rows: Float[Tensor, "n_latents d"]) -> Float[Tensor, "batch d"]:
    """out_b = Σ_j latents_bj rows_j, over the latents that are not zero, in the precision of the latents."""
    return compiled().decode(latents, rows.detach().contiguous())


def sum_tokens(latents: Float[Tensor, "batch n_latents"],
               tokens: Float[Tensor, "batch d"]) -> Float[Tensor, "n_latents d"]:
    """out_j = Σ_b latents_bj tokens_b, over the latents that are not zero, in their precision."""
    return compiled().sum_tokens(latents, tokens.contiguous())


def masked_product(latents: Float[Tensor, "batch n_latents"], tokens: Float[Tensor, "batch d"],
                   rows: Float[Tensor, "n_latents d"],
                   start: Float[Tensor, "batch n_latents"], scratch) -> Float[Tensor, "batch n_latents"]:
    """out_bj = <tokens_b, rows_j> + start_bj where a latent is not zero, and 0 elsewhere, in the latents' type."""
    out = scratch.take("grad", latents.shape, latents.dtype, latents.device)
    compiled().masked_product(latents, tokens.contiguous(), rows.contiguous(), start, out)
    return out
