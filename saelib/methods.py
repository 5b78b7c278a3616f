"""The methods: an activation function with its penalty. A new one is one class here and one entry in `METHODS`."""
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saelib import losses


class Method(nn.Module):
    """An activation function and the penalty that comes with it.

    `key`, `label`, `knob` and `grid` are data about the class: the loop, the sweeps, the figures and the tests
    read them and know no method by name. `knob` says what `sparsity` is: "k" or "l1_coef". A method that has
    `k` keeps at most k latents for each token. One that inherits the forward of `ReLU` or `TopK` runs on their kernels.
    """
    key: ClassVar[str]
    label: ClassVar[str]
    knob: ClassVar[str]
    grid: ClassVar[tuple[float, ...]]

    def __init__(self, n_latents: int, sparsity: float):
        super().__init__()
        self.n_latents, self.sparsity = n_latents, sparsity
        self.check()

    def check(self) -> None:
        """Raise ValueError if `sparsity` is not a value that this method can take."""

    def forward(self, pre_acts: Float[Tensor, "batch n_latents"]) -> Float[Tensor, "batch n_latents"]:
        """Latents from pre-activations: exact zeros where silent."""
        raise TypeError(f"{type(self).__name__} has no forward: a method defines its activation function")

    def penalty(self, sae, x, out) -> dict[str, Tensor]:
        """The weighted terms that this method adds to the squared error."""
        return {}


class ReLU(Method):
    """ReLU latents with an L1 penalty.

    z = max(0, pre_acts),  loss = ||x - x_hat||² + l1_coef ||z||₁

    Paper: §2.2 (the baseline)
    """
    key, label, knob, grid = "relu", "ReLU + L1", "l1_coef", (0.02, 0.04, 0.07, 0.11, 0.17)

    def check(self) -> None:
        if not self.sparsity >= 0:
            raise ValueError(f"sparsity is {self.sparsity!r}: an L1 coefficient must be 0 or more")

    def forward(self, pre_acts: Float[Tensor, "batch n_latents"]) -> Float[Tensor, "batch n_latents"]:
        return torch.relu(pre_acts)

    def penalty(self, sae, x, out) -> dict[str, Tensor]:
        return {"l1": self.sparsity * losses.l1(out.latents)}


class TopK(Method):
    """The k largest pre-activations of each token, by value and not by magnitude; the rest are zero.

    z = TopK(max(0, pre_acts)),  loss = ||x - x_hat||²

    The ReLU is in the paper's code and not in its equation: without it a token with fewer than k positive
    pre-activations would get negative latents.

    Paper: §2.3, Eq. (3)
    """
    key, label, knob, grid = "topk", "TopK", "k", (8, 16, 32, 64, 128)

    def check(self) -> None:
        if self.sparsity != int(self.sparsity) or not 1 <= self.sparsity <= self.n_latents:
            raise ValueError(f"sparsity is {self.sparsity!r}: k must be a whole number from 1 to n_latents = {self.n_latents}")

    @property
    def k(self) -> int:
        return int(self.sparsity)

    def forward(self, pre_acts: Float[Tensor, "batch n_latents"]) -> Float[Tensor, "batch n_latents"]:
        values, indices = pre_acts.topk(self.k, dim=1, sorted=False)
        return torch.zeros_like(pre_acts).scatter(1, indices, torch.relu(values))  # Eq. (3)


METHODS: dict[str, type[Method]] = {method.key: method for method in (ReLU, TopK)}


def make(key: str, n_latents: int, sparsity: float) -> Method:
    """The method called `key`, for n_latents latents at this `sparsity`.

    Raises:
        ValueError: no method has that key, or the method does not take that sparsity.
    """
    if key not in METHODS:
        raise ValueError(f"method is {key!r}: it must be one of {', '.join(METHODS)}")
    return METHODS[key](n_latents, sparsity)
