"""The sparse autoencoder: two matrices, two biases and a method."""
import json
from collections.abc import Callable
from functools import partial, reduce
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from saelib import kernels, methods, native, pairs, relu_path
from saelib.checks import check_number, is_whole, require
from saelib.files import json_of, reading, write_whole
from saelib.normalisation import UNIT_NORM, check_normalisation, check_normalised, normalise, size_and_mean

FORMAT = "saelib-1"
PAIRS = {"sparse": pairs.Active, "native": native.Active, "dense": pairs.Active}  # of a path; dense in AuxK alone
# floats read as integers of their size keep their sign: so `> 0` means the same, and integers compare faster
WHOLE = {2: torch.int16, 4: torch.int32, 8: torch.int64}
SPARSE = torch.float32, torch.float64  # the types that a CPU has sparse products for, with their gradients
# tokens counted at once on a CPU: `!= 0` is summed as int64, which for a whole batch would take fresh memory
COUNTED = 256


class Output(NamedTuple):
    """What one forward pass leaves. `active` is None where `latents` are all of them, [batch, n_latents]: on the dense
    path, and for ReLU. Else `latents` are the values of those that were chosen, [batch, k], and `active` says which
    these are; `largest(m)` computes all three anew for the m largest of the same tokens."""
    x_hat: Tensor
    latents: Tensor
    active: pairs.Active | None
    largest: Callable[[int], tuple[Tensor, Tensor, pairs.Active]] | None = None

    def fired(self) -> Tensor:
        """Which latents were active for any token, [n_latents]."""
        if self.active is not None:
            return self.active.fired(self.latents)
        return self.latents.view(WHOLE[self.latents.itemsize]).amax(0) > 0

    def l0(self) -> Tensor:
        """How many latents were active for a token, on average."""
        blocks = [self.latents] if self.latents.is_cuda else self.latents.split(COUNTED)
        return sum((rows != 0).sum() for rows in blocks) / len(self.x_hat)


