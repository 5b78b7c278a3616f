"""Where activations come from: what an SAE is trained on and judged by."""
import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path

import numpy
import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

from saelib.checks import FLOATS, as_tensor, require
from saelib.files import reading
from saelib.normalisation import UNIT_NORM, check_normalisation, check_normalised, normalise

FILE_TYPES = (".npy", ".safetensors")
PIECE_ROWS = 2**17  # tokens looked at in one go
SAMPLE_ROWS = 2**13
IDENTITY_ROWS = 256
MOST_FREQUENT = 0.9  # of a dictionary's features is on for this share of the tokens, at most
# far from the seeds of SAEs: with an SAE's own seed its first rows would BE the dictionary
DICTIONARY_SEED = 20_240_606


@dataclass(eq=False)
class Source:
    """Activations to train on and others, held out, to judge by.

    `shards` are training activations, each [n, d_model], of any float type and possibly mapped from disk;
    `held_out` is [n_held_out, d_model]; `mean` is the mean of the training activations.
    """
    name: str
    shards: list[Tensor]
    held_out: Tensor
    normalisation: str = "none"
    truth: Tensor | None = None
    mean: Tensor = field(init=False)

    def __post_init__(self):
        require(len(self.shards) > 0, "shards", self.shards, "a list of one tensor or more")
        check_normalisation(self.normalisation)
        self.shards = [as_tensor(shard).detach() for shard in self.shards]
        self.held_out = as_tensor(self.held_out).detach()
        for tensor in [*self.shards, self.held_out]:
            check_activations(tensor)
            check_normalised("source", tensor[:SAMPLE_ROWS], self.normalisation,
                             "activations that are normalised, as `from_tensor` does it")
            require(tensor.shape[1] == self.d_model, "source", f"of widths {tensor.shape[1]} and {self.d_model}",
                    "of one width, d_model")
        sums = sum(piece.float().sum(0, dtype=torch.float64) for shard in self.shards
                   for piece in shard.split(PIECE_ROWS))
        self.mean = (sums / self.n_tokens).float()
        require(bool((self.held_out != self.mean).any()), "source", "the same vector again and again",
                "activations that differ: there is nothing to explain otherwise")

    @property
    def d_model(self) -> int:
        return self.held_out.shape[1]

    @property
    def n_tokens(self) -> int:
        return sum(len(shard) for shard in self.shards)

    def identity(self) -> str:
        """A hash that tells these training activations from others: of their number, and of rows from all over them."""
        rows = torch.linspace(0, self.n_tokens - 1, min(self.n_tokens, IDENTITY_ROWS), dtype=torch.float64).long()
        return hashlib.sha256(f"{self.n_tokens}".encode() + self._gather(rows).cpu().numpy().tobytes()).hexdigest()[:16]

    def on(self, device: str) -> "Source":
        """The same source with its training activations on a GPU, if half of the memory that is free there can hold
        them: a batch is then gathered where it is used. On the CPU, or if they are too many, the source as it is (see
        `ahead`)."""
        n_bytes = sum(shard.nbytes for shard in self.shards)
        if device == "cpu" or 2 * n_bytes > torch.cuda.mem_get_info()[0]:
            return self
        there = copy(self)
        # one: a batch from many waits for the device
        there.shards = [torch.cat([shard.to(device) for shard in self.shards])]
        torch.cuda.current_stream().synchronize()  # members of a sweep read it in streams of their own
        return there

    def batches(self, batch_size: int, n_steps: int, seed: int, start: int = 0) -> Iterator[Tensor]:
        """Batches number `start` to `n_steps` of an endless shuffle: each epoch visits every token once, in an
        order that depends on `seed` and the epoch alone. A short last batch of an epoch is filled from the next."""
        n, epoch, order = self.n_tokens, -1, torch.empty(0, dtype=torch.int64)
        for step in range(start, n_steps):
            picked = []
            at, stop = step * batch_size, (step + 1) * batch_size
            while at < stop:
                if at // n != epoch:
                    epoch = at // n
                    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
                upto = min(stop, (epoch + 1) * n)
                picked.append(order[at - epoch * n: upto - epoch * n])
                at = upto
            yield self._gather(torch.cat(picked))

    def _gather(self, index: Tensor) -> Tensor:
        index = index.to(device := self.shards[0].device)
        if len(self.shards) == 1:
            return self.shards[0].index_select(0, index).float()  # half the time of [index]
        edges = torch.tensor([len(shard) for shard in self.shards], device=device).cumsum(0)
        shard_of = torch.bucketize(index, edges, right=True)
        batch = torch.empty(len(index), self.d_model, dtype=torch.float32, device=device)
        for number in shard_of.unique().tolist():
            here = shard_of == number
            first = int(edges[number - 1]) if number else 0
            batch[here] = self.shards[number].index_select(0, index[here] - first).float()
        return batch


