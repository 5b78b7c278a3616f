"""How good an SAE is: sums over tokens, and one division at the end."""
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import nan

import numpy
import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from saelib import relu_path
from saelib.checks import as_tensor, require

BATCH = 2048
MATCH = 0.9  # cosine similarity above which a decoder row counts as a true feature


def rows(x: Tensor | numpy.ndarray | Iterable) -> Iterable[Tensor]:
    """Batches of activations, float32: a tensor or an array is cut into pieces, an iterable of such is passed on, but
    for what is empty."""
    whole = isinstance(x, Tensor | numpy.ndarray)
    require(whole or isinstance(x, Iterable), "x", type(x).__name__,
            "activations [n_tokens, d_model], or batches of them")
    for batch in as_tensor(x, "x").split(BATCH) if whole else (as_tensor(part, "x") for part in x):
        require(isinstance(batch, Tensor), "x", f"batches of {type(batch).__name__}",
                "batches that are tensors or arrays [batch, d_model]")
        if len(batch):
            yield batch.float()


@contextmanager
def judging(sae) -> Iterator[None]:
    """The SAE in evaluation mode, and then again in the mode that it was in."""
    was_training = sae.training
    sae.eval()
    try:
        yield
    finally:
        sae.train(was_training)


def checked(mean, d_model: int) -> Tensor | None:
    """What may be the mean of `evaluate`. Raise ValueError if it is something else."""
    is_mean = isinstance(mean, Tensor) and mean.shape == (d_model,) and bool(mean.isfinite().all())
    require(mean is None or is_mean, "mean", f"of shape {list(mean.shape)}" if isinstance(mean, Tensor) else mean,
            f"None, or finite numbers of shape [d_model = {d_model}]")
    return mean


@torch.no_grad()
def evaluate(sae, x: Tensor | numpy.ndarray | Iterable, mean: Tensor | numpy.ndarray | None = None) -> dict[str, float]:
    """Reconstruction and sparsity of an SAE on held-out activations. It changes nothing in the SAE.

    normalized_mse     = Σ_b ||x_b - x_hat_b||² / Σ_b ||x_b - mean||²
    explained_variance = 1 - Σ_b ||e_b - mean(e)||² / Σ_b ||x_b - mean(x)||²,  e = x - x_hat

    The two differ where the reconstruction is biased: the first counts the bias, the second hides it.

    Args:
        sae: the autoencoder.
        x: activations [n_tokens, d_model], a tensor or an array, or an iterable of those, batch by batch.
        mean: what the trivial predictor says, the mean of the TRAINING activations; the mean of `x` if None.

    Returns:
        `normalized_mse`, `explained_variance`, `l0` (mean number of active latents a token), `l0_most` (their number in
        the token that has most), `l1` (mean sum of a token's latents, without their signs), `dead_fraction` (latents
        that fire on none of these tokens: compare it between evaluations on equally many), `short_fraction` (tokens
        with fewer active latents than the method's k; 0 without a k), `n_tokens` (how many were judged). The first two
        are NaN where there is nothing to explain.

    Raises:
        ValueError: no tokens, a wrong shape, activations that are not finite, or not normalised as the SAE's were (see
            `SAE.normalised`).

    Paper: §2.1 (normalized MSE), §2.4 (dead latents)
    """
    require(isinstance(sae, torch.nn.Module), "sae", type(sae).__name__, "an SAE")
    device = sae.W_dec.device
    n_tokens, n_short, active, most, l1 = 0, 0, 0, 0, 0.0
    fired = torch.zeros(sae.n_latents, dtype=torch.bool, device=device)
    scratch, mean = relu_path.Scratch(), checked(as_tensor(mean, "mean"), sae.d_model)
    sums = {name: torch.zeros(sae.d_model, dtype=torch.float64, device=device) for name in ("x", "x²", "e", "e²")}
    for batch in rows(x):
        batch = batch.to(device)
        sae.check(batch)
        sae.check_normalised(batch)
        with judging(sae):
            out = sae.run(batch, scratch=scratch)
        error, on = (batch - out.x_hat).double(), out.latents != 0
        l0 = on.sum(1)
        n_tokens, active, most = n_tokens + len(batch), active + l0.sum(), l0.max().clamp_min(most)
        l1 += torch.linalg.vector_norm(out.latents, 1, dtype=torch.float64)
        n_short += (l0 < getattr(sae.method, "k", 0)).sum()
        fired |= out.fired() if out.active is not None else on.any(0)
        for name, value in (("x", batch.double()), ("e", error)):
            sums[name] += value.sum(0)
            sums[name + "²"] += value.pow(2).sum(0)
    if n_tokens == 0:
        raise ValueError("x is empty: it must hold at least one token")
    if not torch.isfinite(sums["x²"]).all():
        raise ValueError("x holds NaN or Inf: activations must be finite")
    require(bool(torch.isfinite(sums["e²"]).all()), "sae", "one that reconstructs NaN or Inf", "of finite weights")
    mean_x, mean_e = sums["x"] / n_tokens, sums["e"] / n_tokens
    centre = mean_x if mean is None else mean.to(device).double()
    about_centre = (sums["x²"] - 2 * centre * sums["x"] + n_tokens * centre**2).sum()
    about_mean = (sums["x²"] - n_tokens * mean_x**2).sum()
    unexplained = (sums["e²"] - n_tokens * mean_e**2).sum()
    rounding = 1e-12 * sums["x²"].sum()  # of activations that do not differ, this is left
    return {
        "normalized_mse": float(sums["e²"].sum() / about_centre) if about_centre > rounding else nan,
        "explained_variance": float(1 - unexplained / about_mean) if about_mean > rounding else nan,
        "l0": float(active / n_tokens), "l0_most": float(most), "l1": float(l1 / n_tokens),
        "dead_fraction": float(1 - fired.float().mean()), "short_fraction": float(n_short / n_tokens),
        "n_tokens": n_tokens,
    }


@torch.no_grad()
def recovery(W_dec: Float[Tensor, "n_latents d_model"], truth: Float[Tensor, "n_features d_model"]) -> dict[str, float]:
    """How well a decoder's rows recover the directions of a known dictionary. Both have unit rows.

    mean_max_cosine = mean_i max_j <truth_i, W_dec_j>

    Precision and recall count the pairs with a cosine similarity above 0.9 after matching rows and features one to one
    (Hungarian algorithm), over the number of rows and of features.

    Args:
        W_dec: decoder, one row a latent.
        truth: the dictionary, one row a feature.

    Returns:
        `mean_max_cosine`, `precision`, `recall`.

    Ours, because only a known dictionary tells recovery from reconstruction.
    """
    cosine = (truth @ W_dec.t()).cpu()
    features, latents = linear_sum_assignment(cosine.numpy(), maximize=True)
    n_found = int((cosine[features, latents] > MATCH).sum())
    return {"mean_max_cosine": float(cosine.max(1).values.mean()), "precision": n_found / len(W_dec),
            "recall": n_found / len(truth)}
