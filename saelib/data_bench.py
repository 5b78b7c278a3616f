"""How fast activations come: from a language model, and from the cache. Two tables of `saelib.bench`."""
from collections.abc import Iterator
from dataclasses import asdict, replace

import torch

from saelib import subjects, timing
from saelib.contestants import Floor, Setting, chosen

SUBJECTS, LOADED = ("pygpt", "minilm"), Setting(0, 0, 32, 1024)


def harvesting(device: str, seconds: float) -> Iterator[dict]:
    """Activations as they go into the cache, against the model's forward passes alone on the same windows."""
    for subject in SUBJECTS:
        model, _ = subjects.load(subject, device)
        dtype = subjects.fast_dtype(device)
        windows = torch.randint(model.config.vocab_size, (4, 4 * subjects.WINDOWS, subjects.CONTEXT),
                                generator=torch.Generator().manual_seed(0))

        def bare(ids):
            for some in ids.split(subjects.WINDOWS):
                with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                    subjects.residual_stream(model, some.to(device))

        def harvest(ids):
            return [piece.to(torch.float16) for piece in subjects.harvest(model, ids, None, slice(None), device)]

        makers = {("data", name): (lambda step=step: Floor(step))
                  for name, step in (("forward alone", bare), ("harvest", harvest))}
        rows = timing.compare(makers, list(windows), ("data", "forward alone"), seconds / len(SUBJECTS),
                              f"harvest {subject}")
        yield from ({"table": "harvest", "setting": {"subject": subject, "device": device}, **row} for row in rows)


def loading(device: str, seconds: float) -> Iterator[dict]:
    """A shuffled batch from the cache, against a training step on it at n = 4 d."""
    for subject in SUBJECTS:
        source = subjects.open_source(subject, 8 * LOADED.batch_size, device=device)
        s = replace(LOADED, d_model=source.d_model, n_latents=4 * source.d_model, device=device)
        endless = source.batches(s.batch_size, 10**9, 0)
        own = chosen(s)
        step = next(iter(own))
        makers = {**own, ("data", "loader"): lambda: Floor(lambda x: next(endless).to(device))}
        rows = timing.compare(makers, [next(endless).to(device) for _ in range(2)], step, seconds / len(SUBJECTS),
                              f"load {subject}")
        yield from ({"table": "load", "setting": {"subject": subject, **asdict(s)}, **row} for row in rows)
