"""Sparse autoencoders of Gao et al. 2024: methods, training, evaluation, and the experiments of the book."""
from saelib import formats, variants  # noqa: F401 (variants add to METHODS)
from saelib.methods import METHODS
from saelib.metrics import evaluate
from saelib.runs import Fit, RunConfig, fit, run
from saelib.sae import SAE, load
from saelib.sources import Source
from saelib.subjects import open_source
from saelib.sweeps import sweep

__all__ = ["METHODS", "SAE", "Fit", "RunConfig", "Source", "evaluate", "fit", "load", "open_source", "run", "sweep"]
