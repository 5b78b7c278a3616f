import json
import subprocess
import sys
import types
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

import saelib
from saelib import auto, formats, native, relu_path, sources
from saelib.sae import SAE, geometric_median


def test_the_encoder_starts_as_the_decoder_with_unit_rows_and_is_not_tied_to_it():
    sae = SAE(8, 30, "topk", 4)
    assert torch.equal(sae.W_enc, sae.W_dec) and sae.W_enc is not sae.W_dec
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(30))


def test_calling_it_decodes_what_it_encodes():
    sae, x = SAE(8, 30, "relu", 0.1), torch.randn(5, 8)
    assert torch.equal(sae(x), sae.decode(sae.encode(x)))


def test_b_pre_is_subtracted_once_and_added_once():
    sae, x = SAE(4, 12, "relu", 0.0), torch.randn(6, 4)
    shifted = SAE(4, 12, "relu", 0.0)
    with torch.no_grad():
        shifted.b_pre.fill_(5.0)
    torch.testing.assert_close(shifted(x + 5), sae(x) + 5)


def test_removing_the_parallel_gradient_leaves_it_orthogonal_to_each_row():
    sae = SAE(8, 30, "topk", 4)
    sae.W_dec.grad = torch.randn(30, 8)
    sae.remove_parallel_gradient()
    torch.testing.assert_close((sae.W_dec.grad * sae.W_dec).sum(1), torch.zeros(30), atol=1e-5, rtol=0)


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path):
    sae = SAE(8, 30, "topk", 4, normalisation="unit_norm", seed=3)
    sae.save(tmp_path / "a")
    back = saelib.load(tmp_path / "a")
    assert all(torch.equal(a, b) for a, b in zip(sae.parameters(), back.parameters()))
    assert (back.method.key, back.method.sparsity, back.normalisation) == ("topk", 4, "unit_norm")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["sae.json", "sae.safetensors"]


