"""ONNX files in and out, and the quirks of the graph libraries, all in one place.

The working form is onnx-ir's `Model`: it keeps metadata and 4-bit types, and leaves external data on disk until it is
read. https://onnx.ai/ir-py/
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes

from comq_onnx.errors import ModelError, OptionError

# protobuf's own limit is 2^31 - 1 bytes for the whole message
INLINE_LIMIT = 1_800_000_000
MAX_IR_VERSION = 13
# nodes after all functions are inlined: a small file can ask for more than any memory holds
MOST_NODES = 1_000_000
MOST_PARTS = 3 * MOST_NODES
# the fields of the format that refer to nothing
_PROSE = frozenset(
    {"doc_string", "producer_name", "producer_version", "key", "value", "onnx.NodeProto.name", "onnx.GraphProto.name"}
)
# a work directory that nobody holds is one of a process that was killed; younger ones may be about to be held
STALE_SECONDS = 60.0


@dataclass(frozen=True)
class Source:
    """The file a model came from: its path, its bytes with external data, the SHA-256 over all of them, and size and
    time of each file."""

    path: Path
    size: int
    sha256: str
    stamps: Mapping[Path, tuple[int, int]]

    def check(self) -> None:
        """Raise ModelError where a file is not what it was: a runtime that has it mapped dies of one cut short."""
        try:
            changed = [str(file) for file, stamp in self.stamps.items() if _stamp(file) != stamp]
        except OSError as error:
            raise _unreadable(self.path, error) from error
        if changed:
            raise ModelError(f"{', '.join(changed)}: changed meanwhile; give a file that stays as it is")


def find_model(path: Path) -> Path:
    """The model file that `path` means: itself, or the one .onnx file of a directory. Raises ModelError."""
    if not path.exists():
        raise ModelError(f"{path}: no such file; give the path of an ONNX model")
    if path.is_file():
        return path
    found = sorted(path.glob("*.onnx"))
    chosen = [p for p in found if p.name == "model.onnx"] or found
    if len(chosen) != 1:
        names = ", ".join(p.name for p in found[:5]) or "none"
        raise ModelError(f"{path}: a directory with {len(found)} .onnx files ({names}); name one of them")
    return chosen[0]


def load(path: Path) -> tuple[ir.Model, Source]:
    """Read a model and what identifies its files. Raises ModelError, also for external data that must not be read."""
    path = find_model(path)
    model = read(path)
    files = {path, *_external_files(model, path)}
    _check_functions(model, path)
    size, digest, stamps = 0, hashlib.sha256(), {}
    try:
        for file in sorted(files):
            stamps[file] = _stamp(file)
            size += stamps[file][0]
            with file.open("rb") as handle:
                while chunk := handle.read(1 << 24):
                    digest.update(chunk)
    except OSError as error:
        raise _unreadable(path, error) from error
    return model, Source(path, size, digest.hexdigest(), stamps)


def _stamp(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns


def read(path: Path) -> ir.Model:
    """Read a model file; external data stays on disk. Raises ModelError for what is no readable ONNX model."""
    try:
        if path.stat().st_size == 0:
            raise ModelError(f"{path}: the file is empty; expected an ONNX model")
        proto = onnx.load(path, load_external_data=False)
        _check_counts(proto, path)
        _check_texts(proto, path)
        model = ir.from_proto(proto)
    except OSError as error:
        raise _unreadable(path, error) from error
    except (ModelError, MemoryError):
        raise
    except Exception as error:
        raise ModelError(f"{path}: not an ONNX model, or a truncated one ({_first_line(error)})") from error
    if model.graph is None or not len(model.graph):
        raise ModelError(f"{path}: the file holds no ONNX graph with nodes; expected an ONNX model")
    for _, tensor in _tensors(model):
        if isinstance(tensor, ir.ExternalTensor):
            tensor.base_dir = path.parent
    return model


def _check_counts(proto: onnx.ModelProto, path: Path) -> None:
    """Refuse a model of more parts than can be handled: two bytes of a file can be a node of some hundred in memory."""
    left = MOST_PARTS
    pending: list[Any] = [proto.graph, *proto.functions]
    while pending and left >= 0:
        graph = pending.pop()
        left -= len(graph.node) + len(graph.input) + len(graph.output) + len(graph.value_info)
        if isinstance(graph, onnx.GraphProto):
            left -= len(graph.initializer) + len(graph.sparse_initializer) + len(graph.quantization_annotation)
        for node in graph.node if left >= 0 else ():
            left -= len(node.input) + len(node.output) + len(node.attribute)
            for attribute in node.attribute if left >= 0 else ():
                left -= len(attribute.graphs) + len(attribute.tensors) + len(attribute.strings)
                pending += attribute.graphs
                if attribute.HasField("g"):
                    pending.append(attribute.g)
    if left < 0:
        raise ModelError(f"{path}: more than {MOST_PARTS:,} nodes, values and attributes; no real model has so many")


def _check_texts(message: Any, path: Path) -> None:
    """Refuse names that are not UTF-8, which protobuf lets through and no library takes; in what refers to
    nothing, replace what is not."""
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for inner in value if isinstance(value, Sequence) else (value,):
                _check_texts(inner, path)
        elif field.type == field.TYPE_STRING:
            for text in (value,) if isinstance(value, (str, bytes)) else value:
                if isinstance(text, str):
                    continue
                if field.name not in _PROSE and field.full_name not in _PROSE:
                    raise ModelError(f"{path}: the {field.name} {text[:40]!r} is not UTF-8, as ONNX wants it; rename")
                setattr(message, field.name, text.decode(errors="replace"))


def _unreadable(path: Path, error: OSError) -> ModelError:
    return ModelError(f"{path}: cannot be read ({error.strerror or error}); give a file that stays where it is")


def _external_files(model: ir.Model, path: Path) -> Iterator[Path]:
    """The external data files of a model, after checking that each lies beside it and holds what it should."""
    root = path.parent.resolve()
    for name, tensor in _tensors(model):
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        location, offset = os.fspath(tensor.location), tensor.offset or 0
        try:
            file = (root / location).resolve()
            if os.path.isabs(location) or not file.is_relative_to(root):
                raise ModelError(
                    f"{path}: external data of {name!r} lies at {location!r}, outside the model's folder: refused"
                )
            if not file.is_file():
                raise ModelError(f"{path}: external data file {location!r} of {name!r} is missing; put it beside")
            size = file.stat().st_size
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelError(f"{path}: external data of {name!r} at {location!r} cannot be read ({error})") from error
        end = offset + tensor.nbytes
        if end > size or (tensor.length is not None and tensor.length < tensor.nbytes):
            raise ModelError(
                f"{path}: external data of {name!r} should end at byte {end} of {location!r}, "
                f"which has {size}; the file is truncated or not this model's"
            )
        if offset < 0 or tensor.nbytes < 0:
            raise ModelError(f"{path}: external data of {name!r} begins at byte {offset} of {location!r}: refused")
        yield root / location


def _tensors(model: ir.Model) -> Iterator[tuple[str, Any]]:
    """Every tensor of the model with a name for it: initializers and attributes, in subgraphs and functions too."""
    graphs: list[Any] = [model.graph, *model.graph.subgraphs(), *model.functions.values()]
    graphs += [inner for function in model.functions.values() for inner in function.subgraphs()]
    for graph in graphs:
        for value in () if isinstance(graph, ir.Function) else graph.initializers.values():
            yield str(value.name), value.const_value
        for node in graph:
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                    yield f"{node.name or node.op_type}.{attribute.name}", attribute.value
                elif attribute.type == ir.AttributeType.TENSORS and not attribute.is_ref():
                    yield from ((f"{node.name or node.op_type}.{attribute.name}", t) for t in attribute.value)


def _check_functions(model: ir.Model, path: Path) -> None:
    """Refuse functions that call themselves, and calls that multiply beyond what can be inlined."""
    sizes: dict[Any, int | None] = {}

    def nodes(calls: Iterable[ir.Node]) -> int:
        return sum(size(node.op_identifier()) for node in calls)

    def size(key: Any) -> int:
        if key not in model.functions:
            return 1
        if key not in sizes:
            sizes[key] = None  # being counted
            sizes[key] = nodes(model.functions[key].all_nodes())
        found = sizes[key]
        if found is None:
            raise ModelError(f"{path}: function {key[1]!r} calls itself; ONNX allows no recursion")
        return found

    try:
        count = nodes(model.graph.all_nodes())
    except RecursionError as error:
        raise ModelError(f"{path}: its functions call one another too deeply to be inlined") from error
    if count > MOST_NODES:
        raise ModelError(f"{path}: {count:,} nodes when its functions are inlined; at most {MOST_NODES:,} are handled")


def as_path(model: Any, work: Path) -> Path:
    """The file of a model: a path as `find_model` takes it; anything else that `from_object` takes is written to
    `work`. Raises ModelError or OptionError."""
    if isinstance(model, (str, os.PathLike)):
        return find_model(Path(model))
    path = Path(tempfile.mkdtemp(dir=work)) / "model.onnx"
    onnx.save(from_object(model), path, save_as_external_data=False)
    return path


def from_object(model: Any) -> onnx.ModelProto:
    """A ModelProto from a ModelProto or an onnx-graphsurgeon Graph. Raises OptionError for anything else."""
    if isinstance(model, onnx.ModelProto):
        return model
    if type(model).__module__.startswith("onnx_graphsurgeon"):
        import onnx_graphsurgeon as gs

        return gs.export_onnx(model)  # type: ignore[no-any-return]
    raise OptionError(
        f"a model is a path, an onnx.ModelProto or an onnx_graphsurgeon.Graph, not {type(model).__name__}"
    )


def to_graphsurgeon(model: onnx.ModelProto) -> Any:
    """An onnx-graphsurgeon Graph from a ModelProto."""
    import onnx_graphsurgeon as gs

    return gs.import_onnx(model)


def write_text(path: Path, text: str) -> None:
    """Write a file that appears under its name only when it is complete. Raises OptionError."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OptionError(f"{path}: cannot be written ({error.strerror or error}); nothing was left behind") from error


