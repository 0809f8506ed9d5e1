"""Test models in and out of files: what is read, what is refused and why, and that writing is all or nothing."""

from __future__ import annotations

import errno
import hashlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
import pytest
from onnx import external_data_helper
from PIL import Image

import comq_onnx
from comq_onnx.errors import ModelError, OptionError, RuntimeFailure
from comq_onnx.evaluate import evaluation
from comq_onnx.model import files, float_model
from comq_onnx.model import graph as graphs
from comq_onnx.model import source as reading
from comq_onnx.model.files import private_directory
from comq_onnx.model.source import find_model, load_source
from comq_onnx.workdir import hold
from models import build, cnn, infer, mlp, samples_for, weight, worst_sqnr

EIGHT = {"bits": 8, "device": "cpu"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Save an MLP in a directory of its own."""
    folder = tmp_path / "source"
    folder.mkdir()
    onnx.save(mlp(), folder / "mlp.onnx")
    return folder / "mlp.onnx"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Make a directory that holds nothing but the output, and return the output's path."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "q.onnx"


def save_external(model: onnx.ModelProto, path: Path, location: str = "weights.bin") -> Path:
    """Save with every tensor in one external file."""
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    onnx.save(copy, path, save_as_external_data=True, location=location, size_threshold=0)
    return path


# Reading


def test_a_file_of_its_own_is_quantized(quantized: Callable[..., Any]) -> None:
    assert quantized(mlp()).report.bits == 8


def test_a_directory_with_one_model_is_that_model(source: Path, out: Path) -> None:
    report = comq_onnx.quantize(source.parent, out, samples_for(mlp()), **EIGHT)
    assert Path(report.model) == source
    assert worst_sqnr(source, out, samples_for(mlp())) >= 25


def test_of_several_models_the_one_called_model_is_taken(source: Path) -> None:
    onnx.save(mlp(), source.parent / "model.onnx")
    assert find_model(source.parent).name == "model.onnx"


def test_a_directory_with_several_models_is_refused_by_their_names(source: Path, out: Path) -> None:
    onnx.save(mlp(), source.parent / "other.onnx")
    with pytest.raises(ModelError, match=r"2 \.onnx files \(mlp\.onnx, other\.onnx\)"):
        comq_onnx.quantize(source.parent, out, samples_for(mlp()), **EIGHT)
    assert not os.listdir(out.parent)


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"0 \.onnx files"):
        find_model(tmp_path)


def test_external_data_is_read_and_counted(tmp_path: Path, out: Path) -> None:
    (tmp_path / "in").mkdir()
    path = save_external(cnn(), tmp_path / "in" / "model.onnx")
    data = path.with_name("weights.bin")
    before = [hashlib.sha256(p.read_bytes()).digest() for p in (path, data)]
    report = comq_onnx.quantize(path, out, samples_for(cnn()), **EIGHT)
    assert report.size["before"] == path.stat().st_size + data.stat().st_size
    assert [hashlib.sha256(p.read_bytes()).digest() for p in (path, data)] == before
    assert worst_sqnr(path, out, samples_for(cnn())) >= 25
    # a small model comes out as one file
    assert os.listdir(out.parent) == ["q.onnx"]


def test_a_table_in_external_data_that_a_product_reads_transposed_is_quantized(tmp_path: Path, out: Path) -> None:
    """Folding makes the transposed one a view of the mapped file."""
    tied = build(
        """tied (int64[batch, 6] ids) => (float[batch, 6, 40] y) {
            e = Gather (table, ids)
            t = Tanh (e)
            turned = Transpose <perm = [1, 0]> (table)
            y = MatMul (t, turned)
        }""",
        {"table": weight(40, 16, fan=1)},
    )
    path = save_external(tied, tmp_path / "model.onnx")
    feeds = {"ids": np.random.default_rng(0).integers(0, 40, (32, 6))}
    comq_onnx.quantize(path, out, feeds, **EIGHT)
    assert worst_sqnr(path, out, feeds) >= 25


def test_a_model_proto_is_quantized_and_not_modified(out: Path) -> None:
    model = mlp()
    before = model.SerializeToString()
    comq_onnx.quantize(model, out, samples_for(model), **EIGHT)
    assert model.SerializeToString() == before
    assert worst_sqnr(model, out.resolve(), samples_for(model)) >= 25


def test_a_graphsurgeon_graph_is_quantized(out: Path) -> None:
    surgeon = gs.import_onnx(mlp())
    comq_onnx.quantize(surgeon, out, samples_for(mlp()), **EIGHT)
    assert worst_sqnr(mlp(), out.resolve(), samples_for(mlp())) >= 25


def test_anything_else_than_a_model_is_refused(out: Path) -> None:
    with pytest.raises(OptionError, match="not dict"):
        comq_onnx.quantize({"not": "a model"}, out)


@pytest.mark.parametrize("depth", ["../", "sub/../../"])
def test_external_data_outside_the_models_directory_is_refused(tmp_path: Path, out: Path, depth: str) -> None:
    (tmp_path / "in" / "sub").mkdir(parents=True)
    path = save_external(cnn(), tmp_path / "in" / "model.onnx")
    path.with_name("weights.bin").rename(tmp_path / "weights.bin")
    _relocate(path, f"{depth}weights.bin")
    with pytest.raises(ModelError, match="outside the model's"):
        comq_onnx.quantize(path, out, samples_for(cnn()), **EIGHT)


def test_external_data_at_an_absolute_location_is_refused(tmp_path: Path, out: Path) -> None:
    path = save_external(cnn(), tmp_path / "model.onnx")
    _relocate(path, str(tmp_path / "weights.bin"))
    with pytest.raises(ModelError, match="outside the model's"):
        comq_onnx.quantize(path, out, samples_for(cnn()), **EIGHT)


def test_external_data_behind_a_symlink_to_elsewhere_is_refused(tmp_path: Path, out: Path) -> None:
    (tmp_path / "in").mkdir()
    path = save_external(cnn(), tmp_path / "in" / "model.onnx")
    path.with_name("weights.bin").rename(tmp_path / "weights.bin")
    path.with_name("weights.bin").symlink_to(tmp_path / "weights.bin")
    with pytest.raises(ModelError, match="outside the model's"):
        comq_onnx.quantize(path, out, samples_for(cnn()), **EIGHT)


def test_a_model_and_its_data_behind_links_to_one_folder_are_read(tmp_path: Path, out: Path) -> None:
    """As caches of the Hugging Face hub have them: a snapshot of links to the files of a folder."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    path = save_external(cnn(), blobs / "model.onnx")
    path.rename(blobs / "aa")
    path.with_name("weights.bin").rename(blobs / "bb")
    (snapshot / "model.onnx").symlink_to("../blobs/aa")
    (snapshot / "weights.bin").symlink_to("../blobs/bb")
    comq_onnx.quantize(snapshot / "model.onnx", out, samples_for(cnn()), **EIGHT)
    assert worst_sqnr(cnn(), out.resolve(), samples_for(cnn())) >= 25


def _relocate(path: Path, location: str) -> None:
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    path.write_bytes(model.SerializeToString())


def test_missing_external_data_is_named(tmp_path: Path, out: Path) -> None:
    path = save_external(cnn(), tmp_path / "model.onnx")
    path.with_name("weights.bin").unlink()
    with pytest.raises(ModelError, match=r"'weights\.bin'.* is missing"):
        comq_onnx.quantize(path, out, samples_for(cnn()), **EIGHT)


def test_truncated_external_data_is_named(tmp_path: Path, out: Path) -> None:
    path = save_external(cnn(), tmp_path / "model.onnx")
    data = path.with_name("weights.bin")
    data.write_bytes(data.read_bytes()[:-100])
    with pytest.raises(ModelError, match="truncated"):
        comq_onnx.quantize(path, out, samples_for(cnn()), **EIGHT)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"location": "../secret"}, "outside the model's folder"),
        ({"location": "/etc/hostname"}, "outside the model's folder"),
        ({"location": "link"}, "outside the model's folder"),
        ({"location": "zero"}, "outside the model's folder"),
        ({"location": "loop"}, "cannot be read"),
        ({"location": "a\0b"}, "cannot be read"),
        ({"location": "n" * 300}, "cannot be read"),
        ({"location": "."}, "missing"),
        ({"location": "pipe"}, "missing"),
        ({"location": "w.bin", "offset": "1000000"}, "should end at byte"),
        ({"location": "w.bin", "offset": "9223372036854775807"}, "should end at byte"),
        ({"location": "w.bin", "offset": "-64"}, "not an ONNX model|begins at byte -64"),
        ({"location": "w.bin", "length": "1"}, "truncated or not"),
    ],
    ids=lambda given: "-".join(f"{k}-{v[:12]}" for k, v in given.items()) if isinstance(given, dict) else "",
)
@pytest.mark.parametrize("where", ["initializer", "subgraph", "attribute", "function"])
def test_hostile_external_data_is_refused(
    tmp_path: Path, out: Path, entry: dict[str, str], words: str, where: str
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(bytes(10_000))
    (folder / "w.bin").write_bytes(bytes(10_000))
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "zero").symlink_to("/dev/zero")
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    model = _with_a_tensor(where, entry, (16, 10))
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match=words):
        comq_onnx.quantize(folder / "m.onnx", out, {"x": samples_for(mlp())["x"]}, **EIGHT)
    assert not os.listdir(out.parent)


