"""The explorer's data, made from small untrained autoencoders of `pygpt`, against what the autoencoders say."""
import json
from types import SimpleNamespace

import pytest
import torch

from saelib import SAE, sources, subjects, texts
from tools import make_explorer

N_LATENTS, N_WINDOWS = 96, 16
ABOUT = {"profile": "toy", "code": "0", "chunk": make_explorer.CHUNK}


def read(folder, name):
    """The value that a data file hands to the page."""
    text = (folder / f"{name}.js").read_text("utf8")
    start, end = f'saelibExplorer("{name}",', ");\n"
    assert text.startswith(start) and text.endswith(end)
    return json.loads(text[len(start): -len(end)])


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The data of two random autoencoders on a little text, and what they were made from."""
    folder = tmp_path_factory.mktemp("explorer")
    model, tokenizer = subjects.load("pygpt")
    ids = subjects.windows(texts.documents("python", "test"), tokenizer, N_WINDOWS)
    saes = {"topk": SAE(256, N_LATENTS, "topk", 8), "relu": SAE(256, N_LATENTS, "relu", 0.1, seed=1)}
    fits = {key: SimpleNamespace(sae=sae, metrics={}) for key, sae in saes.items()}
    x = sources.normalise(subjects.residual_stream(model, ids, 3).flatten(0, 1).float())
    make_explorer.write_data(folder, fits, model, tokenizer, ids, x.mean(0), 4, ABOUT)
    return SimpleNamespace(folder=folder, model=model, tokenizer=tokenizer, ids=ids, x=x, saes=saes)


@pytest.mark.parametrize("key", ["topk", "relu"])
def test_frequencies_and_maxima_are_those_of_encode(toy, key):
    z = toy.saes[key].encode(toy.x)
    index = read(toy.folder, "index")["saes"][key]
    assert index["frequency"] == [round(1e6 * float(f)) for f in (z > 0).double().mean(0)]
    assert torch.allclose(torch.tensor(index["max"]) / 1000, z.amax(0), atol=6e-4)


@pytest.mark.parametrize("key", ["topk", "relu"])
def test_every_context_shows_the_activations_of_its_tokens_and_of_the_twin(toy, key):
    other = {"topk": "relu", "relu": "topk"}[key]
    own, theirs = (toy.saes[name].encode(toy.x).view(N_WINDOWS, -1, N_LATENTS) for name in (key, other))
    index, text = read(toy.folder, "index"), read(toy.folder, "text")
    for i in (0, make_explorer.CHUNK - 1, make_explorer.CHUNK, N_LATENTS - 1):
        latent = read(toy.folder, f"{key}-{i // make_explorer.CHUNK}")[i % make_explorer.CHUNK]
        for window, start, peak, end, fires, twin in latent["contexts"]:
            assert text[str(window)] == toy.ids[window].tolist()
            assert own[window, :, i].argmax() == peak and start <= peak < end
            for pairs, z in ((fires, own[window, start:end, i]),
                             (twin, theirs[window, start:end, index["saes"][key]["twin"][i]])):
                shown = torch.zeros(end - start)
                shown[torch.tensor(pairs[::2], dtype=torch.int64)] = torch.tensor(pairs[1::2]).float() / 1000
                assert torch.allclose(shown, z, atol=6e-4)


def test_histograms_count_every_token_that_fires(toy):
    fires = (toy.saes["topk"].encode(toy.x) > 0).sum(0).tolist()
    shown = [sum(latent["histogram"]) for part in (0, 1) for latent in read(toy.folder, f"topk-{part}")]
    assert shown == fires


def test_a_program_shows_what_encode_says_and_its_own_measures(toy):
    program = read(toy.folder, "program-0")
    text = next(iter(make_explorer.PROGRAMS.values()))
    assert toy.tokenizer.decode(program["tokens"]) == text
    ids = torch.tensor([[toy.tokenizer.eos_token_id, *program["tokens"]]])
    x = sources.normalise(subjects.residual_stream(toy.model, ids, 3)[0].float())[1:]
    for key, sae in toy.saes.items():
        z = sae.encode(x)
        assert program[key]["l0"] == (z > 0).sum(1).tolist()
        for active, row in zip(program[key]["active"], z):
            assert active[::2] and torch.allclose(row[active[::2]], torch.tensor(active[1::2]) / 1000, atol=6e-4)


def test_the_factor_undoes_a_shrinkage_that_we_made():
    sae = SAE(8, 16, "relu", 0.1).requires_grad_(False)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    z = sae.encode(x)
    mended = [make_explorer.token_measures(sae, x, scale * z, x.mean(0))["factor"] for scale in (1.0, 0.5)]
    assert all(abs(2 * whole - half) <= 2 for whole, half in zip(*mended))


def test_the_direct_effect_is_what_the_final_norm_and_the_unembedding_make_of_a_small_push(toy):
    sae = toy.saes["topk"]
    ids = toy.ids[:4]
    kept = []
    handle = toy.model.transformer.ln_f.register_forward_hook(lambda module, inputs, output: kept.append(inputs[0]))
    with torch.no_grad():
        toy.model(ids)
    handle.remove()
    stream, row, push = kept[0].flatten(0, 1), sae.W_dec[7].detach(), 1e-2
    with torch.no_grad():
        logits = [toy.model.lm_head(toy.model.transformer.ln_f(stream + scale * row)) for scale in (0, push)]
    measured = ((logits[1] - logits[0]) / push).mean(0)
    predicted = make_explorer.direct_effect(toy.model, ids, sae, 1.0, torch.ones(N_LATENTS))[7]
    assert torch.corrcoef(torch.stack([measured - measured.mean(), predicted]))[0, 1] > 0.9


def test_the_tokens_that_a_latent_fires_on_come_with_their_shares(toy):
    z = torch.zeros(4, 2)
    z[:, 0] = torch.tensor([3.0, 1.0, 0.0, 4.0])
    assert make_explorer.token_shares(z, torch.tensor([[5, 6, 7, 5]]), 10) == [[5, 88, 6, 12], []]


def test_the_data_of_the_largest_profile_stay_small(toy):
    from saelib.profiles import PROFILES

    chunks = [path.stat().st_size for key in toy.saes for path in toy.folder.glob(f"{key}-*.js")]
    of_a_latent = sum(chunks) / (2 * N_LATENTS) / 4  # four contexts here, of a latent that fires on much
    for profile, limit in (("quick", 3e6), ("laptop", 8e6)):
        settings = PROFILES["explorer"][profile]
        assert 2 * settings["n_latents"] * settings["n_contexts"] * of_a_latent < limit


def test_every_program_fits_the_context(toy):
    assert [title for title, _ in make_explorer.sample_programs(toy.tokenizer)] == list(make_explorer.PROGRAMS)


def test_the_hash_follows_the_settings():
    assert make_explorer.code_hash("quick") != make_explorer.code_hash("laptop")
