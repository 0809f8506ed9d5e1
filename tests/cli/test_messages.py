"""Test every error line of the command as a whole: what was found, what was expected, what to do.

`…` stands for what a library or the system says. Another test searches the code for messages that no case here shows;
UNREACHABLE lists those that a user of the command cannot meet, with the reason.
"""

from __future__ import annotations

import ast
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
import onnx
import pytest
from faults import (
    BRANCHES,
    EMPTY,
    LOG,
    NO_INPUTS,
    PAIR,
    SEQUENCE,
    TOKENS,
    UNIT,
    Setup,
    before,
    both,
    cuda,
    external,
    folder,
    model,
    name_in_latin_1,
    no_converter,
    no_driver,
    not_finite_weight,
    nothing,
    raising,
    samples,
    several,
    text,
)

import comq_onnx
from comq_onnx.bits import choose
from comq_onnx.cli import command as cli
from comq_onnx.model import files
from comq_onnx.options.option import Option, options_of
from comq_onnx.options.options import Options
from comq_onnx.runtime import session as runtime
from models import build, cnn, endless, mlp, normal, samples_for, several_inputs

PACKAGE, TESTS = Path(comq_onnx.__file__).parent, Path(__file__).parents[1]
ERRORS = {"OptionError", "ModelError", "SamplesError", "RuntimeFailure"}
HELP = " (comq-onnx --help lists the options)"
RUN = ["m.onnx", "--calib", "s.npz", "-o", "q.onnx"]
PHOTOS = ["cnn.onnx", "--calib", "photos", "-o", "q.onnx"]
PRESETS = "imagenet, imagenet-inception, clip, 0-1, raw"
DEVICE = "--device"
X = normal(20, 32)
# (what makes it wrong, arguments, exit code, the line behind "comq-onnx: ")
CASES: list[tuple[Setup, Sequence[str], int, str]] = [
    # the command line
    (nothing, [], 2, "Missing argument 'MODEL...'." + HELP),
    (nothing, ["m.onnx", "b.onnx", "-o", "q.onnx"], 2,
     "-o q.onnx: is a file; the models of a folder, or several ones, go to a folder"),
    (nothing, ["m.onnx", "-o", "q.onnx", "--open"], 2,
     "--open: opens the page of a report; give its path with --report"),
    (folder("comq-demo"), ["--demo"], 2,
     "--demo: comq-demo cannot be made here (File exists); run it in another directory"),
    (nothing, ["m.onnx", "b.onnx"], 2, "no output: give the folder that the models go to with -o"),
    (nothing, ["m.onnx", "b.onnx", "-o", "q", "--sensitivity"], 2,
     "--sensitivity: is for one model; name one, and for a run a file for it with -o"),
    (nothing, ["m.onnx", "b.onnx", "-o", "q"], 3,
     "b.onnx: no such file or folder; give ONNX models, or folders of them"),
    (nothing, ["m.onnx", "m.onnx", "-o", "q"], 2,
     "two of the models would become q/m.onnx; quantize one of them by a call of its own"),
    (folder("none"), ["none", "-o", "q"], 3, "none: holds no .onnx file; give an ONNX model, or a folder with one"),
    (nothing, [".", "-o", "."], 2, "-o .: cnn.onnx would overwrite a file of the source; choose another folder"),
    (nothing, [".", "-o", "no/q"], 2, "-o no/q: no such directory as no; make it first"),
    (nothing, ["m.onnx"], 2, "no output: give the quantized model's path with -o, or --plan to only look"),
    (nothing, ["m.onnx", "--frobnicate"], 2, "No such option '--frobnicate'." + HELP),
    (nothing, ["m.onnx", "--calibb", "x"], 2, "No such option '--calibb'. Did you mean '--calib'?" + HELP),
    (nothing, ["m.onnx", "--bits"], 2, "Option '--bits' requires an argument." + HELP),
    (nothing, ["m.onnx", "--bits", "9"], 2, "Invalid value for '--bits': 9 bits: 2 to 8 are possible, or auto" + HELP),
    (nothing, ["m.onnx", "--bits", "x"], 2,
     "Invalid value for '--bits': 'x' is neither a number of bits, such as 4 or 3.5, nor auto" + HELP),
    (nothing, ["m.onnx", "--bits-for", "fc"], 2,
     "Invalid value for '--bits-for': 'fc' is not a pattern and a number of bits, such as 'fc=8'" + HELP),
    (nothing, ["m.onnx", "--solver", "gtpq"], 2,
     "Invalid value for '--solver': 'gtpq' is not one of 'comq', 'paper', 'gptq', 'rtn'; did you mean gptq?" + HELP),
    (nothing, [*RUN, "--bits-for", "fc=1"], 2, "1 bits: 2 to 8 are possible, or auto"),
    (nothing, [*RUN, "--bits-for", "fc3=8"], 2,
     "--bits-for fc3=8 matches none of 2 layers; see --plan for their names; did you mean fc2?"),
    (nothing, [*RUN, "--include", "^FC1$"], 2,
     "--include '^FC1$' matches none of 2 layers; see --plan for their names; did you mean fc1?"),
    (nothing, [*RUN, "--exclude", "zzz"], 2, "--exclude 'zzz' matches none of 2 layers; see --plan for their names"),
    (nothing, [*RUN, "--exclude", "["], 2, "--exclude '[' is not a regular expression: …"),
    (nothing, [*RUN, "--order", "cyclic"], 2, "--order cyclic: the paper's solver alone has it; add --solver paper"),
    (nothing, ["m.onnx", "-o", "q.onnx", "--activations", "8", "--solver", "rtn"], 2,
     "--activations 8: the ranges of activations need samples, and --solver rtn was given none; give --calib, or "
     "--activations none"),
    (nothing, [*RUN, "--effort", "max", "--solver", "rtn"], 2,
     "--effort max: comq alone has it, not --solver rtn"),
    (nothing, [*RUN, "--shrink", "nan", "--solver", "paper"], 2,
     "--shrink nan: must be a factor on the scale, above 0 and at most 2"),
    (nothing, [*RUN, "--memory", "nan"], 2, "--memory nan: must be 0 or more gigabytes"),
    (nothing, [*RUN, "--granularity", "48"], 2,
     "--granularity 48: channel, tensor, or a block of inputs: a power of two from 16 on"),
    (no_converter(mlp()), [*RUN, "--granularity", "32"], 2,
     "--granularity 32 needs opset 21; this model could not be raised above 17: use --granularity channel"),
    (nothing, [*RUN, "--target", "ort-cuda", "--activations", "8"], 2,
     "--activations 8: ort-cuda runs nothing with activations of 8 bits; use auto or none"),
    (nothing, [*RUN, "--target", "tensorrt", "--asymmetric"], 2,
     "--asymmetric: tensorrt takes only weights of zero point 0; leave it out"),
    (nothing, [*RUN, "--target", "ort-web", "--nbits-op"], 2,
     "--nbits-op: MatMulNBits needs a good kernel, and ort-web has none; leave it out"),
    (nothing, [*RUN, "--target", "openvino", "--nbits-op"], 2,
     "--nbits-op: MatMulNBits is an operator of ONNX Runtime alone, and openvino has none; leave it out"),
    (nothing, [*RUN, "--float16"], 2,
     "--float16: ort-cpu computes float16 in float32, between Casts; leave it out, or choose another --target: "
     "ort-cuda, tensorrt"),
    (no_converter(mlp()), [*RUN, "--float16", "--target", "ort-cuda"], 2,
     "--float16 needs opset 21; this model could not be raised above 17"),
    (no_converter(mlp()), [*RUN, "--activations", "16"], 2,
     "--activations 16 needs opset 21; this model could not be raised above 17"),
    (nothing, [*RUN, "--json", "no/r.json"], 2,
     "--json no/r.json: a directory, or in one that does not exist or cannot be written"),
    (nothing, [*RUN, "--report", "s.npz"], 2,
     "--report s.npz: would overwrite the model, the samples, the output or another file asked for; choose another "
     "file"),
    (nothing, [*RUN, "--config", "none.toml"], 2,
     "--config none.toml: cannot be read (No such file or directory); give a TOML file"),
    (text("c.toml", "bits: 4"), [*RUN, "--config", "c.toml"], 2,
     "--config c.toml: not a TOML file (…); expected lines such as bits = 4, by options' long names"),
    (text("c.toml", "bits = " + "[" * 100_000), [*RUN, "--config", "c.toml"], 2,
     "--config c.toml: not a TOML file (…); expected lines such as bits = 4, by options' long names"),
    (text("c.toml", "bitz = 4"), [*RUN, "--config", "c.toml"], 2,
     "--config c.toml: no option is called 'bitz'; expected long names without dashes, such as bits; did you mean "
     "bits?"),
    (text("c.toml", "bits = [4]"), [*RUN, "--config", "c.toml"], 2,
     "--config c.toml: bits = [4]; expected one value"),
    # the output
    (nothing, ["m.onnx", "-o", "."], 2, ".: is a directory; give the path of the file to write"),
    (nothing, ["m.onnx", "-o", "m.onnx"], 2,
     "m.onnx: is the model itself, which is never modified; choose another output"),
    (nothing, ["m.onnx", "-o", "no/q.onnx"], 2, "no: no such directory for the output; make it first"),
    (raising(files.tempfile, "TemporaryFile", PermissionError(13, "Permission denied")), RUN, 2,
     ".: cannot write there (Permission denied); choose another output"),
    (raising(files.os, "replace", OSError(28, "No space left on device")), RUN, 2,
     "q.onnx: cannot be written (No space left on device); nothing was left behind"),
    (raising(files.os, "replace", OSError(28, "No space left on device")), ["m.onnx", "--plan", "--json", "r.json"], 2,
     "--json r.json: cannot be written (No space left on device)"),
    (raising(files.secrets, "token_hex", OSError(28, "No space left on device")), RUN, 2,
     "[Errno 28] No space left on device; nothing was written: free some space, or check the permissions"),
    # the model
    (nothing, ["none.onnx", "-o", "q.onnx"], 3, "none.onnx: no such file; give the path of an ONNX model"),
    (folder("d", a_onnx=b"", b_onnx=b""), ["d", "-o", "q.onnx"], 3,
     "d: a directory with 2 .onnx files (a.onnx, b.onnx); name one of them"),
    (text("m.onnx", ""), RUN, 3, "m.onnx: the file is empty; expected an ONNX model"),
    (text("m.onnx", "no model\n" * 9), RUN, 3, "m.onnx: not an ONNX model, or a truncated one (…)"),
    (name_in_latin_1(), RUN, 3, "m.onnx: the input b'\\xe9' is not UTF-8, as ONNX wants it; rename"),
    (model(build("g (float[n, 32] x) => (float[n, 32] x) { }")), RUN, 3,
     "m.onnx: the file holds no ONNX graph with nodes; expected an ONNX model"),
    (external("../w.data"), RUN, 3,
     "m.onnx: external data of 'w1' lies at '../w.data', outside the model's folder: refused"),
    (external("none.data", size=0), RUN, 3, "m.onnx: external data file 'none.data' of 'w1' is missing; put it beside"),
    (external("w.data"), RUN, 3,
     "m.onnx: external data of 'w1' should end at byte 6144 of 'w.data', which has 4; the file is truncated or not "
     "this model's"),
    (lambda _: comq_onnx.quantize(mlp(), "m.onnx", samples_for(mlp()), bits=8) and None, RUN, 3,
     "m.onnx: already quantized (the weights of 1 Gemm, 1 MatMul are, and no other layer has as many as 128); give the "
     "float model it was made from"),
    (model(mlp(opset=999)), RUN, 3,
     "m.onnx: has opset 999; ort-cpu reads 26 at most: export the model with a lower one"),
    (model(mlp(ir_version=99)), RUN, 3, "ONNX Runtime … cannot load m.onnx: …"),
    (model(SEQUENCE), RUN, 3, "input 'x' has type seq(tensor(float)), which samples cannot be made for"),
    (model(build("g (float[batch, 32] x) => (float[batch, 32] y) { y = Relu (x) }")), RUN, 3,
     "the model has no layer to quantize (MatMul, Gemm, Conv, ConvTranspose, Gather, LSTM, GRU or RNN with a constant "
     "weight of 128 numbers or more)"),
    (nothing, [*RUN, "--exclude", "fc"], 3,
     "the model has no layer to quantize (MatMul, Gemm, Conv, ConvTranspose, Gather, LSTM, GRU or RNN with a constant "
     "weight of 128 numbers or more); left out: fc1: Gemm: excluded by --exclude; fc2: MatMul: excluded by --exclude"),
    (no_converter(mlp(opset=12)), RUN, 3,
     "m.onnx: cannot be prepared for quantization: opset 12: no converter raises this model to opset 13, the lowest "
     "one with quantized channels; export it again at a newer opset"),
    (model(not_finite_weight()), RUN, 3,
     "layer 'fc1': 1536 of 1536 weights are NaN or Inf; repair the model or --exclude it"),
    (both(LOG, x=X), RUN, 3,
     "the float model gives NaN or Inf at 'l' (read by 'node_2') for sample 1 of s.npz; check the samples and their "
     "preprocessing, or --exclude its readers"),
    (both(BRANCHES, x=normal(9, 2, 32), c=np.zeros(9, bool)), RUN, 3,
     "m.onnx: the samples reach no layer that can be quantized (fc: …)"),
    (several(model(endless()), lambda patch: patch.setattr(runtime, "MOST_SECONDS", 0.5)), RUN, 3,
     "m.onnx: no end after 0 s on one batch; it may loop without end; if it is only slow, give a smaller --batch-size"),
    (before(choose, "walk", lambda: os.utime("m.onnx", (0, 0))), RUN, 3,
     "m.onnx: changed meanwhile; give a file that stays as it is"),
    # the samples
    (nothing, ["m.onnx", "--calib", "none", "-o", "q.onnx"], 4,
     "none: no such file or folder of samples; samples are …"),
    (folder("d", a_csv=b"x"), ["m.onnx", "--calib", "d", "-o", "q.onnx"], 4,
     "d: the folder holds no samples; samples are …"),
    (text("s.txt", "x"), ["m.onnx", "--calib", "s.txt", "-o", "q.onnx"], 4,
     "text fits a model with an input of token ids [batch, tokens]; this one has 'x': give an .npz or a Python reader"),
    (several(model(several_inputs()), lambda _: np.save("s.npy", X)), ["m.onnx", "--calib", "s.npy", "-o", "q.onnx"],
     4, "s.npy: one array for 4 inputs (image, vector, use, count); use an .npz with these names"),
    (text("s.npz", "no arrays"), RUN, 4, "s.npz: cannot be read as numpy arrays without pickles (…)"),
    (folder("d", a_npz={"x": X}, b_npz={"y": X}), ["m.onnx", "--calib", "d", "-o", "q.onnx"], 4,
     "d/b.npz: has arrays ['y'], a.npz has ['x']"),
    (folder("d", a_npz={"x": X}, b_npz={"x": normal(20, 31)}), ["m.onnx", "--calib", "d", "-o", "q.onnx"], 4,
     "d/b.npz: 'x' has samples of (31,), a.npz of (32,); pad them to one shape"),
    (samples(y=X), RUN, 4, "s.npz: arrays 'y'; the model has inputs 'x': name each array like its input"),
    (samples(x=X[:0]), RUN, 4, "s.npz: 'x' holds no samples"),
    (samples(x=np.float32(1)), RUN, 4, "s.npz: 'x' is a single number; give an array with an axis of samples"),
    (samples(x=normal(20)), RUN, 4, "s.npz: 'x' has shape (20,); expected [n, 32] or [n, ?, 32], samples first"),
    (samples(x=normal(20, 31)), RUN, 4,
     "s.npz: 'x' has shape (20, 31); expected [n, 32] or [n, ?, 32], samples first"),
    (samples(x=np.where(np.arange(20)[:, None] == 3, np.nan, X).astype(np.float32)), RUN, 4,
     "s.npz: 'x' has NaN or Inf in 1 of 20 samples, first in 3"),
    (samples(x=np.full((20, 32), "a")), RUN, 4, "s.npz: 'x' is <U1; the model wants float32"),
    (both(several_inputs(), **{**samples_for(several_inputs()), "count": np.ones((7, 1), np.int64)}), RUN, 4,
     "s.npz: the arrays hold different numbers of samples: {'image': 40, 'vector': 40, 'use': 40, 'count': 7}"),
    (both(PAIR, x=normal(12, 32), z=normal(12, 32)), RUN, 4,
     "s.npz: the inputs fix different batch sizes [2, 3]; give complete tensors instead"),
    (samples(x=X[:1]), RUN, 4,
     "s.npz: 1 sample(s); at least 2 are needed, one batch to calibrate on and one to compare on, and 128 or more are "
     "better"),
    (folder("photos", a_png=(20, 20)), PHOTOS, 4,
     f"images need --preprocess: one of {PRESETS}, or a JSON file with …"),
    (folder("photos", a_png=(20, 20)), [*PHOTOS, "--mean", "0.5,0.4"], 2,
     "--mean 0.5,0.4: one number, or three in the order of --channels"),
    (folder("photos", a_png=(20, 20)), [*PHOTOS, "--std", "0.5,0,0.2"], 2,
     "--std 0.5,0,0.2: pixels are divided by it, so none may be 0"),
    (folder("photos", a_png=(20, 20)), [*PHOTOS, "--resize", "0"], 2,
     "--resize 0: whole pixels of 1 or more, one number or HEIGHTxWIDTH"),
    (nothing, [*RUN, "--crop", "8"], 2,
     "--crop is for images, not for tensors (s.npz): leave it out, or give other samples"),
    (folder("photos", a_png=(20, 20)), [*PHOTOS, "--preprocess", "imagenot"], 2,
     f"--preprocess 'imagenot': neither a preset ({PRESETS}) nor a JSON file"),
    (several(folder("photos", a_png=(20, 20)), text("p.json", '{"std": 0}')), [*PHOTOS, "--preprocess", "p.json"], 2,
     "--preprocess p.json: std is 0; expected a JSON object with some of …"),
    (folder("photos", a_png=(20, 20)), ["m.onnx", "--calib", "photos", "-o", "q.onnx", "--preprocess", "0-1"], 4,
     "images fit a model with one input of rank 4; this one has 'x': give an .npz or a Python reader"),
    (folder("photos", a_png=(20, 20), b_png=b"text"), [*PHOTOS, "--preprocess", "0-1"], 4,
     "photos/b.png: not a readable image (…)"),
    (both(TOKENS, ids=np.full((20, 5), 1000)), RUN, 4, "s.npz: the model cannot run on these samples: …"),
    (both(EMPTY, x=X), RUN, 4, "no sample reaches layer 'fc': its input is empty for all of them"),
    # workers
    (nothing, [*RUN, "--workers", "0"], 2,
     "--workers 0: give a number of processes, or the address of a Dask scheduler: tcp://host:8786"),
    (nothing, [*RUN, "--workers", "2", "--workdir", "w"], 2,
     "--workdir w: not with --workers, whose tensors stay on them; a worker that dies loses nothing, so leave one of "
     "both out"),
    (nothing, [*RUN, "--workers", "2", DEVICE, "cuda"], 2,
     "--device cuda: not with --workers, which calibrate on CPUs; leave one out"),
    # the runtime
    (lambda patch: patch.setattr(runtime, "ort", None), RUN, 5,
     "onnxruntime is not installed; install one of the extras: pip install 'comq-onnx[cpu]' or pip install "
     "'comq-onnx[gpu]' (never both)"),
    (lambda patch: patch.setattr(runtime.ort, "get_available_providers", lambda: ["CPUExecutionProvider"]),
     [*RUN, DEVICE, "cuda"], 5,
     "--device cuda: ONNX Runtime has no CUDA here (it has CPUExecutionProvider); install comq-onnx[gpu] in place of "
     "comq-onnx[cpu], or use --device cpu"),
    (cuda(packages={"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.0"}), [*RUN, DEVICE, "cuda"], 5,
     "--device cuda: onnxruntime 1.31.1 and onnxruntime-gpu 1.31.0 are installed over each other; pip uninstall both, "
     "then pip install 'comq-onnx[gpu]' alone"),
    (cuda(torch=None), [*RUN, DEVICE, "cuda"], 5,
     "--device cuda: torch is not installed; pip install 'comq-onnx[gpu]', or use --device cpu"),
    (cuda(torch=SimpleNamespace(__version__="2.13.0+cpu", version=SimpleNamespace(cuda=None))),
     [*RUN, DEVICE, "cuda:1"], 5,
     "--device cuda:1: torch 2.13.0+cpu is built without CUDA; pip install 'comq-onnx[gpu]' in a new environment, or "
     "use --device cpu"),
    (cuda(torch=SimpleNamespace(version=SimpleNamespace(cuda="13.0"), cuda=SimpleNamespace(
        is_available=lambda: False, init=no_driver))), [*RUN, DEVICE, "cuda"], 5,
     "--device cuda: there is no GPU, or no driver for it (Found no NVIDIA driver on your system.); install NVIDIA's "
     "driver, in a container pass the GPU on (docker run --gpus all), or use --device cpu"),
    (cuda(gpus=2), [*RUN, DEVICE, "cuda:2"], 5, "--device cuda:2: there are 2 GPUs, from cuda:0 on"),
    (cuda(gpus=1), [*RUN, DEVICE, "cuda"], 5,
     "--device cuda: ONNX Runtime fell back to the CPU (…); its CUDA and cuDNN libraries must be of the versions it is "
     "built for: pip install 'comq-onnx[gpu]' in a new environment, or use --device cpu"),
    (both(TOKENS, ids=np.where(np.arange(60)[:, None] < 30, 3, np.full((60, 5), 1000))), RUN, 5,
     "ONNX Runtime failed running …: …"),
    (raising(choose, "walk", KeyboardInterrupt()), RUN, 130, "interrupted; nothing was written"),
    (raising(choose, "walk", MemoryError()), RUN, 5,
     "not enough memory, even for one sample at once (MemoryError): free some, or give fewer --samples or --memory 0"),
    # budgets
    (nothing, [*RUN, "--bits", "auto"], 2,
     "--bits auto: needs one budget: --size 25%, --size 3MB, --max-drop 0.5 or --max-drop 20dB"),
    (nothing, [*RUN, "--size", "25%"], 2, "--size: only with --bits auto, not with --bits 4"),
    (nothing, [*RUN, "--bits", "3.5", "--uniform"], 2,
     "--uniform: all layers cannot have the same with --bits 3.5; give a whole number"),
    (nothing, [*RUN, "--bits", "auto", "--size", "big"], 2,
     "--size big: a share such as 25%, or a size such as 3MB or 800kB"),
    (nothing, [*RUN, "--bits", "auto", "--size", "10"], 2,
     "--size: 10 bytes are asked for; the least for this model is …, at … bits a weight"),
    (nothing, [*RUN, "--bits", "2.5", "--bits-for", "fc=8"], 2,
     "--bits 2.5: the least that this model's weights take is 8.00 bits in the mean"),
    (nothing, [*RUN, "--bits", "auto", "--max-drop", "all"], 2,
  "--max-drop all: points of top-1 agreement or percent of perplexity, above 0 and below 100, such as 0.5, or an "
     "SQNR to keep, such as 20dB"),
    (nothing, [*RUN, "--bits", "auto", "--max-drop", "90dB"], 2,
     "--max-drop 90dB: not reached. At 8.0 bits in the mean … dB remain on … samples held back; allow more, or try "
     "--activations 16 or none, or more calibration samples"),
    (both(UNIT, x=X), [*RUN, "--bits", "auto", "--max-drop", "1"], 2,
     "--max-drop 1.0: no output of this model looks like class scores; give an SQNR to keep, such as --max-drop 20dB"),
    (nothing, [*RUN, "--sensitivity"], 2,
     "--sensitivity: only with --plan; the report of a run holds the same figures (--json)"),
    (both(NO_INPUTS, x=X), RUN, 3,
     "m.onnx: the model has no inputs, so there is nothing to calibrate on"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("setup", "arguments", "code", "line"), CASES, ids=[f"{i}-{re.sub(r'[^a-z ]', '', case[3].lower())[:40]}"
                                                        for i, case in enumerate(CASES)],
)  # fmt: skip
def test_an_error_is_this_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    setup: Setup,
    arguments: Sequence[str],
    code: int,
    line: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    onnx.save(mlp(), "m.onnx")
    onnx.save(cnn(), "cnn.onnx")
    np.savez("s.npz", **samples_for(mlp()))
    setup(monkeypatch)
    monkeypatch.setattr(sys, "argv", ["comq-onnx", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    said = capsys.readouterr()
    assert (stop.value.code, said.out) == (code, "")
    # click ends the line that the terminal's ^C began
    shown = said.err.removeprefix("\n") if code == 130 else said.err
    assert re.fullmatch(re.escape(f"comq-onnx: {line}\n").replace("…", "[^\n]+"), shown), shown
    assert not Path("q.onnx").exists()


# What the code can say ------------------------------------------------------------------------------------------------

UNREACHABLE = {
    "must be 1 or more": "only from Python: click refuses numbers below 1",
    "choose one of": "only from Python: click refuses other choices",
    "a model is a path": "only from Python: the command takes paths",
    "too large to be kept in memory": "only from Python: the command writes files",
    "or a GPU by its number": "only from Python: click refuses other names",
    "has no TensorRT here": "of compare, which the command does not call",
    "fell back to the CPU for": "the choice of the device shows it before: libraries that vanish in between",
    "lacks output": "of compare, which the command does not call",
}
# shown by another module of tests
ELSEWHERE = {
    "are too large to quantize": "calibrate/test_finite", "tensors kept between stages": "calibrate/test_walk",
    "is for --inspect-samples": "samples/test_samples_command", "takes no pictures": "samples/test_samples_command",
    "only shows the samples": "samples/test_samples_command", "the report cannot be printed": "cli/test_command_errors",
    "no real model has so many": "model/test_files", "functions are inlined": "model/test_files",
    "begins at byte": "model/test_files", "ONNX allows no recursion": "model/test_files",
    "the state of the run cannot be written": "test_workdir", "are needed there": "test_workdir",
    "which is not of a run": "test_workdir", "cannot be used (": "test_workdir",
    "another run uses it now": "test_workdir", "holds a run with other": "test_workdir",
    "needs the package distributed": "test_workers", "no scheduler answers there": "test_workers",
    "the scheduler has no workers": "test_workers", "all workers are gone": "test_workers",
    "has other versions, which may compute": "test_workers", "too large for one message": "model/test_pickled",
    "not smaller than its source": "write/test_size", "no output has scores for each token": "test_chained",
    "both give samples": "test_olive", "add a file or a folder of that name": "test_hub", "cannot copy": "test_folders",
    "which is not of a run of several models": "test_queue",
    "has changed since it was quantized there": "test_queue", "a finished model cannot be kept": "test_queue",
    "is no report (": "report/test_several", "); choose another folder": "test_folders",
    "too deeply to be inlined": "model/test_files", "is a device or a pipe": "model/test_files",
    "cannot be the output": "model/test_files", "cannot be read (": "model/test_files",
}  # fmt: skip


def _pattern(node: ast.expr) -> str:
    """Make a regular expression of all that an expression for a message can give."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.escape(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(".*" if isinstance(part, ast.FormattedValue) else _pattern(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return _pattern(node.left) + _pattern(node.right)
    return ".*"


def _out_of_bounds() -> list[str]:
    """Return a regular expression of what each option with bounds says of a number beyond them."""
    declared = options_of(Options).values()
    bounded = [option for option in declared if option.bounds != Option.bounds]
    return [re.escape(f"--{option.name} ") + ".*" + re.escape(f": must be {option.expected}") for option in bounded]


def messages() -> Iterator[tuple[str, str]]:
    """Yield the place and a regular expression of every message that the package raises on purpose."""
    trees = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
    functions = {
        node.name: node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
    }
    for path, tree in trees.items():
        if path.relative_to(PACKAGE).parts[0] == "samples" and path.name != "dataset.py":
            continue  # tests/samples/test_errors.py shows those
        for node in ast.walk(tree):
            raised = node.exc if isinstance(node, ast.Raise) else None
            if not isinstance(raised, ast.Call) or not isinstance(raised.func, ast.Name):
                continue
            if raised.func.id not in ERRORS:
                continue
            message = raised.args[0]
            where = f"{path.relative_to(PACKAGE)}:{node.lineno}"
            if "self.expected" in ast.unparse(message):
                yield from ((where, words) for words in _out_of_bounds())
            elif isinstance(message, ast.Call):
                # a function makes the message
                name = message.func.attr if isinstance(message.func, ast.Attribute) else message.func.id  # type: ignore[attr-defined]
                returned = [n.value for n in ast.walk(functions[name]) if isinstance(n, ast.Return) and n.value]
                yield from ((where, _pattern(value)) for value in returned)
            else:
                yield where, _pattern(message)


def test_every_message_of_the_code_is_shown_here() -> None:
    lines = [case[3] for case in CASES]
    found = list(messages())
    assert len(found) > 50
    missing = [
        f"{where}: {pattern}"
        for where, pattern in found
        # one message may be part of another
        if not any(re.search(pattern, line) for line in lines)
        and not any(re.escape(words) in pattern for words in {**UNREACHABLE, **ELSEWHERE})
    ]
    assert missing == []


def test_what_is_unreachable_is_still_in_the_code() -> None:
    patterns = [pattern for _, pattern in messages()]
    assert [w for w in {**UNREACHABLE, **ELSEWHERE} if not any(re.escape(w) in pattern for pattern in patterns)] == []
    assert [name for name in ELSEWHERE.values() if not (TESTS / f"{name}.py").is_file()] == []


def test_no_message_is_a_pattern_that_matches_anything() -> None:
    assert [where for where, pattern in messages() if len(pattern.replace(".*", "")) < 10] == []


def test_clicks_own_errors_are_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    raising(cli.pipeline, "plan", click.UsageError("several\n  lines"))(monkeypatch)
    monkeypatch.setattr(sys, "argv", ["comq-onnx", "m.onnx", "--plan"])
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err == f"comq-onnx: several lines{HELP}\n"
