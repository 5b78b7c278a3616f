"""The terms of the training loss: pure functions from tensors to a scalar tensor."""
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def squared_error(x: Float[Tensor, "batch d_model"], x_hat: Float[Tensor, "batch d_model"]) -> Float[Tensor, ""]:
    """Squared error of the reconstruction, summed over dimensions, averaged over tokens.

    L = mean_b ||x_b - x_hat_b||²

    Args:
        x: model activations.
        x_hat: their reconstructions.

    Returns:
        A scalar, in the squared units of `x`.

    Paper: §2.2, Eq. (1)
    """
    return F.mse_loss(x_hat, x, reduction="sum") / len(x)  # Eq. (1)


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
        A scalar without units: 1 for the prediction mean(e), and 0 where nothing is left to explain.

    Paper: Appendix A.2 (the auxiliary loss)
    """
    target = residual.detach()
    scale = (target - target.mean(0)).pow(2).sum()
    return (residual_hat - target).pow(2).sum() / scale.clamp_min(torch.finfo(scale.dtype).tiny)


def multi_topk(x: Float[Tensor, "batch d_model"], x_hat_k: Float[Tensor, "batch d_model"],
               x_hat_4k: Float[Tensor, "batch d_model"]) -> Float[Tensor, ""]:
    """The sum of the losses at k and at 4k active latents, the second at an eighth of the weight.

    L = L(k) + L(4k) / 8

    Args:
        x: model activations.
        x_hat_k: reconstructions from the k largest latents.
        x_hat_4k: reconstructions from the 4k largest.

    Returns:
        A scalar, in the squared units of `x`.

    Paper: §5.2 (Multi-TopK)
    """
    return squared_error(x, x_hat_k) + squared_error(x, x_hat_4k) / 8
