"""A TopK step taken apart: what each part computes and moves, counted, and the same part to be timed alone.

The count is of the least work without a cache: a part that gathers rows reads one for each (token, latent) pair; every
other number that it needs is read once from memory, and every result written once. Two measured rates turn counts into
times:

    predicted = max(operations / rate of the encoder's product,  bytes / rate of a large copy)
"""
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from saelib import kernels, pairs, selection
from saelib.contestants import LR, Setting, fused_adam, setting_batch

FLOAT = 4  # bytes
ADAM_BYTES = 28  # a parameter: read it, its gradient and two moments, write it and the moments
UPKEEP_BYTES = 44  # a weight of one matrix: projection 3, norm of both gradients 2, scaling them 4, unit rows 2 floats
COPY_FLOATS = 2**25  # 128 MiB: more than a cache holds


class Part(NamedTuple):
    """One part of a step: operations (to multiply and add are two), bytes moved, and how to run it."""
    operations: float
    bytes: float
    step: Callable[[Tensor], object]


def parts(setting: Setting) -> dict[str, Part]:
    """The parts of a TopK step in fp32, by name, in the order of the step.

    With B tokens, d dimensions, n latents and k active ones: the product costs 2 B d n operations, each of the four
    passes over active rows gathers B k d numbers, Adam moves 28 bytes for each of 2 n d weights.
    """
    batch, d, n, k = setting.batch_size, setting.d_model, setting.n_latents, setting.k
    sae, x = setting.start("topk"), setting_batch(setting)
    with torch.no_grad():
        values, indices = kernels.select(x, sae.W_enc, sae.b_enc, k)
    active, W_enc, W_dec = pairs.Active(indices, n), sae.W_enc.detach(), sae.W_dec.detach()
    grad, grad_values = torch.randn_like(x), torch.randn_like(values)
    active.by_latent  # made here, so that the gradients below are timed without the grouping
    product, choose = encoder(W_enc, sae.b_enc.detach(), k)
    gathered, key_bytes = FLOAT * batch * k * d, 2 if n <= 2**15 else 4
    both = 2 * n * d
    return {
        "encoder product": Part(2 * batch * d * n, FLOAT * (batch * d + n * d), product),
        "k largest": Part(0, FLOAT * batch * n, choose),
        "decode": Part(2 * batch * k * d, gathered + FLOAT * batch * d, lambda _: active.decode(values, W_dec)),
        "gradient of the latents": Part(2 * batch * k * d, gathered + FLOAT * batch * (d + k),
                                        lambda _: active.dot(grad, W_dec)),
        # a radix sort passes once a byte of the key, and each time reads and writes keys and 8 bytes of their places
        "group by latent": Part(0, key_bytes * 2 * (key_bytes + 8) * batch * k,
                                lambda _: pairs.Active(indices, n).by_latent),
        "decoder gradient": Part(2 * batch * k * d, gathered + FLOAT * n * d,
                                 lambda _: active.sum_tokens(values, grad)),
        "encoder gradient": Part(2 * batch * k * d, gathered + FLOAT * n * d,
                                 lambda _: active.sum_tokens(grad_values, x)),
        "clip and unit rows": Part(12 * n * d, UPKEEP_BYTES * n * d, upkeep(setting)),
        "Adam": Part(12 * both, ADAM_BYTES * both, fused_adam(setting)),
    }


def encoder(W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Callable[[Tensor], None], Callable[[Tensor], None]]:
    """The two halves of `kernels.select`, each over all blocks of tokens: the product alone, and the choice alone."""
    def blocks(x: Tensor) -> list[Tensor]:
        return list(x.split(kernels.BLOCK_ROWS if x.device.type == "cpu" else len(x)))

    buffers: dict[int, Tensor] = {}

    def product(x: Tensor) -> None:
        for block in blocks(x):
            if len(block) not in buffers:
                buffers[len(block)] = torch.empty(len(block), len(W_enc), device=x.device)
            torch.addmm(b_enc, block, W_enc.t(), out=buffers[len(block)])

    def choose(x: Tensor) -> None:
        for block in blocks(x):
            selection.largest(buffers[len(block)], k)

    return product, choose


def upkeep(setting: Setting) -> Callable[[Tensor], None]:
    """What is done to weights and gradients besides Adam: projection, clipping, unit rows."""
    sae = setting.start("topk")
    for parameter in sae.parameters():
        parameter.grad = torch.full_like(parameter, LR)

    def step(x: Tensor) -> None:
        sae.remove_parallel_gradient()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        sae.normalise_decoder()

    return step


def large_copy(device: str) -> Part:
    """A copy of 128 MiB, which reads and writes that much: the second rate."""
    source = torch.ones(COPY_FLOATS, device=device)
    target = torch.empty_like(source)
    return Part(0, 2 * FLOAT * COPY_FLOATS, lambda _: target.copy_(source))


def predict(rows: list[dict], counted: dict[str, Part], product: str, copy: str) -> None:
    """Write into each row what its counts predict, from the rows of the product and the copy timed beside it.

    Adds `operations`, `bytes`, `predicted_ms` and `bound` ("operations" or "bytes").
    """
    ms = {row["name"]: row["ms"]["median"] for row in rows}
    rate, bandwidth = counted[product].operations / ms[product], counted[copy].bytes / ms[copy]
    for row in rows:
        if row["name"] in counted:
            part = counted[row["name"]]
            by = {"operations": part.operations / rate, "bytes": part.bytes / bandwidth}
            bound = max(by, key=by.get)
            row |= {"operations": part.operations, "bytes": part.bytes, "predicted_ms": float(f"{by[bound]:.4g}"),
                    "bound": bound}
