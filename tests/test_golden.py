"""Test that the files of small runs keep their structure: opset, operators, types and shapes of stored tensors."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools" / "check"))

import golden  # noqa: E402

EXPECTED = json.loads((ROOT / "tests" / "golden.json").read_text())


def test_every_case_without_a_survey_is_held() -> None:
    assert set(EXPECTED) == {name for name, case in golden.CASES.items() if not case.is_surveyed}


@pytest.mark.parametrize("name", EXPECTED)
def test_what_a_run_writes_keeps_its_structure(name: str) -> None:
    assert golden.run(golden.CASES[name]).structure == EXPECTED[name]


def test_the_same_run_gives_the_same_bytes_and_the_same_report() -> None:
    case = golden.CASES["sentences"]
    first, second = golden.run(case), golden.run(case)
    assert first == second
