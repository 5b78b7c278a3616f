"""A training step recorded once as a CUDA graph and then replayed: one launch in place of many.

A step of a small autoencoder keeps a GPU busy for less time than Python needs to launch it. What is recorded is fixed,
shapes and addresses too. So a batch is copied to where the recorded one lay; what the host changes (the learning rate,
the scale of the penalty, the latents that may be dead) lies in tensors that it writes to before; and there is a
recording for each number of such latents. They take turns, and so share their memory. A step that waits for the device
can't be recorded.
"""
import threading

import torch
from torch import Tensor

from saelib.checks import require
from saelib.selection import has_kernels

RECORDING = threading.Lock()  # members of a sweep share the device


def check(sae) -> None:
    """Raise ValueError unless the training steps of `sae` can be recorded."""
    require(has_kernels(sae.W_dec.device), "path", "graph",
            "'sparse', 'native' or 'dense' on a CPU, and 'sparse' or 'dense' on a GPU older than Ampere")
    require(not sae.method.waits, "path", "graph", "'sparse' for a method that waits for the device")


class Recorded:
    """One recorded step, with where it reads its batch and where it leaves its terms and L0."""

    def __init__(self, loop, x: Tensor, precision: str):
        self.x, self.graph = x.clone(), torch.cuda.CUDAGraph()
        try:
            with RECORDING, torch.cuda.graph(self.graph, loop.pool, torch.cuda.Stream(),
                                             capture_error_mode="thread_local"):
                out, terms = loop.forward(self.x, "sparse", precision)
                self.l0 = out.l0()
                self.terms = loop.backward(terms)
            # what the recording writes to, also after another shape took its place there
            self.kept = dict(loop.scratch)
        except RuntimeError as error:
            if "captur" not in str(error):  # as CUDA calls what a recording forbids
                raise
            raise RuntimeError(f"path is 'graph': it must be 'sparse' for a method whose step waits for the device, as "
                               f"one of {loop.sae.method.key!r} "
                               f"seems to (set `waits` in its class): {error}") from error


def step(loop, x: Tensor, precision: str) -> tuple[dict[str, Tensor], Tensor]:
    """The device's part of `Loop.one`, recorded the second time that it has these shapes: the first warms up what is
    made at first use.

    Returns:
        The terms of the loss and L0, which the next step overwrites.
    """
    key = tuple(x.shape), loop.n_candidates
    if key not in loop.recorded:
        loop.recorded[key] = None
        out, terms = loop.forward(x, "sparse", precision)
        l0 = out.l0()
        return loop.backward(terms), l0
    recorded = loop.recorded[key] = loop.recorded[key] or Recorded(loop, x, precision)
    recorded.x.copy_(x)
    recorded.graph.replay()
    return recorded.terms, recorded.l0
