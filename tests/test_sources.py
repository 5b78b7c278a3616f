import numpy
import pytest
import torch
from safetensors.torch import save_file

import saelib
from saelib import sources, subjects
from saelib.normalisation import UNIT_NORM, normalise

X = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))


def test_normalising_removes_the_mean_over_dimensions_and_leaves_unit_norm():
    x = sources.normalise(torch.randn(50, 7) * 30 + 5)
    torch.testing.assert_close(x.mean(1), torch.zeros(50), atol=1e-6, rtol=0)
    torch.testing.assert_close(x.norm(dim=1), torch.ones(50))
    assert not sources.normalise(torch.ones(1, 4)).any()


def test_an_epoch_shows_every_token_once_in_an_order_of_its_own():
    source = sources.Source("t", [torch.arange(10.0)[:, None], torch.arange(10.0, 30)[:, None]], torch.zeros(1, 1))
    batches = [b.flatten().tolist() for b in source.batches(10, 6, seed=0)]
    first, second = sum(batches[:3], []), sum(batches[3:], [])
    assert sorted(first) == sorted(second) == list(range(30)) and first != second


def test_each_epoch_of_each_seed_has_an_order_that_no_other_has():
    source = sources.Source("t", [torch.arange(30.0)[:, None]], torch.zeros(1, 1))
    assert len({tuple(epoch.flatten().tolist()) for seed in range(4) for epoch in source.batches(30, 4, seed)}) == 16


def test_a_batch_across_two_epochs_is_full_and_a_run_can_start_anywhere():
    source = sources.Source("t", [torch.arange(7.0)[:, None]], torch.zeros(1, 1))
    batches = list(source.batches(4, 7, seed=3))
    assert all(len(b) == 4 for b in batches)
    assert sorted(torch.cat(batches).flatten().tolist()) == sorted(4 * list(map(float, range(7))))
    assert all(torch.equal(a, b) for a, b in zip(source.batches(4, 7, seed=3, start=2), batches[2:]))


def test_the_mean_is_that_of_the_training_tokens():
    source = sources.Source("t", [torch.zeros(5, 2), torch.ones(5, 2)], torch.full((3, 2), 9.0))
    assert source.mean.tolist() == [0.5, 0.5]


def test_your_own_activations_are_split_at_the_end():
    x = torch.randn(100, 4)
    source = sources.from_tensor(x)
    assert torch.equal(torch.cat([*source.shards, source.held_out]), x) and len(source.held_out) == 10


def test_no_activation_is_both_trained_on_and_held_out(tmp_path):
    x = torch.randn(200, 6)
    numpy.save(tmp_path / "x.npy", x.numpy())
    for source in (sources.synthetic(200), sources.from_tensor(x), sources.from_file(tmp_path / "x.npy", 200)):
        trained, held_out = (set(map(tuple, part.tolist())) for part in (torch.cat(source.shards), source.held_out))
        assert not trained & held_out


@pytest.mark.parametrize("bad, message", [
    (torch.zeros(3), r"source has shape \[3\]: it must be \[n_tokens, d_model\]"),
    (torch.zeros(0, 4), r"source has shape \[0, 4\]: it must hold at least one token"),
    (torch.zeros(1, 4), "at least two tokens"),
    (torch.full((20, 4), 0.1), "source is 'the same vector again and again': it must be activations that differ"),
    (torch.zeros(5, 4, dtype=torch.int64), "source is .a tensor of torch.int64, torch.strided.: it must be a dense one "
     "of torch.float16"),
    (torch.tensor([[1.0], [2.0], [float("nan")]]), "source holds NaN or Inf, first in row 2"),
    (torch.tensor([[1.0], [float("inf")], [1.0]]), "source holds NaN or Inf, first in row 1"),
])
def test_activations_that_cannot_be_used_are_refused_in_one_line(bad, message):
    with pytest.raises(ValueError, match=message) as error:
        saelib.fit(bad, n_latents=8, n_tokens=10, progress=False)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shards, message", [([], "shards is \\[\\]"),
                                             ([torch.ones(3, 4), torch.ones(3, 5)],
                                              "source is 'of widths 5 and 4': it must be of one width")])
def test_shards_that_do_not_fit_together_are_refused(shards, message):
    with pytest.raises(ValueError, match=message):
        sources.Source("t", shards, torch.ones(1, 4))


