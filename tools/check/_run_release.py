"""Run models at every level of optimization; for the interpreter of a release of ONNX Runtime, which has numpy beside.

    python _run_release.py FOLDER OUT

Runs each NAME.onnx of FOLDER on NAME.npz and saves what comes out as OUT/NAME.LEVEL.npz, or the error as .txt.
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime

LEVELS = (0, 1, 2, 99)


def main() -> None:
    """Run all models."""
    folder, out = map(Path, sys.argv[1:])
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.glob("*.onnx")):
        with np.load(path.with_suffix(".npz")) as stored:
            feeds = dict(stored)
        for level in LEVELS:
            options = onnxruntime.SessionOptions()
            options.log_severity_level, options.intra_op_num_threads = 4, 1
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel(level)
            result = out / f"{path.stem}.{level}"
            try:
                session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
                made = session.run(None, feeds)
                names = [value.name for value in session.get_outputs()]
            except Exception as error:  # whatever a release raises is a result
                Path(f"{result}.txt").write_text(str(error), encoding="utf-8")
                continue
            np.savez(f"{result}.npz", **dict(zip(names, made, strict=True)))


if __name__ == "__main__":
    main()
