"""What "auto" stands for: the fastest path and precision for an SAE on a device."""
import torch
from torch import Tensor

from saelib import methods, native, subjects
from saelib.selection import has_kernels

LARGE = 2**16  # weights of an encoder from which bfloat16 and compiled parts are chosen


def pick_precision(precision: str, device: str, n_weights: int) -> str:
    """The precision that "auto" stands for: bfloat16 where the hardware multiplies in it and the encoder has 2^16
    weights or more, else float32, because casting costs a small SAE more than it gains."""
    if precision != "auto":
        return precision
    return "bf16" if n_weights >= LARGE and subjects.fast_dtype(device) == torch.bfloat16 else "fp32"


def pick_path(path: str, device: str, method: methods.Method, W_enc: Tensor) -> str:
    """The path that "auto" stands for. On a GPU with kernels it is the recorded step, where the method's can be
    recorded. On a CPU it is the step with compiled parts where they can be compiled, for a method that chooses latents
    and an encoder of 2^16 weights or more: to compile takes half a minute, and a small SAE is trained before that.
    Elsewhere it is the sparse one."""
    if path != "auto":
        return path
    if has_kernels(torch.device(device)):
        return "sparse" if method.waits else "graph"
    is_large = W_enc.numel() >= LARGE and W_enc.dtype == torch.float32
    gains = device == "cpu" and methods.kernel(method) == "largest" and is_large
    return "native" if gains and native.available() else "sparse"