def check_output(out: Path, source: Path) -> None:
    """Make sure, before the long work, that `out` can be written and is not the source. Raises OptionError."""
    try:
        if out.is_dir():
            raise OptionError(f"{out}: is a directory; give the path of the file to write")
        if out.exists() and not out.is_file():
            raise OptionError(f"{out}: is a device or a pipe, not a file; give the path of the file to write")
    except OSError as error:
        raise OptionError(f"{out}: cannot be the output ({error.strerror})") from error
    if out.exists() and source.exists() and out.samefile(source):
        raise OptionError(f"{out}: is the model itself, which is never modified; choose another output")
    parent = out.parent
    if not parent.is_dir():
        raise OptionError(f"{parent}: no such directory for the output; make it first")
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise OptionError(f"{parent}: cannot write there ({error.strerror}); choose another output") from error


@contextlib.contextmanager
def written(model: ir.Model, out: Path) -> Iterator[tuple[Path, int]]:
    """Write `model` beside `out` and give its path there and its bytes; it gets its name when the block ends well, and
    vanishes when not: no partial file is ever seen there.

    Tensors go to `<out>.data` where the model would not fit into one protobuf message. Raises OptionError when the
    disk refuses.
    """
    external = f"{out.name}.data" if weight_bytes(model) > INLINE_LIMIT else None
    if external is None:
        # or what stays float would go on pointing at the source's data file
        ir.external_data.load_to_model(model)
    with contextlib.ExitStack() as stack:
        with _writing(out):
            work = stack.enter_context(private_directory(out.parent))
            ir.save(model, work / out.name, external_data=external)
            files = sorted(work.iterdir())
            size = sum(f.stat().st_size for f in files)
        yield work / out.name, size
        with _writing(out):
            if external is not None:
                # rather no model than an older one beside the new one's data
                out.unlink(missing_ok=True)
            # the data first: a model file always finds its data
            for file in sorted(files, key=lambda f: f.name == out.name):
                os.replace(file, out.parent / file.name)