def test_normalised_activations_keep_the_word_and_halves_do_not_overflow():
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)) * 3000
    x[0] = 0
    for given in (x, x.half()):
        source = sources.from_tensor(given, normalisation="unit_norm")
        assert source.normalisation == "unit_norm" and not source.shards[0][0].any()
        torch.testing.assert_close(source.shards[0], sources.normalise(x)[:36], atol=1e-3, rtol=0)
    stacked = sources.normalise(x.view(4, 10, 6))
    torch.testing.assert_close(stacked.view(40, 6), sources.normalise(x))
    with pytest.raises(ValueError, match="normalisation is 'unit': it must be 'none' or 'unit_norm'"):
        sources.from_tensor(x, normalisation="unit")


def test_a_file_with_two_arrays_is_refused_by_their_names(tmp_path):
    save_file({"resid": torch.randn(9, 4), "attention": torch.randn(9, 4)}, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match="two.safetensors with tensors attention, resid': it must be a file with one "
                       "tensor"):
        saelib.open_source(str(tmp_path / "two.safetensors"), 5)


def test_synthetic_activations_are_made_of_their_dictionary():
    source = sources.synthetic(4000, d_model=32, n_features=64, l0=3, noise=0.0)
    assert source.truth.shape == (64, 32) and source.held_out.shape == (400, 32)
    torch.testing.assert_close(source.truth.norm(dim=1), torch.ones(64))
    norms = source.shards[0].norm(dim=1)
    assert ((norms - 1).abs().lt(1e-5) | norms.lt(1e-6)).all()
    assert torch.linalg.matrix_rank(source.shards[0]) == 31  # the direction of all ones is gone


def test_features_are_as_frequent_and_as_strong_as_the_formula_says():
    source = sources.synthetic(4000, d_model=32, n_features=16, l0=2, exponent=1.0, noise=0.0)
    coefs = torch.linalg.lstsq(source.truth.t(), source.shards[0].t()).solution.t()
    on, weight = coefs > 1e-3, 1 / torch.arange(1, 17)
    torch.testing.assert_close(on.float().mean(0), 2 * weight / weight.sum(), atol=0.03, rtol=0)
    weakest, strongest = coefs.where(on, torch.inf).amin(1), coefs.amax(1)
    assert (weakest / strongest)[on.any(1)].min() == pytest.approx(0.5 / 1.5, abs=0.03)


@pytest.mark.parametrize("noise, rank", [(0.0, 8), (0.01, 31)])
def test_noise_alone_leaves_the_span_of_the_features(noise, rank):
    assert torch.linalg.matrix_rank(sources.synthetic(200, d_model=32, n_features=8, l0=3,
                                                      noise=noise).shards[0]) == rank


@pytest.mark.parametrize("n_batches", [0, 1, 5])
def test_batches_gathered_ahead_are_the_same_in_the_same_order(n_batches):
    x = torch.randn(5, 3, 2)[:n_batches]
    assert [b.tolist() for b in sources.ahead(iter(x), pin=False)] == x.tolist()


def test_an_error_while_gathering_ahead_reaches_who_asks_for_the_batch():
    def broken():
        yield torch.zeros(1)
        raise ValueError("the shard is damaged")

    with pytest.raises(ValueError, match="the shard is damaged"):
        list(sources.ahead(broken(), pin=False))


@pytest.mark.parametrize("suffix", sources.FILE_TYPES)
def test_a_file_of_activations_is_a_subject(tmp_path, suffix):
    x, path = torch.randn(200, 6) * 3, tmp_path / f"acts{suffix}"
    numpy.save(path, x.numpy()) if suffix == ".npy" else save_file({"x": x}, path)
    source = saelib.open_source(str(path), 150)
    torch.testing.assert_close(torch.cat([*source.shards, source.held_out[:0]]), sources.normalise(x)[:150])
    torch.testing.assert_close(source.held_out, sources.normalise(x)[180:])
    assert source.normalisation == "unit_norm"


def test_an_sae_does_not_start_at_the_dictionary_that_it_is_to_find():
    for seed in range(5):
        truth, rows = sources.synthetic(10, seed=seed).truth, saelib.SAE(64, 256, "topk", 8, seed=seed).W_dec
        assert (truth @ rows.t()).abs().max() < 0.7  # of 65,536 pairs of random directions in 64 dimensions


@pytest.mark.parametrize("fraction, message", [(0.0, "held_out_fraction is 0.0"), (1.0, "held_out_fraction is 1.0")])
def test_something_is_held_out_and_something_trained_on(fraction, message):
    with pytest.raises(ValueError, match=f"{message}: it must be above 0 and below 1"):
        sources.from_tensor(torch.randn(10, 4), held_out_fraction=fraction)
    assert sources.from_tensor(torch.randn(10, 4), held_out_fraction=0.99).n_tokens == 1


