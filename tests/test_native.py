"""The compiled parts against the stock ones and the dense twin. They are skipped, with the reason, where they can't be
compiled."""
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils import cpp_extension

from saelib import auxk, contestants, losses, native, pairs, relu_path
from saelib.sae import PAIRS
from tests.test_kernels import make, through

if not native.available():
    pytest.skip(f"native.cpp can't be compiled here: {native.build()}", allow_module_level=True)

TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def without_bf16():
    """The operators as compiled for a CPU that does not multiply in bfloat16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "get_capabilities", lambda: {})
        return native.build.__wrapped__()


@pytest.fixture(params=["this CPU", "no bfloat16"])
def on_both(request, monkeypatch):
    if request.param == "no bfloat16":
        other = request.getfixturevalue("without_bf16")
        assert other is not native.build()
        monkeypatch.setattr(native, "build", lambda: other)


def check_largest(values, k):
    found, places = native.largest(values, k)
    assert found.dtype == values.dtype
    assert torch.equal(found.sort(1).values, values.topk(k, dim=1).values.sort(1).values)
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
@pytest.mark.parametrize("sign", [0, -1])
def test_what_is_not_a_number_is_above_all(dtype, sign):
    values = random(3, 600).to(dtype)
    bits = values.view(torch.int32 if dtype == torch.float32 else torch.int16)
    bits[:, 77] = torch.tensor(float("nan"), dtype=dtype).view(bits.dtype) | (sign * 2 ** (8 * bits.itemsize - 1))
    values[:, 5] = torch.inf
    found, places = native.largest(values, 2)
    assert torch.equal(places.sort(1).values, torch.tensor([[5, 77]] * 3, dtype=torch.int32))
    assert found.isnan().any(1).all()


@TYPES
def test_the_choice_does_not_depend_on_the_rows_before(dtype):
    values = random(300, 200).to(dtype)
    assert torch.equal(native.largest(values, 9)[1], torch.cat([native.largest(row[None], 9)[1] for row in values]))


def test_rows_in_parts_of_a_larger_matrix_are_read_where_they_are():
    check_largest(random(20, 40)[:, 10:30], 5)


@TYPES
@pytest.mark.parametrize("batch, n, d", [(1, 32, 32), (33, 96, 96), (70, 160, 384), (301, 64, 800)])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.03, 0.0])
def test_the_products_are_those_of_the_dense_matrix(on_both, dtype, batch, n, d, share):
    latents = torch.where(torch.rand(batch, n, generator=torch.Generator().manual_seed(1)) < share,
                          random(batch, n).abs() + 0.1, 0).to(dtype)
    tokens, rows, exact = random(batch, d, seed=2), random(n, d, seed=3), latents.float()
    cast_tokens, cast_rows = tokens.to(dtype), rows.to(dtype)
    torch.testing.assert_close(native.decode(latents, rows), exact @ cast_rows.float(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(native.sum_tokens(latents, tokens), exact.t() @ cast_tokens.float(), rtol=1e-4,
                               atol=1e-3)
    for start in (random(batch, n, seed=4).to(dtype), torch.full((1, 1), 0.5, dtype=dtype).expand(batch, n)):
        product = native.masked_product(latents, cast_tokens, cast_rows, start, relu_path.Scratch())
        expected = torch.where(latents > 0, cast_tokens.float() @ cast_rows.float().t() + start.float(), 0)
        torch.testing.assert_close(product.float(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-3)
        torch.testing.assert_close(relu_path.masked_product(latents, cast_tokens, cast_rows, start,
                                                        relu_path.Scratch()).float(), product.float(), rtol=2e-2,
                                   atol=0.2 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("batch, d, n", [(1, 1, 1), (7, 16, 3), (40, 33, 90), (300, 100, 20)])
@pytest.mark.parametrize("most", [1, 6, 0])
@pytest.mark.parametrize("extra", [torch.float32, torch.bfloat16, None])
def test_the_products_over_pairs_are_the_stock_ones(on_both, batch, d, n, most, extra):
    lengths = torch.full((batch,), most)
    if most > 1:
        lengths = torch.randint(min(most, n) + 1, (batch,), generator=torch.Generator().manual_seed(1))
    starts = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    chosen = [torch.randperm(n, generator=torch.Generator().manual_seed(b))[:length]
              for b, length in enumerate(lengths)]
    ours, stock = (kind(torch.cat(chosen).int(), n, starts) for kind in (native.Active, pairs.Active))
    for own, other in zip(ours.by_latent, stock.by_latent):
        assert torch.equal(own.long(), other.long())
    tokens, rows, grad_out = random(batch, d), random(n, d, seed=1), random(batch, d, seed=2)
    values = random(len(ours.indices), seed=3).relu()
    torch.testing.assert_close(ours.dot(tokens, rows), stock.dot(tokens, rows), rtol=1e-5, atol=1e-5)
    grad_values = None if extra is None else random(len(values), seed=4).to(extra)
    for own, other in zip(ours.backward(grad_out, rows, grad_values, tokens, values),
                          stock.backward(grad_out, rows, grad_values, tokens, values)):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)


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
    penalties = [sum(sae.method.penalty(sae, x, sae.run(x, path, precision)).values(), torch.zeros(()))
                 for path in ("native", "sparse")]
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


def test_threads_share_the_work_and_change_no_bit():
    latents, rows, tokens = torch.relu(random(500, 96)), random(96, 64, seed=1), random(500, 64, seed=2)
    active = native.Active(native.largest(latents, 9)[1], 96)
    works = [lambda: native.decode(latents, rows), lambda: native.sum_tokens(latents, tokens),
             lambda: native.largest(latents, 9)[1],
             lambda: torch.cat(active.backward(tokens, rows, None, tokens,
                                               latents.gather(1, active.indices.long()))[1::2])]
    before, alone = torch.get_num_threads(), [work() for work in works]
    try:
        torch.set_num_threads(3)
        assert all(torch.equal(work(), one) for work, one in zip(works, alone))
    finally:
        torch.set_num_threads(before)
    with ThreadPoolExecutor(4) as pool:
        together = pool.map(lambda i: works[i % 4](), range(24))
        assert all(torch.equal(found, alone[i % 4]) for i, found in enumerate(together))


@pytest.mark.parametrize("method, share, used", [
    ("topk", None, {"largest", "backward"}), ("multi_topk", None, {"largest", "backward"}),
    ("relu", 0.5, {"decode", "sum_tokens"}),
    ("relu", 0.1, {"decode", "sum_tokens", "masked_product"}), ("relu", 0.005, {"backward"})])
def test_the_path_takes_the_compiled_code_where_it_says_so(monkeypatch, method, share, used):
    sae, x, calls = make(64, 512, 8 if method != "relu" else 0.1, method=method), random(100, 64, seed=1), []
    if share:
        with torch.no_grad():
            sae.b_enc -= sae.pre_acts(x).flatten().quantile(1 - share)
    monkeypatch.setattr(relu_path, "cpu_has", lambda feature: False)
    real = native.Active.backward
    monkeypatch.setattr(native.Active, "backward", lambda *args: (calls.append("backward"), real(*args))[1])
    for name in ("largest", "decode", "sum_tokens", "masked_product"):
        monkeypatch.setattr(native, name, lambda *args, name=name, real=getattr(native, name):
                            (calls.append(name), real(*args))[1])
    out = sae.run(x, "native")
    sum(sae.method.penalty(sae, x, out).values(), out.x_hat.square().sum()).backward()
    assert set(calls) == used and calls.count("largest") == {"topk": 1, "multi_topk": 2, "relu": 0}[method]


def test_auxk_takes_it_too_where_few_of_many_dead_latents_are_active(monkeypatch):
    sae, x, dead, calls, found = make(32, 96, 4), random(50, 32, seed=1), torch.arange(90), [], []
    real = native.Active.backward
    monkeypatch.setattr(native.Active, "backward", lambda *args: (calls.append("backward"), real(*args))[1])
    for kind in PAIRS["native"], PAIRS["sparse"]:
        term = auxk.auxk_term(sae, x, sae(x), dead, 5, kind=kind)
        found.append([term.detach(), *(g.to_dense() for g in torch.autograd.grad(term, list(sae.parameters())))])
        assert calls == ["backward"]
    for ours, stock in zip(*found):
        torch.testing.assert_close(ours, stock)


def test_tensors_that_lie_otherwise_in_memory_give_the_same():
    sae, x = make(32, 64, 0.1, method="relu"), random(32, 70, seed=1).t().requires_grad_()
    for ours, twin in zip(through(sae, x, "native"), through(sae, x, "dense")):
        torch.testing.assert_close(ours, twin, rtol=1e-4, atol=2e-4)


def test_the_operators_refuse_what_they_would_misread():
    latents, rows = torch.relu(random(10, 64)), random(64, 32)
    raw = native.compiled()

    def whole(*numbers):
        return torch.tensor(numbers, dtype=torch.int32)

    for call in (lambda: raw.decode(latents, rows.double()), lambda: raw.decode(latents, rows[:32]),
                 lambda: raw.decode(latents, rows.t()),
                 lambda: raw.sum_tokens(latents, random(9, 32)), lambda: raw.decode(random(10, 40), random(40, 32)),
                 lambda: raw.largest(latents.half(), 3), lambda: raw.largest(latents, 65),
                 lambda: raw.largest(latents.t(), 3),
                 lambda: raw.group(whole(0, 9), whole(0, 2), 9), lambda: raw.group(whole(0, -1), whole(0, 2), 9),
                 lambda: raw.group(whole(0, 1), whole(0, 3), 9),
                 lambda: raw.group(whole(0, 1), whole(0, 2, 1, 2), 9),
                 lambda: raw.dot(rows, rows, whole(64), whole(*[0] * 64, 1)),
                 lambda: raw.gradients(*raw.group(whole(1), whole(0, 1), 64), random(2), None, random(1, 32),
                                       random(1, 32), rows)):
        with pytest.raises(RuntimeError, match="must be"):
            call()
    for k in (0, 65):
        with pytest.raises(ValueError, match=f"k is {k}: it must be from 1 to 64"):
            native.largest(latents, k)


def test_a_penalty_whose_gradient_is_one_number_reaches_the_compiled_gradients():
    found = []
    for path in ("native", "sparse"):
        sae = make(32, 96, 4)
        out = sae.run(random(50, 32, seed=1), path)
        (out.x_hat.square().sum() + losses.l1(out.latents)).backward()
        found.append([p.grad for p in sae.parameters()])
    for ours, stock in zip(*found):
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)


def test_a_method_without_a_kernel_is_refused():
    with pytest.raises(ValueError, match="path is 'native': it must be 'sparse' or 'dense' for an activation function "
                       "that has no kernel"):
        make(32, 96, 4, method="topk_ste").run(random(5, 32), "native")


def test_a_compiler_that_fails_leaves_the_stock_path_and_says_why(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("SAELIB_CACHE", str(tmp_path))

    def load(*args, **options):
        raise RuntimeError("Error building extension\nnative.cpp:1: fatal error: Python.h: No such file or directory")

    monkeypatch.setattr(cpp_extension, "load", load)
    why = "native.cpp:1: fatal error: Python.h: No such file or directory"
    assert native.build.__wrapped__() == why and f"saelib goes on without them: {why}" in capsys.readouterr().err


def test_what_was_compiled_is_loaded_without_a_compiler(monkeypatch):
    native.compiled()
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(cpp_extension, "load", None)
    assert native.build.__wrapped__().largest


def test_what_a_power_cut_left_of_a_compiled_file_is_compiled_anew(monkeypatch, tmp_path):
    monkeypatch.setenv("SAELIB_CACHE", str(tmp_path))
    (tmp_path / f"{native.build().__name__}.so").write_bytes(b"\x7fELF")
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    assert "there is no C++ compiler" in native.build.__wrapped__()