def _with_a_tensor(where: str, entry: dict[str, str], shape: tuple[int, ...]) -> onnx.ModelProto:
    """Build a layer, and a constant in external data: in the graph, a subgraph, an attribute or a function."""
    tensor = onnx.TensorProto(name="t", data_type=1, dims=shape, data_location=onnx.TensorProto.EXTERNAL)
    for key, value in entry.items():
        tensor.external_data.add(key=key, value=value)
    model = build("g (float[batch, 32] x) => (float[batch, 10] y) { y = MatMul (x, w) }", {"w": weight(32, 10)})
    constant = onnx.helper.make_node("Constant", [], ["t"], value=tensor)
    if where == "initializer":
        model.graph.initializer.append(tensor)
    elif where == "attribute":
        model.graph.node.append(constant)
    elif where == "subgraph":
        output = onnx.helper.make_tensor_value_info("t", 1, shape)
        branches = [onnx.helper.make_graph([constant], name, [], [output]) for name in ("then", "else")]
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "c"))
        model.graph.node.append(
            onnx.helper.make_node("If", ["c"], ["t"], then_branch=branches[0], else_branch=branches[1])
        )
    else:
        imports = [onnx.helper.make_opsetid("", 17)]
        model.functions.append(onnx.helper.make_function("local", "f", [], ["t"], [constant], imports))
        model.opset_import.append(onnx.helper.make_opsetid("local", 1))
        model.graph.node.append(onnx.helper.make_node("f", [], ["t"], domain="local"))
    model.graph.output.append(onnx.helper.make_tensor_value_info("t", 1, shape))
    return model


