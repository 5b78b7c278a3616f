"""The GPU's kernels against their plain twins: on a GPU where there is one, else in Triton's interpreter."""
import ast
import re
from pathlib import Path

import pytest
import torch

ON_GPU = torch.cuda.is_available()
triton = pytest.importorskip("triton", reason="Triton is not installed: it exists for Linux")

from saelib import kernels, losses, methods, pairs, triton_adam, triton_kernels, triton_select  # noqa: E402
from saelib.loop import Loop  # noqa: E402
from saelib.sae import SAE  # noqa: E402

DEVICE = "cuda" if ON_GPU else "cpu"
SHAPES = [(5, 7, 3, 11), (17, 40, 1, 100), (9, 16, 70, 70), (1, 1, 1, 1), (10, 24, 17, 300)]  # batch, d, k, n
EXACT = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def memory_that_nobody_wrote_is_not_a_number():
    # it fills new tensors with NaN, and forbids some of the twins on a GPU
    torch.use_deterministic_algorithms(not ON_GPU)
    yield
    torch.use_deterministic_algorithms(False)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def distinct(batch, k, n, seed=0):
    """k different latents for each token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(n, generator=generator)[:k] for _ in range(batch)]).int().to(DEVICE)


def dense(values, indices, n):
    """The sparse matrix in full, duplicates added up."""
    return torch.zeros(len(values), n, device=DEVICE).scatter_add_(1, indices.long(), values)


def check_are_largest(values, indices, pre_acts, k):
    assert values.shape == indices.shape == (len(pre_acts), k) and indices.dtype == torch.int32
    assert all(len(set(row)) == k for row in indices.tolist())
    torch.testing.assert_close(values, pre_acts.gather(1, indices.long()), **EXACT)
    torch.testing.assert_close(values.sort(1).values, pre_acts.topk(k, 1).values.sort(1).values, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch, d, k, n", SHAPES)
def test_select_finds_the_largest_pre_activations(batch, d, k, n, dtype):
    x, W_enc, b_enc = random(batch, d).to(dtype), random(n, d, seed=1), random(n, seed=2)
    values, indices = triton_select.select(x, W_enc.to(dtype), b_enc, k)
    if dtype == torch.float32:
        check_are_largest(values, indices, x @ W_enc.t() + b_enc, k)
        return
    exact = x.float() @ W_enc.to(dtype).float().t() + b_enc
    assert values.dtype == torch.float32 and all(len(set(row)) == k for row in indices.tolist())
    torch.testing.assert_close(values, exact.gather(1, indices.long()), rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(values.sort(1).values, exact.topk(k, 1).values.sort(1).values, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("latents", [[40, 100, 150, 300], [64, 65, 66, 79]])
def test_select_finds_latents_that_are_alone_in_their_groups_and_latents_that_share_one(latents):
    b_enc = torch.full((320,), -100.0, device=DEVICE)
    b_enc[latents] = 2.0
    _, indices = triton_select.select(random(3, 8), random(len(b_enc), 8, seed=1) / 100, b_enc, 4)
    assert indices.sort(1).values.tolist() == [latents] * 3


def test_bf16_selection_agrees_with_the_exact_one_on_nearly_every_latent():
    x, W_enc = random(24, 32), random(256, 32, seed=1)
    _, indices = triton_select.select(x.bfloat16(), W_enc.bfloat16(), torch.zeros(256, device=DEVICE), 16)
    pre_acts = x @ W_enc.t()
    chosen = dense(torch.ones(24, 16, device=DEVICE), indices, 256) > 0
    exact = dense(torch.ones(24, 16, device=DEVICE), pre_acts.topk(16, 1).indices, 256) > 0
    assert chosen.sum() == 24 * 16 and (chosen & exact).sum() / exact.sum() > 0.98


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_precision_is_that_of_the_product(monkeypatch, precision, dtype):
    monkeypatch.setattr(kernels, "on_gpu", lambda x: True)
    x, W_enc, b_enc = random(9, 16), random(50, 16, seed=1), random(50, seed=2)
    for ours, twin in zip(kernels.select(x, W_enc, b_enc, 4, precision),
                          triton_select.select(x.to(dtype), W_enc.to(dtype), b_enc, 4)):
        assert torch.equal(ours, twin)


def test_select_works_through_many_tokens_in_parts(monkeypatch):
    monkeypatch.setattr(triton_select, "SCORES_AT_ONCE", 700)
    x, W_enc, b_enc = random(20, 8), random(100, 8, seed=1), random(100, seed=2)
    check_are_largest(*triton_select.select(x, W_enc, b_enc, 5), x @ W_enc.t() + b_enc, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("n, group", [(150, 32), (152, 16), (200, 64)])
def test_scores_are_the_product_and_the_maxima_are_those_of_its_groups(dtype, tma, n, group):
    # a maximum below 0
    x, weight, bias = random(300, 24).to(dtype), random(n, 24, seed=1).to(dtype), random(n, seed=2) - 100
    scores, maxima = triton_select.scores(x, weight, bias, group, tma=tma)
    exact = x.float() @ weight.float().t() + bias
    torch.testing.assert_close(scores.float(), exact, **(EXACT if dtype == torch.float32
                                                         else {"rtol": 1e-2, "atol": 1e-1}))
    padded = torch.nn.functional.pad(scores.float(), (0, -n % group), value=float("-inf"))
    assert torch.equal(maxima.float(), padded.view(300, -1, group).amax(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n, k", [(1, 1), (64, 64), (65, 64), (200, 1), (333, 40)])
def test_largest_orders_negatives_zeros_infinities_and_ties(dtype, n, k):
    values = (random(6, n) * 4).round().div(4).to(dtype)
    values[0], values[1], values[2] = -values[2].abs() - 1, 0.0, float("-inf")
    values[3, n // 2] = float("inf")
    found, places = triton_select.largest(values, k)
    check_are_largest(found, places, values.float(), k)


def test_a_tie_goes_to_the_lowest_place():
    values = torch.tensor([[1.0, 2.0, 1.0, 1.0, 2.0, 1.0]], device=DEVICE)
    assert sorted(triton_select.largest(values, 4)[1][0].tolist()) == [0, 1, 2, 4]


def test_a_row_that_is_not_a_number_still_yields_k_places_within_it():
    places = triton_select.largest(torch.full((2, 100), float("nan"), device=DEVICE), 7)[1]
    assert all(len(set(row)) == 7 and min(row) >= 0 and max(row) < 100 for row in places.tolist())


def test_groups_without_latents_are_never_chosen_from():
    values = random(3, 40)
    groups = torch.tensor([[1, 0]] * 3, dtype=torch.int32, device=DEVICE)  # group 1 has 8 latents only
    check_are_largest(*triton_select.largest(values, 40, groups, 32), values, 40)


def check_gradients(grouped, values, tokens, indices, n):
    """The three gradients against products of the sparse matrices in full."""
    grad, others = random(*values.shape, seed=5), random(*tokens.shape, seed=6).to(tokens.dtype)
    found = triton_kernels.gradients(*grouped, grad, tokens, values, others, n)
    slopes, latents = dense(grad, indices, n), dense(values, indices, n)
    for ours, twin in zip(found, (slopes.t() @ tokens.float(), slopes.sum(0), latents.t() @ others.float())):
        torch.testing.assert_close(ours, twin, rtol=1e-4, atol=1e-4)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch, d, k, n", SHAPES)
def test_the_three_products_are_those_of_the_sparse_matrix(batch, d, k, n, dtype):
    indices, values = distinct(batch, k, n), random(batch, k)
    tokens, rows, active = random(batch, d, seed=1).to(dtype), random(n, d, seed=2).to(dtype), pairs.Active(indices, n)
    if dtype == torch.float32:
        torch.testing.assert_close(triton_kernels.decode(values, indices, rows), active.decode(values, rows),
                                   rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(triton_kernels.dot(tokens, indices, rows), active.dot(tokens, rows), rtol=1e-4,
                                   atol=1e-4)
        bias = random(d, seed=3)
        torch.testing.assert_close(triton_kernels.decode(values, indices, rows, bias),
                                   active.decode(values, rows, bias), rtol=1e-4, atol=1e-4)
        both = values.sin(), tokens, values, tokens.cos()
        for ours, twin in zip(triton_kernels.gradients(*triton_kernels.group_by_latent(indices, n), *both, n),
                              active.gradients(*both)):
            torch.testing.assert_close(ours, twin, rtol=1e-4, atol=1e-4)
        assert torch.equal(triton_kernels.fired(values, indices, n), active.fired(values.relu()))
        for given in (dtype, torch.bfloat16):
            torch.testing.assert_close(triton_kernels.centre(tokens, bias, given), active.centre(tokens, bias, given),
                                       rtol=1e-2, atol=1e-6)
    matrix, grouped = dense(values, indices, n), triton_kernels.group_by_latent(indices, n)
    torch.testing.assert_close(triton_kernels.decode(values, indices, rows), matrix @ rows.float(), rtol=1e-4,
                               atol=1e-4)
    torch.testing.assert_close(triton_kernels.dot(tokens, indices, rows),
                               (tokens.float() @ rows.float().t()).gather(1, indices.long()), rtol=1e-4, atol=1e-4)
    check_gradients(grouped, values, tokens, indices, n)


def test_a_latent_repeated_within_a_token_counts_each_time():
    indices, values = torch.tensor([[2, 2, 0], [1, 1, 1]], dtype=torch.int32, device=DEVICE), random(2, 3)
    tokens, rows, matrix = random(2, 5, seed=1), random(4, 5, seed=2), dense(values, indices, 4)
    grouped = triton_kernels.group_by_latent(indices, 4)
    torch.testing.assert_close(triton_kernels.decode(values, indices, rows), matrix @ rows, **EXACT)
    check_gradients(grouped, values, tokens, indices, 4)


@pytest.mark.parametrize("offset", [0, 1, 15, 16, 17])
def test_a_latent_of_every_token_is_summed_wherever_its_pairs_begin(offset):
    batch, chunk = 10 * triton_kernels.CHUNK, triton_kernels.CHUNK
    indices = torch.full((batch, 1), 3, dtype=torch.int32, device=DEVICE)
    indices[:offset] = 1  # moves the chunks against the latent; latents 0, 2 and 4 to 8 never fire
    indices[-chunk // 2:] = 7
    values, tokens = random(batch, 1), random(batch, 21, seed=1)
    for found in check_gradients(triton_kernels.group_by_latent(indices, 9), values, tokens, indices, 9):
        assert not found[[0, 2, 4, 5, 6, 8]].any()


def test_grouping_is_that_of_the_twin():
    indices = distinct(50, 4, 30)
    order, token_of, starts, latents = triton_kernels.group_by_latent(indices, 30)
    twin = pairs.Active(indices, 30).by_latent
    assert torch.equal(order, twin[0])
    assert torch.equal(token_of, twin[1])
    assert torch.equal(starts, twin[2])
    assert starts[-1] == 200
    assert latents.tolist() == sorted(indices.flatten().tolist())


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("n, d", [(9, 7), (5, 33), (3, 1)])
def test_adam_by_rows_is_tangent_gradient_then_adam_then_unit_norm(n, d, unit):
    start = torch.nn.functional.normalize(random(n, d), dim=1)
    twin, ours = torch.nn.Parameter(start.clone()), start.clone()
    adam = torch.optim.Adam([twin], lr=0.01, betas=(0.9, 0.999), eps=6.25e-10)
    m, v = torch.zeros_like(ours), torch.zeros_like(ours)
    for step in range(1, 5):
        grad = random(n, d, seed=step)
        tangent = grad - unit * (grad * twin.detach()).sum(1, keepdim=True) * twin.detach()
        torch.testing.assert_close(triton_adam.square_norm(grad, ours, unit), tangent.square().sum(), rtol=1e-4,
                                   atol=1e-6)
        clip = 1 / tangent.norm().clamp_min(1)
        twin.grad = tangent * clip
        adam.step()
        if unit:
            with torch.no_grad():
                twin /= twin.norm(dim=1, keepdim=True)
        kept = grad.clone()
        factors = triton_adam.adam_factors(torch.tensor(0.01, device=DEVICE), torch.tensor(float(step), device=DEVICE),
                                           0.9, 0.999)
        triton_adam.adam_rows(ours, grad, m, v, clip, factors, beta1=0.9, beta2=0.999, eps=6.25e-10, unit=unit)
        assert torch.equal(grad, kept)
        state = adam.state[twin]
        if d > 1 or not unit:  # in one dimension nothing but rounding is left of the gradient, and Adam makes it large
            torch.testing.assert_close(ours, twin.detach(), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(m, state["exp_avg"], rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(v, state["exp_avg_sq"], rtol=1e-4, atol=1e-8)
        if unit:
            torch.testing.assert_close(ours.norm(dim=1), torch.ones(n, device=DEVICE), **EXACT)


@pytest.mark.parametrize("name, call", {
    "k is 9": lambda: triton_select.select(random(2, 3), random(8, 3), random(8), 9),
    "weight.dtype is torch.float64": lambda: triton_select.select(random(2, 3).double(), random(8, 3).double(),
                                                                  random(8).double(), 2),
    "tma is True": lambda: triton_select.scores(random(2, 3), random(8, 3), random(8), tma=True),
    "starts is 3": lambda: triton_kernels.gradients(*triton_kernels.group_by_latent(distinct(4, 2, 2), 2),
                                                    random(4, 2), random(4, 3), random(4, 2), random(4, 3), 5),
    "values is [4, 2]": lambda: triton_kernels.gradients(*triton_kernels.group_by_latent(distinct(4, 2, 2), 2),
                                                         random(4, 2), random(4, 3), random(2, 4).t(), random(4, 3), 2),
}.items())
def test_an_argument_that_breaks_its_rule_is_named(name, call):
    with pytest.raises(ValueError, match=re.escape(name) + ".*: it must be"):
        call()


def test_nothing_imports_these_modules_before_it_needs_them():
    for path in Path(triton_kernels.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom) and not path.stem.startswith("triton_"):
                assert "triton" not in ast.unparse(node), f"{path.name} imports Triton when it is read"


def a_loop(monkeypatch, on_gpu, method="topk", precision="fp32", n_steps=4):
    """A few steps of training with dead latents, checkpointed and taken up again in the middle."""
    monkeypatch.setattr(kernels, "on_gpu", lambda x: on_gpu)
    sparsity = {"topk": 3, "relu": 0.05, "gained": 0.05}[method]
    fresh = lambda: Loop(SAE(12, 40, method, sparsity).to(DEVICE), 1e-2, 30, 1 / 32, 4, 0.0)
    loop, history = fresh(), []
    for step in range(n_steps):
        if step == 2:
            loop, state = fresh(), loop.state()
            loop.restore(state)
        loop.look_every = int(on_gpu)
        # seeds far from the SAE's own: with that one a token IS a row, and what is left of a gradient is rounding,
        # which Adam makes large
        loop.one(random(16, 12, seed=100 + step), 1.0, 1.0, "sparse", precision, log=True)
        history.append(loop.history[-1]["squared_error"])
    return [p.detach() for p in loop.sae.parameters()], history


class Gained(methods.ReLU):
    """A method with parameters of its own: a number, and one that no gradient reaches."""
    key = "gained"

    def __init__(self, *args):
        super().__init__(*args)
        self.gain, self.unused = torch.nn.Parameter(torch.tensor(1.5)), torch.nn.Parameter(torch.ones(3))

    def forward(self, pre_acts):
        return self.gain * torch.relu(pre_acts)


@pytest.mark.parametrize("method", ["topk", "relu", "gained"])
def test_training_on_the_kernels_of_the_gpu_is_training_on_the_stock_operations(monkeypatch, method):
    monkeypatch.setitem(methods.METHODS, "gained", Gained)
    (weights, history), (twins, expected) = a_loop(monkeypatch, True, method), a_loop(monkeypatch, False, method)
    assert history == pytest.approx(expected, rel=1e-4)
    for ours, twin in zip(weights, twins):
        torch.testing.assert_close(ours, twin, rtol=1e-3, atol=1e-4)


def test_training_in_bf16_on_the_kernels_of_the_gpu_stays_near_float32(monkeypatch):
    (weights, history), (twins, expected) = a_loop(monkeypatch, True, precision="bf16"), a_loop(monkeypatch, False)
    assert history == pytest.approx(expected, rel=0.02) and history != expected
    assert all(ours.dtype == torch.float32 for ours in weights)
    assert (weights[0] - twins[0]).norm() < 0.05 * twins[0].norm()


def test_the_copies_of_the_weights_follow_every_step_and_every_restored_state(monkeypatch):
    monkeypatch.setattr(kernels, "on_gpu", lambda x: True)
    loop = Loop(SAE(12, 40, "topk", 3).to(DEVICE), 1e-1, 10**6, 0.0, 4, 0.0)
    first, state = None, {key: value.clone() for key, value in loop.sae.state_dict().items()}
    for step in range(3):
        loop.one(random(16, 12, seed=100 + step), 1.0, 1.0, "sparse", "bf16", log=False)
        first = first or {name: copy.clone() for name, copy in loop.copies.items()}
        for name, copy in loop.copies.items():
            torch.testing.assert_close(copy.float(), getattr(loop.sae, name).detach(), rtol=1e-2, atol=1e-6)
    assert set(first) == {"W_enc", "W_dec"} and not any(torch.equal(first[name], loop.copies[name]) for name in first)
    loop.restore(loop.state() | {"sae": state})
    for name, copy in loop.copies.items():
        assert torch.equal(copy, state[name].bfloat16())


@pytest.mark.parametrize("method", ["multi_topk", "batchtopk"])
def test_methods_that_choose_otherwise_find_the_same_on_the_kernels_of_the_gpu(monkeypatch, method):
    found = []
    for on_gpu in (True, False):
        monkeypatch.setattr(kernels, "on_gpu", lambda x: on_gpu)
        sae, x = SAE(12, 40, method, 3).to(DEVICE), random(9, 12, seed=100)
        out = sae.run(x)
        loss = losses.squared_error(x, out.x_hat) + sum(sae.method.penalty(sae, x, out).values())
        found.append([loss.detach(), *torch.autograd.grad(loss, list(sae.parameters()))])
    for ours, twin in zip(*found):
        torch.testing.assert_close(ours, twin, rtol=1e-4, atol=1e-5)
