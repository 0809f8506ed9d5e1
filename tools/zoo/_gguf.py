"""Read GGUF files: metadata, tensors and the tokenizer (docs/gguf.md of the ggml project)."""

from __future__ import annotations

import io
import math
import struct
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

GGUF_NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}


def read_gguf(data: bytes) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read metadata, and tensors as float32 [out, in], from a GGUF file of version 3. Raises ValueError for others."""
    file = io.BytesIO(data)
    if file.read(8) != b"GGUF\x03\x00\x00\x00":
        raise ValueError("not a GGUF file of version 3")
    tensor_count, fact_count = gguf_value(file, 10), gguf_value(file, 10)
    facts = {gguf_value(file, 8): gguf_value(file, gguf_value(file, 4)) for _ in range(fact_count)}
    entries = []
    for _ in range(tensor_count):
        name = gguf_value(file, 8)
        shape = [gguf_value(file, 10) for _ in range(gguf_value(file, 4))][::-1]
        entries.append((name, shape, gguf_value(file, 4), gguf_value(file, 10)))
    start = math.ceil(file.tell() / 32) * 32
    return facts, {name: ggml_tensor(data, start + at, kind, shape) for name, shape, kind, at in entries}


def gguf_value(file: io.BytesIO, kind: int) -> Any:
    """Read the next value of a type by its GGUF number: 8 is a string, 9 an array, the others are numbers."""
    if kind == 8:
        return file.read(gguf_value(file, 10)).decode()
    if kind == 9:
        inner, count = gguf_value(file, 4), gguf_value(file, 10)
        return [gguf_value(file, inner) for _ in range(count)]
    layout = "<" + GGUF_NUMBERS[kind]
    return struct.unpack(layout, file.read(struct.calcsize(layout)))[0]


def ggml_tensor(data: bytes, start: int, kind: int, shape: list[int]) -> torch.Tensor:
    """Convert a tensor to float32: F32 (0), Q4_1 (3: w = d q + m) or Q8_0 (8: w = d q), in blocks of 32 along the rows.

    Raises ValueError for other kinds.
    """
    count = math.prod(shape)
    if kind == 0:
        values = np.frombuffer(data, "<f4", count, start).copy()
    elif kind == 3:
        block = np.frombuffer(data, [("d", "<f2"), ("m", "<f2"), ("q", "u1", 16)], count // 32, start)
        codes = np.concatenate([block["q"] & 15, block["q"] >> 4], axis=1)
        values = block["d"].astype(np.float32)[:, None] * codes + block["m"].astype(np.float32)[:, None]
    elif kind == 8:
        block = np.frombuffer(data, [("d", "<f2"), ("q", "i1", 32)], count // 32, start)
        values = block["d"].astype(np.float32)[:, None] * block["q"]
    else:
        raise ValueError(f"tensor type {kind} in the GGUF file; 0, 3 and 8 are read")
    return torch.from_numpy(values.reshape(shape))


def gguf_tokenizer(facts: dict[str, Any]) -> Tokenizer:
    """Build the byte-level BPE tokenizer of a GGUF file; its pre-tokenizer `smollm` is single digits, then GPT-2's."""
    vocabulary = {token: i for i, token in enumerate(facts["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in facts["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
