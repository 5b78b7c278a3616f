"""The k largest of a row against `torch.topk`."""
import pytest
import torch

from saelib import selection

SPECIAL = [float("inf"), float("-inf"), 0.0, -0.0, 1e-40, -1e-40, 3.0, -3.0, 3.0156, 65504.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n, k", [(1, 1), (7, 3), (64, 1), (64, 64), (511, 5), (513, 5), (1536, 40), (2048, 700),
                                  (12288, 40)])
@pytest.mark.parametrize("ties", [False, True])
def test_the_largest_are_those_of_topk(dtype, n, k, ties):
    values = torch.randn(50, n, generator=torch.Generator().manual_seed(0)) - 1
    values = (values.round() if ties else values).to(dtype)
    found, places = selection.largest(values, k)
    assert found.dtype == dtype and torch.equal(found.sort(1).values, values.topk(k, dim=1).values.sort(1).values)
    assert torch.equal(values.gather(1, places), found) and all(len(set(row.tolist())) == k for row in places)


def test_bfloat16_keeps_its_order_as_whole_numbers():
    values = torch.tensor(SPECIAL, dtype=torch.bfloat16)
    values = torch.stack([values.roll(i) for i in range(len(values))])
    for k in range(1, len(SPECIAL) + 1):
        assert torch.equal(selection.topk(values, k)[0].sort(1).values, values.topk(k, dim=1).values.sort(1).values)


def test_a_value_that_is_not_a_number_is_among_the_largest():
    values = torch.zeros(3, 600, dtype=torch.bfloat16)
    values[:, 77] = float("nan")
    found, places = selection.largest(values, 2)
    assert not found.isfinite().all(1).any() and (places == 77).any(1).all()


def test_rows_in_parts_of_a_larger_matrix_are_left_as_they_are():
    whole = torch.randn(20, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    before = whole.clone()
    found, places = selection.largest(whole[:, 10:30], 5)
    assert torch.equal(whole, before) and torch.equal(whole[:, 10:30].gather(1, places), found)


def test_rows_longer_than_a_place_has_bits_go_to_torch():
    values = torch.randn(2, 2**16 + 1, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(selection.largest(values, 3)[0].sort(1).values, values.topk(3, dim=1).values.sort(1).values)
