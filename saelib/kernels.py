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

from saelib.selection import largest

BLOCK_ROWS = 256  # tokens whose pre-activations are held at once: few enough to stay in the cache
MARGIN = 0.25  # extra candidates that a bf16 selection keeps for the exact choice

with warnings.catch_warnings():  # torch says once that its CSR tensors are in beta: let it say so here, to nobody
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0], [], [], (0, 0))


def on_gpu(x: Tensor) -> bool:
    """Whether the kernels in Triton take `x`: they are for float32 and bfloat16 on a CUDA device."""
    return x.is_cuda and x.dtype in (torch.float32, torch.bfloat16)


def operand_dtype(x: Tensor, precision: str) -> torch.dtype:
    """What the sparse products get: on a GPU "bf16" takes all of them in bfloat16 and adds up in float32; a CPU would gain nothing."""
    return torch.bfloat16 if precision == "bf16" and on_gpu(x) else x.dtype


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

    def decode(self, values: Float[Tensor, "*pairs"], rows: Float[Tensor, "n_latents d"], bias: Float[Tensor, " d"] | None = None,
               ) -> Float[Tensor, "batch d"]:
        """out_b = Σ_j values_bj rows[indices_bj] + bias: the sparse matrix times `rows`."""
        out = bags(rows, self.indices.reshape(-1), self.starts, values.reshape(-1))
        return out if bias is None else out.add_(bias)

    def sum_tokens(self, values: Float[Tensor, "*pairs"], tokens: Float[Tensor, "batch d"]) -> Float[Tensor, "n_latents d"]:
        """out_i = Σ_b values_bi tokens_b: the transposed sparse matrix times `tokens`."""
        order, token_of, starts = self.by_latent
        return bags(tokens, token_of, starts, values.reshape(-1)[order])

    def dot(self, tokens: Float[Tensor, "batch d"], rows: Float[Tensor, "n_latents d"]) -> Float[Tensor, "*pairs"]:
        """out_bj = <tokens_b, rows[indices_bj]>: the entries of tokens @ rows.T that are active."""
        pattern = torch.sparse_csr_tensor(self.starts, self.indices.reshape(-1), tokens.new_zeros(self.indices.numel()),
                                          (len(tokens), self.n_latents), check_invariants=False)
        return torch.sparse.sampled_addmm(pattern, tokens, rows.t()).values().view_as(self.indices)

    def sum_latents(self, values: Float[Tensor, "*pairs"]) -> Float[Tensor, " n_latents"]:
        """out_i = Σ_b values_bi."""
        return values.new_zeros(self.n_latents).index_add_(0, self.indices.reshape(-1), values.reshape(-1))

    def sum_pairs(self, values: Float[Tensor, "*pairs"], tokens: Float[Tensor, "batch d"]) -> tuple[Tensor, Tensor]:
        """`sum_tokens` and `sum_latents` of the same values: the gradients of a weight and of its bias."""
        return self.sum_tokens(values, tokens), self.sum_latents(values)

    def fired(self, values: Float[Tensor, "*pairs"]) -> Bool[Tensor, " n_latents"]:
        """Which latents have a positive value for any token."""
        return self.sum_latents(values) > 0


