"""The methods: an activation function with its penalty. A new one is one class here and one entry in `METHODS`."""
import math
from collections.abc import Callable
from numbers import Real
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saelib import losses
from saelib.checks import is_whole, require

DEFAULT_K = 32
# The newest cut's weight in BatchTopK's running mean. A cut is taken from a whole batch, and varies little; in a short
# run cuts fall to the end, and those of ten steps before would leave too few latents active.
THRESHOLD_RATE = 0.5


class Method(nn.Module):
    """An activation function and the penalty that comes with it.

    `key`, `label`, `knob` and `grid` are data about the class: the loop, the sweeps, the figures and the tests
    read them and know no method by name. `knob` says what `sparsity` is: "k" or "l1_coef". A method that has
    `k` keeps that many latents for each token at most, or on average. One that inherits the forward of `ReLU`, `TopK`
    or `BatchTopK` runs on their kernels. `encoder_norm` is the length of the encoder's rows at the start. `waits` says
    that its step asks the device for a number, and waits for the answer; `warms`, that its penalty rises from 0 at
    first.
    """
    key: ClassVar[str]
    label: ClassVar[str]
    knob: ClassVar[str]
    grid: ClassVar[tuple[float, ...]]
    encoder_norm: ClassVar[float] = 1.0
    waits: ClassVar[bool] = False
    warms: ClassVar[bool] = True

    def __init__(self, n_latents: int, sparsity: float):
        super().__init__()
        require(isinstance(sparsity, Real), "sparsity", sparsity, "a number")
        self.n_latents, self.sparsity = n_latents, sparsity
        self.check()

    def check(self) -> None:
        """Raise ValueError if `sparsity` is not a value that this method can take."""

    def forward(self, pre_acts: Float[Tensor, "batch n_latents"]) -> Float[Tensor, "batch n_latents"]:
        """Latents from pre-activations: 0 or more, and exact zeros where silent."""
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
        if not 0 <= self.sparsity < math.inf:
            raise ValueError(f"sparsity is {self.sparsity!r}: an L1 coefficient must be 0 or more, and finite")

    def forward(self, pre_acts: Float[Tensor, "batch n_latents"]) -> Float[Tensor, "batch n_latents"]:
        return torch.relu(pre_acts)

    def penalty(self, sae, x, out) -> dict[str, Tensor]:
        return {"l1": self.sparsity * losses.l1(out.latents)}


