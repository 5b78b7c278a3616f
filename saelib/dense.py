"""The dense path of a ReLU autoencoder: five matrix products, and as few passes over the latents as they allow.

Its plain twin is `SAE.forward` with `path="dense"`, which leaves the gradients to autograd.
"""
import torch
from jaxtyping import Float
from torch import Tensor


class Scratch(dict):
    """Memory to use again. A fresh tensor of megabytes costs as much as the product that fills it: its pages come
    from the system one by one. What was written here before is gone once the same name is asked for again."""

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        tensor = self.get(name)
        if tensor is None or (tensor.shape, tensor.dtype, tensor.device) != (shape, dtype, device):
            tensor = self[name] = torch.empty(shape, dtype=dtype, device=device)
        return tensor.detach()


class _ReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, b_pre, W_enc, b_enc, W_dec, dtype, scratch):
        centred, encoder, decoder = (x - b_pre).to(dtype), W_enc.to(dtype), W_dec.to(dtype)
        latents = scratch.take("latents", (len(x), len(W_enc)), dtype, x.device)
        torch.addmm(b_enc.to(dtype), centred, encoder.t(), out=latents).relu_()
        ctx.save_for_backward(centred, encoder, decoder, latents, W_enc)
        ctx.scratch = scratch
        return (latents @ decoder).to(x.dtype) + b_pre, latents

    @staticmethod
    def backward(ctx, grad_x_hat, grad_latents):
        centred, encoder, decoder, latents, W_enc = ctx.saved_tensors
        cast_grad = grad_x_hat.to(centred.dtype)
        grad = ctx.scratch.take("grad", latents.shape, latents.dtype, latents.device)
        torch.addmm(grad_latents, cast_grad, decoder.t(), out=grad)
        torch.ops.aten.threshold_backward.grad_input(grad, latents, 0, grad_input=grad)
        grad_b_enc = grad.sum(0).to(W_enc.dtype)
        grad_W_enc, grad_W_dec = (grad.t() @ centred).to(W_enc.dtype), (latents.t() @ cast_grad).to(W_enc.dtype)
        grad_b_pre = grad_x_hat.sum(0) - grad_b_enc @ W_enc
        grad_x = (grad @ encoder).to(W_enc.dtype) if ctx.needs_input_grad[0] else None
        return grad_x, grad_b_pre, grad_W_enc, grad_b_enc, grad_W_dec, None, None


def relu(x: Float[Tensor, "batch d"], b_pre: Float[Tensor, " d"], W_enc: Float[Tensor, "n_latents d"], b_enc: Float[Tensor, " n_latents"],
         W_dec: Float[Tensor, "n_latents d"], precision: str = "fp32", scratch: Scratch | None = None) -> tuple[Tensor, Tensor]:
    """A whole ReLU autoencoder as five matrix products and two passes over the latents. Differentiable in all five tensors.

    z = ReLU(W_enc (x - b_pre) + b_enc),  x_hat = W_dec^T z + b_pre

    The mask of the ReLU is laid over the latents' gradient in place.

    Args:
        x: activations.
        b_pre, W_enc, b_enc, W_dec: the autoencoder, one row a latent.
        precision: "fp32" (the type of `x`), or "bf16" to multiply matrices in bfloat16.
        scratch: memory for the latents and their gradient; both are overwritten by the next call that gets it.

    Returns:
        x_hat [batch, d] in the type of `x`, and z [batch, n_latents] in the precision asked for.

    Paper: §2.2, Eq. (1)
    """
    dtype = torch.bfloat16 if precision == "bf16" else x.dtype
    return _ReLU.apply(x, b_pre, W_enc, b_enc, W_dec, dtype, Scratch() if scratch is None else scratch)
