"""Type the options as keywords, for editors and mypy.

Made by `python tools/option_keywords.py` from the fields of Options; do not edit.
"""

from __future__ import annotations

from typing import TypedDict

from comq_onnx.options.samples import Size


class OptionKeywords(TypedDict, total=False):
    """Type the fields of Options, each of which may be left out."""

    preprocess: str | None
    """For images: imagenet, imagenet-inception, clip, 0-1, raw, or a JSON file. [default: a file beside the model]"""
    mean: tuple[float, ...] | None
    """For images: one number, or three in the order of --channels."""
    std: tuple[float, ...] | None
    """For images, likewise."""
    resize: Size | None
    """For images: the short side, or HxW exactly. [default: crop / 0.875]"""
    crop: Size | None
    """For images: of the centre. [default: the model's input]"""
    layout: str | None
    """For images. [default: as the model shows]"""
    channels: str | None
    """For images. [default: rgb, or grey for one channel]"""
    dtype: str | None
    """For images: of the pixels. [default: the input's]"""
    tokenizer: str | None
    """For text: a tokenizer.json. [default: the one beside the model]"""
    text_field: str | None
    """For .jsonl text: where each line has it. [default: text, or messages]"""
    length: int | None
    """Tokens of a text at most, points of a sound. [default: the model's, or 128 and 16000]"""
    max_samples: int
    """Samples to calibrate on, at most."""
    batch_size: int
    """Samples run at once; fewer where outputs are large."""
    seed: int
    """Which samples are used and held back."""
    bits: int | float | str
    """Of a weight, 2 to 8; 3.5 in the mean; auto with --size or --max-drop."""
    size: str | None
    """With --bits auto: the most that the file may take."""
    max_drop: str | float | None
    """With --bits auto: points of top-1 agreement that may be lost, percent by which the perplexity of a language model
    may rise, or the SQNR to keep."""
    uniform: bool
    """The same bits for all layers, none more for those that gain most by it."""
    bits_for: tuple[tuple[str, int], ...]
    """Other bits for the layers that match; may be repeated."""
    include: tuple[str, ...]
    """Only layers whose name matches; may be repeated."""
    exclude: tuple[str, ...]
    """Not the layers whose name matches; may be repeated."""
    activations: str
    """Bits of activations; auto: 8 where integers are faster, in decoders none; none: weight-only."""
    granularity: str | None
    """What shares a weight scale. [default: channel; of decoders 32 inputs]"""
    symmetric: bool
    """Whether weights have zero point 0."""
    nbits_op: bool
    """Write weight-only products as MatMulNBits, an operator of ONNX Runtime alone, not as QDQ."""
    float16: bool
    """Make float16 of what is not quantized, for GPUs; inputs and outputs keep their types."""
    target: str
    """What will run the model. ort-cpu: ONNX Runtime, CPU; uint8 activations, packed weights. ort-cuda: ONNX Runtime,
    NVIDIA; weight-only, float arithmetic. ort-web: onnxruntime-web in WebAssembly; uint8 activations, packed weights.
    tensorrt: int8 activations, INT8 weights; INT4 if weight-only. openvino: OpenVINO, CPU; uint8 activations, INT4 or
    INT8 weights."""
    cpu: str
    """x86 CPUs that must compute it right; with vnni, 8 bits of integer layers are 8, not 7."""
    solver: str
    """comq; for comparison paper (the authors' COMQ), gptq, and rtn: plain rounding, which needs no --calib."""
    effort: str
    """How long comq searches: fast takes a third of default's time, max 15 times it."""
    order: str | None
    """Of the paper's solver. [default: greedy]"""
    sweeps: int | None
    """Of the paper's solver. [default: 3]"""
    shrink: float | None
    """Of the paper's solver: factor on the first scale. [default: by the bits]"""
    independent: bool
    """Calibrate every layer on the float model, as the paper does."""
    device: str
    """Where to calibrate and solve; N is the number of a GPU."""
    memory_gb: float | None
    """For tensors kept between stages, then the disk; 500MB too. [default: half of what is free]"""
    workdir: str | None
    """Keep the state of the run in a directory: the same command goes on where it was cut off."""
    workers: int | str | None
    """Share the work among so many processes, or those of a Dask scheduler."""
    sensitivity: bool
    """With --plan: rank the layers by what quantizing each costs."""
