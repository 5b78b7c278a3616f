"""AuxK: dead latents learn to reconstruct what the living ones leave over."""
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from saelib import kernels, losses, pairs, selection
from saelib.sae import SAE

# dead latents for each active one from which AuxK takes the sparse path: about there both cost the same
FEW_OF_MANY = 8
FEW_OF_MANY_ON_GPU = 64  # the same where matrix products are cheap


def default_k_aux(d_model: int) -> int:
    """How many dead latents AuxK uses: the power of two nearest in ratio to d_model / 2. Paper: Appendix A.2"""
    return 2 ** round(math.log2(max(1, d_model / 2)))


def auxk_term(sae: SAE, x: Tensor, x_hat: Tensor, dead: Tensor, k_aux: int, precision: str = "fp32",
              is_dead: Tensor | None = None, kind: type[pairs.Active] = pairs.Active) -> Tensor:
    """The AuxK loss: the k_aux largest of the dead latents reconstruct the residual, without b_pre.

    L_aux = ||e - ê||² (normalised),  e = x - x_hat,  ê = Σ_{i dead, top k_aux} z_i W_dec[i]

    Args:
        sae: the autoencoder.
        x: activations.
        x_hat: their reconstructions.
        dead: the indices of the dead latents.
        k_aux: how many of them may be active for each token.
        precision: "fp32", or "bf16" to multiply matrices in bfloat16.
        is_dead: which of `dead` are, if not all of them.
        kind: of `Active`, that of the path (see `saelib.sae.PAIRS`), where few of many dead latents are active.

    Returns:
        A scalar; 0, without a gradient, when nothing is dead. Nor has it a gradient for a ReLU SAE: a dead latent did
        not fire for this batch either, so its pre-activations are 0 or less. A dead latent of TopK may have positive
        ones that are not among the k largest.

    Paper: Appendix A.2 (the auxiliary loss)
    """
    if len(dead) == 0:
        return x.new_zeros(())
    if x.is_cuda:  # a sparse gradient would wait for the device
        encoder, decoder = sae.W_enc.index_select(0, dead), sae.W_dec.index_select(0, dead)
    else:
        # the gradient: those rows alone
        encoder, decoder = (F.embedding(dead, rows, sparse=True) for rows in (sae.W_enc, sae.W_dec))
    bias, some = sae.b_enc[dead], 1
    if is_dead is not None:
        bias, some = torch.where(is_dead, bias, -torch.inf), is_dead.any()
    if len(dead) > (FEW_OF_MANY_ON_GPU if x.is_cuda else FEW_OF_MANY) * k_aux:
        return losses.auxk(x - x_hat, kernels.autoencode(x, sae.b_pre, encoder, bias, decoder, k_aux,
                                                         precision=precision, kind=kind)[0]) * some
    with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False):
        latents = torch.relu(F.linear(x - sae.b_pre, encoder, bias))
        if len(dead) > k_aux:
            chosen = selection.largest(latents.detach(), k_aux)[1].long()
            latents = latents * torch.zeros_like(latents).scatter_(1, chosen, 1)
        return losses.auxk(x - x_hat, latents @ decoder) * some
