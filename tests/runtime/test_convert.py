"""`llmc convert`. Oracles: transformers' own GGUF and .bin loaders; token ids of llama.cpp for the same file."""

from __future__ import annotations

import argparse
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import tracemalloc
from collections import namedtuple
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import torch
from safetensors.torch import load_file
from tiny_files import BYTES, SIZES, SMALL, gguf_tensors, tiny_model, write_gguf
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llmc.compiler.diagnostics import UserError
from llmc.runtime.convert import convert as convert_module
from llmc.runtime.convert import gguf as convert_gguf
from llmc.runtime.convert.convert import INDEX_FILE, PROGRESS_FILE, add_convert_flags, convert, run

Type = gguf.GGMLQuantizationType


@pytest.fixture
def small_gguf(tmp_path):
    return write_gguf(tmp_path / "small.gguf", SMALL, gguf_tensors(tiny_model(SMALL)), meta=BYTES)


# GGUF


def test_every_block_type_gives_the_numbers_of_transformers(tmp_path):
    sizes = {**SIZES, "num_hidden_layers": 3}  # 22 matrices, so that each type comes up
    model = tiny_model(sizes, tied=True)
    rng = numpy.random.default_rng(0)
    written: dict[str, Any] = {}
    # Python can write these types; the others get random blocks, with bytes small enough for finite float16 scales.
    writable = [Type.F32, Type.F16, Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0]
    readable = [
        Type.Q2_K,
        Type.Q3_K,
        Type.Q4_K,
        Type.Q5_K,
        Type.Q6_K,
        Type.IQ4_NL,
        Type.IQ4_XS,
        Type.IQ3_S,
        Type.IQ2_XXS,
    ]
    cycle = iter((writable + readable) * 2)
    for name, array in gguf_tensors(model).items():
        if array.ndim == 1:
            written[name] = array
            continue
        kind = next(cycle)
        if kind in writable:
            written[name] = (gguf.quants.quantize(array, kind), kind)
        else:
            shape = gguf.quants.quant_shape_to_byte_shape(array.shape, kind)
            written[name] = (rng.integers(0, 0x38, shape, dtype=numpy.uint8), kind)
    source = write_gguf(tmp_path / "mixed.gguf", sizes, written, meta=BYTES)

    convert(source, tmp_path / "out", dtype="float32", progress=False)

    ours = load_file(tmp_path / "out" / "model.safetensors")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=source.name, dtype=torch.float32).state_dict()
    assert set(theirs) - set(ours) == {"lm_head.weight"}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("bias", [False, True])
def test_a_model_written_to_gguf_comes_back_with_its_logits(tmp_path, bias):
    model = tiny_model(SMALL, attention_bias=bias, mlp_bias=bias)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias"):
                value.normal_()
    source = write_gguf(tmp_path / "m.gguf", SMALL, gguf_tensors(model), meta=BYTES)

    summary = convert(source, None, progress=False)

    assert summary.target == tmp_path / "m"
    again = AutoModelForCausalLM.from_pretrained(summary.target)
    assert again.dtype == torch.float32  # the file's own
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_config_agrees_with_what_transformers_reads_from_the_header(tmp_path, small_gguf):
    convert(small_gguf, tmp_path / "out", progress=False)
    ours, theirs = (
        AutoConfig.from_pretrained(tmp_path / "out"),
        AutoConfig.from_pretrained(tmp_path, gguf_file="small.gguf"),
    )
    for key in SMALL.keys() - {"rms_norm_eps", "rope_theta"}:
        assert getattr(ours, key) == getattr(theirs, key), key
    assert (ours.rope_parameters, ours.tie_word_embeddings) == (theirs.rope_parameters, theirs.tie_word_embeddings)
    assert ours.rms_norm_eps == 1e-5  # transformers keeps 9.999999747378752e-06
    assert (ours.bos_token_id, ours.eos_token_id) == (95, 96)


