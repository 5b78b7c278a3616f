"""Make the data of the latent explorer: a TopK and a ReLU autoencoder of `pygpt`, looked into latent by latent.

    python tools/make_explorer.py PROFILE        into runs/PROFILE/explorer/, a finished one reused

The page asks for its data with script tags, because a page opened from a folder may not fetch: each file calls
`saelibExplorer(name, value)`. Activations are in thousandths. The files:

    about.json    what was trained, on what, by which code; read when the page is built
    index.js      about, the tokens, and for each latent what the list shows and the search looks at
    text.js       the held-out windows of tokens that contexts point into
    KEY-NUMBER.js CHUNK latents of one autoencoder
    program-NUMBER.js   one sample program through both
"""
import hashlib
import json
import os
import shutil
import sys
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.run import duration, processor, quieten, say  # noqa: E402

CHUNK = 64  # latents in one file
BINS = 20  # of the histograms
BEFORE, AFTER = 14, 8  # tokens of a context around its peak
N_TOKENS_SEARCHED, N_NEXT = 6, 8
MILLI = 1000
MOST_TRIES, NEAR = 3, 0.15  # runs of ReLU, and how far its L0 may be from TopK's
PROGRAMS = {
    "A function": '''\
def mean(values):
    """Return the arithmetic mean."""
    total = 0
    for value in values:
        total += value
    return total / len(values)
''',
    "A class": '''\
class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)

    def pop(self):
        return self.items.pop()
''',
    "Imports": '''\
import os
import sys
from collections import defaultdict

from pathlib import Path

__all__ = ["main", "usage"]
''',
    "Exceptions": '''\
try:
    with open(path, "rb") as f:
        data = f.read()
except OSError as e:
    raise ValueError("cannot read file") from e
finally:
    lock.release()
''',
    "Numbers and strings": '''\
x = 0x1F + 3.14 - 10 ** 6
name = "spam" + 'eggs'
text = f"{name!r}: {x:.2f}"
pairs = {"a": 1, "b": None, "c": True}
''',
    "A comment and a test": '''\
# Check that the list is sorted.
def test_sort(self):
    result = sorted([3, 1, 2])
    self.assertEqual(result, [1, 2, 3])
    self.assertTrue(result is not None)
''',
}


def settings_of(profile):
    from saelib import profiles

    return profiles.settings("explorer", profile)


