"""Build the two classifiers of Fashion-MNIST in PyTorch: a CNN and a vision transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

MEAN, DEVIATION = 0.2860, 0.3530  # of the 60,000 training images in 0..1


class Normalize(nn.Module):
    """Take off the mean and divide by the deviation of the training images."""

    def forward(self, image: Tensor) -> Tensor:
        """Return the normalised image, same shape."""
        return (image - MEAN) / DEVIATION


def convolution(
    inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, activation: nn.Module | None = None
) -> nn.Sequential:
    """Build a convolution without bias, its batch normalization and maybe an activation."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    layers = [conv, nn.BatchNorm2d(outputs)]
    return nn.Sequential(*layers, activation) if activation else nn.Sequential(*layers)


def separable(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Build a depthwise 3x3 and a pointwise convolution, as in MobileNet."""
    return nn.Sequential(
        convolution(inputs, inputs, 3, stride, inputs, nn.ReLU6()),
        convolution(inputs, outputs, activation=nn.ReLU6()),
    )


class InvertedResidual(nn.Module):
    """Widen, filter each channel, narrow, as in MobileNetV2; the input is added where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int = 1) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        self.expand = convolution(inputs, hidden, activation=nn.ReLU6())
        self.depthwise = convolution(hidden, hidden, 3, stride, hidden, nn.ReLU6())
        self.project = convolution(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return [n, outputs, height / stride, width / stride]."""
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


def build_cnn() -> nn.Module:
    """Build the CNN: 28x28 at the stem, 14x14, then 7x7."""
    layers = {
        "normalize": Normalize(),
        "stem": convolution(1, 16, 3, activation=nn.ReLU()),
        "separable": separable(16, 48, stride=2),
        "block1": InvertedResidual(48, 48, expansion=2),
        "block2": InvertedResidual(48, 96, expansion=3, stride=2),
        "block3": InvertedResidual(96, 96, expansion=3),
        "block4": InvertedResidual(96, 96, expansion=3),
        "last": convolution(96, 192, activation=nn.ReLU()),
        "pool": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
        "head": nn.Linear(192, 10),
    }
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    return model


class Attention(nn.Module):
    """Compute multi-head self-attention over [n, tokens, dim]."""

    def __init__(self, dim: int, heads: int, tokens: int) -> None:
        super().__init__()
        self.shape = (tokens, 3, heads, dim // heads)
        self.scale = (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return [n, tokens, dim]; the shapes are constants, so that the exported graph computes none."""
        tokens, _, heads, width = self.shape
        qkv = self.qkv(x).reshape(-1, tokens, 3, heads, width).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        weight = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.proj((weight @ v).transpose(1, 2).reshape(-1, tokens, heads * width))


class Block(nn.Module):
    """Compute a transformer block with the norms in front."""

    def __init__(self, dim: int, heads: int, tokens: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, tokens)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return [n, tokens, dim]."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Classify by patches of 4x4, learned positions, the mean over the tokens and a linear head."""

    def __init__(self, dim: int = 64, depth: int = 4, heads: int = 4, patch: int = 4) -> None:
        super().__init__()
        self.dim, self.tokens = dim, (28 // patch) ** 2
        self.normalize = Normalize()
        self.patch = nn.Conv2d(1, dim, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, self.tokens, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads, self.tokens) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 10)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits [n, 10]."""
        token = self.patch(self.normalize(image)).reshape(-1, self.dim, self.tokens).transpose(1, 2)
        return self.head(self.norm(self.blocks(token + self.position)).mean(dim=1))