class TopK(Method):
    """The k largest pre-activations of each token, by value and not by magnitude; the rest are zero.

    z = TopK(max(0, pre_acts)),  loss = ||x - x_hat||²

    The ReLU is in the paper's code and not in its equation: without it a token with fewer than k positive
    pre-activations would get negative latents.

    Paper: §2.3, Eq. (2)
    """
    key, label, knob, grid = "topk", "TopK", "k", (8, 16, 32, 64, 128)

    def check(self) -> None:
        if not (is_whole(self.sparsity) and 1 <= self.sparsity <= self.n_latents):
            raise ValueError(f"sparsity is {self.sparsity!r}: k must be a whole number from 1 to n_latents = "
                             f"{self.n_latents}")

    @property
    def k(self) -> int:
        return int(self.sparsity)

    def forward(self, pre_acts: Float[Tensor, "batch n_latents"]) -> Float[Tensor, "batch n_latents"]:
        return keep_largest(pre_acts, self.k)  # Eq. (2)

    def select(self, k: int, best: Callable[[int], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """The same choice on the sparse path (see `choice` of `saelib.kernels.autoencode`)."""
        return best(k)


class MultiTopK(TopK):
    """TopK whose loss asks for a good reconstruction from 4k latents too, at an eighth of the weight.

    loss = L(k) + L(4k) / 8,  L(m) = ||x - x_hat_m||²,  x_hat_m from the m largest latents

    It is a sum of losses: one loss of summed activations would be another thing.

    Paper: §5 (Multi-TopK)
    """
    key, label, warms = "multi_topk", "Multi-TopK", False

    def penalty(self, sae, x, out) -> dict[str, Tensor]:
        wide = min(4 * self.k, self.n_latents)
        if out.active is None:
            x_hat = sae.decode(keep_largest(sae.pre_acts(x), wide))
        else:
            x_hat = out.largest(wide)[0]
        return {"multi_topk": losses.squared_error(x, x_hat) / 8}


class BatchTopK(TopK):
    """The batch · k largest pre-activations of a whole batch: k a token on average, more where a token needs more.

    z = max(0, pre_acts) where pre_acts ≥ t, else 0

    In training t is the (batch · k)-th largest pre-activation of the batch. After it (`SAE.eval()`), t is a running
    average of those, half of it the last one, so that a token's latents do not depend on the others in its batch.

    Source: Bussmann et al. 2024, BatchTopK sparse autoencoders (arXiv 2412.06410), §3
    """
    key, label, waits = "batchtopk", "BatchTopK", True

    def __init__(self, n_latents: int, sparsity: float):
        super().__init__(n_latents, sparsity)
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("n_cuts", torch.zeros(()))

    def learnt(self) -> Tensor:
        """t as it is after training. Raise ValueError if there was none: t = 0 would be a plain ReLU."""
        require(bool(self.n_cuts), "method", self.key,
                "trained before it is used, since its threshold comes from training")
        return self.threshold

    def cut(self, pre_acts: Float[Tensor, "batch any"]) -> Tensor:
        """The threshold t: in training the (batch · k)-th largest pre-activation of the batch, afterwards the learnt
        one. It is enough to give each token's largest, if the batch's are among them."""
        if not self.training:
            return self.learnt()
        return pre_acts.detach().flatten().topk(self.k * len(pre_acts), sorted=False).values.min()

    @torch.no_grad()
    def remember(self, cut: Tensor) -> None:
        if self.training:
            self.n_cuts += 1
            # latents are never negative: below 0 a cut is as good as 0
            self.threshold.lerp_(cut.clamp_min(0).to(self.threshold.dtype), (1 / self.n_cuts).clamp_min(THRESHOLD_RATE))

    def forward(self, pre_acts: Float[Tensor, "batch n_latents"]) -> Float[Tensor, "batch n_latents"]:
        cut = self.cut(pre_acts)
        self.remember(cut)
        return torch.relu(pre_acts).masked_fill(pre_acts < cut, 0)

    def select(self, k: int, best: Callable[[int], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """The same choice from each token's 2k largest. A token of which all these reach t may have more that do: so
        their number is doubled until there is none such."""
        width, is_full = k, True
        while is_full:
            width = min(2 * width, self.n_latents)
            values, indices = best(width)
            cut = self.cut(values)
            is_full = width < self.n_latents and bool((values.amin(1) >= cut).any())
        self.remember(cut)
        values = values.masked_fill(values < cut, 0)
        widest = int((values > 0).sum(1).max()) if len(values) else 0
        values, place = values.topk(max(1, widest), dim=1, sorted=False)
        return values, indices.gather(1, place)


def keep_largest(pre_acts: Float[Tensor, "batch n_latents"], k: int) -> Float[Tensor, "batch n_latents"]:
    """The k largest of each row where they are positive; the rest are exact zeros."""
    values, indices = pre_acts.topk(k, dim=1, sorted=False)
    return torch.zeros_like(pre_acts).scatter(1, indices, torch.relu(values))


METHODS: dict[str, type[Method]] = {method.key: method for method in (ReLU, TopK, MultiTopK, BatchTopK)}
KERNELS = {ReLU.forward: "relu", TopK.forward: "largest", BatchTopK.forward: "largest"}  # by activation function


def kernel(method: Method) -> str | None:
    """What computes its activation function beside the plain twin: "relu" is `saelib.relu_path`, "largest" is
    `saelib.kernels`, where `select` chooses; None is nothing, for an activation function of its own."""
    return KERNELS.get(getattr(method.forward, "__func__", None))


def find(key: str) -> type[Method]:
    """The method called `key`. Raise ValueError if there is none."""
    require(isinstance(key, str) and key in METHODS, "method", key,
            f"one of {', '.join(METHODS)}, or one of your own whose module is imported")
    require(METHODS[key].key == key, "method", key, f"found under its own key, {METHODS[key].key!r}")
    return METHODS[key]


def sparsity_of(key: str, sparsity: float | None) -> float:
    """`sparsity`, or where it is None a k of 32. Raise ValueError for a method whose knob is no k."""
    require(sparsity is not None or find(key).knob == "k", "sparsity", sparsity, f"an L1 coefficient for {key!r}")
    return DEFAULT_K if sparsity is None else sparsity


def make(key: str, n_latents: int, sparsity: float | None) -> Method:
    """The method called `key`, for n_latents latents at this `sparsity` (see `sparsity_of`).

    Raises:
        ValueError: no method has that key, or the method does not take that sparsity.
    """
    return find(key)(n_latents, sparsity_of(key, sparsity))
