"""The same notebook at four sizes: a table of plain values for each chapter and profile.

`quick` is for the tests and a first look, `laptop` for the book on two CPU cores, `gpu` for its big figures, `paper`
for GPT-2 small with a network. Rows of one profile are never mixed with those of another: each has its own store.
"""
import os
from pathlib import Path
from types import SimpleNamespace

from saelib.methods import METHODS

LRS = {  # chosen by tools/tune_lr.py, the same search for both methods; see the chapter "The frontier"
    ("synthetic", "relu"): 3e-3, ("synthetic", "topk"): 3e-3,
    ("pygpt", "relu"): 1e-3, ("pygpt", "topk"): 1e-3,
    ("minilm", "relu"): 1e-3, ("minilm", "topk"): 1e-3,
}
DEFAULT_LR = 1e-3

PROFILES = {
    "setting_l0": {
        "quick": dict(n_seeds=1, source_tokens=16_000, n_tokens=16_000, batch_size=512, ks=(32,), l1_coefs=(0.01, 0.04),
                      n_latents={"synthetic": (128, 256), "pygpt": (512,)}),
        "laptop": dict(n_seeds=3, source_tokens=300_000, n_tokens=150_000, batch_size=1024, ks=(32,), l1_coefs=(0.005, 0.02, 0.08),
                       n_latents={"synthetic": (128, 512), "pygpt": (256, 1024), "minilm": (768,)}),
        "gpu": dict(n_seeds=3, source_tokens=3_000_000, n_tokens=5_000_000, batch_size=4096, ks=(32, 64), l1_coefs=METHODS["relu"].grid,
                    n_latents={"synthetic": (128, 512), "pygpt": (1024, 4096), "minilm": (1536, 6144)}),
        "paper": dict(n_seeds=3, source_tokens=100_000_000, n_tokens=100_000_000, batch_size=131_072, ks=(32,), l1_coefs=METHODS["relu"].grid,
                      n_latents={"gpt2": (2048, 32768)}),
    },
    "ground_truth": {
        "quick": dict(n_seeds=1, source_tokens=40_000, n_tokens=80_000, batch_size=512, ks=(4, 8, 32), l1_coefs=(0.01, 0.04, 0.16)),
        "laptop": dict(n_seeds=3, source_tokens=200_000, n_tokens=600_000, batch_size=1024, ks=(2, 4, 8, 16, 32), l1_coefs=(0.02, 0.04, 0.08, 0.16, 0.32)),
        "gpu": dict(n_seeds=5, source_tokens=2_000_000, n_tokens=20_000_000, batch_size=1024, ks=(2, 4, 8, 16, 32), l1_coefs=(0.01, 0.02, 0.04, 0.08, 0.16, 0.32)),
    },
    "frontier": {
        "quick": dict(n_seeds=1, source_tokens=24_000, n_tokens=24_000, batch_size=512, ks=(8, 32), l1_coefs=(0.01, 0.04),
                      n_latents={"synthetic": (256,), "pygpt": (512,), "minilm": (512,)}),
        "laptop": dict(n_seeds=3, source_tokens=300_000, n_tokens=300_000, batch_size=1024, ks=(16, 32, 64), l1_coefs=(0.005, 0.01, 0.02, 0.04),
                       n_latents={"synthetic": (256,), "pygpt": (512, 1024, 2048), "minilm": (1536,)}),
        "gpu": dict(n_seeds=3, source_tokens=3_000_000, n_tokens=20_000_000, batch_size=4096, ks=METHODS["topk"].grid, l1_coefs=METHODS["relu"].grid,
                    n_latents={"synthetic": (256,), "pygpt": (1024, 4096, 16384), "minilm": (1536, 6144)}),
        "paper": dict(n_seeds=3, source_tokens=100_000_000, n_tokens=1_000_000_000, batch_size=131_072, ks=(32, 64, 128, 256),
                      l1_coefs=METHODS["relu"].grid, n_latents={"gpt2": (2048, 8192, 32768, 131072)}),
    },
}


def settings(chapter: str, profile: str, **overrides) -> SimpleNamespace:
    """The values of one chapter at one profile; an override that is not None replaces one.

    Raises:
        ValueError: no such profile, or no such value to override.
    """
    table = PROFILES[chapter]
    if profile not in table:
        raise ValueError(f"profile is {profile!r}: it must be one of {', '.join(table)}")
    values = {"profile": profile, **table[profile]}
    for name, value in overrides.items():
        if name not in values:
            raise ValueError(f"{name} is {value!r}: chapter {chapter!r} has no such setting")
        if value is not None:
            values[name] = value
    return SimpleNamespace(**values, store=store_of(chapter, profile))


def store_of(chapter: str, profile: str) -> Path | None:
    """Where a chapter's rows are kept: `quick` keeps none, so that a test always runs what it checks."""
    if profile == "quick":
        return None
    return Path(os.environ.get("SAELIB_RUNS", Path(__file__).parents[1] / "runs")) / profile / f"{chapter}.jsonl"


def lr_of(subject: str, method: str) -> float:
    """The tuned learning rate of a method on a subject."""
    return LRS.get((subject, method), DEFAULT_LR)