@pytest.mark.parametrize("value", [1e-5, 1e-6, 10000.0, 500000.0, 0.1, 1 / 3, 1e38])
def test_shortest_decimal_survives_float32(value):
    assert convert_gguf.shortest(float(numpy.float32(value))) == float(str(numpy.float32(value)))


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_rope_freqs_table_becomes_llama3_scaling(tmp_path, factor):
    sizes: dict[str, Any] = {**SMALL, "head_dim": 64, "rope_theta": 500000.0, "max_position_embeddings": 131072}
    scaling = {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    expected = dict(scaling)  # transformers adds to the dictionary that it is given
    plain = 1 / 500000.0 ** (torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](tiny_model(sizes, rope_scaling=scaling).config, torch.device("cpu"))
    table = (plain / scaled).float().numpy()
    tensors = gguf_tensors(tiny_model(sizes))
    convert(
        write_gguf(tmp_path / "l.gguf", sizes, {**tensors, "rope_freqs.weight": table}),
        tmp_path / "out",
        progress=False,
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rope_scaling"] == expected

    table[10] *= 1.01
    other = write_gguf(tmp_path / "other.gguf", sizes, {**tensors, "rope_freqs.weight": table})
    with pytest.raises(UserError, match=r"rope_freqs is not Llama 3\.1's rule"):
        convert(other, tmp_path / "no", progress=False)


@pytest.mark.parametrize(
    ("meta", "expected"),
    [
        ({"type": "none"}, None),
        ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"type": "yarn", "factor": 2.0, "original_context_length": 64, "yarn_beta_fast": 16.0},
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "beta_fast": 16.0},
        ),
    ],
)
def test_rope_scaling_metadata_is_kept(tmp_path, meta, expected):
    meta = {f"llama.rope.scaling.{key}": value for key, value in meta.items()}
    source = write_gguf(tmp_path / "r.gguf", SMALL, gguf_tensors(tiny_model(SMALL)), meta=meta)
    convert(source, tmp_path / "out", progress=False)
    assert json.loads((tmp_path / "out" / "config.json").read_text()).get("rope_scaling") == expected
    AutoConfig.from_pretrained(tmp_path / "out")  # transformers accepts the spelling


