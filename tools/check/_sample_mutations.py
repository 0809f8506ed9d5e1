"""Write samples with something wrong or odd about them, by seeded choices."""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from _fuzz_models import FLOATS, NAMES, NUMBERS, Dice
from _model_mutations import mutate_bytes
from PIL import Image


def mutate_samples(folder: Path, arrays: dict[str, np.ndarray], dice: Dice) -> list[object]:
    """Write samples with something wrong or odd about them; return the options that name them."""
    what = dice.below(8)
    path = folder / dice.pick(("s.npz", "s.npy"))
    if what == 0:
        for _ in range(dice.times()):
            arrays = _odd_arrays(arrays, dice)
    save(path, arrays)
    return SAMPLE_MUTATIONS[what](folder, path, dice)


def save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Save arrays as .npz, or the first of them as .npy."""
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        np.save(path, next(iter(arrays.values()), np.zeros(0)))


def _odd_arrays(arrays: dict[str, np.ndarray], dice: Dice) -> dict[str, np.ndarray]:
    name = dice.pick(arrays) if arrays else "x"
    array = arrays.get(name, np.zeros(3, np.float32))
    changed: Any = array.copy()
    what = dice.below(9)
    with contextlib.suppress(ValueError, TypeError, IndexError, OverflowError):
        if what == 0:
            changed.reshape(-1)[dice.below(changed.size)] = dice.pick(FLOATS)
        elif what == 1:
            changed = changed.astype(dice.pick(("f2", "f8", "i4", "u1", "c8", "?", "U5", ">f4", "M8[s]")))
        elif what == 2:
            changed = changed[: dice.below(4)]
        elif what == 3:
            changed = changed[None] if dice.below(2) else changed[..., None]
        elif what == 4:
            changed = changed[..., : dice.below(changed.shape[-1] + 1)]
        elif what == 5:
            changed = np.asfortranarray(changed)
        elif what == 6:
            changed = changed * dice.pick((0, 1e-30, 1e30, -1))
        elif what == 7:
            return {dice.pick(n for n in NAMES if n and len(n) < 200 and "/" not in n): changed, **arrays}
        else:
            return {n: a for n, a in arrays.items() if n != name}
    return {**arrays, name: changed}


def _as_they_are(_folder: Path, path: Path, _dice: Dice) -> list[object]:
    return ["--calib", path]


def _damaged(_folder: Path, path: Path, dice: Dice) -> list[object]:
    data = path.read_bytes()
    path.write_bytes(mutate_bytes(data, dice, data))
    return ["--calib", path]


def _false_header(_folder: Path, path: Path, dice: Dice) -> list[object]:
    """Write a header that promises other things than the file holds."""
    header = dice.pick((
        f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({dice.pick(NUMBERS)},)}}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 1099511627776)}",
        "{'descr': '|O', 'fortran_order': False, 'shape': (3,)}",
        "{'descr': '<f4', 'shape': ()}", "{" * 500, "[" * 9000, "__import__('os').abort()",
        "{'descr': [('a', '<f4'), ('b', 'O')], 'fortran_order': False, 'shape': (2,)}",
    ))  # fmt: skip
    version = dice.pick(((1, 0), (2, 0), (3, 0), (9, 9)))
    length = struct.pack("<H" if version == (1, 0) else "<I", len(header))
    npy = b"\x93NUMPY" + bytes(version) + length + header.encode() + bytes(dice.below(500))
    if path.suffix == ".npy":
        path.write_bytes(npy)
    else:
        with zipfile.ZipFile(path, "w", dice.pick((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
            archive.writestr("x.npy", npy)
    return ["--calib", path]


def _several_files(folder: Path, path: Path, dice: Dice) -> list[object]:
    data = path.read_bytes()
    (folder / "many").mkdir()
    for i in range(3):
        part = folder / "many" / f"{i}{dice.pick(('.npz', '.npy', '.txt', '.png'))}"
        part.write_bytes(mutate_bytes(data, dice, data) if dice.below(2) else data)
    path.unlink()
    return ["--calib", folder / "many"]


def _pictures(folder: Path, path: Path, dice: Dice) -> list[object]:
    path.unlink()
    pictures = folder / "pictures"
    pictures.mkdir()
    for i in range(3):
        stream = io.BytesIO()
        picture = Image.fromarray(dice.rng.integers(0, 256, (9 + i, 12, 3), np.uint8))
        picture.save(stream, dice.pick(("PNG", "BMP", "GIF")))
        data = stream.getvalue()
        (pictures / f"{i}.png").write_bytes(mutate_bytes(data, dice, data) if dice.below(2) else data)
    recipe = folder / "recipe.json"
    recipe.write_text(
        dice.pick(('{"scale": 1}', '{"resize": -1}', "[]", '{"std": 0}', '{"mean": "a"}', "{", '{"crop": 5}'))
    )
    return ["--calib", pictures, "--preprocess", dice.pick(("imagenet", "raw", recipe))]


def _odd_archive(folder: Path, path: Path, dice: Dice) -> list[object]:
    """Write an archive with other members."""
    data = path.read_bytes()
    with zipfile.ZipFile(folder / "s.npz", "w") as archive:
        warnings.simplefilter("ignore")  # of the same name twice
        for name in ("x.npy", "../up.npy", "/etc/passwd.npy", "x.npy", "y.txt")[: 1 + dice.below(5)]:
            archive.writestr(name, data if dice.below(3) else data[: dice.below(len(data))])
    return ["--calib", folder / "s.npz"]


def _no_samples(folder: Path, _path: Path, dice: Dice) -> list[object]:
    return dice.pick(([], ["--calib", folder / "nothing"], ["--calib", folder / "model.onnx"], ["--calib", folder]))


# by the number that the dice give: with 0 the arrays themselves are odd
SAMPLE_MUTATIONS: tuple[Callable[[Path, Path, Dice], list[object]], ...] = (
    _as_they_are, _damaged, _damaged, _false_header, _several_files, _pictures, _odd_archive, _no_samples,
)  # fmt: skip
