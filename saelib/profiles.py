"""The same notebook at four sizes: a table of plain values for each chapter and profile.

`quick` is for the tests and a first look, `laptop` for the book on two CPU cores, `gpu` for its big figures, `paper`
for GPT-2 small with a network. Rows of one profile are never mixed with those of another: each has its own store.
"""
import os
from pathlib import Path
from types import SimpleNamespace

from saelib.checks import require
from saelib.methods import METHODS

LRS = {  # at the length of a laptop run, chosen by tools/tune_lr.py, the same search for all
    ("synthetic", "relu"): 1.28e-1, ("synthetic", "relu_short"): 1.28e-1, ("synthetic", "topk"): 1.6e-2,
    ("pygpt", "relu"): 3.2e-2, ("pygpt", "relu_short"): 6.4e-2, ("pygpt", "topk"): 1.6e-2,
    ("minilm", "relu"): 1.6e-2, ("minilm", "relu_short"): 1.6e-2, ("minilm", "topk"): 8e-3,
}
OTHER_LR = {"quick": 8e-3, "laptop": 8e-3, "gpu": 2e-3, "paper": None}  # not searched for; None is the paper's rule

PROFILES = {
    "l1_zeros": {  # without AuxK: a learning rate at which few latents die
        "quick": dict(n_seeds=1, source_tokens=20_000, n_tokens=40_000, batch_size=512, n_latents=256, lr=8e-3,
                      l1_coefs=(0.05, 0.1, 0.2), l2_coefs=(0.1, 0.5, 2.0), smooth_coefs=(0.1,)),
        "laptop": dict(n_seeds=3, source_tokens=150_000, n_tokens=150_000, batch_size=512, n_latents=256, lr=8e-3,
                       l1_coefs=(0.05, 0.1, 0.2), l2_coefs=(0.1, 0.5, 2.0), smooth_coefs=(0.05, 0.2)),
        "gpu": dict(n_seeds=5, source_tokens=2_000_000, n_tokens=5_000_000, batch_size=1024, n_latents=256, lr=8e-3,
                    l1_coefs=(0.05, 0.1, 0.2, 0.4), l2_coefs=(0.1, 0.5, 2.0, 8.0), smooth_coefs=(0.05, 0.1, 0.2)),
    },
    "at_zero": {
        "quick": dict(n_seeds=1, source_tokens=20_000, n_tokens=40_000, batch_size=512, n_latents=256, lr=8e-3,
                      l1_coef=0.1, subjects=("synthetic",)),
        "laptop": dict(n_seeds=3, source_tokens=24_000, n_tokens=24_000, batch_size=512, n_latents=256, lr=8e-3,
                       l1_coef=0.1, subjects=("synthetic", "pygpt")),
        "gpu": dict(n_seeds=3, source_tokens=1_000_000, n_tokens=1_000_000, batch_size=1024, n_latents=1024, lr=8e-3,
                    l1_coef=0.1, subjects=("synthetic", "pygpt")),
    },
    "l1_costs": {  # l1_coefs are for an L0 near 32
        "quick": dict(n_seeds=1, source_tokens=24_000, n_tokens=24_000, batch_size=512, n_latents=256, n_refined=512,
                      l1_coefs={"pygpt": 0.04, "minilm": 0.05}, game_tokens=60_000, exact_coefs=(0.1, 0.4),
                      exact_steps=500),
        "laptop": dict(n_seeds=3, source_tokens=300_000, n_tokens=200_000, batch_size=256, n_latents=384, n_refined=512,
                       l1_coefs={"pygpt": 0.04, "minilm": 0.05}, game_tokens=200_000, exact_coefs=(0.1, 0.2, 0.4),
                       exact_steps=500),
        "gpu": dict(n_seeds=5, source_tokens=3_000_000, n_tokens=5_000_000, batch_size=1024, n_latents=4096,
                    n_refined=4096,
                    l1_coefs={"pygpt": 0.03, "minilm": 0.04}, game_tokens=1_000_000, exact_coefs=(0.05, 0.1, 0.2, 0.4),
                    exact_steps=5000),
    },
    "topk_learns": {
        "quick": dict(n_seeds=1, source_tokens=24_000, n_tokens=24_000, batch_size=256, n_latents=256, k=8,
                      l1_coef=0.1, ste_lrs=(0.1, 1.0), n_checkpoints=10, subjects=("synthetic", "pygpt")),
        "laptop": dict(n_seeds=3, source_tokens=300_000, n_tokens=40_000, batch_size=256, n_latents=384, k=32,
                       l1_coef=0.05, ste_lrs=(0.1, 0.3, 1.0), n_checkpoints=20, subjects=("pygpt", "minilm")),
        "gpu": dict(n_seeds=5, source_tokens=3_000_000, n_tokens=5_000_000, batch_size=1024, n_latents=4096, k=32,
                    l1_coef=0.06, ste_lrs=(0.1, 0.3, 1.0, 3.0), n_checkpoints=50, subjects=("pygpt", "minilm")),
    },
    "setting_l0": {
        "quick": dict(n_seeds=1, source_tokens=24_000, n_tokens=16_000, batch_size=512, ks=(32,), l1_coefs=(0.03, 0.1),
                      n_latents={"synthetic": (128, 256), "pygpt": (512,)}),
        "laptop": dict(n_seeds=3, source_tokens=300_000, n_tokens=60_000, batch_size=512, ks=(32,),
                       l1_coefs=(0.03, 0.1, 0.3),
                       n_latents={"synthetic": (128, 512), "pygpt": (256, 1024), "minilm": (512,)}),
        "gpu": dict(n_seeds=3, source_tokens=3_000_000, n_tokens=5_000_000, batch_size=4096, ks=(32, 64),
                    l1_coefs=METHODS["relu"].grid,
                    n_latents={"synthetic": (128, 512), "pygpt": (1024, 4096), "minilm": (1536, 6144)}),
        "paper": dict(n_seeds=3, source_tokens=100_000_000, n_tokens=100_000_000, batch_size=131_072, ks=(32,),
                      l1_coefs=METHODS["relu"].grid, n_latents={"gpt2": (2048, 32768)}),
    },
    "ground_truth": {
        "quick": dict(n_seeds=1, source_tokens=40_000, n_tokens=80_000, batch_size=512, ks=(4, 8, 32),
                      l1_coefs=(0.08, 0.2, 0.5)),
        "laptop": dict(n_seeds=3, source_tokens=200_000, n_tokens=600_000, batch_size=1024, ks=(2, 4, 8, 16, 32),
                       l1_coefs=(0.03, 0.08, 0.15, 0.3, 0.5)),
        "gpu": dict(n_seeds=5, source_tokens=2_000_000, n_tokens=20_000_000, batch_size=1024, ks=(2, 4, 8, 16, 32),
                    l1_coefs=(0.03, 0.08, 0.15, 0.3, 0.5)),
    },
    "which_mse": {
        "quick": dict(subject="pygpt", n_latents=512, source_tokens=24_000, n_tokens=24_000, batch_size=512,
                      ks=(8, 32), l1_coefs=(0.05, 0.15)),
        "laptop": dict(subject="pygpt", n_latents=1024, source_tokens=300_000, n_tokens=150_000, batch_size=1024,
                       ks=(16, 32, 64), l1_coefs=(0.02, 0.03, 0.045, 0.06, 0.08, 0.12)),
        "gpu": dict(subject="minilm", n_latents=6144, source_tokens=3_000_000, n_tokens=5_000_000, batch_size=4096,
                    ks=(16, 32, 64), l1_coefs=(0.03, 0.06, 0.12)),
        "paper": dict(subject="gpt2", n_latents=32768, source_tokens=100_000_000, n_tokens=100_000_000,
                      batch_size=131_072, ks=(32, 64), l1_coefs=(0.03, 0.06)),
    },
    "frontier": {
        "quick": dict(n_seeds=2, source_tokens=24_000, n_tokens=16_000, batch_size=512,
                      n_latents={"minilm": (512,), "pygpt": (256, 512), "synthetic": (256,)},
                      ks={"minilm": (32,), "pygpt": (32,), "synthetic": (8,)},
                      l1_coefs={"minilm": (0.08, 0.16), "pygpt": (0.08, 0.16), "synthetic": (0.2, 0.5)}),
        "laptop": dict(n_seeds=3, source_tokens=300_000, n_tokens=300_000, batch_size=1024,
                       n_latents={"minilm": (1536,), "pygpt": (256, 1024), "synthetic": (256,)},
                       ks={"minilm": (16, 32, 64), "pygpt": (16, 32, 64), "synthetic": (4, 8, 16)},
                       l1_coefs={"minilm": (0.025, 0.045, 0.075, 0.115), "pygpt": (0.025, 0.045, 0.08, 0.15),
                                 "synthetic": (0.08, 0.15, 0.3, 0.5)}),
        "gpu": dict(n_seeds=3, source_tokens=3_000_000, n_tokens=20_000_000, batch_size=4096,
                    n_latents={"minilm": (1536, 6144), "pygpt": (1024, 4096, 16384), "synthetic": (256,)},
                    ks={"minilm": METHODS["topk"].grid, "pygpt": METHODS["topk"].grid, "synthetic": (4, 8, 16)},
                    l1_coefs={"minilm": METHODS["relu"].grid, "pygpt": METHODS["relu"].grid,
                              "synthetic": (0.1, 0.2, 0.35, 0.6)}),
        "paper": dict(n_seeds=3, source_tokens=100_000_000, n_tokens=1_000_000_000, batch_size=131_072,
                      n_latents={"gpt2": (2048, 8192, 32768, 131072)},
                      ks={"gpt2": (32, 64, 128, 256)}, l1_coefs={"gpt2": METHODS["relu"].grid}),
    },
    "try_your_own": {
        "quick": dict(source_tokens=20_000, n_tokens=20_000, batch_size=256, n_latents=120, ks=(4, 8, 16),
                      l1_coefs=(0.05, 0.1, 0.2)),
        "laptop": dict(source_tokens=300_000, n_tokens=300_000, batch_size=1024, n_latents=1024, ks=(16, 32, 64),
                       l1_coefs=(0.025, 0.045, 0.08, 0.13)),
        "gpu": dict(source_tokens=3_000_000, n_tokens=20_000_000, batch_size=4096, n_latents=8192, ks=(16, 32, 64),
                    l1_coefs=(0.02, 0.04, 0.08)),
        "paper": dict(source_tokens=100_000_000, n_tokens=1_000_000_000, batch_size=131_072, n_latents=32768,
                      ks=(32, 64), l1_coefs=(0.02, 0.04, 0.08)),
    },
    "speed": {  # what the reader's own machine measures; the rows that are drawn come from `make bench`
        "quick": dict(d_model=64, n_latents=1024, k=16, batch_size=512, seconds=1.0),
        "laptop": dict(d_model=256, n_latents=4096, k=32, batch_size=2048, seconds=10.0),
        "gpu": dict(d_model=768, n_latents=32768, k=32, batch_size=8192, seconds=20.0),
    },
    "kernels": {
        "quick": dict(d_model=64, n_latents=1024, k=16, batch_size=512, n_steps=60, source_tokens=24_000),
        "laptop": dict(d_model=256, n_latents=4096, k=32, batch_size=2048, n_steps=150, source_tokens=100_000),
        "gpu": dict(d_model=768, n_latents=32768, k=32, batch_size=8192, n_steps=500, source_tokens=1_000_000),
    },
    "explorer": {  # tools/make_explorer.py: ReLU starts from this l1_coef, and moves it until L0 is near k
        "quick": dict(source_tokens=60_000, n_tokens=150_000, batch_size=512, n_latents=512, k=32, l1_coef=0.05,
                      text_tokens=32_768, n_contexts=6),
        "laptop": dict(source_tokens=300_000, n_tokens=600_000, batch_size=512, n_latents=1024, k=32, l1_coef=0.05,
                       text_tokens=65_536, n_contexts=8),
        "gpu": dict(source_tokens=3_000_000, n_tokens=20_000_000, batch_size=4096, n_latents=2048, k=32, l1_coef=0.05,
                    text_tokens=131_072, n_contexts=8),
        "paper": dict(source_tokens=3_000_000, n_tokens=20_000_000, batch_size=4096, n_latents=2048, k=32,
                      l1_coef=0.05, text_tokens=131_072, n_contexts=8),
    },
}


