"""Loading weights: packing and shares against plain slicing, every way to be wrong, peak memory. Needs torch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmc.compiler import cli
from llmc.compiler.diagnostics import UserError
from llmc.compiler.language.build import load_model
from llmc.compiler.sharding import Split, deal, deal_heads
from llmc.runtime import weights as module
from llmc.runtime.weights import load_weights, read_headers


def source(tensor: str, *shape: int, rows: tuple[int, int, int, int] | None = None) -> dict:
    names = ("groups", "stride", "offset", "size")
    return {"tensor": tensor, "shape": list(shape), "rows": dict(zip(names, rows, strict=True)) if rows else None}


def weight(*sources: dict, shape: list[int], shard: str = "R", splits: tuple[str, ...] = (), **rest: Any) -> dict:
    entry = {"dtype": "float32", "axis": 0, "transpose": False, "format": "nd", "tp": "replicate", **rest}
    return {"sources": list(sources), "shape": shape, "shard": shard, "splits": list(splits), **entry}


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return {"q": random(8, 4), "k": random(2, 4), "packed": random(12, 4), "norm": random(4), "embed": random(10, 4)}


def saved(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, path / "model.safetensors")
    return path


def load(
    manifest: dict,
    path: Path,
    splits: dict[str, dict] | None = None,
    rank: int = 0,
    unused: tuple[str, ...] = ("*",),
) -> dict[str, torch.Tensor]:
    """Most manifests here are of some tensors of a file."""
    return load_weights(manifest, path, splits=splits, unused=unused, rank=rank, progress=False)


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


# ---- shares of ranks


def listed(**splits: Split) -> dict[str, dict]:
    """As the manifest says them."""
    return {
        name: {"size": split.size, "local": split.local, "ranks": [list(run) for run in split.runs]}
        for name, split in splits.items()
    }


def share(whole: torch.Tensor, split: Split, rank: int, dim: int = 0) -> torch.Tensor:
    """What the rank should have: its run, then zeros."""
    start, count = split.runs[rank]
    padding = list(whole.shape)
    padding[dim] = split.local - count
    return torch.cat([whole.narrow(dim, start, count), whole.new_zeros(padding)], dim)


# heads, kv heads, ranks
HEADS = {
    "each rank the same": (8, 8, 4),
    "LLaMA-33B: the last rank has fewer": (52, 52, 8),
    "grouped, fewer kv heads than ranks": (28, 4, 8),
    "one kv head for all": (8, 1, 4),
    "ranks with nothing": (3, 3, 8),
}


@pytest.mark.parametrize("chunk", [1, 100, 1 << 20])
@pytest.mark.parametrize(("heads", "kv_heads", "ranks"), HEADS.values(), ids=HEADS)
def test_ranks_share_packed_heads_and_the_columns_that_read_them(tmp_path, monkeypatch, heads, kv_heads, ranks, chunk):
    """Of q and k, packed, the rows of the rank's heads; of the projection behind them the columns."""
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk)
    q, kv = deal_heads(heads, kv_heads, 2, ranks)
    stored = {"q": random(q.size, 5), "k": random(kv.size, 5), "q_bias": random(q.size), "o": random(6, q.size)}
    manifest = {
        "qk": weight(
            source("q", q.size, 5), source("k", kv.size, 5),
            shape=[q.local + kv.local, 5], shard="S(0)", splits=("q", "kv"),
        ),
        "bias": weight(source("q_bias", q.size), shape=[q.local], shard="S(0)", splits=("q",)),
        "o": weight(source("o", 6, q.size), shape=[6, q.local], shard="S(1)", splits=("q",)),
    }  # fmt: skip
    saved(tmp_path, stored)
    for rank in range(ranks):
        loaded = load(manifest, tmp_path, listed(q=q, kv=kv), rank)
        assert torch.equal(loaded["qk"], torch.cat([share(stored["q"], q, rank), share(stored["k"], kv, rank)]))
        assert torch.equal(loaded["bias"], share(stored["q_bias"], q, rank))
        assert torch.equal(loaded["o"], share(stored["o"], q, rank, dim=1))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_interleaved_heads_are_dealt_in_the_order_of_the_heads(tmp_path, monkeypatch, ranks, chunk):
    """InternLM2's wqkv with 4 kv heads of 2: a group is 3 q heads, one k, one v."""
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk)
    q, kv = deal_heads(12, 4, 2, ranks)
    wqkv = random(4 * 5 * 2, 3)
    rows = [(4, 10, 0, 6), (4, 10, 6, 2), (4, 10, 8, 2)]
    manifest = {
        "qkv": weight(
            *(source("wqkv", 40, 3, rows=r) for r in rows),
            shape=[q.local + 2 * kv.local, 3], shard="S(0)", splits=("q", "kv", "kv"),
        )
    }  # fmt: skip
    groups = wqkv.view(4, 5, 2, 3)
    parts = [(groups[:, :3], q), (groups[:, 3], kv), (groups[:, 4], kv)]
    saved(tmp_path, {"wqkv": wqkv})
    for rank in range(ranks):
        expected = torch.cat([share(part.reshape(-1, 3), split, rank) for part, split in parts])
        assert torch.equal(load(manifest, tmp_path, listed(q=q, kv=kv), rank)["qkv"], expected)


