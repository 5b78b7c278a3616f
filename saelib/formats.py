"""SAEs in the files of other libraries: written for them to load, and read from what they saved.

All of them keep two matrices and two biases, under names of their own and one or the other way round. What differs in
substance is what happens to an input first. Where a library normalises it by layer norm, that is our unit norm up to
one factor,

    LayerNorm(x) = s x',  s = sqrt(d_model - 1),  x' = (x - mean_d(x)) / ||x - mean_d(x)||,

so W_enc / s, s W_dec and s b_pre make the same latents, and the same reconstruction once it is scaled back. Where it
does not, an SAE of normalised activations is written as it is, and wants its inputs normalised there too, as
`SAE.normalised` does it. dictionary_learning scales the decoder's rows to unit norm when it loads a ReLU SAE; training
here leaves them so. In use Multi-TopK is TopK, and BatchTopK a JumpReLU whose threshold is the same for all latents.
"""
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from saelib.checks import check_number, require
from saelib.files import Writer, json_of, reading, write_whole
from saelib.normalisation import UNIT_NORM
from saelib.sae import SAE

# the version whose files are written: without one its loader takes them for older ones, and drops their metadata
SAELENS = "6.0.0"


def build(W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_pre: Tensor, method: str, sparsity: float | None,
          normalisation: str = "none", n_latents: int | None = None, d_model: int | None = None) -> SAE:
    """An SAE of these weights, both matrices with one row a latent. The sizes are what the file says, if it does."""
    for name, size, own in (("n_latents", n_latents, len(W_enc)), ("d_model", d_model, W_enc.shape[1])):
        require(size in (None, own), name, size, f"{own}, as the encoder has it")
    check_number("k", sparsity, 0)
    sae = SAE(W_enc.shape[1], len(W_enc), method, sparsity, normalisation=normalisation)
    for name, theirs in (("W_enc", W_enc), ("b_enc", b_enc), ("W_dec", W_dec), ("b_pre", b_pre)):
        own = getattr(sae, name).detach()
        require(theirs.shape == own.shape, name, f"of shape {list(theirs.shape)}", f"of shape {list(own.shape)}")
        require(bool(theirs.isfinite().all()), name, "a tensor with NaN or Inf", "of finite numbers")
        own.copy_(theirs)
    return sae.eval()


