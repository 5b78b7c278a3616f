"""The state of a training run, and one step of it."""
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from saelib import graphs, kernels, losses, pairs, relu_path
from saelib.auxk import auxk_term
from saelib.checks import check_finite, require
from saelib.sae import PAIRS, SAE, Output

BETAS, EPS = (0.9, 0.999), 6.25e-10  # Paper: Appendix A.3
LOOK_EVERY = 16  # steps after which a GPU is asked again how many latents could be dead


class Loop:
    """The state of one training run: the SAE, Adam, and what the loop alone knows."""

    def __init__(self, sae: SAE, lr: float, dead_after: int, auxk_coef: float, k_aux: int, ema_decay: float):
        self.sae, self.lr, self.dead_after, self.auxk_coef, self.k_aux = sae, lr, dead_after, auxk_coef, k_aux
        on_gpu, device = sae.W_dec.is_cuda, sae.W_dec.device
        # what changes from step to step lies in tensors, where a recorded step finds it (see `saelib.graphs`)
        self.adam = torch.optim.Adam(sae.parameters(), torch.tensor(lr, device=device), BETAS, EPS, fused=True,
                                     capturable=on_gpu)
        self.penalty_scale = torch.ones((), device=device)
        self.recorded, self.pool = {}, torch.cuda.graph_pool_handle() if on_gpu else None
        self.look_every, self.looked_until, self.n_candidates, self.candidates = LOOK_EVERY if on_gpu else 0, 0, 0, {}
        for p in sae.parameters():  # as Adam makes it at its first step; here it lies below what comes and goes
            self.adam.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p),
                                  "exp_avg_sq": torch.zeros_like(p)}
        self.tokens_since_fired = torch.zeros(sae.n_latents, dtype=torch.int64, device=device)
        self.step, self.tokens, self.history, self.scratch, self.copies = 0, 0, [], relu_path.Scratch(), {}
        self.ema = AveragedModel(sae, multi_avg_fn=get_ema_multi_avg_fn(ema_decay)) if ema_decay else None

    def state(self) -> dict:
        return {"sae": self.sae.state_dict(), "adam": self.adam.state_dict(),
                "tokens_since_fired": self.tokens_since_fired, "step": self.step, "tokens": self.tokens,
                "history": self.history, "ema": self.ema.state_dict() if self.ema else None}

    def restore(self, state: dict) -> None:
        missing = self.state().keys() - state.keys()  # asked before anything is taken over
        require(not missing, "checkpoint", f"a file without {', '.join(sorted(missing))}", "one that `train` wrote")
        # of this device, and not of the one that saved
        own = {name: self.adam.param_groups[0][name] for name in ("lr", "capturable")}
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
        """Name the latents that may be dead before `n_tokens` more have passed: those longest silent, in a number
        rounded up to a power of two. So a GPU is waited for once in many steps, and AuxK has few shapes."""
        n_silent = int((self.tokens_since_fired > self.dead_after - n_tokens).sum())
        size = min(2 ** (n_silent - 1).bit_length(), self.sae.n_latents) if n_silent else 0
        silent = self.tokens_since_fired.topk(size).indices
        self.n_candidates, self.looked_until = size, self.tokens + n_tokens
        self.candidates.setdefault(size, torch.empty_like(silent)).copy_(silent)

    def is_dead(self) -> Tensor:
        """Which latents are dead, [n_latents]."""
        return self.tokens_since_fired > self.dead_after

    def dead(self) -> tuple[Tensor, Tensor | None]:
        """Latents that AuxK looks at, and which of them are dead if not all."""
        if not self.look_every:
            return self.is_dead().nonzero().squeeze(1), None
        candidates = self.candidates[self.n_candidates]
        return candidates, self.is_dead()[candidates]

    def terms(self, x: Tensor, out: Output, precision: str, kind: type[pairs.Active]) -> dict[str, Tensor]:
        """The weighted terms of the loss. Their sum is optimised; the same dict is the log."""
        terms = {"squared_error": losses.squared_error(x, out.x_hat)}
        penalty = self.sae.method.penalty(self.sae, x, out)
        require(isinstance(penalty, dict), "penalty", type(penalty).__name__, "a dict of weighted terms")
        require(not penalty.keys() & {"squared_error", "auxk"}, "penalty", list(penalty),
                "a dict of terms with other names than squared_error and auxk")
        scale = self.penalty_scale if self.sae.method.warms else 1
        terms |= {name: scale * term for name, term in penalty.items()}
        if self.auxk_coef:
            dead, is_dead = self.dead()
            term = auxk_term(self.sae, x, out.x_hat, dead, self.k_aux, precision, is_dead, kind)
            terms["auxk"] = self.auxk_coef * term
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
            moments = state["exp_avg"], state["exp_avg_sq"]
            tensors[name] = [triton_adam.in_rows(t) for t in (p.detach(), p.grad, *moments)]
        square = sum(triton_adam.square_norm(grad, rows, name == "W_dec") for name, (rows, grad, *_) in tensors.items())
        clip = (1 / (square.sqrt() + 1e-6)).clamp(max=1)
        steps = [state["step"] for state in self.adam.state.values()]
        torch._foreach_add_(steps, 1)
        factors = triton_adam.adam_factors(self.adam.param_groups[0]["lr"], steps[0], *BETAS)
        for name, there in tensors.items():
            triton_adam.adam_rows(*there, clip, factors, beta1=BETAS[0], beta2=BETAS[1], eps=EPS, unit=name == "W_dec",
                                  copy=self.copies.get(name))

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
        if self.look_every and self.tokens + len(x) > self.looked_until:
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
                                 "dead_fraction": float(self.is_dead().float().mean()),
                                 **{name: float(term) for name, term in terms.items()}})
