"""Test the scripts of tools/: each says what it does, and their figures are numpy's."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from reports import report
from script import run_script

import comq_onnx
from comq_onnx.metrics import OutputComparison
from models import infer, mlp, samples_for, sqnr

ROOT = Path(__file__).parents[1]
# a leading underscore: a module that tools share
TOOLS = sorted((ROOT / "tools").rglob("[!_]*.py"))
# what the exporters and the training script need beside the package's own requirements
HEAVY = {"torch", "safetensors", "tokenizers"}


def call(*command: object) -> subprocess.CompletedProcess[str]:
    """Run a tool in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, env=environment, timeout=600, cwd=ROOT
    )


def test_there_are_tools() -> None:
    assert {"evaluate.py", "zoo/make_models.py", "zoo/export.py"} <= {
        str(path.relative_to(ROOT / "tools")) for path in TOOLS
    }


def imported_by(path: Path) -> set[str]:
    """Name the modules that a tool imports, and those that the modules beside it import."""
    names = set(re.findall(r"^(?:import|from) (\w+)", path.read_text(), re.MULTILINE))
    beside = [path.with_name(f"{name}.py") for name in names]
    return names.union(*(imported_by(other) for other in beside if other.is_file()))


@pytest.mark.parametrize("path", TOOLS, ids=lambda path: str(path.relative_to(ROOT / "tools")))
def test_every_tool_says_what_it_does(path: Path) -> None:
    imported = imported_by(path)
    if missing := [name for name in imported & HEAVY if find_spec(name) is None]:
        pytest.skip(f"{', '.join(missing)} not installed")
    said = run_script(path, "--help")
    assert said.code == 0, said.err
    assert "usage" in said.out.lower()
    # more than the list of options
    assert len(said.out.split()) > 20


@pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")
def test_the_check_of_a_gpu_finds_torchs_cpu_right_in_every_part(tmp_path: Path) -> None:
    done = call(ROOT / "tools" / "check" / "gpu.py", "--device", "cpu", "--json", tmp_path / "rows.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("all is right")
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["what"] for row in rows if row["good"] is False] == []
    asked = " ".join(row["what"] for row in rows if row["good"])
    assert all(part in asked for part in ("tensor", "Gram of rows", "Gram of patches", "solver", "codes", "SQNR"))
    assert sum(row["part"] == "timing" for row in rows) >= 6


@pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")
def test_the_check_of_a_gpu_says_where_there_is_none() -> None:
    done = call(ROOT / "tools" / "check" / "gpu.py", "--device", "cuda:99")
    assert done.returncode == 1
    assert "--device cuda:99:" in " ".join(done.stdout.split())


@pytest.fixture(scope="module")
def quantized_cnn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Quantize fashion_cnn to 2 bits: coarse enough that some images change their class."""
    out = tmp_path_factory.mktemp("tools") / "cnn_q.onnx"
    comq_onnx.quantize(
        ROOT / "models" / "fashion_cnn.onnx", out, ROOT / "models" / "fashion_calib.npz", bits=2, max_samples=64,
        device="cpu",
    )  # fmt: skip
    return out


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Store 300 of the test images in the form of models/fashion_test.npz."""
    path = tmp_path_factory.mktemp("images") / "test.npz"
    with np.load(ROOT / "models" / "fashion_test.npz") as loaded:
        np.savez(path, **{name: loaded[name][:300] for name in loaded.files})
    return path


@pytest.mark.parametrize("labels", ["inside", "file", "none"])
def test_the_evaluations_figures_are_numpys(tmp_path: Path, quantized_cnn: Path, images: Path, labels: str) -> None:
    source = ROOT / "models" / "fashion_cnn.onnx"
    with np.load(images) as loaded:
        image, label = loaded["image"], loaded["label"]
    arguments: list[object] = ["--samples", images]
    if labels != "inside":
        arguments = ["--samples", tmp_path / "plain.npz"]
        np.savez(tmp_path / "plain.npz", image=image)
    if labels == "file":
        np.save(tmp_path / "labels.npy", label)
        arguments += ["--labels", tmp_path / "labels.npy"]
    report = tmp_path / "figures.json"
    done = run_script(ROOT / "tools" / "evaluate.py", source, quantized_cnn, *arguments, "--json", report)
    assert done.code == 0, done.err
    assert "onnxruntime" in done.out
    figures = json.loads(report.read_text())["logits"]
    before, after = (infer(path, {"image": image.astype(np.float32)})["logits"] for path in (source, quantized_cnn))
    # batches of 16 here, one of 300 there: float32 sums in another order
    assert figures["sqnr_db"] == pytest.approx(sqnr(before, after), abs=0.05)
    assert figures["agreement"] == pytest.approx((before.argmax(-1) == after.argmax(-1)).mean(), abs=1 / 300)
    if labels == "none":
        assert "top1_before" not in figures
        return
    right, still = before.argmax(-1) == label, after.argmax(-1) == label
    # a near tie of two classes may fall the other way in one image
    assert figures["top1_before"] == pytest.approx(right.mean(), abs=1 / 300)
    assert figures["top1_after"] == pytest.approx(still.mean(), abs=1 / 300)
    flips = figures["wrong_to_right"] - figures["right_to_wrong"]
    assert flips == round(300 * (figures["top1_after"] - figures["top1_before"]))
    assert figures["right_to_wrong"] == pytest.approx((right & ~still).sum(), abs=1)


