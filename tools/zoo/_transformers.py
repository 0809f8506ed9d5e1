"""Build BERT and Llama in PyTorch from their stored weights."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class SentenceEncoder(nn.Module):
    """Compute BERT (Devlin et al. 2019), then the mean over the unmasked tokens, scaled to length one."""

    def __init__(self, weights: dict[str, torch.Tensor], heads: int = 12) -> None:
        super().__init__()
        size = weights["embeddings.word_embeddings.weight"].shape[1]
        depth = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("encoder.layer."))
        self.words = nn.Embedding.from_pretrained(weights["embeddings.word_embeddings.weight"])
        self.positions = nn.Embedding.from_pretrained(weights["embeddings.position_embeddings.weight"])
        self.kind = nn.Parameter(weights["embeddings.token_type_embeddings.weight"][0])
        self.norm = nn.LayerNorm(size, eps=1e-12)
        self.norm.load_state_dict(below(weights, "embeddings.LayerNorm."))
        self.layers = nn.ModuleList(BertLayer(below(weights, f"encoder.layer.{i}."), heads) for i in range(depth))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Compute embeddings [N, D] of length one from input_ids and attention_mask, int64 [N, T]."""
        kept = attention_mask.to(torch.float32)
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.norm(self.words(input_ids) + self.positions(places) + self.kind)
        for layer in self.layers:
            x = layer(x, (1 - kept[:, None, None, :]) * -1e4)
        kept = kept[:, :, None]
        return F.normalize((x * kept).sum(1) / kept.sum(1).clamp(min=1e-9), dim=1)


class BertLayer(nn.Module):
    """Compute self-attention and a GELU feed-forward block, each added and then normalised."""

    def __init__(self, weights: dict[str, torch.Tensor], heads: int) -> None:
        super().__init__()
        names = {
            "query": "attention.self.query",
            "key": "attention.self.key",
            "value": "attention.self.value",
            "attended": "attention.output.dense",
            "norm1": "attention.output.LayerNorm",
            "wide": "intermediate.dense",
            "narrow": "output.dense",
            "norm2": "output.LayerNorm",
        }
        for name, theirs in names.items():
            self.add_module(name, linear_or_norm(below(weights, theirs + ".")))
        self.heads = heads

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Compute [N, T, D] from x [N, T, D] and mask [N, 1, 1, T]."""
        q, k, v = (split_heads(layer(x), self.heads) for layer in (self.query, self.key, self.value))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + mask
        x = self.norm1(x + self.attended(merge_heads(scores.softmax(-1) @ v)))
        return self.norm2(x + self.narrow(F.gelu(self.wide(x))))


class Llama(nn.Module):
    """Compute Llama (Touvron et al. 2023); parameters have the names of a GGUF file, the head is the embedding."""

    def __init__(self, facts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        heads, groups = facts["llama.attention.head_count"], facts["llama.attention.head_count_kv"]
        eps = facts["llama.attention.layer_norm_rms_epsilon"]
        self.token_embd = nn.Embedding.from_pretrained(tensors["token_embd.weight"])
        self.output_norm = RMSNorm(tensors["output_norm.weight"], eps)
        layers = (below(tensors, f"blk.{i}.") for i in range(facts["llama.block_count"]))
        self.blk = nn.ModuleList(LlamaLayer(weights, heads, groups, eps) for weights in layers)
        width = facts["llama.rope.dimension_count"]
        frequency = facts["llama.rope.freq_base"] ** (-torch.arange(0, width, 2) / width)
        self.register_buffer("frequency", frequency.to(torch.float32))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Compute logits [N, T, V] from input_ids [N, T] int64."""
        place = torch.arange(input_ids.shape[1], device=input_ids.device)
        angle = (place[:, None] * self.frequency).repeat(1, 2)
        turn = angle.cos(), angle.sin()
        future = (place[None, :] > place[:, None]) * -1e4
        x = self.token_embd(input_ids)
        for layer in self.blk:
            x = layer(x, turn, future)
        return F.linear(self.output_norm(x), self.token_embd.weight)


class LlamaLayer(nn.Module):
    """Compute rotary attention with grouped queries and a SiLU-gated block, each normalised before and then added."""

    def __init__(self, weights: dict[str, torch.Tensor], heads: int, groups: int, eps: float) -> None:
        super().__init__()
        weights = dict(weights)
        weights["attn_q.weight"] = unpermute(weights["attn_q.weight"], heads)
        weights["attn_k.weight"] = unpermute(weights["attn_k.weight"], groups)
        for name, weight in weights.items():
            module = RMSNorm(weight, eps) if weight.ndim == 1 else linear_or_norm({"weight": weight})
            self.add_module(name.removesuffix(".weight"), module)
        self.heads, self.groups = heads, groups

    def forward(self, x: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor], future: torch.Tensor) -> torch.Tensor:
        """Compute [N, T, D] from x [N, T, D], cosines and sines `turn` [T, d] and the mask `future` [T, T]."""
        h = self.attn_norm(x)
        q = rotate(split_heads(self.attn_q(h), self.heads), turn)
        k = rotate(split_heads(self.attn_k(h), self.groups), turn)
        v = split_heads(self.attn_v(h), self.groups)
        k, v = (share_heads(t, self.heads // self.groups) for t in (k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + future
        x = x + self.attn_output(merge_heads(scores.softmax(-1) @ v))
        h = self.ffn_norm(x)
        return x + self.ffn_down(F.silu(self.ffn_gate(h)) * self.ffn_up(h))


class RMSNorm(nn.Module):
    """Normalise by the root mean square (Zhang and Sennrich 2019), spelled out: opset 17 has no operator for it."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(weight), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise x over its last axis."""
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


def linear_or_norm(weights: dict[str, torch.Tensor]) -> nn.Module:
    """Build a Linear from a matrix [out, in], or a LayerNorm from a vector [size]."""
    shape = weights["weight"].shape
    if len(shape) == 2:
        module: nn.Module = nn.Linear(shape[1], shape[0], bias="bias" in weights)
    else:
        module = nn.LayerNorm(shape, eps=1e-12)
    module.load_state_dict(weights)
    return module


def below(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Select the weights under a prefix, named without it."""
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}


def split_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Reshape [N, T, heads * d] to [N, heads, T, d]."""
    return x.reshape(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def merge_heads(x: torch.Tensor) -> torch.Tensor:
    """Reshape [N, heads, T, d] to [N, T, heads * d]."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


def share_heads(x: torch.Tensor, times: int) -> torch.Tensor:
    """Repeat each group `times` times in a row: [N, groups, T, d] to [N, groups * times, T, d]."""
    count, groups, tokens, width = x.shape
    shared = x[:, :, None].expand(count, groups, times, tokens, width)
    return shared.reshape(count, groups * times, tokens, width)


def rotate(x: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Apply rotary positions (Su et al. 2021), one half of the width against the other.

    x: [N, heads, T, d]
    turn: cosines and sines, each [T, d]
    """
    a, b = x.chunk(2, dim=-1)
    return x * turn[0] + torch.cat((-b, a), -1) * turn[1]


def unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of a weight [out, in]: GGUF rotates neighbours in pairs, `rotate` the two halves."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)
