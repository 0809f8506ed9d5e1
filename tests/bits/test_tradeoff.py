"""Test budgets as a user writes them, and the allocations that keep them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from comq_onnx.bits.drop_check import check_drop, max_noise
from comq_onnx.bits.knapsack import Allocation
from comq_onnx.bits.survey import BITS, Sensitivity
from comq_onnx.bits.tradeoff import Tradeoff, node_bytes
from comq_onnx.errors import OptionError
from comq_onnx.evaluate.outputs import Compared
from comq_onnx.metrics import OutputComparison, expected_agreement
from comq_onnx.options.budgets import Drop, parse_drop, parse_size

RNG = np.random.default_rng(0)
LEADS = RNG.exponential(1.0, 400)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("25%", 250_000), ("12.5 %", 125_000), ("3MB", 3_000_000), ("3m", 3_000_000), ("800kB", 800_000),
        ("1.5MiB", 1_572_864), ("2GB", 2_000_000_000), ("4096", 4096), ("4096B", 4096), (".5kb", 500),
    ],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text, 1_000_000) == size


@pytest.mark.parametrize("text", ["", "a lot", "-3MB", "3TB", "3 M B", "%", "1e6"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(OptionError) as refused:
        parse_size(text, 1_000_000)
    assert str(refused.value) == f"--size {text}: a share such as 25%, or a size such as 3MB or 800kB"


@pytest.mark.parametrize(
    ("text", "drop"),
    [("0.5", Drop(0.5)), (2, Drop(2.0)), ("1.5%", Drop(1.5)), ("20dB", Drop(None, 20.0)), ("120 db", Drop(None, 120)),
     ("120dB", Drop(None, 120))],
)  # fmt: skip
def test_drops(text: str | float, drop: Drop) -> None:
    assert parse_drop(text) == drop


@pytest.mark.parametrize("text", ["", "0", "100", "-1", "dB", "half", "0dB", 0.0])
def test_what_is_no_drop_is_refused(text: str | float) -> None:
    with pytest.raises(OptionError) as refused:
        parse_drop(text)
    assert str(refused.value) == (
        f"--max-drop {text}: points of top-1 agreement or percent of perplexity, above 0 and below 100, such as "
        "0.5, or an SQNR to keep, such as 20dB"
    )


# Accuracy -------------------------------------------------------------------------------------------------------------


def test_the_limit_of_a_drop_keeps_it_with_a_reserve() -> None:
    # the expected loss is half of what may be lost
    assert expected_agreement(LEADS, max_noise(Drop(points=4.0), LEADS) ** 0.5) == pytest.approx(0.98, abs=1e-4)
    assert max_noise(Drop(sqnr_db=20.0), None) == pytest.approx(10**-2.05)


def test_points_need_class_scores() -> None:
    with pytest.raises(OptionError) as refused:
        max_noise(Drop(points=0.5), None)
    assert str(refused.value) == (
        "--max-drop 0.5: no output of this model looks like class scores; give an SQNR to keep, such as --max-drop 20dB"
    )


def output(sqnr: float, agreement: float | None) -> OutputComparison:
    """Make the comparison of one output."""
    return OutputComparison("y", sqnr, 1.0, agreement)


def compared(*outputs: OutputComparison) -> Compared:
    """Make the comparison of two models with these outputs."""
    return Compared(list(outputs), [], None)


@pytest.mark.parametrize(("sqnr", "enough", "ratio"), [(23.0, True, 2.0), (20.0, True, 1.0), (17.0, False, 0.5)])
def test_an_sqnr_is_kept_by_the_worst_output(sqnr: float, enough: bool, ratio: float) -> None:
    kept = check_drop(Drop(sqnr_db=20.0), None, compared(output(40.0, None), output(sqnr, None)), None)
    assert kept.enough == enough
    assert kept.ratio == pytest.approx(ratio, rel=0.01)
    assert kept.said == f"{sqnr:.2f} dB remain"


def test_points_are_kept_by_count_and_by_expectation() -> None:
    small, large = RNG.normal(0, 0.005, 64), RNG.normal(0, 0.5, 64)
    drop = Drop(points=2.0)
    kept = check_drop(drop, LEADS, compared(output(9.0, None), output(30.0, 1.0)), small)
    assert kept.enough
    assert kept.ratio > 1
    # by luck no best class changed
    assert not check_drop(drop, LEADS, compared(output(30.0, 1.0)), large).enough
    assert check_drop(drop, LEADS, compared(output(30.0, 1.0)), large).ratio < 0.1
    # by bad luck one changed, 1 of 32
    unlucky = check_drop(drop, LEADS, compared(output(30.0, 31 / 32)), small)
    assert not unlucky.enough
    assert unlucky.ratio == 0.5
    assert unlucky.said.startswith("3.1 points of agreement are lost (0.")


# Tradeoff -------------------------------------------------------------------------------------------------------------

COUNTS = {"a": 1000, "b": 4000, "table": 8000}
REST = 500


def tradeoff(widths: dict[str, tuple[int, ...]] | None = None, nodes: int = 0) -> Tradeoff:
    """Make a tradeoff of three groups, the first of two layers.

    widths: the bits that each group may have; all where None
    nodes: the bytes of a file for each group in bit planes, beside its codes and 500 bytes
    """
    gains = {"a": np.array([5.0, 1.0]), "b": np.array([0.2, 0.04]), "table": np.array([0.05, 0.01])}
    base = np.array([1e-4, 1e-5])
    sensitivity = Sensitivity(
        {"a": ["a", "a2"], "b": ["b"], "table": ["table"]},
        {name: {bits: 4.0**-bits for bits in BITS} for name in gains},
        gains, base, base + sum(gains.values()) * 4.0**-4,
    )  # fmt: skip
    code_bytes = {name: {bits: count * bits // 8 for bits in BITS} for name, count in COUNTS.items()}

    def file_size(bits: dict[str, int]) -> int:
        assert bits["a"] == bits["a2"]
        return REST + sum(code_bytes[n][bits[n]] + nodes * (bits[n] not in (2, 4, 8)) for n in COUNTS)

    found = node_bytes(sensitivity.groups, code_bytes, file_size)
    assert found == {bits: nodes * (bits not in (2, 4, 8)) for bits in BITS}
    every = dict.fromkeys(COUNTS, BITS)
    return Tradeoff(sensitivity, widths or every, code_bytes, found, COUNTS, file_size, LEADS)


def test_layers_that_share_a_weight_share_its_bits() -> None:
    one = tradeoff()
    bits = one.bits(one.within_codes(5000))
    assert bits["a"] == bits["a2"]
    assert bits["a"] > bits["b"] > bits["table"]


@pytest.mark.parametrize("nodes", [0, 100])
@pytest.mark.parametrize("size", [3750, 4200, 6600, 9000, 13_500])
def test_a_file_is_no_larger_than_its_budget_and_uses_it(size: int, nodes: int) -> None:
    one = tradeoff(nodes=nodes)
    found = one.within_size(size)
    assert one.file_size(one.bits(found)) <= size

    def noise(allocation: Allocation) -> float:
        return float(one.noise(allocation)[0])

    better = [b for b in range(size, size + 2500, 50) if noise(one.within_size(b)) < noise(found)]
    # the next better one needs more bytes than there were: its file is larger
    assert not better or one.file_size(one.bits(one.within_size(better[0]))) > size


def test_a_file_that_cannot_be_so_small_is_refused_with_the_least() -> None:
    with pytest.raises(OptionError) as refused:
        tradeoff().within_size(3749)
    assert str(refused.value) == (
        "--size: 3,749 bytes are asked for; the least for this model is 3,750, at 2.0 bits a weight"
    )


def test_mean_bits_count_weights() -> None:
    one = tradeoff(nodes=50)
    found = one.within_mean(3.5)
    assert one.mean_bits(one.bits(found)) <= 3.5
    assert one.mean_bits(one.bits(found)) > 3.2
    with pytest.raises(OptionError) as refused:
        tradeoff({"a": (8,), "b": (8,), "table": (4, 8)}).within_mean(5.0)
    assert str(refused.value) == "--bits 5: the least that this model's weights take is 5.54 bits in the mean"


@pytest.mark.parametrize(("kind", "most"), [(0, 2e-3), (1, 4e-4)])
def test_the_fewest_bytes_within_a_noise(kind: int, most: float) -> None:
    one = tradeoff()
    found = one.within_noise(most, kind)
    assert one.noise(found)[kind] <= most
    # a tenth fewer bytes would be too few
    assert one.noise(one.within_codes(int(0.9 * found.size)))[kind] > most
    # activations alone bring more noise than that: every layer gets the most bits
    assert one.bits(one.within_noise(1e-6, kind)) == dict.fromkeys(("a", "a2", "b", "table"), 8)


def test_the_frontier_falls_and_holds_the_chosen_one() -> None:
    one = tradeoff()
    chosen = one.within_size(6000)
    points = one.frontier(chosen)
    sizes, sqnr = [p.size for p in points], [p.sqnr_db for p in points]
    assert sizes == sorted(sizes)
    assert sqnr == sorted(sqnr)
    assert (sizes[0], sizes[-1]) == (REST + 13_000 // 4, REST + 13_000)
    (marked,) = [p for p in points if p.chosen]
    assert marked.size == REST + chosen.size
    agreements = [p.top1_agreement for p in points if p.top1_agreement is not None]
    assert len(agreements) == len(points)
    assert agreements == sorted(agreements)


def test_predictions_meet_what_all_layers_do_together() -> None:
    one = tradeoff().sensitivity
    np.testing.assert_allclose(one.noise(dict.fromkeys(one.groups, 4)), one.together)
    # half of the damage is that of the noise, half that of the leads
    assert sum(one.damage(name, 4) for name in one.groups) == pytest.approx(2)
    assert one.cost("a2", 3) == pytest.approx(5.0 * 4.0**-3)


def test_one_width_leaves_no_choice() -> None:
    fixed: Callable[[], Tradeoff] = lambda: tradeoff({"a": (8,), "b": (4,), "table": (8,)})  # noqa: E731
    low, high = fixed().limits()
    assert low == high
    assert fixed().bits(fixed().within_noise(1.0, 0)) == {"a": 8, "a2": 8, "b": 4, "table": 8}