def bags(rows: Tensor, indices: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """out_b = Σ_j weights_j rows[indices_j], j from starts_b to starts_b+1."""
    return F.embedding_bag(indices, rows, starts, per_sample_weights=weights, mode="sum", include_last_offset=True)


class ActiveOnGPU(Active):
    """The same, with the kernels of the GPU: deterministic, and without waiting for the device."""

    @cached_property
    def by_latent(self) -> tuple[Tensor, ...]:
        from saelib import triton_kernels
        return triton_kernels.group_by_latent(self.indices, self.n_latents)

    def decode(self, values, rows, bias=None):
        from saelib import triton_kernels
        return triton_kernels.decode(values, self.indices, rows, bias)

    def sum_pairs(self, values, tokens):
        from saelib import triton_kernels
        return triton_kernels.sum_pairs(*self.by_latent, values, tokens, self.n_latents)

    def sum_tokens(self, values, tokens):
        return self.sum_pairs(values, tokens)[0]

    def dot(self, tokens, rows):
        from saelib import triton_kernels
        return triton_kernels.dot(tokens, self.indices, rows)

    def sum_latents(self, values):
        return self.sum_pairs(values, values.new_ones(len(values), 1))[1]

    def fired(self, values):
        from saelib import triton_kernels
        return triton_kernels.fired(values, self.indices, self.n_latents)


@torch.no_grad()
def select(x: Float[Tensor, "batch d"], W_enc: Float[Tensor, "n_latents d"], b_enc: Float[Tensor, " n_latents"], k: int,
           precision: str = "fp32", find: Callable = largest) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """The k largest pre-activations of each token, in no particular order.

    With precision "bf16" the product W_enc x is computed in bfloat16 only to name k + 25 % candidates; their
    values are then computed in full precision, and the k largest of those are returned. On a GPU the type of x decides: see `encode`.

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
        return triton_select.select(x, W_enc, b_enc, k)
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
    weight, bias = W_enc.to(dtype).t(), b_enc.to(dtype)
    buffer = torch.empty(min(BLOCK_ROWS, len(x)), len(W_enc), dtype=dtype, device=x.device)
    for start in range(0, len(x), BLOCK_ROWS):
        here = slice(start, start + BLOCK_ROWS)
        block = x[here].to(dtype)
        values[here], indices[here] = find(torch.addmm(bias, block, weight, out=buffer[: len(block)]), k)
    return values, indices


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, b_pre, W_enc, b_enc, choice, precision):
        centred = torch.sub(x, b_pre, out=torch.empty_like(x, dtype=operand_dtype(x, precision)))
        values, indices = choice(centred)
        values.relu_()
        ctx.active = (ActiveOnGPU if on_gpu(x) else Active)(indices, len(W_enc))
        ctx.save_for_backward(centred, W_enc, values)
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        return values, indices, ctx.active

    @staticmethod
    def backward(ctx, grad_values, *_):
        if grad_values is None:
            return (None,) * 6
        centred, W_enc, values = ctx.saved_tensors
        grad = grad_values * (values > 0)
        grad_W_enc, grad_b_enc = ctx.active.sum_pairs(grad, centred)
        grad_b_pre = -(grad_b_enc @ W_enc) if ctx.needs_input_grad[1] else None
        grad_x = ctx.active.decode(grad, W_enc) if ctx.needs_input_grad[0] else None
        return grad_x, grad_b_pre, grad_W_enc, grad_b_enc, None, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, W_dec, bias, active, precision):
        rows = W_dec.to(operand_dtype(W_dec, precision))
        ctx.active = active
        ctx.save_for_backward(values, rows)
        return active.decode(values, rows, bias)

    @staticmethod
    def backward(ctx, grad):
        values, rows = ctx.saved_tensors
        grad_bias = grad.sum(0) if ctx.needs_input_grad[2] else None
        grad = grad.to(rows.dtype).contiguous()
        grad_values = ctx.active.dot(grad, rows) if ctx.needs_input_grad[0] else None
        grad_W_dec = ctx.active.sum_tokens(values, grad) if ctx.needs_input_grad[1] else None
        return grad_values, grad_W_dec, grad_bias, None, None


def encode(x: Float[Tensor, "batch d"], b_pre: Float[Tensor, " d"], W_enc: Float[Tensor, "n_latents d"],
           b_enc: Float[Tensor, " n_latents"], k: int, precision: str = "fp32",
           choice: Callable | None = None, find: Callable = largest) -> tuple[Float[Tensor, "batch width"], Active]:
    """TopK latents, as their values and their places. Differentiable in all four tensors.

    z = TopK(ReLU(W_enc (x - b_pre) + b_enc))

    Backward: the gradient of `values` reaches the selected rows only, and only where the value is positive:
    the exact Jacobian away from ties.

    Args:
        x: activations.
        b_pre: the bias subtracted before encoding.
        W_enc: encoder, one row a latent.
        b_enc: encoder bias.
        k: how many latents to keep for each token.
        precision: "fp32", or "bf16" to select in bfloat16 (see `select`). On a GPU "bf16" is what mixed precision is elsewhere: the operands of
            every product in bfloat16, here and in `decode`, sums and weights in float32.
        choice: what chooses them, if not the k largest: it is given k and `best`, which returns the m largest pre-activations and
            their latents for any m. It may keep another number of latents, the same for all tokens, and gives a latent that
            it leaves out the value 0.
        find: what finds the largest of each row (see `select`).

    Returns:
        The values (0 where a selected pre-activation was not positive), and the `Active` that places them.

    Paper: §2.3, Eq. (3)
    """
    def choose_of(centred):
        def best(m):
            return select(centred, W_enc, b_enc, m, precision, find)

        return choice(k, best) if choice else best(k)

    values, _, active = _Encode.apply(x, b_pre, W_enc, b_enc, choose_of, precision)
    return values, active


def decode(values: Float[Tensor, "batch k"], active: Active, W_dec: Float[Tensor, "n_latents d"], b_pre: Float[Tensor, " d"] | None = None,
           precision: str = "fp32") -> Float[Tensor, "batch d"]:
    """The reconstruction Σ_j values_bj W_dec[indices_bj] + b_pre. Differentiable in `values`, `W_dec` and `b_pre`.

    Args:
        values: the active latents.
        active: their places.
        W_dec: decoder, one row a latent.
        b_pre: what was subtracted before encoding; None adds nothing.
        precision: as in `encode`; it makes no difference on a CPU.

    Returns:
        [batch, d], in the units of `W_dec` times those of `values`.

    Paper: §2.2, Eq. (1)
    """
    return _Decode.apply(values, W_dec, b_pre, active, precision)
