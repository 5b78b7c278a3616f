"""One contract for every method, and what is particular to each."""
import pytest
import torch

import saelib
from saelib import METHODS, SAE, methods

SOME = {"k": 4, "l1_coef": 0.01}


@pytest.fixture(params=list(METHODS))
def method(request):
    return methods.make(request.param, 20, SOME[METHODS[request.param].knob])


def test_it_says_what_figures_and_sweeps_need(method):
    assert METHODS[method.key] is type(method) and method.label and method.knob in SOME
    assert len(set(method.grid)) >= 3 and list(method.grid) == sorted(method.grid)


def test_latents_keep_the_shape_are_not_negative_and_have_exact_zeros(method):
    pre_acts = torch.randn(30, 20)
    latents = method(pre_acts)
    assert latents.shape == pre_acts.shape and (latents >= 0).all() and (latents == 0).any()


def test_a_latent_whose_pre_activation_is_not_positive_is_silent(method):
    assert not method(-torch.rand(30, 20)).any()


def test_no_gradient_reaches_a_silent_latent_but_straight_through(method):
    pre_acts = torch.randn(30, 20, requires_grad=True)
    latents = method(pre_acts)
    latents.sum().backward()
    assert bool(pre_acts.grad[latents == 0].any()) is (method.key == "topk_ste")


def test_its_penalty_is_a_dict_of_finite_scalars(method):
    sae = SAE(5, 20, method.key, method.sparsity)
    x = torch.randn(6, 5)
    assert all(term.dim() == 0 and torch.isfinite(term) for term in sae.method.penalty(sae, x, sae.run(x)).values())


def test_it_refuses_a_sparsity_that_is_not_a_number_in_range(method):
    with pytest.raises(ValueError, match="sparsity is -1"):
        methods.make(method.key, 20, -1)


def test_topk_keeps_the_largest_values_and_not_the_largest_magnitudes():
    latents = methods.make("topk", 4, 2)(torch.tensor([[-9.0, 1.0, 3.0, 2.0]]))
    assert latents.tolist() == [[0, 0, 3, 2]]


def test_topk_never_has_more_than_k_and_fewer_only_when_fewer_are_positive():
    pre_acts = torch.randn(500, 20) - 0.8
    on = (methods.make("topk", 20, 6)(pre_acts) > 0).sum(1)
    assert torch.equal(on, (pre_acts > 0).sum(1).clamp_max(6))


def test_topk_with_k_equal_to_n_is_relu():
    pre_acts = torch.randn(40, 20)
    assert torch.equal(methods.make("topk", 20, 20)(pre_acts), methods.make("relu", 20, 0.0)(pre_acts))


@pytest.mark.parametrize("k", [0, -3, 21, 2.5])
def test_topk_refuses_a_k_outside_one_to_n(k):
    with pytest.raises(ValueError, match=rf"sparsity is {k}.*from 1 to n_latents = 20"):
        methods.make("topk", 20, k)


def test_an_unknown_method_is_named_with_those_there_are():
    with pytest.raises(ValueError, match="method is 'topq'.*relu, topk"):
        methods.make("topq", 20, 4)


def test_the_optimum_of_the_l1_loss_in_one_dimension_is_soft_thresholding_by_half_lambda():
    for x in (-1.0, 0.05, 0.1, 0.4, 2.0):
        z = torch.linspace(0, 3, 300_001)
        best = z[((x - z) ** 2 + 0.2 * z).argmin()]
        assert abs(best - max(0, x - 0.1)) < 1e-4


def test_multi_topk_adds_the_loss_at_4k_and_not_the_loss_of_summed_activations():
    sae, x = SAE(5, 20, "multi_topk", 3), torch.randn(6, 5)
    wide = SAE(5, 20, "topk", 12)  # the same seed, and so the same weights
    expected = (wide(x) - x).pow(2).sum(1).mean() / 8
    torch.testing.assert_close(sae.method.penalty(sae, x, sae.run(x))["multi_topk"], expected)


