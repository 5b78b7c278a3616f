"""The training loop. There is one; methods plug into it."""
import math
import time
from collections.abc import Callable, Iterable
from itertools import islice
from numbers import Real
from pathlib import Path

import torch
from torch import Tensor

from saelib import checkpoints, dense, graphs, kernels, losses, pairs
from saelib.auxk import auxk_term, default_k_aux
from saelib.checks import check_finite, is_whole, require
from saelib.modes import own_modes
from saelib.sae import PAIRS, SAE, Output

BETAS, EPS = (0.9, 0.999), 6.25e-10  # Paper: Appendix A.3
BOUNDS = {"lr": (0, math.inf), "penalty_warmup": (0, 1), "auxk_coef": (0, math.inf), "ema_decay": (0, 0.999999)}
PATHS = "sparse", "graph", "native", "dense"
LOG_POINTS = 100
CHECKPOINT_SECONDS = 60
LOOK_EVERY = 16  # steps after which a GPU is asked again how many latents could be dead


def paper_lr(n_latents: int) -> float:
    """The paper's learning rate, 2e-4 at 2^14 latents, falling as 1/sqrt(n). Paper: §3.1.1 (Fig. 3)"""
    return 2e-4 * math.sqrt(2**14 / n_latents)


def schedule(step: int, n_steps: int) -> float:
    """What multiplies the learning rate: up over the first 5 % of the steps, 1, and down to 0 over the last 20 %."""
    return min(1.0, (step + 1) / (0.05 * n_steps), (n_steps - step) / (0.2 * n_steps))


def warmed(step: int, n_steps: int, penalty_warmup: float) -> float:
    """What multiplies the method's penalty: up from 0 over the first `penalty_warmup` of the steps, then 1."""
    return min(1.0, step / n_steps / penalty_warmup) if penalty_warmup else 1.0