def test_a_size_that_no_file_has_is_refused_before_memory_is_taken(tmp_path: Path, out: Path) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(100))
    model = _with_a_tensor("initializer", {"location": "w.bin"}, (1 << 40, 1 << 20))
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match=f"should end at byte {4 << 60}"):
        comq_onnx.quantize(tmp_path / "m.onnx", out, samples_for(mlp()), **EIGHT)


def test_a_constant_that_says_to_be_larger_than_its_bytes_is_refused(tmp_path: Path, out: Path) -> None:
    model = mlp()
    model.graph.initializer.add(name="t", data_type=1, dims=[1 << 30, 1 << 20], raw_data=bytes(64))
    model.graph.node.append(onnx.helper.make_node("Identity", ["t"], ["z"]))
    model.graph.output.append(onnx.helper.make_tensor_value_info("z", 1, None))
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=r"cannot load .*m\.onnx"):
        comq_onnx.quantize(tmp_path / "m.onnx", out, samples_for(mlp()), **EIGHT)
    assert not os.listdir(out.parent)


def _calling(depth: int, width: int, itself: bool = False) -> onnx.ModelProto:
    """Build a layer behind a function that calls another `width` times, which calls a third, `depth` deep."""
    model = build(
        """g (float[batch, 32] x) => (float[batch, 10] y) {
            h = local.f0 (x)
            y = MatMul (h, w)
        }""",
        {"w": weight(32, 10)},
        domains=("local",),
    )
    imports = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("local", 1)]
    for i in range(depth):
        last = i == depth - 1
        callee, domain = (f"f{i if itself else i + 1}", "local") if itself or not last else ("Tanh", "")
        names = ["a", *(f"t{j}" for j in range(width - 1)), "b"]
        nodes = [onnx.helper.make_node(callee, [names[j]], [names[j + 1]], domain=domain) for j in range(width)]
        model.functions.append(onnx.helper.make_function("local", f"f{i}", ["a"], ["b"], nodes, imports))
    return model


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (_calling(12, 10), "1,000,000,000,001 nodes when its functions are inlined"),
        (_calling(1, 1, itself=True), "'f0' calls itself"),
        (_calling(3000, 1), "call one another too deeply"),
    ],
    ids=["a billion laughs", "recursion", "depth"],
)
def test_functions_that_cannot_be_inlined_are_refused(
    tmp_path: Path, out: Path, model: onnx.ModelProto, words: str
) -> None:
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=words):
        comq_onnx.quantize(tmp_path / "m.onnx", out, samples_for(mlp()), **EIGHT)


