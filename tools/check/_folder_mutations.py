"""Put a model into a folder with something wrong or odd about it, by seeded choices."""

from __future__ import annotations

import os
from pathlib import Path

import onnx
from _fuzz_models import Dice


def mutate_folder(folder: Path, model: onnx.ModelProto, dice: Dice) -> list[object]:
    """Make something wrong or odd in the folder of the model; return the arguments for model and output."""
    source, out = folder / "model.onnx", folder / "q.onnx"
    what = dice.below(12)
    if what == 0:
        (folder / "other.onnx").write_bytes(dice.pick((b"", b"junk", source.read_bytes())))
        if dice.below(2):
            source.rename(folder / "third.onnx")
        return [folder, "-o", out]
    if what in (1, 2, 3):
        _external_data(source, model, what, dice)
    elif what in (4, 5, 6, 8):
        out = _odd_output(source, out, what, dice)
    elif what == 7:  # what a killed run left
        left = folder / ".comq-held-left"
        left.mkdir()
        (left / "q.onnx").write_bytes(b"half")
        os.utime(left, (0, 0))
    elif what == 9:
        source.unlink()
        dice.pick(
            (source.mkdir, lambda: source.symlink_to(dice.pick(("model.onnx", "/dev/zero", "no"))), lambda: None)
        )()
    elif what == 10:
        report = dice.pick((source, out, folder, folder / "no" / "r.json", Path("/dev/full")))
        return [source, "-o", out, "--json", report]
    elif what == 11:
        return [source, *dice.pick(([], ["--plan"], ["-o", out, "--include", "("], ["-o", out, "--memory", "0"],
                                    ["-o", out, "--batch-size", "1"], ["-o", out, "--exclude", "."],
                                    ["-o", out, "--granularity", "16"], ["-o", out, "--bits", "2"]))]  # fmt: skip
    return [source, "-o", out]


def _external_data(source: Path, model: onnx.ModelProto, what: int, dice: Dice) -> None:
    """Store the weights in a file of their own: whole (1), damaged (2) or replaced by something else (3)."""
    onnx.save(model, source, save_as_external_data=True, location="weights.bin", size_threshold=0)
    data = source.with_name("weights.bin")
    if what == 2:
        data.write_bytes(dice.pick((b"", data.read_bytes()[: dice.below(data.stat().st_size)], bytes(9))))
    if what == 3:
        data.unlink()
        if dice.below(3):
            data.symlink_to(dice.pick(("/etc/passwd", "/dev/zero", "weights.bin", "nothing", "model.onnx")))
        else:
            os.mkfifo(data)


def _odd_output(source: Path, out: Path, what: int, dice: Dice) -> Path:
    """Choose an output that is a directory (4), a link (5), impossible (6) or there already (8); return its path."""
    folder = source.parent
    if what == 4:
        out.mkdir()
    elif what == 5:
        out.symlink_to(dice.pick(("model.onnx", "nothing", "q.onnx", "/dev/null", "weights.bin")))
    elif what == 6:
        out = dice.pick((folder / "no" / "q.onnx", Path("/proc/q.onnx"), folder / ("q" * 300), source, folder / "pipe"))
        os.mkfifo(folder / "pipe")
    else:
        out.write_bytes(b"an older result")
    return out
