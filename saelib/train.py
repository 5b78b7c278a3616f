"""The training loop. There is one; methods plug into it."""
import math
import time
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from saelib import checkpoints, graphs
from saelib.auxk import default_k_aux
from saelib.checks import check_number, is_whole, require
from saelib.loop import Loop
from saelib.modes import own_modes
from saelib.sae import SAE

BOUNDS = {"lr": (0, math.inf), "penalty_warmup": (0, 1), "auxk_coef": (0, math.inf), "ema_decay": (0, 0.999999)}
PATHS = "sparse", "graph", "native", "dense"
LOG_POINTS = 100
UNIT = 5e-3  # how far from 1 the norm of a decoder row may be
CHECKPOINT_SECONDS = 60


def paper_lr(n_latents: int) -> float:
    """The paper's learning rate, 2e-4 at 2^14 latents, falling as 1/sqrt(n). Paper: §3.1.1 (Fig. 3)"""
    return 2e-4 * math.sqrt(2**14 / n_latents)


def schedule(step: int, n_steps: int) -> float:
    """What multiplies the learning rate: up over the first 5 % of the steps, 1, and down to 0 over the last 20 %."""
    return min(1.0, (step + 1) / (0.05 * n_steps), (n_steps - step) / (0.2 * n_steps))


def warmed(step: int, n_steps: int, penalty_warmup: float) -> float:
    """What multiplies the method's penalty: up from 0 over the first `penalty_warmup` of the steps, then 1."""
    return min(1.0, step / n_steps / penalty_warmup) if penalty_warmup else 1.0


def check(sae: SAE, path: str, k_aux: int | None, n_steps: int, dead_after: int, **numbers: float) -> None:
    """Raise ValueError unless `sae` can be trained with these arguments of `train`."""
    require(sae.W_dec.dtype in (torch.float32, torch.float64), "sae", f"of {sae.W_dec.dtype}",
            "of float32 weights: precision='bf16' multiplies in bfloat16")
    norms = sae.W_dec.detach().norm(dim=1)
    require(bool((norms - 1).abs().max() < UNIT), "sae", f"with decoder rows of norm {norms.min():.3g} to "
            f"{norms.max():.3g}", "of unit rows: `normalise_decoder` scales them, which changes what it computes")
    require(path in PATHS, "path", path, f"one of {', '.join(PATHS)}")
    if path == "graph":
        graphs.check(sae)
    for name, value in (("n_steps", n_steps), ("dead_after", dead_after)):
        require(is_whole(value) and value >= 1, name, value, "a whole number, 1 or more")
    require(k_aux is None or is_whole(k_aux) and k_aux >= 1, "k_aux", k_aux, "a whole number, 1 or more")
    for name, value in numbers.items():
        check_number(name, value, *BOUNDS[name])
    require(not numbers["ema_decay"] or not list(sae.buffers()), "ema_decay", numbers["ema_decay"],
            f"0 for {sae.method.key}, whose buffers are learnt for the weights as they are, and not for their average")


@own_modes()
def train(sae: SAE, batches: Callable[[int], Iterable[Tensor]], n_steps: int, *, lr: float | None = None,
          penalty_warmup: float = 0.0, auxk_coef: float = 1 / 32, k_aux: int | None = None,
          dead_after: int = 10_000_000, ema_decay: float = 0.0, path: str = "sparse", precision: str = "fp32",
          on_step: Callable[[int], None] | None = None, checkpoint: Path | str | None = None,
          run: dict | None = None) -> list[dict[str, float]]:
    """Train `sae` in place.

    The order of a step: zero grad; forward; count what fired; loss terms; finite check; backward; remove the decoder
    gradient parallel to its rows; clip; Adam; unit-norm rows; EMA; `on_step`.

    Args:
        sae: the autoencoder, its b_pre already set, its decoder's rows of unit norm.
        batches: given the number of the step to start from, yields batches [batch_size, d_model], `n_steps` or more.
        n_steps: steps in all.
        lr: peak learning rate; the paper's rule if None.
        penalty_warmup: the fraction of the steps over which the method's penalty rises from 0 to its weight.
        auxk_coef: weight of AuxK; 0 leaves it out.
        k_aux: dead latents active in AuxK; about d_model / 2 if None.
        dead_after: a latent is dead when it has not fired for more than this many tokens.
        ema_decay: of the average of the weights that replaces them at the end; 0 for none.
        path, precision: of the forward pass (see `SAE.run`); the path "graph" is the sparse one, recorded and replayed
            on a GPU.
        on_step: called with the number of finished steps, after each.
        checkpoint: a file to go on from if it exists, and is of this run; written every minute. Remove it once what you
            make of the run is safe.
        run: what else makes it this run, as plain values: the data, their order, the seed.

    Returns:
        A row for each step of a short run, or for 100 to 199 of a longer one, evenly spaced, and for the last step:
        step, tokens, l0, dead_fraction, and each weighted term of the loss.

    Raises:
        FloatingPointError: a term of the loss is not finite. On a GPU only the steps that leave a row are looked at,
            after their update.
        ValueError: an SAE or an argument that breaks its rule; "graph" where a step can't be recorded; activations that
            are not as the SAE expects them; too few batches; a checkpoint of another run.

    Paper: §2.4, §3.1, Appendix A
    """
    lr = paper_lr(sae.n_latents) if lr is None else lr
    check(sae, path, k_aux, n_steps, dead_after, lr=lr, penalty_warmup=penalty_warmup, auxk_coef=auxk_coef,
          ema_decay=ema_decay)
    k_aux, n_steps = default_k_aux(sae.d_model) if k_aux is None else k_aux, int(n_steps)
    loop = Loop(sae, lr, dead_after, auxk_coef, k_aux, ema_decay)
    about = checkpoints.describe(run or {}, d_model=sae.d_model, normalisation=sae.normalisation,
                                 n_latents=sae.n_latents, method=sae.method.key, sparsity=sae.method.sparsity,
                                 n_steps=n_steps, lr=lr, penalty_warmup=penalty_warmup, auxk_coef=auxk_coef,
                                 k_aux=k_aux, dead_after=dead_after, ema_decay=ema_decay, precision=precision)
    sae.train()
    kept = checkpoint and Path(checkpoint)
    if kept:
        checkpoints.resume(kept, about, sae.W_dec.device, loop.restore)
    saved, start, log_every = time.monotonic(), loop.step, max(1, n_steps // LOG_POINTS)
    for x in islice(batches(loop.step), n_steps - loop.step):
        rows = sae.tokens(x)
        if loop.step == start:
            sae.check_normalised(rows)
        x = x.to(sae.W_dec.device, sae.W_dec.dtype, non_blocking=True)
        log = (loop.step + 1) % log_every == 0 or loop.step + 1 == n_steps
        loop.one(x, schedule(loop.step, n_steps), warmed(loop.step, n_steps, penalty_warmup), path, precision, log)
        if kept and loop.step < n_steps and time.monotonic() - saved > CHECKPOINT_SECONDS:
            checkpoints.save(kept, loop.state(), about)
            saved = time.monotonic()
        if on_step:
            on_step(loop.step)
    if loop.step < n_steps:
        raise ValueError(f"batches ended after {loop.step} steps: they must last for n_steps = {n_steps}")
    loop.adam.zero_grad()
    if loop.ema:
        sae.load_state_dict(loop.ema.module.state_dict())
        sae.normalise_decoder()
    sae.eval()
    return loop.history
