"""Files that are not what their names say, or say more than they hold: one message that names them, soon, and in little
memory. Fuzzers are seeded."""

from __future__ import annotations

import collections
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import socket
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_files import BYTES, SMALL, gguf_tensors, tiny_model, write_gguf

from llmc.compiler.cli import main
from llmc.compiler.diagnostics import UserError
from llmc.compiler.language.checkpoint import read_config
from llmc.runtime.convert import gguf_file
from llmc.runtime.convert.convert import convert
from llmc.runtime.convert.gguf import read_header as read_gguf
from llmc.runtime.engine.tokenizer import load_tokenizer
from llmc.runtime.weights import read_headers

LFS = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca2\n"
)
HTML = b"\n<!DOCTYPE html>\n<html><head><title>401 Unauthorized</title></head></html>"
JSON = b'{"error": "Entry not found"}'


@contextmanager
def bounded(seconds: int = 20, memory: int = 1 << 30) -> Iterator[None]:
    """What takes longer, or more than this beside what the process has, fails."""

    def stop(number: int, frame: Any) -> None:
        raise AssertionError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    signal.alarm(seconds)
    resource.setrlimit(resource.RLIMIT_DATA, (used + memory, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def message(act: Callable[..., Any], *args: Any, **options: Any) -> str:
    """What the user is told, "" if all is well."""
    try:
        act(*args, **options)
    except UserError as error:
        return str(error)
    return ""


def reading(path: Path) -> str:
    """What is told of weights or a vocabulary of this name, in its directory."""
    if path.name.startswith("model.safetensors"):
        return message(read_headers, path.parent)
    if path.name.startswith("tokenizer"):
        return message(load_tokenizer, path.parent)
    if path.name == "config.json":
        return message(read_config, path.parent)
    source = path if path.suffix == ".gguf" else path.parent
    said = message(convert, source, path.parent / "out", progress=False)
    assert not (path.parent / "out").exists()
    return said


# ---- names that are no files


def pipe(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # an address has at most 107 characters
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)
    os.chdir(here)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def directory(path: Path) -> None:
    path.mkdir()


def broken_link(path: Path) -> None:
    path.symlink_to("../../blobs/4d7a2146")


SPECIAL = {pipe: "pipe", a_socket: "socket", device: "device", directory: "directory", broken_link: "is a link to"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, save_words_model) -> Path:
    folder = tmp_path_factory.mktemp("words")
    save_words_model(folder, 64)
    return folder


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "w"))


@pytest.mark.parametrize("make", SPECIAL, ids=lambda make: make.__name__)
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "chat_template.json",
        "model.safetensors",
        "model.safetensors.index.json",
    ],
)
def test_run_names_what_is_no_file(copy, capsys, name, make):
    if name == "tokenizer.model":
        (copy / "tokenizer.json").unlink()
    (copy / name).unlink(missing_ok=True)
    make(copy / name)
    with bounded():
        assert main(["run", "--model-path", str(copy), "--graph", str(copy / "mine.yaml"), "--input-text", "w1"]) == 1
    said = capsys.readouterr().err
    assert str(copy / name) in said
    assert SPECIAL[make] in said


