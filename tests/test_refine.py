"""Refinement against scipy's non-negative least squares, one token at a time, and against theory."""
import numpy as np
import pytest
import torch
from scipy.optimize import nnls

from saelib import SAE, refine


def problem(d_model=24, n_latents=60, method="relu", sparsity=0.0, n_tokens=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sae = SAE(d_model, n_latents, method, sparsity, seed=seed).double()
    with torch.no_grad():
        sae.b_enc -= 0.8
        sae.b_pre.copy_(0.1 * torch.randn(d_model, generator=generator))
        x = torch.randn(n_tokens, d_model, generator=generator).double()
        return x, sae.encode(x), sae.W_dec.detach(), sae.b_pre.detach()


@pytest.fixture(params=[("relu", 0.0), ("topk", 5)], ids=["supports of any size", "supports of size k"])
def given(request):
    return problem(method=request.param[0], sparsity=request.param[1])


def test_it_agrees_with_non_negative_least_squares_on_every_token(given):
    x, latents, W_dec, b_pre = given
    refined = refine.refine(x, latents, W_dec, b_pre, tolerance=1e-10)
    assert (refined == 0).logical_and(latents > 0).any()  # in some of them the constraint matters
    for token, before, after in zip(x, latents, refined):
        support = (before > 0).numpy()
        expected, _ = nnls(W_dec.numpy()[support].T, (token - b_pre).numpy())
        np.testing.assert_allclose(after.numpy()[support], expected, atol=1e-8)


def test_silent_latents_stay_silent_and_none_is_negative(given):
    x, latents, W_dec, b_pre = given
    refined = refine.refine(x, latents, W_dec, b_pre)
    assert (refined >= 0).all() and not refined[latents == 0].any()


def test_the_error_of_no_token_rises(given):
    x, latents, W_dec, b_pre = given
    error = lambda z: (x - b_pre - z @ W_dec).pow(2).sum(1)
    assert (error(refine.refine(x, latents, W_dec, b_pre)) <= error(latents) + 1e-12).all()


def test_the_residual_is_orthogonal_to_used_rows_and_points_away_from_clipped_ones(given):
    x, latents, W_dec, b_pre = given
    refined = refine.refine(x, latents, W_dec, b_pre, tolerance=1e-10)
    pull = (x - b_pre - refined @ W_dec) @ W_dec.t()
    assert pull[refined > 0].abs().max() < 1e-8 and pull[(refined == 0) & (latents > 0)].max() < 1e-8


def test_what_is_already_the_best_is_left_alone(given):
    x, latents, W_dec, b_pre = given
    best = refine.refine(x, latents, W_dec, b_pre, tolerance=1e-10)
    torch.testing.assert_close(refine.refine(x, best, W_dec, b_pre), best)
    exact = latents @ W_dec + b_pre  # made from these latents, so that no others are better
    torch.testing.assert_close(refine.refine(exact, latents, W_dec, b_pre), latents, atol=1e-4, rtol=0)


def test_rows_of_any_norm_give_the_same_reconstruction():
    x, latents, W_dec, b_pre = problem(method="topk", sparsity=5)
    scale = torch.rand(len(W_dec), 1).double() + 0.5
    once, scaled = (refine.refine(x, latents, W, b_pre, tolerance=1e-10) @ W for W in (W_dec, W_dec * scale))
    torch.testing.assert_close(once, scaled, atol=1e-6, rtol=0)


def test_an_orthonormal_dictionary_gives_the_projections():
    x, latents, _, b_pre = problem(d_model=24, n_latents=24)
    W_dec = torch.linalg.qr(torch.randn(24, 24).double()).Q
    expected = torch.relu((x - b_pre) @ W_dec.t()) * (latents > 0)
    torch.testing.assert_close(refine.refine(x, latents, W_dec, b_pre), expected)


def test_a_token_without_active_latents_and_an_odd_number_of_tokens_are_fine():
    x, latents, W_dec, b_pre = problem(n_tokens=refine.ROWS + 1)
    latents[3] = 0
    assert not refine.refine(x, latents, W_dec, b_pre)[3].any()
    assert not refine.refine(x, torch.zeros_like(latents), W_dec, b_pre).any()


def test_what_still_moves_after_the_last_sweep_is_solved_exactly():
    x, latents, W_dec, b_pre = problem()
    expected = refine.refine(x, latents, W_dec, b_pre)
    rows = W_dec[None].expand(len(x), -1, -1).double() * (latents > 0)[:, :, None]
    gram = rows @ rows.transpose(1, 2) + torch.diag_embed((latents <= 0).double())
    target = torch.einsum("bmd,bd->bm", rows, (x - b_pre).double())
    found = refine.descend(gram, target, latents.double(), max_sweeps=1)
    torch.testing.assert_close(found, expected.double(), rtol=0, atol=1e-5)


def test_two_rows_that_nearly_coincide_do_not_stop_the_others():
    W_dec = torch.tensor([[1.0, 0.0, 0.0], [0.9999, 0.0141, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    x = torch.tensor([[0.7, 0.005, 0.2], [0.1, -0.3, 0.4]], dtype=torch.float64)
    refined = refine.refine(x, torch.ones(2, 3, dtype=torch.float64), W_dec, torch.zeros(3, dtype=torch.float64))
    for token, found in zip(x, refined):
        wanted = W_dec.numpy().T @ nnls(W_dec.numpy().T, token.numpy())[0]
        torch.testing.assert_close(found @ W_dec, torch.from_numpy(wanted), rtol=0, atol=1e-5)


def test_the_shift_is_the_change_of_the_sum_and_the_change_that_of_each():
    shift, change = refine.moves(torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[2.5, 0.7, 0.0]]))
    assert shift == pytest.approx(0.2 / 3) and change == pytest.approx(0.8 / 3)


def test_moves_by_fifth_are_means_over_the_active_latents_in_order_of_their_size():
    latents = torch.tensor([[0.1, 0.5, 0.0, 0.4], [0.2, 0.3, 0.0, 0.0]])
    refined = torch.tensor([[0.2, 0.5, 0.0, 0.5], [0.2, 0.2, 0.0, 0.0]])
    expected = [(0.1, 0.1), (0.2, 0.0), (0.3, -0.1), (0.4, 0.1), (0.5, 0.0)]
    assert refine.moves_by_fifth(latents, refined) == [pytest.approx(pair, abs=1e-6) for pair in expected]


def test_every_token_is_refined_as_it_is_alone_however_many_there_are(monkeypatch):
    g = torch.Generator().manual_seed(0)
    x, W, b = (torch.randn(*s, generator=g).double() for s in ((11, 6), (9, 6), (6,)))
    latents = torch.relu((x - b) @ W.t())
    alone = torch.cat([refine.refine(x[i:i + 1], latents[i:i + 1], W, b) for i in range(11)])
    monkeypatch.setattr(refine, "ROWS", 5)
    together = refine.refine(x, latents, W, b)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert together[-1].any()