def test_a_model_compared_with_itself_is_perfect(tmp_path: Path, images: Path) -> None:
    source = ROOT / "models" / "fashion_cnn.onnx"
    report = tmp_path / "figures.json"
    done = run_script(ROOT / "tools" / "evaluate.py", source, source, "--samples", images, "--json", report)
    assert done.code == 0, done.err
    figures = json.loads(report.read_text())["logits"]
    assert figures["agreement"] == 1
    assert figures["kl"] == 0
    assert figures["right_to_wrong"] == figures["wrong_to_right"] == 0
    assert figures["top1_before"] == figures["top1_after"] > 0.9


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory, quantized_cnn: Path, images: Path) -> dict[str, Any]:
    """Run compare.py on fashion_cnn and its 2-bit form; return its figures."""
    report = tmp_path_factory.mktemp("compared") / "figures.json"
    source = ROOT / "models" / "fashion_cnn.onnx"
    done = run_script(
        ROOT / "tools" / "compare.py", source, quantized_cnn, "--samples", images, "--seconds", 0, "--json", report,
        "--count", 200,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "QLinearConv" in done.out
    return json.loads(report.read_text())


def test_the_comparisons_figures_are_numpys(compared: dict[str, Any], quantized_cnn: Path, images: Path) -> None:
    source = ROOT / "models" / "fashion_cnn.onnx"
    with np.load(images) as loaded:
        feeds = {"image": loaded["image"][:200].astype(np.float32)}
    before, after = (infer(path, feeds)["logits"] for path in (source, quantized_cnn))
    (output,) = compared["outputs"]
    # batches of 16 here, one of 200 there: float32 sums in another order
    assert output["sqnr_db"] == pytest.approx(sqnr(before, after), abs=0.05)
    assert output["top1_agreement"] == pytest.approx((before.argmax(-1) == after.argmax(-1)).mean(), abs=1 / 200)
    assert compared["size"] == {"before": source.stat().st_size, "after": quantized_cnn.stat().st_size}
    assert compared["samples"] == 200
    # two of 16 are weight-only, as the head is: they gain nothing
    assert compared["kernels"]["QLinearConv"] == 14
    assert min(compared["latency_ms"].values()) > 0


def test_models_that_do_not_fit_are_one_line(tmp_path: Path) -> None:
    onnx.save(mlp(), tmp_path / "m.onnx")
    for arguments, words in (
        ((tmp_path / "m.onnx", ROOT / "models" / "fashion_cnn.onnx"), "lacks output 'y'"),
        ((tmp_path / "none.onnx", tmp_path / "m.onnx"), "no such file"),
    ):
        done = run_script(ROOT / "tools" / "compare.py", *arguments)
        assert done.code == 3
        assert re.fullmatch(rf"compare: [^\n]*{words}[^\n]*\n", done.err)


def test_reports_of_several_runs_are_compared_on_one_page(tmp_path: Path) -> None:
    for name, db in (("a", 20.0), ("b", 30.0)):
        made = report(3, outputs=[OutputComparison("logits", db, 0.99, None)])
        made.save_json(tmp_path / f"{name}.json")
    page = tmp_path / "c.html"
    done = run_script(ROOT / "tools" / "compare.py", tmp_path / "a.json", tmp_path / "b.json", "--html", page)
    assert (done.code, done.err) == (0, "")
    assert re.search(r"a\.json .* 20\.0 .*\n.*b\.json .* 30\.0 ", done.out)
    assert "2 models compared" in page.read_text()
    assert (tmp_path / "c_models" / "02-b.html").is_file()
    wrong = run_script(ROOT / "tools" / "compare.py", tmp_path / "a.json", tmp_path / "m.onnx", "--html", page)
    assert (wrong.code, "give two models, or reports of --json" in wrong.err) == (2, True)
    unread = run_script(ROOT / "tools" / "compare.py", tmp_path / "none.json")
    assert (unread.code, "cannot be read (No such file or directory)" in unread.err) == (2, True)


def test_inspecting_a_model_tells_what_it_consists_of(tmp_path: Path, quantized_cnn: Path) -> None:
    onnx.save(mlp(), tmp_path / "m.onnx")
    done = run_script(ROOT / "tools" / "inspect_model.py", tmp_path / "m.onnx", "--json", tmp_path / "m.json")
    assert (done.code, done.err) == (0, "")
    assert "2 layers can be quantized" in done.out
    found = json.loads((tmp_path / "m.json").read_text())
    assert found["operators"] == {"Gemm": 1, "Relu": 1, "MatMul": 1, "Add": 1}
    assert found["inputs"] == [{"name": "x", "type": "float", "dims": ["batch", 32]}]
    assert found["weight_bytes"] == {"float": 4 * (48 * 32 + 48 + 48 * 10 + 10)}
    assert [(x["name"], x["op"], x["bytes"]) for x in found["quantizable"]] == [
        ("fc1", "Gemm", 4 * 48 * 32), ("fc2", "MatMul", 4 * 48 * 10)
    ]  # fmt: skip
    done = run_script(ROOT / "tools" / "inspect_model.py", quantized_cnn, "--json", tmp_path / "q.json")
    assert done.code == 0
    assert "already quantized" in done.out
    found = json.loads((tmp_path / "q.json").read_text())
    assert found["quantizable"] == []
    assert found["operators"]["QuantizeLinear"] > 10
    # 2 bits a weight
    assert 0 < found["weight_bytes"]["int2"] <= 178266 / 4
    assert found["metadata"]["comq_onnx.version"] == comq_onnx.version()


def test_inspecting_tells_which_rules_of_a_target_a_model_breaks(tmp_path: Path) -> None:
    out = tmp_path / "q.onnx"
    comq_onnx.quantize(mlp(), out, {"x": np.ones((8, 32), np.float32)}, bits=8, target="openvino")
    done = run_script(ROOT / "tools" / "inspect_model.py", out, "--target", "openvino")
    assert done.code == 0, done.err
    assert "keeps every rule of the target" in done.out
    done = run_script(ROOT / "tools" / "inspect_model.py", out, "--target", "tensorrt")
    assert done.code == 1
    assert "breaks a rule: QuantizeLinear 'x.quantize': activations are uint8; tensorrt takes int8" in done.out


def test_the_runtimes_are_asked_for_every_planned_layer(tmp_path: Path) -> None:
    folder = tmp_path / "zoo" / "mlp"
    folder.mkdir(parents=True)
    onnx.save(mlp(), folder / "model.onnx")
    for name in ("calib", "test"):
        np.savez(folder / f"{name}.npz", x=np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32))
    there = {"ort-cpu": True, "openvino": find_spec("openvino"), "tensorrt": find_spec("tensorrt_rtx_bindings")}
    targets = [name for name, found in there.items() if found]
    options = [word for name in targets for word in ("--target", name)]
    rows = tmp_path / "rows.json"
    # the layers are too small to gain by integers
    forced = ("--activations", "8")
    done = call(
        ROOT / "tools" / "check" / "runtimes.py", folder.parent, "--bits", 8, *options, "--json", rows, "--", *forced
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(rows.read_text())
    assert [(r["target"], r["planned"], r["missing"], r["broken"]) for r in found] == [(t, 2, [], []) for t in targets]
    assert all(f"| {t} | mlp | 8 | " in done.stdout for t in targets)
    # an option that comq-onnx refuses is the row, and the exit code
    done = call(
        ROOT / "tools" / "check" / "runtimes.py", folder.parent, "--bits", 8, *options[:2], "--", "--exclude", "fc"
    )
    assert done.returncode == 1
    assert "comq-onnx: " in done.stdout


def test_a_file_that_is_no_model_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_text("no model")
    done = run_script(ROOT / "tools" / "inspect_model.py", tmp_path / "m.onnx")
    assert done.code == 3
    assert re.fullmatch(r"inspect_model: [^\n]*not an ONNX model[^\n]*\n", done.err)


# What is checked: a sample of each sweep


def test_a_sample_of_the_backend_tests_is_accounted_for(tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    # every kind of layer, an operator without one, no inputs, strings, sequences, types without samples, empty tensors
    only = (
        "node/test_(gemm_all_attributes|basic_conv_with_padding|convtranspose_group_2|matmul_4d|relu|constant|"
        "loop11|string_concat|sequence_insert_at_back|cast_FLOAT_to_FLOAT8E4M3FN|reduce_l1_empty_set|bernoulli|isnan)$|"
        "pytorch-converted/test_(Conv2d_depthwise|Linear)$|pytorch-operator/test_operator_(conv|addmm)$"
    )
    done = call(ROOT / "tools" / "check" / "backend_tests.py", "--only", only, "--json", rows)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {(row["test"], row["form"]): row["outcome"] for row in json.loads(rows.read_text())}
    assert len({test for test, _ in found}) == 17
    for name in ("gemm_all_attributes", "basic_conv_with_padding", "convtranspose_group_2", "matmul_4d"):
        assert found[f"node/test_{name}", "weights inside"] == "quantized"
    assert found["node/test_relu", "as is"] == "refused"
    assert found["node/test_relu", "before a layer"] == "quantized"


def test_a_wrong_output_is_not_taken_for_a_right_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools" / "check"))
    tool = import_module("backend_tests")
    source, other = onnx.load(ROOT / "models" / "fashion_cnn.onnx"), onnx.load(ROOT / "models" / "fashion_cnn.onnx")
    weights = next(t for t in other.graph.initializer if len(t.dims) == 4)
    weights.raw_data = bytes(len(weights.raw_data))
    onnx.save(source, tmp_path / "a.onnx")
    onnx.save(other, tmp_path / "b.onnx")
    feeds = {"image": np.random.default_rng(0).random((1, 1, 28, 28), np.float32)}
    job = tool.Job("a", "as is", b"", feeds, infer(tmp_path / "a.onnx", feeds), 1e-3, 1e-7)
    assert tool.compare(job, tmp_path / "a.onnx", tmp_path / "a.onnx", ["layer"]).kind == "quantized"
    assert tool.compare(job, tmp_path / "a.onnx", tmp_path / "b.onnx", ["layer"]).kind == "wrong"


def test_a_sample_of_the_fuzzing_is_right_or_refused() -> None:
    done = call(ROOT / "tools" / "check" / "fuzz.py", "--inputs", 60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "60 inputs" in done.stdout


def test_a_sample_of_the_sweep_has_nothing_wrong_in_silence(tmp_path: Path) -> None:
    done = call(ROOT / "tools" / "check" / "sweep.py", "--models", 2, "--seed", 2, "--json", tmp_path / "rows.json")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["again"], row["outcome"]) for row in rows] == [
        ("--seed 2 --only gemm --models 1", "right"), ("--seed 3 --only matmul --models 1", "refused")
    ]  # fmt: skip


def test_the_sweep_finds_a_scale_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools" / "check"))
    checks = import_module("_sweep_checks")
    quantize = comq_onnx.quantize

    def spoiled(source: Path, out: Path, *samples: Any, **options: Any) -> comq_onnx.Report:
        report = quantize(source, out, *samples, **options)
        model = onnx.load(out)
        for tensor in model.graph.initializer:
            if tensor.name.endswith(".scale"):
                tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * 3, tensor.name))
        onnx.save(model, out)
        return report

    assert checks.check((2, "gemm", False)).outcome == "right"
    monkeypatch.setattr(comq_onnx, "quantize", spoiled)
    verdict = checks.check((2, "gemm", False))
    assert verdict.outcome == "wrong"
    assert "on other samples, the report says" in verdict.details[0]


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and limits of Linux")
def test_whatever_a_run_does_to_its_process_is_one_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools" / "check"))
    sandbox = import_module("_sandbox")

    def run(job: str) -> str:
        if job == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if job == "hang":
            time.sleep(60)
        if job == "error":
            raise ValueError("of its own")
        return job

    jobs = ["fine", "killed", "error", "hang", "fine"]
    found = list(sandbox.each(jobs, run, seconds=1.0))
    assert [job for job, _ in found] == jobs
    assert [outcome.kind for _, outcome in found] == ["done", "crash", "crash", "hang", "done"]
    assert "SIGKILL" in found[1][1].value
    assert "of its own" in found[2][1].value


def test_killed_runs_go_on(tmp_path: Path) -> None:
    onnx.save(mlp(), tmp_path / "model.onnx")
    np.savez(tmp_path / "calib.npz", **samples_for(mlp()))
    done = call(ROOT / "tools" / "check" / "resume.py", tmp_path, "--kills", 1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\| (went on from|began again)", done.stdout)


def test_a_kill_leaves_the_source_and_nothing_partial() -> None:
    done = call(ROOT / "tools" / "check" / "kills.py", "--kills", 1, "--no-faults")
    assert done.returncode == 0, done.stdout + done.stderr
    done = call(ROOT / "tools" / "check" / "kills.py", "--kills", 0, "--faults", "cut off while calibrating")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| external data cut off while calibrating | comq-onnx: " in done.stdout