def scaled(W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_pre: Tensor,
           scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The weights that do to `scale` times an input what these do to the input."""
    return W_enc / scale, b_enc, W_dec * scale, b_pre * scale


def layer_norm_scale(d_model: int) -> float:
    """The norm of a layer-normalised vector, whose deviation is counted over d_model - 1."""
    return (d_model - 1) ** 0.5


def weights(sae: SAE, scale: float = 1.0) -> list[Tensor]:
    """W_enc, b_enc, W_dec and b_pre on the CPU, for inputs that are `scale` times what the SAE was trained on."""
    own = (p.detach().float().cpu() for p in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_pre))
    return [tensor.contiguous() for tensor in scaled(*own, scale)]


def write_saelens(sae: SAE, **metadata) -> list[Writer]:
    key, is_normalised = sae.method.key, sae.normalisation == UNIT_NORM
    kinds = {"topk": "topk", "multi_topk": "topk", "relu": "standard", "batchtopk": "jumprelu"}
    require(key in kinds, "method", key, f"one of {', '.join(kinds)} for the format 'saelens'")
    scale = layer_norm_scale(sae.d_model) if is_normalised else 1.0
    W_enc, b_enc, W_dec, b_pre = weights(sae, scale)
    tensors = {"W_enc": W_enc.t().contiguous(), "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_pre}
    about = {"architecture": kinds[key], "d_in": sae.d_model, "d_sae": sae.n_latents, "dtype": "float32",
             "device": "cpu",
             "apply_b_dec_to_input": True, "normalize_activations": "layer_norm" if is_normalised else "none",
             "reshape_activations": "none", "metadata": metadata | {"sae_lens_version": SAELENS}}
    if kinds[key] == "topk":
        about |= {"k": sae.method.k, "rescale_acts_by_decoder_norm": False}
    if kinds[key] == "jumprelu":
        tensors["threshold"] = sae.method.learnt().detach().float().cpu().expand(sae.n_latents).contiguous()
        about["metadata"]["k"] = sae.method.k
    return [partial(save_file, tensors), json_of(about)]


def read_saelens(tensors_at: Path, about_at: Path) -> SAE:
    about, tensors = json.loads(about_at.read_text()), load_file(tensors_at)
    kind, normalised = about["architecture"], about.get("normalize_activations") or "none"
    require(kind in ("topk", "standard", "jumprelu"), "architecture", kind, "'topk', 'standard' or 'jumprelu'")
    # until version 6 beside it
    act = about.get("activation_fn_str") or about.get("activation_fn") or ("topk" if kind == "topk" else "relu")
    require(act in ("topk", "relu"), "activation_fn", act, "'topk' or 'relu'")
    require(not about.get("finetuning_scaling_factor"), "finetuning_scaling_factor", True, "false")
    require(about.get("reshape_activations", "none") == "none", "reshape_activations",
            about.get("reshape_activations"), "'none'")
    require(normalised in ("none", "layer_norm"), "normalize_activations", normalised, "'none' or 'layer_norm'")
    W_enc_t, b_enc, W_dec, b_pre = (tensors[name].float() for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
    W_enc = W_enc_t.t()
    if not about.get("apply_b_dec_to_input", True):
        b_enc = b_enc + W_enc @ b_pre
    if about.get("rescale_acts_by_decoder_norm"):  # its latents are chosen, and read, as if the decoder had unit rows
        norm = W_dec.norm(dim=1)
        W_enc, b_enc, W_dec = W_enc * norm[:, None], b_enc * norm, W_dec / norm[:, None]
    scale = 1 / layer_norm_scale(W_enc.shape[1]) if normalised == "layer_norm" else 1.0
    k = about.get("k") or (about.get("activation_fn_kwargs") or {}).get("k")
    method = ("topk", k) if act == "topk" else ("relu", 0.0)
    if kind == "jumprelu":
        threshold, k = tensors["threshold"].float(), (about.get("metadata") or {}).get("k")
        is_batchtopk = bool(threshold.eq(threshold[0]).all()) and k is not None
        require(is_batchtopk, "architecture", kind, "a BatchTopK SAE's, with one threshold for all latents and k in "
                "the metadata")
        method = "batchtopk", k
    sae = build(*scaled(W_enc, b_enc, W_dec, b_pre, scale), *method,
                UNIT_NORM if normalised == "layer_norm" else "none", about.get("d_sae"), about.get("d_in"))
    if kind == "jumprelu":
        sae.method.threshold.copy_(threshold[0])
        sae.method.n_cuts.fill_(1)
    return sae


def write_sparsify(sae: SAE) -> list[Writer]:
    require(sae.method.key in ("topk", "multi_topk"), "method", sae.method.key,
            "topk or multi_topk for the format 'sparsify'")
    W_enc, b_enc, W_dec, b_pre = weights(sae)
    tensors = {"encoder.weight": W_enc, "encoder.bias": b_enc, "W_dec": W_dec, "b_dec": b_pre}
    about = {"activation": "topk", "num_latents": sae.n_latents, "k": sae.method.k, "d_in": sae.d_model,
             "normalize_decoder": True, "multi_topk": False, "skip_connection": False, "transcode": False,
             "method": sae.method.key, "normalisation": sae.normalisation}  # its own multi_topk would decode 4k latents
    return [partial(save_file, tensors), json_of(about)]


def read_sparsify(tensors_at: Path, about_at: Path) -> SAE:
    about, tensors = json.loads(about_at.read_text()), load_file(tensors_at)
    require(about.get("activation", "topk") == "topk", "activation", about.get("activation"), "'topk'")
    for name in ("skip_connection", "transcode"):
        require(not about.get(name), name, about.get(name), "false: what predicts other activations is no autoencoder")
    method = about.get("method", "multi_topk" if about.get("multi_topk") else "topk")
    return build(*(tensors[name].float() for name in ("encoder.weight", "encoder.bias", "W_dec", "b_dec")), method,
                 about["k"], about.get("normalisation", "none"), about.get("num_latents") or None, about.get("d_in"))


def write_dictionary_learning(sae: SAE) -> list[Writer]:
    kinds = {"topk": "AutoEncoderTopK", "multi_topk": "AutoEncoderTopK", "relu": "AutoEncoder"}
    require(sae.method.key in kinds, "method", sae.method.key,
            f"one of {', '.join(kinds)} for the format 'dictionary_learning'")
    W_enc, b_enc, W_dec, b_pre = weights(sae)
    tensors = {"encoder.weight": W_enc, "encoder.bias": b_enc, "decoder.weight": W_dec.t().contiguous()}
    trainer = {"dict_class": kinds[sae.method.key], "activation_dim": sae.d_model, "dict_size": sae.n_latents}
    if sae.method.key != "relu":
        tensors |= {"b_dec": b_pre, "k": torch.tensor(sae.method.k, dtype=torch.int), "threshold": torch.tensor(-1.0)}
        trainer["k"] = sae.method.k
    else:
        tensors["bias"] = b_pre
    about = {"trainer": trainer, "normalisation": sae.normalisation}
    return [partial(torch.save, tensors), json_of(about)]


def read_dictionary_learning(tensors_at: Path, about_at: Path) -> SAE:
    about, tensors = json.loads(about_at.read_text()), torch.load(tensors_at, weights_only=True, map_location="cpu")
    kind = about["trainer"]["dict_class"]
    require(kind in ("AutoEncoderTopK", "AutoEncoder"), "dict_class", kind, "'AutoEncoderTopK' or 'AutoEncoder'")
    method, b_pre = (("topk", int(tensors["k"])), "b_dec") if kind == "AutoEncoderTopK" else (("relu", 0.0), "bias")
    return build(tensors["encoder.weight"].float(), tensors["encoder.bias"].float(),
                 tensors["decoder.weight"].float().t(), tensors[b_pre].float(),
                 *method, about.get("normalisation", "none"), about["trainer"].get("dict_size"),
                 about["trainer"].get("activation_dim"))


def write_openai(sae: SAE) -> list[Writer]:
    key = sae.method.key
    require(key in ("topk", "multi_topk", "relu"), "method", key,
            "one of topk, multi_topk, relu for the format 'openai'")
    is_topk, scale = key != "relu", layer_norm_scale(sae.d_model) if key != "relu" else 1.0
    fits = UNIT_NORM if is_topk else "none"
    require(sae.normalisation == fits, "normalisation", sae.normalisation,
            f"{fits!r} for a {key} SAE in the format 'openai', which always does that")
    W_enc, b_enc, W_dec, b_pre = weights(sae, scale)
    state = {"pre_bias": b_pre, "latent_bias": b_enc, "encoder.weight": W_enc, "decoder.weight": W_dec.t().contiguous(),
             "stats_last_nonzero": torch.zeros(sae.n_latents, dtype=torch.long),
             "latents_activation_frequency": torch.ones(sae.n_latents),
             "latents_mean_square": torch.zeros(sae.n_latents), "activation": "TopK" if is_topk else "ReLU"}
    if is_topk:
        state["activation_state_dict"] = {"k": sae.method.k, "postact_fn": "ReLU"}
    return [partial(torch.save, state)]


def read_openai(state_at: Path) -> SAE:
    state = torch.load(state_at, weights_only=True, map_location="cpu")
    kind = state.get("activation", "ReLU")
    require(kind in ("TopK", "ReLU"), "activation", kind, "'TopK' or 'ReLU'")
    names = "encoder.weight", "latent_bias", "decoder.weight", "pre_bias"
    W_enc, b_enc, W_dec, b_pre = (state[name].float() for name in names)
    if kind == "ReLU":
        return build(W_enc, b_enc, W_dec.t(), b_pre, "relu", 0.0)
    choice, scale = state["activation_state_dict"], 1 / layer_norm_scale(W_enc.shape[1])
    require(choice["postact_fn"] == "ReLU", "postact_fn", choice["postact_fn"], "'ReLU'")
    return build(*scaled(W_enc, b_enc, W_dec.t(), b_pre, scale), "topk", choice["k"], UNIT_NORM)


FORMATS = {"saelens": (write_saelens, read_saelens, "sae_weights.safetensors", "cfg.json"),
           "sparsify": (write_sparsify, read_sparsify, "sae.safetensors", "cfg.json"),
           "dictionary_learning": (write_dictionary_learning, read_dictionary_learning, "ae.pt", "config.json"),
           "openai": (write_openai, read_openai, "autoencoder.pt")}


def of(format: str) -> tuple[Callable[..., list[Writer]], Callable[..., SAE], list[str]]:
    """What writes a format, what reads it, and its files: weights, and what describes them."""
    require(format in FORMATS, "format", format, f"one of {', '.join(FORMATS)}")
    write, read, *files = FORMATS[format]
    return write, read, files


def save(sae: SAE, folder: str | Path, format: str, **metadata) -> None:
    """Write an SAE into `folder` as another library loads it.

    Args:
        sae: the autoencoder.
        folder: made if it is not there.
        format: "saelens", "sparsify", "dictionary_learning" or "openai".
        metadata: where the SAE belongs, as SAELens calls it: `model_name`, `hook_name`, `context_size`, `prepend_bos`
            and what else it should keep. The other formats have no place for it.

    Raises:
        ValueError: an unknown format, an SAE or metadata that it cannot hold, a BatchTopK SAE that was never trained,
            or a folder with files of these names that are no SAE in this format. Nothing is written then.
    """
    require(isinstance(sae, SAE), "sae", type(sae).__name__, "an SAE: of a fit it is `.sae`")
    write, _, files = of(format)
    require(not metadata or write is write_saelens, "format", format, f"'saelens' to keep {', '.join(metadata)}")
    writers = write(sae, **metadata)
    if all(Path(folder, name).exists() for name in files):
        load(folder, format)  # these names may be those of two other formats
    write_whole({Path(folder, name): writer for name, writer in zip(files, writers)})


def load(folder: str | Path, format: str) -> SAE:
    """Read an SAE that another library wrote. An L1 coefficient is not kept there: a ReLU SAE comes back with 0. One of
    sparsify with `multi_topk` comes back as Multi-TopK, which decodes k latents in use, where sparsify decodes 4k.

    Args:
        folder: where its files lie.
        format: "saelens", "sparsify", "dictionary_learning" or "openai".

    Returns:
        The SAE, in evaluation mode. Its `normalisation` says what its inputs must have gone through.

    Raises:
        ValueError: an unknown format, an architecture that is not here, or files that are missing or damaged.
    """
    _, read, files = of(format)
    with reading("folder", Path(folder), f"hold an SAE in the format {format!r}"):
        return read(*(Path(folder, name) for name in files))