@pytest.mark.parametrize("path", ["sparse", "dense"])
def test_multi_topk_takes_all_latents_where_4k_would_be_more(path):
    sae, x = SAE(5, 20, "multi_topk", 8), torch.randn(6, 5)
    expected = (sae.decode(torch.relu(sae.pre_acts(x))) - x).pow(2).sum(1).mean() / 8
    torch.testing.assert_close(sae.method.penalty(sae, x, sae.run(x, path))["multi_topk"], expected)


def test_a_method_without_a_k_has_no_sparsity_by_default():
    assert SAE(8, 40).method.k == 32 == saelib.SAE(8, 40, "batchtopk").method.k
    with pytest.raises(ValueError, match="sparsity is None: it must be an L1 coefficient for 'relu'"):
        SAE(8, 40, "relu")
    with pytest.raises(ValueError, match="sparsity is None: it must be an L1 coefficient for 'relu'"):
        saelib.fit(torch.randn(50, 8), "relu", n_latents=40, n_tokens=50, progress=False)


@pytest.mark.parametrize("path", ["sparse", "dense"])
def test_batchtopk_keeps_k_a_token_on_average_and_gives_more_to_tokens_that_need_more(path):
    sae, x = SAE(16, 40, "batchtopk", 3), torch.randn(200, 16) * torch.linspace(0.1, 3, 200)[:, None]
    l0 = (sae.run(x, path).latents > 0).sum(1)
    assert l0.sum() == 3 * 200 and l0[:50].float().mean() < 1 < 5 < l0[150:].float().mean()


def test_the_threshold_of_batchtopk_is_the_mean_of_the_cuts_and_then_a_running_one():
    method, cuts = methods.BatchTopK(40, 3), [3.0, 1.0, 2.0, -5.0, 4.0, 4.0]
    for n, cut in enumerate(cuts, 1):
        method.remember(torch.tensor(cut))
        if n == 2:
            assert method.threshold.item() == 2
    # ((((2 + 2) / 2 + 0) / 2 + 4) / 2 + 4) / 2: a cut below 0 counts as 0
    assert method.threshold.item() == 3.25


def test_after_a_short_run_batchtopk_still_keeps_about_k_on_held_out_tokens():
    source = saelib.sources.synthetic(20_000, d_model=32, n_features=96, l0=4, seed=1)
    l0 = saelib.fit(source, "batchtopk", 4, n_latents=96, n_tokens=100 * 256, batch_size=256, lr=8e-3,
                    progress=False).metrics["l0"]
    assert 3.7 < l0 < 4.3


@pytest.mark.parametrize("path", ["sparse", "dense"])
def test_batchtopk_is_not_used_before_it_has_learnt_a_threshold(path):
    sae = SAE(16, 40, "batchtopk", 3).eval()
    with pytest.raises(ValueError, match="method is 'batchtopk': it must be trained before it is used"):
        sae.run(torch.randn(20, 16), path)


def test_batchtopk_in_use_does_not_look_at_the_other_tokens_of_a_batch():
    sae, x = SAE(16, 40, "batchtopk", 3), torch.randn(200, 16)
    for _ in range(5):
        sae(x)
    in_training = sae(x)[:7]
    sae.eval()
    torch.testing.assert_close(sae(x)[:7], sae(x[:7]))
    torch.testing.assert_close(sae(x)[:7], in_training)  # the same batch again and again: its threshold is the mean
    torch.testing.assert_close(sae.encode(x) @ sae.W_dec + sae.b_pre, sae(x))


def test_a_method_is_found_under_its_own_key_alone(monkeypatch):
    monkeypatch.setitem(methods.METHODS, "other", methods.TopK)
    with pytest.raises(ValueError, match="method is 'other': it must be found under its own key, 'topk'"):
        methods.make("other", 8, 2)