def settings(chapter: str, profile: str, **overrides) -> SimpleNamespace:
    """The values of one chapter at one profile; an override that is not None replaces one.

    Raises:
        ValueError: no such profile, no such value to override, or a number below 1 in the place of one.
    """
    table = PROFILES[chapter]
    require(profile in table, "profile", profile, f"one of {', '.join(table)}")
    values = {"profile": profile, **table[profile]}
    for name, value in overrides.items():
        if name not in values:
            raise ValueError(f"{name} is {value!r}: chapter {chapter!r} has no such setting")
        if value is not None:
            require(not isinstance(value, int) or value > 0, name, value, "above 0")
            values[name] = value
    return SimpleNamespace(**values, store=store_of(chapter, profile))


def store_of(chapter: str, profile: str) -> Path | None:
    """Where a chapter's rows are kept: `quick` keeps none, so that a test always runs what it checks."""
    if profile == "quick":
        return None
    clone = Path(__file__).parents[1]
    root = clone if (clone / "pyproject.toml").is_file() else Path.cwd()  # installed, there is no clone to keep them in
    return Path(os.environ.get("SAELIB_RUNS", root / "runs")) / profile / f"{chapter}.jsonl"


def lr_of(subject: str, method: str, profile: str) -> float | None:
    """The learning rate of a method on a subject: the tuned one at `laptop`, one for all methods elsewhere."""
    return LRS.get((subject, method), OTHER_LR[profile]) if profile == "laptop" else OTHER_LR[profile]
