import copy
import math
from contextlib import nullcontext

import pytest
import torch

import saelib
from saelib import definitions
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


def test_the_mean_that_is_given_is_the_trivial_predictor():
    x, mean = torch.randn(100, 5) + 3, torch.linspace(-1, 1, 5)
    assert saelib.evaluate(Fixed(5, lambda b: mean.expand_as(b)), x,
                           mean)["normalized_mse"] == pytest.approx(1, abs=1e-5)


def test_half_the_centred_activation_has_normalized_mse_a_quarter():
    x = torch.randn(1000, 5)
    x -= x.mean(0)
    assert abs(saelib.evaluate(Fixed(5, lambda b: b / 2), x)["normalized_mse"] - 0.25) < 1e-5


def test_a_constant_bias_counts_in_normalized_mse_and_hides_from_explained_variance():
    x = torch.randn(1000, 5)
    measured = saelib.evaluate(Fixed(5, lambda b: b + 1), x)
    assert measured["normalized_mse"] > 0.9 and abs(measured["explained_variance"] - 1) < 1e-5


def test_explained_variance_is_about_the_mean_of_what_is_measured_whatever_mean_is_given():
    x = torch.randn(50, 4) + 3
    sae = Fixed(4, lambda b: b / 2)
    assert (saelib.evaluate(sae, x, torch.zeros(4))["explained_variance"]
            == pytest.approx(saelib.evaluate(sae, x)["explained_variance"]))


def test_the_split_into_batches_changes_nothing():
    sae, x = SAE(6, 20, "topk", 3), torch.randn(777, 6)
    whole, cut = saelib.evaluate(sae, x), saelib.evaluate(sae, iter(x.split(50)))
    assert whole == pytest.approx(cut, rel=1e-5)


def test_l0_and_dead_latents_are_counted_by_hand():
    sae = SAE(2, 3, "relu", 0.0)
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]))
    measured = saelib.evaluate(sae, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    assert measured["l0"] == 1.5 and measured["l0_most"] == 2 and measured["dead_fraction"] == pytest.approx(1 / 3)


def test_l1_is_a_tokens_sum_and_only_fewer_than_k_active_latents_are_short():
    sae = SAE(2, 3, "topk", 2)
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]))
    # latents (1, 1, 0), (2, 1, 0), (1, 0, 1), (3, 1, 0)
    measured = saelib.evaluate(sae, torch.tensor([[1.0, 1.0], [2.0, 1.0], [1.0, -2.0], [3.0, 1.0]]))
    assert measured["l1"] == 11 / 4 and measured["short_fraction"] == 0
    # the third is (1, 0, 0)
    measured = saelib.evaluate(sae, torch.tensor([[1.0, 1.0], [2.0, 1.0], [1.0, -0.5], [3.0, 1.0]]))
    assert measured["l1"] == 10 / 4 and measured["short_fraction"] == 0.25


@pytest.mark.parametrize("training", [True, False])
def test_a_method_is_judged_as_after_training_and_keeps_its_mode(training):
    sae, x = SAE(6, 20, "batchtopk", 3), torch.randn(50, 6)
    sae.run(x)
    sae.train(training)
    before = copy.deepcopy(sae.state_dict())
    saelib.evaluate(sae, 2 * x)
    assert sae.training == sae.method.training == training and sae.method.n_cuts == 1
    assert torch.equal(sae.method.threshold, before["method.threshold"])


def test_recovery_counts_pairs_over_rows_and_over_features_and_an_opposite_row_is_no_match():
    rows = torch.tensor([[1.0, 0.0, 0.0], [0.28, 0.96, 0.0], [0.0, 0.0, -1.0], [-1.0, 0.0, 0.0], [0.6, 0.0, 0.8]])
    found = saelib.metrics.recovery(rows, torch.eye(3))  # cosines of the matched pairs: 1, 0.96 and 0.8
    assert found == {"mean_max_cosine": pytest.approx(2.76 / 3), "precision": 2 / 5, "recall": 2 / 3}
    assert saelib.metrics.recovery(rows[2:3], torch.eye(3))["recall"] == 0


def test_evaluating_changes_nothing():
    sae, x = SAE(6, 20, "topk", 3), torch.randn(50, 6)
    before, x_before = copy.deepcopy(sae.state_dict()), x.clone()
    saelib.evaluate(sae, x)
    assert all(torch.equal(before[name], tensor) for name, tensor in sae.state_dict().items())
    assert torch.equal(x, x_before) and all(p.grad is None for p in sae.parameters())


def test_where_nothing_differs_there_is_nothing_to_explain():
    sae, x = SAE(6, 20, "topk", 3), torch.full((5, 6), 0.3)
    measured = saelib.evaluate(sae, x)
    assert math.isnan(measured["normalized_mse"])
    assert math.isnan(measured["explained_variance"])
    assert measured["n_tokens"] == 5
    about_zero = saelib.evaluate(sae, x, mean=torch.zeros(6))
    assert about_zero["normalized_mse"] > 0 and math.isnan(about_zero["explained_variance"])


def test_nothing_to_evaluate_and_activations_that_are_not_finite_are_refused():
    sae = SAE(6, 20, "topk", 3)
    with pytest.raises(ValueError, match="x is empty"):
        saelib.evaluate(sae, torch.empty(0, 6))
    with pytest.raises(ValueError, match="x holds NaN or Inf"):
        saelib.evaluate(sae, torch.full((4, 6), float("nan")))