@pytest.mark.parametrize("make", SPECIAL, ids=lambda make: make.__name__)
def test_a_shard_that_is_no_file_is_named(tmp_path, make):
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    make(tmp_path / "b.safetensors")
    with bounded(), pytest.raises(UserError, match=rf"b\.safetensors .*{SPECIAL[make]}"):
        read_headers(tmp_path)
    index = {"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with bounded(), pytest.raises(UserError, match=rf"b\.safetensors .*{SPECIAL[make]}"):
        read_headers(tmp_path)


@pytest.mark.parametrize("make", SPECIAL, ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json", "config.json", "vocab.txt"])
def test_convert_names_what_is_no_file(tmp_path, name, make):
    if (make, name) == (directory, "vocab.txt"):
        return  # directories are not copied
    source = tmp_path / "w"
    source.mkdir()
    torch.save({"a": torch.ones(2)}, source / "pytorch_model.bin")
    (source / name).unlink(missing_ok=True)
    make(source / name)
    with bounded(), pytest.raises(UserError, match=rf"{name} .*{SPECIAL[make]}"):
        convert(source, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("make", SPECIAL, ids=lambda make: make.__name__)
def test_a_gguf_that_is_no_file_is_named(tmp_path, make):
    make(tmp_path / "m.gguf")
    words = "holds no weights|holds no .bin weights" if make is directory else SPECIAL[make]
    with bounded(), pytest.raises(UserError, match=rf"m\.gguf .*({words})"):
        convert(tmp_path / "m.gguf", tmp_path / "out", progress=False)


@pytest.mark.parametrize("make", [pipe, device, broken_link], ids=lambda make: make.__name__)
def test_an_output_with_traps_is_not_written_through(tmp_path, make):
    source, out = tmp_path / "w", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    torch.save({"a": torch.ones(2)}, source / "pytorch_model.bin")
    for name in ("model.safetensors", "model.safetensors.partial", ".llmc-convert.json.partial", "config.json.partial"):
        make(out / name)
    with bounded():
        convert(source, out, progress=False, force=True)
    assert load_file(out / "model.safetensors")["a"].tolist() == [1, 1]
    assert not (tmp_path.parent / "blobs").exists()


# ---- files of another kind


@pytest.mark.parametrize(
    ("content", "words", "hint"),
    [
        (LFS, "a Git LFS pointer: the content was not downloaded", "git lfs pull"),
        (HTML, "a web page", "download it again"),
        (b"\xef\xbb\xbf" + HTML, "a web page", "download it again"),
        (b"\x1f\x8b\x08\x00", "a gzip archive", "unpack it"),
        (b"", "empty", "download it again"),
    ],
)
@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer.model", "model.safetensors", "pytorch_model.bin", "m.gguf"]
)
def test_what_lies_in_the_place_of_a_file_is_told(copy, name, content, words, hint):
    if name != "tokenizer.json":
        (copy / "tokenizer.json").unlink()
    if name == "model.safetensors" and not content:
        words = "is damaged: safetensors says"
        hint = ""
    if name == "config.json" and content[:1] == b"\x1f":
        words, hint = "UTF-8", ""
    (copy / name).write_bytes(content)
    said = reading(copy / name)
    assert str(copy / name) in said
    assert words in said
    assert hint in said
    assert "weights_only" not in said


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "m.gguf"])
def test_text_in_the_place_of_weights_is_shown(tmp_path, name):
    (tmp_path / name).write_bytes(JSON)
    assert """text, which begins with '{"error": "Entry not found"}'""" in reading(tmp_path / name)


def test_an_original_llama3_vocabulary_of_text_is_not_taken_for_a_page(tmp_path):
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    with pytest.raises(UserError, match=r"tokenizer\.model cannot be read"):
        load_tokenizer(tmp_path)


# ---- indexes


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "nested more than"),
        ("[]", "no weight_map of tensor names to file names"),
        ("{}", "no weight_map of tensor names to file names"),
        ('{"weight_map": []}', "no weight_map of tensor names to file names"),
        ('{"weight_map": {}}', "its weight_map is empty"),
        ('{"weight_map": {"a": 1}}', "names 1, which is not a"),
        ('{"weight_map": {"a": null}}', "names None, which is not a"),
        ('{"weight_map": {"a": ["x"]}}', "which is not a"),
        ('{"weight_map": {"a": ""}}', "names '', which is not a"),
        ('{"weight_map": {"a": ".."}}', "which is not a"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "which is not a"),
        ('{"weight_map": {"a": "../../w.bin", "b": "../../w.safetensors"}}', "which is not a"),
        ('{"weight_map": {"a": "w\\u0000.bin"}}', "which is not a"),
        ('{"weight_map": {"a": "notes.txt"}}', "which is not a"),
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_an_index_that_is_none_is_refused_in_our_words(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    said = reading(tmp_path / name)
    assert words in said
    assert str(tmp_path / name) in said


# ---- .bin


def saved(folder: Path, content: Any, **options: Any) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(content, folder / "pytorch_model.bin", **options)
    return folder


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.zeros(1).expand(1 << 30), "repeats its values"),
        (torch.zeros(1, 1024).expand(1 << 20, 1024), "repeats its values"),
        (torch.zeros(4096).as_strided((2048, 2048), (1, 1)), "repeats its values"),
        (torch.empty(1 << 40, 4, device="meta"), "not a plain tensor, but Tensor on meta"),
        (torch.zeros(2, 2).to_sparse(), "safetensors cannot hold"),
    ],
)
def test_tensors_that_are_not_what_is_stored_are_refused_by_name(tmp_path, tensor, words, zipped):
    source = saved(tmp_path / "w", {"good": torch.ones(3), "bad": tensor}, _use_new_zipfile_serialization=zipped)
    with bounded(), pytest.raises(UserError, match=rf"pytorch_model\.bin.*({words})"):
        convert(source, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_many_names_for_one_storage_are_refused(tmp_path):
    value = torch.zeros(1 << 16)
    source = saved(tmp_path / "w", {f"t{i}": value for i in range(1000)})
    with pytest.raises(UserError, match="1000 tensors have 262144000 bytes, more than 4 times the file"):
        convert(source, tmp_path / "out", progress=False)


def test_a_sign_that_is_to_be_turned_is_turned(tmp_path):
    tensor = torch.imag(torch.tensor([1 + 2j, 3 - 4j]).conj())  # has the negative bit
    assert tensor.is_neg()
    kept = tensor.clone()
    content = io.BytesIO()
    torch.save({"a": torch._neg_view(torch.tensor([2.0, -4.0]))}, content)
    (tmp_path / "pytorch_model.bin").write_bytes(content.getvalue())
    convert(tmp_path, None, progress=False)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], kept.resolve_neg())


