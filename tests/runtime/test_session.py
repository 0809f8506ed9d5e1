"""Test what ONNX Runtime's errors become, that a session can be closed, and that ONNX Runtime reports to nobody."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import onnx
import pytest

import comq_onnx
from comq_onnx.errors import ModelError, OutOfMemory, RuntimeFailure
from comq_onnx.evaluate.kernels import INTEGER_PRODUCTS
from comq_onnx.runtime import session as runtime
from comq_onnx.runtime.session import Session
from models import build, endless, mlp, normal, samples_for

PLACE = "/onnxruntime_src/onnxruntime/core"


@pytest.mark.parametrize(
    ("raw", "clear"),
    [
        (
            f"[ONNXRuntimeError] : 1 : FAIL : Load model from /tmp/a b.onnx failed:{PLACE}/graph/model.cc:256 "
            "onnxruntime::Model::Model(onnx::ModelProto&&, const onnxruntime::PathString&, const Model::Options&) "
            "Unsupported model IR version: 14, max supported IR version: 13",
            "Unsupported model IR version: 14, max supported IR version: 13",
        ),
        (
            f"{PLACE}/graph/model_load_utils.h:46 void onnxruntime::model_load_utils::ValidateOpsetForDomain("
            "const std::unordered_map<std::__cxx11::basic_string<char>, int>&, bool, int) ONNX Runtime only guarantees",
            "ONNX Runtime only guarantees",
        ),
        (
            "initialization: tensorprotoutils.cc:1876 GetExtDataFromTensorProto External initializer: w",
            "initialization: External initializer: w",
        ),
        (f"{PLACE}/matmul_helper.h:59 Compute MatMul dimension mismatch", "Compute MatMul dimension mismatch"),
        ("Status\n  Message:\x1b[31m red", "Status Message:?[31m red"),
    ],
)
def test_a_reason_is_one_line_without_places_in_a_source(raw: str, clear: str) -> None:
    assert runtime._reason(Exception(raw)) == clear


def test_a_model_that_cannot_be_loaded_and_one_that_fails_are_told_apart() -> None:
    with pytest.raises(ModelError, match="cannot load the thing"):
        Session(b"no model", what="the thing")
    session = Session(mlp().SerializeToString(), what="the thing")
    with pytest.raises(RuntimeFailure, match="failed running the thing") as failed:
        session.run({"x": normal(4, 31)})
    assert not isinstance(failed.value, OutOfMemory)


def test_a_failed_allocation_is_out_of_memory() -> None:
    # more than any machine has: no address space holds it
    model = build(
        "g (float[n] x, int64[1] size) => (float[m] y) { y = Expand (x, size) }",
    )
    with pytest.raises(OutOfMemory, match="no memory to run the thing"):
        Session(model.SerializeToString(), what="the thing").run(
            {"x": np.ones(1, np.float32), "size": np.array([1 << 45])}
        )


def test_a_closed_session_has_released_its_model_and_runs_no_more() -> None:
    session, feeds = Session(mlp().SerializeToString(), what="the thing"), {"x": normal(4, 32)}
    session.run(feeds)
    loaded = weakref.ref(session._session)
    session.close()
    session.close()
    assert loaded() is None
    assert session.output_names == ["y"]
    for run in (session.run, session.milliseconds):
        with pytest.raises(RuntimeError, match="the session of the thing is closed"):
            run(feeds)


def test_a_small_session_computes_the_same_and_unpacks_no_weights(tmp_path: Path) -> None:
    source, feeds = mlp(), {"x": normal(4, 32)}
    comq_onnx.quantize(source, tmp_path / "q.onnx", samples_for(source), activations="none", device="cpu")
    seen = {}
    for small in (False, True):
        kept = tmp_path / f"{small}.onnx"
        session = Session(tmp_path / "q.onnx", disable_qdq_fusion=True, small=small, optimized=kept)
        seen[small] = session.run(feeds)["y"], [n.op_type for n in onnx.load(kept).graph.node]
    np.testing.assert_allclose(seen[True][0], seen[False][0], rtol=1e-4, atol=1e-5)
    assert "DequantizeLinear" in seen[True][1]
    assert "DequantizeLinear" not in seen[False][1]


def test_a_small_session_resizes_a_constant_as_another_does() -> None:
    # folded, the Resize is gone; not folded, its Transpose must stay before it: no kernel makes fewer pixels of
    # channels that come last
    source = build(
        """places (float[n, c, h, w] x) => (float[n, k, 3] y) {
            turned = Transpose <perm = [0, 3, 1, 2]> (table)
            batch = Shape <end = 2> (turned)
            size = Shape <start = 2> (x)
            sizes = Concat <axis = 0> (batch, size)
            fewer = Resize <mode = "cubic", cubic_coeff_a = -0.75> (turned, , , sizes)
            last = Transpose <perm = [0, 2, 3, 1]> (fewer)
            flat = Reshape (last, form)
            y = Add (flat, first)
        }""",
        {"table": normal(1, 8, 8, 3), "form": np.array([1, -1, 3]), "first": normal(1, 1, 3)},
    )
    feeds = {"x": normal(2, 1, 4, 4)}
    found = [Session(source.SerializeToString(), small=small).run(feeds)["y"] for small in (False, True)]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_a_session_that_rests_loads_its_file_again(tmp_path: Path) -> None:
    path, feeds, checks = tmp_path / "m.onnx", {"x": normal(4, 32)}, []
    onnx.save(mlp(), path)
    session = Session(path, check=lambda: checks.append(1))
    before, loaded = session.run(feeds)["y"], weakref.ref(session._session)
    session.rest()
    assert loaded() is None
    assert np.array_equal(session.run(feeds)["y"], before)
    # a file that changed meanwhile is found before it is loaded
    assert len(checks) == 3
    session.close()
    with pytest.raises(RuntimeError, match="is closed"):
        session.run(feeds)
    # what was no file stays loaded
    inline = Session(mlp().SerializeToString())
    inline.rest()
    assert inline._session is not None


def test_a_closed_session_runs_no_tensors_either() -> None:
    pytest.importorskip("torch", reason="pip install torch (a CPU build will do)")
    session = Session(mlp().SerializeToString())
    session.close()
    with pytest.raises(RuntimeError, match="the session of the model is closed"):
        session.run_tensors({"x": normal(4, 32)})


def _back_to(threads: int) -> bool:
    """Tell whether no more than so many threads are left, after a moment in which one may end."""
    for _ in range(1000):
        if threading.active_count() <= threads:
            return True
        time.sleep(0.01)
    return False


def test_a_run_without_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "MOST_SECONDS", 0.2)
    threads = threading.active_count()
    with pytest.raises(ModelError, match="the thing: no end after 0 s on one batch"):
        Session(endless().SerializeToString(), what="the thing").run({"x": normal(4, 32)})
    assert _back_to(threads)


class _Asked(BaseException):
    """Stand for what the handler of a signal raises."""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="other signals here")
def test_a_signal_ends_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise _Asked

    before = signal.signal(signal.SIGALRM, stop)
    # without signals it would end by this
    monkeypatch.setattr(runtime, "MOST_SECONDS", 30.0)
    threads = threading.active_count()
    session = Session(endless().SerializeToString())
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(_Asked):
            session.run({"x": normal(4, 32)})
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert _back_to(threads)


def test_a_run_needs_no_thread_where_none_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", full)
    session = Session(mlp().SerializeToString())
    assert session.run({"x": normal(4, 32)})["y"].shape == (4, 10)
    with pytest.raises(RuntimeFailure, match="failed running"):
        session.run({"x": normal(4, 31)})


def test_a_model_that_cannot_be_loaded_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    # of an error of this kind ONNX Runtime's Python part tries again, and says so on standard output
    broken = mlp().SerializeToString().replace(b"\x04Relu", b"\x04\xe9elu")
    with pytest.raises(ModelError, match=r"cannot load the model: .*codec"):
        Session(broken)
    assert capfd.readouterr() == ("", "")


def test_onnx_runtime_is_asked_to_report_nothing(tmp_path: Path) -> None:
    code = "import os, comq_onnx\nprint(os.environ['ORT_DISABLE_TELEMETRY'])"
    package = str(Path(comq_onnx.__file__).parents[1])
    environment = {
        "TMPDIR": str(tmp_path), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path / "home"), "PYTHONPATH": package,
    }  # fmt: skip
    for given, wanted in ((None, "1"), ("0", "0")):
        extra = {} if given is None else {"ORT_DISABLE_TELEMETRY": given}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env={**environment, **extra}
        )
        assert done.stdout == f"{wanted}\n", done.stderr
        if given is None:
            assert not list(tmp_path.glob("*"))


def test_without_qdq_fusion_a_session_has_no_integer_kernels(tmp_path: Path) -> None:
    source = mlp()
    comq_onnx.quantize(source, tmp_path / "q.onnx", samples_for(source), bits=8)
    ops = {}
    for disabled in (False, True):
        seen = tmp_path / f"{disabled}.onnx"
        Session(tmp_path / "q.onnx", optimized=seen, disable_qdq_fusion=disabled)
        ops[disabled] = {node.op_type for node in onnx.load(seen).graph.node}
    assert ops[False] & INTEGER_PRODUCTS
    assert not ops[True] & INTEGER_PRODUCTS
    assert "QuantizeLinear" in ops[True]
