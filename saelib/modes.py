"""The modes of torch that training runs in."""
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def own_modes() -> Iterator[None]:
    """Gradients on, and autocast off, whatever mode the caller is in: `no_grad`, `inference_mode` or `autocast`."""
    autocasts = [torch.autocast(kind, enabled=False) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    with ExitStack() as modes:
        for mode in (torch.inference_mode(False), torch.enable_grad(), *autocasts):
            modes.enter_context(mode)
        yield
