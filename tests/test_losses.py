import pytest
import torch

from saelib import losses


def test_squared_error_sums_over_dimensions_and_averages_over_tokens():
    x, x_hat = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    assert losses.squared_error(x, x_hat).item() == (4 + 25) / 2


def test_l1_is_the_mean_over_tokens_of_the_sum_of_magnitudes():
    assert losses.l1(torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 0.0]])).item() == 3.0


def test_auxk_is_one_for_the_mean_residual_and_zero_for_the_residual_itself():
    residual = torch.randn(50, 4) + 3
    assert torch.isclose(losses.auxk(residual, residual.mean(0).expand_as(residual)), torch.tensor(1.0))
    assert losses.auxk(residual, residual).item() == 0


def test_auxk_sends_no_gradient_into_the_residual():
    residual = torch.randn(5, 3, requires_grad=True)
    residual_hat = torch.randn(5, 3, requires_grad=True)
    losses.auxk(residual, residual_hat).backward()
    assert residual.grad is None and residual_hat.grad.abs().sum() > 0


@pytest.mark.parametrize("residual", [torch.zeros(4, 3), torch.ones(1, 3), torch.ones(4, 3)])
def test_auxk_is_zero_where_all_tokens_leave_the_same_over(residual):
    residual_hat = torch.full_like(residual, 0.5, requires_grad=True)
    loss = losses.auxk(residual, residual_hat)
    loss.backward()
    assert loss.item() == 0 and not residual_hat.grad.any()


def test_a_second_derivative_of_the_squared_error_is_refused_and_not_wrong():
    weight = torch.ones(3, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="squared_error has a first derivative only"):
        torch.autograd.grad(losses.squared_error(torch.randn(5, 4), torch.ones(5, 3) @ weight), weight,
                            create_graph=True)


def test_the_squared_errors_gradient_is_twice_the_residual_over_the_tokens_and_the_opposite_for_x():
    x, x_hat = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    on_x, on_x_hat = torch.autograd.grad(3 * losses.squared_error(x, x_hat), (x, x_hat))
    torch.testing.assert_close(on_x_hat, 3 * 2 * (x_hat - x).detach() / 5)
    assert torch.equal(on_x, -on_x_hat)


def test_a_reconstruction_of_another_shape_is_named():
    with pytest.raises(ValueError, match=r"x_hat is 'of shape \[4, 3\]': it must be of the shape of x, \[1, 3\]"):
        getattr(losses.squared_error, "__wrapped__", losses.squared_error)(torch.ones(1, 3), torch.ones(4, 3))
