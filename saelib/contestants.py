"""What the benchmark times: floors, our training step and the ordinary one, from the same weights on the same tensors.

A contestant has `step(x)`: one training step on a batch. Those that train have `n_dead()` and `trained()` too. There
are four cases: "topk" with nothing dead, "auxk" with one latent in twenty dead and AuxK at work on them, "relu" with an
L1 penalty as training begins, with half of the latents active, and "relu_few" with k of them active, as in training's
later part.
"""
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from saelib import native, sources, subjects
from saelib.auto import pick_path, pick_precision
from saelib.loop import BETAS, EPS, Loop
from saelib.methods import METHODS, Method, keep_largest
from saelib.sae import SAE

CASES = ("topk", "auxk", "relu", "relu_few")
RELU = CASES[2:]
DEAD_EVERY = 20  # one latent in 20 is dead in the case "auxk"
DEAD_AFTER = 10**8  # tokens: in a benchmark nothing else dies
LONG_DEAD = 10**9
LR, L1_COEF, AUXK_COEF = 1e-4, 0.05, 1 / 32


@dataclass(frozen=True)
class Setting:
    """The size of a step: d_model, number of latents, k, tokens in a batch, and where it runs."""
    d_model: int
    n_latents: int
    k: int
    batch_size: int
    device: str = "cpu"

    @property
    def k_aux(self) -> int:
        """Dead latents in AuxK: d_model / 2, as every library here takes it."""
        return min(self.d_model // 2, len(range(0, self.n_latents, DEAD_EVERY)))

    def method(self, case: str) -> Method:
        """The method that a case trains, with its sparsity."""
        key, sparsity = ("relu", L1_COEF) if case in RELU else ("topk", self.k)
        return METHODS[key](self.n_latents, sparsity)

    def batches(self, n: int = 4) -> list[Tensor]:
        """n batches [batch_size, d_model] from a dictionary with power-law frequencies, of unit norm."""
        made = sources.synthetic(n * self.batch_size, d_model=self.d_model, n_features=4 * self.d_model,
                                 l0=min(32.0, self.d_model / 4))
        return [x.to(self.device) for x in made.shards[0].split(self.batch_size)]

    def start(self, case: str) -> SAE:
        """The weights that every contestant starts from. Dead latents have an encoder row a hundred times shorter: it
        never makes the k largest, while AuxK finds positive values and a gradient there, as with real dead latents."""
        method = self.method(case)
        sae = SAE(self.d_model, self.n_latents, method.key, method.sparsity)
        with torch.no_grad():
            if case == "auxk":
                sae.W_enc[::DEAD_EVERY].mul_(0.01)
            if case == "relu_few":
                x = self.batches(1)[0][:256].cpu()
                sae.b_enc -= sae.pre_acts(x).flatten().topk(self.k * len(x)).values[-1]
        return sae.to(self.device)


class Floor:
    """One operation that a step cannot do without."""

    def __init__(self, step: Callable[[Tensor], object]):
        self.step = step


class Ours:
    """`loop.Loop.one`: what `fit` does for each batch."""

    def __init__(self, setting: Setting, case: str, path: str = "sparse", precision: str = "fp32", lr: float = LR):
        self.sae, self.path, self.precision = setting.start(case), path, precision
        self.loop = Loop(self.sae, lr, DEAD_AFTER, AUXK_COEF, setting.k_aux, 0.0)
        if case == "auxk":
            self.loop.tokens_since_fired[::DEAD_EVERY] = LONG_DEAD

    def step(self, x: Tensor) -> None:
        self.loop.one(x, 1.0, 1.0, self.path, self.precision, False)

    def n_dead(self) -> int:
        return int((self.loop.tokens_since_fired > DEAD_AFTER).sum())

    def trained(self) -> SAE:
        return self.sae


class Plain:
    """The ordinary loop: dense latents, autograd, torch's Adam; under bf16 autocast on a GPU.

    The same work as ours, term by term: squared error, AuxK or L1, tokens since a latent fired, the part of the
    decoder's gradient that is parallel to its rows, clipping, Adam, unit rows.
    """

    def __init__(self, setting: Setting, case: str, lr: float = LR):
        self.sae, self.case, self.k_aux = setting.start(case), case, setting.k_aux
        self.adam = torch.optim.Adam(self.sae.parameters(), lr=lr, betas=BETAS, eps=EPS)
        self.since = torch.zeros(setting.n_latents, dtype=torch.int64, device=setting.device)
        if case == "auxk":
            self.since[::DEAD_EVERY] = LONG_DEAD

    def loss(self, x: Tensor) -> Tensor:
        sae = self.sae
        pre_acts = F.linear(x - sae.b_pre, sae.W_enc, sae.b_enc)
        latents = torch.relu(pre_acts) if self.case in RELU else keep_largest(pre_acts, sae.method.k)
        x_hat = latents @ sae.W_dec + sae.b_pre
        residual = x - x_hat
        loss = residual.pow(2).sum(1).mean()
        self.since = torch.where((latents > 0).any(0), 0, self.since + len(x))
        if self.case in RELU:
            return loss + sae.method.sparsity * latents.sum(1).mean()
        dead = self.since > DEAD_AFTER
        if dead.any():
            residual = residual.detach()
            residual_hat = keep_largest(torch.where(dead, pre_acts, -torch.inf), self.k_aux) @ sae.W_dec
            auxk = (residual_hat - residual).pow(2).sum() / (residual - residual.mean(0)).pow(2).sum()
            loss = loss + AUXK_COEF * auxk
        return loss

    def step(self, x: Tensor) -> None:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            loss = self.loss(x)
        self.adam.zero_grad()
        loss.backward()
        self.sae.remove_parallel_gradient()
        torch.nn.utils.clip_grad_norm_(self.sae.parameters(), 1.0)
        self.adam.step()
        self.sae.normalise_decoder()

    def n_dead(self) -> int:
        return int((self.since > DEAD_AFTER).sum())

    def trained(self) -> SAE:
        return self.sae


def floors(setting: Setting) -> dict[tuple[str, str], Callable[[], Floor]]:
    """("floor", name) -> what makes it. Products write into memory that is there: fresh would cost a third more."""
    sae, x = setting.start("topk").requires_grad_(False), setting_batch(setting)
    dtype = torch.bfloat16 if setting.device == "cuda" else torch.float32

    @cache
    def product(dtype: torch.dtype) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        out = torch.empty(setting.batch_size, setting.n_latents, dtype=dtype, device=setting.device)
        # the product alone is timed
        weight, bias, cast = sae.W_enc.to(dtype).t(), sae.b_enc.to(dtype), cache(lambda x: x.to(dtype))
        return out, lambda x: torch.addmm(bias, cast(x), weight, out=out)

    def top_k() -> Callable[[Tensor], object]:
        out, fill = product(dtype)
        fill(x)
        return lambda _: out.topk(setting.k, dim=1, sorted=False)

    made = {"GEMM fp32": lambda: product(torch.float32)[1], "GEMM bf16": lambda: product(torch.bfloat16)[1],
            "top-k alone": top_k,
            "fused Adam alone": lambda: fused_adam(setting), "copy of the batch": lambda: torch.empty_like(x).copy_}
    if setting.device == "cuda":
        made.pop("GEMM fp32")
    return {("floor", name): (lambda make=make: Floor(make())) for name, make in made.items()}


def setting_batch(setting: Setting) -> Tensor:
    """One batch of noise, of unit norm."""
    x = torch.randn(setting.batch_size, setting.d_model, generator=torch.Generator().manual_seed(0))
    return sources.normalise(x).to(setting.device)


def fused_adam(setting: Setting) -> Callable[[Tensor], None]:
    """Adam alone, on the weights of a step and gradients that stay the same."""
    sae = setting.start("topk")
    for parameter in sae.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    adam = torch.optim.Adam(sae.parameters(), lr=LR, betas=BETAS, eps=EPS, fused=True)
    return lambda x: adam.step()


def ours(setting: Setting, case: str, lr: float = LR,
         paths: tuple[str, ...] = ("sparse",)) -> dict[tuple[str, str], Callable[[], Ours]]:
    """(case, name) -> what makes it, on these paths, in each precision that this machine has; the dense twin in one."""
    def make(path: str, precision: str) -> Callable[[], Ours]:
        return lambda: Ours(setting, case, path, precision, lr)

    has_bf16 = subjects.fast_dtype(setting.device) == torch.bfloat16
    precisions = ["fp32"] * (setting.device == "cpu") + ["bf16"] * has_bf16
    return {(case, name_of(path, precision)): make(path, precision)
            for path in paths for precision in (precisions[:1] if path == "dense" else precisions)}


def fast_paths(device: str) -> tuple[str, ...]:
    """The stock path, and the one beside it that this machine can take."""
    return ("sparse", "graph") if device == "cuda" else ("sparse", "native") if native.available() else ("sparse",)


def plain(setting: Setting, case: str, lr: float = LR) -> dict[tuple[str, str], Callable[[], Plain]]:
    """(case, "plain loop") -> what makes it."""
    return {(case, "plain loop"): lambda: Plain(setting, case, lr)}


def auto(setting: Setting, case: str = "topk") -> tuple[str, str]:
    """Path and precision that `fit` would choose at this size, by the rules of `saelib.auto`."""
    W_enc = torch.empty(setting.n_latents, setting.d_model, device="meta")
    path = pick_path("auto", setting.device, setting.method(case), W_enc)
    return path, pick_precision("auto", setting.device, W_enc.numel())


def chosen(setting: Setting) -> dict[tuple[str, str], Callable[[], Ours]]:
    """("topk", name) -> what makes it: the contestant that `fit` would be at this size, alone."""
    return {("topk", auto_name(setting)): lambda: Ours(setting, "topk", *auto(setting))}


def name_of(path: str, precision: str) -> str:
    """What a contestant of ours is called."""
    return "saelib, dense twin" if path == "dense" else ", ".join(["saelib", precision] + [path] * (path != "sparse"))


def auto_name(setting: Setting, case: str = "topk") -> str:
    """The contestant that `fit` would be at this size."""
    return name_of(*auto(setting, case))
