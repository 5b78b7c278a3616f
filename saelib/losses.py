"""The terms of the training loss: pure functions from tensors to a scalar tensor."""
import torch
from jaxtyping import Float
from torch import Tensor

from saelib.checks import first_derivative_only, require


class _SquaredError(torch.autograd.Function):
    """mean_b ||x_b - x_hat_b||², through one tensor, the residual, which becomes the gradient in place."""

    @staticmethod
    def forward(ctx, x, x_hat):
        residual = x_hat - x
        ctx.save_for_backward(residual)
        return torch.linalg.vector_norm(residual).square() / len(x)

    @staticmethod
    def backward(ctx, grad):
        first_derivative_only("squared_error")
        residual, = ctx.saved_tensors
        slope = residual.mul_(grad * 2 / len(residual))
        return -slope if ctx.needs_input_grad[0] else None, slope


def squared_error(x: Float[Tensor, "batch d_model"], x_hat: Float[Tensor, "batch d_model"]) -> Float[Tensor, ""]:
    """Squared error of the reconstruction, summed over dimensions, averaged over tokens.

    L = mean_b ||x_b - x_hat_b||²

    Args:
        x: model activations.
        x_hat: their reconstructions.

    Returns:
        A scalar, in the squared units of `x`.

    Raises:
        ValueError: two shapes.

    Paper: §2.2, Eq. (1)
    """
    require(x.shape == x_hat.shape, "x_hat", f"of shape {list(x_hat.shape)}", f"of the shape of x, {list(x.shape)}")
    return _SquaredError.apply(x, x_hat)  # Eq. (1)


class _Sum(torch.autograd.Function):
    """The sum, by rows and then in float32. Its derivative is the same everywhere, and stays one number instead of a
    matrix of them."""

    @staticmethod
    def forward(ctx, latents):
        ctx.like = latents.dtype, latents.shape
        return latents.sum(1).sum(dtype=torch.promote_types(latents.dtype, torch.float32))

    @staticmethod
    def backward(ctx, grad):
        dtype, shape = ctx.like
        return grad.to(dtype).expand(shape)


def l1(latents: Float[Tensor, "batch n_latents"]) -> Float[Tensor, ""]:
    """L1 norm of the latents, averaged over tokens. They are never negative, so that it is their sum.

    ||z||₁ = mean_b Σ_i z_bi

    Args:
        latents: z, 0 or more.

    Returns:
        A scalar, in the units of the latents.

    Paper: §2.2 (the penalty that TopK replaces)
    """
    return _Sum.apply(latents) / len(latents)


def auxk(residual: Float[Tensor, "batch d_model"], residual_hat: Float[Tensor, "batch d_model"]) -> Float[Tensor, ""]:
    """How badly the dead latents reconstruct what the living ones left over.

    L_aux = Σ_b ||e_b - ê_b||² / Σ_b ||e_b - mean(e)||²

    It is normalised, so that its weight means the same early and late in training. The residual is the
    target, not a path for the gradient: it is detached here.

    Args:
        residual: e = x - x_hat.
        residual_hat: ê, the dead latents' reconstruction of e, without b_pre.

    Returns:
        A scalar without units: 1 for the prediction mean(e), and 0, without a gradient, where e is the same for all
        tokens, as it is for one.

    Paper: Appendix A.2 (the auxiliary loss)
    """
    target = residual.detach()
    scale = (target - target.mean(0)).pow(2).sum()
    return (residual_hat - target).pow(2).sum() / scale.masked_fill(scale == 0, torch.inf)
