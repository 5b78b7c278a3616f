"""The sparse path: encode, select and decode without ever forming the dense latents or their gradient.

`[batch, n_latents]` latents with k non-zeros a row are kept as `values` [batch, k] beside `Active`, which
knows the indices and the three products that training needs. On the CPU all of it is stock torch operations;
on a GPU it is `saelib.triton_kernels`. The plain twin of both is `SAE.forward` with `path="dense"`.
"""
import warnings
from collections.abc import Callable
from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelib.products import linear
from saelib.selection import has_kernels, largest

BLOCK_ROWS = 512  # tokens whose pre-activations are held at once: few enough to stay in the cache
MARGIN = 0.25  # extra candidates that a bf16 selection keeps for the exact choice

with warnings.catch_warnings():  # torch says once that its CSR tensors are in beta: let it say so here, to nobody
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0], [], [], (0, 0))


def on_gpu(x: Tensor) -> bool:
    """Whether the kernels in Triton take `x`: they are for float32 and bfloat16, on the GPUs of `has_kernels`."""
    return has_kernels(x.device) and x.dtype in (torch.float32, torch.bfloat16)


class Active:
    """Which latents are active for which token: a sparse `[batch, n_latents]` matrix without its values.

    Both weight gradients need the same pairs grouped by latent: a sort, made once, when first asked for.

    Args:
        indices: the active latents, k for each token; or token by token in one row, where their numbers differ.
        n_latents: of the matrix.
        starts: where each token begins in that row, and where the last one ends.
    """

    def __init__(self, indices: Int[Tensor, "batch k"] | Int[Tensor, " pairs"], n_latents: int, starts: Int[Tensor, " bounds"] | None = None):
        self.indices, self.n_latents = indices, n_latents
        self.starts = starts if starts is not None else torch.arange(0, indices.numel() + 1, indices.shape[1], dtype=indices.dtype, device=indices.device)

    @cached_property
    def by_latent(self) -> tuple[Tensor, Tensor, Tensor]:
        """The (token, latent) pairs in order of latent: their order, their tokens, where each latent begins."""
        flat, lengths = self.indices.reshape(-1), self.starts.diff()
        key = flat.to(torch.int16) if self.n_latents <= 2**15 else flat  # a radix sort pays by the byte
        order = torch.sort(key, stable=True).indices
        starts = torch.zeros(self.n_latents + 1, dtype=flat.dtype, device=flat.device)
        torch.cumsum(torch.bincount(flat, minlength=self.n_latents), 0, out=starts[1:])
        tokens = torch.arange(len(lengths), dtype=flat.dtype, device=flat.device).repeat_interleave(lengths, output_size=len(flat))
        return order, tokens[order], starts

    @staticmethod
    def centre(x: Float[Tensor, "batch d"], bias: Float[Tensor, " d"], dtype: torch.dtype) -> Float[Tensor, "batch d"]:
        """x - bias as `dtype`: what the products below get for tokens."""
        return (x - bias).to(dtype)

    def decode(self, values: Float[Tensor, "*pairs"], rows: Float[Tensor, "n_latents d"], bias: Float[Tensor, " d"] | None = None,
               ) -> Float[Tensor, "batch d"]:
        """out_b = Σ_j values_bj rows[indices_bj] + bias: the sparse matrix times `rows`."""
        out = bags(rows, self.indices.reshape(-1), self.starts, values.reshape(-1))
        return out if bias is None else out.add_(bias)

    def sum_tokens(self, values: Float[Tensor, "*pairs"], tokens: Float[Tensor, "batch d"]) -> Float[Tensor, "n_latents d"]:
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

    def gradients(self, grad: Float[Tensor, "*pairs"], centred: Float[Tensor, "batch d"], values: Float[Tensor, "*pairs"],
                  grad_out: Float[Tensor, "batch d"]) -> tuple[Tensor, Tensor, Tensor]:
        """Of W_enc and b_enc, from those of the latents; of W_dec, from that of the reconstruction."""
        return self.sum_tokens(grad, centred), self.sum_latents(grad), self.sum_tokens(values, grad_out)

    def fired(self, values: Float[Tensor, "*pairs"]) -> Bool[Tensor, " n_latents"]:
        """Which latents have a positive value for any token."""
        return self.sum_latents(values) > 0


