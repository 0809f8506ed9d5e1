"""Take samples from Python: a callable, a CalibrationDataReader of ONNX Runtime, a DataLoader, a dataset, an iterable.

This is the only place where code of the caller runs, and only code that the caller named.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from comq_onnx.errors import SamplesError
from comq_onnx.options.samples import PICTURE_OPTIONS, TEXT_OPTIONS, SampleOptions
from comq_onnx.samples.arrays import stack_feeds
from comq_onnx.samples.fit import spread_shared
from comq_onnx.samples.images.read import read_images
from comq_onnx.samples.language_inputs import lacks_samples
from comq_onnx.samples.samples import AnyArray, Clues, ModelInput, names_of
from comq_onnx.samples.text import texts_wanted, tokenize


def is_reader(text: str) -> bool:
    """Tell whether a text has the form module:name or file.py:name."""
    module, colon, name = text.rpartition(":")
    return bool(colon) and name.isidentifier() and (module.endswith(".py") or bool(re.fullmatch(r"[\w.]+", module)))


def load_reader(text: str) -> Any:
    """Import the object that module:name or file.py:name names, which runs that code. Raises SamplesError."""
    place, _, name = text.rpartition(":")
    try:
        module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    except SamplesError:
        raise
    except (Exception, SystemExit) as error:
        raise SamplesError(f"{text}: importing {place} failed with {_in_one_line(error)}") from error
    if not hasattr(module, name):
        raise SamplesError(f"{text}: {place} has no {name!r}")
    return getattr(module, name)


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise SamplesError(f"{path}: no such Python file")
    spec = importlib.util.spec_from_file_location(f"comq_onnx_reader_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickles of it look it up
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.resolve().parent))
    return module


def _import_module(name: str) -> Any:
    # found as `python -m` finds it: from the current folder
    sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(os.getcwd())


def read_python(
    source: Any, what: str, inputs: Sequence[ModelInput], options: SampleOptions, clues: Clues, count: int
) -> tuple[dict[str, AnyArray], list[str]]:
    """Take the first `count` samples that `source` gives, at most: (arrays by input name, notes of what was decided).

    source: a callable or a class is called without arguments; an object with get_next() is asked until it gives None;
        anything else is iterated, or indexed
    what: how messages name the source

    An item is a mapping by input names (of batches or single samples), a picture or a text, alone or in a mapping, or
    the inputs in their order: tuples of a DataLoader have labels behind them. Raises SamplesError, and OptionError for
    options that are for samples of another kind.
    """
    items = _iterate(source, what)
    try:
        first = next(items)
    except StopIteration:
        raise SamplesError(f"{what}: gave no samples") from None
    items = chain([first], items)
    field = _find_content(first, inputs, options, what)
    if field is None:
        options.only((), "tensors from Python")
        return _join(_gather_feeds(items, inputs, what, count), inputs, what), []
    is_text = isinstance(_take_content(first, field, what), str)
    wanted = texts_wanted(inputs, count, clues) if is_text else count
    contents = [_take_content(item, field, what) for item in islice(items, wanted)]
    if is_text:
        options.only(TEXT_OPTIONS, "text")
        return tokenize([str(c) for c in contents], inputs, options, clues, count)
    options.only(PICTURE_OPTIONS, "images")
    return read_images(contents, inputs, options, clues)


def _iterate(source: Any, what: str) -> Iterator[Any]:
    """Yield the items of a source. Raises SamplesError, also for whatever the code of the caller raises."""
    try:
        if isinstance(source, type) or (callable(source) and not hasattr(source, "get_next")):
            source = source()
        if isinstance(source, Mapping):
            yield source
        elif hasattr(source, "get_next"):
            while (item := source.get_next()) is not None:
                yield item
        elif isinstance(source, Iterable) and not isinstance(source, (str, bytes)):
            yield from source
        elif hasattr(source, "__getitem__") and hasattr(source, "__len__"):  # a map-style dataset of PyTorch
            yield from (source[i] for i in range(len(source)))
        else:
            raise SamplesError(
                f"{what}: is {_type_of(source)}; samples from Python are a callable, a CalibrationDataReader or "
                "something that can be iterated"
            )
    except SamplesError:
        raise
    except Exception as error:
        raise SamplesError(f"{what}: failed with {_in_one_line(error)}") from error


def _find_content(item: Any, inputs: Sequence[ModelInput], options: SampleOptions, what: str) -> str | int | None:
    """Find the picture or text of an item: its field, 0 for the item itself; None where the item holds tensors.

    Raises SamplesError where several fields hold one and none is chosen.
    """
    if isinstance(item, (str, Image.Image)):
        return 0
    if not isinstance(item, Mapping) or {i.name for i in inputs} <= set(item):
        return None
    fields = [str(k) for k, v in item.items() if isinstance(v, (str, Image.Image))]
    if options.text_field is not None and options.text_field not in fields:
        raise SamplesError(f"{what}: no text in {options.text_field!r}; it has {names_of(fields)}")
    if len(fields) > 1 and options.text_field is None:
        pictures = [f for f in fields if isinstance(item[f], Image.Image)]
        preferred = pictures if len(pictures) == 1 else [f for f in fields if f == "text"]
        if not preferred:
            raise SamplesError(f"{what}: text in {names_of(fields)}; choose one with --text-field")
        return preferred[0]
    return options.text_field or (fields[0] if fields else None)


def _take_content(item: Any, field: str | int, what: str) -> Any:
    """Return the picture or text in the field of an item. Raises SamplesError where it holds neither."""
    value = item if field == 0 else item.get(field) if isinstance(item, Mapping) else None
    if not isinstance(value, (str, Image.Image)):
        raise SamplesError(f"{what}: an item is {_type_of(value)} where the first has a text or a picture")
    return value


def _gather_feeds(
    items: Iterator[Any], inputs: Sequence[ModelInput], what: str, count: int
) -> list[dict[str, AnyArray]]:
    """Take items as feeds until they hold `count` samples."""
    feeds, gathered = [], 0
    for item in items:
        feed = _as_feed(item, inputs, what)
        feeds.append(feed)
        gathered += _count_samples(feed, inputs)
        if gathered >= count:
            break
    return feeds


def _as_feed(item: Any, inputs: Sequence[ModelInput], what: str) -> dict[str, AnyArray]:
    """Return the arrays of an item by input name. Raises SamplesError."""
    names = [i.name for i in inputs]
    if isinstance(item, Mapping):
        if missing := [n for n in names if n not in item]:
            raise SamplesError(
                f"{what}: gives {names_of(map(str, item))}; the model has inputs {names_of(names)}: "
                f"{names_of(missing)} missing"
            )
        values = [item[n] for n in names]
    elif isinstance(item, (tuple, list)) and len(item) >= len(names):
        values = list(item[: len(names)])
    elif len(names) == 1:
        values = [item]
    else:
        raise SamplesError(
            f"{what}: an item is {_type_of(item)}; the model has {len(names)} inputs ({names_of(names)}): give "
            "mappings by name"
        )
    return {name: _as_array(value, name, what) for name, value in zip(names, values, strict=True)}


def _as_array(value: Any, name: str, what: str) -> AnyArray:
    """Return a value as an array of numbers or strings. Raises SamplesError."""
    if hasattr(value, "detach"):  # a tensor of PyTorch
        value = value.detach().cpu().numpy()
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise SamplesError(f"{what}: {name!r} is {_type_of(value)}, not an array ({error})") from error
    if array.dtype == object and not all(isinstance(v, str) for v in array.flat):
        raise SamplesError(f"{what}: {name!r} is {_type_of(value)}, not an array of numbers")
    return array


def _is_single_sample(feed: dict[str, AnyArray], inputs: Sequence[ModelInput]) -> bool:
    """Tell whether a feed is one sample without its batch axis."""
    own = [i for i in inputs if not lacks_samples(i)]
    return all(i.dims is not None and feed[i.name].ndim == len(i.dims) - 1 for i in own)


def _is_batch(feed: dict[str, AnyArray], inputs: Sequence[ModelInput]) -> bool:
    """Tell whether the first axis of every array of a feed is the batch, where an input has one."""
    counts = {feed[i.name].shape[:1] for i in inputs if not lacks_samples(i)}
    return len(counts) == 1 and () not in counts


def _count_samples(feed: dict[str, AnyArray], inputs: Sequence[ModelInput]) -> int:
    if _is_single_sample(feed, inputs) or not _is_batch(feed, inputs):
        return 1
    return next(len(feed[i.name]) for i in inputs if not lacks_samples(i))


def _join(feeds: list[dict[str, AnyArray]], inputs: Sequence[ModelInput], what: str) -> dict[str, AnyArray]:
    """Join feeds along their batch axis, or stack them where they are single samples or complete feeds."""
    if _is_single_sample(feeds[0], inputs) or not _is_batch(feeds[0], inputs):
        return stack_feeds(feeds, [f"{what}, item {i}" for i in range(len(feeds))])
    feeds = [spread_shared(feed, inputs) for feed in feeds]
    for i, feed in enumerate(feeds):
        for name, array in feed.items():
            if array.shape[1:] != feeds[0][name].shape[1:]:
                raise SamplesError(
                    f"{what}, item {i}: {name!r} has samples of {array.shape[1:]}, the first item of "
                    f"{feeds[0][name].shape[1:]}; pad them to one shape"
                )
    return {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}


def _type_of(value: Any) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"


def _in_one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
