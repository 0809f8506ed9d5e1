"""Test that stages get the samples they need, and that samples which wait change nothing but the positions drawn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Solved
from stages import planned
from walks import quantize

from comq_onnx.calibrate import layer_moments, leading, stages
from comq_onnx.calibrate.leading import divide, input_shapes, samples_needed, spread
from comq_onnx.calibrate.walk import walk
from comq_onnx.model.layers import calibrated
from comq_onnx.samples.samples import Samples
from models import build, cnn, mlp, samples_for, weight


@pytest.fixture
def tiers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leading, "TIERS", (8, 16))
    monkeypatch.setattr(layer_moments, "LEAST_POSITIONS", 300)
    monkeypatch.setattr(layer_moments, "MOST_POSITIONS", 300)
    monkeypatch.setattr(layer_moments, "POSITIONS_PER_INPUT", 1)


@pytest.mark.parametrize(("total", "unit"), [(200, None), (37, None), (64, 4), (5, None), (7, 2)])
def test_the_first_samples_come_from_everywhere_in_whole_batches(total: int, unit: int | None) -> None:
    samples = Samples({"x": np.arange(total)}, "", fixed_batch=unit)
    order, size = spread(samples), unit or 1
    whole = total // size * size
    assert sorted(order) == list(range(whole))
    batches = order.reshape(-1, size)
    assert (np.diff(batches, axis=1) == 1).all()
    assert (batches[:, 0] % size == 0).all()
    for few in (4, 8, 32):
        places = np.sort(batches[:few, 0])
        if len(places) == few:
            # no gap is more than twice as wide as those of evenly spread samples
            assert np.diff([*places, whole]).max() <= 2 * whole / few + size


def needed(tmp_path: Path, model: onnx.ModelProto, count: int = 40, **options: Any) -> dict[str, int]:
    """Return how many samples the stage of each layer needs."""
    onnx.save(model, tmp_path / "m.onnx")
    at = planned(tmp_path / "m.onnx", samples_for(model, count), bits=4, **options)
    parts = stages.cut(at.plan.walked.model, list(calibrated(at.plan.walked.layers)))
    shapes = input_shapes(at.plan, parts, at.data.calibration, "cpu", tmp_path)
    found = samples_needed(at.plan, parts, at.data.calibration, 1, shapes)
    return {layer.name: found[stage.index] for stage in parts for layer in stage.layers}


@pytest.mark.usefixtures("tiers")
def test_a_stage_needs_fewer_samples_the_more_positions_each_has(tmp_path: Path) -> None:
    # 64 positions a sample, of which 450 and more are asked for: 8 samples; the head has one a sample
    assert needed(tmp_path, cnn()) == {"stem": 8, "depthwise": 8, "point": 8, "head": 35}
    # 16 positions a sample
    assert needed(tmp_path, cnn(size=8)) == {"stem": 35, "depthwise": 35, "point": 35, "head": 35}
    # no convolution
    assert set(needed(tmp_path, mlp()).values()) == {35}


def test_what_reads_the_input_of_the_graph_needs_no_run_to_be_known(tmp_path: Path) -> None:
    model = build(
        """g (float[batch, 3, 32, 32] x) => (float[batch, 16, 30, 30] y) {
            [only] y = Conv <kernel_shape = [3, 3]> (x, w)
        }""",
        {"w": weight(16, 3, 3, 3, fan=27)},
    )
    assert needed(tmp_path, model, count=80) == {"only": 32}


@pytest.mark.usefixtures("tiers")
def test_with_few_samples_all_are_needed(tmp_path: Path) -> None:
    assert set(needed(tmp_path, cnn(), count=9).values()) == {8}


def test_each_group_holds_other_samples_and_knows_their_numbers(tmp_path: Path) -> None:
    onnx.save(cnn(), tmp_path / "m.onnx")
    data = planned(tmp_path / "m.onnx", samples_for(cnn()), bits=4).data
    groups = divide(data, [8, 8, 16, 35], 16)
    assert [group.start for group in groups] == [0, 8, 16, 32]
    assert [sum(group.counts) for group in groups] == [8, 8, 16, 3]
    everything = data.calibration
    numbers = [everything.number(i) for i in range(len(everything))]
    for group in groups:
        seen = np.concatenate([batch["image"] for batch in group.batches])
        for k, image in enumerate(seen):
            assert np.array_equal(image, everything.arrays["image"][numbers.index(group.samples.number(k))])


@pytest.mark.usefixtures("tiers")
@pytest.mark.parametrize("options", [{}, {"activations": "none"}, {"independent": True}, {"memory_gb": 0.0}], ids=str)
def test_samples_that_wait_are_seen_by_all_ranges_and_by_the_layers_that_need_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, solved: Solved, options: dict[str, Any]
) -> None:
    onnx.save(cnn(), tmp_path / "m.onnx")
    at = planned(tmp_path / "m.onnx", samples_for(cnn()), bits=4, **options)

    def ranges() -> dict[str, tuple[float, float]]:
        found = walk(at.plan, at.data, at.context)
        return {name: (seen.low, seen.high) for name, seen in found.ranges.items()}

    waiting, counts = ranges(), {name: moments.count for name, moments in solved.on.items()}
    monkeypatch.setattr(leading, "TIERS", ())
    everything = ranges()
    assert set(waiting) == set(everything)
    for name, ends in waiting.items():
        # float32 sums in another order: several stages are one graph for ONNX Runtime
        assert ends == pytest.approx(everything[name], rel=1e-5)
    assert bool(waiting) == (options.get("activations") != "none")
    assert {name: moments.count for name, moments in solved.on.items()} == counts
    assert counts["head"] == 35


@pytest.mark.usefixtures("tiers")
@pytest.mark.parametrize("make", [cnn, lambda: cnn(size=32)], ids=["16", "32"])
def test_the_batch_size_changes_no_byte_where_samples_wait(tmp_path: Path, make: Callable[[], onnx.ModelProto]) -> None:
    written = []
    for batch_size in (16, 8, 24, 40):
        quantize(make(), tmp_path / "q.onnx", batch_size=batch_size)
        written.append((tmp_path / "q.onnx").read_bytes())
    assert len(set(written)) == 1
