"""A frozen linear layer whose weight is kept in few bits, in the place of the library's own.

The library's layer computes the output. The gradient of its input comes from the weight as it is read back, for that
layer at that moment, and nothing of the input is kept for it.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from perlhf.kernels import cpu
from perlhf.method.lora import Quantised, quantised_linear


class QuantisedLinear(nn.Linear):
    """Holds the library's layer, whose parameters keep their names.

    Args:
        layer: of the library, frozen: its `weight` may have any shape and dtype.
        weight: gives W [outputs, inputs] in `dtype`, made anew by each call.
        dtype: of inputs and outputs, the base's.
        four_bits: the weight as a CPU's own kernel reads it while sampling, where it can.
    """

    def __init__(
        self,
        layer: nn.Module,
        weight: Callable[[], Tensor],
        inputs: int,
        outputs: int,
        dtype: torch.dtype,
        four_bits: cpu.FourBits | None = None,
    ):
        super().__init__(inputs, outputs, False, device="meta")
        for name, parameter in [*layer.named_parameters(recurse=False)]:
            setattr(self, name, parameter)
        self.dtype = dtype

        def product(x: Tensor) -> Tensor:
            if four_bits is not None and self.bias is None and cpu.few_rows_4bit(x, four_bits):
                return cpu.linear_4bit(x, four_bits)
            with torch.no_grad():  # rows alone: int8's own product takes no more than three dimensions
                return layer(x.reshape(-1, inputs)).view(*x.shape[:-1], outputs)

        self.quantised = Quantised(product, weight, outputs)

    def dense(self) -> Tensor:
        """W [outputs, inputs] as it is read back, in the base's dtype."""
        return self.quantised.weight()

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        return quantised_linear(input, self.quantised)


def dtype_of(linear: nn.Linear) -> torch.dtype:
    """What the layer computes in, which isn't what a quantised weight is kept in."""
    return linear.dtype if isinstance(linear, QuantisedLinear) else linear.weight.dtype