@pytest.mark.parametrize("name", ["missing.npy", "damaged.safetensors"])
def test_a_file_of_activations_that_cannot_be_read_is_one_line_that_names_it(name, tmp_path):
    if "damaged" in name:
        (tmp_path / name).write_bytes(b"no array")
    rule = f"subject is '.*{name}': it must be a readable .npy or .safetensors file"
    with pytest.raises(ValueError, match=rule) as error:
        subjects.open_source(str(tmp_path / name), 10)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 3.3, 100.7])
@pytest.mark.parametrize("d_model", [64, 256, 768, 4096])
def test_a_constant_vector_becomes_0_and_not_rounding_of_unit_norm(value, d_model):
    assert not sources.normalise(torch.full((2, d_model), value)).any()


@pytest.mark.parametrize("x", [X.numpy(), X.numpy()[::-1], X.numpy().astype(">f4"), X.numpy().copy(order="F")])
def test_arrays_are_activations_however_they_lie_in_memory(x):
    x.setflags(write=False)
    source = sources.from_tensor(x)
    torch.testing.assert_close(torch.cat([*source.shards, source.held_out]), torch.tensor(x.astype("f4")))
    assert saelib.evaluate(saelib.SAE(4, 8, "topk", 2), x)["n_tokens"] == len(x)


def test_a_source_checks_its_normalisation_and_is_equal_to_itself_alone():
    with pytest.raises(ValueError, match="normalisation is 'unitnorm'"):
        sources.Source("a", [torch.randn(4, 3)], torch.randn(3, 3), "unitnorm")
    with pytest.raises(ValueError, match="source is 'with a vector of norm .*': it must be activations that are "
                       "normalised, as `from_tensor` does it"):
        sources.Source("a", [torch.randn(4, 3)], sources.normalise(torch.randn(3, 3)), "unit_norm")
    one, other = (sources.from_tensor(torch.ones(4, 3).tril()) for _ in range(2))
    assert one == one and one != other and len({one, other}) == 2


def test_of_a_file_only_the_tokens_asked_for_are_normalised_whatever_its_byte_order(tmp_path):
    x = numpy.random.default_rng(0).normal(size=(50, 6)).astype(">f4")
    numpy.save(tmp_path / "x.npy", x)
    source = sources.from_file(tmp_path / "x.npy", 7)
    want = sources.normalise(torch.from_numpy(x.astype("f4")))
    assert torch.equal(source.shards[0], want[:7]) and torch.equal(source.held_out, want[-5:])


def test_an_array_that_torch_has_no_numbers_for_is_named():
    with pytest.raises(ValueError, match="source is 'an array of object': it must be one of numbers that torch has"):
        sources.from_tensor(numpy.array([[None, 1], [2, 3]], dtype=object))


def test_a_masked_entry_is_not_trained_on():
    x = numpy.ma.masked_invalid(numpy.array([[1.0, numpy.nan], [2.0, 3.0]]))
    with pytest.raises(ValueError, match="source is 'an array with masked entries': it must be one without"):
        sources.from_tensor(x)


def test_a_frequency_has_a_most_and_the_others_share_what_is_left_over():
    source = sources.synthetic(20_000, d_model=32, n_features=16, l0=4, exponent=2.0, noise=0.0)
    on = (source.shards[0] @ torch.linalg.pinv(source.truth)).abs() > 1e-3
    assert on[:, 0].float().mean().item() == pytest.approx(0.9, abs=0.01)
    assert on.sum(1).float().mean().item() == pytest.approx(4, abs=0.05)
    with pytest.raises(ValueError, match="l0 is 16: it must be above 0, and at most 0.9 n_features"):
        sources.synthetic(100, n_features=16, l0=16)


def test_many_rows_are_normalised_piece_by_piece_to_the_same(monkeypatch):
    x = torch.randn(20, 6)
    whole = sources.from_tensor(x, normalisation="unit_norm")
    monkeypatch.setattr(sources, "PIECE_ROWS", 3)
    pieces = sources.from_tensor(x, normalisation="unit_norm")
    assert torch.equal(whole.held_out, pieces.held_out) and torch.equal(whole.shards[0], pieces.shards[0])
    assert torch.equal(whole.shards[0], sources.normalise(x[:18]))


def test_numbers_too_large_for_float32_are_named_with_their_row():
    x = torch.randn(20, 6).double()
    x[4, 1] = 1e300
    with pytest.raises(ValueError, match="first in row 4: activations must be finite in float32"):
        sources.from_tensor(x)


def test_halves_are_normalised_as_their_float32_is_though_their_norm_is_no_half():
    x = 4000 * torch.randn(6, 768, generator=torch.Generator().manual_seed(0)).half()  # a norm is about 110,000
    torch.testing.assert_close(normalise(x), normalise(x.float()), rtol=0, atol=1e-6)
    near = 1 + torch.rand(6, 64, generator=torch.Generator().manual_seed(0)) / 64
    torch.testing.assert_close(normalise(near.bfloat16()).norm(dim=1), torch.ones(6))