@pytest.mark.parametrize("name", ["__metadata__", "\ud800"])
def test_names_that_safetensors_cannot_say_are_refused(tmp_path, name):
    source = saved(tmp_path / "w", {name: torch.ones(1)})
    with pytest.raises(UserError, match="cannot be the name of a tensor in a safetensors file"):
        convert(source, tmp_path / "out", progress=False)


def repacked(path: Path, compression: int) -> None:
    with zipfile.ZipFile(path) as old:
        records = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", compression) as new:
        for name, data in records.items():
            new.writestr(name, data)


def test_archives_that_are_no_checkpoints_are_told_apart(tmp_path):
    source = saved(tmp_path / "w", {"a": torch.zeros(1 << 20)})
    path = source / "pytorch_model.bin"
    repacked(path, zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="is compressed, as PyTorch never does"):
        convert(source, None, progress=False)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "<w/>")
    with pytest.raises(UserError, match=r"is a zip archive, but not one of PyTorch: it holds document\.xml"):
        convert(source, None, progress=False)
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    with pytest.raises(UserError, match="is a TorchScript archive") as error:
        convert(source, None, progress=False)
    assert "weights_only" not in str(error.value)


class Asks:
    """Pickled as a call."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    "value",
    [
        Asks(bytearray, 1 << 62),
        Asks(bytearray, 1 << 40),
        Asks(torch.Tensor, 1 << 50),
        Asks(torch.Size, [1 << 70]),
        Asks(collections.Counter, 5),
        Asks(torch._utils._rebuild_tensor_v2, 1, 2, 3, 4, 5, 6),
        Asks(torch._utils._rebuild_parameter, 1, 2, 3),
        Asks(torch._utils._rebuild_device_tensor_from_numpy, 1, torch.float32, "cpu", False),
        Asks(torch._utils._rebuild_meta_tensor_no_storage, torch.float32, (1 << 40,), (0,), False),
        Asks(eval, "1"),
        {"nested": {"a": torch.ones(1)}},
        torch.nn.Linear(1, 1),
        [1, 2],
        3,
        {1: torch.ones(1)},
        {},
        None,
    ],
)
def test_whatever_a_pickle_asks_for_is_one_message(tmp_path, value):
    source = saved(tmp_path / "w", value if isinstance(value, dict) else {"a": value})
    with bounded(), pytest.raises(UserError) as error:
        convert(source, tmp_path / "out", progress=False)
    said = str(error.value)
    assert "pytorch_model.bin" in said
    assert "weights_only" not in said
    assert len(said) < 600
    assert not (tmp_path / "out").exists()


def test_random_damage_to_a_bin_is_a_message_or_changes_values_only(tmp_path):
    pick = random.Random(2)
    source = tmp_path / "w"
    wholes = []
    for zipped in (True, False):
        saved(source, {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}, _use_new_zipfile_serialization=zipped)
        wholes.append((source / "pytorch_model.bin").read_bytes())
    refused = 0
    with bounded(60):
        for i in range(160):
            data = damaged(pick, wholes[i % 2])
            (source / "pytorch_model.bin").write_bytes(data)
            said = message(convert, source, tmp_path / "out", progress=False, force=True)
            refused += said != ""
            assert not said or "pytorch_model.bin" in said
            assert "weights_only" not in said
    assert refused > 60


def damaged(pick: random.Random, data: bytes, head: int = 1 << 20) -> bytes:
    """A few bytes changed, or some cut out or doubled, within the first `head`."""
    mutable = bytearray(data)
    for _ in range(pick.randint(1, 4)):
        at = pick.randrange(min(head, len(mutable)))
        match pick.randrange(4):
            case 0:
                mutable[at] = pick.choice((0, 1, 127, 128, 255, pick.randrange(256)))
            case 1:
                mutable[at : at + 8] = struct.pack("<Q", pick.choice((0, 1, 1 << 31, 1 << 62, (1 << 64) - 1)))
            case 2:
                del mutable[at : at + pick.randint(1, 16)]
            case 3:
                mutable[at:at] = mutable[at : at + pick.randint(1, 16)]
    return bytes(mutable) or b"x"


# ---- safetensors


def test_random_damage_to_a_safetensors_header_is_a_message(tmp_path):
    pick = random.Random(3)
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}, file)
    whole, refused = file.read_bytes(), 0
    with bounded():
        for _ in range(400):
            file.write_bytes(damaged(pick, whole, 170))
            said = reading(file)
            refused += said != ""
            assert not said or str(file) in said
    assert refused > 200


@pytest.mark.parametrize(
    "header",
    [
        '{"__metadata__": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        '{"__metadata__": 1}',
        '{"a": {"dtype": "F32", "shape": [4611686018427387904, 4], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
        '{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}, '
        '"b": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}',
        "[" * 5000 + "]" * 5000,
        "null",
        "",
    ],
)
def test_a_safetensors_header_that_lies_is_damaged(tmp_path, header):
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode() + b"\0" * 4)
    with bounded(), pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        read_headers(tmp_path)


# ---- GGUF


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def header(keys: bytes = b"", tensors: bytes = b"", *, n_keys: int = 1, n_tensors: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys) + keys + tensors


def tensor(name: bytes = b"t", sizes: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0, axes: int = -1) -> bytes:
    sized = struct.pack(f"<I{len(sizes)}Q", len(sizes) if axes < 0 else axes, *sizes)
    return text(name) + sized + struct.pack("<IQ", kind, offset)


HUGE = 1 << 62
LIES = {
    "numbers": header(text(b"a") + struct.pack("<IIQ", 9, 4, HUGE)),
    "bytes": header(text(b"a") + struct.pack("<IIQ", 9, 0, HUGE)),
    "texts": header(text(b"a") + struct.pack("<IIQ", 9, 8, HUGE)),
    "arrays": header(text(b"a") + struct.pack("<IIQ", 9, 9, HUGE)),
    "arrays of arrays": header(text(b"a") + struct.pack("<IIQIQ", 9, 9, 1, 4, HUGE)),
    "deep": header(text(b"a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000),
    "empty arrays": header(text(b"a") + struct.pack("<IIQ", 9, 9, 1000) + struct.pack("<IQ", 9, 1000) * 1000),
    "a text": header(text(b"a") + struct.pack("<IQ", 8, HUGE)),
    "all ones": header(text(b"a") + struct.pack("<IQ", 8, (1 << 64) - 1)),
    "a name": header(struct.pack("<Q", HUGE)),
    "keys": header(n_keys=HUGE),
    "tensors": header(n_keys=0, n_tensors=HUGE),
    "both": header(n_keys=HUGE, n_tensors=HUGE),
    "axes": header(b"", tensor(axes=1 << 31), n_keys=0, n_tensors=1),
    "five axes": header(b"", tensor(sizes=(1,) * 5), n_keys=0, n_tensors=1),
    "sizes": header(b"", tensor(sizes=(HUGE, 4)), n_keys=0, n_tensors=1),
    "sizes that wrap": header(b"", tensor(sizes=(1 << 32, 1 << 32)), n_keys=0, n_tensors=1),
    "no size": header(b"", tensor(sizes=(0, HUGE, HUGE)), n_keys=0, n_tensors=1),
    "offset": header(b"", tensor(offset=HUGE), n_keys=0, n_tensors=1),
    "offset that wraps": header(b"", tensor(offset=(1 << 64) - 8), n_keys=0, n_tensors=1),
    "kind": header(b"", tensor(kind=99), n_keys=0, n_tensors=1),
    "half a block": header(b"", tensor(sizes=(33,), kind=2), n_keys=0, n_tensors=1),
    "one over another": header(b"", tensor(b"a") + tensor(b"b"), n_keys=0, n_tensors=2),
    "twice": header(b"", tensor() + tensor(), n_keys=0, n_tensors=2),
    "key twice": header((text(b"a") + struct.pack("<IB", 0, 1)) * 2, n_keys=2),
    "type": header(text(b"a") + struct.pack("<IQ", 77, 1)),
    "alignment": header(text(b"general.alignment") + struct.pack("<II", 4, 3)),
    "alignment 0": header(text(b"general.alignment") + struct.pack("<II", 4, 0)),
    "alignment huge": header(text(b"general.alignment") + struct.pack("<IQ", 10, 1 << 63), tensor(), n_tensors=1),
    "not UTF-8": header(text(b"\xff") + struct.pack("<IB", 0, 1)),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "version": header(version=1),
}


@pytest.mark.parametrize("data", LIES.values(), ids=LIES)
def test_a_gguf_that_announces_what_it_does_not_hold_is_refused_at_once(tmp_path, data):
    path = tmp_path / "m.gguf"
    path.write_bytes(data + b"\0" * 16)
    with bounded(5, 1 << 28), pytest.raises(UserError, match=r"m\.gguf is damaged, cut off .*\n  likely: download it"):
        convert(path, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [0, 4, 8], ids=["bytes", "numbers", "texts"])
def test_a_sparse_gguf_of_a_terabyte_is_refused_at_once(tmp_path, kind):
    path = tmp_path / "m.gguf"
    path.write_bytes(header(text(b"a") + struct.pack("<IIQ", 9, kind, 1 << 34)))
    os.truncate(path, 1 << 40)
    with bounded(5, 1 << 28), pytest.raises(UserError, match=r"m\.gguf is damaged"):
        convert(path, tmp_path / "out", progress=False)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    return write_gguf(path, SMALL, gguf_tensors(tiny_model(SMALL)), meta=BYTES)


def test_our_reader_gives_what_that_of_the_gguf_package_gives(tmp_path, small):
    mixed = {
        "x.weight": numpy.arange(64, dtype=numpy.float32).reshape(1, 2, 32),
        "i": numpy.arange(3, dtype=numpy.int8),
    }
    blocks = gguf.quants.quantize(numpy.ones((4, 64), numpy.float32), gguf.GGMLQuantizationType.Q8_0)
    meta = {"a.s": "é", "a.f": 1.5, "a.b": True, "a.i": 7, "a.l": [1, 2], "a.t": ["x", ""], "a.e": [0.5]}
    other = write_gguf(tmp_path / "o.gguf", SMALL, {**mixed, "q": (blocks, gguf.GGMLQuantizationType.Q8_0)}, meta=meta)
    for path in (small, other):
        theirs = gguf.GGUFReader(path)
        fields = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
        ours, tensors = gguf_file.read(path)
        assert ours == fields
        assert list(tensors) == [t.name for t in theirs.tensors]
        for t in theirs.tensors:
            found = tensors[t.name]
            assert (found.shape, found.tensor_type) == (tuple(t.shape.tolist()), t.tensor_type)
            assert found.data.dtype == t.data.dtype
            assert numpy.array_equal(found.data, t.data)


def test_random_damage_to_a_gguf_header_is_a_message(tmp_path, small):
    pick = random.Random(4)
    whole, refused = small.read_bytes(), 0
    keys = whole.index(b"token_embd")
    path = tmp_path / "m.gguf"
    with bounded(60):
        for i in range(150):
            path.write_bytes(damaged(pick, whole, keys + 600 if i % 2 else 900))
            said = message(read_gguf, path)
            refused += said != ""
            assert not said or str(path) in said
    assert refused > 80


@pytest.mark.parametrize(
    ("meta", "words"),
    [
        ({"tokenizer.ggml.tokens": "abc"}, "tokens is abc; expected a list of texts"),
        ({"tokenizer.ggml.tokens": 7}, "tokens is 7; expected a list of texts"),
        ({"tokenizer.ggml.tokens": [1, 2]}, r"tokens is \[1, 2\]; expected a list of texts"),
        ({"tokenizer.ggml.tokens": ["a" * 300_000] * 4}, "a token has 300000 characters"),
        ({"tokenizer.chat_template": 7}, "chat_template is 7; expected text"),
        ({"llama.attention.key_length": 7}, "heads have 7 values|rope.dimension_count is 8"),
        ({"llama.attention.head_count": [[1], [2]]}, "differs between layers"),
        ({"llama.rope.freq_base": float("nan")}, "expected a positive float"),
        ({"llama.rope.freq_base": float("inf")}, "expected a positive float"),
        ({"llama.embedding_length": 1 << 31}, "does not hold the tensors of its header|rope.dimension"),
        ({"tokenizer.ggml.merges": [1]}, "cannot convert the tokenizer"),
        ({"general.architecture": 7}, "architecture"),
    ],
)
def test_metadata_of_a_wrong_kind_is_one_message(tmp_path, meta, words):
    meta = {**BYTES, **meta}
    architecture = meta.pop("general.architecture", "llama")
    source = write_gguf(
        tmp_path / "m.gguf", SMALL, gguf_tensors(tiny_model(SMALL)), meta=meta, architecture=str(architecture)
    )
    with bounded(), pytest.raises(UserError, match=words):
        convert(source, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [numpy.nan, numpy.inf, 0.0, -1.0])
def test_a_table_of_rope_that_is_no_table_is_refused(tmp_path, value):
    table = numpy.full(4, value, numpy.float32)
    tensors = {**gguf_tensors(tiny_model(SMALL)), "rope_freqs.weight": table}
    with pytest.raises(UserError, match="rope_freqs must hold 4 positive numbers"):
        convert(write_gguf(tmp_path / "m.gguf", SMALL, tensors), tmp_path / "out", progress=False)
    sizes = {**SMALL, "head_dim": 1 << 31}  # a loop over its pairs would not end
    with bounded(), pytest.raises(UserError, match="rope_freqs must hold 1073741824 positive numbers"):
        convert(write_gguf(tmp_path / "n.gguf", sizes, tensors), tmp_path / "out", progress=False)


# ---- JSON and tokenizers


@pytest.mark.parametrize(
    "data", [b"[" * 200_000, b'{"a":' * 200_000, b"\xff\xfe{\0", b'{"a": 1' + b"0" * 5000 + b"}", b"nul"]
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"])
def test_json_that_is_none_is_one_message(copy, capsys, name, data):
    (copy / name).write_bytes(data)
    assert main(["run", "--model-path", str(copy), "--input-text", "w1"]) == 1
    said = capsys.readouterr().err
    assert str(copy / name) in said
    assert "Traceback" not in said


def test_a_configuration_of_gigabytes_is_not_read(copy, capsys):
    for name in ("generation_config.json", "config.json"):
        os.truncate(copy / name, 1 << 36)
        with bounded(10, 1 << 28):
            assert main(["run", "--model-path", str(copy), "--input-text", "w1"]) == 1
        assert "larger than 64 MiB" in capsys.readouterr().err


def test_random_damage_to_a_tokenizer_is_a_message_also_when_it_encodes(copy):
    pick = random.Random(5)
    whole, refused = (copy / "tokenizer.json").read_bytes(), 0
    with bounded(60):
        for _ in range(200):
            (copy / "tokenizer.json").write_bytes(damaged(pick, whole))
            said = message(lambda: (t := load_tokenizer(copy)).decode(t.encode("w1 w2 unknown")))
            refused += said != ""
            assert not said or str(copy) in said
    assert refused > 100


@pytest.mark.parametrize(("stage", "steps"), [("normalizer", "normalizers"), ("decoder", "decoders")])
def test_a_tokenizer_whose_replacements_would_fill_the_memory_is_refused(copy, stage, steps):
    vocabulary = json.loads((copy / "tokenizer.json").read_text())
    replace = {"type": "Replace", "pattern": {"String": "w"}, "content": "w" * 100}
    vocabulary[stage] = {"type": "Sequence", steps: [replace, {"type": "Sequence", steps: [replace] * 9}]}
    (copy / "tokenizer.json").write_text(json.dumps(vocabulary))
    with bounded(), pytest.raises(UserError, match=r"tokenizer\.json: its replacements make a character 10{20} long"):
        load_tokenizer(copy).encode("w1")


def test_a_word_that_a_vocabulary_cannot_say_is_one_message(copy):
    vocabulary = json.loads((copy / "tokenizer.json").read_text())
    vocabulary["model"]["unk_token"] = "nothing"
    (copy / "tokenizer.json").write_text(json.dumps(vocabulary))
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        load_tokenizer(copy).encode("unheard")


def test_pickled_vocabularies_are_not_opened(tmp_path):
    (tmp_path / "vocab.pkl").write_bytes(pickle.dumps({}))
    with pytest.raises(UserError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        load_tokenizer(tmp_path)
