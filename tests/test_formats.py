"""SAEs in the files of other libraries. Each library's forward pass is written out here from its definition, for raw
activations; where the library is installed, it is asked itself."""
import importlib
import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from saelib import formats, sources
from saelib.normalisation import UNIT_NORM
from saelib.sae import SAE

D, N, K = 12, 40, 5
X = 3 * torch.randn(50, D, generator=torch.Generator().manual_seed(0)) + 1
CASES = [("saelens", "topk", "none"), ("saelens", "topk", UNIT_NORM), ("saelens", "multi_topk", UNIT_NORM),
         ("saelens", "relu", "none"),
         ("saelens", "relu", UNIT_NORM), ("saelens", "batchtopk", UNIT_NORM), ("sparsify", "topk", "none"),
         ("sparsify", "multi_topk", "none"),
         ("sparsify", "topk", UNIT_NORM), ("dictionary_learning", "topk", "none"),
         ("dictionary_learning", "multi_topk", "none"), ("dictionary_learning", "relu", UNIT_NORM),
         ("openai", "topk", UNIT_NORM), ("openai", "multi_topk", UNIT_NORM), ("openai", "relu", "none")]
WITHOUT = [case for case in CASES if case[0] in ("sparsify", "dictionary_learning")]  # these do nothing to their inputs


def make(method, normalisation):
    """An SAE whose weights, biases and threshold have no special form but for unit rows, which training leaves."""
    sae = SAE(D, N, method, 0.1 if method == "relu" else K, normalisation=normalisation, seed=7)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for p in sae.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
        sae.normalise_decoder()
        if method == "batchtopk":
            sae.method.threshold.fill_(0.4)
            sae.method.n_cuts.fill_(9)
    return sae.eval()


def ours(sae, x):
    """Latents and reconstruction of raw activations."""
    return sae.encode(sae.normalised(x)), sae(x)


def layer_norm(x):
    mean = x.mean(1, keepdim=True)
    deviation = (x - mean).std(1, keepdim=True)
    return (x - mean) / (deviation + 1e-5), mean, deviation


def choose(pre_acts, k):
    values, places = pre_acts.topk(k, dim=1)
    return torch.zeros_like(pre_acts).scatter(1, places, torch.relu(values))


def saelens(folder, x):
    about, w = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae_weights.safetensors")
    inner, mean, deviation = layer_norm(x) if about["normalize_activations"] == "layer_norm" else (x, 0, 1)
    pre_acts = (inner - w["b_dec"] * about["apply_b_dec_to_input"]) @ w["W_enc"] + w["b_enc"]
    latents = {"topk": lambda: choose(pre_acts, about["k"]), "standard": lambda: torch.relu(pre_acts),
               "jumprelu": lambda: torch.relu(pre_acts) * (pre_acts > w["threshold"])}[about["architecture"]]()
    return latents, (latents @ w["W_dec"] + w["b_dec"]) * deviation + mean


def sparsify(folder, x):
    about, w = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae.safetensors")
    latents = choose(torch.relu((x - w["b_dec"]) @ w["encoder.weight"].t() + w["encoder.bias"]), about["k"])
    return latents, latents @ w["W_dec"] + w["b_dec"]


def dictionary_learning(folder, x):
    w = torch.load(folder / "ae.pt", weights_only=True)
    b_dec = w["b_dec"] if "k" in w else w["bias"]
    latents = torch.relu((x - b_dec) @ w["encoder.weight"].t() + w["encoder.bias"])
    latents = choose(latents, int(w["k"])) if "k" in w else latents
    return latents, latents @ w["decoder.weight"].t() + b_dec


def openai(folder, x):
    w = torch.load(folder / "autoencoder.pt", weights_only=True)
    inner, mean, deviation = layer_norm(x) if w["activation"] == "TopK" else (x, 0, 1)
    pre_acts = (inner - w["pre_bias"]) @ w["encoder.weight"].t() + w["latent_bias"]
    latents = choose(pre_acts, w["activation_state_dict"]["k"]) if w["activation"] == "TopK" else torch.relu(pre_acts)
    return latents, (latents @ w["decoder.weight"].t() + w["pre_bias"]) * deviation + mean


