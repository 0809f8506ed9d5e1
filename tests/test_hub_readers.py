"""Test that the readers of folders of the hub open what is written: transformers.js in Node, and optimum.

The first needs `npm install --ignore-scripts @huggingface/transformers` in the repository (or in the folder above the
node_modules that NODE_PATH names), the second the extra `hub`; skipped where they are not.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from texts import LINES, WORDS
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

import comq_onnx
from comq_onnx.model import files
from models import encoder

ROOT = Path(__file__).parents[1]
ZOO = Path(os.environ.get("COMQ_ZOO", ROOT / "zoo"))
NODE = shutil.which("node")
SPECIAL = {"pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "unk": "[UNK]", "mask": "[MASK]"}
# of the quantized model's answers with those of the float model
COSINE = 0.99
SETTINGS: dict[int, dict[str, Any]] = {
    8: {"bits": 8},
    4: {"bits": 4, "activations": "none", "granularity": "32"},
}
COMMON: dict[str, Any] = {"device": "cpu", "uniform": True, "max_samples": 32, "length": 12}


def put_repository(folder: Path) -> None:
    """Make a folder as the hub has those of text encoders."""
    (folder / "onnx").mkdir(parents=True)
    model = encoder()
    for value in (model.graph.output[0], *(n for n in model.graph.node if "y" in n.output)):
        if isinstance(value, onnx.NodeProto):
            value.output[:] = ["last_hidden_state"]
        else:
            value.name = "last_hidden_state"
    onnx.save(model, folder / "onnx" / "model.onnx")
    vocabulary = {word: i for i, word in enumerate([*SPECIAL.values(), *WORDS])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    tokenizer.add_special_tokens(list(SPECIAL.values()))
    tokenizer.save(str(folder / "tokenizer.json"))
    texts: dict[str, dict[str, Any]] = {
        "config.json": {"model_type": "bert", "architectures": ["BertModel"], "hidden_size": 8, "vocab_size": 21},
        "tokenizer_config.json": {"tokenizer_class": "BertTokenizer", "model_max_length": 64, "do_lower_case": True},
    }
    texts["tokenizer_config.json"] |= {f"{name}_token": token for name, token in SPECIAL.items()}
    for name, content in texts.items():
        (folder / name).write_text(json.dumps(content))


@pytest.fixture(params=["inside", "external"])
def repository(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Quantize the models of a folder to 8 and 4 bits in that folder, with data inside of models and beside them."""
    put_repository(tmp_path / "repo")
    (tmp_path / "lines.txt").write_text("\n".join(LINES))
    if request.param == "external":
        monkeypatch.setattr(files, "INLINE_LIMIT", 100)
    for settings in SETTINGS.values():
        (done,) = comq_onnx.quantize_all(
            [tmp_path / "repo"], tmp_path / "repo", tmp_path / "lines.txt", **COMMON, **settings
        )
        assert done.error is None
    assert (tmp_path / "repo" / "onnx" / "model_q4.onnx_data").exists() == (request.param == "external")
    return tmp_path / "repo"


def modules() -> Path | None:
    """Return the node_modules with transformers.js, None where there is none."""
    if NODE is None:
        return None
    find = [NODE, "-p", "require.resolve('@huggingface/transformers')"]
    done = subprocess.run(find, capture_output=True, text=True, cwd=ROOT)
    found = [p for p in Path(done.stdout.strip()).parents if p.name == "node_modules"]
    return found[0] if done.returncode == 0 and found else None


def cosines(first: Any, second: Any) -> np.ndarray:
    """Return the cosine of each row of one array with that of another."""
    a, b = np.asarray(first), np.asarray(second)
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def run_js(page: str, folder: Path, named: str, dtype: str) -> Any:
    """Run the JavaScript of a page of docs/ beside a folder, and return the JSON that it prints.

    named: the folder on the page, which has the last dtype of SETTINGS there
    """
    there = modules()
    if there is None:
        pytest.skip("npm install --ignore-scripts @huggingface/transformers: not found from here, nor by NODE_PATH")
    shown = re.search(r"```js\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    assert shown is not None
    text = shown[1].replace(named, folder.name).replace('"q4"', f'"{dtype}"')
    assert folder.name in text
    assert dtype in text
    if not (folder.parent / "node_modules").exists():
        (folder.parent / "node_modules").symlink_to(there)
    (folder.parent / "run.mjs").write_text(text)
    assert NODE is not None
    done = subprocess.run([NODE, "run.mjs"], capture_output=True, text=True, cwd=folder.parent, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check_answers(found: dict[str, Any], shape: tuple[int, ...]) -> None:
    """Make sure that the answers of all widths are near those of the float model, and others."""
    assert np.shape(found["fp32"]) == shape
    assert cosines(found["q8"], found["fp32"]).min() >= COSINE
    assert cosines(found["q4"], found["fp32"]).min() >= COSINE
    assert found["q8"] != found["fp32"] != found["q4"] != found["q8"]


def test_transformers_js_opens_the_folder(repository: Path) -> None:
    found = {dtype: run_js("command-line.md", repository, "FOLDER_q4", dtype) for dtype in ("fp32", "q8", "q4")}
    check_answers(found, (2, 8))


def test_transformers_js_opens_minilm(tmp_path: Path) -> None:
    source = ZOO / "minilm"
    if not (source / "tokenizer.json").is_file() or modules() is None:
        pytest.skip("zoo/minilm/tokenizer.json or transformers.js is not here: python tools/zoo/export.py zoo")
    repository = tmp_path / "repo"
    (repository / "onnx").mkdir(parents=True)
    shutil.copy(source / "model.onnx", repository / "onnx")
    for path in source.glob("*.json"):
        shutil.copy(path, repository)
    for settings in SETTINGS.values():
        comq_onnx.quantize_all([repository], repository, source / "calib.npz", max_samples=128, **settings)
    found = {dtype: run_js("tutorial-text.md", repository, "minilm_hub", dtype) for dtype in ("fp32", "q8", "q4")}
    check_answers(found, (3, 384))


def test_optimum_opens_the_folder(repository: Path) -> None:
    ort = pytest.importorskip("optimum.onnxruntime", reason="needs optimum: pip install 'comq-onnx[hub]'")
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(repository)(LINES[:2], padding=True, return_tensors="pt")
    given = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    found = [
        ort.ORTModelForFeatureExtraction.from_pretrained(repository, file_name=name)(**given)[0].detach().numpy()
        for name in ("model.onnx", "model_quantized.onnx", "model_q4.onnx")
    ]
    kept = given["attention_mask"].numpy() > 0
    for other in found[1:]:
        assert cosines(other[kept].ravel(), found[0][kept].ravel()) >= COSINE
        assert (other != found[0]).any()
