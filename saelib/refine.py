"""Refinement: the best latents that a frozen decoder and a frozen support allow."""
import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import nnls
from torch import Tensor

ROWS = 1024  # tokens whose small systems are held at once


def supports(latents: Float[Tensor, "batch n_latents"]) -> tuple[Int[Tensor, "batch m"], Bool[Tensor, "batch m"]]:
    """Where the latents of each token are not zero, padded to the longest support of the batch.

    Returns:
        Indices, and whether each is part of the support or only padding.
    """
    on = latents != 0
    m = max(1, int(on.sum(1).max()))
    used, indices = on.to(torch.uint8).topk(m, dim=1)
    return indices, used.bool()


def descend(gram: Float[Tensor, "batch m m"], target: Float[Tensor, "batch m"], start: Float[Tensor, "batch m"],
            tolerance: float = 1e-6, max_sweeps: int = 2000) -> Float[Tensor, "batch m"]:
    """Non-negative least squares for many small systems, by coordinate descent.

    min_z  zᵀ G z - 2 zᵀ c,  z ≥ 0:   z_i <- max(0, z_i - (G z - c)_i / G_ii)

    The problem is convex, so what no single coordinate can improve is the optimum. Several coordinates in turn make
    a sweep; the sweeps end when none of them moves any coordinate by more than `tolerance`.

    Args:
        gram: G, with a positive diagonal.
        target: c.
        start: where to begin, 0 or more.
        tolerance: in the units of z.
        max_sweeps: at most.

    Returns:
        z. Systems that still move after `max_sweeps`, as where two decoder rows nearly coincide, are solved by scipy's
        active-set method.
    """
    z, moving = start.clone(), torch.arange(len(start), device=start.device)
    here, slope, G = z.clone(), torch.einsum("bij,bj->bi", gram, z) - target, gram
    for _ in range(max_sweeps):
        before = here.clone()
        for i in range(z.shape[1]):
            step = torch.clamp_min(here[:, i] - slope[:, i] / G[:, i, i], 0) - here[:, i]
            here[:, i] += step
            slope.addcmul_(G[:, i], step[:, None])
        z[moving] = here
        on = (here - before).abs().amax(1) > tolerance
        if not on.any():
            return z
        if 2 * on.sum() < len(on):  # go on with the tokens that still move, once the others are the most
            moving, here, slope, G = moving[on], here[on], slope[on], G[on]
    for token in moving.tolist():
        z[token] = exact(gram[token], target[token])
    return z


def exact(gram: Float[Tensor, "m m"], target: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
    """The same for one system, by scipy: with G = Aᵀ A it is min ||A z - b||, Aᵀ b = c."""
    values, vectors = torch.linalg.eigh(gram.cpu())
    kept = values > 1e-12 * values[-1]
    root, A = values[kept].sqrt(), vectors[:, kept].t() * values[kept].sqrt()[:, None]
    b = (vectors[:, kept].t() @ target.cpu()) / root
    return torch.from_numpy(nnls(A.numpy(), b.numpy())[0]).to(gram)


@torch.no_grad()
def refine(x: Float[Tensor, "batch d_model"], latents: Float[Tensor, "batch n_latents"],
           W_dec: Float[Tensor, "n_latents d_model"],
           b_pre: Float[Tensor, " d_model"], tolerance: float = 1e-6) -> Float[Tensor, "batch n_latents"]:
    """The latents that reconstruct x best with the same support, none negative, decoder and b_pre as they are.

    z* = argmin ||x - b_pre - Σ_{i in support(z)} z_i W_dec[i]||²,  z_i ≥ 0

    Each token is a least-squares problem in its active latents alone, given by the Gram matrix of their decoder rows.

    Args:
        x: activations.
        latents: what the SAE's encoder says, 0 or more; their zeros stay zeros.
        W_dec: decoder, one row a latent, of any norm but 0.
        b_pre: bias of the reconstruction.
        tolerance: of z* (see `descend`).

    Returns:
        Refined latents, dense, of the same type as `latents`.

    Paper: §5.1 (the cost of activation shrinkage)
    """
    refined = torch.zeros_like(latents)
    for start in range(0, len(x), ROWS):
        here = slice(start, start + ROWS)
        indices, used = supports(latents[here])
        rows = W_dec[indices].double() * used[:, :, None]  # padding becomes a row of zeros ...
        gram = rows @ rows.transpose(1, 2)
        gram.diagonal(dim1=1, dim2=2).add_((~used).double())  # ... that the diagonal keeps at 0
        target = torch.einsum("bmd,bd->bm", rows, (x[here] - b_pre).double())
        best = descend(gram, target, latents[here].gather(1, indices).double(), tolerance)
        refined[here] = torch.zeros_like(latents[here]).scatter(1, indices, best.to(latents.dtype))
    return refined


def moves(latents: Float[Tensor, "batch n_latents"], refined: Float[Tensor, "batch n_latents"]) -> tuple[float, float]:
    """What refinement did to the latents as a whole, relative to their sum.

    shift = Σ (z* - z) / Σ z,  change = Σ abs(z* - z) / Σ z

    Returns:
        The shift, which is above 0 where the latents were too small, and the change, which counts both directions.

    Ours, because the paper shows histograms.
    """
    difference = (refined - latents).double()
    return float(difference.sum() / latents.double().sum()), float(difference.abs().sum() / latents.double().sum())


def moves_by_fifth(latents: Float[Tensor, "batch n_latents"],
                   refined: Float[Tensor, "batch n_latents"]) -> list[tuple[float, float]]:
    """How refinement moved small and large latents: the active ones in five parts of equal number, by their size
    before.

    Returns:
        The mean of z and the mean of z* - z in each part, from the smallest latents to the largest.

    Ours, because a pull that is the same for all sizes is what L1 is said to have.
    """
    size, order = latents[latents > 0].sort()
    difference = (refined - latents)[latents > 0][order]
    return [(float(z.mean()), float(move.mean())) for z, move in zip(size.tensor_split(5), difference.tensor_split(5))]
