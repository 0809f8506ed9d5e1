"""Declare every option of the command and of the library once: name, type, default, check, help, group, long name.

The command line (cli/parameters.py), the configuration file, the option reference, the reproduced command
(spelling.py) and the typed keywords of public functions (keywords.py) are all made from these fields.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from comq_onnx.errors import OptionError
from comq_onnx.options.budgets import parse_drop, parse_size
from comq_onnx.options.option import INPUT_OUTPUT, QUANTIZATION, RUNNING, SAMPLES, SOLVER, declare, options_of
from comq_onnx.options.samples import SampleOptions
from comq_onnx.runtime.device import check_name
from comq_onnx.solve.effort import EFFORTS
from comq_onnx.solve.grid import MAX_BITS, MIN_BITS, Grid
from comq_onnx.solve.layer import METHODS, Method
from comq_onnx.solve.paper import ORDERS, SWEEPS
from comq_onnx.targets.catalog import TARGETS

DEFAULT_SAMPLES = 256
LEAST_BLOCK = 16
# the inputs that share a scale in decoders: what kernels that decode fast are made for
DECODER_BLOCK = 32


def _check_bits(bits: Any) -> None:
    """Raise OptionError for a number of bits that no weight can have."""
    if bits != "auto" and (not isinstance(bits, (int, float)) or not MIN_BITS <= bits <= MAX_BITS):
        raise OptionError(f"{bits} bits: {MIN_BITS} to {MAX_BITS} are possible, or auto")


def _check_bits_for(pairs: tuple[tuple[str, int], ...]) -> None:
    """Raise OptionError for pairs of a pattern and bits where no weight can have the bits."""
    for _, bits in pairs:
        _check_bits(bits)


def _check_granularity(granularity: str) -> None:
    """Raise OptionError for what is neither channel nor tensor nor the size of a block."""
    if granularity in ("channel", "tensor"):
        return
    size = int(granularity) if granularity.isdigit() else 0
    if size < LEAST_BLOCK or size & (size - 1):
        raise OptionError(
            f"--granularity {granularity}: channel, tensor, or a block of inputs: a power of two from {LEAST_BLOCK} on"
        )


def _check_workers(workers: int | str) -> None:
    """Raise OptionError for what is neither a number of processes nor the address of a scheduler."""
    if "://" not in str(workers) and not (str(workers).isdecimal() and int(workers)):
        raise OptionError(
            f"--workers {workers}: give a number of processes, or the address of a Dask scheduler: tcp://host:8786"
        )


@dataclass(frozen=True)
class Options(SampleOptions):
    """Hold what a caller may choose. Raises OptionError for values that are not possible, alone or together."""

    max_samples: int = declare(
        DEFAULT_SAMPLES, SAMPLES, "Samples to calibrate on, at most.", name="samples", metavar="N", bounds=(1, np.inf)
    )
    batch_size: int = declare(
        16, SAMPLES, "Samples run at once; fewer where outputs are large.", metavar="N", bounds=(1, np.inf),
        lasting=False,
    )  # fmt: skip
    seed: int = declare(0, SAMPLES, "Which samples are used and held back.", metavar="N")

    bits: int | float | str = declare(
        4, QUANTIZATION, f"Of a weight, {MIN_BITS} to {MAX_BITS}; 3.5 in the mean; auto with --size or --max-drop.",
        metavar="N|auto", check=_check_bits,
    )  # fmt: skip
    size: str | None = declare(
        None, QUANTIZATION, "With --bits auto: the most that the file may take.", metavar="25%|3MB",
        check=lambda size: parse_size(size, 1),
    )  # fmt: skip
    max_drop: str | float | None = declare(
        None, QUANTIZATION,
        "With --bits auto: points of top-1 agreement that may be lost, percent by which the perplexity of a language "
        "model may rise, or the SQNR to keep.", metavar="0.5|1%|20dB", check=parse_drop,
    )  # fmt: skip
    uniform: bool = declare(
        False, QUANTIZATION, "The same bits for all layers, none more for those that gain most by it."
    )
    bits_for: tuple[tuple[str, int], ...] = declare(
        (), QUANTIZATION, "Other bits for the layers that match; may be repeated.", metavar="RE=N",
        check=_check_bits_for,
    )  # fmt: skip
    include: tuple[str, ...] = declare(
        (), QUANTIZATION, "Only layers whose name matches; may be repeated.", metavar="RE"
    )
    exclude: tuple[str, ...] = declare(
        (), QUANTIZATION, "Not the layers whose name matches; may be repeated.", metavar="RE"
    )
    activations: str = declare(
        "auto", QUANTIZATION,
        "Bits of activations; auto: 8 where integers are faster, in decoders none; none: weight-only.",
        choices=("auto", "none", "8", "16"),
    )  # fmt: skip
    granularity: str | None = declare(
        None, QUANTIZATION, f"What shares a weight scale.  [default: channel; of decoders {DECODER_BLOCK} inputs]",
        metavar="channel|tensor|BLOCK", check=_check_granularity,
    )  # fmt: skip
    symmetric: bool = declare(True, QUANTIZATION, "Whether weights have zero point 0.", off="asymmetric")
    nbits_op: bool = declare(
        False, QUANTIZATION,
        "Write weight-only products as MatMulNBits, an operator of ONNX Runtime alone, not as QDQ.",
    )  # fmt: skip
    float16: bool = declare(
        False, QUANTIZATION, "Make float16 of what is not quantized, for GPUs; inputs and outputs keep their types."
    )
    target: str = declare(
        "ort-cpu", QUANTIZATION,
        "What will run the model.\n\n\b\n" + "\n".join(f"{t.name}: {t.about}." for t in TARGETS.values()),
        choices=tuple(TARGETS),
    )  # fmt: skip
    cpu: str = declare(
        "any", QUANTIZATION, "x86 CPUs that must compute it right; with vnni, 8 bits of integer layers are 8, not 7.",
        choices=("any", "vnni"),
    )  # fmt: skip

    solver: str = declare(
        "comq", SOLVER,
        "comq; for comparison paper (the authors' COMQ), gptq, and rtn: plain rounding, which needs no --calib.",
        choices=METHODS,
    )  # fmt: skip
    effort: str = declare(
        "default", SOLVER, "How long comq searches: fast takes a third of default's time, max 15 times it.",
        choices=tuple(EFFORTS),
    )  # fmt: skip
    order: str | None = declare(None, SOLVER, "Of the paper's solver.  [default: greedy]", choices=ORDERS)
    sweeps: int | None = declare(
        None, SOLVER, f"Of the paper's solver.  [default: {SWEEPS}]", metavar="N", bounds=(1, np.inf)
    )
    shrink: float | None = declare(
        None, SOLVER, "Of the paper's solver: factor on the first scale.  [default: by the bits]", metavar="X",
        bounds=(0, 2), above=True, expected="a factor on the scale, above 0 and at most 2",
    )  # fmt: skip
    independent: bool = declare(False, SOLVER, "Calibrate every layer on the float model, as the paper does.")

    device: str = declare(
        "auto", RUNNING, "Where to calibrate and solve; N is the number of a GPU.", metavar="auto|cpu|cuda[:N]",
        check=check_name,
    )  # fmt: skip
    memory_gb: float | None = declare(
        None, RUNNING, "For tensors kept between stages, then the disk; 500MB too.  [default: half of what is free]",
        name="memory",
        metavar="GB",
        bounds=(0.0, np.inf), expected="0 or more gigabytes", lasting=False,
    )  # fmt: skip
    workdir: str | None = declare(
        None, RUNNING, "Keep the state of the run in a directory: the same command goes on where it was cut off.",
        metavar="DIR", lasting=False,
    )  # fmt: skip
    workers: int | str | None = declare(
        None, RUNNING, "Share the work among so many processes, or those of a Dask scheduler.",
        metavar="N|tcp://HOST:PORT", check=_check_workers, lasting=False,
    )  # fmt: skip
    sensitivity: bool = declare(
        False, INPUT_OUTPUT, "With --plan: rank the layers by what quantizing each costs.", in_config=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_budget()
        self._check_solver()
        self._check_target()
        self._check_running()

    def _check_budget(self) -> None:
        """Raise OptionError where the bits and their budget do not fit together."""
        budgets = [("--size", self.size), ("--max-drop", self.max_drop)]
        asked = [option for option, value in budgets if value is not None]
        if self.bits == "auto" and len(asked) != 1:
            raise OptionError(
                "--bits auto: needs one budget: --size 25%, --size 3MB, --max-drop 0.5 or --max-drop 20dB"
            )
        if self.bits != "auto" and asked:
            raise OptionError(f"{asked[0]}: only with --bits auto, not with --bits {self.bits}")
        if self.uniform and self.fixed_bits is None:
            raise OptionError(
                f"--uniform: all layers cannot have the same with --bits {self.bits}; give a whole number"
            )

    def _check_solver(self) -> None:
        """Raise OptionError for options that only another solver has."""
        for option, value in (("--order", self.order), ("--sweeps", self.sweeps), ("--shrink", self.shrink)):
            if value is not None and self.solver != "paper":
                raise OptionError(f"{option} {value}: the paper's solver alone has it; add --solver paper")
        if self.solver != "comq" and self.effort != "default":
            raise OptionError(f"--effort {self.effort}: comq alone has it, not --solver {self.solver}")

    def _check_target(self) -> None:
        """Raise OptionError for what the target does not run."""
        target = TARGETS[self.target]
        try:
            target.activation_dtype(self.activations)
        except ValueError as error:
            raise OptionError(f"--activations {self.activations}: {error}; use auto or none") from None
        if not (self.symmetric or target.weight_zero_points):
            raise OptionError(f"--asymmetric: {self.target} takes only weights of zero point 0; leave it out")
        if self.nbits_op and (target.runs_outside_ort or not target.packed_products):
            why = "is an operator of ONNX Runtime alone" if target.runs_outside_ort else "needs a good kernel"
            raise OptionError(f"--nbits-op: MatMulNBits {why}, and {self.target} has none; leave it out")
        if self.float16 and not target.half:
            others = ", ".join(t.name for t in TARGETS.values() if t.half)
            raise OptionError(
                f"--float16: {self.target} computes float16 in float32, between Casts; leave it out, or choose another "
                f"--target: {others}"
            )

    def _check_running(self) -> None:
        """Raise OptionError for what workers cannot do."""
        if self.workers is not None and self.workdir is not None:
            raise OptionError(
                f"--workdir {self.workdir}: not with --workers, whose tensors stay on them; a worker that dies loses "
                "nothing, so leave one of both out"
            )
        if self.workers is not None and self.device.startswith("cuda"):
            raise OptionError(f"--device {self.device}: not with --workers, which calibrate on CPUs; leave one out")

    def for_decoder(self) -> Options:
        """Return these options with what suits a decoder where they leave it open: float activations, small blocks."""
        activations = "none" if self.activations == "auto" else self.activations
        granularity = str(DECODER_BLOCK) if activations == "none" else None
        return replace(self, activations=activations, granularity=self.granularity or granularity)

    @property
    def fixed_bits(self) -> int | None:
        """Return the whole number of bits that layers get, some perhaps more; None where a budget decides."""
        return int(self.bits) if isinstance(self.bits, (int, float)) and self.bits == int(self.bits) else None

    @property
    def block_size(self) -> int | None:
        """Return how many inputs share a scale; None where a whole channel or tensor does."""
        return int(self.granularity) if self.granularity is not None and self.granularity.isdigit() else None

    @property
    def method(self) -> Method:
        """Return the solver that the options ask for."""
        return Method(self.solver, self.effort, self.order or ORDERS[0], self.sweeps or SWEEPS, self.shrink)

    def grid(self, bits: int) -> Grid:
        """Return the weight grid that the options ask for, at `bits` bits."""
        return Grid(bits, self.symmetric, self.granularity == "tensor", self.block_size)

    def lasting(self) -> str:
        """Write down the options that the written model depends on, by name: not those of memory and batches."""
        kept = [field for field, option in sorted(options_of(self).items()) if option.lasting]
        return f"Options({', '.join(f'{field}={getattr(self, field)!r}' for field in kept)})"
