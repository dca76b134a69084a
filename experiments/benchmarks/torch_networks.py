"""The networks `conv`, `patches` and `unet` in PyTorch, for digits of 28 x 28 pixels.

They take and return [batch, 1, 28, 28]; the result are logits, without the sigmoid that the networks of `dae.models`
end in. Their parameters stand in the same order as those of the Keras networks.
"""

from collections.abc import Callable

import torch
from torch import nn


class Residual(nn.Module):
    """Adds the result of its layers to their input."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x + layers(x)."""
        return x + self.layers(x)


def same_conv(inputs: int, outputs: int) -> nn.Module:
    """Return a 3 x 3 convolution that keeps the size of the image."""
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def residual_blocks(channels: int, count: int) -> list[nn.Module]:
    """Return `count` blocks of two 3 x 3 convolutions, each block added to its input."""
    layers: list[nn.Module] = []
    for _ in range(count):
        layers += [Residual(same_conv(channels, channels), nn.ReLU(), same_conv(channels, channels)), nn.ReLU()]
    return layers


def conv(width: int = 1) -> nn.Module:
    """Return `dae.models.conv`."""
    few, many, relu = 8 * width, 16 * width, nn.ReLU()
    pool, up = nn.MaxPool2d(2, ceil_mode=True), nn.Upsample(scale_factor=2)
    encoder = [same_conv(1, many), relu, pool, same_conv(many, few), relu, pool, same_conv(few, few), relu, pool]
    decoder = [same_conv(few, few), relu, up, same_conv(few, few), relu, up, nn.Conv2d(few, many, 3), relu, up]
    return nn.Sequential(*encoder, *decoder, same_conv(many, 1))


def patches(width: int = 1) -> nn.Module:
    """Return `dae.models.patches`."""
    channels = 32 * width
    first, last = nn.Conv2d(1, channels, 4, stride=2, padding=1), nn.ConvTranspose2d(channels, 1, 6, 2, padding=2)
    return nn.Sequential(first, nn.ReLU(), *residual_blocks(channels, 2), last)


def unet(width: int = 1) -> nn.Module:
    """Return `dae.models.unet`."""
    fine, coarse = 32 * width, 64 * width
    # TensorFlow pads a convolution with stride 2 and an odd kernel at the bottom and at the right only.
    down = [nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(fine, coarse, 3, stride=2), nn.ReLU()]
    coarse_level = Residual(*down, *residual_blocks(coarse, 3), nn.ConvTranspose2d(coarse, fine, 2, stride=2))
    first, last = nn.Conv2d(1, fine, 4, stride=2, padding=1), nn.ConvTranspose2d(fine, 1, 6, stride=2, padding=2)
    before, after = residual_blocks(fine, 2), residual_blocks(fine, 2)
    return nn.Sequential(first, nn.ReLU(), *before, coarse_level, nn.ReLU(), *after, last)


NETWORKS: dict[str, Callable[[int], nn.Module]] = {function.__name__: function for function in (conv, patches, unet)}