def ahead(batches: Iterator[Tensor], pin: bool = True) -> Iterator[Tensor]:
    """The same batches, each gathered in a second thread while the one before it is used, so that a GPU does not wait
    for it.

    Args:
        batches: on the CPU.
        pin: put them into page-locked memory, from which a GPU copies without waiting.
    """
    def gather() -> Tensor | None:
        batch = next(batches, None)
        return batch.pin_memory() if pin and batch is not None else batch

    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(gather)
        while (batch := coming.result()) is not None:
            coming = pool.submit(gather)
            yield batch


def check_shape(x: Tensor) -> None:
    """Raise ValueError unless x is a non-empty [n_tokens, d_model] tensor of floats."""
    require(isinstance(x, Tensor), "source", type(x).__name__, "a tensor or an array")
    for holds, rule in ((x.dim() == 2, "be [n_tokens, d_model]"), (x.numel() > 0, "hold at least one token")):
        if not holds:
            raise ValueError(f"source has shape {list(x.shape)}: it must {rule}")
    dense_floats = x.dtype in FLOATS and x.layout == torch.strided
    require(dense_floats, "source", f"a tensor of {x.dtype}, {x.layout}",
            f"a dense one of {', '.join(map(str, FLOATS))}")


def check_activations(x: Tensor, first: int = 0) -> None:
    """Raise ValueError unless x is [n_tokens, d_model], not empty, finite; `first` is the number of its first row."""
    check_shape(x)
    for at, piece in zip(range(first, first + len(x), PIECE_ROWS), x.split(PIECE_ROWS)):
        finite = torch.isfinite(piece.float()).all(1)
        if not finite.all():
            bad = at + int((~finite).nonzero()[0])
            raise ValueError(f"source holds NaN or Inf, first in row {bad}: activations must be finite in float32")


def normalised_rows(x: Float[Tensor, "n_tokens d_model"]) -> Float[Tensor, "n_tokens d_model"]:
    """`normalise`, piece by piece: of many activations it would make several copies."""
    rows = torch.empty(x.shape, dtype=torch.float32)
    for piece, to in zip(x.split(PIECE_ROWS), rows.split(PIECE_ROWS)):
        to.copy_(normalise(piece))
    return rows


def from_tensor(x: Tensor | numpy.ndarray, name: str = "tensor", held_out_fraction: float = 0.1,
                normalisation: str = "none") -> Source:
    """A source from your own activations; the last tenth of the rows is held out.

    Args:
        x: [n_tokens, d_model], a tensor or an array.
        name: of the source.
        held_out_fraction: of the rows, from the end; above 0 and below 1.
        normalisation: "none", which takes them as they are, or "unit_norm" (see `saelib.normalisation.normalise`). An
            SAE that is trained on them keeps the word, so that other tools learn it too (see `saelib.formats`).

    Raises:
        ValueError: not [n_tokens, d_model], fewer than two tokens, not floating point, or not finite.
    """
    check_normalisation(normalisation)
    x = as_tensor(x)
    check_activations(x)
    if normalisation == UNIT_NORM:
        x = normalised_rows(x)
    train, held_out = halves(x, held_out_fraction)
    return Source(name, [train], held_out, normalisation)


