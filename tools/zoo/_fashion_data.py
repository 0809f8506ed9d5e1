"""Read Fashion-MNIST and write the images of models/."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np

CALIBRATION_IMAGES = 512
STORED_TEST_IMAGES = 1000
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
IDX_FILES = {
    "train_image": "train-images-idx3-ubyte",
    "train_label": "train-labels-idx1-ubyte",
    "test_image": "t10k-images-idx3-ubyte",
    "test_label": "t10k-labels-idx1-ubyte",
}
HOW_TO_GET_THE_DATA = (
    "install the Debian package dataset-fashion-mnist (apt-get install dataset-fashion-mnist), or name a folder that "
    "holds the four files with --data DIR (.gz or unpacked)"
)


@dataclass(frozen=True)
class Dataset:
    """Hold images [n, 1, 28, 28] float32 in 0..1 and labels [n] int64, of the training and the test set."""

    train_image: np.ndarray
    train_label: np.ndarray
    test_image: np.ndarray
    test_label: np.ndarray


def load_dataset(folder: Path) -> Dataset:
    """Read the four idx files. Raises one FileNotFoundError that names every missing file."""
    missing = [name for name in IDX_FILES.values() if find_idx(folder, name) is None]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}; {HOW_TO_GET_THE_DATA}")
    arrays = {key: read_idx(find_idx(folder, name)) for key, name in IDX_FILES.items()}
    for key in ("train_image", "test_image"):
        arrays[key] = arrays[key][:, None].astype(np.float32) / np.float32(255)
    for key in ("train_label", "test_label"):
        arrays[key] = arrays[key].astype(np.int64)
    return Dataset(**arrays)


def find_idx(folder: Path, name: str) -> Path | None:
    """Return the idx file, packed or not, or None."""
    candidates = (folder / name, folder / f"{name}.gz")
    return next((path for path in candidates if path.is_file()), None)


def read_idx(path: Path) -> np.ndarray:
    """Read an idx file of unsigned bytes: two zero bytes, type 8, the rank, big-endian int32 sizes, the values.

    Raises ValueError for any other file.
    """
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if raw[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is no idx file of unsigned bytes; {HOW_TO_GET_THE_DATA}")
    rank = raw[3]
    shape = np.frombuffer(raw, dtype=">i4", count=rank, offset=4)
    return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * rank).reshape(shape)


def write_images(folder: Path, data: Dataset) -> None:
    """Write the first training images for calibration and the first test images; the same bytes on every run."""
    np.savez_compressed(folder / "fashion_calib.npz", image=data.train_image[:CALIBRATION_IMAGES])
    np.savez_compressed(
        folder / "fashion_test.npz",
        image=data.test_image[:STORED_TEST_IMAGES],
        label=data.test_label[:STORED_TEST_IMAGES],
    )