def file_size(model: ir.Model) -> int:
    """The bytes that `written` would write; where tensors go to a file of their own, but for some names."""
    if weight_bytes(model) > INLINE_LIMIT:
        return weight_bytes(model)
    return int(ir.to_proto(model).ByteSize())


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OptionError(f"{out}: cannot be written ({error.strerror or error}); nothing was left behind") from error


@contextlib.contextmanager
def private_directory(parent: Path | None = None) -> Iterator[Path]:
    """A directory only we can read, removed at the end; and those removed that killed processes left in `parent`."""
    parent = Path(tempfile.gettempdir()) if parent is None else parent
    _remove_stale(parent)
    work = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    held = _hold(work)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if held is not None:
            os.close(held)


# of directories that are locked while in use: earlier versions locked none of theirs
_PREFIX = ".comq-held-"


def _hold(work: Path) -> int | None:
    """Lock a directory for as long as this process lives; None where it is locked, or cannot be."""
    try:
        import fcntl

        descriptor = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _remove_stale(parent: Path) -> None:
    with contextlib.suppress(OSError):
        for entry in os.scandir(parent):
            if not entry.name.startswith(_PREFIX) or not entry.is_dir(follow_symlinks=False):
                continue
            state = entry.stat(follow_symlinks=False)
            mine = not hasattr(os, "getuid") or state.st_uid == os.getuid()
            if mine and time.time() - state.st_mtime > STALE_SECONDS and (held := _hold(Path(entry.path))) is not None:
                shutil.rmtree(entry.path, ignore_errors=True)
                os.close(held)