class Loop:
    """The state of one training run: the SAE, Adam, and what the loop alone knows."""

    def __init__(self, sae: SAE, lr: float, dead_after: int, auxk_coef: float, k_aux: int, ema_decay: float):
        self.sae, self.lr, self.dead_after, self.auxk_coef, self.k_aux = sae, lr, dead_after, auxk_coef, k_aux
        on_gpu, device = sae.W_dec.is_cuda, sae.W_dec.device
        # what changes from step to step lies in tensors, where a recorded step finds it (see `saelib.graphs`)
        self.adam = torch.optim.Adam(sae.parameters(), torch.tensor(lr, device=device), BETAS, EPS, fused=True, capturable=on_gpu)
        self.penalty_scale, self.recorded, self.pool = torch.ones((), device=device), {}, torch.cuda.graph_pool_handle() if on_gpu else None
        self.look_every, self.n_candidates, self.candidates = LOOK_EVERY if on_gpu else 0, 0, {}
        for p in sae.parameters():  # as Adam makes it at its first step; here it lies below what comes and goes
            self.adam.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        self.tokens_since_fired = torch.zeros(sae.n_latents, dtype=torch.int64, device=device)
        self.step, self.tokens, self.history, self.scratch, self.copies = 0, 0, [], dense.Scratch(), {}
        self.ema = torch.optim.swa_utils.AveragedModel(sae, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(ema_decay)) if ema_decay else None

    def state(self) -> dict:
        return {"sae": self.sae.state_dict(), "adam": self.adam.state_dict(), "tokens_since_fired": self.tokens_since_fired,
                "step": self.step, "tokens": self.tokens, "history": self.history, "ema": self.ema.state_dict() if self.ema else None}

    def restore(self, state: dict) -> None:
        own = {name: self.adam.param_groups[0][name] for name in ("lr", "capturable")}  # of this device, and not of the one that saved
        self.sae.load_state_dict(state["sae"])
        for name, copy in self.copies.items():
            copy.copy_(getattr(self.sae, name))
        self.adam.load_state_dict(state["adam"])
        self.adam.param_groups[0].update(own)
        self.tokens_since_fired.copy_(state["tokens_since_fired"])
        self.step, self.tokens, self.history = state["step"], state["tokens"], state["history"]
        if self.ema:
            self.ema.load_state_dict(state["ema"])

    @torch.no_grad()
    def count_fired(self, out: Output) -> None:
        """Paper: §2.4 (dead latents). Tokens are counted, not steps."""
        self.tokens_since_fired += len(out.x_hat)
        self.tokens_since_fired.masked_fill_(out.fired(), 0)

    def look_for_dead(self, n_tokens: int) -> None:
        """Name the latents that may be dead before `n_tokens` more have passed: those longest silent, in a number rounded up
        to a power of two. So a GPU is waited for once in many steps, and AuxK has few shapes."""
        n_silent = int((self.tokens_since_fired > self.dead_after - n_tokens).sum())
        size = min(2 ** (n_silent - 1).bit_length(), self.sae.n_latents) if n_silent else 0
        silent = self.tokens_since_fired.topk(size).indices
        self.n_candidates = size
        self.candidates.setdefault(size, torch.empty_like(silent)).copy_(silent)

    def dead(self) -> tuple[Tensor, Tensor | None]:
        """Latents that AuxK looks at, and which of them are dead if not all."""
        if not self.look_every:
            return (self.tokens_since_fired > self.dead_after).nonzero().squeeze(1), None
        candidates = self.candidates[self.n_candidates]
        return candidates, self.tokens_since_fired[candidates] > self.dead_after

    def terms(self, x: Tensor, out: Output, precision: str, kind: type[pairs.Active]) -> dict[str, Tensor]:
        """The weighted terms of the loss. Their sum is optimised; the same dict is the log."""
        terms = {"squared_error": losses.squared_error(x, out.x_hat)}
        penalty = self.sae.method.penalty(self.sae, x, out)
        require(not penalty.keys() & {"squared_error", "auxk"}, "penalty", list(penalty), "a dict of terms with other names than squared_error and auxk")
        terms |= {name: self.penalty_scale * term for name, term in penalty.items()}
        if self.auxk_coef:
            dead, is_dead = self.dead()
            terms["auxk"] = self.auxk_coef * auxk_term(self.sae, x, out.x_hat, dead, self.k_aux, precision, is_dead, kind)
        return terms

    def update(self) -> None:
        """From gradients to weights: tangent to the decoder's rows, clipped, Adam, unit rows. On a GPU this is one pass
        over a matrix, and not seven."""
        if kernels.on_gpu(self.sae.W_dec):
            self.update_in_one_pass()
            return
        self.sae.remove_parallel_gradient()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.sae.parameters() if p.grad is not None])
        if norm + 1e-6 > 1:  # most are shorter, and need no pass over all gradients to be multiplied by 1
            torch.nn.utils.clip_grads_with_norm_(self.sae.parameters(), 1.0, norm)
        self.adam.step()
        self.sae.normalise_decoder()

    @torch.no_grad()
    def update_in_one_pass(self) -> None:
        from saelib import triton_adam
        tensors = {}
        for name, p in self.sae.named_parameters():
            if p.grad is None:
                continue
            state = self.adam.state[p]  # Adam's own place for them, so that checkpoints hold them
            tensors[name] = [triton_adam.in_rows(t) for t in (p.detach(), p.grad, state["exp_avg"], state["exp_avg_sq"])]
        square = sum(triton_adam.square_norm(grad, rows, name == "W_dec") for name, (rows, grad, *_) in tensors.items())
        clip = (1 / (square.sqrt() + 1e-6)).clamp(max=1)
        steps = [state["step"] for state in self.adam.state.values()]
        torch._foreach_add_(steps, 1)
        factors = triton_adam.adam_factors(self.adam.param_groups[0]["lr"], steps[0], *BETAS)
        for name, there in tensors.items():
            triton_adam.adam_rows(*there, clip, factors, beta1=BETAS[0], beta2=BETAS[1], eps=EPS, unit=name == "W_dec", copy=self.copies.get(name))

    def forward(self, x: Tensor, path: str, precision: str) -> tuple[Output, dict[str, Tensor]]:
        """The first half of a step: the output and the terms of the loss."""
        self.adam.zero_grad()
        out = self.sae.run(x, path, precision, self.scratch, self.copies)
        self.count_fired(out)
        return out, self.terms(x, out, precision, PAIRS[path])

    def backward(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """The second half: gradients and new weights. What is left of the terms are their values."""
        sum(terms.values()).backward()
        self.update()
        return {name: term.detach() for name, term in terms.items()}

    def one(self, x: Tensor, lr_scale: float, penalty_scale: float, path: str, precision: str, log: bool) -> None:
        """One step, in the order that the tests hold it to."""
        self.adam.param_groups[0]["lr"].fill_(self.lr * lr_scale)
        self.penalty_scale.fill_(penalty_scale)
        if self.look_every and (self.step % self.look_every == 0 or not self.candidates):
            self.look_for_dead(self.look_every * len(x))
        if path == "graph":
            terms, l0 = graphs.step(self, x, precision)
        else:
            out, terms = self.forward(x, path, precision)
            if x.device.type == "cpu":  # on a GPU the check would wait for the device at every step
                check_finite(terms, self.step)
            l0 = out.l0() if log else None
            del out  # the reconstruction makes room for the gradients
            terms = self.backward(terms)
        if self.ema:
            self.ema.update_parameters(self.sae)
        if log and x.device.type != "cpu":
            check_finite(terms, self.step)
        self.step += 1
        self.tokens += len(x)
        if log:
            self.history.append({"step": self.step, "tokens": self.tokens, "l0": float(l0),
                                 "dead_fraction": float((self.tokens_since_fired > self.dead_after).float().mean()),
                                 **{name: float(term) for name, term in terms.items()}})


def check(sae: SAE, path: str, k_aux: int | None, n_steps: int, dead_after: int, **numbers: float) -> None:
    """Raise ValueError unless `sae` can be trained with these arguments of `train`."""
    require(sae.W_dec.dtype in (torch.float32, torch.float64), "sae", f"of {sae.W_dec.dtype}", "of float32 weights: precision='bf16' multiplies in bfloat16")
    require(path in PATHS, "path", path, f"one of {', '.join(PATHS)}")
    if path == "graph":
        graphs.check(sae)
    for name, value in (("n_steps", n_steps), ("dead_after", dead_after)):
        require(is_whole(value) and value >= 1, name, value, "a whole number, 1 or more")
    require(k_aux is None or is_whole(k_aux) and k_aux >= 1, "k_aux", k_aux, "a whole number, 1 or more")
    for name, value in numbers.items():
        low, high = BOUNDS[name]
        require(isinstance(value, Real) and low <= value <= high, name, value, f"a number from {low:g} to {high:g}")


@own_modes()
def train(sae: SAE, batches: Callable[[int], Iterable[Tensor]], n_steps: int, *, lr: float | None = None, penalty_warmup: float = 0.0,
          auxk_coef: float = 1 / 32, k_aux: int | None = None, dead_after: int = 10_000_000, ema_decay: float = 0.0,
          path: str = "sparse", precision: str = "fp32", on_step: Callable[[int], None] | None = None,
          checkpoint: Path | str | None = None, run: dict | None = None) -> list[dict[str, float]]:
    """Train `sae` in place.

    The order of a step: zero grad; forward; count what fired; loss terms; finite check; backward; remove the decoder
    gradient parallel to its rows; clip; Adam; unit-norm rows; EMA; `on_step`.

    Args:
        sae: the autoencoder, its b_pre already set.
        batches: given the number of the step to start from, yields batches [batch_size, d_model], up to `n_steps` at least.
        n_steps: steps in all.
        lr: peak learning rate; the paper's rule if None.
        penalty_warmup: the fraction of the steps over which the method's penalty rises from 0 to its weight.
        auxk_coef: weight of AuxK; 0 leaves it out.
        k_aux: dead latents active in AuxK; about d_model / 2 if None.
        dead_after: a latent is dead when it has not fired for this many tokens.
        ema_decay: of the average of the weights that replaces them at the end; 0 for none.
        path, precision: of the forward pass (see `SAE.run`); the path "graph" is the sparse one, recorded and replayed on a GPU.
        on_step: called with the number of finished steps, after each.
        checkpoint: a file to go on from if it exists, and is of this run; written every minute. Remove it once what you make of the run is safe.
        run: what else makes it this run, as plain values: the data, their order, the seed.

    Returns:
        About 100 rows: step, tokens, l0, dead_fraction and each weighted term of the loss at that step.

    Raises:
        FloatingPointError: a term of the loss is not finite. On a GPU only the steps that leave a row are looked at, after their update.
        ValueError: an unknown path, or "graph" where a step can't be recorded; too few batches; a checkpoint of another run.

    Paper: §2.4, §3.1, Appendix A
    """
    lr = paper_lr(sae.n_latents) if lr is None else lr
    check(sae, path, k_aux, n_steps, dead_after, lr=lr, penalty_warmup=penalty_warmup, auxk_coef=auxk_coef, ema_decay=ema_decay)
    k_aux, n_steps = default_k_aux(sae.d_model) if k_aux is None else k_aux, int(n_steps)
    loop = Loop(sae, lr, dead_after, auxk_coef, k_aux, ema_decay)
    about = checkpoints.describe(d_model=sae.d_model, n_latents=sae.n_latents, method=sae.method.key, sparsity=sae.method.sparsity, n_steps=n_steps, lr=lr,
                                 penalty_warmup=penalty_warmup, auxk_coef=auxk_coef, k_aux=k_aux, dead_after=dead_after, ema_decay=ema_decay, precision=precision, **(run or {}))
    sae.train()
    kept = checkpoint and Path(checkpoint)
    if kept:
        checkpoints.resume(kept, about, sae.W_dec.device, loop.restore)
    saved, log_every = time.monotonic(), max(1, n_steps // LOG_POINTS)
    for x in islice(batches(loop.step), n_steps - loop.step):
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
    if loop.ema:
        sae.load_state_dict(loop.ema.module.state_dict())
        sae.normalise_decoder()
    sae.eval()
    return loop.history