def without(name: str):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("meta", "change", "message"),
    [
        ({"llama.expert_count": 8}, dict, "expert_count is 8"),
        ({"llama.attention.sliding_window": 64}, dict, "sliding_window is 64"),
        ({"llama.rope.dimension_count": 4}, dict, r"rope\.dimension_count is 4, but heads have 8"),
        ({"llama.rope.scaling.type": "longrope"}, dict, "rope scaling 'longrope' is not supported"),
        ({"llama.rope.scaling.type": "yarn"}, dict, r"no llama\.rope\.scaling\.factor"),
        ({"llama.attention.head_count_kv": [2, 1]}, dict, "differs between layers"),
        ({"llama.block_count": None}, dict, r"no llama\.block_count"),
        ({"llama.block_count": 1 << 31}, dict, "block_count is 2147483648, but there are tensors of 2 layers"),
        ({"llama.attention.head_count": 0}, dict, "head_count is 0; expected a positive int"),
        ({"llama.rope.freq_base": "x"}, dict, "freq_base is 'x'; expected a positive float"),
        ({"split.count": 3}, dict, "one of 3 parts"),
        ({"tokenizer.ggml.eot_token_id": [1, 2]}, dict, r"eot_token_id is \[1, 2\]; expected a number"),
        ({}, without("token_embd.weight"), "holds no model"),
        ({}, without("blk.1.ffn_up.weight"), r"layers\.1\.mlp\.up_proj\.weight: missing"),
        ({}, lambda t: {**t, "blk.0.attn_q_norm.weight": t["output_norm.weight"]}, r"attn_q_norm\.weight: unknown"),
        ({}, lambda t: {**t, "blk.0.attn_v.bias": t["output_norm.weight"]}, "attn_v have a bias and the others"),
        ({}, lambda t: {**t, "output_norm.weight": t["output_norm.weight"][:16]}, r"shape \[16\], expected \[32\]"),
        ({}, lambda t: {**t, "output_norm.weight": numpy.ones(32, numpy.int32)}, "output_norm.weight is stored as I32"),
        ({"tokenizer.ggml.model": "rwkv", "tokenizer.ggml.tokens": ["a"]}, dict, "cannot convert the tokenizer 'rwkv'"),
    ],
)
def test_what_a_llama_config_cannot_say_is_refused_and_nothing_is_written(tmp_path, meta, change, message):
    source = write_gguf(tmp_path / "odd.gguf", SMALL, change(gguf_tensors(tiny_model(SMALL))), meta=meta)
    with pytest.raises(UserError, match=message):
        convert(source, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_other_architectures_are_refused_by_name(tmp_path):
    source = write_gguf(tmp_path / "g.gguf", SMALL, {}, architecture="gemma2")
    with pytest.raises(UserError, match="architecture 'gemma2' is not supported; supported: llama"):
        convert(source, None, progress=False)


@pytest.mark.parametrize("size", [3, 8, 24, 100, 2000, -1])
def test_cut_off_gguf_is_refused(tmp_path, small_gguf, size):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(small_gguf.read_bytes()[:size])
    with pytest.raises(UserError, match=r"damaged, cut off|is not a GGUF file"):
        convert(cut, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_memory_holds_a_slice_of_a_tensor_only(tmp_path, monkeypatch):
    array = numpy.ones((4096, 1024), numpy.float16)  # 16 MiB as float32
    source = write_gguf(tmp_path / "big.gguf", SMALL, {"x": array})
    monkeypatch.setattr(convert_gguf, "CHUNK_VALUES", 1 << 16)
    reader = gguf.GGUFReader(source)
    tracemalloc.start()
    values = sum(chunk.numel() for chunk in convert_gguf._reader(reader.tensors[0], "bfloat16", None)())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert values == array.size
    assert peak < 2 << 20


# Sentencepiece vocabulary of a GGUF, and ids that llama.cpp (llama-cpp-python 0.3.36) gives for it.
PIECES = ["▁t", "he", "▁the", "lo", "▁▁", "▁w", "▁a", "el", "hel", "▁hello", "hello"]
SENTENCEPIECE = {f"tokenizer.ggml.{key}": value for key, value in {
    "model": "llama",
    "pre": "default",
    "tokens": ["<unk>", "<s>", "</s>", *[f"<0x{i:02X}>" for i in range(256)], *PIECES, *"▁thelowa", "<|user|>"],
    "scores": [0.0] * 259 + [-float(i) for i in range(len(PIECES) + 8)] + [0.0],
    "token_type": [2, 3, 3] + [6] * 256 + [1] * (len(PIECES) + 8) + [4],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "unknown_token_id": 0,
}.items()}  # fmt: skip
LLAMA_CPP_IDS = {
    ("hello the", True): [1, 268, 261],
    ("  the  hello", True): [1, 263, 261, 263, 269],
    ("é w", True): [1, 270, 198, 172, 264],
    (" the\nlow", True): [1, 270, 261, 13, 262, 276],
    ("<|user|>hello</s>the", True): [1, 278, 268, 2, 261],
    ("hello the", False): [1, 269, 261],
    ("  the  hello", False): [1, 270, 261, 263, 269],
    ("é w", False): [1, 198, 172, 264],
    (" the\nlow", False): [1, 261, 13, 262, 276],
    ("<|user|>hello</s>the", False): [1, 278, 269, 2, 271, 260],
}


@pytest.mark.parametrize(("text", "prefix"), LLAMA_CPP_IDS)
def test_sentencepiece_tokenizer_gives_the_ids_of_llama_cpp(tmp_path, text, prefix):
    meta = {**SENTENCEPIECE, "tokenizer.ggml.add_space_prefix": prefix}
    source = write_gguf(tmp_path / "s.gguf", SMALL, gguf_tensors(tiny_model(SMALL)), meta=meta)
    convert(source, tmp_path / "out", progress=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer.encode(text)
    assert ids == LLAMA_CPP_IDS[text, prefix]
    if "<" not in text:
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_unknown_split_rule_is_reported(tmp_path, capsys):
    meta = {**BYTES, "tokenizer.ggml.pre": "of-tomorrow", "tokenizer.chat_template": "{{ messages }}"}
    source = write_gguf(tmp_path / "t.gguf", SMALL, gguf_tensors(tiny_model(SMALL)), meta=meta)
    assert run(parse(str(source), "--output", str(tmp_path / "out"))) == 0
    assert "'of-tomorrow' is unknown" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["chat_template"] == "{{ messages }}"
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode("b a") == [65, 97]


# Writing: shards, resuming, refusals


def test_shards_and_index_hold_the_same_tensors(tmp_path, small_gguf):
    convert(small_gguf, tmp_path / "one", progress=False)
    summary = convert(small_gguf, tmp_path / "many", progress=False, max_shard_bytes=30_000)
    assert len(summary.files) > 2
    assert sorted(path.name for path in (tmp_path / "many").iterdir()) == sorted(
        [
            *summary.files,
            INDEX_FILE,
            "config.json",
            "generation_config.json",
            "special_tokens_map.json",
            "tokenizer.json",
            "tokenizer_config.json",
        ]
    )
    one = AutoModelForCausalLM.from_pretrained(tmp_path / "one").state_dict()
    many = AutoModelForCausalLM.from_pretrained(tmp_path / "many").state_dict()
    assert all(torch.equal(one[name], many[name]) for name in one)
    sizes = [sum(t.nbytes for t in load_file(tmp_path / "many" / name).values()) for name in summary.files]
    assert [size > 30_000 for size in sizes] == [True, *[False] * (len(sizes) - 2), True]  # embedding, head: alone


def interrupt_at(monkeypatch, call: int):
    """The `call`-th file stops halfway, as when the process is killed."""
    write, count = convert_module.write_safetensors, 0

    def stops(path, tensors, advance):
        nonlocal count
        count += 1
        if count == call:
            path.write_bytes(b"half a file")
            raise KeyboardInterrupt
        return write(path, tensors, advance)

    monkeypatch.setattr(convert_module, "write_safetensors", stops)


def test_interrupted_run_is_no_model_and_continues(tmp_path, small_gguf, monkeypatch):
    options = {"progress": False, "max_shard_bytes": 30_000}
    whole = convert(small_gguf, tmp_path / "whole", **options)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            convert(small_gguf, out, **options)
    names = {path.name for path in out.iterdir()}
    assert "config.json" not in names
    assert not [name for name in names if name.endswith(".safetensors")]

    (out / f"{whole.files[0]}.partial").write_bytes(b"damaged since")
    again = convert(small_gguf, out, **options)

    assert again.continued == 1  # the second file; the first no longer has its hash
    assert "1 kept from an interrupted run" in str(again)
    for path in (tmp_path / "whole").iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()
    assert len(list(out.iterdir())) == len(list((tmp_path / "whole").iterdir()))


def test_unfinished_conversion_with_other_settings_is_refused_unless_forced(tmp_path, small_gguf, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            convert(small_gguf, tmp_path / "out", progress=False)
    with pytest.raises(UserError, match="unfinished conversion of another source, or with other settings"):
        convert(small_gguf, tmp_path / "out", dtype="bfloat16", progress=False)
    summary = convert(small_gguf, tmp_path / "out", dtype="bfloat16", progress=False, force=True)
    assert (summary.continued, summary.dtypes) == (0, ("bfloat16",))


def test_output_that_is_not_empty_is_refused_unless_forced(tmp_path, small_gguf):
    out = tmp_path / "out"
    out.mkdir()
    (out / "model-00001-of-00007.safetensors").write_bytes(b"old")
    with pytest.raises(UserError, match=r"already holds model-00001-of-00007\.safetensors[^;]*--force"):
        convert(small_gguf, out, progress=False)
    convert(small_gguf, out, progress=False, force=True)
    assert [path.name for path in out.glob("*.safetensors")] == ["model.safetensors"]


def test_full_disk_is_refused_before_anything_is_written(tmp_path, small_gguf, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1000))
    with pytest.raises(UserError, match=r"needs 0\.2 MB, but only 0\.0 MB are free"):
        convert(small_gguf, tmp_path / "out" / "deep", progress=False)
    assert not (tmp_path / "out").exists()


def test_disk_that_fills_up_is_one_message(tmp_path, small_gguf, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        convert(small_gguf, tmp_path / "out", progress=False)
    assert not (tmp_path / "out" / "config.json").exists()


# .bin


def save_bin(directory: Path, model: LlamaForCausalLM, shards: int = 1, **options) -> Path:
    directory.mkdir(exist_ok=True)
    model.config.save_pretrained(directory)
    state = model.state_dict()
    if shards == 1:
        torch.save(state, directory / "pytorch_model.bin", **options)
        return directory
    names = [f"pytorch_model-{i + 1:05}-of-{shards:05}.bin" for i in range(shards)]
    weight_map = {key: names[i % shards] for i, key in enumerate(state)}
    for name in names:
        torch.save({key: state[key] for key in state if weight_map[key] == name}, directory / name, **options)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return directory


def test_sharded_bin_is_converted_beside_the_files_as_by_the_original_script(tmp_path):
    model = tiny_model(SMALL).half()
    source = save_bin(tmp_path / "w", model, shards=2)
    (source / "training_args.bin").write_bytes(b"not weights")
    summary = convert(source, None, progress=False)
    assert summary.files == ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    for path in source.glob("*.bin*"):
        path.unlink()
    again = AutoModelForCausalLM.from_pretrained(source)
    assert again.dtype == torch.float16
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    assert not (source / PROGRESS_FILE).exists()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_shared_and_strided_tensors_are_written_whole(tmp_path, zipped):
    model = tiny_model(SMALL, tied=True)
    source = save_bin(tmp_path / "w", model)
    state = dict(model.state_dict())
    assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()
    state["transposed"] = state["model.embed_tokens.weight"].T
    state["scalar"], state["empty"], state["flags"] = torch.tensor(3), torch.empty(0, 4), torch.tensor([True, False])
    torch.save(state, source / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    convert(source, None, progress=False)
    written = load_file(source / "model.safetensors")
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], state[name]) for name in state)


def test_output_directory_gets_config_and_tokenizer_and_the_cast(tmp_path):
    source = save_bin(tmp_path / "w", tiny_model(SMALL), shards=2)
    (source / "tokenizer.model").write_bytes(b"pieces")
    (source / "README.md").write_text("not needed")
    convert(source, tmp_path / "out", dtype="bfloat16", progress=False)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", INDEX_FILE,
        "tokenizer.model",
    ]  # fmt: skip
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert not list(source.glob("*.safetensors"))


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path, zipped):
    source, marker = save_bin(tmp_path / "w", tiny_model(SMALL)), tmp_path / "ran"
    torch.save({"a": Evil(marker)}, source / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"pytorch_model\.bin: refused, because its pickle wants to use \w+\.mkdir"):
        convert(source, None, progress=False)
    assert not marker.exists()
    assert not list(source.glob("*.safetensors*"))


