"""Test that tools/decode.py goes on with the likeliest token, and that ONNX Runtime GenAI gives the same text."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from decoders import HEAD, genai
from script import run_script
from texts import WORDS, a_tokenizer

import comq_onnx
from models import infer

TOOL = Path(__file__).parents[1] / "tools" / "decode.py"
LAYERS, COUNT = 2, 32
# what GenAI reads of a decoder; the names are those of its model builder
CONFIG = {
    "model": {
        "type": "llama", "vocab_size": 60, "context_length": 160,
        "bos_token_id": 1, "eos_token_id": 59, "pad_token_id": 59,
        "decoder": {
            "filename": "model.onnx", "head_size": HEAD, "hidden_size": 32, "num_attention_heads": 2,
            "num_hidden_layers": LAYERS, "num_key_value_heads": 1,
            "session_options": {"provider_options": []},
            "inputs": {
                "input_ids": "input_ids", "attention_mask": "attention_mask",
                "past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                "logits": "logits", "present_key_names": "present.%d.key", "present_value_names": "present.%d.value",
            },
        },
    },
    "search": {"do_sample": False, "max_length": 160, "past_present_share_buffer": True},
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Make a GenAI folder of a small decoder, and quantize it in both forms."""
    made = tmp_path_factory.mktemp("decoders")
    source = made / "float"
    source.mkdir()
    onnx.save(genai(LAYERS), source / "model.onnx")
    a_tokenizer().save(str(source / "tokenizer.json"))
    (source / "genai_config.json").write_text(json.dumps(CONFIG))
    found = {"float": source}
    for name, nbits in (("qdq", False), ("nbits", True)):
        found[name] = made / name
        comq_onnx.quantize_all([source], found[name], device="cpu", bits=4, uniform=True, max_samples=8, nbits_op=nbits)
    return found


@pytest.fixture(scope="module")
def prompts(folders: dict[str, Path]) -> Path:
    """Store ten prompts of three words."""
    words = np.random.default_rng(0).choice(WORDS, (10, 3))
    path = folders["float"].parent / "prompts.txt"
    path.write_text("\n".join(" ".join(line) for line in words))
    return path


def test_the_loop_with_a_cache_gives_what_the_whole_text_gives(folders: dict[str, Path], prompts: Path) -> None:
    done = run_script(TOOL, folders["qdq"], "--prompts", prompts, "--tokens", 6)
    assert done.code == 0, done.err
    tokenizer = a_tokenizer()
    prompt = prompts.read_text().splitlines()[0]
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    start = len(ids)
    for _ in range(6):
        tokens = np.array([ids])
        pasts = [f"past_key_values.{i}.{kind}" for i in range(LAYERS) for kind in ("key", "value")]
        feeds = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
        feeds |= {name: np.zeros((1, 1, 0, HEAD), np.float32) for name in pasts}
        ids.append(int(infer(folders["qdq"] / "model.onnx", feeds)["logits"][0, -1].argmax()))
        if ids[-1] == 59:
            break
    assert f"{prompt!r} ... {tokenizer.decode(ids[start:])!r}" in done.out


@pytest.mark.parametrize("name", ["float", "qdq", "nbits"])
def test_onnxruntime_genai_gives_the_same_text(folders: dict[str, Path], prompts: Path, name: str) -> None:
    pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    done = run_script(TOOL, folders[name], "--prompts", prompts, "--tokens", COUNT)
    assert done.code == 0, done.err
    assert re.search(r"the same text for 10 of 10 prompts", done.out), done.out