@pytest.mark.parametrize(("size", "ranks"), [(16, 4), (13, 4), (5, 8), (7, 1)])
@pytest.mark.parametrize("dim", [0, 1])
def test_the_shares_of_all_ranks_are_the_checkpoint(tmp_path, size, ranks, dim):
    split = deal(size, ranks)
    shapes = {0: (size, 6), 1: (6, size)}
    whole = random(*shapes[dim])
    local = [split.local if axis == dim else n for axis, n in enumerate(whole.shape)]
    manifest = {"w": weight(source("w", *whole.shape), shape=local, shard=f"S({dim})", splits=("split",))}
    saved(tmp_path, {"w": whole})
    shares = [load(manifest, tmp_path, listed(split=split), rank)["w"] for rank in range(ranks)]
    assert all(s.shape == torch.Size(local) for s in shares)
    joined = torch.cat(shares, dim)
    assert torch.equal(joined.narrow(dim, 0, size), whole)
    assert joined.narrow(dim, size, joined.shape[dim] - size).count_nonzero() == 0


def test_columns_of_packed_sources_are_split_alike(tmp_path, tensors):
    split = deal(4, 3)
    sources = (source("q", 8, 4), source("k", 2, 4))
    manifest = {"qk": weight(*sources, shape=[10, 2], shard="S(1)", splits=("columns",))}
    saved(tmp_path, tensors)
    for rank in range(3):
        expected = share(torch.cat([tensors["q"], tensors["k"]]), split, rank, dim=1)
        assert torch.equal(load(manifest, tmp_path, listed(columns=split), rank)["qk"], expected)


@pytest.mark.parametrize("shard", ["S(0)", "S(1)"])
def test_a_transposed_weight_is_split_on_the_checkpoints_axis(tmp_path, tensors, shard):
    dim = int(shard[2])
    split = deal(tensors["q"].shape[dim], 3)
    shape = list(share(tensors["q"], split, 0, dim).t().shape)
    manifest = {"q": weight(source("q", 8, 4), shape=shape, shard=shard, splits=("split",), transpose=True)}
    saved(tmp_path, tensors)
    for rank in range(3):
        expected = share(tensors["q"], split, rank, dim).t()
        assert torch.equal(load(manifest, tmp_path, listed(split=split), rank)["q"], expected)


def test_replicated_weights_are_whole_and_partial_ones_are_on_rank_0(tmp_path, tensors):
    """A bias behind a row-parallel linear is added once in the sum over the ranks."""
    manifest = {
        "norm": weight(source("norm", 4), shape=[4]),
        "bias": weight(source("k", 2, 4), shape=[2, 4], shard="P", tp="row"),
    }
    saved(tmp_path, tensors)
    loaded = [load(manifest, tmp_path, listed(used_elsewhere=deal(8, 2)), rank) for rank in range(2)]
    assert all(torch.equal(weights["norm"], tensors["norm"]) for weights in loaded)
    assert torch.equal(loaded[0]["bias"], tensors["k"])
    assert torch.equal(loaded[1]["bias"], torch.zeros(2, 4))


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", ["float16", "bfloat16"])
def test_shares_are_cast_once(tmp_path, stored, wanted):
    split = deal(13, 4)
    original = random(13, 13, dtype=stored)
    manifest = {
        f"dim{dim}": weight(source("w", 13, 13), shape=shape, dtype=wanted, shard=f"S({dim})", splits=("split",))
        for dim, shape in enumerate(([4, 13], [13, 4]))
    }
    saved(tmp_path, {"w": original})
    for rank in range(4):
        loaded = load(manifest, tmp_path, listed(split=split), rank)
        for dim in (0, 1):
            expected = share(original, split, rank, dim).to(getattr(torch, wanted))
            assert torch.equal(loaded[f"dim{dim}"], expected)


