"""Describe samples, run models on them, and measure what comes out: shared by the families of models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort

Feeds = dict[str, np.ndarray]
Run = Callable[[Feeds], list[np.ndarray]]
Rng = np.random.Generator


@dataclass(frozen=True)
class Samples:
    """Hold what a model is calibrated and tested with.

    calib, test: arrays by input name
    figure: runs the model and tells in words whether it works
    labels: the index of the right output of each test sample, [N]
    """

    calib: Feeds
    test: Feeds
    figure: Callable[[Run], str]
    labels: np.ndarray | None = None


def top1(name: str, test: np.ndarray, labels: np.ndarray) -> tuple[Callable[[Run], str], np.ndarray]:
    """Return the `figure` of a classifier for Samples, and its labels [N]."""

    def figure(run: Run) -> str:
        right = run({name: test})[0].argmax(1) == labels
        return f"top-1 {right.mean():.1%} of {len(labels)}"

    return figure, labels


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Compute Pearson's r of two arrays."""
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def thin(items: list, count: int) -> list:
    """Choose `count` of the items, evenly spaced. Raises ValueError where there are fewer."""
    if len(items) < count:
        raise ValueError(f"{len(items)} samples where {count} are needed")
    return items[:: len(items) // count][:count]


def spread(items: list[np.ndarray], count: int) -> np.ndarray:
    """Choose `count` of the arrays, evenly spaced, and stack them."""
    return np.stack(thin(items, count))


def open_session(model: Path) -> ort.InferenceSession:
    """Open a model on one thread, so that sums, and the states carried on, are the same every time."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run_all(session: ort.InferenceSession, feeds: Feeds, batch: int = 8) -> list[np.ndarray]:
    """Compute every output over all samples, joined along axis 0 (stacked, where each feed is complete)."""
    ranks = {i.name: len(i.shape) for i in session.get_inputs()}
    count = len(next(iter(feeds.values())))
    if all(array.ndim == ranks[name] for name, array in feeds.items()):
        parts = [{n: a[i : i + batch] for n, a in feeds.items()} for i in range(0, count, batch)]
        return [np.concatenate(o) for o in zip(*(session.run(None, part) for part in parts), strict=True)]
    parts = [{n: np.asarray(a[i]) for n, a in feeds.items()} for i in range(count)]
    return [np.stack(o) for o in zip(*(session.run(None, part) for part in parts), strict=True)]