def halves(x: Tensor, held_out_fraction: float = 0.1) -> tuple[Tensor, Tensor]:
    """Rows to train on, and the last ones, which are held out: at least one of each, or ValueError."""
    require(len(x) >= 2, "source", f"of shape {list(x.shape)}",
            "of at least two tokens, one to train on and one to hold out")
    require(isinstance(held_out_fraction, Real) and 0 < held_out_fraction < 1, "held_out_fraction", held_out_fraction,
            "above 0 and below 1")
    n_held_out = min(max(1, round(len(x) * held_out_fraction)), len(x) - 1)
    return x[:-n_held_out], x[-n_held_out:]


def from_file(path: Path, n_tokens: int) -> Source:
    """A source from a `.npy` or `.safetensors` file of one [n_tokens, d_model] array. What is kept is normalised."""
    with reading("subject", path, "be a readable .npy or .safetensors file of one array", ValueError):
        tensors = {"": as_tensor(numpy.load(path, mmap_mode="r"))} if path.suffix == ".npy" else load_file(path)
    require(len(tensors) == 1, "source", f"{path.name} with tensors {', '.join(tensors)}", "a file with one tensor")
    x, = tensors.values()
    check_shape(x)
    train, held_out = halves(x)
    train = train[:n_tokens]
    check_activations(train)
    check_activations(held_out, len(x) - len(held_out))
    return Source(path.name, [normalised_rows(train)], normalised_rows(held_out), UNIT_NORM)


def synthetic(n_tokens: int, *, d_model: int = 64, n_features: int = 256, l0: float = 8.0, exponent: float = 0.7,
              noise: float = 0.01, seed: int = 0) -> Source:
    """Activations made from a dictionary that we know.

    x = Σ_i c_i f_i + noise, normalised;  P(c_i > 0) ∝ i^(-exponent), but at most 0.9, Σ_i P(c_i > 0) = l0;
    c_i ~ U(0.5, 1.5)

    The features are random unit vectors with zero mean over the dimensions, so that normalising scales the
    coefficients and leaves the directions as they are.

    Args:
        n_tokens: training tokens; a tenth as many more are held out.
        d_model: size of an activation.
        n_features: directions in the dictionary.
        l0: mean number of active features a token.
        exponent: of the power law of the frequencies.
        noise: standard deviation of the noise in each dimension, before normalising.
        seed: of dictionary and tokens.

    Returns:
        A `Source` whose `truth` is the dictionary, [n_features, d_model].

    Ours, because only a known dictionary tells recovery from reconstruction.
    """
    require(0 < l0 <= MOST_FREQUENT * n_features, "l0", l0, f"above 0, and at most {MOST_FREQUENT} n_features")
    generator = torch.Generator().manual_seed(DICTIONARY_SEED + seed)
    features = normalise(torch.randn(n_features, d_model, generator=generator))
    probability = torch.arange(1, n_features + 1).float().pow(-exponent)
    for _ in range(20):  # no feature is on for more than nine tokens in ten: the others share what it would have had
        probability = (probability * (l0 / probability.sum())).clamp_max(MOST_FREQUENT)

    def sample(n: int) -> Tensor:
        pieces = []
        for rows in torch.arange(n).split(SAMPLE_ROWS):
            on = torch.rand(len(rows), n_features, generator=generator) < probability
            coefs = (0.5 + torch.rand(len(rows), n_features, generator=generator)) * on
            pieces.append(normalise(coefs @ features + noise * torch.randn(len(rows), d_model, generator=generator)))
        return torch.cat(pieces)

    return Source("synthetic", [sample(n_tokens)], sample(max(1, n_tokens // 10)), UNIT_NORM, features)