def test_batches_may_be_arrays_and_what_is_no_batch_is_named():
    sae, x = SAE(6, 20, "topk", 3), torch.randn(30, 6)
    want = saelib.evaluate(sae, x, x.mean(0))
    assert saelib.evaluate(sae, [part.numpy() for part in x.split(10)], x.numpy().mean(0)) == pytest.approx(want)
    with pytest.raises(ValueError, match="x is 'batches of list': it must be batches that are tensors or arrays"):
        saelib.evaluate(sae, [[x]])
    with pytest.raises(ValueError, match=r"mean is .*: it must be None, or finite numbers of shape \[d_model = 6\]"):
        saelib.evaluate(sae, x, torch.zeros(1))


def test_l1_of_a_half_precision_sae_has_room():
    sae, x = SAE(32, 128, "relu", 0.1), 30 * torch.randn(1000, 32)
    want = saelib.evaluate(sae, x)["l1"]
    assert want * 1000 > 65504 and saelib.evaluate(sae.half(), x)["l1"] == pytest.approx(want, rel=0.01)


def test_an_sae_of_normalised_activations_is_judged_on_such():
    sae, raw = SAE(6, 9, "topk", 2, normalisation="unit_norm"), torch.randn(50, 6) * 3
    with pytest.raises(ValueError, match="x is 'with a vector of norm .*': it must be what .SAE.normalised. makes of "
                       "activations"):
        saelib.evaluate(sae, raw)
    # of a constant vector nothing is left
    half = saelib.evaluate(sae, torch.cat([sae.normalised(raw), torch.zeros(1, 6)]).half())
    assert half["n_tokens"] == 51 and saelib.evaluate(SAE(6, 9, "topk", 2), raw)["n_tokens"] == 50


def test_an_sae_of_normalised_activations_encodes_such_and_no_others():
    sae, raw = SAE(6, 9, "topk", 2, normalisation="unit_norm"), torch.randn(2, 25, 6) * 3
    assert sae.encode(sae.normalised(raw)).shape == (2, 25, 9)
    with pytest.raises(ValueError, match="x is 'with a vector of norm .*': it must be what .SAE.normalised. makes of "
                       "activations"):
        sae.encode(raw)


def test_a_constant_vector_has_a_gradient_through_a_spliced_sae():
    sae, raw = SAE(6, 9, "topk", 2, normalisation="unit_norm"), torch.randn(4, 6)
    raw[1], raw[2] = 0, 3
    raw.requires_grad_()
    sae(raw).square().sum().backward()
    assert raw.grad.isfinite().all() and raw.grad[0].any()


def test_what_is_no_sae_or_no_mean_and_weights_that_are_no_numbers_are_refused():
    sae, x = SAE(4, 6, "topk", 2), torch.randn(20, 4)
    for args, rule in (((1, x), "sae is 'int': it must be an SAE"),
                       ((sae, x, torch.full((4,), torch.nan)), "mean is 'of shape .4.': it must be None, or finite")):
        with pytest.raises(ValueError, match=rule):
            saelib.evaluate(*args)
    with torch.no_grad():
        sae.W_dec[0] = torch.nan
    with pytest.raises(ValueError, match="sae is 'one that reconstructs NaN or Inf': it must be of finite weights"):
        saelib.evaluate(sae, x)


@pytest.mark.parametrize("length, taken", [(0.5, False), (0.98, False), (0.995, True), (1.005, True), (1.02, False)])
def test_an_input_counts_as_normalised_within_one_percent_of_norm_1_above_and_below(length, taken):
    sae = SAE(6, 9, "topk", 2, normalisation="unit_norm")
    x = length * sae.normalised(torch.randn(5, 6))
    with nullcontext() if taken else pytest.raises(ValueError, match="x is 'with a vector of norm"):
        sae.encode(x)


def test_half_the_activations_leave_three_quarters_of_the_variance_explained_whatever_their_mean():
    x = torch.randn(1000, 5) + 3
    assert saelib.evaluate(Fixed(5, lambda b: b / 2), x)["explained_variance"] == pytest.approx(0.75, abs=1e-5)


def test_a_single_number_that_is_not_finite_is_enough_to_refuse():
    with pytest.raises(ValueError, match="mean is .*: it must be None, or finite"):
        saelib.evaluate(SAE(4, 6, "topk", 2), torch.randn(20, 4), torch.tensor([0.0, 0.0, 0.0, torch.nan]))
    with pytest.raises(ValueError, match="sae is 'one that reconstructs NaN or Inf'"):
        saelib.evaluate(Fixed(4, lambda b: b * torch.tensor([torch.nan, 1, 1, 1])), torch.randn(20, 4))


def test_the_six_definitions_on_four_tokens_by_hand():
    x = torch.tensor([[0.0, 0.0], [2.0, 4.0], [0.0, 0.0], [4.0, 8.0]])
    e = torch.tensor([[1.0, 0.0], [1.0, 2.0], [0.0, 2.0], [0.0, 4.0]])
    assert definitions.normalized_mses(x, x - e, torch.ones(2), batch_size=2) == pytest.approx({
        "ours": 26 / 72, "energy": 26 / 100, "batch mean": (6 / 10 + 20 / 40) / 2, "residual variance": 9 / 55,
        "mean of ratios": (1 / 2 + 5 / 10 + 4 / 2 + 16 / 58) / 4, "per dimension": (2 / 11 + 24 / 44) / 2})


def test_a_latent_below_zero_is_active_and_adds_to_l1():
    sae = SAE(4, 6, "topk", 2)
    sae.method.forward = lambda pre_acts: -torch.ones_like(pre_acts)
    sae.run = lambda x, **_: SAE.run(sae, x, "dense")
    measured = saelib.evaluate(sae, torch.randn(20, 4))
    assert (measured["l0"], measured["l1"], measured["dead_fraction"]) == (6, 6, 0)
