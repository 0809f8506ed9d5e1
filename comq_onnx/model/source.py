"""Read ONNX files: find them, check that they hold what they say, and identify them.

The working form is onnx-ir's `Model`: it keeps metadata and 4-bit types, and leaves external data on disk until they
are read. https://onnx.ai/ir-py/"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from comq_onnx.errors import ModelError, OptionError

# nodes after all functions are inlined: a small file can ask for more than any memory holds
MOST_NODES = 1_000_000
MOST_PARTS = 3 * MOST_NODES
# the fields of the format that no other field refers to
_FREE_TEXT = frozenset(
    {"doc_string", "producer_name", "producer_version", "key", "value", "onnx.NodeProto.name", "onnx.GraphProto.name"}
)


@dataclass(frozen=True)
class SourceFile:
    """Identify the file that a model came from, with the files of its external data.

    path: the model file.
    size: bytes of all files.
    sha256: the SHA-256 over all of them.
    stamps: size and time of change (nanoseconds) of each file.
    """

    path: Path
    size: int
    sha256: str
    stamps: Mapping[Path, tuple[int, int]]

    def check(self) -> None:
        """Raise ModelError where a file has changed: a runtime that has mapped a file dies when that is cut short."""
        try:
            changed = [str(file) for file, stamp in self.stamps.items() if _stamp(file) != stamp]
        except OSError as error:
            raise _unreadable(self.path, error) from error
        if changed:
            raise ModelError(f"{', '.join(changed)}: changed meanwhile; give a file that stays as it is")


def load_source(path: Path) -> tuple[ir.Model, SourceFile]:
    """Read a model, and what identifies its files.

    Raises ModelError for what is no readable ONNX model, for external data outside its folder or not whole, and for
    functions that cannot be inlined."""
    path = find_model(path)
    model = read_model(path)
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
    return model, SourceFile(path, size, digest.hexdigest(), stamps)


def read_model(path: Path) -> ir.Model:
    """Read a model file; external data stays on disk. Raises ModelError for what is no readable ONNX model."""
    model = _read(path)
    _follow_links(model, path)
    return model


def _read(path: Path) -> ir.Model:
    """Read a model file, with external data where it says."""
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


def _follow_links(model: ir.Model, path: Path) -> None:
    """Let initializers whose data lie behind links, in the folder of the file behind `path`, name the files there.

    The library refuses a link out of a folder. Caches of the Hugging Face hub are full of them: folders of links to the
    files of another one.
    """
    folder = path.resolve().parent
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if not isinstance(tensor, ir.ExternalTensor) or os.path.isabs(tensor.location):
                continue
            link = path.parent / tensor.location
            try:
                file = link.resolve() if link.is_symlink() else link
            except (OSError, RuntimeError):  # a link to itself, or no name of a file: told when the data are checked
                continue
            if file != link and file.is_relative_to(folder):
                value.const_value = ir.ExternalTensor(
                    file.relative_to(folder), tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape,
                    name=tensor.name, base_dir=folder,
                )  # fmt: skip


def data_files(path: Path) -> set[Path]:
    """Return the files beside a model that hold its external data, under the names that it has for them.

    Raises ModelError as `load_source` does.
    """
    model = _read(path)
    found = {path.parent / tensor.location for _, tensor in _tensors(model) if isinstance(tensor, ir.ExternalTensor)}
    _follow_links(model, path)
    list(_external_files(model, path))
    return found


def find_model(path: Path) -> Path:
    """Return the model file that `path` means: itself, or the one .onnx file of a directory. Raises ModelError."""
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


def as_path(model: Any, work: Path) -> Path:
    """Return the file of a model.

    model: a path, as `find_model` takes it; or what `from_object` takes, which is written to a file in `work`.

    Raises ModelError or OptionError."""
    if isinstance(model, (str, os.PathLike)):
        return find_model(Path(model))
    path = Path(tempfile.mkdtemp(dir=work)) / "model.onnx"
    onnx.save(from_object(model), path, save_as_external_data=False)
    return path


def from_object(model: Any) -> onnx.ModelProto:
    """Make a ModelProto of a ModelProto or an onnx-graphsurgeon Graph. Raises OptionError for anything else."""
    if isinstance(model, onnx.ModelProto):
        return model
    if type(model).__module__.startswith("onnx_graphsurgeon"):
        import onnx_graphsurgeon as gs

        return gs.export_onnx(model)  # type: ignore[no-any-return]
    raise OptionError(
        f"a model is a path, an onnx.ModelProto or an onnx_graphsurgeon.Graph, not {type(model).__name__}"
    )


def to_graphsurgeon(model: onnx.ModelProto) -> Any:
    """Make an onnx-graphsurgeon Graph of a ModelProto."""
    import onnx_graphsurgeon as gs

    return gs.import_onnx(model)


def _stamp(file: Path) -> tuple[int, int]:
    """Return a file's size and time of change (nanoseconds)."""
    found = file.stat()
    return found.st_size, found.st_mtime_ns


def _unreadable(path: Path, error: OSError) -> ModelError:
    return ModelError(f"{path}: cannot be read ({error.strerror or error}); give a file that stays where it is")


def _first_line(error: BaseException) -> str:
    """Join the first line of each error of a chain: a library wraps the cause in an error about what it was doing."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
    return line if error.__cause__ is None else f"{line}: {_first_line(error.__cause__)}"[:400]


def _check_counts(proto: onnx.ModelProto, path: Path) -> None:
    """Refuse a model of more than MOST_PARTS parts: two bytes of a file can become a node of some hundred in memory."""
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
    """Refuse names that are not UTF-8, which protobuf lets through and no library takes.

    In texts that nothing refers to, replace the bytes that are not UTF-8."""
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for inner in value if isinstance(value, Sequence) else (value,):
                _check_texts(inner, path)
        elif field.type == field.TYPE_STRING:
            for text in (value,) if isinstance(value, (str, bytes)) else value:
                if isinstance(text, str):
                    continue
                if field.name not in _FREE_TEXT and field.full_name not in _FREE_TEXT:
                    raise ModelError(f"{path}: the {field.name} {text[:40]!r} is not UTF-8, as ONNX wants it; rename")
                setattr(message, field.name, text.decode(errors="replace"))


def _check_functions(model: ir.Model, path: Path) -> None:
    """Refuse functions that call themselves, and a model of more than MOST_NODES nodes once they are inlined."""
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


def _external_files(model: ir.Model, path: Path) -> Iterator[Path]:
    """Return the external data files of a model, after checking that each lies beside it and holds what it should."""
    for name, tensor in _tensors(model):
        if isinstance(tensor, ir.ExternalTensor):
            root = Path(tensor.base_dir).resolve()
            _check_external(name, tensor, path, root)
            yield root / os.fspath(tensor.location)


def _check_external(name: str, tensor: ir.ExternalTensor, path: Path, root: Path) -> None:
    """Raise ModelError where a tensor's data lie outside the folder `root` of the model, or not within their file."""
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


def _tensors(model: ir.Model) -> Iterator[tuple[str, Any]]:
    """Return all tensors with names: initializers and attributes of the model, in subgraphs and functions too."""
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