def test_functions_that_call_one_another_are_inlined(quantized: Callable[..., Any]) -> None:
    quantized(_calling(3, 2))


@pytest.mark.parametrize("part", ["node", "initializer", "value_info", "attribute", "in a subgraph"])
def test_a_bomb_of_empty_parts_is_refused(
    tmp_path: Path, out: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "MOST_PARTS", 5000)
    model = mlp()
    inner = onnx.GraphProto()
    place = {"attribute": model.graph.node[0].attribute, "in a subgraph": inner.node}.get(part)
    place = getattr(model.graph, part) if place is None else place
    for _ in range(5000):
        place.add()
    if part == "in a subgraph":
        model.graph.node[0].attribute.add(name="body", type=onnx.AttributeProto.GRAPH, g=inner)
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="more than 5,000 nodes, values and attributes"):
        comq_onnx.quantize(tmp_path / "m.onnx", out, samples_for(mlp()), **EIGHT)


def test_nesting_beyond_protobufs_limit_is_refused(tmp_path: Path) -> None:
    def field(number: int, content: bytes) -> bytes:
        length, size = b"", len(content)
        while size > 127:
            length, size = length + bytes([size & 127 | 128]), size >> 7
        return bytes([number << 3 | 2]) + length + bytes([size]) + content

    nested = b""
    for _ in range(1000):
        nested = field(1, field(5, field(6, nested)))  # graph.node.attribute.g
    (tmp_path / "m.onnx").write_bytes(field(7, nested))
    with pytest.raises(ModelError, match=r"m\.onnx: not an ONNX model"):
        load_source(tmp_path / "m.onnx")


def _with_bytes(model: onnx.ModelProto, text: bytes, other: bytes) -> bytes:
    """Return the serialized model with other bytes, as many, in place of a text."""
    whole = model.SerializeToString()
    assert len(text) == len(other)
    # a byte of its length stands before each text
    changed = whole.replace(bytes([len(text)]) + text, bytes([len(text)]) + other)
    assert changed != whole
    return changed


@pytest.mark.parametrize("name", ["x", "y", "w1", "h", "batch", "Relu", "domain"])
def test_a_name_that_is_not_utf_8_is_refused(tmp_path: Path, out: Path, name: str) -> None:
    model = mlp()
    model.graph.node[1].domain = "" if name != "domain" else name
    (tmp_path / "m.onnx").write_bytes(_with_bytes(model, name.encode(), b"\xe9" + name[1:].encode()))
    with pytest.raises(ModelError, match=r"b'\\xe9.*' is not UTF-8"):
        comq_onnx.quantize(tmp_path / "m.onnx", out, samples_for(mlp()), **EIGHT)


