"""Loading weights: packing against plain slicing, and every way in which a checkpoint can be wrong. Needs torch."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from llmc.compiler.diagnostics import UserError
from llmc.runtime import weights as module
from llmc.runtime.weights import load_weights, read_headers
from safetensors.torch import save_file


def source(tensor: str, *shape: int, rows: tuple[int, int, int, int] | None = None) -> dict:
    names = ("groups", "stride", "offset", "size")
    return {"tensor": tensor, "shape": list(shape), "rows": dict(zip(names, rows, strict=True)) if rows else None}


def weight(*sources: dict, shape: list[int], dtype: str = "float32", axis: int = 0, transpose: bool = False) -> dict:
    rest = {"dtype": dtype, "axis": axis, "transpose": transpose, "format": "nd", "shard": "R"}
    return {"sources": list(sources), "shape": shape, **rest}


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return {"q": random(8, 4), "k": random(2, 4), "packed": random(12, 4), "norm": random(4), "embed": random(10, 4)}


def saved(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, path / "model.safetensors")
    return path


def load(manifest: dict, path: Path) -> dict[str, torch.Tensor]:
    return load_weights(manifest, path, progress=False)


def test_separate_tensors_are_packed_in_order(tmp_path, tensors):
    manifest = {"qk": weight(source("q", 8, 4), source("k", 2, 4), shape=[10, 4])}
    assert torch.equal(load(manifest, saved(tmp_path, tensors))["qk"], torch.cat([tensors["q"], tensors["k"]]))


def test_packing_along_the_second_axis(tmp_path, tensors):
    manifest = {"wide": weight(source("q", 8, 4), source("q", 8, 4), shape=[8, 8], axis=1)}
    assert torch.equal(load(manifest, saved(tmp_path, tensors))["wide"], torch.cat([tensors["q"]] * 2, dim=1))


def test_interleaved_groups_are_picked_row_by_row(tmp_path, tensors):
    """InternLM2's wqkv: per kv group two q rows, one k, one v."""
    manifest = {
        "q": weight(source("packed", 12, 4, rows=(3, 4, 0, 2)), shape=[6, 4]),
        "k": weight(source("packed", 12, 4, rows=(3, 4, 2, 1)), shape=[3, 4]),
    }
    loaded = load(manifest, saved(tmp_path, tensors))
    groups = tensors["packed"].view(3, 4, 4)
    assert torch.equal(loaded["q"], groups[:, :2].reshape(6, 4))
    assert torch.equal(loaded["k"], groups[:, 2])


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("wanted", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("chunk", [16, 64, 1 << 20])
def test_values_are_cast_once_whatever_the_pieces(tmp_path, monkeypatch, stored, wanted, chunk):
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk)
    original = random(7, 5, dtype=stored)
    manifest = {"w": weight(source("w", 7, 5), shape=[7, 5], dtype=wanted)}
    assert torch.equal(load(manifest, saved(tmp_path, {"w": original}))["w"], original.to(getattr(torch, wanted)))


def test_transposed_and_one_dimensional_weights(tmp_path, tensors):
    manifest = {
        "t": weight(source("q", 8, 4), source("k", 2, 4), shape=[4, 10], transpose=True),
        "bias": weight(source("norm", 4), source("norm", 4), shape=[8]),
    }
    loaded = load(manifest, saved(tmp_path, tensors))
    assert torch.equal(loaded["t"], torch.cat([tensors["q"], tensors["k"]]).t())
    assert torch.equal(loaded["bias"], tensors["norm"].repeat(2))


def test_tied_embeddings_share_storage(tmp_path, tensors):
    one = weight(source("embed", 10, 4), shape=[10, 4])
    loaded = load(
        {"embed": one, "head": dict(one), "other": weight(source("q", 8, 4), shape=[8, 4])}, saved(tmp_path, tensors)
    )
    assert loaded["embed"].data_ptr() == loaded["head"].data_ptr() != loaded["other"].data_ptr()


