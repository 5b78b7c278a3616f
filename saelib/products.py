"""The product of tokens with the rows of a weight, with what follows it done while the results are at hand."""
import torch
from jaxtyping import Float
from torch import Tensor


def cpu_has(feature: str) -> bool:
    """Whether the CPU has a feature, by torch's name for it; not where torch can't say."""
    return getattr(torch.cpu, "get_capabilities", dict)().get(feature, False)


def multiplies_bf16() -> bool:
    """Whether oneDNN is in this torch, and multiplies bfloat16 on this CPU."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def linear(x: Float[Tensor, "batch d"], weight: Float[Tensor, "n d"], bias: Float[Tensor, " n"], out: Float[Tensor, "batch n"],
           rectify: bool = False) -> Float[Tensor, "batch n"]:
    """x weightᵀ + bias, or ReLU of that.

    `torch.addmm` writes the bias into all of the result before it multiplies, and ReLU is one more pass. In bfloat16 these cost a CPU as
    much as the product. oneDNN, which multiplies, can do both before it stores a number; torch calls it so in what `torch.compile` makes.

    Args:
        x, weight, bias: of one type, on one device.
        out: memory for the result. The fused product takes its own, and leaves this untouched.
        rectify: whether ReLU follows.
    """
    if x.device.type == "cpu" and x.dtype == torch.bfloat16 and multiplies_bf16():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "relu" if rectify else "none", [], "")
    torch.addmm(bias, x, weight.t(), out=out)
    return out.relu_() if rectify else out