def test_tied_embeddings_share_storage_where_ranks_hold_the_same_of_both(tmp_path, tensors):
    """The author's words differ, the shares do not; a share of other rows or columns is a tensor of its own."""
    splits = listed(vocab=deal(10, 2), hidden=deal(4, 2))
    manifest = {
        "embed": weight(source("embed", 10, 4), shape=[5, 4], shard="S(0)", splits=("vocab",), tp="vocab"),
        "head": weight(source("embed", 10, 4), shape=[5, 4], shard="S(0)", splits=("vocab",), tp="column"),
        "hidden": weight(source("embed", 10, 4), shape=[10, 2], shard="S(1)", splits=("hidden",), tp="hidden"),
    }
    loaded = load(manifest, saved(tmp_path, tensors), splits, rank=1)
    assert loaded["embed"].data_ptr() == loaded["head"].data_ptr()
    assert torch.equal(loaded["embed"], tensors["embed"][5:])
    assert torch.equal(loaded["hidden"], tensors["embed"][:, 2:])


def test_a_rank_takes_its_share_from_several_files(tmp_path, tensors):
    save_file({"q": tensors["q"]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"k": tensors["k"]}, tmp_path / "model-00002-of-00002.safetensors")
    q, kv = deal_heads(8, 2, 1, 2)
    sources = (source("q", 8, 4), source("k", 2, 4))
    manifest = {"qk": weight(*sources, shape=[5, 4], shard="S(0)", splits=("q", "kv"))}
    expected = torch.cat([tensors["q"][4:], tensors["k"][1:]])
    assert torch.equal(load(manifest, tmp_path, listed(q=q, kv=kv), rank=1)["qk"], expected)


@pytest.mark.parametrize("rank", [-1, 2, 8])
def test_a_rank_that_the_artifact_has_not_is_refused(tmp_path, tensors, rank):
    manifest = {"q": weight(source("q", 8, 4), shape=[4, 4], shard="S(0)", splits=("rows",))}
    with pytest.raises(UserError, match=rf"rank {rank}: the artifact has the ranks 0 to 1"):
        load(manifest, saved(tmp_path, tensors), listed(rows=deal(8, 2)), rank)


def test_every_rank_compares_whole_shapes_also_of_what_it_does_not_read(tmp_path, tensors):
    manifest = {"bias": weight(source("norm", 5), shape=[5], shard="P")}
    with pytest.raises(UserError, match=r"norm +shape"):
        load(manifest, saved(tmp_path, tensors), listed(used_elsewhere=deal(8, 2)), rank=1)


# ---- what can be wrong


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


def test_tensors_that_nobody_reads_are_an_error_by_kind(tmp_path, tensors):
    """Norms of q and k that a model has not would change every answer."""
    norms = {f"model.layers.{i}.self_attn.{x}_norm.weight": random(4) for i in range(3) for x in "qk"}
    manifest = {"q": weight(source("q", 8, 4), shape=[8, 4])}
    saved(tmp_path, {"q": tensors["q"], "other": tensors["norm"], **norms})
    with pytest.raises(UserError) as error:
        load(manifest, tmp_path, unused=())
    text = str(error.value)
    assert text.startswith(f"7 tensors of {tmp_path} are not used by the model:")
    for name in ("model.layers.0.self_attn.q_norm.weight", "model.layers.0.self_attn.k_norm.weight", "other"):
        assert [line.split()[1] for line in text.splitlines() if line.split()[0] == name] == ["unused"]
    assert "2 more of the kind model.layers.*.self_attn.q_norm.weight" in text
    assert "its YAML says so:  unused:" in text
    load(manifest, tmp_path, unused=("model.layers.*_norm.weight", "other"))
    with pytest.raises(UserError, match=r"^3 tensors"):
        load(manifest, tmp_path, unused=("model.layers.*.q_norm.weight", "other"))


def test_unused_missing_and_misshaped_tensors_are_told_in_one_table(tmp_path, tensors):
    manifest = {"a": weight(source("q", 9, 4), shape=[9, 4]), "b": weight(source("gone", 2), shape=[2])}
    with pytest.raises(UserError) as error:
        load(manifest, saved(tmp_path, tensors), unused=("packed",))
    text = str(error.value)
    assert re.match(r"2 of the 2 tensors .* do not fit .*; 3 tensors of .* are not used", text)
    rows = [line.split()[:2] for line in text.splitlines()]
    assert [row for row in rows if row[1] in ("shape", "missing", "unused")] == [
        ["q", "shape"], ["gone", "missing"], ["embed", "unused"], ["k", "unused"], ["norm", "unused"]]  # fmt: skip


