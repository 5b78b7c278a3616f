"""The path of a ReLU autoencoder: the dense latents, in as few passes over them as they allow.

How many latents are active is not known before they are computed, and changes in training: half of them at the start,
few at the end. While many are, four more matrix products follow. Once few are, the active ones are multiplied one by
one (see `saelib.pairs`), which computes the same and costs less. Where it is asked for, `saelib.native` serves the
shares between, unless the CPU multiplies faster than it can skip. The plain twin of all is `SAE.run` with
`path="dense"`, which leaves the gradients to autograd.
"""
import math
from copy import copy
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from saelib import native, pairs
from saelib.checks import first_derivative_only
from saelib.products import cpu_has, linear

# With this many latents for each active one, or more, going through the active ones costs less than a product of
# matrices: measured in bfloat16; in float32 a little fewer are enough.
FEW = 24
FEW_COMPILED = 80  # the same where the other way is `saelib.native`
# the same where the CPU multiplies matrices of bfloat16 in tiles (AMX), and too fast for any other way
FEW_ON_TILES = 64
FEW_WANTED = 3  # the same for its product of which only the active entries are wanted
SAMPLE = 64  # tokens on which the share is counted
GROUP = 8  # latents whose maximum is looked at first


class Scratch(dict):
    """Memory to use again. A fresh tensor of megabytes costs as much as the product that fills it: its pages come
    from the system one by one. What was written here before is gone once the same name is asked for again."""

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        tensor = self.get(name)
        if tensor is None or (tensor.shape, tensor.dtype, tensor.device) != (shape, dtype, device):
            tensor = self[name] = torch.empty(shape, dtype=dtype, device=device)
        return tensor.detach()


def few_active(latents: Float[Tensor, "batch n_latents"], few: float = FEW) -> bool:
    """Whether one by one is cheaper, by the share of active latents in a sample. On a GPU products are cheap."""
    sample = latents[:SAMPLE]
    return not latents.is_cuda and few * int((sample > 0).sum()) < sample.numel()


