"""The product with what follows it, against the same in three steps; and which way a ReLU step takes."""
import pytest
import torch

from saelib import products, relu_path, subjects
from saelib.products import linear


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize("rectify", [False, True])
@pytest.mark.parametrize("batch, d, n", [(1, 1, 1), (7, 5, 33), (products.ROWS + 1, 32, 96)])
@pytest.mark.parametrize("fused", [True, False])
def test_the_product_is_the_one_of_three_steps(monkeypatch, dtype, tolerance, rectify, batch, d, n, fused):
    if not fused:
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    x, weight, bias = (tensor.to(dtype) for tensor in (random(batch, d), random(n, d, seed=1), random(n, seed=2)))
    exact = x.double() @ weight.double().t() + bias.double()
    out = torch.full((batch, n), torch.nan, dtype=dtype)
    found = linear(x, weight, bias, out, rectify)
    assert found.data_ptr() == out.data_ptr()
    torch.testing.assert_close(found.double(), exact.relu() if rectify else exact, rtol=2 * tolerance,
                               atol=2 * tolerance)


@pytest.mark.parametrize("dtype, tiles, compiled, one_in, way", [
    (torch.float32, False, False, 20, relu_path.Many), (torch.float32, False, False, 30, relu_path.Few),
    (torch.float32, False, True, 30, relu_path.Compiled),
    (torch.float32, False, True, 100, relu_path.FewCompiled), (torch.float32, True, True, 30, relu_path.Compiled),
    (torch.bfloat16, False, True, 30, relu_path.Compiled),
    (torch.bfloat16, True, True, 30, relu_path.Many), (torch.bfloat16, True, False, 30, relu_path.Many),
    (torch.bfloat16, True, True, 70, relu_path.FewCompiled)])
def test_the_way_of_a_relu_step_follows_from_the_share_and_the_cpu(monkeypatch, dtype, tiles, compiled, one_in, way):
    monkeypatch.setattr(relu_path, "cpu_has", lambda feature: tiles)
    latents = torch.zeros(64, one_in, dtype=dtype)
    latents[:, 0] = 1
    assert relu_path.way(latents, compiled) is way


def test_a_cpu_that_onednn_would_emulate_bfloat16_on_multiplies_in_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    # what it says of every CPU with AVX-512
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    for features, dtype in ((set(), torch.float32), ({"avx512_bf16"}, torch.bfloat16), ({"amx_bf16"}, torch.bfloat16)):
        monkeypatch.setattr(products, "cpu_has", features.__contains__)
        assert subjects.fast_dtype("cpu") == dtype


def test_a_torch_without_onednn_multiplies_in_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: pytest.fail("there is no such operator"))
    assert subjects.fast_dtype("cpu") == torch.float32
    assert linear(torch.ones(1, 2).bfloat16(), torch.ones(3, 2).bfloat16(), torch.zeros(3).bfloat16(),
                  torch.empty(1, 3).bfloat16()).eq(2).all()


def test_a_fused_product_takes_memory_that_is_given_out_again(monkeypatch):
    sizes = []

    def noted(x, weight, *rest):
        sizes.append(len(x) * len(weight))
        return torch.nn.functional.linear(x, weight, rest[0])

    monkeypatch.setattr(products, "multiplies_bf16", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", noted)
    for batch, n in ((1100, 8), (40, 2**19), (2, 2**24)):
        out = torch.empty(batch, n, dtype=torch.bfloat16)
        linear(torch.ones(batch, 1).bfloat16(), torch.ones(n, 1).bfloat16(), torch.zeros(n).bfloat16(), out)
        assert out.eq(1).all()
    assert len(sizes) == 3 + 3 + 2 and max(sizes[:6]) <= products.AT_ONCE


def test_a_cpu_with_avx2_alone_multiplies_in_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(products, "cpu_has", lambda feature: False)
    assert subjects.fast_dtype("cpu") == torch.float32