def test_loading_refuses_what_is_not_an_sae(tmp_path):
    with pytest.raises(ValueError, match="must hold the sae.json and sae.safetensors"):
        saelib.load(tmp_path)
    SAE(8, 30, "topk", 4).save(tmp_path)
    save_file({"W_enc": torch.zeros(2, 2)}, tmp_path / "sae.safetensors")
    with pytest.raises(ValueError, match="W_enc must be a tensor of shape"):
        saelib.load(tmp_path)
    (tmp_path / "sae.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(ValueError, match="folder is .*: it must be one whose sae.json says 'saelib-1'"):
        saelib.load(tmp_path)


def test_the_weights_of_another_format_are_not_overwritten(tmp_path):
    sae = SAE(8, 30, "topk", 4)
    formats.save(sae, tmp_path, "sparsify")
    with pytest.raises(ValueError, match="folder is .*: it must be another one: sae.safetensors lies there, and no "
                       "sae.json with it"):
        sae.save(tmp_path)
    assert formats.load(tmp_path, "sparsify").method.k == 4 and not (tmp_path / "sae.json").exists()


def test_a_wrong_shape_is_named_with_the_rule():
    with pytest.raises(ValueError, match=r"x has shape \[5, 7\]: it must be \[batch, d_model = 8\]"):
        SAE(8, 30, "topk", 4).encode(torch.randn(5, 7))


def test_the_geometric_median_resists_an_outlier_that_moves_the_mean():
    x = torch.cat([torch.randn(99, 3) * 0.01, torch.full((1, 3), 1000.0)])
    assert geometric_median(x).norm() < 0.1 < x.mean(0).norm()


def test_the_unit_vectors_from_the_geometric_median_to_the_rows_sum_to_zero():
    x = torch.randn(101, 3, generator=torch.Generator().manual_seed(0)).exp()
    torch.testing.assert_close(torch.nn.functional.normalize(x - geometric_median(x)).mean(0), torch.zeros(3),
                               atol=1e-4, rtol=0)


@pytest.mark.parametrize("d, n, dtype, rule", [(50, 64, torch.float32, "d_model is 50: it must be a multiple of 32"),
                                               (64, 50, torch.float32, "n_latents is 50: it must be a multiple of 32"),
                                               (64, 64, torch.float64,
                                                "W_enc.dtype is torch.float64: it must be torch.float32, on the CPU")])
def test_what_the_compiled_code_does_not_take_is_said(monkeypatch, d, n, dtype, rule):
    monkeypatch.setattr(native, "compiled", lambda: None)
    with pytest.raises(ValueError, match=rule):
        SAE(d, n, "relu", 0.1).to(dtype).run(torch.zeros(3, d, dtype=dtype), "native")


@pytest.mark.parametrize("cpu, compiler, fails, rule", [
    ("AVX2", "g++", None, "the CPU lacks AVX-512"), ("AVX512", "no-such-compiler", None,
                                                     "there is no C\\+\\+ compiler called no-such-compiler"),
    ("AVX512", sys.executable, RuntimeError("Ninja is required"), "Ninja is required"),
    ("AVX512", sys.executable, AssertionError(), "AssertionError"),
    ("AVX512", sys.executable, subprocess.CalledProcessError(1, "g++"),
     "Command 'g\\+\\+' returned non-zero exit status 1"),
    ("AVX512", sys.executable, RuntimeError("Error building\ng++ ...\nnative.cpp:1: error: no such type"),
     "native.cpp:1: error: no such type")])
def test_a_machine_that_can_not_compile_is_told_so_each_time_and_nothing_else_is_used(monkeypatch, tmp_path, cpu,
                                                                                      compiler, fails, rule):
    asked = []

    def load(*args, **kwargs):
        asked.append(args)
        raise fails

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: cpu)
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr("torch.utils.cpp_extension.load", load)
    monkeypatch.setenv("SAELIB_CACHE", str(tmp_path))  # where nothing was compiled yet
    native.build.cache_clear()
    try:
        for _ in range(2):
            with pytest.raises(ValueError, match=f"path is 'native': it must be 'sparse' where it can't be compiled: "
                               f"{rule}"):
                SAE(32, 32, "topk", 2).run(torch.zeros(3, 32), "native")
        assert not native.available() and len(asked) == bool(fails)
        sae = SAE(64, 1024, "topk", 4)  # of a size and method that would gain
        assert auto.pick_path("auto", "cpu", sae.method, sae.W_enc) == "sparse"
    finally:
        native.build.cache_clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_activations_of_another_type_are_encoded_in_that_of_the_weights(dtype):
    sae = SAE(16, 64, "topk", 4, seed=1)
    x = torch.randn(20, 16, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    x_hat = sae(x)
    assert x_hat.dtype == dtype
    torch.testing.assert_close(x_hat, sae.decode(sae.encode(x)).to(dtype), rtol=1e-2, atol=1e-5)
    x_hat.sum().backward()
    assert x.grad.dtype == dtype and x.grad.abs().sum() > 0


@pytest.mark.parametrize("path", ["sparse", "dense"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_offset_that_b_pre_takes_away_costs_no_digits(path, precision):
    x, offset = torch.randn(40, 16, generator=torch.Generator().manual_seed(0)), 4096.0
    near, far = SAE(16, 64, "topk", 4, seed=1), SAE(16, 64, "topk", 4, seed=1)
    far.b_pre.data += offset
    x = (x + offset) - offset  # as many digits as there are beside the offset
    error = (far.run(x + offset, path, precision).x_hat - offset) - near.run(x, path, precision).x_hat
    assert error.abs().max() < 1e-2 and torch.allclose(far.encode(x + offset), near.encode(x), atol=1e-5)


def test_the_gradient_of_b_pre_is_that_of_the_formula():
    sae, x = SAE(8, 24, "relu", 0.1, seed=1).double(), torch.randn(30, 8, dtype=torch.float64)
    sae.b_pre.data += 0.3
    weight = torch.randn(30, 24, dtype=torch.float64)
    own = torch.autograd.grad((sae.encode(x) * weight).sum(), [sae.b_pre, sae.W_enc, sae.b_enc])
    plain = torch.autograd.grad((torch.relu((x - sae.b_pre) @ sae.W_enc.t() + sae.b_enc) * weight).sum(),
                                [sae.b_pre, sae.W_enc, sae.b_enc])
    for a, b in zip(own, plain):
        torch.testing.assert_close(a, b)


def test_a_description_that_json_can_not_hold_leaves_what_was_there(tmp_path):
    old, new = SAE(4, 8, "topk", 2), SAE(4, 8, "relu", 0.1, seed=1)
    old.save(tmp_path)
    new.method.sparsity = torch.tensor(0.5)
    with pytest.raises(ValueError, match=r"value is tensor\(0.5000\): it must be text, a number, a list or a dict"):
        new.save(tmp_path)
    assert torch.equal(saelib.load(tmp_path).W_dec, old.W_dec) and len(list(tmp_path.iterdir())) == 2
    new.method.sparsity = numpy.float32(0.5)
    new.save(tmp_path)
    assert saelib.load(tmp_path).method.sparsity == 0.5


@pytest.mark.parametrize("path_of", [lambda sae, x: sae(x), lambda sae, x: sae.encode(x),
                                     lambda sae, x: sae.decode(sae.encode(x))])
@pytest.mark.parametrize("method, sparsity", [("topk", 3), ("relu", 0.1)])
def test_activations_come_back_in_the_shape_that_a_hook_hands_over(path_of, method, sparsity):
    sae, x = SAE(8, 24, method, sparsity, seed=1), torch.randn(2, 5, 8)
    out = path_of(sae, x)
    assert out.shape[:2] == (2, 5)
    torch.testing.assert_close(out.flatten(0, 1), path_of(sae, x.flatten(0, 1)))
    assert path_of(sae, x[0, 0]).dim() == 1


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(normalisation="unit-norm"), "normalisation is 'unit-norm': it must be 'none' or 'unit_norm'"),
    (dict(n_latents=0), "n_latents is 0: it must be a whole number, 1 or more"),
])
def test_what_makes_no_sae_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        SAE(**dict(d_model=8, n_latents=30, method="topk", sparsity=4) | arguments)


