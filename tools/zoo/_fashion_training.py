"""Train a classifier of Fashion-MNIST."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from _fashion_data import Dataset
from _fashion_networks import VisionTransformer, build_cnn
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Recipe:
    """Describe how one model is built and trained; shift: the largest random translation in pixels."""

    build: Callable[[], nn.Module]
    epochs: int
    learning_rate: float
    weight_decay: float
    shift: int
    batch: int = 128


RECIPES = {
    "cnn": Recipe(build_cnn, epochs=10, learning_rate=5e-3, weight_decay=0.05, shift=2),
    "vit": Recipe(VisionTransformer, epochs=12, learning_rate=2e-3, weight_decay=0.05, shift=1),
}


def train(model: nn.Module, recipe: Recipe, epochs: int, data: Dataset) -> None:
    """Train in place with AdamW and one warm-up and cosine cycle of the learning rate."""
    image, label = torch.from_numpy(data.train_image), torch.from_numpy(data.train_label)
    steps = epochs * (len(image) // recipe.batch)
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe.weight_decay), lr=recipe.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=steps, pct_start=0.15)
    model.to(memory_format=torch.channels_last).train()
    for epoch in range(epochs):
        start, losses = time.perf_counter(), []
        for chosen in torch.randperm(len(image)).split(recipe.batch):
            if len(chosen) == recipe.batch:
                loss = F.cross_entropy(model(augment(image[chosen], recipe.shift)), label[chosen])
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
        spent = time.perf_counter() - start
        print(f"  epoch {epoch + 1}/{epochs}: loss {np.mean(losses):.4f}, {spent:.0f} s", flush=True)
    model.to(memory_format=torch.contiguous_format).eval()


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Decay the weight matrices and kernels alone, not biases, norms or the position table."""
    decayed = [p for p in model.parameters() if p.dim() in (2, 4)]
    kept = [p for p in model.parameters() if p.dim() not in (2, 4)]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def augment(image: Tensor, shift: int) -> Tensor:
    """Mirror half of the images and move each by up to `shift` pixels, zeros coming in; [n, 1, 28, 28]."""
    n, _, height, width = image.shape
    padded = F.pad(image, (shift,) * 4)
    row = torch.arange(height) + torch.randint(0, 2 * shift + 1, (n, 1))
    column = torch.arange(width) + torch.randint(0, 2 * shift + 1, (n, 1))
    column = torch.where(torch.rand(n, 1) < 0.5, column.flip(1), column)
    return padded[torch.arange(n)[:, None, None], 0, row[:, :, None], column[:, None, :]][:, None]


def count_parameters(model: nn.Module) -> int:
    """Return the number of trained values."""
    return sum(p.numel() for p in model.parameters())