def subdirectory(parent: Path, name: str) -> Path:
    """A new directory in another one."""
    made = parent / name
    made.mkdir()
    return made


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers."""
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)


def to_bytes_or_file(model: ir.Model, directory: Path, name: str) -> bytes | str:
    """The model as a runtime takes it: serialized, or a path to it where it is too large for that."""
    if weight_bytes(model) <= INLINE_LIMIT:
        ir.external_data.load_to_model(model)
        return bytes(ir.to_proto(model).SerializeToString())
    ir.save(model, directory / f"{name}.onnx", external_data=f"{name}.data")
    return str(directory / f"{name}.onnx")


def constant(value: ir.Value | None) -> np.ndarray[Any, Any] | None:
    """The numbers of an initializer; None for anything else."""
    if value is None or value.const_value is None or value.is_graph_input() or value.producer() is not None:
        return None
    return value.const_value.numpy()


def is_constant(value: ir.Value | None) -> bool:
    """Whether `constant` would return numbers, without reading them."""
    return (
        value is not None and value.const_value is not None and not value.is_graph_input() and value.producer() is None
    )


def add_initializer(graph: ir.Graph, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
    """Add a constant to the main graph under a fresh name and return its value."""
    unique, count = name, 1
    while unique in graph.initializers:
        unique, count = f"{name}_{count}", count + 1
    # ascontiguousarray would make a scalar rank 1, and a rank-1 scale fails to load or runs in float
    tensor = ir.tensor(array if array.ndim == 0 else np.ascontiguousarray(array), name=unique)
    value = ir.Value(name=unique, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
    graph.register_initializer(value)
    return value


def insert(
    before: ir.Node, op: str, inputs: Sequence[ir.Value | None], attributes: Mapping[str, Any], name: str
) -> ir.Value:
    """A new node right before another; its output, named like the node."""
    made = ir.node(op, inputs, attributes, name=name)
    made.outputs[0].name = name
    assert before.graph is not None
    before.graph.insert_before(before, made)
    return made.outputs[0]


def walk_values(model: ir.Model) -> Iterator[ir.Value]:
    """Every value of the model, subgraphs included."""
    for graph in (model.graph, *model.graph.subgraphs()):
        yield from graph.inputs
        yield from graph.initializers.values()
        for node in graph:
            yield from node.outputs


def exposing(model: ir.Model, names: Iterable[str]) -> ir.Model:
    """The part of a model that makes these values, as a model of its own with them as outputs."""
    part = model.clone()
    values = {str(v.name): v for v in walk_values(part)}
    part.graph.outputs[:] = [values[name] for name in names]
    passes.RemoveUnusedNodesPass()(part)
    return part


def opset(model: ir.Model) -> int:
    """The version of the standard operators the model imports."""
    return model.graph.opset_imports.get("", model.graph.opset_imports.get("ai.onnx", 1))


def _first_line(error: BaseException) -> str:
    """The first line of each error of a chain: libraries wrap what went wrong in what they were doing."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
    return line if error.__cause__ is None else f"{line}: {_first_line(error.__cause__)}"[:400]
