"""Checks of arguments, each of which fails with one line; and numpy's arrays as tensors."""
import math
import warnings
from numbers import Real

import numpy
import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def require(holds: bool, name: str, value, rule: str) -> None:
    """Raise ValueError, naming the argument, its value and the rule, unless the rule holds."""
    if not holds:
        raise ValueError(f"{name} is {value!r}: it must be {rule}")


def is_whole(value) -> bool:
    """Whether it is a number without a fraction, small enough to be exact as a float."""
    return isinstance(value, Real) and not isinstance(value, bool) and value == value // 1 and abs(value) < 2**53


def as_tensor(x, name: str = "source"):
    """An array as a tensor: over its own memory where torch can read that, else a copy. Anything else as it is."""
    if not isinstance(x, numpy.ndarray):
        return x
    require(not numpy.ma.is_masked(x), name, "an array with masked entries",
            "one without: leave out the rows that do not count")
    require(x.dtype.kind in "fiu" and x.dtype.itemsize <= 8, name, f"an array of {x.dtype}",
            "one of numbers that torch has")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nothing here writes to activations
        return torch.from_numpy(numpy.ascontiguousarray(x, x.dtype.newbyteorder("=")))


def check_number(name: str, value, low: float, high: float = math.inf) -> None:
    """Raise ValueError unless it is a finite number from `low` to `high`."""
    rule = f"a finite number, {low:g} or more" if high == math.inf else f"a number from {low:g} to {high:g}"
    number = isinstance(value, Real) and not isinstance(value, bool)
    require(number and low <= value <= high and math.isfinite(value), name, value, rule)


def first_derivative_only(what: str) -> None:
    """Raise RuntimeError in a backward pass under `create_graph`: what it computes is part of no graph, and would be
    missing from a second derivative without a word."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{what} has a first derivative only")


def check_finite(terms: dict[str, Tensor], step: int) -> None:
    """Raise FloatingPointError, with the step and the terms, unless every term is finite."""
    if not all(torch.isfinite(term) for term in terms.values()):
        raise FloatingPointError(f"loss is not finite at step {step}: "
                                 + ", ".join(f"{k} = {v.item():g}" for k, v in terms.items()))
