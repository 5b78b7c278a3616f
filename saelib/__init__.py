"""Sparse autoencoders of Gao et al. 2024: methods, training, evaluation, and the experiments of the book."""
from importlib import import_module
from importlib.util import find_spec

from saelib import formats, variants  # noqa: F401 (variants add to METHODS)
from saelib.methods import METHODS
from saelib.metrics import evaluate
from saelib.runs import Fit, RunConfig, fit, run
from saelib.sae import SAE, load
from saelib.sources import Source
from saelib.subjects import open_source
from saelib.sweeps import sweep

__all__ = ["METHODS", "SAE", "Fit", "RunConfig", "Source", "evaluate", "fit", "load", "open_source", "run", "sweep"]


def __getattr__(name: str):
    """Modules such as `saelib.plots` are imported when first asked for: matplotlib takes its time."""
    if name.startswith("_") or find_spec(f"{__name__}.{name}") is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.{name}")