def test_many_kinds_of_unused_tensors_are_counted(tmp_path):
    saved(tmp_path, {f"part{chr(97 + i)}.w": random(2) for i in range(25)} | {"q": random(8, 4)})
    with pytest.raises(UserError, match=r"(?s)25 tensors.*and 5 more kinds"):
        load({"q": weight(source("q", 8, 4), shape=[8, 4])}, tmp_path, unused=())


@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_a_tied_embedding_may_be_stored_under_both_of_its_names(tmp_path, monkeypatch, tensors, chunk):
    """As torch.save and converters write it. With other numbers it is a head of its own, which the model has not."""
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk)
    one = weight(source("embed", 10, 4), shape=[10, 4])
    stored = {"embed": tensors["embed"], "lm_head.weight": tensors["embed"].clone()}
    load({"embed": one, "head": dict(one)}, saved(tmp_path, stored), unused=())
    with pytest.raises(UserError, match=r"lm_head.weight +unused"):  # of no use to a model that does not tie
        load({"embed": one}, tmp_path, unused=())
    stored["lm_head.weight"][9, 3] += 1
    with pytest.raises(UserError, match=r"lm_head.weight +unused"):
        load({"embed": one, "head": dict(one)}, saved(tmp_path, stored), unused=())


def test_the_llama_family_lets_buffers_of_old_transformers_stay(tmp_path, tensors):
    unused = load_model("llama2-7b").unused
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": random(2), "transformer.h.0.attn.masked_bias": random(1)}
    manifest = {"q": weight(source("q", 8, 4), shape=[8, 4])}
    load(manifest, saved(tmp_path, {"q": tensors["q"], **buffers}), unused=tuple(unused))
    with pytest.raises(UserError, match=r"q_proj\.bias"):
        load(manifest, saved(tmp_path, {"q": tensors["q"], "self_attn.q_proj.bias": random(8)}), unused=tuple(unused))


def test_run_refuses_a_checkpoint_with_more_tensors_than_the_model_reads(tmp_path, save_words_model, capsys):
    """Qwen3's q_norm in a LLaMA: before anything is generated; a model that says so leaves them."""
    save_words_model(tmp_path, 64)
    file, extra = tmp_path / "model.safetensors", "model.layers.1.self_attn.q_norm.weight"
    save_file({**load_file(file), extra: torch.ones(16)}, file)
    words = ["run", "--model-path", str(tmp_path), "--input-ids", "1,5,9", "--max-output-length", "2", "--quiet"]
    assert cli.main([*words, "--graph", str(tmp_path / "mine.yaml")]) == 1
    assert re.search(rf"{extra} +unused", capsys.readouterr().err)
    (tmp_path / "knowing.yaml").write_text(f'extends: mine\nname: knowing\nunused: {{"{extra}": a test}}\n')
    assert cli.main([*words, "--graph", str(tmp_path / "knowing.yaml")]) == 0
    assert (
        cli.main(["compile", str(tmp_path / "knowing.yaml"), "--device", "host", "--output", str(tmp_path / "a")]) == 0
    )
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert list(manifest["unused"]) == ["*.attn.bias", "*.attn.masked_bias", "*.rotary_emb.inv_freq", extra]
    assert cli.main([*words, "--artifact", str(tmp_path / "a")]) == 0


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
weights = load_weights(manifest["weights"], sys.argv[1], splits=manifest["splits"], rank=1, progress=False)
print(peak() - before)
"""


@pytest.mark.parametrize(
    ("dtype", "shard"), [("float16", "R"), ("bfloat16", "R"), ("float16", "S(0)"), ("bfloat16", "S(1)")]
)
def test_peak_memory_is_the_share_and_a_piece(tmp_path, dtype, shard):
    """Columns too, though they lie on every page of the tensor."""
    rows, ranks = 60000, 4
    save_file({n: torch.ones(rows, 1000, dtype=torch.float16) for n in ("a", "b")}, tmp_path / "model.safetensors")
    high, wide = {"R": (rows, 1000), "S(0)": (rows // ranks, 1000), "S(1)": (rows, 1000 // ranks)}[shard]
    manifest = {
        "ab": weight(
            *(source(n, rows, 1000) for n in ("a", "b")),
            shape=[2 * high, wide],
            dtype=dtype,
            shard=shard,
            splits={"R": (), "S(0)": ("rows", "rows"), "S(1)": ("columns",)}[shard],
        )
    }
    splits = listed(rows=deal(rows, ranks), columns=deal(1000, ranks))
    (tmp_path / "manifest.json").write_text(json.dumps({"weights": manifest, "splits": splits}))
    out = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, check=True)
    size = 2 * high * wide * 2
    assert size * 0.9 < int(out.stdout) < size * 1.05 + 80e6  # a piece is 67e6
