"""Recorded steps. There is a GPU in few places, so its graphs are played here by a recorder that keeps to their
rules."""
import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from saelib import auxk, relu_path, train
from saelib.loop import Loop
from saelib.sae import SAE

WAITS = "aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.equal", "aten.unique"


class Graph(TorchDispatchMode):
    """What `torch.cuda.CUDAGraph` does, on the CPU: it keeps every operation with the tensors that it got and made, and
    repeats them on the same memory. Numbers that Python passed stay what they were. An operation whose answer Python
    would wait for is an error. Unlike a GPU's it also carries out what it records, so `undo` puts back what that
    changed."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func).startswith(WAITS):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        made = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, made))
        return made

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, made in self.operations:
            again = func(*args, **kwargs)
            for old, new in zip(*(out if isinstance(out, (tuple, list)) else (out,) for out in (made, again))):
                if isinstance(old, torch.Tensor):
                    old, new = (t if t.layout == torch.strided else t.values() for t in (old, new))
                    if old.data_ptr() != new.data_ptr():  # else it is the same memory, or a view of it
                        old.copy_(new.reshape(old.shape))  # it may have been squeezed in place since


@pytest.fixture
def played(monkeypatch):
    """Graphs played on the CPU, and the parts of a step that differ there as they are on a GPU: nothing waits."""
    recorded = []

    @contextlib.contextmanager
    def record(graph, pool, stream, **options):
        recorded.append(graph)
        state = {key: value.clone() for key, value in graph.watched().items()}
        with graph:
            yield
        with torch.no_grad():
            for key, value in graph.watched().items():
                value.copy_(state[key])

    def update(loop):
        loop.sae.remove_parallel_gradient()
        grads = [p.grad for p in loop.sae.parameters()]
        clip = (1 / (torch.stack([g.square().sum() for g in grads]).sum().sqrt() + 1e-6)).clamp(max=1)
        torch._foreach_mul_(grads, clip)
        loop.adam.step()
        loop.sae.normalise_decoder()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(Loop, "update", update)
    monkeypatch.setattr(relu_path, "few_active", lambda *_: False)
    monkeypatch.setattr(auxk.F, "embedding", lambda places, rows, sparse: rows.index_select(0, places))
    return recorded


def losses_of(path, method, played, n_steps=40):
    """Training with dead latents that come and go, a learning rate and a penalty that change: the terms, weights and
    silences."""
    sae = SAE(12, 64, method, {"topk": 3, "relu": 0.05, "multi_topk": 3}[method], seed=5)
    loop = Loop(sae, 1e-2, 150, 1 / 4, 4, 0.0)
    loop.look_every = 4
    Graph.watched = lambda graph: {**dict(sae.named_parameters()), "silence": loop.tokens_since_fired,
                                   **{(i, key): value for i, state in enumerate(loop.adam.state.values())
                                      for key, value in state.items()}}
    for step in range(n_steps):
        x = torch.randn(20, 12, generator=torch.Generator().manual_seed(1000 + step))
        loop.one(x, 1 - step / n_steps, step / n_steps, path, "fp32", log=True)
    return loop


@pytest.mark.parametrize("method", ["topk", "relu", "multi_topk"])
def test_a_recorded_step_is_the_step(method, played):
    eager, replayed = losses_of("sparse", method, played), losses_of("graph", method, played)
    assert played and eager.history == replayed.history
    assert any(row["auxk"] > 0 for row in eager.history) or method == "relu"
    for ours, twin in zip(replayed.sae.parameters(), eager.sae.parameters()):
        assert torch.equal(ours, twin)
    assert torch.equal(replayed.tokens_since_fired, eager.tokens_since_fired)
    assert len(played) < 10 and sum(step is not None for step in replayed.recorded.values()) == len(played)


def test_a_step_that_waits_for_the_device_is_not_recorded(played):
    with pytest.raises(RuntimeError, match="path is 'graph': it must be 'sparse' .* as one of 'batchtopk' .*not "
                       "permitted when stream is capturing"):
        sae = SAE(12, 64, "batchtopk", 3)
        loop = Loop(sae, 1e-2, 150, 0.0, 4, 0.0)
        Graph.watched = lambda graph: {}
        for _ in range(2):
            loop.one(torch.randn(20, 12), 1.0, 1.0, "graph", "fp32", log=False)


def test_latents_that_may_die_soon_are_asked_for_rarely_and_change_nothing():
    loops = []
    for look_every in (0, 4, 7):
        sae = SAE(12, 64, "topk", 3, seed=5)
        loop = Loop(sae, 1e-2, 150, 1 / 4, 4, 0.0)
        loop.look_every = look_every
        for step in range(40):  # after a small batch more latents die than it would let expect
            x = torch.randn(20 if step % 4 else 2, 12, generator=torch.Generator().manual_seed(1000 + step))
            loop.one(x, 1.0, 1.0, "sparse", "fp32", log=True)
        loops.append(loop)
    assert max(row["auxk"] for row in loops[0].history) > 0
    for loop in loops[1:]:
        for ours, twin in zip(loop.history, loops[0].history):
            assert ours == pytest.approx(twin, rel=1e-4)


@pytest.mark.parametrize("path, rule", [("graph", "'sparse', 'native' or 'dense' on a CPU"),
                                        ("fast", "one of sparse, graph, native, dense")])
def test_a_path_that_is_not_there_is_named(path, rule):
    with pytest.raises(ValueError, match=f"path is '{path}': it must be {rule}"):
        train.train(SAE(4, 9, "topk", 2), lambda start: iter([torch.randn(5, 4)]), 1, path=path)


def test_no_more_latents_are_looked_at_than_there_are():
    loop = Loop(SAE(12, 40, "topk", 3), 1e-2, 150, 1 / 4, 4, 0.0)
    loop.tokens_since_fired += 151  # all 40 are silent, and 64 is the power of two above
    loop.look_for_dead(20)
    assert loop.n_candidates == 40
