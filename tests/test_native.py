"""The compiled parts against the stock ones and the dense twin. They are skipped, with the reason, where they can't be compiled."""
import pytest
import torch

from saelib import contestants, dense, native
from tests.test_kernels import make, through

try:
    native.compiled()
except ValueError as error:
    pytest.skip(str(error), allow_module_level=True)

TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check_largest(values, k):
    found, places = native.largest(values, k)
    assert found.dtype == values.dtype and torch.equal(found.sort(1).values, values.topk(k, dim=1).values.sort(1).values)
    assert torch.equal(values.gather(1, places.long()), found) and all(len(set(row.tolist())) == k for row in places)


@TYPES
@pytest.mark.parametrize("n, k", [(1, 1), (7, 3), (64, 1), (64, 64), (513, 5), (4096, 40), (12288, 700)])
@pytest.mark.parametrize("ties", [False, True])
def test_the_largest_are_those_of_topk(dtype, n, k, ties):
    values = random(50, n) - 1
    check_largest((values.round() if ties else values).to(dtype), k)


@TYPES
def test_a_row_may_be_nothing_like_the_row_before(dtype):
    scale = torch.logspace(-30, 30, 61)[torch.randperm(61, generator=torch.Generator().manual_seed(0))]
    sign = torch.tensor([1.0, -1.0]).repeat(31)[:61]
    check_largest(((random(61, 200).abs() + 0.5) * (scale * sign)[:, None]).to(dtype), 9)
    rows = random(40, 200)
    rows[::3], rows[1::3] = 0, torch.inf
    check_largest(rows.to(dtype), 9)


@TYPES
@pytest.mark.parametrize("sign", [1, -1])
def test_what_is_not_a_number_is_above_all(dtype, sign):
    values = random(3, 600).to(dtype)
    values[:, 77] = torch.tensor(float("nan")).copysign(torch.tensor(float(sign)))
    values[:, 5] = torch.inf
    found, places = native.largest(values, 2)
    assert torch.equal(places.sort(1).values, torch.tensor([[5, 77]] * 3, dtype=torch.int32)) and found.isnan().any(1).all()


def test_rows_in_parts_of_a_larger_matrix_are_read_where_they_are():
    check_largest(random(20, 40)[:, 10:30], 5)


@TYPES
@pytest.mark.parametrize("batch, n, d", [(1, 32, 32), (33, 96, 96), (70, 160, 384), (301, 64, 800)])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.03, 0.0])
def test_the_products_are_those_of_the_dense_matrix(dtype, batch, n, d, share):
    latents = torch.where(torch.rand(batch, n, generator=torch.Generator().manual_seed(1)) < share, random(batch, n).abs() + 0.1, 0).to(dtype)
    tokens, rows, exact = random(batch, d, seed=2), random(n, d, seed=3), latents.float()
    cast_tokens, cast_rows = tokens.to(dtype), rows.to(dtype)
    torch.testing.assert_close(native.decode(latents, rows), exact @ cast_rows.float(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(native.sum_tokens(latents, tokens), exact.t() @ cast_tokens.float(), rtol=1e-4, atol=1e-3)
    for start in (random(batch, n, seed=4).to(dtype), torch.full((1, 1), 0.5, dtype=dtype).expand(batch, n)):
        product = native.masked_product(latents, cast_tokens, cast_rows, start, dense.Scratch())
        expected = torch.where(latents > 0, cast_tokens.float() @ cast_rows.float().t() + start.float(), 0)
        torch.testing.assert_close(product.float(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-3)
        torch.testing.assert_close(dense.masked_product(latents, cast_tokens, cast_rows, start, dense.Scratch()).float(), product.float(), rtol=2e-2, atol=0.2 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("batch, d, n", [(1, 32, 32), (65, 96, 160), (300, 64, 96)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("share", [0.5, 0.1, 0.0])
def test_relu_agrees_with_its_twin_forward_and_backward(batch, d, n, precision, share):
    sae, x = make(d, n, 0.1, method="relu"), random(batch, d, seed=1).requires_grad_()
    with torch.no_grad():
        sae.b_enc -= sae.pre_acts(x).flatten().quantile(1 - share) + (0 if share else 1)
    if precision == "fp32":
        for ours, twin in zip(through(sae, x, "native"), through(sae, x, "dense")):
            torch.testing.assert_close(ours, twin, rtol=1e-4, atol=2e-4)
    else:  # the stock path rounds alike what decides which latents are active
        for ours, stock in zip(through(sae, x, "native", "bf16"), through(sae, x, "sparse", "bf16")):
            assert (ours - stock).norm() <= 0.01 * stock.norm()


@pytest.mark.parametrize("method", ["topk", "batchtopk", "multi_topk"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_choosing_methods_choose_as_on_the_stock_path(method, precision):
    sae, x = make(64, 512, 8, method=method), random(100, 64, seed=1).requires_grad_()
    for ours, stock in zip(through(sae, x, "native", precision), through(sae, x, "sparse", precision)):
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=2e-4)
    penalties = [sum(sae.method.penalty(sae, x, sae.run(x, path, precision)).values(), torch.zeros(())) for path in ("native", "sparse")]
    torch.testing.assert_close(*penalties)


@pytest.mark.parametrize("case", ["topk", "auxk", "relu"])
def test_training_takes_the_same_steps_as_on_the_stock_path(case):
    setting = contestants.Setting(64, 512, 8, 128)
    both = [contestants.Ours(setting, case, path) for path in ("native", "sparse")]
    for x in setting.batches(3):
        for one in both:
            one.step(x)
    for ours, stock in zip(*(one.sae.parameters() for one in both)):
        torch.testing.assert_close(ours, stock, rtol=1e-3, atol=1e-5)


def test_the_same_step_twice_gives_the_same_bits():
    latents, rows, tokens = torch.relu(random(200, 96)), random(96, 64, seed=1), random(200, 64, seed=2)
    for product in (lambda: native.decode(latents, rows), lambda: native.sum_tokens(latents, tokens)):
        assert torch.equal(product(), product())


@pytest.mark.parametrize("d, n, dtype, rule", [(50, 64, torch.float32, "d_model is 50: it must be a multiple of 32"),
                                               (64, 50, torch.float32, "n_latents is 50: it must be a multiple of 32"),
                                               (64, 64, torch.float64, "path is 'native': it must be 'sparse' for torch.float64 on cpu")])
def test_what_the_compiled_code_does_not_take_is_said(d, n, dtype, rule):
    with pytest.raises(ValueError, match=rule):
        make(d, n, 2).to(dtype).run(torch.zeros(3, d, dtype=dtype), "native")


@pytest.mark.parametrize("cpu, fails, rule", [("AVX2", None, "the CPU lacks AVX-512"), ("AVX512", "Ninja is required", "Ninja is required")])
def test_a_machine_that_can_not_compile_is_told_so_and_nothing_else_is_used(monkeypatch, cpu, fails, rule):
    def load(*args, **kwargs):
        raise RuntimeError(fails)

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: cpu)
    monkeypatch.setattr("torch.utils.cpp_extension.load", load)
    native.compiled.cache_clear()
    try:
        with pytest.raises(ValueError, match=f"path is 'native': it must be 'sparse' where it can't be compiled.*{rule}"):
            make(32, 32, 2).run(torch.zeros(3, 32), "native")
    finally:
        native.compiled.cache_clear()