def test_unreadable_bin_files_are_one_message(tmp_path):
    source = save_bin(tmp_path / "w", tiny_model(SMALL))
    whole = (source / "pytorch_model.bin").read_bytes()
    for data in (b"", b"garbage", whole[:1000], whole[:-30], pickle.dumps([1], protocol=4)):
        (source / "pytorch_model.bin").write_bytes(data)
        with pytest.raises(UserError, match=r"pytorch_model\.bin .*(cannot be read|not a PyTorch file|holds a)"):
            convert(source, None, progress=False)
    for content, message in (
        ({"model": {"a": torch.ones(1)}}, "entry 'model' is a dict"),
        ([torch.ones(1)], "holds a list"),
        ({"a": torch.ones(1, dtype=torch.complex64)}, r"a has torch\.complex64"),
    ):
        torch.save(content, source / "pytorch_model.bin")
        with pytest.raises(UserError, match=message):
            convert(source, None, progress=False)
    assert not list(source.glob("*.safetensors*"))


def test_incomplete_or_contradicting_shards_are_refused(tmp_path):
    source = save_bin(tmp_path / "w", tiny_model(SMALL), shards=2)
    second = source / "pytorch_model-00002-of-00002.bin"
    second.rename(tmp_path / "away")
    with pytest.raises(UserError, match=r"files that are not there: pytorch_model-00002-of-00002\.bin"):
        convert(source, None, progress=False)
    shutil.copyfile(source / "pytorch_model-00001-of-00002.bin", second)
    with pytest.raises(UserError, match=r"00002-of-00002\.bin: \S+ is also in pytorch_model-00001-of-00002\.bin"):
        convert(source, None, progress=False)
    for text, message in (
        ("{", "not valid JSON"),
        ('{"weight_map": {"a": "../b.bin"}}', "not a .bin file of this directory"),
        ("[]", "no weight_map"),
    ):
        (source / "pytorch_model.bin.index.json").write_text(text)
        with pytest.raises(UserError, match=message):
            convert(source, None, progress=False)


