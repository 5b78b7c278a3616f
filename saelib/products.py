"""The product of tokens with the rows of a weight, with what follows it done while the results are at hand."""
import torch
from jaxtyping import Float
from torch import Tensor

ROWS = 512  # tokens that are enough to keep a product fast
# numbers in bfloat16, 16 MB: what the system's allocator gives out again once it is back; above 32 MB it never does
AT_ONCE = 2**23


def cpu_has(feature: str) -> bool:
    """Whether the CPU has a feature, by torch's name for it; not where torch can't say."""
    return getattr(torch.cpu, "get_capabilities", dict)().get(feature, False)


def multiplies_bf16() -> bool:
    """Whether this CPU multiplies bfloat16, and oneDNN is in this torch to let it. With AVX-512 alone oneDNN would do
    it in float32, more slowly."""
    is_x86 = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    if is_x86 and not (cpu_has("avx512_bf16") or cpu_has("amx_bf16")):
        return False
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def linear(x: Float[Tensor, "batch d"], weight: Float[Tensor, "n d"], bias: Float[Tensor, " n"],
           out: Float[Tensor, "batch n"], rectify: bool = False) -> Float[Tensor, "batch n"]:
    """x weightᵀ + bias, or ReLU of that.

    `torch.addmm` writes the bias into all of the result before it multiplies, and ReLU is one more pass. In bfloat16
    these cost a CPU as much as the product. oneDNN, which multiplies, can do both before it stores a number; torch
    calls it so in what `torch.compile` makes. But it takes fresh memory for its result. When that is large the system
    hands it out page by page, each time anew, which can cost as much as the product. So it gets a block of tokens at a
    time, and the memory of one block serves the next.

    Args:
        x, weight, bias: of one type, on one device.
        out: memory for the result.
        rectify: whether ReLU follows.
    """
    if x.device.type == "cpu" and x.dtype == torch.bfloat16 and multiplies_bf16():
        n_rows = max(1, min(ROWS, AT_ONCE // len(weight)))
        for rows, block in zip(x.split(n_rows), out.split(n_rows)):
            block.copy_(torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "relu" if rectify else "none", [], ""))
        return out
    torch.addmm(bias, x, weight.t(), out=out)
    return out.relu_() if rectify else out
