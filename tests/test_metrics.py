import copy

import pytest
import torch

import saelib
from saelib.sae import SAE, Output


class Fixed(SAE):
    """An SAE whose reconstruction we choose."""

    def __init__(self, d_model, reconstruct):
        super().__init__(d_model, 3, "relu", 0.0)
        self.reconstruct = reconstruct

    def run(self, x, *args, **kwargs):
        return Output(self.reconstruct(x), torch.zeros(len(x), 3), None)


def test_predicting_the_mean_has_normalized_mse_one_whatever_the_shift_scale_and_split():
    x = torch.randn(1000, 5)
    for scale, shift, pieces in ((1, 0, 1000), (3, 7, 64), (0.1, -2, 1)):
        moved = x * scale + shift
        measured = saelib.evaluate(Fixed(5, lambda b: moved.mean(0).expand_as(b)), iter(moved.split(pieces)))
        assert abs(measured["normalized_mse"] - 1) < 1e-4


def test_half_the_centred_activation_has_normalized_mse_a_quarter():
    x = torch.randn(1000, 5)
    x -= x.mean(0)
    assert abs(saelib.evaluate(Fixed(5, lambda b: b / 2), x)["normalized_mse"] - 0.25) < 1e-5


def test_a_constant_bias_counts_in_normalized_mse_and_hides_from_explained_variance():
    x = torch.randn(1000, 5)
    measured = saelib.evaluate(Fixed(5, lambda b: b + 1), x)
    assert measured["normalized_mse"] > 0.9 and abs(measured["explained_variance"] - 1) < 1e-5


def test_the_split_into_batches_changes_nothing():
    sae, x = SAE(6, 20, "topk", 3), torch.randn(777, 6)
    whole, cut = saelib.evaluate(sae, x), saelib.evaluate(sae, iter(x.split(50)))
    assert whole == pytest.approx(cut, rel=1e-5)


def test_l0_and_dead_latents_are_counted_by_hand():
    sae = SAE(2, 3, "relu", 0.0)
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]))
    measured = saelib.evaluate(sae, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    assert measured["l0"] == 1.5 and measured["dead_fraction"] == pytest.approx(1 / 3)


def test_evaluating_changes_nothing():
    sae, x = SAE(6, 20, "topk", 3), torch.randn(50, 6)
    before, x_before = copy.deepcopy(sae.state_dict()), x.clone()
    saelib.evaluate(sae, x)
    assert all(torch.equal(before[name], tensor) for name, tensor in sae.state_dict().items())
    assert torch.equal(x, x_before) and all(p.grad is None for p in sae.parameters())


def test_nothing_to_evaluate_and_activations_that_are_not_finite_are_refused():
    sae = SAE(6, 20, "topk", 3)
    with pytest.raises(ValueError, match="x is empty"):
        saelib.evaluate(sae, torch.empty(0, 6))
    with pytest.raises(ValueError, match="x holds NaN or Inf"):
        saelib.evaluate(sae, torch.full((4, 6), float("nan")))
