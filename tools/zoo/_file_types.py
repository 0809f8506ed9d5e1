"""Make Magika, which tells the type of a file; files found inside the pinned packages as samples."""

from __future__ import annotations

import json
import zipfile
from collections import defaultdict
from pathlib import Path

import numpy as np
from _packages import PINS, SDISTS, Zoo
from _samples import Samples, top1


def magika(zoo: Zoo, model: Path) -> Samples:
    """Make Magika: the type of a file from the bytes at its two ends; Conv and MatMul over an int32 input."""
    folder = "magika/models/standard_v3_3/"
    model.write_bytes(zoo.member("magika", folder + "model.onnx"))
    config = json.loads(zoo.member("magika", folder + "config.min.json"))
    files = typed_files(zoo, 128)
    features = np.stack([file_features(content, config) for _, content in files])
    labels = np.int64([config["target_labels_space"].index(label) for label, _ in files])
    test = features[1::2]
    return Samples({"bytes": features[0::2]}, {"bytes": test}, *top1("bytes", test, labels[1::2]))


def typed_files(zoo: Zoo, count: int) -> list[tuple[str, bytes]]:
    """Collect files inside the pinned packages with the type that their name tells, the types in turn."""
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
    """Compute Magika's input, int32 [beg_size + end_size]: bytes at both ends of a file, stripped, padded inwards."""
    beg = content[: config["block_size"]].lstrip()[: config["beg_size"]]
    end = content[-config["block_size"] :].rstrip()[-config["end_size"] :]
    features = np.full(config["beg_size"] + config["end_size"], config["padding_token"], np.int32)
    features[: len(beg)] = list(beg)
    features[len(features) - len(end) :] = list(end)
    return features
