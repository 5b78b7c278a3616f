"""Bad input, in one line; and arrays, which are good input."""
import warnings

import numpy
import torch
from torch import Tensor


def require(holds: bool, name: str, value, rule: str) -> None:
    """Raise ValueError, naming the argument, its value and the rule, unless the rule holds."""
    if not holds:
        raise ValueError(f"{name} is {value!r}: it must be {rule}")


def as_tensor(x: Tensor | numpy.ndarray) -> Tensor:
    """The same activations as a tensor: over an array's own memory where torch can read that, else a copy."""
    if not isinstance(x, numpy.ndarray):
        return x
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nothing here writes to activations
        return torch.from_numpy(numpy.ascontiguousarray(x, x.dtype.newbyteorder("=")))