class SAE(nn.Module):
    """A sparse autoencoder with a single hidden layer.

    z = act(W_enc (x - b_pre) + b_enc),  x_hat = W_dec^T z + b_pre

    `W_enc` and `W_dec` are both [n_latents, d_model], one row a latent: `W_dec` is the transpose of the paper's.
    At the start `W_enc` equals `W_dec`, whose rows are random unit vectors, but for a method that wants its encoder's
    rows of another length (`encoder_norm`); they are not tied after that.

    Args:
        d_model: size of an activation.
        n_latents: how many latents.
        method: a key of `METHODS`.
        sparsity: the value of the method's knob, k or an L1 coefficient; a k of 32 if None.
        normalisation: what was done to the inputs that this SAE expects (see `saelib.normalisation.normalise`).
        seed: of the initial directions.

    Raises:
        ValueError: a size below 1, an unknown method or normalisation, or a sparsity that the method does not take.

    Paper: §2.2, Eq. (1)
    """

    def __init__(self, d_model: int, n_latents: int, method: str = "topk", sparsity: float | None = None, *,
                 normalisation: str = "none", seed: int = 0):
        super().__init__()
        for name, value in (("d_model", d_model), ("n_latents", n_latents)):
            require(is_whole(value) and value >= 1, name, value, "a whole number, 1 or more")
        check_normalisation(normalisation)
        d_model, n_latents = int(d_model), int(n_latents)
        self.d_model, self.n_latents, self.normalisation = d_model, n_latents, normalisation
        self.method = methods.make(method, n_latents, sparsity)
        rows = torch.randn(n_latents, d_model, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
        rows /= rows.norm(dim=1, keepdim=True)
        self.W_enc, self.W_dec = nn.Parameter(self.method.encoder_norm * rows), nn.Parameter(rows)
        self.b_enc, self.b_pre = nn.Parameter(torch.zeros(n_latents)), nn.Parameter(torch.zeros(d_model))

    def check(self, x: Tensor) -> None:
        """Raise ValueError unless x is a tensor [batch, d_model] of floating-point numbers."""
        require(isinstance(x, Tensor), "x", type(x).__name__, "a tensor")
        require(x.is_floating_point(), "x", f"of {x.dtype}", "of floating-point numbers")
        if x.dim() != 2 or x.shape[1] != self.d_model:
            raise ValueError(f"x has shape {list(x.shape)}: it must be [batch, d_model = {self.d_model}]")

    def tokens(self, x: Tensor) -> Float[Tensor, "batch d_model"]:
        """Activations of any shape [..., d_model], one below another. Raise ValueError if they are something else."""
        require(isinstance(x, Tensor), "x", type(x).__name__, "a tensor")
        tokens = x.reshape(-1, x.shape[-1]) if x.dim() else x
        self.check(tokens)
        return tokens

    def pre_acts(self, x: Float[Tensor, "batch d_model"]) -> Float[Tensor, "batch n_latents"]:
        """W_enc (x - b_pre) + b_enc. What b_pre subtracts is a constant here, and its gradient goes by way of the bias,
        where it costs a vector, not a matrix."""
        constant = self.b_pre.detach()
        return F.linear(x - constant, self.W_enc, self.b_enc - self.W_enc @ (self.b_pre - constant))

    def encode(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch n_latents"]:
        """The latents z of x, dense, with exact zeros. For an SAE of normalised activations x is what `normalised`
        makes of them, and anything else raises ValueError. Paper: §2.2, Eq. (1)"""
        tokens = self.tokens(x)
        self.check_normalised(tokens)
        return self.method(self.pre_acts(tokens.to(self.W_enc.dtype))).view(*x.shape[:-1], self.n_latents)  # Eq. (1)

    def decode(self, latents: Float[Tensor, "*batch n_latents"]) -> Float[Tensor, "*batch d_model"]:
        """The reconstruction x_hat of dense latents. Paper: §2.2, Eq. (1)"""
        require(latents.shape[-1:] == (self.n_latents,), "latents", f"of shape {list(latents.shape)}",
                f"[..., n_latents = {self.n_latents}]")
        return latents @ self.W_dec + self.b_pre  # Eq. (1); under autocast the sum stays in the type of b_pre

    def run(self, x: Float[Tensor, "batch d_model"], path: str = "sparse", precision: str = "fp32",
            scratch: relu_path.Scratch | None = None, copies: dict[str, Tensor] | None = None) -> Output:
        """One forward pass with all that it makes.

        Args:
            x: activations; they are taken in the type of the weights.
            path: "sparse" never forms the dense latents where the activation function is TopK's, but for weights of 16
                bits on a CPU; where it is ReLU's it forms them, and multiplies only the active ones once they are few;
                "native" is the same with parts compiled for this CPU (see `saelib.native`); "dense" is the plain twin.
            precision: "fp32"; "bf16" selects the latents of TopK in bfloat16, and multiplies matrices in it elsewhere
                and on a GPU. Weights stay in float32.
            scratch: memory for dense latents, which the next pass that gets it overwrites; fresh memory if None.
            copies: copies of the weights that a training loop renews with them (see `saelib.kernels.autoencode`).

        Returns:
            `Output`: x_hat, and the latents of that path.
        """
        self.check(x)
        x = x.to(self.W_enc.dtype)
        require(path in PAIRS, "path", path, "'sparse', 'native' or 'dense'")
        require(precision in ("fp32", "bf16"), "precision", precision, "'fp32' or 'bf16'")
        if path == "native":
            native.check(x, self.W_enc)
        kernel = methods.kernel(self.method) if path != "dense" else None
        require(path != "native" or kernel is not None, "path", path,
                "'sparse' or 'dense' for an activation function that has no kernel")
        if kernel == "largest" and not x.is_cuda and x.dtype not in SPARSE:
            kernel = None
        # a caller's autocast is none of ours; its cache is shared between threads, and so between members of a sweep
        with torch.autocast(x.device.type, torch.bfloat16, kernel is None and precision == "bf16", cache_enabled=False):
            if kernel == "largest":
                again = partial(kernels.autoencode, x, self.b_pre, self.W_enc, self.b_enc, self.W_dec, b_out=self.b_pre,
                                precision=precision, kind=PAIRS[path], copies=copies)
                return Output(*again(self.method.k, choice=self.method.select), again)
            if kernel == "relu":
                return Output(*relu_path.relu(x, self.b_pre, self.W_enc, self.b_enc, self.W_dec, precision, scratch,
                                              path == "native"), None)
            latents = self.method(self.pre_acts(x))
            return Output(self.decode(latents), latents, None)

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The reconstruction of a model's activations x, as a hook hands them over: in their type, shape and units. An
        SAE of normalised activations normalises them first, and scales and shifts back what it makes of them."""
        tokens = self.tokens(x)
        size, mean = size_and_mean(tokens) if self.normalisation == UNIT_NORM else (1, 0)
        return (self.run(self.normalised(tokens)).x_hat * size + mean).to(x.dtype).view(x.shape)

    def normalised(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """A model's activations as this SAE expects its inputs: what `encode`, `run` and `saelib.evaluate` take."""
        return normalise(x) if self.normalisation == UNIT_NORM else x

    def check_normalised(self, x: Float[Tensor, "batch d_model"]) -> None:
        """Raise ValueError unless x is as this SAE expects its inputs."""
        check_normalised("x", x, self.normalisation, "what `SAE.normalised` makes of activations")

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Scale each decoder row to unit norm. Paper: Appendix A.1"""
        self.W_dec /= self.W_dec.norm(dim=1, keepdim=True).clamp_min(torch.finfo(self.W_dec.dtype).tiny)

    def extra_repr(self) -> str:
        return (f"d_model={self.d_model}, n_latents={self.n_latents}, method={self.method.key!r}, "
                f"{self.method.knob}={self.method.sparsity:g}, normalisation={self.normalisation!r}")

    @torch.no_grad()
    def remove_parallel_gradient(self) -> None:
        """Remove from each decoder row's gradient the part parallel to the row: it would only change the norm,
        which is fixed, and it would disturb Adam's moments. Paper: Appendix A.1"""
        grad, rows = self.W_dec.grad, self.W_dec
        along = torch.bmm(grad[:, None], rows[:, :, None])[:, 0]  # a product of each pair of rows: no third matrix
        grad.addcmul_(along, rows, value=-1)

    def save(self, folder: str | Path) -> None:
        """Write `sae.safetensors` and `sae.json` into `folder`, both whole or neither.

        Raises:
            ValueError: weights that are not finite, or what lies there is of another format.
        """
        about = {"format": FORMAT, "d_model": self.d_model, "n_latents": self.n_latents, "method": self.method.key,
                 "sparsity": self.method.sparsity, "normalisation": self.normalisation}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        require(all(tensor.isfinite().all() for tensor in tensors.values()), "sae", "one with NaN or Inf", "finite")
        folder, write = Path(folder), partial(save_file, tensors)
        write_whole({folder / "sae.safetensors": write, folder / "sae.json": json_of(about)})


def load(folder: str | Path) -> SAE:
    """Read an SAE that `SAE.save` wrote, in the type that it had. To train one of 16 bits call `.float()` first.

    Raises:
        ValueError: the folder holds no SAE of this format, or its tensors do not fit its description.
    """
    folder = Path(folder)
    with reading("folder", folder, "hold the sae.json and sae.safetensors that `SAE.save` writes"):
        about = json.loads((folder / "sae.json").read_text())
        require(about.pop("format", None) == FORMAT, "folder", str(folder), f"one whose sae.json says {FORMAT!r}")
        check_number("sparsity", about.get("sparsity"), 0)
        sae = SAE(**about)
        tensors = load_file(folder / "sae.safetensors")
        for name, own in sae.state_dict().items():
            if name not in tensors or tensors[name].shape != own.shape or not tensors[name].isfinite().all():
                raise ValueError(f"folder is {str(folder)!r}: {name} must be a tensor of shape {list(own.shape)}, of "
                                 f"finite numbers")
        require(tensors.keys() == sae.state_dict().keys(), "folder", str(folder),
                f"one with no other tensors than {', '.join(sae.state_dict())}")
        sae.to(reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()))).load_state_dict(tensors)
    return sae.eval()


def geometric_median(x: Float[Tensor, "batch d_model"], n_steps: int = 50) -> Float[Tensor, " d_model"]:
    """The point with the least sum of distances to the rows of x, by Weiszfeld's iteration.

    m <- Σ_b x_b / ||x_b - m||  /  Σ_b 1 / ||x_b - m||

    Args:
        x: activations; a few thousand rows are enough.
        n_steps: iterations at most.

    Returns:
        The median, in the units of x.

    Paper: Appendix A.1 (initial b_pre)
    """
    dtype, x = x.dtype, x.float() if x.itemsize < 4 else x  # a half has no room for what is tiny
    median = x.mean(0)
    tiny = (1e-8 * (x - median).norm(dim=1).mean()).clamp_min(torch.finfo(x.dtype).tiny)
    for _ in range(n_steps):
        weight = tiny / (x - median).norm(dim=1).clamp_min(tiny)
        previous, median = median, weight @ x / weight.sum()
        if (median - previous).norm() <= 100 * tiny:
            break
    return median.to(dtype)