def nonzero(latents: Float[Tensor, "batch n_latents"]) -> tuple[Tensor, Tensor]:
    """Tokens and latents of the positive entries, token by token: `torch.nonzero`, on fewer numbers.

    Cut a row into strided groups (see `selection.largest`), and look only into those whose maximum is positive.
    """
    batch, n_latents = latents.shape
    size = math.gcd(n_latents, GROUP)
    groups = latents.view(batch, size, n_latents // size)
    tokens, group = groups.amax(1).nonzero(as_tuple=True)
    inside, place = groups[tokens, :, group].nonzero(as_tuple=True)
    return tokens[inside], place * (n_latents // size) + group[inside]


def masked_product(latents: Tensor, tokens: Tensor, rows: Tensor, start: Tensor, scratch: Scratch) -> Tensor:
    """<tokens_b, rows_j> + start_bj where a latent is active, and 0 elsewhere: by a product of matrices."""
    out = scratch.take("grad", latents.shape, latents.dtype, latents.device)
    if start.stride(0) == 0:  # the same for every token, as L1's gradient is
        out = linear(tokens, rows, start[0].contiguous(), out)
    else:
        torch.addmm(start, tokens, rows.t(), out=out)
    return torch.ops.aten.threshold_backward.grad_input(out, latents, 0, grad_input=out)


class Many:
    """What follows the latents: a matrix product decodes them, and three or four more make the gradients, all in the
    type of the latents."""

    def __init__(self, centred: Tensor, W_enc: Tensor, W_dec: Tensor, latents: Tensor, scratch: Scratch):
        self.centred, self.W_enc, self.W_dec, self.latents, self.scratch = centred, W_enc, W_dec, latents, scratch

    @cached_property
    def decoder(self) -> Tensor:
        """W_dec in the type of the latents."""
        return self.W_dec.to(self.latents.dtype)

    def decode(self) -> Tensor:
        """W_dec^T z."""
        return self.latents @ self.decoder

    def gradients(self, grad_x_hat: Tensor, grad_latents: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of the pre-activations, of W_enc, b_enc and W_dec."""
        grad_x_hat, centred = grad_x_hat.to(self.latents.dtype), self.centred.to(self.latents.dtype)
        grad = masked_product(self.latents, grad_x_hat, self.decoder, grad_latents, self.scratch)
        return grad, grad.t() @ centred, grad.sum(0), self.latents.t() @ grad_x_hat

    def of_x(self, grad: Tensor) -> Tensor:
        """The gradient of x, from that of the pre-activations."""
        return grad @ self.W_enc.to(grad.dtype)


class Compiled(Many):
    """The same by compiled products that pass over what is zero, however many that are. While many latents are active
    their gradient is cheaper by a product of matrices."""

    def decode(self) -> Tensor:
        return native.decode(self.latents, self.W_dec)

    def gradients(self, grad_x_hat: Tensor, grad_latents: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        product = native.masked_product if few_active(self.latents, FEW_WANTED) else masked_product
        grad = product(self.latents, grad_x_hat.to(self.latents.dtype), self.decoder, grad_latents, self.scratch)
        return grad, native.sum_tokens(grad, self.centred), grad.sum(0), native.sum_tokens(self.latents, grad_x_hat)

    def of_x(self, grad: Tensor) -> Tensor:
        return native.decode(grad, self.W_enc)


class Few(Many):
    """The same over the active latents alone, in the type of the weights."""
    kind = pairs.Active

    def __init__(self, centred: Tensor, W_enc: Tensor, W_dec: Tensor, latents: Tensor, scratch: Scratch):
        super().__init__(centred, W_enc, W_dec, latents, scratch)
        self.places = tokens, indices = nonzero(latents)
        starts = torch.zeros(len(latents) + 1, dtype=torch.int32, device=latents.device)
        torch.cumsum(torch.bincount(tokens, minlength=len(latents)), 0, out=starts[1:])
        self.active, self.values = self.kind(indices.int(), len(W_enc), starts), latents[self.places].to(W_enc.dtype)

    def decode(self) -> Tensor:
        return self.active.decode(self.values, self.W_dec)

    def gradients(self, grad_x_hat: Tensor, grad_latents: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.active.backward(grad_x_hat, self.W_dec, grad_latents[self.places], self.centred, self.values)

    def of_x(self, grad: Tensor) -> Tensor:
        return self.active.decode(grad, self.W_enc)


class FewCompiled(Few):
    """The same by compiled sums over the pairs."""
    kind = native.Active


def way(latents: Float[Tensor, "batch n_latents"], compiled: bool) -> type[Many]:
    """The cheapest of these, by the share of active latents and by how fast this CPU multiplies."""
    tiles = latents.dtype == torch.bfloat16 and not latents.is_cuda and cpu_has("amx_bf16")
    if few_active(latents, FEW_ON_TILES if tiles else FEW_COMPILED if compiled else FEW):
        return FewCompiled if compiled else Few
    return Compiled if compiled and not tiles else Many


class _ReLU(torch.autograd.Function):
    """x_hat and z, with the gradients of a way."""

    @staticmethod
    def forward(ctx, x, b_pre, W_enc, b_enc, W_dec, chosen):
        x_hat, latents = chosen.decode().to(x.dtype).add_(b_pre), chosen.latents.detach()
        tensors = {name: value for name, value in vars(chosen).items() if isinstance(value, Tensor)}
        ctx.way, ctx.names = chosen, list(tensors)
        ctx.save_for_backward(*tensors.values())  # torch frees them in time, and notices if one is overwritten
        for name in tensors:
            delattr(chosen, name)
        return x_hat, latents

    @staticmethod
    def backward(ctx, grad_x_hat, grad_latents):
        first_derivative_only("a sparse path, unlike path='dense',")
        chosen = copy(ctx.way)
        vars(chosen).update(zip(ctx.names, ctx.saved_tensors))
        grad, *weights = chosen.gradients(grad_x_hat.contiguous(), grad_latents)
        grad_W_enc, grad_b_enc, grad_W_dec = (weight.to(chosen.W_enc.dtype) for weight in weights)
        grad_x = chosen.of_x(grad).to(chosen.W_enc.dtype) if ctx.needs_input_grad[0] else None
        return grad_x, grad_x_hat.sum(0) - grad_b_enc @ chosen.W_enc, grad_W_enc, grad_b_enc, grad_W_dec, None


def relu(x: Float[Tensor, "batch d"], b_pre: Float[Tensor, " d"], W_enc: Float[Tensor, "n_latents d"],
         b_enc: Float[Tensor, " n_latents"],
         W_dec: Float[Tensor, "n_latents d"], precision: str = "fp32", scratch: Scratch | None = None,
         compiled: bool = False) -> tuple[Tensor, Tensor]:
    """A whole ReLU autoencoder. Differentiable in all five tensors.

    z = ReLU(W_enc (x - b_pre) + b_enc),  x_hat = W_dec^T z + b_pre

    Args:
        x: activations.
        b_pre, W_enc, b_enc, W_dec: the autoencoder, one row a latent.
        precision: "fp32" (the type of `x`), or "bf16" to multiply matrices in bfloat16.
        scratch: memory for the latents and their gradient; both are overwritten by the next call that gets it.
        compiled: whether the products of `saelib.native` are to be used.

    Returns:
        x_hat [batch, d] in the type of `x`, and z [batch, n_latents] in the precision asked for.

    Paper: §2.2, Eq. (1)
    """
    dtype, scratch = torch.bfloat16 if precision == "bf16" else x.dtype, Scratch() if scratch is None else scratch
    if compiled:
        native.check_sizes(x.shape[1], len(W_enc))
    with torch.no_grad():
        centred, encoder = x - b_pre, W_enc.to(dtype)
        latents = scratch.take("latents", (len(x), len(W_enc)), dtype, x.device)
        latents = linear(centred.to(dtype), encoder, b_enc.to(dtype), latents, rectify=True)
        chosen = way(latents, compiled)(centred, W_enc, W_dec, latents, scratch)
    return _ReLU.apply(x, b_pre, W_enc, b_enc, W_dec, chosen)