def bags(rows: Tensor, indices: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """out_b = Σ_j weights_j rows[indices_j], j from starts_b to starts_b+1."""
    return F.embedding_bag(indices, rows, starts, per_sample_weights=weights, mode="sum", include_last_offset=True)


class ActiveOnGPU(Active):
    """The parts of it that a step takes, with the kernels of the GPU: deterministic, and without waiting for the device."""

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


@torch.no_grad()
def select(x: Float[Tensor, "batch d"], W_enc: Float[Tensor, "n_latents d"], b_enc: Float[Tensor, " n_latents"], k: int,
           precision: str = "fp32", find: Callable = largest) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """The k largest pre-activations of each token, in no particular order.

    With precision "bf16" the product W_enc x is computed in bfloat16 only to name k + 25 % candidates; their
    values are then computed in full precision, and the k largest of those are returned. On a GPU
    the rough values are kept: see `autoencode`.

    Args:
        x: centred activations, x - b_pre.
        W_enc: encoder, one row a latent.
        b_enc: encoder bias.
        k: how many to keep.
        precision: "fp32" (the type of `x`) or "bf16".
        find: what finds the k largest of each row of a matrix on the CPU: `selection.largest`, or `native.largest`.

    Returns:
        Pre-activations and the latents that they belong to (int32).

    Paper: §2.3, Eq. (3)
    """
    if on_gpu(x):
        from saelib import triton_select
        dtype = torch.bfloat16 if precision == "bf16" else x.dtype
        return triton_select.select(x.to(dtype), W_enc.to(dtype), b_enc, k)
    if precision == "fp32":
        return choose(x, W_enc, b_enc, k, x.dtype, find)
    n_kept = min(len(W_enc), k + max(4, round(k * MARGIN)))
    indices = choose(x, W_enc, b_enc, n_kept, torch.bfloat16, find)[1]
    exact = Active(indices, len(W_enc)).dot(x, W_enc) + b_enc[indices]
    values, best = find(exact, k)
    return values, indices.gather(1, best.long())


def choose(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, dtype: torch.dtype, find: Callable) -> tuple[Tensor, Tensor]:
    """The k largest of x W_encᵀ + b_enc as `dtype` computes them, a block of tokens at a time (see `select`)."""
    values, indices = x.new_empty(len(x), k), torch.empty(len(x), k, dtype=torch.int32, device=x.device)
    weight, bias = W_enc.to(dtype), b_enc.to(dtype)
    buffer = torch.empty(min(BLOCK_ROWS, len(x)), len(W_enc), dtype=dtype, device=x.device)
    for start in range(0, len(x), BLOCK_ROWS):
        here = slice(start, start + BLOCK_ROWS)
        block = x[here].to(dtype)
        values[here], indices[here] = find(linear(block, weight, bias, buffer[: len(block)]), k)
    return values, indices


class _Autoencode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, b_pre, W_enc, b_enc, W_dec, b_out, choice, dtype, copies):
        encoder, decoder = operand(W_enc, dtype, copies, "W_enc"), operand(W_dec, dtype, copies, "W_dec")
        active_on = ActiveOnGPU if on_gpu(x) else Active
        centred = active_on.centre(x, b_pre, dtype)
        values, indices = choice(centred, encoder)
        values.relu_()
        active = active_on(indices, len(W_enc))
        ctx.active, ctx.has_b_out = active, b_out is not None
        ctx.save_for_backward(centred, encoder, decoder, values)
        ctx.set_materialize_grads(False)
        return active.decode(values, decoder, b_out), values, active

    @staticmethod
    def backward(ctx, grad_x_hat, grad_values, _):
        (centred, encoder, decoder, values), active = ctx.saved_tensors, ctx.active
        grad_out = torch.zeros_like(centred) if grad_x_hat is None else grad_x_hat.to(centred.dtype).contiguous()
        grad = active.dot(grad_out, decoder)
        grad = (grad if grad_values is None else grad.add_(grad_values)).mul_(values > 0)
        grad_W_enc, grad_b_enc, grad_W_dec = active.gradients(grad, centred, values, grad_out)
        grad_b_pre = -(grad_b_enc.to(encoder.dtype) @ encoder).to(grad_b_enc.dtype)
        grad_x = active.decode(grad, encoder) if ctx.needs_input_grad[0] else None
        grad_b_out = grad_x_hat.sum(0) if ctx.has_b_out and grad_x_hat is not None else None
        return grad_x, grad_b_pre, grad_W_enc, grad_b_enc, grad_W_dec, grad_b_out, None, None, None


def autoencode(x: Float[Tensor, "batch d"], b_pre: Float[Tensor, " d"], W_enc: Float[Tensor, "n_latents d"], b_enc: Float[Tensor, " n_latents"],
               W_dec: Float[Tensor, "n_latents d"], k: int, *, b_out: Float[Tensor, " d"] | None = None, precision: str = "fp32",
               choice: Callable | None = None, find: Callable = largest,
               copies: dict | None = None) -> tuple[Float[Tensor, "batch d"], Float[Tensor, "batch width"], Active]:
    """A whole TopK autoencoder. Differentiable in all six tensors, and its latents may be used in a loss too.

    z = TopK(ReLU(W_enc (x - b_pre) + b_enc)),  x_hat = W_dec^T z + b_out

    Backward: the gradient of a latent reaches its own rows only, and only where it is positive: the exact Jacobian away from ties.

    Args:
        x: activations.
        b_pre: the bias subtracted before encoding.
        W_enc, b_enc: encoder, one row a latent, and its bias.
        W_dec: decoder, one row a latent.
        k: how many latents to keep for each token.
        b_out: what is added to the reconstruction: b_pre, or nothing.
        precision: "fp32", or "bf16" to select in bfloat16 (see `select`). On a GPU "bf16" is what mixed precision is elsewhere: the operands
            of every product in bfloat16, sums and weights in float32.
        choice: what chooses them, if not the k largest: it is given k and `best`, which returns the m largest pre-activations and
            their latents for any m. It may keep another number of latents, the same for all tokens, and gives a latent that
            it leaves out the value 0.
        find: what finds the largest of each row (see `select`).
        copies: where copies of the weights in bfloat16 are kept from call to call, by a caller that renews them with the weights.

    Returns:
        x_hat; the latents as their values (0 where a selected pre-activation was not positive), and the `Active` that places them.

    Paper: §2.2, Eq. (1); §2.3, Eq. (3)
    """
    def choose_of(centred, encoder):
        def best(m):
            return select(centred, encoder, b_enc, m, precision, find)

        return choice(k, best) if choice else best(k)

    dtype = torch.bfloat16 if precision == "bf16" and on_gpu(x) else x.dtype
    return _Autoencode.apply(x, b_pre, W_enc, b_enc, W_dec, b_out, choose_of, dtype, copies)


def operand(weight: Tensor, dtype: torch.dtype, copies: dict | None, name: str) -> Tensor:
    """A weight in the type that the products get it in: itself, or a copy, kept in `copies` if there are any."""
    if weight.dtype == dtype or copies is None:
        return weight.to(dtype)
    if name not in copies:
        copies[name] = weight.to(dtype)
    return copies[name]
