"""What is done to a model's activations before an SAE sees them, and how it is undone."""
import torch
from jaxtyping import Float
from torch import Tensor

from saelib.checks import require

UNIT_NORM = "unit_norm"
TOLERANCE = 0.01  # of a norm: half precision rounds to a few thousandths


def check_normalisation(value: str) -> None:
    """Raise ValueError unless it is the name of something that is done to activations."""
    require(value in ("none", UNIT_NORM), "normalisation", value, f"'none' or {UNIT_NORM!r}")


def size_and_mean(x: Float[Tensor, "*batch d_model"]) -> tuple[Float[Tensor, "*batch 1"], Float[Tensor, "*batch 1"]]:
    """What `normalise` takes from each vector, in float32: x = normalise(x) · size + mean."""
    x = x.float()  # a half has no room for squares
    mean = x.mean(-1, keepdim=True)
    return (x - mean).norm(dim=-1, keepdim=True), mean


def normalise(x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
    """Subtract each vector's mean over its dimensions, then scale it to unit norm.

    x <- (x - mean_d(x)) / ||x - mean_d(x)||

    Unit NORM, not unit standard deviation: they differ by sqrt(d_model), and b_pre and L1 coefficients scale with it.

    Args:
        x: activations as the model makes them.

    Returns:
        Vectors of norm 1, in float32. One that is constant over its dimensions becomes 0, and so does one whose square
        float32 has no room for: of a norm above 1e19, or below about 1e-22 sqrt(d_model).

    Paper: §2.1
    """
    x, (size, mean) = x.float(), size_and_mean(x)
    # what is left of such a vector is rounding, and would get unit norm
    constant = size <= 4 * torch.finfo(x.dtype).eps * x.norm(dim=-1, keepdim=True)
    # no division by 0, whose gradient would outlive the mask
    return ((x - mean) / size.masked_fill(constant, 1)).masked_fill(constant, 0)


def check_normalised(name: str, x: Float[Tensor, "batch d_model"], normalisation: str, rule: str) -> None:
    """Raise ValueError, with the argument's name and the rule, if x is not as `normalisation` leaves it."""
    if normalisation == UNIT_NORM:
        norm = x.float().norm(dim=1)
        wrong = norm[(norm > 0) & ((norm - 1).abs() > TOLERANCE)]
        require(not len(wrong), name, f"with a vector of norm {float(wrong[:1].sum()):.3g}",
                f"{rule}, for the normalisation is {normalisation!r}")
