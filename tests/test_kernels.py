"""The sparse path against its plain twin, forward and backward."""
import pytest
import torch

from saelib import kernels, native, pairs, relu_path
from saelib.sae import SAE

SHAPES = [(7, 5, 11, 3), (64, 33, 100, 1), (300, 16, 64, 64), (1, 1, 1, 1), (513, 24, 300, 17)]  # batch, d, n, k


def make(d, n, k, seed=0, method="topk"):
    sae = SAE(d, n, method, k, seed=seed)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        sae.b_enc.copy_(torch.randn(n, generator=generator))
        sae.b_pre.copy_(torch.randn(d, generator=generator))
        sae.W_enc.copy_(torch.randn(n, d, generator=generator))
    return sae


def through(sae, x, path, precision="fp32"):
    """The reconstruction, and the gradient of a loss that asks for it AND for the latents, as auxiliary losses do."""
    out = sae.run(x, path, precision)
    weight = torch.linspace(-1, 1, x.shape[1])
    loss = (out.x_hat * weight).sum() + out.latents.sin().sum()
    return out.x_hat, *torch.autograd.grad(loss, [x, *sae.parameters()])


@pytest.mark.parametrize("batch, d, n, k", SHAPES)
@pytest.mark.parametrize("method", ["topk", "batchtopk"])
def test_sparse_and_dense_agree_forward_and_backward(batch, d, n, k, method):
    sae = make(d, n, k, method=method)
    x = torch.randn(batch, d, generator=torch.Generator().manual_seed(1), requires_grad=True)
    for ours, twin in zip(through(sae, x, "sparse"), through(sae, x, "dense")):
        torch.testing.assert_close(ours, twin, rtol=1e-4, atol=2e-4)


