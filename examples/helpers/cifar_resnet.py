"""The ResNet for small images (arXiv 1512.03385, section 4.2), with projections as shortcuts like that of the authors.

Its layers have the names of torchvision's, so that `attach` knows where the residual branches end: after the last
normalisation, before the shortcut is added.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from dia_diffusion.errors import UsageError


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion, layers = 1, 2

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = conv(channels, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3), nn.BatchNorm2d(width)
        self.downsample = shortcut(channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        branch = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(branch)) + self.downsample(x))


class Bottleneck(nn.Module):
    """Convolutions of 1x1, 3x3 and 1x1, and a shortcut."""

    expansion, layers = 4, 3

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = conv(channels, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv(width, 4 * width, 1), nn.BatchNorm2d(4 * width)
        self.downsample = shortcut(channels, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        branch = F.relu(self.bn1(self.conv1(x)))
        branch = F.relu(self.bn2(self.conv2(branch)))
        return F.relu(self.bn3(self.conv3(branch)) + self.downsample(x))


def conv(channels: int, width: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """Make a convolution without bias, initialised as in arXiv 1502.01852."""
    layer = nn.Conv2d(channels, width, kernel, stride, kernel // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer


def shortcut(channels: int, width: int, stride: int) -> nn.Module:
    """Make the identity, or a projection where channels or resolution change."""
    if channels == width and stride == 1:
        return nn.Identity()
    return nn.Sequential(conv(channels, width, 1, stride), nn.BatchNorm2d(width))


class ResNet(nn.Module):
    """Three stages of blocks, 16, 32 and 64 channels wide (four times that behind a bottleneck).

    Args:
        block (`type`): `BasicBlock`, for depths 6n + 2, or `Bottleneck`, for depths 9n + 2.
        depth (`int`): Number of layers with weights.
        channels, classes (`int`): Of the images, and how many there are.
    """

    def __init__(self, block: type[BasicBlock | Bottleneck], depth: int, channels: int, classes: int):
        each, rest = divmod(depth - 2, 3 * block.layers)
        if rest or each < 1:
            raise UsageError(f"--depth must be {3 * block.layers}n + 2 for this block, but is {depth}.")
        super().__init__()
        self.stem = nn.Sequential(conv(channels, 16, 3), nn.BatchNorm2d(16), nn.ReLU())
        width = 16
        for stage in (1, 2, 3):
            blocks = []
            for number in range(each):
                blocks.append(block(width, 8 * 2**stage, 2 if stage > 1 and number == 0 else 1))
                width = 8 * 2**stage * block.expansion
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer3(self.layer2(self.layer1(self.stem(x)))))
