"""loralib's convolutions, for kernels of any width in one, two and three directions."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from phinetune.base.errors import SettingsError
from phinetune.lora.loralib.merging import LoRALayer, product, reset_update


class ConvLoRA(LoRALayer):
    """A convolution K + s · (B A) seen as K's shape, for kernels of the same width k in all d directions.

    lora_A (r·k, in·k), lora_B (out/groups · k^(d-1), r·k): loralib's shapes where d = 2.
    """

    def __init__(
        self,
        conv_module: type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d],
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if not isinstance(kernel_size, int):
            raise SettingsError(
                f"kernel_size cannot be {kernel_size!r}",
                why="the update has one width for all directions",
                do="give one number",
            )
        self.conv = conv_module(in_channels, out_channels, kernel_size, **kwargs)
        self._set_up(r, lora_alpha, lora_dropout, merge_weights)
        if r > 0:
            weight = self.conv.weight
            rows = out_channels // self.conv.groups * kernel_size ** (weight.dim() - 3)
            self.lora_A = nn.Parameter(weight.new_zeros((r * kernel_size, in_channels * kernel_size)))
            self.lora_B = nn.Parameter(weight.new_zeros((rows, r * kernel_size)))
            weight.requires_grad = False
        self.reset_parameters()

    @property
    def frozen(self) -> nn.Parameter:
        weight = self.conv.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def reset_parameters(self) -> None:
        self.conv.reset_parameters()
        reset_update(self)

    def delta(self) -> Tensor:
        return self.scaling * product(self.lora_B, self.lora_A).view(self.conv.weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        conv: Any = self.conv
        if not self.has_lora or self.merged:
            plain: Tensor = conv(x)
            return plain
        out: Tensor
        update = (self.lora_B @ self.lora_A).view(conv.weight.shape) * self.scaling
        if isinstance(self.lora_dropout, nn.Dropout) and self.lora_dropout.training:
            # Two convolutions: the update alone sees what dropout leaves.
            out = conv(x) + conv._conv_forward(self.lora_dropout(x), update, None)
        else:
            out = conv._conv_forward(x, conv.weight + update, conv.bias)
        return out


class Conv1d(ConvLoRA):
    """`nn.Conv1d` with an update."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(nn.Conv1d, *args, **kwargs)


class Conv2d(ConvLoRA):
    """`nn.Conv2d` with an update."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(nn.Conv2d, *args, **kwargs)


class Conv3d(ConvLoRA):
    """`nn.Conv3d` with an update."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(nn.Conv3d, *args, **kwargs)