def test_sources_without_weights_say_what_they_are(tmp_path, small_gguf):
    with pytest.raises(UserError, match="no such file or directory"):
        convert(tmp_path / "nothing", None)
    with pytest.raises(UserError, match=r"holds no \.bin weights\n  likely: give the GGUF file itself"):
        convert(tmp_path, None)
    small_gguf.unlink()
    with pytest.raises(UserError, match="holds no weights"):
        convert(tmp_path, None)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="safetensors already"):
        convert(tmp_path, None)
    (tmp_path / "x.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError, match="one file of a checkpoint"):
        convert(tmp_path / "x.bin", None)


# The command


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_convert_flags(parser)
    return parser.parse_args(words)


def test_command_takes_the_original_spelling_and_prints_one_line(tmp_path, capsys):
    source = save_bin(tmp_path / "w", tiny_model(SMALL))
    assert run(parse("--model_path", str(source))) == 0
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert "21 tensors (float32, 0.2 MB) in 1 file" in line
    with pytest.raises(UserError, match=r"already holds model\.safetensors"):
        run(parse(str(source)))
    with pytest.raises(UserError, match="needs one source"):
        run(parse())


def test_flags_need_no_torch():
    code = "import sys, llmc.runtime.convert.convert, llmc.runtime.demo; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert math.isfinite(convert_module.MAX_SHARD_BYTES)


def test_an_output_that_is_a_file_is_refused_before_the_source_is_read(tmp_path):
    (tmp_path / "out").write_text("precious")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="is a file; the output must be a directory"):
        convert(tmp_path / "a.gguf", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "precious"