def code_hash(profile):
    """Hash of all that decides the data of a profile."""
    from saelib import origin

    settings = vars(settings_of(profile)) | {"store": None}
    parts = [origin.code_hash().encode(), repr(settings).encode(), Path(__file__).read_bytes()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def folder_of(profile):
    return ROOT / "runs" / profile / "explorer"


def about_of(folder):
    """What is known about the data in a folder; {} where there is none."""
    path = folder / "about.json"
    return json.loads(path.read_text("utf8")) if path.exists() else {}


# Training


def train_pair(settings):
    """A TopK run, and of a few ReLU runs the one with the L0 nearest to it."""
    from saelib import profiles, runs

    def fit(method, sparsity):
        config = runs.RunConfig("pygpt", method, sparsity, settings.n_latents, settings.n_tokens, settings.batch_size,
                                profiles.lr_of("pygpt", method, settings.profile), 0, settings.source_tokens)
        say(f"explorer: training {method}, {sparsity:.3g}")
        return runs.fit_source(runs.open_source(config), config)

    topk, tried, l1_coef = fit("topk", settings.k), [], settings.l1_coef
    while len(tried) < MOST_TRIES:
        tried.append(fit("relu", l1_coef))
        ratio = tried[-1].metrics["l0"] / topk.metrics["l0"]
        if abs(ratio - 1) < NEAR:
            break
        l1_coef *= min(4, max(0.25, ratio))  # L0 falls about as 1 / l1_coef
    return {"topk": topk, "relu": min(tried, key=lambda run: abs(run.metrics["l0"] - topk.metrics["l0"]))}


# Measuring


def read_windows(model, ids):
    """Activations of windows of tokens, as the autoencoders expect them, and the size that normalising took away."""
    import torch

    from saelib import subjects
    from saelib.normalisation import normalise, size_and_mean

    streams = [subjects.residual_stream(model, piece).flatten(0, 1).float()
               for piece in ids.split(subjects.WINDOWS)]
    stream = torch.cat(streams)
    return normalise(stream), float(size_and_mean(stream)[0].mean())


def direct_effect(model, ids, sae, size, mean_active):
    """What each latent, at its mean activation when active, adds to the logit of each next token, [n_latents,
    n_tokens].

    An approximation, by the direct path: the decoder row, at the size that activations had before they were
    normalised, goes through the final layer norm and the unembedding. What the blocks after it make of it is left
    out, and the layer norm's own scale is held at its mean. Each row has its mean over tokens subtracted.
    """
    import torch

    kept = []
    final = model.transformer.ln_f
    handle = final.register_forward_hook(lambda module, inputs, output: kept.append(inputs[0]))
    with torch.no_grad():
        model(ids)
    handle.remove()
    spread = torch.sqrt(kept[0].var(-1, unbiased=False) + final.eps).mean()
    rows = sae.W_dec.detach() - sae.W_dec.detach().mean(1, keepdim=True)
    logits = (rows * final.weight) @ model.lm_head.weight.t() * (size / spread)
    return (logits - logits.mean(1, keepdim=True)) * mean_active[:, None]


def milli(values):
    return [round(MILLI * float(value)) for value in values]


def histogram(values):
    """How many of the positive values fall into each of BINS equal steps from 0 to the largest."""
    if not len(values):
        return [0] * BINS
    return [int(n) for n in values.histc(BINS, 0, float(values.max()))]


def firing(values):
    """Non-zero values as [place, thousandths, place, thousandths, ...]."""
    places = values.nonzero().flatten().tolist()
    return [number for place, value in zip(places, milli(values[places])) for number in (place, value)]


def context(window, latents, twins):
    """The piece of a window around a latent's peak: [start, peak, end, what fires, what the twin does]."""
    peak = int(latents.argmax())
    start, end = max(0, peak - BEFORE), min(len(latents), peak + AFTER + 1)
    return [window, start, peak, end, firing(latents[start:end]), firing(twins[start:end])]


def token_shares(z, ids, n_vocabulary):
    """For each latent the tokens that it fires on and their shares, in percent, of its summed activation."""
    import torch

    mass = torch.zeros(n_vocabulary, z.shape[1]).index_add_(0, ids.flatten(), z)
    shares, tokens = (100 * mass / mass.sum(0).clamp_min(1e-12)).topk(N_TOKENS_SEARCHED, dim=0)
    return [[n for token, share in zip(t, s) if share >= 0.5 for n in (token, round(share))]
            for t, s in zip(tokens.t().tolist(), shares.t().tolist())]


def latents_of(z, other, twins, effect, n_contexts):
    """What the explorer shows of each latent, a dict each; z and other are [n_windows, context, n_latents]."""
    best = z.amax(1).topk(n_contexts, dim=0).indices.t().tolist()
    up, down = effect.topk(N_NEXT, dim=1), effect.topk(N_NEXT, dim=1, largest=False)
    for i, windows in enumerate(best):
        values, twin = z[:, :, i], other[:, :, twins[i]]
        shown = [w for w in windows if values[w].max() > 0]
        yield {
            "histogram": histogram(values[values > 0]),
            "contexts": [context(w, values[w], twin[w]) for w in shown],
            "raises": [[int(t), round(float(v), 2)] for v, t in zip(up.values[i], up.indices[i])],
            "lowers": [[int(t), round(float(v), 2)] for v, t in zip(down.values[i], down.indices[i])],
        }


def token_measures(sae, x, z, mean):
    """For each token: the size of its reconstruction, the factor that would mend it, its error, L0, and sum of latents.

    Sizes are about the mean activation. The factor multiplies all latents of the token: the least squared error
    that a common factor can reach is at <x - b_pre, x_hat - b_pre> / ||x_hat - b_pre||². Above 1, they are too small.
    """
    x_hat = sae.decode(z)
    about_mean = (x - mean).pow(2).sum(1)
    made = x_hat - sae.b_pre
    factor = ((x - sae.b_pre) * made).sum(1) / made.pow(2).sum(1).clamp_min(1e-12)
    size = (x_hat - mean).norm(dim=1) / about_mean.sqrt()
    error = (x - x_hat).pow(2).sum(1) / about_mean.mean()
    return {"size": milli(size), "factor": milli(factor), "error": milli(error), "l0": (z > 0).sum(1).tolist(),
            "sum": milli(z.sum(1))}


def program_through(saes, x, mean):
    """One program through each autoencoder: measures and active latents for each token, the largest first."""
    result = {}
    for key, sae in saes.items():
        z = sae.encode(x)
        active = []
        for row in z:
            order = row.argsort(descending=True)[: int((row > 0).sum())]
            active.append([n for i, value in zip(order.tolist(), milli(row[order])) for n in (i, value)])
        result[key] = {"active": active, **token_measures(sae, x, z, mean)}
    return result


# Writing


def write(folder, name, value):
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=True)
    (folder / f"{name}.js").write_text(f'saelibExplorer("{name}",{text});\n', encoding="utf8")


