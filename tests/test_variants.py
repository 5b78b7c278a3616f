"""The variants do the one thing that each is made for."""
from types import SimpleNamespace

import pytest
import torch

from saelib import METHODS, SAE, methods, variants
from saelib.train import train

PRE_ACTS = torch.tensor([[-1.0, 0.0, 1e-3, 0.2, 2.0]])
SMOOTH = ["relu_smooth", "relu_smoother", "relu_smoothest"]


def pull(method, act=torch.relu):
    """The derivative of a penalty of weight 1 with respect to latents and pre-activations."""
    pre_acts = PRE_ACTS.clone().requires_grad_()
    latents = act(pre_acts)
    (term,) = method.penalty(None, None, SimpleNamespace(latents=latents)).values()
    return [grad[0] for grad in torch.autograd.grad(term, (latents, pre_acts))]


def test_l2_pulls_in_proportion_to_the_latent_and_l1_alike_on_all():
    assert torch.allclose(pull(METHODS["relu_l2"](5, 1.0))[1], 2 * torch.relu(PRE_ACTS[0]))
    assert torch.equal(pull(METHODS["relu"](5, 1.0))[1], (PRE_ACTS[0] > 0).float())


@pytest.mark.parametrize("key", SMOOTH)
def test_smooth_l1_is_ridge_near_zero_and_l1_far_from_it(key):
    method = METHODS[key](5, 1.0)
    felt = pull(method)[1]
    assert felt[1] == 0 and torch.isclose(felt[2], 1e-3 / torch.tensor(method.eps), rtol=1e-2)
    far = torch.tensor([[1e4]])
    (term,) = method.penalty(None, None, SimpleNamespace(latents=far)).values()
    assert torch.isclose(term, far - method.eps, rtol=1e-6).all()


@pytest.mark.parametrize("choice", [-1.0, 0.0, 0.5, 1.0])
def test_the_chosen_subgradient_is_felt_by_latents_at_zero_and_by_no_pre_activation(choice):
    method = METHODS["relu_subgradient"](5, 1.0)
    method.at_zero = choice
    on_latents, on_pre_acts = pull(method)
    assert on_latents.tolist() == [choice, choice, 1, 1, 1] and on_pre_acts.tolist() == [0, 0, 1, 1, 1]
    assert pull(method, lambda p: p.clamp(min=0))[1].tolist() == [0, choice, 1, 1, 1]


def test_the_chosen_subgradient_has_the_value_of_l1():
    latents = SimpleNamespace(latents=torch.relu(torch.randn(8, 5, generator=torch.Generator().manual_seed(0))))
    ours, plain = (METHODS[key](5, 0.3).penalty(None, None, latents)["l1"] for key in ("relu_subgradient", "relu"))
    assert torch.isclose(ours, plain)


@pytest.mark.parametrize("act, same", [(torch.relu, True), (lambda p: p, False)])
def test_training_with_another_choice_ends_at_the_same_bits_behind_a_relu_only(act, same):
    x = torch.randn(320, 6, generator=torch.Generator().manual_seed(1))

    def trained(choice):
        sae = SAE(6, 12, "relu_subgradient", 0.1)
        sae.method.at_zero, sae.method.forward, sae.W_enc.data[:4] = choice, act, 0
        train(sae, lambda step: x.split(32)[step:], 10, lr=1e-2)
        return torch.cat([p.detach().flatten() for p in sae.parameters()]).view(torch.int32)

    assert torch.equal(trained(-1.0), trained(1.0)) is same


def test_straight_through_gives_every_latent_the_gradient_and_topk_the_selected_ones():
    for key, wanted in (("topk_ste", [1, 1, 1, 1, 1]), ("topk", [0, 0, 0, 1, 1])):
        pre_acts = PRE_ACTS.clone().requires_grad_()
        latents = methods.make(key, 5, 2)(pre_acts)
        latents.sum().backward()
        assert torch.allclose(latents, torch.tensor([[0, 0, 0, 0.2, 2.0]])) and pre_acts.grad[0].tolist() == wanted


def test_shorter_rows_are_the_same_directions_at_the_length_that_torch_gives_a_linear_layer():
    short, unit = SAE(64, 4000, "relu_short", 0.1), SAE(64, 4000, "relu", 0.1)
    norms = short.W_enc.detach().norm(dim=1)
    assert torch.equal(short.W_dec, unit.W_dec) and torch.allclose(short.W_enc, norms[:, None] * unit.W_enc, atol=1e-6)
    assert torch.allclose(norms, torch.nn.Linear(64, 4000).weight.detach().norm(dim=1).mean(), rtol=1e-2)


def test_every_variant_can_be_made_by_its_key():
    own = [v for v in vars(variants).values() if isinstance(v, type) and v.__module__ == variants.__name__]
    assert all(METHODS[v.key] is v for v in own)


@pytest.mark.parametrize("key", ["relu_l2", "relu_smooth", "relu_subgradient"])
def test_a_penalty_is_a_mean_over_tokens(key):
    z = torch.rand(6, 5)
    once, twice = (sum(METHODS[key](5, 1.0).penalty(None, None, SimpleNamespace(latents=latents)).values())
                   for latents in (z, torch.cat([z, z])))
    torch.testing.assert_close(once, twice)