def test_sharded_checkpoint_with_an_index_ignores_files_beside_it(tmp_path, tensors):
    save_file({"q": tensors["q"]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"k": tensors["k"]}, tmp_path / "model-00002-of-00002.safetensors")
    save_file({"q": tensors["q"]}, tmp_path / "consolidated.safetensors")
    index = {"q": "model-00001-of-00002.safetensors", "k": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    manifest = {"qk": weight(source("q", 8, 4), source("k", 2, 4), shape=[10, 4])}
    assert torch.equal(load(manifest, tmp_path)["qk"], torch.cat([tensors["q"], tensors["k"]]))


def test_all_problems_come_in_one_table_with_nearest_names(tmp_path, tensors):
    tensors |= {"ids": torch.zeros(3, dtype=torch.int32), "model.layers.0.w": random(2)}
    manifest = {
        "a": weight(source("q", 9, 4), shape=[9, 4]),
        "b": weight(source("ids", 3), shape=[3]),
        "c": weight(source("layers.0.w", 2), shape=[2]),
        "d": weight(source("packd", 12, 4), shape=[12, 4]),
    }
    with pytest.raises(UserError) as error:
        load(manifest, saved(tmp_path, tensors))
    lines = str(error.value).splitlines()
    assert "4 of the 4 tensors" in lines[0]
    cells = [line.split() for line in lines]
    assert ["q", "shape", "[9,", "4]", "[8,", "4]", "in", "model.safetensors"] in cells
    assert ["ids", "dtype", "float32", "I32", "in", "model.safetensors"] in cells
    assert ["layers.0.w", "missing", "float32", "[2]", "nearest:", "model.layers.0.w"] in cells
    assert ["packd", "missing", "float32", "[12,", "4]", "nearest:", "packed"] in cells


def test_extra_tensors_only_warn_and_rotary_buffers_do_not(tmp_path, tensors, caplog):
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = random(2)
    with caplog.at_level(logging.WARNING, logger="llmc.weights"):
        load({"q": weight(source("q", 8, 4), shape=[8, 4])}, saved(tmp_path, tensors))
    assert "4 tensors" in caplog.text
    assert "packed" in caplog.text
    assert "inv_freq" not in caplog.text


def test_a_tensor_in_two_files_is_refused(tmp_path, tensors):
    for name in ("a", "b"):
        save_file({"q": tensors["q"]}, tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match=r"(?s)two files.*q: a.safetensors and b.safetensors"):
        read_headers(tmp_path)


def cut(data: bytes) -> bytes:
    return data[:-10]


def huge_header(data: bytes) -> bytes:
    return (1 << 60).to_bytes(8, "little") + data[8:]


def not_json(data: bytes) -> bytes:
    return data[:8] + b"x" + data[9:]


def wrong_shape(data: bytes) -> bytes:
    return data.replace(b"[8,4]", b"[8,5]")


def pointer(data: bytes) -> bytes:
    return b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut, "safetensors says .* bytes"),
        (huge_header, "safetensors says .* bytes"),
        (not_json, "safetensors says .* bytes"),
        (wrong_shape, "safetensors says .* bytes"),
        (pointer, "Git LFS pointer"),
        (lambda data: b"", "safetensors says .* bytes"),
        (lambda data: (2).to_bytes(8, "little") + b"[]", "safetensors says .* bytes"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, tensors, damage, words):
    file = saved(tmp_path, {"q": tensors["q"]}) / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=rf"model.safetensors is damaged: .*{words}"):
        read_headers(tmp_path)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"pytorch_model.bin": b""}, "llmc convert --model-path"),
        ({"model.gguf": b""}, "llmc convert"),
        ({"config.json": b"{}"}, "holds no weights"),
        ({"model.safetensors.index.json": b'{"weight_map": {"q": "gone.safetensors"}}'}, "1 of them are missing: gone"),
        ({"model.safetensors.index.json": b"[]"}, "cannot be read"),
    ],
)
def test_a_directory_without_usable_weights_says_what_to_do(tmp_path, files, words):
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=words):
        read_headers(tmp_path)


def test_a_path_that_is_no_directory():
    with pytest.raises(UserError, match="nowhere does not exist"):
        read_headers(Path("nowhere"))


PEAK = """
import json, re, sys, torch
from llmc.runtime.weights import load_weights
def peak():  # of this program; getrusage also counts the parent's before exec
    return int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) * 1024
manifest = json.load(open(sys.argv[1] + "/manifest.json"))
before = peak()
weights = load_weights(manifest, sys.argv[1], progress=False)
print(peak() - before)
"""


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_peak_memory_is_the_checkpoint_and_a_buffer(tmp_path, dtype):
    """Budget: 1.1 times the checkpoint and 300 MB."""
    rows = 20000
    save_file({f"w{i}": torch.ones(rows, 1000, dtype=torch.float16) for i in range(6)}, tmp_path / "model.safetensors")
    sources = [source(f"w{i}", rows, 1000) for i in range(6)]
    manifest = {
        "ab": weight(*sources[:2], shape=[2 * rows, 1000], dtype=dtype),
        "cd": weight(*sources[2:4], shape=[2 * rows, 1000], dtype=dtype),
        "e": weight(sources[4], shape=[rows, 1000], dtype=dtype),
        "f": weight(sources[5], shape=[rows, 1000], dtype=dtype),
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    out = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, check=True)
    checkpoint = 6 * rows * 1000 * 2
    assert checkpoint * 0.9 < int(out.stdout) < checkpoint * 1.05 + 80e6