def test_whole_numbers_are_no_activations():
    sae = SAE(8, 30, "topk", 4)
    with pytest.raises(ValueError, match="x is 'of torch.int64': it must be of floating-point numbers"):
        sae.check(torch.ones(2, 8, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_in_a_models_units_it_takes_activations_of_any_scale_and_shift_and_gives_them_back(dtype):
    # of all 40 latents: of fewer, rounding to bfloat16 may choose others
    sae, inputs = SAE(16, 40, "topk", 40, normalisation="unit_norm"), sources.normalise(torch.randn(30, 16))
    sae.b_pre += 0.1
    x_hat = sae.run(inputs).x_hat
    moved = (inputs * 300 + 7).to(dtype).view(5, 6, 16)  # as a hook hands them over
    near = dict(rtol=0, atol=1e-3) if dtype == torch.float32 else dict(rtol=0.05, atol=5.0)
    torch.testing.assert_close(sae(moved), (x_hat * 300 + 7).to(dtype).view(5, 6, 16), **near)
    torch.testing.assert_close(sae.normalised(moved.float()).view(30, 16), inputs, rtol=0,
                               atol=1e-6 if dtype == torch.float32 else 1e-2)
    torch.testing.assert_close(sae(inputs), x_hat)
    assert torch.equal(SAE(16, 40, "topk", 4)(moved.float()),
                       SAE(16, 40, "topk", 4).run(moved.float().view(30, 16)).x_hat.view(5, 6, 16))
    assert torch.equal(SAE(16, 40, "topk", 4).normalised(moved), moved)


def test_it_says_what_it_is_and_what_its_inputs_are():
    said = "SAE(\n  d_model=2, n_latents=3, method='topk', k=1, normalisation='unit_norm'"
    assert repr(SAE(2, 3, "topk", 1, normalisation="unit_norm")).startswith(said)


def test_what_is_no_tensor_is_named():
    # in a process of its own, where annotations are not checked
    code = ("import numpy, torch, saelib\nsae = saelib.SAE(2, 3, 'topk', 1)\n"
            "for call in (lambda: sae.encode(numpy.zeros((4, 2))), lambda: sae(numpy.zeros((4, 2))), lambda: "
            "saelib.evaluate(sae, numpy.zeros((4, 2)), 0.0), lambda: sae.encode(torch.tensor(1.0)), lambda: "
            "sae.decode(torch.zeros(4, 2))):\n"
            "    try:\n        call()\n    except ValueError as error:\n        print(error)")
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.splitlines()
    assert said == ["x is 'ndarray': it must be a tensor"] * 2 + [
        "mean is 0.0: it must be None, or finite numbers of shape [d_model = 2]",
        "x has shape []: it must be [batch, d_model = 2]",
        "latents is 'of shape [4, 2]': it must be [..., n_latents = 3]"]


@pytest.mark.parametrize("damage, rule", [({"W_enc": torch.full((3, 2), torch.nan)},
                                           "W_enc must be a tensor of shape .3, 2., of finite numbers"),
                                          ({"extra": torch.zeros(1)},
                                           "one with no other tensors than W_enc, W_dec, b_enc, b_pre")])
def test_a_saved_sae_with_other_tensors_or_no_numbers_is_refused(tmp_path, damage, rule):
    SAE(2, 3, "topk", 1).save(tmp_path)
    save_file(load_file(tmp_path / "sae.safetensors") | damage, tmp_path / "sae.safetensors")
    with pytest.raises(ValueError, match=rule):
        saelib.load(tmp_path)


@pytest.mark.parametrize("method", ["topk", "batchtopk", "relu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_sae_cast_to_a_half_passes_gradients_to_the_model_that_it_is_spliced_into(method, dtype):
    sae, x = SAE(16, 40, method, 4 if method != "relu" else 0.1), torch.randn(30, 16, requires_grad=True)
    sae.run(x)  # BatchTopK's threshold comes from training
    sae.eval()
    exact, = torch.autograd.grad(sae(x).square().sum(), x)
    rough, = torch.autograd.grad(sae.to(dtype)(x.to(dtype)).float().square().sum(), x)
    assert torch.nn.functional.cosine_similarity(exact.flatten(), rough.flatten(), dim=0) > 0.95


def test_a_decoder_row_of_zeros_stays_finite():
    sae = SAE(8, 30, "topk", 4)
    sae.W_dec.data[3] = 0
    sae.normalise_decoder()
    assert sae.W_dec.isfinite().all()


def test_what_was_compiled_for_another_torch_or_cpu_has_another_name(monkeypatch, tmp_path):
    names = []

    def compile_(name, *args, **options):
        names.append(name)
        raise RuntimeError("enough")

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.setenv("SAELIB_CACHE", str(tmp_path))
    monkeypatch.setattr("torch.utils.cpp_extension.load", compile_)
    for version, bf16 in (("1", False), ("2", False), ("2", True)):
        monkeypatch.setattr(torch, "__version__", version)
        monkeypatch.setattr(native, "cpu_has", lambda feature: bf16)
        native.build.__wrapped__()
    assert len(set(names)) == 3


def test_where_nothing_can_be_kept_what_was_compiled_is_used_from_where_it_lies(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setenv("CXX", sys.executable)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SAELIB_CACHE", str(tmp_path / "file"))  # no folder, and none can be made there
    monkeypatch.setattr("torch.utils.cpp_extension.load", lambda name, *args, build_directory, **options:
                        Path(build_directory, f"{name}.so").write_text("made"))
    loaded = []
    monkeypatch.setattr(native, "load", lambda module, path: loaded.append(path.read_text())
                        or types.ModuleType(module))
    assert not isinstance(native.build.__wrapped__(), str) and loaded == ["made"]


def test_l0_is_active_latents_over_tokens_also_beyond_one_block():
    out = SAE(16, 40, "relu", 0.1).run(torch.randn(300, 16))
    assert torch.isclose(out.l0(), (out.latents > 0).sum() / 300)


def test_both_biases_are_zero_at_the_start():
    sae = SAE(4, 6, "topk", 2)
    assert not sae.b_pre.any() and not sae.b_enc.any()


def test_what_cannot_be_read_back_is_not_written(tmp_path):
    sae = SAE(8, 30, "topk", 4)
    sae.save(tmp_path)
    about = json.loads((tmp_path / "sae.json").read_text())
    del about["sparsity"]
    (tmp_path / "sae.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="sparsity is None: it must be a finite number"):
        saelib.load(tmp_path)
    sae.W_dec.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="sae is 'one with NaN or Inf': it must be finite"):
        sae.save(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_truth_value_is_no_number():
    with pytest.raises(ValueError, match="n_latents is True: it must be a whole number"):
        SAE(8, True, "topk", 1)


def test_modules_are_there_when_they_are_asked_for():
    code = "import saelib, sys; assert 'matplotlib' not in sys.modules; saelib.plots.frontier; saelib.no_such_module"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip().endswith("AttributeError: module 'saelib' has no attribute 'no_such_module'")


@pytest.mark.parametrize("scale", [1e-15, 1e-6, 1.0, 1e6])
def test_the_geometric_median_is_the_same_on_every_scale(scale):
    x = torch.randn(500, 8, generator=torch.Generator().manual_seed(0)).exp()
    torch.testing.assert_close(geometric_median(scale * x) / scale, geometric_median(x), rtol=1e-4, atol=0)
    assert torch.equal(geometric_median(torch.ones(9, 3)), torch.ones(3))
    half = (100 * x).half()
    torch.testing.assert_close(geometric_median(half), geometric_median(half.float()).half())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_an_sae_comes_back_in_its_own_type(tmp_path, dtype):
    sae = SAE(8, 16, "topk", 4).to(dtype)
    sae.save(tmp_path)
    again = saelib.load(tmp_path)
    assert again.W_enc.dtype == dtype and torch.equal(again.W_enc, sae.W_enc)


@pytest.mark.parametrize("method, sparsity", [("topk", 4), ("relu", 0.1)])
@pytest.mark.parametrize("path", ["sparse", "dense"])
def test_float32_is_float32_inside_a_callers_autocast(method, sparsity, path):
    sae, x = SAE(16, 2048, method, sparsity), torch.randn(30, 16, generator=torch.Generator().manual_seed(0))
    if method == "relu":
        sae.b_enc.data -= 2.5
        assert relu_path.few_active(sae.run(x, path).latents)
    expected = sae.run(x, path).x_hat
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sae.run(x, path).x_hat, expected)
