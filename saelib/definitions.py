"""Six definitions of a normalized reconstruction error that are in use. `saelib.evaluate` uses the first."""
import torch
from jaxtyping import Float
from torch import Tensor


def normalized_mses(x: Float[Tensor, "n_tokens d_model"], x_hat: Float[Tensor, "n_tokens d_model"],
                    mean: Float[Tensor, " d_model"], batch_size: int = 256) -> dict[str, float]:
    """One reconstruction under six definitions.

    Args:
        x: held-out activations.
        x_hat: their reconstructions.
        mean: the mean of the training activations.
        batch_size: of the definition that divides in each batch.

    Returns:
        The definition's name -> its value; 0 is a perfect reconstruction under all of them.

    Ours, because papers that say "normalized MSE" mean different things.
    """
    x, x_hat, mean = x.double(), x_hat.double(), mean.double()
    error = x - x_hat
    squared, about_mean = error.pow(2), (x - mean).pow(2)
    # of one size but for one token: a last batch of one would have no variance
    n_batches = max(1, len(x) // batch_size)
    batches = [(e.sum(), (b - b.mean(0)).pow(2).sum())
               for e, b in zip(squared.tensor_split(n_batches), x.tensor_split(n_batches))]
    values = {
        "ours": squared.sum() / about_mean.sum(),
        "energy": squared.sum() / x.pow(2).sum(),
        "batch mean": torch.stack([e / v for e, v in batches]).mean(),
        "residual variance": (error - error.mean(0)).pow(2).sum() / (x - x.mean(0)).pow(2).sum(),
        "mean of ratios": (squared.sum(1) / about_mean.sum(1)).mean(),
        "per dimension": (squared.sum(0) / (x - x.mean(0)).pow(2).sum(0)).mean(),
    }
    return {name: float(value) for name, value in values.items()}
