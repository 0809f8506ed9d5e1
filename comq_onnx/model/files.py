"""Write files whole or not at all, and make directories that vanish with the process."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx_ir as ir

from comq_onnx.errors import OptionError
from comq_onnx.workdir import hold

# protobuf's own limit is 2^31 - 1 bytes for the whole message
INLINE_LIMIT = 1_800_000_000
# a model of more weights goes to a runtime by a file, from which they are mapped; as a message they would be in memory
# several times
MESSAGE_LIMIT = 1 << 27
# where the models of a repository of the Hugging Face hub lie
HUB = "onnx"
# a work directory that nobody holds is one of a process that was killed; younger ones may be about to be held
STALE_SECONDS = 60.0
# of directories that are locked while in use: those of earlier versions, which were not locked, have another prefix
_PREFIX = ".comq-held-"


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


def data_names(out: Path) -> tuple[str, str]:
    """Return the names that external data of a model may have: that of the Hugging Face hub, and the other one."""
    return f"{out.name}_data", f"{out.name}.data"


def _data_name(out: Path, given: Iterable[Path]) -> str:
    """Return the name of external data: as transformers.js and optimum look for it where a model lies in `onnx/`.

    given: the files of the source; a model whose own data have such a name keeps it
    """
    of_hub, other = data_names(out)
    return of_hub if out.parent.name == HUB or any(file.name.endswith(".onnx_data") for file in given) else other


@contextlib.contextmanager
def written(model: ir.Model, out: Path, given: Iterable[Path] = ()) -> Iterator[tuple[Path, int]]:
    """Write `model` into a directory beside `out`, and yield its path there and its size in bytes.

    It moves to `out` when the block ends well and vanishes when it raises: nobody ever sees a partial file at `out`.
    Tensors go to a file beside `out` where the model would not fit into one protobuf message. Raises OptionError where
    a file cannot be written.

    given: the files of the source, whose data may tell how such a file is called
    """
    external = _data_name(out, given) if weight_bytes(model) > INLINE_LIMIT else None
    if external is None:
        # tensors that stay float would go on pointing at the source's data file otherwise
        _load_external(model)
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


def write_text(path: Path, text: str) -> None:
    """Write a text file that gets its name only when it is complete. Raises OptionError."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OptionError(f"{path}: cannot be written ({error.strerror or error}); nothing was left behind") from error


@contextlib.contextmanager
def private_directory(parent: Path | None = None) -> Iterator[Path]:
    """Make a directory in `parent` that only this user can read, and remove it at the end.

    Directories that killed processes left in `parent` are removed too. parent: the system's temporary directory where
    None."""
    parent = Path(tempfile.gettempdir()) if parent is None else parent
    _remove_stale(parent)
    work = parent / f"{_PREFIX}{secrets.token_hex(8)}"
    held = None
    # a signal can raise between any two lines, also in the first `finally`: the name is known before the directory is
    try:
        try:
            work.mkdir(mode=0o700)
            held = hold(work)
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if held is not None:
            os.close(held)


def subdirectory(parent: Path, name: str) -> Path:
    """Make a new directory in another one."""
    made = parent / name
    made.mkdir()
    return made


def to_bytes_or_file(model: ir.Model, directory: Path, name: str) -> bytes | str:
    """Return the model as a runtime takes it: serialized, or where it is large, a path in `directory`."""
    if weight_bytes(model) <= MESSAGE_LIMIT:
        _load_external(model)
        return bytes(ir.to_proto(model).SerializeToString())
    ir.save(model, directory / f"{name}.onnx", external_data=f"{name}.data")
    return str(directory / f"{name}.onnx")


def _load_external(model: ir.Model) -> None:
    """Copy external data into memory; unlike onnx-ir's function, while other arrays may be views of them."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                value.const_value = ir.Tensor(tensor.numpy().copy(), name=tensor.name, dtype=tensor.dtype)


def file_size(model: ir.Model) -> int:
    """Return the bytes that `written` would write.

    Where tensors go to a file of their own, only those count, not the few bytes of names and nodes beside them."""
    if weight_bytes(model) > INLINE_LIMIT:
        return weight_bytes(model)
    return int(ir.to_proto(model).ByteSize())


def weight_bytes(model: ir.Model) -> int:
    """Count the bytes of all initializers."""
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Turn an OSError of the block into an OptionError that names `out`."""
    try:
        yield
    except OSError as error:
        raise OptionError(f"{out}: cannot be written ({error.strerror or error}); nothing was left behind") from error


def _remove_stale(parent: Path) -> None:
    """Remove directories in `parent` that processes of this user left when they were killed."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(parent):
            if not entry.name.startswith(_PREFIX) or not entry.is_dir(follow_symlinks=False):
                continue
            state = entry.stat(follow_symlinks=False)
            mine = not hasattr(os, "getuid") or state.st_uid == os.getuid()
            if mine and time.time() - state.st_mtime > STALE_SECONDS and (held := hold(Path(entry.path))) is not None:
                shutil.rmtree(entry.path, ignore_errors=True)
                os.close(held)