THEIRS = {"saelens": saelens, "sparsify": sparsify, "dictionary_learning": dictionary_learning, "openai": openai}


@pytest.mark.parametrize("format, method, normalisation", CASES)
def test_the_other_library_computes_the_same(format, method, normalisation, tmp_path):
    sae = make(method, normalisation)
    formats.save(sae, tmp_path / "new" / "folder", format)
    x = sources.normalise(X) if normalisation == UNIT_NORM and (format, method, normalisation) in WITHOUT else X
    wanted = ours(sae, x) if x is X else (sae.encode(x), sae(x))
    for theirs, own in zip(THEIRS[format](tmp_path / "new" / "folder", x), wanted):
        torch.testing.assert_close(theirs, own, rtol=1e-4, atol=1e-4)
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("format, method, normalisation", CASES)
def test_what_was_written_comes_back(format, method, normalisation, tmp_path):
    sae = make(method, normalisation)
    formats.save(sae, tmp_path, format)
    back = formats.load(tmp_path, format)
    assert back.normalisation == normalisation and not back.training
    assert back.method.key == (method if format == "sparsify" else method.replace("multi_", ""))
    assert back.method.sparsity == (0 if method == "relu" else K)
    for name, tensor in sae.named_parameters():
        torch.testing.assert_close(dict(back.named_parameters())[name], tensor, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(back(sources.normalise(X)), sae(sources.normalise(X)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("centred", [True, False])
def test_a_saelens_sae_with_rows_of_any_norm_and_an_input_that_is_not_centred_is_folded(centred, tmp_path):
    sae = make("topk", "none")
    sae.W_dec.data *= torch.linspace(0.5, 2, N)[:, None]
    formats.save(sae, tmp_path, "saelens")
    about = json.loads((tmp_path / "cfg.json").read_text()) | {"apply_b_dec_to_input": centred,
                                                               "rescale_acts_by_decoder_norm": True}
    (tmp_path / "cfg.json").write_text(json.dumps(about))
    w = load_file(tmp_path / "sae_weights.safetensors")
    norm = w["W_dec"].norm(dim=1)
    latents = choose(((X - w["b_dec"] * centred) @ w["W_enc"] + w["b_enc"]) * norm, K)
    back = formats.load(tmp_path, "saelens")
    torch.testing.assert_close(back.encode(X), latents, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(back(X), (latents / norm) @ w["W_dec"] + w["b_dec"], rtol=1e-4, atol=1e-4)


def test_a_topk_sae_that_saelens_wrote_before_version_6_is_read_as_topk(tmp_path):
    sae = make("topk", "none")
    formats.save(sae, tmp_path, "saelens")
    about = json.loads((tmp_path / "cfg.json").read_text())
    del about["k"]
    (tmp_path / "cfg.json").write_text(json.dumps(about
                                                  | {"architecture": "standard", "activation_fn_str": "topk",
                                                     "activation_fn_kwargs": {"k": K}}))
    back = formats.load(tmp_path, "saelens")
    assert (back.method.key, back.method.sparsity) == ("topk", K)
    torch.testing.assert_close(back(X), sae(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", formats.FORMATS)
def test_damaged_files_are_one_line_that_names_the_folder(format, tmp_path):
    with pytest.raises(ValueError, match=f"folder is '.*': it must hold an SAE in the format '{format}'"):
        formats.load(tmp_path, format)
    formats.save(make("topk", UNIT_NORM), tmp_path, format)
    for file in list(tmp_path.iterdir()):
        whole = file.read_bytes()
        for part in (b"", b"{}", whole[: len(whole) // 2]):
            file.write_bytes(part)
            with pytest.raises(ValueError, match="folder is '.*': it must hold an SAE") as error:
                formats.load(tmp_path, format)
            assert "\n" not in str(error.value)
        file.write_bytes(whole)
    assert formats.load(tmp_path, format).method.key == "topk"


@pytest.mark.parametrize("format, method, normalisation, message", [
    ("saelens2", "topk", "none", "format is 'saelens2': it must be one of saelens, sparsify, dictionary_learning, "
     "openai"),
    ("sparsify", "relu", "none", "method is 'relu': it must be topk or multi_topk"),
    ("dictionary_learning", "batchtopk", "none", "method is 'batchtopk': it must be one of topk, multi_topk, relu"),
    ("openai", "topk", "none", "normalisation is 'none': it must be 'unit_norm' for a topk SAE"),
    ("openai", "relu", UNIT_NORM, "normalisation is 'unit_norm': it must be 'none' for a relu SAE"),
])
def test_what_a_format_cannot_hold_is_said_and_nothing_written(format, method, normalisation, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        formats.save(make(method, normalisation), tmp_path / "new", format)
    assert not (tmp_path / "new").exists()


def test_metadata_is_kept_where_there_is_a_place_for_it(tmp_path):
    about = {"model_name": "gpt2", "hook_name": "blocks.8.hook_resid_post", "prepend_bos": False}
    formats.save(make("batchtopk", "none"), tmp_path, "saelens", **about)
    kept = json.loads((tmp_path / "cfg.json").read_text())["metadata"]
    assert about.items() <= kept.items() and kept["k"] == K
    with pytest.raises(ValueError, match="format is 'sparsify': it must be 'saelens' to keep model_name, hook_name, "
                       "prepend_bos"):
        formats.save(make("topk", "none"), tmp_path / "new", "sparsify", **about)
    assert not (tmp_path / "new").exists()


def test_a_batchtopk_sae_that_was_never_trained_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="method is 'batchtopk': it must be trained before it is used"):
        formats.save(SAE(D, N, "batchtopk", K), tmp_path / "new", "saelens")
    assert not (tmp_path / "new").exists()


def test_a_jumprelu_sae_with_a_threshold_for_each_latent_is_refused(tmp_path):
    formats.save(make("batchtopk", "none"), tmp_path, "saelens")
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    tensors["threshold"][3] += 1
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    with pytest.raises(ValueError, match="architecture is 'jumprelu': it must be a BatchTopK SAE's, with one threshold "
                       "for all latents"):
        formats.load(tmp_path, "saelens")


@pytest.mark.parametrize("format, changed, message", [
    ("saelens", {"architecture": "gated"}, "architecture is 'gated': it must be"),
    ("saelens", {"activation_fn_str": "tanh-relu"}, "activation_fn is 'tanh-relu': it must be"),
    ("saelens", {"finetuning_scaling_factor": True}, "finetuning_scaling_factor is True: it must be"),
    ("saelens", {"reshape_activations": "hook_z"}, "reshape_activations is 'hook_z': it must be"),
    ("saelens", {"normalize_activations": "expected_average_only_in"},
     "normalize_activations is 'expected_average_only_in': it must be"),
    ("sparsify", {"activation": "groupmax"}, "activation is 'groupmax': it must be"),
    ("sparsify", {"transcode": True}, "transcode is True: it must be"),
    ("dictionary_learning", {"trainer": {"dict_class": "GatedAutoEncoder"}},
     "dict_class is 'GatedAutoEncoder': it must be"),
])
def test_an_architecture_that_is_not_here_is_named(format, changed, message, tmp_path):
    formats.save(make("topk", "none"), tmp_path, format)
    file = tmp_path / ("config.json" if format == "dictionary_learning" else "cfg.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(ValueError, match=message):
        formats.load(tmp_path, format)


def asked(library, folder, x):
    """Latents and reconstruction by the library itself."""
    if library == "sae_lens":
        theirs = importlib.import_module("sae_lens").SAE.load_from_disk(folder)
        assert theirs.cfg.metadata.hook_name == "blocks.8.hook_resid_post"
        latents = theirs.encode(x)
        return latents, theirs.decode(latents)
    if library == "sparsify":
        theirs = importlib.import_module("sparsify").SparseCoder.load_from_disk(folder)
        values, places, _ = theirs.encode(x)
        latents = torch.zeros(len(x), N).scatter(1, places, values)
        return latents, theirs.b_dec + latents @ theirs.W_dec
    theirs, _ = importlib.import_module("dictionary_learning.utils").load_dictionary(str(folder), "cpu")
    return theirs.encode(x), theirs(x)


@pytest.mark.parametrize("format, method, normalisation", [case for case in CASES if case[0] != "openai"])
@torch.no_grad()
def test_the_library_itself_loads_it_and_computes_the_same(format, method, normalisation, tmp_path):
    library = {"saelens": "sae_lens"}.get(format, format)
    pytest.importorskip(library, reason=f"{library} is not installed: pip install '.[peers]'")
    sae = make(method, normalisation)
    formats.save(sae, tmp_path, format, **{"hook_name": "blocks.8.hook_resid_post"} if format == "saelens" else {})
    x = sources.normalise(X) if normalisation == UNIT_NORM and (format, method, normalisation) in WITHOUT else X
    for theirs, own in zip(asked(library, tmp_path, x), ours(sae, x) if x is X else (sae.encode(x), sae(x))):
        torch.testing.assert_close(theirs, own, rtol=1e-4, atol=1e-4)


def test_metadata_that_json_can_not_hold_leaves_what_was_there(tmp_path):
    formats.save(make("topk", "none"), tmp_path, "saelens")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="it must be text, a number, a list or a dict"):
        formats.save(make("relu", "none"), tmp_path, "saelens", hook_name=torch.zeros(1))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(("format", "file", "name"), [("saelens", "sae_weights.safetensors", "b_enc"),
                                                      ("sparsify", "sae.safetensors", "b_dec")])
def test_a_tensor_of_another_shape_is_named_and_not_broadcast(format, file, name, tmp_path):
    formats.save(make("topk", "none"), tmp_path, format)
    tensors = load_file(tmp_path / file)
    save_file(tensors | {name: tensors[name][:1].clone()}, tmp_path / file)
    with pytest.raises(ValueError, match=r"is 'of shape \[1\]': it must be of shape"):
        formats.load(tmp_path, format)


@pytest.mark.parametrize("format, file, changes, message", [
    ("saelens", "cfg.json", {"d_sae": 99}, "n_latents is 99: it must be 40, as the encoder has it"),
    ("saelens", "cfg.json", {"d_in": 99},
     "d_model is 99: it must be 12"),
    ("sparsify", "cfg.json", {"num_latents": 7}, "n_latents is 7: it must be 40"),
    ("sparsify", "cfg.json", {"d_in": 9},
     "d_model is 9: it must be 12"),
    ("dictionary_learning", "config.json", {"trainer": {"dict_class": "AutoEncoderTopK", "dict_size": 7}},
     "n_latents is 7: it must be 40")])
def test_sizes_that_a_file_states_are_those_of_its_weights(format, file, changes, message, tmp_path):
    formats.save(make("topk", "none"), tmp_path, format)
    (tmp_path / file).write_text(json.dumps(json.loads((tmp_path / file).read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        formats.load(tmp_path, format)


def test_weights_that_are_no_numbers_are_refused(tmp_path):
    formats.save(make("topk", "none"), tmp_path, "sparsify")
    tensors = load_file(tmp_path / "sae.safetensors")
    tensors["W_dec"][3, 2] = torch.nan
    save_file(tensors, tmp_path / "sae.safetensors")
    with pytest.raises(ValueError, match="W_dec is 'a tensor with NaN or Inf': it must be of finite numbers"):
        formats.load(tmp_path, "sparsify")


class Spell:
    """What a pickle from a stranger may do when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("format, name", [("openai", "autoencoder.pt"), ("dictionary_learning", "ae.pt")])
def test_reading_an_sae_runs_no_code_of_its_file(format, name, tmp_path):
    formats.save(make("topk", "unit_norm"), tmp_path, format)
    torch.save({"activation": Spell(tmp_path / "cast")}, tmp_path / name)
    with pytest.raises(ValueError, match=f"hold an SAE in the format '{format}'"):
        formats.load(tmp_path, format)
    assert not (tmp_path / "cast").exists()


@pytest.mark.parametrize("format", ["saelens", "sparsify"])
def test_a_file_without_a_k_is_not_taken_for_one_of_32(format, tmp_path):
    formats.save(SAE(8, 64, "topk", 4), tmp_path, format)
    about = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(about | {"k": None}))
    with pytest.raises(ValueError, match="k is None: it must be a finite number"):
        formats.load(tmp_path, format)


def test_what_is_no_sae_is_named(tmp_path):
    with pytest.raises(ValueError, match="sae is 'Namespace': it must be an SAE: of a fit it is `.sae`"):
        getattr(formats.save, "__wrapped__", formats.save)(Namespace(), tmp_path, "saelens")  # without the type check


def test_what_sparsify_wrote_itself_is_read_by_its_own_words(tmp_path):
    formats.save(SAE(8, 64, "topk", 4), tmp_path, "sparsify")
    about = json.loads((tmp_path / "cfg.json").read_text())
    del about["method"], about["normalisation"]  # ours
    for multi, key in ((False, "topk"), (True, "multi_topk")):
        (tmp_path / "cfg.json").write_text(json.dumps(about | {"num_latents": 0, "multi_topk": multi}))  # 0: a factor
        assert formats.load(tmp_path, "sparsify").method.key == key


def test_an_openai_sae_whose_latents_may_be_negative_is_refused(tmp_path):
    formats.save(SAE(8, 64, "topk", 4, normalisation=UNIT_NORM), tmp_path, "openai")
    state = torch.load(tmp_path / "autoencoder.pt", weights_only=True)
    state["activation_state_dict"]["postact_fn"] = "Identity"
    torch.save(state, tmp_path / "autoencoder.pt")
    with pytest.raises(ValueError, match="postact_fn is 'Identity': it must be 'ReLU'"):
        formats.load(tmp_path, "openai")


def test_a_threshold_is_not_written_as_a_k(tmp_path):
    sae = SAE(8, 64, "batchtopk", 4, normalisation=UNIT_NORM)
    sae.method.threshold.fill_(0.4), sae.method.n_cuts.fill_(9)
    with pytest.raises(ValueError, match="method is 'batchtopk': it must be one of topk, multi_topk, relu"):
        formats.save(sae, tmp_path, "openai")


@pytest.mark.parametrize("name", ["activation_fn_str", "activation_fn"])
def test_an_older_saelens_topk_is_read_as_topk_under_either_name(name, tmp_path):
    formats.save(SAE(8, 64, "topk", 4), tmp_path, "saelens")
    about = json.loads((tmp_path / "cfg.json").read_text()) | {"architecture": "standard", name: "topk"}
    (tmp_path / "cfg.json").write_text(json.dumps(about))
    assert formats.load(tmp_path, "saelens").method.key == "topk"


def test_weights_in_a_half_are_scaled_and_folded_in_float32(tmp_path):
    formats.save(SAE(8, 64, "topk", 4, normalisation=UNIT_NORM), tmp_path, "saelens")
    tensors = {name: t.bfloat16() for name, t in load_file(tmp_path / "sae_weights.safetensors").items()}
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    back = formats.load(tmp_path, "saelens")
    torch.testing.assert_close(back.W_enc.detach(), tensors["W_enc"].float().t() * 7**0.5, rtol=1e-6, atol=0)


def test_a_format_does_not_take_files_of_two_others(tmp_path):
    sae = SAE(8, 16, "topk", 4)
    sae.save(tmp_path)
    formats.save(sae, tmp_path, "saelens")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="folder is .* it must hold an SAE in the format 'sparsify'"):
        formats.save(sae, tmp_path, "sparsify")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    formats.save(sae, tmp_path, "saelens")  # the same again is no other
