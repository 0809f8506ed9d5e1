"""Time the solver on layers of several sizes against a plain torch GPTQ and the paper's algorithm on X.

    python tools/bench/solve.py                 # one thread, 768 x 768 to 4096 x 4096
    python tools/bench/solve.py --sizes 768x768 --bits 2 --seeds 3
    python tools/bench/solve.py --steps --sizes 768x768 --seeds 3    # what each step of the solver adds

The layers are synthetic: inputs with a power-law spectrum, mixed by a random rotation, with a mean; weights are
Gaussian. The objective is that of the layer on other inputs of the same kind, 10 log10 (||Wq X - W X||^2 / ||W X||^2),
after each method's own shift of the bias. Columns:

- ms, median of several runs; `solve` is what the pipeline calls, with plain rounding, the choice of the ridge and the
  errors for the report around the solver; the solver's own time stands before it;
- of limit: the time that n^3 / 3 + 3 n^2 m flops, and n^2 m for each further rounding pass (scale candidates, zero
  points), would take at the sgemm rate measured in the same run, over the solver's own time;
- torch GPTQ: Frantar et al.'s algorithm as commonly written (inputs by decreasing power, blocks of 128, ridge .01, the
  inverse's Cholesky factor), on the same grid and clip, in this file; without torch the row is left out.
- paper on X: the authors' algorithm on the samples themselves, float32, one channel part and one sweep measured and
  the rest extrapolated.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import click
import numba
import numpy as np
from threadpoolctl import threadpool_limits

from comq_onnx.solve.comq import solve_comq
from comq_onnx.solve.effort import EFFORTS, Effort
from comq_onnx.solve.grid import Grid, QuantizedWeight, fit_minmax, fit_mse
from comq_onnx.solve.layer import Method, error_db, solve
from comq_onnx.solve.moments import Moments, MomentSums
from comq_onnx.solve.output_error import OutputError
from comq_onnx.solve.rounding import ZERO_POINT_BITS

try:
    import torch
except ImportError:
    torch = None  # type: ignore[assignment]

SIZES = ("768x768", "3072x768", "4608x512", "4096x4096")
POSITIONS = 3  # positions per input that calibrate
PAPER_POSITIONS = 2048


@dataclass(frozen=True)
class Layer:
    """Hold a synthetic layer.

    weight: [1, m, n]
    seen, unseen: the moments to calibrate on and to measure on
    rows: inputs [positions, n]
    """

    weight: np.ndarray
    seen: Moments
    unseen: Moments
    rows: np.ndarray


def make_layer(n: int, m: int, seed: int) -> Layer:
    """Make a layer of n inputs and m outputs."""
    rng = np.random.default_rng(seed)
    mixing, _ = np.linalg.qr(rng.standard_normal((n, n), dtype=np.float32))
    mixing *= (np.arange(1, n + 1, dtype=np.float32) ** -0.5)[:, None]
    mean = (0.1 * rng.standard_normal(n)).astype(np.float32)
    weight = rng.standard_normal((1, m, n), dtype=np.float32)

    def rows(count: int) -> np.ndarray:
        return rng.standard_normal((count, n), dtype=np.float32) @ mixing + mean

    seen, unseen = MomentSums(), MomentSums()
    first = rows(1024)
    for k in range(-(-POSITIONS * n // 1024)):
        seen.add((first if k == 0 else rows(1024))[None], None, half=k % 2)
        unseen.add(rows(1024)[None], None)
    return Layer(weight, seen.moments(), unseen.moments(), np.concatenate([first, rows(1024)]))


def milliseconds(run: Callable[[], Any], runs: int) -> float:
    """Time several runs: the median in milliseconds."""
    spent = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        spent.append(1e3 * (time.perf_counter() - start))
    return median(spent)


def sgemm_rate(n: int = 2048) -> float:
    """Measure the flops per millisecond of a float32 matrix product."""
    a = np.random.default_rng(0).standard_normal((n, n), dtype=np.float32)
    return 2 * n**3 / milliseconds(lambda: a @ a, 5)


def limit(n: int, m: int, grid: Grid, effort: str) -> float:
    """Count the flops that cannot be avoided, and those of the rounding passes."""
    search = EFFORTS[effort]
    passes = len(search.factors) + 2 * (search.zero_points and not grid.symmetric and grid.bits <= ZERO_POINT_BITS)
    return n**3 / 3 + (3 + passes) * n**2 * m


def torch_gptq(weight: np.ndarray, gram: np.ndarray, grid: Grid, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
    """Run GPTQ (Frantar et al. 2023) on one matrix: wq [m, n].

    weight: [m, n]
    gram: [n, n]
    scale, zero: [m]
    """
    w, h = torch.from_numpy(weight.copy()), torch.from_numpy(gram.astype(np.float32))
    s, z = torch.from_numpy(scale.copy()), torch.from_numpy(zero.astype(np.float32))
    order = torch.argsort(torch.diag(h), descending=True)
    w, h = w[:, order], h[order][:, order]
    h = h + 0.01 * torch.diag(h).mean() * torch.eye(len(h))
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    wq = torch.empty_like(w)
    for start in range(0, w.shape[1], 128):
        stop = min(start + 128, w.shape[1])
        block, errors, factor = w[:, start:stop].clone(), torch.empty(len(w), stop - start), inverse[start:stop]
        for i in range(stop - start):
            column = block[:, i]
            q = torch.clamp(torch.round(column / s) + z, grid.qmin, grid.qmax)
            wq[:, start + i] = s * (q - z)
            error = (column - wq[:, start + i]) / factor[i, start + i]
            block[:, i:] -= error[:, None] * factor[i, start + i : stop]
            errors[:, i] = error
        w[:, stop:] -= errors @ factor[:, stop:]
    return wq[:, torch.argsort(order)].numpy()


def paper_seconds(layer: Layer, grid: Grid, sweeps: int = 3, channels: int = 64, inputs: int = 24) -> float:
    """Time the authors' algorithm on X in seconds, extrapolated from some channels and steps.

    Each channel visits its inputs in its own order, and its residual over all positions follows every code.
    """
    x = np.ascontiguousarray(np.resize(layer.rows, (PAPER_POSITIONS, layer.rows.shape[1])).T)
    w = layer.weight[0, :channels]
    scale, zero = (a[0, :channels, 0] for a in fit_minmax(layer.weight, grid))
    norms, residual = (x**2).sum(axis=1), np.zeros((channels, PAPER_POSITIONS), np.float32)
    visits = np.argsort(-np.abs(w) * np.sqrt(norms), axis=1, kind="stable")
    every = np.arange(channels)
    start = time.perf_counter()
    for i in visits.T[:inputs]:
        column = x[i]
        target = np.einsum("cp,cp->c", column, residual) / norms[i] + w[every, i]
        q = np.clip(np.rint(target / scale), grid.qmin - zero, grid.qmax - zero)
        residual += column * (w[every, i] - q * scale)[:, None]
    spent = time.perf_counter() - start
    return spent * sweeps * layer.weight.shape[2] / inputs * layer.weight.shape[1] / channels


def objective(layer: Layer, quantized: QuantizedWeight, centred: bool) -> float:
    """Compute the objective in dB on unseen rows; centred: after a shift of the bias by the mean error on seen rows."""
    errors = OutputError(layer.weight, layer.unseen.centred())
    variance, offset = errors.of(quantized)
    if centred:
        lost = layer.weight - quantized.dequantize()
        offset = offset - np.einsum("gmn,gn->gm", lost, layer.seen.mean)
    return error_db(float((variance + offset**2).sum()) / float(errors.energy.sum()))


@dataclass
class Row:
    """Hold one line of the table."""

    name: str
    ms: float
    db: float
    share: float | None = None
    whole_ms: float | None = None


def measure(n: int, m: int, grid: Grid, efforts: tuple[str, ...], runs: int, seeds: int) -> list[Row]:
    """Measure the rows of one size: times from the first seed, objectives as the mean over all."""
    rate = sgemm_rate()
    layers = [make_layer(n, m, seed) for seed in range(seeds)]
    first = layers[0]
    rows = []
    for effort in efforts:
        solve_comq(first.weight[:, :64], first.seen, grid, effort)  # compile
        centred = first.seen.centred()
        ms = milliseconds(lambda e=effort, c=centred: solve_comq(first.weight, c, grid, e), runs)  # type: ignore[misc]
        whole = milliseconds(
            lambda e=effort: solve(first.weight, first.seen, grid, Method(effort=e), has_bias=True),
            runs,  # type: ignore[misc]
        )
        db = [objective(x, solve_comq(x.weight, x.seen.centred(), grid, effort), True) for x in layers]
        rows.append(Row(f"comq {effort}", ms, float(np.mean(db)), limit(n, m, grid, effort) / rate / ms, whole))
    for solver in ("gptq", "paper", "rtn"):
        method = Method(solver)
        ms = milliseconds(lambda f=method: f(first.weight, first.seen, grid), 1)  # type: ignore[misc]
        rows.append(Row(f"{solver} (ours)", ms, float(np.mean([objective(x, method(x.weight, x.seen, grid), False)
                                                               for x in layers]))))  # fmt: skip
    if torch is not None:
        torch.set_num_threads(1)
        scale, zero = fit_mse(first.weight, grid)
        gram = first.seen.gram[0]
        ms = milliseconds(lambda: torch_gptq(first.weight[0], gram, grid, scale[0, :, 0], zero[0, :, 0]), runs)
        rows.append(Row("torch GPTQ", ms, float(np.mean([_gptq_db(x, grid) for x in layers]))))
    rows.append(Row("paper on X", 1e3 * paper_seconds(first, grid), float("nan")))
    return rows


# from a single rounding pass on, each with what stands before it
STEPS = {
    "one rounding pass": Effort((), 0, descend=False, choose_ridge=False, zero_points=False),
    "+ sweeps and moves of single codes": Effort((), 0, choose_ridge=False, zero_points=False),
    "+ zero points": Effort((), 0, choose_ridge=False),
    "+ 5 more scales": replace(EFFORTS["default"], pairs=0, choose_ridge=False),
    "+ pair moves": replace(EFFORTS["default"], choose_ridge=False),
    "+ a chosen ridge (default)": EFFORTS["default"],
    "default with bit-split": replace(EFFORTS["default"], bit_split=True),
    "default with a beam of 8": replace(EFFORTS["default"], beam=8),
    "default with both": replace(EFFORTS["default"], beam=8, bit_split=True),
    "max": EFFORTS["max"],
}


def print_steps(sizes: tuple[str, ...], granularity: str, seeds: int) -> None:
    """Print a table of what each step adds: dB on unseen inputs, and ms."""
    click.echo("| inputs x outputs | step | ms | 4 bits | 3 bits | 2 bits |")
    click.echo("|---|---|---|---|---|---|")
    for size in sizes:
        layers = [make_layer(*(int(x) for x in size.split("x")), seed) for seed in range(seeds)]
        for name, effort in STEPS.items():
            spent, found = [], []
            for bits in (4, 3, 2):
                grid = make_grid(bits, granularity)
                solve_comq(layers[0].weight[:, :64], layers[0].seen, grid, effort)  # compile
                start = time.perf_counter()
                solved = [solve_comq(x.weight, x.seen.centred(), grid, effort) for x in layers]
                spent.append(1e3 * (time.perf_counter() - start) / seeds)
                found.append(np.mean([objective(x, q, True) for x, q in zip(layers, solved, strict=True)]))
            click.echo(f"| {size} | {name} | {median(spent):,.0f} | " + " | ".join(f"{db:.2f}" for db in found) + " |")


def make_grid(bits: int, granularity: str) -> Grid:
    """Return the asymmetric grid of `bits` bits per channel or per block."""
    return Grid(bits, symmetric=False, block_size=int(granularity) if granularity.isdigit() else None)


def _gptq_db(layer: Layer, grid: Grid) -> float:
    scale, zero = fit_mse(layer.weight, grid)
    wq = torch_gptq(layer.weight[0], layer.seen.gram[0], grid, scale[0, :, 0], zero[0, :, 0])
    codes = np.rint(wq / scale[0]).astype(np.int8)[None] + zero
    return objective(layer, QuantizedWeight(codes.astype(np.int8), scale, zero, grid), False)


@click.command()
@click.option("--sizes", multiple=True, default=SIZES, show_default=True, help="inputs x outputs")
@click.option("--bits", default=4, show_default=True)
@click.option("--granularity", default="channel", show_default=True, help="channel or a block size")
@click.option("--effort", "efforts", multiple=True, type=click.Choice(list(EFFORTS)), default=("fast", "default"))
@click.option("--runs", default=3, show_default=True)
@click.option("--seeds", default=1, show_default=True)
@click.option("--threads", default=1, show_default=True, help="of the solver; everything else has one")
@click.option("--steps", is_flag=True, help="What each step adds, in place of the comparison.")
def main(
    sizes: tuple[str, ...], bits: int, granularity: str, efforts: tuple[str, ...], runs: int, seeds: int, threads: int,
    steps: bool,
) -> None:  # fmt: skip
    """Print a table of times and objectives."""
    numba.set_num_threads(threads)
    grid = make_grid(bits, granularity)
    with threadpool_limits(1):
        click.echo(
            f"{platform.machine()}, {threads} thread(s), numpy {np.__version__}, sgemm {sgemm_rate() / 1e6:.0f} GF/s; "
            f"{bits} bits, asymmetric, per {granularity}; {seeds} seed(s)"
        )
        if steps:
            print_steps(sizes, granularity, seeds)
            return
        click.echo("| inputs x outputs | method | ms | `solve` ms | of limit | times as long as comq fast | dB |")
        click.echo("|---|---|---|---|---|---|---|")
        for size in sizes:
            n, m = (int(x) for x in size.split("x"))
            rows = measure(n, m, grid, efforts, runs, seeds)
            for row in rows:
                whole = "" if row.whole_ms is None else f"{row.whole_ms:,.0f}"
                share = "" if row.share is None else f"{row.share:.0%}"
                db = "" if np.isnan(row.db) else f"{row.db:.2f}"
                click.echo(
                    f"| {size} | {row.name} | {row.ms:,.0f} | {whole} | {share} | {row.ms / rows[0].ms:,.1f} | {db} |"
                )


if __name__ == "__main__":
    main()