def sample_programs(tokenizer):
    """Title and token ids of each sample program, with the end-of-text token before it that the model knows."""
    import torch

    from saelib import subjects

    for title, text in PROGRAMS.items():
        ids = [tokenizer.eos_token_id, *tokenizer(text, verbose=False)["input_ids"]]
        if len(ids) > subjects.CONTEXT + 1:
            raise ValueError(f"program {title!r} has {len(ids)} tokens: at most {subjects.CONTEXT + 1} fit the context")
        yield title, torch.tensor([ids])


def describe(fit, n_latents):
    method = fit.sae.method
    numbers = ("l0", "normalized_mse", "dead_fraction")
    return {"label": method.label, "knob": method.knob, "sparsity": method.sparsity, "n_latents": n_latents,
            **{name: round(fit.metrics[name], 4) for name in numbers}}


def write_data(folder, fits, model, tokenizer, ids, mean, n_contexts, about):
    """All files of the explorer from two trained autoencoders and windows of held-out tokens."""
    import torch

    from saelib import subjects

    folder.mkdir(parents=True, exist_ok=True)
    saes = {key: fit.sae.cpu().eval().requires_grad_(False) for key, fit in fits.items()}
    x, size = read_windows(model, ids)
    z = {key: torch.cat([sae.encode(piece) for piece in x.split(4096)]) for key, sae in saes.items()}
    cosine = saes["topk"].W_dec @ saes["relu"].W_dec.t()
    nearest = {"topk": cosine.max(1), "relu": cosine.max(0)}
    index = {"about": about, "tokens": [tokenizer.decode([i]) for i in range(len(tokenizer))], "saes": {}}
    used = set()
    for key, other in (("topk", "relu"), ("relu", "topk")):
        fired = (z[key] > 0).sum(0)
        effect = direct_effect(model, ids[: subjects.WINDOWS], saes[key], size, z[key].sum(0) / fired.clamp_min(1))
        twins = nearest[key].indices.tolist()
        latents = list(latents_of(z[key].view(*ids.shape, -1), z[other].view(*ids.shape, -1), twins, effect,
                                  n_contexts))
        for start in range(0, len(latents), CHUNK):
            write(folder, f"{key}-{start // CHUNK}", latents[start: start + CHUNK])
        used |= {context[0] for latent in latents for context in latent["contexts"]}
        index["saes"][key] = {
            "frequency": [round(1e6 * n / len(x)) for n in fired.tolist()], "max": milli(z[key].amax(0)),
            "twin": twins, "cosine": milli(nearest[key].values), "fires_on": token_shares(z[key], ids, len(tokenizer)),
            "raises": effect.topk(N_NEXT, dim=1).indices.tolist(),
        }
    index["programs"] = []
    for number, (title, program) in enumerate(sample_programs(tokenizer)):
        activations = read_windows(model, program)[0][1:]
        write(folder, f"program-{number}", {"tokens": program[0, 1:].tolist(),
                                            **program_through(saes, activations, mean)})
        index["programs"].append(title)
    write(folder, "text", {window: ids[window].tolist() for window in sorted(used)})
    write(folder, "index", index)
    (folder / "about.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf8")


def make(profile):
    """Train and write a profile's data into a folder beside its place, and move it there when whole."""
    from saelib import runs, subjects, texts

    settings, folder, start = settings_of(profile), folder_of(profile), time.monotonic()
    fits = train_pair(settings)
    say("explorer: reading held-out text")
    model, tokenizer = subjects.load("pygpt")
    ids = subjects.windows(texts.documents("python", "test"), tokenizer, settings.text_tokens // subjects.CONTEXT)
    config = runs.RunConfig("pygpt", "topk", settings.k, settings.n_latents, settings.n_tokens,
                            source_tokens=settings.source_tokens)
    about = {
        "profile": profile, "code": code_hash(profile), "date": date.today().isoformat(), "hardware": processor(),
        "training_tokens": settings.n_tokens, "text_tokens": ids.numel(), "chunk": CHUNK,
        "saes": {key: describe(fit, settings.n_latents) for key, fit in fits.items()},
    }
    partial = folder.with_name("explorer.partial")
    shutil.rmtree(partial, ignore_errors=True)
    mean = runs.open_source(config).mean
    write_data(partial, fits, model, tokenizer, ids, mean, settings.n_contexts, about)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    size = sum(path.stat().st_size for path in folder.iterdir())
    say(f"explorer: {size / 1e6:.1f} MB in {duration(time.monotonic() - start)}")


def main():
    from saelib.profiles import PROFILES

    quieten()
    profile = (sys.argv[1:] or [""])[0]
    if profile not in PROFILES["explorer"]:
        raise SystemExit(f"unknown profile {profile!r}; profiles are: {', '.join(PROFILES['explorer'])}")
    about = about_of(folder_of(profile))
    if about.get("code") == code_hash(profile):
        say(f"explorer at {profile}: reusing the data of {about['date']}")
    else:
        make(profile)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\nInterrupted: nothing half-written was kept.") from None
