"""Methods that change one thing, so that a chapter can show what that thing does. Most of them nobody should use.

They are in `METHODS` like the others, so the loop, the sweeps and the contract tests treat them alike.
"""
import torch
from jaxtyping import Float
from torch import Tensor

from saelib.methods import METHODS, ReLU, TopK


class ReLUShort(ReLU):
    """ReLU with L1 whose encoder starts with rows of length 1 / sqrt(3), as long as torch makes those of a linear
    layer: entries uniform in ±1 / sqrt(d_model).

    Paper: Appendix A.1 (its ReLU baselines keep that length)
    """
    key, label, encoder_norm = "relu_short", "ReLU + L1, shorter rows", 3**-0.5


class ReLUL2(ReLU):
    """ReLU latents with an L2 penalty, whose pull fades with the latent.

    loss = ||x - x_hat||² + l1_coef ||z||₂²

    Ours, because the difference to L1 is what makes zeros.
    """
    key, label = "relu_l2", "ReLU + L2"

    def penalty(self, sae, x, out) -> dict[str, Tensor]:
        return {"l2": self.sparsity * out.latents.float().pow(2).sum(1).mean()}


class ReLUSmooth(ReLU):
    """ReLU latents with a smooth approximation of L1, which has no corner at 0.

    loss = ||x - x_hat||² + l1_coef Σ_i (sqrt(z_i² + eps²) - eps)

    Ours, because a corner is said to be needed for zeros.
    """
    key, label, eps = "relu_smooth", "ReLU + smooth L1", 1e-2

    def penalty(self, sae, x, out) -> dict[str, Tensor]:
        latents = out.latents.float()
        return {"smooth_l1": self.sparsity * (torch.sqrt(latents.pow(2) + self.eps**2) - self.eps).sum(1).mean()}


class ReLUSmoother(ReLUSmooth):
    """The same with eps ten times as large."""
    key, label, eps = "relu_smoother", "ReLU + smoother L1", 1e-1


class ReLUSmoothest(ReLUSmooth):
    """The same with eps a hundred times as large: nearly an L2 penalty."""
    key, label, eps = "relu_smoothest", "ReLU + smoothest L1", 1.0


class ReLUSubgradient(ReLU):
    """ReLU with L1, where the derivative of `|z|` at z = 0 is ours to choose: `at_zero`, anything in [-1, 1].

    loss = ||x - x_hat||² + l1_coef Σ_i |z_i|,  d|z|/dz = at_zero where z = 0, else sign(z)

    Ours, because torch chooses 0, and the choice should not matter behind a ReLU.
    """
    key, label, at_zero = "relu_subgradient", "ReLU + L1, chosen at 0", 0.0

    def penalty(self, sae, x, out) -> dict[str, Tensor]:
        latents = out.latents.float()
        slope = torch.where(latents == 0, self.at_zero, latents.sign()).detach()
        return {"l1": self.sparsity * (slope * latents).sum(1).mean()}


class StraightThroughTopK(TopK):
    """TopK forward, and backward as if every latent had been selected.

    z = TopK(ReLU(pre_acts)) forward,  dz/dpre_acts = 1 for all latents backward

    Ours, because TopK's own backward is often called straight-through, and is not.
    """
    key, label = "topk_ste", "TopK, straight-through"

    def forward(self, pre_acts: Float[Tensor, "batch n_latents"]) -> Float[Tensor, "batch n_latents"]:
        latents = super().forward(pre_acts.detach())
        return latents + pre_acts - pre_acts.detach()


METHODS |= {method.key: method for method in (ReLUShort, ReLUL2, ReLUSmooth, ReLUSmoother, ReLUSmoothest,
                                              ReLUSubgradient, StraightThroughTopK)}