@pytest.mark.parametrize("field", ["doc_string", "producer_name", "key", "value", "graph", "node"])
def test_a_text_that_is_not_utf_8_and_refers_to_nothing_is_no_obstacle(tmp_path: Path, out: Path, field: str) -> None:
    model, text = mlp(), "encyclopedie"
    if field in ("key", "value"):
        model.metadata_props.add(**{"key": "k", "value": "v", field: text})
    elif field in ("graph", "node"):
        (model.graph if field == "graph" else model.graph.node[0]).name = text
    else:
        setattr(model, field, text)
    (tmp_path / "m.onnx").write_bytes(_with_bytes(model, text.encode(), "encyclopédie".encode("latin-1")))
    comq_onnx.quantize(tmp_path / "m.onnx", out, samples_for(mlp()), **EIGHT)
    assert worst_sqnr(mlp(), out, samples_for(mlp())) >= 25


def test_what_a_library_found_wrong_is_told(tmp_path: Path) -> None:
    model = mlp()
    model.graph.initializer[0].data_type = 99
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="99"):
        load_source(tmp_path / "m.onnx")


@pytest.mark.parametrize("error", [FileNotFoundError(2, "No such file"), PermissionError(13, "Permission denied")])
def test_a_model_that_vanishes_is_named(source: Path, monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    def vanish(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(reading.onnx, "load", vanish)
    with pytest.raises(ModelError, match=rf"mlp\.onnx: cannot be read \({error.strerror}"):
        load_source(source)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.onnx").touch()
    with pytest.raises(ModelError, match="the file is empty"):
        load_source(tmp_path / "empty.onnx")


def test_a_text_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "readme.onnx").write_text("# A model\n\nIt is not.\n" * 20)
    with pytest.raises(ModelError, match=r"readme\.onnx"):
        load_source(tmp_path / "readme.onnx")


def test_a_picture_is_no_model(tmp_path: Path) -> None:
    Image.new("RGB", (20, 20), "red").save(tmp_path / "cat.png")
    with pytest.raises(ModelError, match=r"cat\.png"):
        load_source(tmp_path / "cat.png")


def test_a_file_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nothing\.onnx: no such file"):
        load_source(tmp_path / "nothing.onnx")


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_model_is_refused(source: Path, out: Path, share: float) -> None:
    whole = source.read_bytes()
    source.write_bytes(whole[: max(1, int(share * len(whole)))])
    with pytest.raises(ModelError, match=r"mlp\.onnx"):
        comq_onnx.quantize(source, out, samples_for(mlp()), **EIGHT)
    assert not os.listdir(out.parent)


# Writing


@pytest.mark.parametrize("where", ["directory", "missing", "same", "symlink", "hardlink"])
def test_an_output_that_cannot_be_is_refused_before_any_work(
    source: Path, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = tmp_path / "link.onnx"
    if where == "symlink":
        link.symlink_to(source)
    if where == "hardlink":
        os.link(source, link)
    path = {"directory": tmp_path, "missing": tmp_path / "no" / "q.onnx", "same": source}.get(where, link)
    monkeypatch.setattr(float_model, "load_source", lambda _: pytest.fail("the model was read"))
    before, bytes_before = _tree(tmp_path), source.read_bytes()
    with pytest.raises(OptionError):
        comq_onnx.quantize(source, path, samples_for(mlp()), **EIGHT)
    assert _tree(tmp_path) == before
    assert source.read_bytes() == bytes_before


def _tree(folder: Path) -> list[str]:
    return sorted(str(p) for p in folder.rglob("*"))


def test_a_directory_reached_by_a_symlink_does_not_hide_that_the_output_is_the_model(
    source: Path, tmp_path: Path
) -> None:
    (tmp_path / "way").symlink_to(source.parent)
    with pytest.raises(OptionError, match="never modified"):
        comq_onnx.quantize(source, tmp_path / "way" / "mlp.onnx", samples_for(mlp()), **EIGHT)


def test_a_directory_that_cannot_be_written_is_refused(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # chmod would not stop root, as which containers run their tests
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(files.tempfile, "TemporaryFile", refuse)
    with pytest.raises(OptionError, match="Permission denied"):
        comq_onnx.quantize(source, out, samples_for(mlp()), **EIGHT)


@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "name too long"])
def test_an_output_that_is_no_file_is_refused(source: Path, out: Path, kind: str) -> None:
    # renamed to, a device would be replaced by the model
    os.mkfifo(out.with_name("pipe"))
    out.with_name("link").symlink_to("pipe")
    path = out.with_name({"pipe": "pipe", "link to a pipe": "link"}.get(kind, "q" * 300))
    with pytest.raises(OptionError, match="not a file" if "pipe" in kind else "name too long"):
        comq_onnx.quantize(source, path, samples_for(mlp()), **EIGHT)
    assert out.with_name("pipe").is_fifo()


def test_an_output_that_is_there_already_is_replaced(source: Path, out: Path) -> None:
    out.write_text("an older result")
    comq_onnx.quantize(source, out, samples_for(mlp()), **EIGHT)
    assert worst_sqnr(source, out, samples_for(mlp())) >= 25


@pytest.mark.parametrize("step", ["save", "replace"])
def test_a_full_disk_leaves_nothing_behind(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((files.ir, "save") if step == "save" else (files.os, "replace")), full)
    with pytest.raises(OptionError, match="No space left on device"):
        comq_onnx.quantize(source, out, samples_for(mlp()), **EIGHT)
    assert not os.listdir(out.parent)


def test_a_full_disk_leaves_an_older_output_as_it_was(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(_model: object, path: Path, **_: object) -> None:
        Path(path).write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    out.write_text("an older result")
    monkeypatch.setattr(files.ir, "save", half)
    with pytest.raises(OptionError):
        comq_onnx.quantize(source, out, samples_for(mlp()), **EIGHT)
    assert out.read_text() == "an older result"
    assert os.listdir(out.parent) == ["q.onnx"]


def test_an_interrupt_leaves_nothing_behind(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.ir, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        comq_onnx.quantize(source, out, samples_for(mlp()), **EIGHT)
    assert not os.listdir(out.parent)


def test_a_model_that_does_not_run_never_gets_the_outputs_name(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def fail(_before: object, after: Any, *_: object) -> None:
        seen.append(after)
        assert out.read_text() == "an older result"
        raise RuntimeFailure("it does not run")

    out.write_text("an older result")
    monkeypatch.setattr(evaluation, "compare_sessions", fail)
    with pytest.raises(RuntimeFailure, match="does not run"):
        comq_onnx.quantize(source, out, samples_for(mlp()), **EIGHT)
    assert seen
    assert out.read_text() == "an older result"
    assert os.listdir(out.parent) == ["q.onnx"]


# What killed runs leave


@pytest.mark.parametrize(
    ("name", "age", "held", "kept"),
    [
        (".comq-held-1", 3600, False, False),
        (".comq-held-1", 3600, True, True),
        (".comq-held-1", 1, False, True),
        (".comq-other", 3600, False, True),
        ("comq-held-1", 3600, False, True),
    ],
    ids=["stale", "in use", "just made", "another's", "another name"],
)
def test_what_a_killed_run_left_is_removed(tmp_path: Path, name: str, age: int, held: bool, kept: bool) -> None:
    left = tmp_path / name
    left.mkdir()
    (left / "q.onnx").write_bytes(b"half")
    os.utime(left, (time.time() - age,) * 2)
    lock = hold(left) if held else None
    with private_directory(tmp_path) as work:
        assert work.stat().st_mode & 0o77 == 0
        assert left.exists() == kept
    assert not work.exists()
    if lock is not None:
        os.close(lock)


def test_what_a_signal_raises_at_any_line_leaves_no_directory(tmp_path: Path) -> None:
    class Stopped(BaseException):
        pass

    lines_left = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal lines_left
        if event == "line" and frame.f_code.co_filename == files.__file__:
            lines_left -= 1
            if lines_left == 0:
                raise Stopped
        return trace

    for line in range(1, 100):
        lines_left = line
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            with private_directory(tmp_path) as work:
                (work / "q.onnx").write_bytes(b"half")
        except Stopped:
            pass
        else:
            break
        finally:
            sys.settrace(before)
        assert not os.listdir(tmp_path), line
    assert 10 < line < 99


def test_a_link_called_like_a_work_directory_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    os.utime(tmp_path / "precious", (0, 0))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / ".comq-held-1").symlink_to(tmp_path / "precious")
    with private_directory(tmp_path / "in"):
        pass
    assert (tmp_path / "precious").is_dir()


def test_two_runs_do_not_remove_each_others_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "STALE_SECONDS", -1.0)
    with private_directory(tmp_path) as first, private_directory(tmp_path) as second:
        assert first.is_dir()
        assert second.is_dir()
    assert not os.listdir(tmp_path)


def test_a_model_that_outgrows_one_message_gets_a_data_file_that_loads(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inline = out.with_name("inline.onnx")
    comq_onnx.quantize(source, inline, samples_for(mlp()), **EIGHT)
    monkeypatch.setattr(files, "INLINE_LIMIT", 100)
    report = comq_onnx.quantize(source, out, samples_for(mlp()), **EIGHT)
    data = out.with_name("q.onnx.data")
    assert sorted(os.listdir(out.parent)) == ["inline.onnx", "q.onnx", "q.onnx.data"]
    assert report.size["after"] == out.stat().st_size + data.stat().st_size
    model = onnx.load(out, load_external_data=False)
    assert any(external_data_helper.uses_external_data(t) for t in model.graph.initializer)
    feeds = samples_for(mlp())
    # the same numbers wherever they are stored
    np.testing.assert_array_equal(infer(out, feeds)["y"], infer(inline, feeds)["y"])


@pytest.mark.parametrize("bits", [8, 4])
def test_the_same_inputs_and_options_give_the_same_bytes(source: Path, out: Path, bits: int) -> None:
    again = out.with_name("again.onnx")
    for path in (out, again):
        comq_onnx.quantize(source, path, samples_for(mlp()), bits=bits, device="cpu")
    assert out.read_bytes() == again.read_bytes()


def test_the_output_says_what_made_it_from_what(source: Path, out: Path) -> None:
    report = comq_onnx.quantize(source, out, samples_for(mlp()), **EIGHT)
    kept = {p.key: p.value for p in onnx.load(out).metadata_props}
    assert kept["comq_onnx.version"] == report.version == comq_onnx.version()
    assert kept["comq_onnx.source_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert "bits=8" in kept["comq_onnx.options"]


def test_the_source_of_a_plan_is_untouched_and_nothing_is_written(source: Path, tmp_path: Path) -> None:
    before, tree = source.read_bytes(), _tree(tmp_path)
    report = comq_onnx.plan(source)
    assert [layer.name for layer in report.layers] == ["fc1", "fc2"]
    assert source.read_bytes() == before
    assert _tree(tmp_path) == tree


# The quirks of the graph libraries


def test_a_new_constant_takes_no_name_that_is_taken() -> None:
    model = ir.from_proto(build("g (float[2] x) => (float[2] y) { y = Add(x, c) }", {"c": np.ones(2, np.float32)}))
    names = [graphs.add_initializer(model.graph, "c", np.zeros(3, np.float32)).name for _ in range(2)]
    assert len({"c", *names}) == 3
    kept = graphs.constant(model.graph.initializers["c"])
    assert kept is not None
    np.testing.assert_array_equal(kept, np.ones(2))


def test_a_scalar_stays_a_scalar() -> None:
    model = ir.from_proto(build("g (float[2] x) => (float[2] y) { y = Relu(x) }"))
    # a scale of rank 1 makes ONNX Runtime run in float, or fail to load
    assert graphs.add_initializer(model.graph, "scale", np.float32(2) * np.ones(())).shape == ir.Shape(())


def clash(first: str, second: str) -> onnx.ModelProto:
    """Build two layers, and between them two values of these names."""
    model = build(
        """clash (float[batch, 32] x) => (float[batch, 10] y) {
            [fc1] h = MatMul (x, w1)
            first = Relu (h)
            second = Neg (first)
            [fc2] y = MatMul (second, w2)
        }""",
        {"w1": weight(32, 16), "w2": weight(16, 10)},
    )
    for node in model.graph.node:
        for values in (node.input, node.output):
            for i, value in enumerate(values):
                values[i] = {"first": first, "second": second}.get(value, value)
    return model


def test_a_name_that_another_value_has_is_not_given_twice(quantized: Callable[..., Any]) -> None:
    written = quantized(clash("a", "b")).model
    # names that emission gives when nobody has them
    made = {output for node in written.graph.node for output in node.output if output.startswith("fc1")}
    constants = {tensor.name for tensor in written.graph.initializer if tensor.name.startswith("fc1")}
    quantized(clash(made.pop(), constants.pop()))