def test_multi_topk_asks_the_sparse_path_and_its_dense_twin_for_the_same():
    sae, x = make(16, 60, 3, method="multi_topk"), torch.randn(50, 16)
    wanted = [sae.W_enc, sae.W_dec, sae.b_enc, sae.b_pre]
    terms = [sae.method.penalty(sae, x, sae.run(x, path))["multi_topk"] for path in ("sparse", "dense")]
    torch.testing.assert_close(*terms)
    for ours, twin in zip(*(torch.autograd.grad(term, wanted) for term in terms)):
        torch.testing.assert_close(ours, twin, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch, d, n", [shape[:3] for shape in SHAPES])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("share", [0.5, 0.03, 0.0])
def test_the_relu_path_and_its_dense_twin_agree_forward_and_backward(batch, d, n, precision, share):
    sae = make(d, n, 0.1, method="relu")
    x = torch.randn(batch, d, generator=torch.Generator().manual_seed(1), requires_grad=True)
    with torch.no_grad():
        sae.b_enc -= sae.pre_acts(x).flatten().quantile(1 - share) + (0 if share else 1)
    latents = sae.encode(x)
    assert n == 1 or relu_path.few_active(latents) == (share < 0.5) and bool(latents.any()) == (share > 0)
    for ours, twin in zip(through(sae, x, "sparse", precision), through(sae, x, "dense")):
        if precision == "fp32":
            torch.testing.assert_close(ours, twin, rtol=1e-4, atol=2e-4)
        else:  # a pre-activation near 0 may round to the other side: single entries may differ, the whole may not
            assert (ours - twin).norm() <= 0.3 * twin.norm() + 0.05


@pytest.mark.parametrize("bias", [0.0, -5.0])
def test_the_relu_path_agrees_with_finite_differences(bias):
    sae = make(3, 60, 0.1, method="relu").double()
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    inputs = [x, sae.b_pre, sae.W_enc, (sae.b_enc + bias).detach().requires_grad_(), sae.W_dec]
    latents = relu_path.relu(*inputs)[1]
    assert relu_path.few_active(latents) == (bias < 0) and latents.any()
    assert torch.autograd.gradcheck(lambda *a: relu_path.relu(*a), inputs, eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("n", [1, 6, 24, 35, 64])
@pytest.mark.parametrize("threshold", [-9, 0, 2, 9])
def test_the_places_of_positive_latents_are_those_of_nonzero(n, threshold):
    latents = torch.relu(torch.randn(70, n, generator=torch.Generator().manual_seed(0)) - threshold)
    tokens, indices = relu_path.nonzero(latents)
    assert torch.equal(tokens, latents.nonzero()[:, 0])  # token by token
    assert torch.equal((tokens * n + indices).sort().values, latents.flatten().nonzero().squeeze(1))


def test_scratch_that_was_overwritten_before_backward_is_an_error_and_no_wrong_gradient():
    sae, scratch = make(4, 9, 0.1, method="relu"), relu_path.Scratch()
    first = sae.run(torch.randn(5, 4), scratch=scratch)
    sae.run(torch.randn(5, 4), scratch=scratch)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.x_hat.sum().backward()


def test_a_method_with_an_activation_function_of_its_own_does_not_run_on_the_kernel_of_another():
    sae = make(4, 9, 0.1, method="relu")
    sae.method.forward = lambda pre_acts: pre_acts
    assert (sae.run(torch.randn(50, 4)).latents < 0).any()


def test_the_same_latent_active_for_many_tokens_collects_all_their_gradients():
    active = pairs.Active(torch.zeros(6, 1, dtype=torch.int32), n_latents=3)
    tokens, values = torch.randn(6, 4), torch.rand(6, 1)
    grouped = active.sum_tokens(values, tokens)
    torch.testing.assert_close(grouped[0], (values * tokens).sum(0))
    assert not grouped[1:].any()


def test_the_three_products_are_those_of_the_sparse_matrix():
    generator = torch.Generator().manual_seed(0)
    indices = torch.stack([torch.randperm(9, generator=generator)[:4] for _ in range(20)]).int()
    values, tokens, rows = torch.randn(20, 4), torch.randn(20, 6), torch.randn(9, 6)
    check_products(pairs.Active(indices, 9), values, torch.zeros(20, 9).scatter_(1, indices.long(), values), tokens,
                   rows)


def test_tokens_may_have_different_numbers_of_active_latents_and_none():
    matrix = torch.relu(torch.randn(20, 9, generator=torch.Generator().manual_seed(0)))
    matrix[[0, 7, 19]], matrix[5], matrix[:, 4] = 0, 1, 0  # tokens with none and with all, a latent without tokens
    tokens, indices = matrix.nonzero(as_tuple=True)
    starts = torch.cat([torch.zeros(1), (matrix != 0).sum(1).cumsum(0)]).int()
    check_products(pairs.Active(indices.int(), 9, starts), matrix[tokens, indices], matrix, torch.randn(20, 6),
                   torch.randn(9, 6))


def check_products(active, values, matrix, tokens, rows):
    torch.testing.assert_close(active.decode(values, rows), matrix @ rows)
    torch.testing.assert_close(active.sum_tokens(values, tokens), matrix.t() @ tokens)
    torch.testing.assert_close(active.sum_latents(values), matrix.sum(0))
    owner = torch.arange(len(matrix)).repeat_interleave(active.starts.diff())
    torch.testing.assert_close(active.dot(tokens, rows).reshape(-1),
                               (tokens @ rows.t())[owner, active.indices.reshape(-1).long()])


def test_a_tie_keeps_exactly_k():
    x, W_enc = torch.ones(3, 2), torch.ones(8, 2)
    values, indices = kernels.select(x, W_enc, torch.zeros(8), 5)
    assert values.shape == (3, 5) and all(len(set(row.tolist())) == 5 for row in indices)


def test_a_selected_latent_that_is_not_positive_is_zero_and_learns_nothing():
    sae = make(4, 6, 6)
    with torch.no_grad():
        sae.b_enc.fill_(-100.0)
    out = sae.run(torch.randn(5, 4))
    assert not out.latents.any()
    out.x_hat.sum().backward()
    assert not sae.W_enc.grad.any() and not sae.b_enc.grad.any()


def test_bf16_selection_returns_exact_values_of_nearly_the_right_latents():
    generator = torch.Generator().manual_seed(0)
    x, W_enc = torch.randn(200, 64, generator=generator), torch.randn(512, 64, generator=generator)
    values, indices = kernels.select(x, W_enc, torch.zeros(512), 32, "bf16")
    pre_acts = x @ W_enc.t()
    torch.testing.assert_close(values, pre_acts.gather(1, indices.long()), rtol=1e-4, atol=1e-4)
    chosen = torch.zeros_like(pre_acts, dtype=torch.bool).scatter_(1, indices.long(), True)
    exact = torch.zeros_like(chosen).scatter_(1, pre_acts.topk(32, dim=1).indices, True)
    assert (chosen & exact).sum() / exact.sum() > 0.999


def test_bf16_selection_counts_the_bias_in_what_it_chooses_and_returns():
    generator = torch.Generator().manual_seed(0)
    x, W_enc, b_enc = (torch.randn(*size, generator=generator) for size in ((50, 16), (256, 16), (256,)))
    values, _ = kernels.select(x, W_enc, 20 * b_enc, 8, "bf16")
    torch.testing.assert_close(values.sort(1).values, (x @ W_enc.t() + 20 * b_enc).topk(8, dim=1).values.flip(1),
                               rtol=1e-4, atol=1e-4)


def test_only_latents_with_a_positive_value_have_fired():
    sae, x = make(4, 6, 6), torch.randn(5, 4)
    with torch.no_grad():
        sae.b_enc[:3] = -100.0
    out = sae.run(x)
    assert out.active.indices.unique().numel() == 6
    assert torch.equal(out.fired(), (sae.encode(x) > 0).any(0))
    assert not out.fired()[:3].any()


def test_gradients_agree_with_finite_differences():
    sae = make(3, 6, 2).double()
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    inputs = [x, sae.b_pre, sae.W_enc, sae.b_enc, sae.W_dec, torch.randn(3, dtype=torch.float64, requires_grad=True)]

    def both(*tensors):
        return kernels.autoencode(*tensors[:5], 2, b_out=tensors[5])[:2]

    for wanted in (both, lambda *tensors: both(*tensors)[0], lambda *tensors: both(*tensors)[1]):
        assert torch.autograd.gradcheck(wanted, inputs, eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("method, shift", [("topk", 0.0), ("relu", 0.0), ("relu", -3.0)])
@pytest.mark.parametrize("path", ["sparse", "native"])
def test_a_second_derivative_is_refused_and_not_wrong(method, shift, path):
    if path == "native" and not native.available():
        pytest.skip(f"no compiled parts here: {native.build()}")
    sae = make(32, 160, 3 if method == "topk" else 0.1, method=method)
    sae.b_enc.data += 6 * shift  # few active latents of a ReLU go another way
    x = torch.randn(5, 32, requires_grad=True)
    with pytest.raises(RuntimeError, match="a sparse path, unlike path='dense', has a first derivative only"):
        torch.autograd.grad(sae.run(x, path).x_hat.pow(3).sum(), x, create_graph=True)
    grad, = torch.autograd.grad(sae.run(x, "dense").x_hat.pow(3).sum(), x, create_graph=True)
    assert torch.autograd.grad(grad.square().sum(), sae.W_enc)[0].any()


def test_float32_tells_latents_apart_that_bfloat16_does_not():
    W_enc = 1 + 1e-4 * torch.randperm(512, generator=torch.Generator().manual_seed(0)).float()[:, None]
    values, _ = kernels.select(torch.ones(3, 1), W_enc, torch.zeros(512), 8)
    assert torch.equal(values.sort(1).values, W_enc[:, 0].topk(8).values.flip(0).expand(3, 8))
