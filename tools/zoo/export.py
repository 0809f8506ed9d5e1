"""Make the zoo: real ONNX models, each with calibration and test samples, from pinned packages of the package index.

    python tools/zoo/export.py DIR [--only NAME]... [--cache DIR] [--photos DIR] [--list]

It writes, for each model of the table `MODELS`,

    DIR/<name>/model.onnx        the network (and model.onnx.data where it is large)
    DIR/<name>/calib.npz         arrays by input name, to calibrate with
    DIR/<name>/test.npz          the same, of other samples, to measure with
    DIR/<name>/test_labels.npy   where the samples have a label: the index of the right output
    DIR/<name>/*.json            of MiniLM its configuration and its tokenizer

In an npz, arrays of the input's own rank hold their samples along axis 0, the batch axis; arrays of one rank more hold
one complete feed in each array[i]. The packages are downloaded, never installed, and read as archives; nothing inside
them runs but the pure Python code of one network (and the setup.py of the one source archive, which pip asks for its
metadata on download). All seeds are fixed: the same command gives the same files.

Needs torch, onnx, onnxruntime, numpy, pillow, tokenizers and safetensors.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from _file_types import magika
from _ocr import ppocr_cls, ppocr_det, ppocr_rec
from _packages import Zoo
from _samples import Samples, open_session, run_all
from _speech import silero_vad
from _text import minilm, smollm2
from _vision import NoPhotos, efficientnet_lite0, open_nsfw, squeezenet, vit_s_saliency


@dataclass(frozen=True)
class Entry:
    """Describe one model: the function that makes it, what it is, and the licence that its package declares."""

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


def make(name: str, zoo: Zoo, out: Path) -> str:
    """Write one model's folder and return a line about it."""
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
    """Tell name, size, opset and the numbers of Conv, MatMul and Gemm."""
    proto = onnx.load(model, load_external_data=False)
    size = sum(path.stat().st_size for path in model.parent.glob("model.onnx*")) / 1e6
    opset = next(o.version for o in proto.opset_import if o.domain == "")
    ops = Counter(node.op_type for node in all_nodes(proto.graph))
    return f"{name}: {size:.1f} MB, opset {opset}, " + ", ".join(f"{ops[op]} {op}" for op in ("Conv", "MatMul", "Gemm"))


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Yield the nodes of a graph and of the graphs inside them."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from all_nodes(attribute.g)


if __name__ == "__main__":
    main()