def test_vectors_that_are_too_short_are_not_normalised_ones_and_zeros_are():
    x = normalise(torch.randn(9, 4, generator=torch.Generator().manual_seed(0)))
    for wrong in (0.5 * x, 2 * x):
        with pytest.raises(ValueError, match="with a vector of norm"):
            sources.Source("t", [x], wrong, UNIT_NORM)
    x[3] = 0
    sources.Source("t", [x], x, UNIT_NORM)


def test_noise_has_the_standard_deviation_that_was_asked_for():
    source = sources.synthetic(8000, d_model=32, n_features=1, l0=0.9, noise=0.01)
    along = source.shards[0] @ source.truth[0]
    on = along > 0.9  # x = c f + noise, of which 30 dimensions are neither f's nor the mean's
    off = (1 - along[on].square()) / along[on].square()
    assert off.mean().item() == pytest.approx(30 * 0.01**2 * 4 / 3, rel=0.05)  # E[1 / c^2] of U(0.5, 1.5) is 4 / 3


def test_each_seed_has_a_dictionary_of_its_own():
    first, second = (sources.synthetic(10, seed=seed).truth for seed in (0, 1))
    assert (first @ second.t()).abs().max() < 0.7


def test_the_activations_of_a_source_have_no_gradient():
    source = sources.Source("t", [torch.randn(9, 4, requires_grad=True)], torch.randn(3, 4, requires_grad=True))
    assert not source.held_out.requires_grad and not source.shards[0].requires_grad and not source.mean.requires_grad


def test_the_mean_of_many_halves_far_from_zero_is_theirs():
    x = (1000 + torch.randn(200_000, 1, generator=torch.Generator().manual_seed(0))).half()
    assert sources.Source("t", [x], torch.zeros(1, 1)).mean.item() == pytest.approx(x.double().mean().item(), rel=1e-6)


def test_arrays_of_numpys_own_type_are_activations_and_longer_floats_are_named():
    x = numpy.random.default_rng(0).normal(size=(40, 4))
    assert x.dtype == numpy.float64
    torch.testing.assert_close(sources.from_tensor(x).held_out.double(), torch.from_numpy(x[36:]))
    with pytest.raises(ValueError, match="source is 'an array of (longdouble|float128)': it must be one of numbers"):
        sources.from_tensor(x.astype(numpy.longdouble))


def test_activations_that_differ_late_or_in_number_have_another_identity():
    x = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0))
    late = torch.cat([x[:2000], -x[2000:]])
    same, other, fewer = (sources.Source("t", [rows], x[:9] + 1).identity() for rows in (x, late, x[:3000]))
    assert same == sources.Source("t", [*x.split(700)], x[:9] + 1).identity() and len({same, other, fewer}) == 3


def test_a_small_deviation_is_no_rounding():
    x = 1 + 1e-4 * torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(normalise(x).norm(dim=1), torch.ones(5))


def test_the_row_that_is_not_finite_is_counted_from_the_first(monkeypatch):
    monkeypatch.setattr(sources, "PIECE_ROWS", 3)
    x = torch.randn(10, 4)
    x[7, 2] = torch.nan
    with pytest.raises(ValueError, match="first in row 7"):
        sources.from_tensor(x)


def test_of_a_file_no_more_is_read_than_is_kept(tmp_path):
    x = numpy.random.default_rng(0).standard_normal((100, 4)).astype("float32")
    x[50] = numpy.nan
    numpy.save(tmp_path / "x.npy", x)
    source = saelib.open_source(tmp_path / "x.npy", 50)
    assert source.n_tokens == 50 and len(source.held_out) == 10
    with pytest.raises(ValueError, match="source holds NaN or Inf, first in row 50"):
        saelib.open_source(str(tmp_path / "x.npy"), 51)
    x[50], x[95] = 1, numpy.inf
    numpy.save(tmp_path / "x.npy", x)
    with pytest.raises(ValueError, match="source holds NaN or Inf, first in row 95"):
        saelib.open_source(str(tmp_path / "x.npy"), 51)


def test_another_default_type_changes_no_activations():
    x = torch.randn(40, 6)
    expected = sources.from_tensor(x, normalisation=UNIT_NORM)
    torch.set_default_dtype(torch.float64)
    try:
        source = sources.from_tensor(x, normalisation=UNIT_NORM)
        two = sources.Source("a", [x[:10], x[10:20]], x[20:])
        batch = next(two.batches(4, 1, 0))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(source.shards[0], expected.shards[0]) and batch.dtype == torch.float32
