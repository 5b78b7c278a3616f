"""Experiments as data: one run, and the row that it leaves."""
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy
import torch
from torch import Tensor
from tqdm import tqdm

from saelib import methods, metrics, sources, subjects
from saelib.auto import pick_path, pick_precision
from saelib.checks import check_number, is_whole, require
from saelib.files import plain
from saelib.modes import own_modes
from saelib.origin import data_inputs, inputs, provenance
from saelib.sae import SAE, geometric_median
from saelib.subjects import pick_device
from saelib.train import BOUNDS, PATHS, paper_lr, train

MEDIAN_ROWS = 8192
SEEDS = 2**43  # from here on the numbers of a shuffle's epochs (see `Source.batches`) no longer fit
OPTIONAL = "lr", "source_tokens", "layer", "penalty_warmup", "dead_after"  # what `resolve` fills in, or the subject
PRECISIONS = "auto", "fp32", "bf16"


@dataclass(frozen=True)
class RunConfig:
    """All that determines one SAE, as plain values. What it leaves at None follows from the rest (see `resolve`).

    Args:
        subject, source_tokens, layer, text: the activations (see `saelib.open_source`).
        method, sparsity, n_latents: the autoencoder (see `SAE`).
        n_tokens, batch_size, seed: how many tokens it is trained on, how many of them a step, and in which order.
        lr, penalty_warmup, auxk_coef, dead_after, ema_decay: of the loop (see `train`).
        path, precision: see `fit`.

    Raises:
        ValueError: a value breaks its rule; the message names it.
    """
    subject: str
    method: str
    sparsity: float
    n_latents: int
    n_tokens: int
    batch_size: int = 1024
    lr: float | None = None
    seed: int = 0
    source_tokens: int | None = None
    layer: int | None = None
    text: str | None = None
    penalty_warmup: float | None = None
    auxk_coef: float = 1 / 32
    dead_after: int | None = None
    ema_decay: float = 0.0
    path: str = "auto"
    precision: str = "auto"

    def __post_init__(self):
        for name, value in vars(self).items():  # numpy's numbers are no JSON, nor do checkpoints hold them
            if isinstance(value, (numpy.generic, PurePath)):
                object.__setattr__(self, name, plain(value))
        for name, kinds in (("subject", str), ("text", str | None)):
            require(isinstance(getattr(self, name), kinds), name, type(getattr(self, name)).__name__,
                    "a name or a path: save activations of your own as .npy to sweep over them")
        whole = {"n_latents": 1, "n_tokens": 1, "batch_size": 1, "seed": 0, "source_tokens": 1, "layer": 1,
                 "dead_after": 1}
        for name, least in whole.items():
            value = getattr(self, name)
            require(value is None and name in OPTIONAL or is_whole(value) and value >= least, name, value,
                    f"a whole number, {least} or more")
        require(self.seed < SEEDS, "seed", self.seed, f"below {SEEDS}")
        for name, bounds in BOUNDS.items():
            if getattr(self, name) is not None or name not in OPTIONAL:
                check_number(name, getattr(self, name), *bounds)
        require(self.path in ("auto", *PATHS), "path", self.path, f"one of auto, {', '.join(PATHS)}")
        require(self.precision in PRECISIONS, "precision", self.precision, f"one of {', '.join(PRECISIONS)}")
        for name in vars(self):  # 4.0 becomes 4, so that a row of a store is found again
            if is_whole(getattr(self, name)):
                object.__setattr__(self, name, int(getattr(self, name)))
        methods.make(self.method, self.n_latents, self.sparsity)  # refuses what it does not take

    def resolve(self) -> "RunConfig":
        """The same with every None filled in that training needs: the paper's learning rate; a penalty that rises over
        the first tenth; `dead_after` a tenth of the run, for our runs are far shorter than the paper's 10M tokens."""
        rules = {"lr": paper_lr(self.n_latents), "source_tokens": self.n_tokens, "penalty_warmup": 0.1,
                 "dead_after": min(10_000_000, max(1, self.n_tokens // 10))}
        return replace(self, **{name: value for name, value in rules.items() if getattr(self, name) is None})


class Fit(NamedTuple):
    """A trained SAE, its held-out metrics, and the history of its training."""
    sae: SAE
    metrics: dict[str, float]
    history: list[dict[str, float]]


@own_modes()
def fit_source(source: sources.Source, config: RunConfig, device: str = "auto", on_tokens=None,
               checkpoint: Path | None = None) -> Fit:
    """Train and judge the SAE that `config` describes on an open source, your own activations too, with every setting
    that there is.

    Args:
        source: as `sources.from_tensor` or `open_source` makes it.
        config: its `subject` is a name here, and nothing is opened.
        device: "cpu", "cuda", or "auto".
        on_tokens: called after each step with the tokens that it took.
        checkpoint: see `train`.

    Returns:
        `Fit`, as `fit` does, which calls this.
    """
    require(isinstance(source, sources.Source), "source", type(source).__name__,
            "a saelib source, as `sources.from_tensor` makes one")
    config, device = config.resolve(), pick_device(device)
    batch_size = min(config.batch_size, config.n_tokens)
    sae = SAE(source.d_model, config.n_latents, config.method, config.sparsity, normalisation=source.normalisation,
              seed=config.seed)
    with torch.no_grad():
        sae.b_pre.copy_(geometric_median(next(source.batches(min(MEDIAN_ROWS, source.n_tokens), 1, config.seed))))
    sae.to(device)
    path = pick_path(config.path, device, sae.method, sae.W_enc)  # before the clock starts: it may compile
    n_steps, start, begun, seen = -(-config.n_tokens // batch_size), time.monotonic(), 0, 0

    def batches(step: int) -> Iterator[Tensor]:
        nonlocal begun
        begun = step  # above 0 if a checkpoint was there
        upcoming = source.batches(batch_size, n_steps, config.seed, step)
        return sources.ahead(upcoming) if device != "cpu" and source.shards[0].device.type == "cpu" else upcoming

    def count(step: int) -> None:
        nonlocal seen
        seen, before = min(step * batch_size, config.n_tokens), seen
        on_tokens(seen - before)

    history = train(sae, batches, n_steps, lr=config.lr,
                    penalty_warmup=config.penalty_warmup, auxk_coef=config.auxk_coef, dead_after=config.dead_after,
                    ema_decay=config.ema_decay, path=path, checkpoint=checkpoint,
                    run={"seed": config.seed, "batch_size": batch_size, "data": source.identity()},
                    precision=pick_precision(config.precision, device, sae.W_enc.numel()),
                    on_step=on_tokens and count)
    seconds = (time.monotonic() - start) * n_steps / max(1, n_steps - begun)
    measured = metrics.evaluate(sae, source.held_out, source.mean)
    if source.truth is not None:
        measured |= metrics.recovery(sae.W_dec, source.truth.to(device))
    return Fit(sae, measured | {"tokens_per_second": n_steps * batch_size / seconds, "seconds": seconds}, history)


def fit(source: Tensor | numpy.ndarray | sources.Source, method: str = "topk", sparsity: float | None = None, *,
        n_latents: int, n_tokens: int, batch_size: int = 1024, lr: float | None = None, seed: int = 0,
        device: str = "auto", path: str = "auto", precision: str = "auto", progress: bool = True) -> Fit:
    """Train a sparse autoencoder on activations.

    What is not asked for here follows from the rules of `RunConfig.resolve`: a penalty rises over the first tenth of
    the training, and a latent counts as dead after a tenth of it. `fit_source` takes every setting.

    Args:
        source: [n_tokens, d_model] activations, a tensor or an array, used as they are; or a saelib source. Learning
            rates and L1 coefficients of this book are for vectors of norm 1, which `sources.from_tensor(x,
            normalisation="unit_norm")` makes of yours. The last tenth is held out: it is judged on, and not trained on.
        method: a key of `METHODS`.
        sparsity: k for "topk", 32 if None; the L1 coefficient for "relu", which has no default.
        n_latents: size of the dictionary.
        n_tokens: tokens to train on, the last batch filled up; more than the source holds means several epochs.
        batch_size: tokens a step.
        lr: peak learning rate; the paper's rule, 2e-4 sqrt(2^14 / n_latents), if None.
        seed: of the initial weights and the order of the tokens.
        device: "cpu", "cuda", or "auto".
        path: "sparse"; "graph", which records a step on a GPU (see `saelib.graphs`); "native", compiled for a CPU (see
            `saelib.native`); "dense"; or "auto", the fastest that there is for this SAE here (see `saelib.auto`).
        precision: "fp32"; "bf16", which multiplies in bfloat16; or "auto", that for an encoder of 2^16 weights or more
            where the hardware does so.
        progress: show a progress bar on stderr.

    Returns:
        `Fit`: `.sae`, `.metrics` (held-out normalized_mse, l0, dead_fraction, explained_variance; tokens_per_second),
        `.history`.

    Raises:
        ValueError: an argument breaks its rule; the message names it.
        FloatingPointError: the loss is no longer finite.

    Paper: §2, Appendix A
    """
    if isinstance(source, Tensor | numpy.ndarray):
        source = sources.from_tensor(source)
    require(isinstance(source, sources.Source), "source", type(source).__name__,
            "a [n_tokens, d_model] tensor or array, or a saelib source")
    sparsity = methods.sparsity_of(method, sparsity)
    config = RunConfig(source.name, method, sparsity, n_latents, n_tokens, batch_size, lr, seed, path=path,
                       precision=precision)
    with tqdm(total=n_tokens, unit="tok", unit_scale=True, disable=not progress, desc=f"{method} {sparsity:g}") as bar:
        return fit_source(source.on(pick_device(device)), config, device, bar.update)


KEPT = 8  # sources of the last runs, for the next
_SOURCES: dict[tuple, sources.Source] = {}
_OPENING = threading.Lock()


def open_source(config: RunConfig, device: str = "auto") -> sources.Source:
    """The source of a run; members of a sweep that ask for the same share it."""
    config, device = config.resolve(), pick_device(device)
    key = config.subject, config.source_tokens, config.text, config.layer, repr(data_inputs(config)), device
    with _OPENING:
        if key not in _SOURCES:
            while len(_SOURCES) >= KEPT:
                _SOURCES.pop(next(iter(_SOURCES)))
            _SOURCES[key] = subjects.open_source(config.subject, config.source_tokens, text=config.text,
                                                 layer=config.layer, device=device).on(device)
        return _SOURCES[key]


def run(config: RunConfig, device: str = "auto", on_tokens=None, checkpoint: Path | None = None,
        folder: Path | None = None) -> dict:
    """One row: what was asked, what was measured, and where. With a `folder` the SAE is saved there, and the row names
    it as `sae`.

    Returns:
        {"config", "metrics", "provenance", "date"}, JSON-able. A short text gives fewer tokens than the config asks
        for: `source_tokens` of the provenance says how many there were.
    """
    device = pick_device(device)
    made = provenance(device) | {"inputs": inputs(config)}  # as they are now: training may take hours
    source = open_source(config, device)
    result = fit_source(source, config, device, on_tokens, checkpoint)
    sae = result.sae
    made |= {"source_tokens": source.n_tokens,
             "precision": pick_precision(config.precision, device, sae.W_enc.numel()),
             "path": pick_path(config.path, device, sae.method, sae.W_enc)}
    row = {"config": asdict(config), "metrics": result.metrics, "provenance": made, "date": time.strftime("%Y-%m-%d")}
    if folder:
        sae.save(folder)
        row["sae"] = str(folder)
    return row
