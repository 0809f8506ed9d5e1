"""Check arrays against the inputs of a model, and convert what loses nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from comq_onnx.errors import SamplesError
from comq_onnx.samples.language_inputs import complete_tokens, lacks_samples
from comq_onnx.samples.samples import AnyArray, ModelInput, Samples, names_of


def fit_to_inputs(
    arrays: Mapping[str, AnyArray],
    inputs: Sequence[ModelInput],
    source: str,
    notes: Sequence[str] = (),
    warnings: Sequence[str] = (),
) -> Samples:
    """Return arrays as samples that fit the inputs of a model, converted where that loses nothing.

    arrays: by input name, samples along the first axis; tokens are enough where the other inputs follow from them
    source: where they come from; it begins every error message

    Raises SamplesError for arrays that cannot fit.
    """
    wanted = {i.name for i in inputs}
    arrays, made = complete_tokens(arrays, inputs)
    if made:
        notes = [*notes, f"made from the tokens, all of which count unless a mask is given: {names_of(made)}"]
    if set(arrays) != wanted:
        raise SamplesError(
            f"{source}: arrays {names_of(arrays)}; the model has inputs {names_of(i.name for i in inputs)}: name each "
            "array like its input"
        )
    arrays = spread_shared(arrays, inputs)
    fitted = {info.name: _fit_array(arrays[info.name], info, source) for info in inputs}
    counts = {name: len(array) for name, array in fitted.items()}
    if len(set(counts.values())) > 1:
        raise SamplesError(f"{source}: the arrays hold different numbers of samples: {counts}")
    whole = frozenset(i.name for i in inputs if _is_per_item(fitted[i.name], i))
    shared = frozenset(i.name for i in inputs if i.name in whole and lacks_samples(i) and _is_one(fitted[i.name]))
    batches = {i.dims[0] for i in inputs if i.dims and i.name not in whole and i.dims[0] is not None}
    if len(batches) > 1:
        raise SamplesError(
            f"{source}: the inputs fix different batch sizes {sorted(batches)}; give complete tensors instead"
        )
    return Samples(
        fitted, source, whole - shared, shared, next(iter(batches), None), tuple(notes), tuple(warnings)
    )  # fmt: skip


def spread_shared(arrays: Mapping[str, AnyArray], inputs: Sequence[ModelInput]) -> dict[str, AnyArray]:
    """Give each sample its own copy of the arrays that were given once, for inputs without an axis of samples."""
    ranks = {i.name: len(i.dims or ()) for i in inputs if lacks_samples(i)}
    once = {name for name, array in arrays.items() if array.ndim == ranks.get(name)}
    count = max((len(a) for name, a in arrays.items() if name not in once and a.ndim), default=1)
    return {n: np.broadcast_to(a, (count, *a.shape)) if n in once else a for n, a in arrays.items()}


def _is_one(array: AnyArray) -> bool:
    """Tell whether all samples of an array are the same."""
    return bool((array == array[:1]).all())


def _fit_array(array: AnyArray, info: ModelInput, source: str) -> AnyArray:
    array = _convert(array, info, source)
    if array.ndim == 0 or len(array) == 0:
        raise SamplesError(f"{source}: {info.name!r} holds no samples")
    if not _has_shape(array, info):
        raise SamplesError(
            f"{source}: {info.name!r} has shape {array.shape}; expected {_expected_shape(info)}, samples first"
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        axes = tuple(range(1, array.ndim))
        bad = np.flatnonzero(~np.isfinite(array).all(axis=axes))
        raise SamplesError(
            f"{source}: {info.name!r} has NaN or Inf in {len(bad)} of {len(array)} samples, first in {bad[0]}"
        )
    return array


def _is_per_item(array: AnyArray, info: ModelInput) -> bool:
    """Tell whether each sample of an array is a complete tensor, with the batch axis of the input."""
    return info.dims is not None and array.ndim == len(info.dims) + 1


def _has_shape(array: AnyArray, info: ModelInput) -> bool:
    if info.dims is None:
        return True
    needed = info.dims if _is_per_item(array, info) else info.dims[1:]
    return array.ndim == len(needed) + 1 and all(n in (None, g) for g, n in zip(array.shape[1:], needed, strict=True))


def _expected_shape(info: ModelInput) -> str:
    dims = ["?" if d is None else str(d) for d in info.dims or ()]
    return f"[{', '.join(['n', *dims[1:]])}] or [n, {', '.join(dims)}]"


def _convert(array: AnyArray, info: ModelInput, source: str) -> AnyArray:
    if array.dtype == info.dtype:
        return array
    if info.dtype == object and array.dtype.kind in "US":
        return array.astype(object)
    float_to_float = array.dtype.kind == "f" and info.dtype.kind == "f"
    if float_to_float or np.can_cast(array.dtype, info.dtype, "safe"):
        return array.astype(info.dtype)
    if array.dtype.kind in "iub" and info.dtype.kind in "iub":
        cast = array.astype(info.dtype)
        if np.array_equal(cast, array):
            return cast
    raise SamplesError(f"{source}: {info.name!r} is {array.dtype}; the model wants {info.dtype}")
