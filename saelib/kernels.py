"""The sparse path: encode, select and decode without ever forming the dense latents or their gradient.

`[batch, n_latents]` latents with k non-zeros a row are kept as `values` [batch, k] beside `Active`, which knows the
indices and the products that training needs (see `saelib.pairs`). The plain twin of it all is `SAE.run` with
`path="dense"`.
"""
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelib.checks import first_derivative_only
from saelib.pairs import Active, ActiveOnGPU
from saelib.selection import has_kernels

BLOCK_ROWS = 512  # tokens whose pre-activations are held at once: few enough to stay in the cache
MARGIN = 0.25  # extra candidates that a bf16 selection keeps for the exact choice

def on_gpu(x: Tensor) -> bool:
    """Whether the kernels in Triton take `x`: they are for float32 and bfloat16, on the GPUs of `has_kernels`."""
    return has_kernels(x.device) and x.dtype in (torch.float32, torch.bfloat16)


@torch.no_grad()
def select(x: Float[Tensor, "batch d"], W_enc: Float[Tensor, "n_latents d"], b_enc: Float[Tensor, " n_latents"],
           k: int, precision: str = "fp32",
           kind: type[Active] = Active) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
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
        kind: of `Active`, whose search and products are used on the CPU.

    Returns:
        Pre-activations and the latents that they belong to (int32).

    Paper: §2.3, Eq. (2)
    """
    if on_gpu(x):
        from saelib import triton_select
        dtype = torch.bfloat16 if precision == "bf16" else x.dtype
        return triton_select.select(x.to(dtype), W_enc.to(dtype), b_enc, k)
    if precision == "fp32":
        return choose(x, W_enc, b_enc, k, x.dtype, kind.largest)
    n_kept = min(len(W_enc), k + max(4, round(k * MARGIN)))
    indices = choose(x, W_enc, b_enc, n_kept, torch.bfloat16, kind.largest)[1]
    exact = kind(indices, len(W_enc)).dot(x, W_enc) + b_enc[indices]
    values, best = kind.largest(exact, k)
    return values, indices.gather(1, best.long())


def choose(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, dtype: torch.dtype,
           largest: Callable) -> tuple[Tensor, Tensor]:
    """The k largest of x W_encᵀ + b_enc as `dtype` computes them, a block of tokens at a time (see `select`).
    `products.linear` would gain little here, and each block would take fresh memory."""
    values, indices = x.new_empty(len(x), k), torch.empty(len(x), k, dtype=torch.int32, device=x.device)
    weight, bias = W_enc.to(dtype).t(), b_enc.to(dtype)
    buffer = torch.empty(min(BLOCK_ROWS, len(x)), len(W_enc), dtype=dtype, device=x.device)
    for start in range(0, len(x), BLOCK_ROWS):
        here = slice(start, start + BLOCK_ROWS)
        block = x[here].to(dtype)
        values[here], indices[here] = largest(torch.addmm(bias, block, weight, out=buffer[: len(block)]), k)
    return values, indices


class _Autoencode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, b_pre, W_enc, b_enc, W_dec, b_out, choice, kind, dtype, copies):
        encoder, decoder = operand(W_enc, dtype, copies, "W_enc"), operand(W_dec, dtype, copies, "W_dec")
        centred = kind.centre(x, b_pre, dtype)
        values, indices = choice(centred, encoder)
        values.relu_()
        active = kind(indices, len(W_enc))
        ctx.active, ctx.has_b_out = active, b_out is not None
        ctx.save_for_backward(centred, encoder, decoder, values)
        ctx.set_materialize_grads(False)
        return active.decode(values, decoder, b_out), values, active

    @staticmethod
    def backward(ctx, grad_x_hat, grad_values, _):
        first_derivative_only("a sparse path, unlike path='dense',")
        (centred, encoder, decoder, values), active = ctx.saved_tensors, ctx.active
        grad_out = torch.zeros_like(centred) if grad_x_hat is None else grad_x_hat.to(centred.dtype).contiguous()
        grad, grad_W_enc, grad_b_enc, grad_W_dec = active.backward(grad_out, decoder, grad_values, centred, values)
        grad_b_pre = -(grad_b_enc.to(encoder.dtype) @ encoder).to(grad_b_enc.dtype)
        grad_x = active.decode(grad, encoder) if ctx.needs_input_grad[0] else None
        grad_b_out = grad_x_hat.sum(0) if ctx.has_b_out and grad_x_hat is not None else None
        return grad_x, grad_b_pre, grad_W_enc, grad_b_enc, grad_W_dec, grad_b_out, None, None, None, None


def autoencode(x: Float[Tensor, "batch d"], b_pre: Float[Tensor, " d"], W_enc: Float[Tensor, "n_latents d"],
               b_enc: Float[Tensor, " n_latents"],
               W_dec: Float[Tensor, "n_latents d"], k: int, *, b_out: Float[Tensor, " d"] | None = None,
               precision: str = "fp32", choice: Callable | None = None, kind: type[Active] = Active,
               copies: dict | None = None) -> tuple[Float[Tensor, "batch d"], Float[Tensor, "batch width"], Active]:
    """A whole TopK autoencoder. Differentiable in all six tensors, and its latents may be used in a loss too.

    z = TopK(ReLU(W_enc (x - b_pre) + b_enc)),  x_hat = W_dec^T z + b_out

    Backward: the gradient of a latent reaches its own rows only, and only where it is positive: the exact Jacobian away
    from ties.

    Args:
        x: activations.
        b_pre: the bias subtracted before encoding.
        W_enc, b_enc: encoder, one row a latent, and its bias.
        W_dec: decoder, one row a latent.
        k: how many latents to keep for each token.
        b_out: what is added to the reconstruction: b_pre, or nothing.
        precision: "fp32", or "bf16" to select in bfloat16 (see `select`). On a GPU "bf16" is what mixed precision is
            elsewhere: the operands of every product in bfloat16, sums and weights in float32.
        choice: what chooses them, if not the k largest: it is given k and `best`, which returns the m largest
            pre-activations and their latents for any m. It may keep another number of latents, the same for all tokens,
            and gives a latent that it leaves out the value 0.
        kind: of `Active` (see `select`); on a GPU it is `ActiveOnGPU`.
        copies: where copies of the weights in bfloat16 are kept from call to call, by a caller that renews them with
            the weights.

    Returns:
        x_hat; the latents as their values (0 where a selected pre-activation was not positive), and the `Active` that
        places them.

    Paper: §2.2, Eq. (1); §2.3, Eq. (2)
    """
    def choose_of(centred, encoder):
        def best(m):
            return select(centred, encoder, b_enc, m, precision, kind)

        return choice(k, best) if choice else best(k)

    dtype = torch.bfloat16 if precision == "bf16" and on_gpu(x) else x.dtype
    return _Autoencode.apply(x, b_pre, W_enc, b_enc, W_dec, b_out, choose_of, ActiveOnGPU if on_gpu(x) else kind,
                             dtype, copies)


def operand(weight: Tensor, dtype: torch.dtype, copies: dict | None, name: str) -> Tensor:
    """A weight in the type that the products get it in: itself, or a copy, kept in `copies` if there are any."""
    if weight.dtype == dtype or copies is None:
        return weight.to(dtype)
    if name not in copies:
        copies[name] = weight.to(dtype)
    return copies[name]
