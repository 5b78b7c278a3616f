"""The (token, latent) pairs of a sparse step, and the products over them that training needs.

There are three kinds: stock torch operations, the kernels of a GPU, and what `saelib.native` compiles for a CPU.
"""
import warnings
from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelib import selection

with warnings.catch_warnings():  # a process's first CSR tensor warns that these are in beta: make one with warnings off
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0], [], [], (0, 0))


class Active:
    """Which latents are active for which token: a sparse `[batch, n_latents]` matrix without its values.

    Both weight gradients need the same pairs grouped by latent: a sort, made once, when first asked for.

    Args:
        indices: the active latents, k for each token; or token by token in one row, where their numbers differ.
        n_latents: of the matrix.
        starts: where each token begins in that row, and where the last one ends.
    """

    def __init__(self, indices: Int[Tensor, "batch k"] | Int[Tensor, " pairs"], n_latents: int,
                 starts: Int[Tensor, " bounds"] | None = None):
        self.indices, self.n_latents = indices, n_latents
        if starts is None:
            starts = torch.arange(0, indices.numel() + 1, indices.shape[1], dtype=indices.dtype, device=indices.device)
        self.starts = starts

    @staticmethod
    def largest(values: Float[Tensor, "rows n"], k: int) -> tuple[Float[Tensor, "rows k"], Int[Tensor, "rows k"]]:
        """The k largest of each row and their places, in no particular order."""
        return selection.largest(values, k)

    @cached_property
    def by_latent(self) -> tuple[Tensor, Tensor, Tensor]:
        """The (token, latent) pairs in order of latent: their order, their tokens, where each latent begins."""
        flat, lengths = self.indices.reshape(-1), self.starts.diff()
        key = flat.to(torch.int16) if self.n_latents <= 2**15 else flat  # a radix sort pays by the byte
        order = torch.sort(key, stable=True).indices
        starts = torch.zeros(self.n_latents + 1, dtype=flat.dtype, device=flat.device)
        torch.cumsum(torch.bincount(flat, minlength=self.n_latents), 0, out=starts[1:])
        tokens = torch.arange(len(lengths), dtype=flat.dtype, device=flat.device)
        tokens = tokens.repeat_interleave(lengths, output_size=len(flat))
        return order, tokens[order], starts

    @staticmethod
    def centre(x: Float[Tensor, "batch d"], bias: Float[Tensor, " d"], dtype: torch.dtype) -> Float[Tensor, "batch d"]:
        """x - bias as `dtype`: what the products below get for tokens."""
        return (x - bias).to(dtype)

    def decode(self, values: Float[Tensor, "*pairs"], rows: Float[Tensor, "n_latents d"],
               bias: Float[Tensor, " d"] | None = None) -> Float[Tensor, "batch d"]:
        """out_b = Σ_j values_bj rows[indices_bj] + bias: the sparse matrix times `rows`."""
        out = bags(rows, self.indices.reshape(-1), self.starts, values.reshape(-1))
        return out if bias is None else out.add_(bias)

    def sum_tokens(self, values: Float[Tensor, "*pairs"],
                   tokens: Float[Tensor, "batch d"]) -> Float[Tensor, "n_latents d"]:
        """out_i = Σ_b values_bi tokens_b: the transposed sparse matrix times `tokens`."""
        order, token_of, starts, *_ = self.by_latent
        return bags(tokens, token_of, starts, values.reshape(-1)[order])

    def dot(self, tokens: Float[Tensor, "batch d"], rows: Float[Tensor, "n_latents d"]) -> Float[Tensor, "*pairs"]:
        """out_bj = <tokens_b, rows[indices_bj]>: the entries of tokens @ rows.T that are active."""
        pattern = torch.sparse_csr_tensor(self.starts, self.indices.reshape(-1), tokens.new_zeros(self.indices.numel()),
                                          (len(tokens), self.n_latents), check_invariants=False)
        return torch.sparse.sampled_addmm(pattern, tokens, rows.t()).values().view_as(self.indices)

    def sum_latents(self, values: Float[Tensor, "*pairs"]) -> Float[Tensor, " n_latents"]:
        """out_i = Σ_b values_bi."""
        return values.new_zeros(self.n_latents).index_add_(0, self.indices.reshape(-1), values.reshape(-1))

    def gradients(self, grad: Float[Tensor, "*pairs"], centred: Float[Tensor, "batch d"],
                  values: Float[Tensor, "*pairs"], grad_out: Float[Tensor, "batch d"]) -> tuple[Tensor, Tensor, Tensor]:
        """Of W_enc and b_enc, from those of the latents; of W_dec, from that of the reconstruction."""
        return self.sum_tokens(grad, centred), self.sum_latents(grad), self.sum_tokens(values, grad_out)

    def backward(self, grad_out: Float[Tensor, "batch d"], decoder: Float[Tensor, "n_latents d"],
                 grad_values: Float[Tensor, "*pairs"] | None, centred: Float[Tensor, "batch d"],
                 values: Float[Tensor, "*pairs"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of the latents, of W_enc, b_enc and W_dec, from that of the reconstruction and what else the
        latents get.

        It reaches a latent only where its value is positive.
        """
        grad = self.dot(grad_out, decoder)
        grad = (grad if grad_values is None else grad.add_(grad_values)).mul_(values > 0)
        return grad, *self.gradients(grad, centred, values, grad_out)

    def fired(self, values: Float[Tensor, "*pairs"]) -> Bool[Tensor, " n_latents"]:
        """Which latents have a positive value for any token."""
        return self.sum_latents(values) > 0


def bags(rows: Tensor, indices: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """out_b = Σ_j weights_j rows[indices_j], j from starts_b to starts_b+1."""
    return F.embedding_bag(indices, rows, starts, per_sample_weights=weights, mode="sum", include_last_offset=True)


class ActiveOnGPU(Active):
    """The parts of it that a step takes, by the kernels of the GPU: deterministic, without waiting for the device."""

    @cached_property
    def by_latent(self) -> tuple[Tensor, ...]:
        from saelib import triton_kernels
        return triton_kernels.group_by_latent(self.indices, self.n_latents)

    @staticmethod
    def centre(x, bias, dtype):
        from saelib import triton_kernels
        return triton_kernels.centre(x, bias, dtype)

    def decode(self, values, rows, bias=None):
        from saelib import triton_kernels
        return triton_kernels.decode(values, self.indices, rows, bias)

    def gradients(self, grad, centred, values, grad_out):
        from saelib import triton_kernels
        return triton_kernels.gradients(*self.by_latent, grad, centred, values, grad_out, self.n_latents)

    def dot(self, tokens, rows):
        from saelib import triton_kernels
        return triton_kernels.dot(tokens, self.indices, rows)

    def fired(self, values):
        from saelib import triton_kernels
        return triton_kernels.fired(values, self.indices, self.n_latents)
