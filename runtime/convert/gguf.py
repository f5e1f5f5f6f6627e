"""GGUF files: enters one file, leaves a `Plan` (see `plan.py`) for a Hugging Face directory.

Blocks are dequantised by the `gguf` package, row by row, so memory holds a slice of a tensor. llama.cpp stores the rows
of q and k interleaved for its own rope; a permutation of rows puts them back. What a GGUF says and a Hugging Face
directory of this architecture cannot say is refused, never dropped.

    token_embd.weight     -> model.embed_tokens.weight
    blk.3.attn_q.weight   -> model.layers.3.self_attn.q_proj.weight     rows un-interleaved
    (no output.weight)    -> tie_word_embeddings: true
"""

from __future__ import annotations

import importlib
import math
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.compiler.checkpoint_files import present
from llmc.compiler.diagnostics import UserError
from llmc.runtime.convert.gguf_file import Damaged, StoredTensor, read
from llmc.runtime.convert.plan import Plan, Tensor, write_json
from llmc.runtime.foreign import alone, is_failure, no_questions, quiet_transformers

if TYPE_CHECKING:
    import numpy
    import torch

# general.architecture -> (architectures, model_type). llama.cpp writes "llama" for Llama 1 to 3, Mistral 7B, SmolLM 1
# and 2, Yi, Vicuna, CodeLlama and TinyLlama: one graph, one set of names.
ARCHITECTURES: Mapping[str, tuple[str, str]] = {"llama": ("LlamaForCausalLM", "llama")}

# GGUF name -> Hugging Face name; "blk.{i}." is "model.layers.{i}." (source: gguf.tensor_mapping, MODEL_ARCH.LLAMA)
TOP_NAMES: Mapping[str, str] = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_NAMES: Mapping[str, str] = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Tables that can be computed from the sizes. `rope_freqs` is read, see `_rope_scaling`.
DERIVED = re.compile(r"rope_freqs\.weight|rope\.freqs|blk\.\d+\.attn_rot_embd(\.weight)?")

# Keys that change what a llama computes and that LlamaConfig cannot say: value that means "off", or None if none does.
REFUSED_KEYS: Mapping[str, Any] = {
    "expert_count": 0,
    "attention.sliding_window": 0,
    "attention.clamp_kqv": 0.0,
    "attention.scale": None,
    "logit_scale": 1.0,
    "residual_scale": 1.0,
    "embedding_scale": 1.0,
}

# Llama 3.1 to 3.3: (low_freq_factor, high_freq_factor, original_max_position_embeddings). A GGUF holds only the
# resulting factors; they are recomputed from these and must agree (source: config.json of those models).
LLAMA3_ROPE = (1.0, 4.0, 8192)

MAX_TOKEN = 4096  # published ones have some hundreds; the time to rebuild merges grows with the square
MAX_FLOAT32 = 3.4028234663852886e38
CHUNK_VALUES = 1 << 22  # values dequantised at once: 16 MiB of float32


@dataclass(frozen=True, kw_only=True)
class Header:
    """The file: metadata by key, tensors by name."""

    path: Path
    meta: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    architecture: str

    def get(self, key: str, default: Any = None) -> Any:
        """A key of the architecture, such as `attention.head_count`; a list of one value, repeated, is that value."""
        value = self.meta.get(f"{self.architecture}.{key}", default)
        if not isinstance(value, list):
            return value
        if not value or any(item != value[0] for item in value):
            raise UserError(
                f"{self.path}: {key} differs between layers ({str(value)[:60]}); a LlamaConfig has one for all"
            )
        return value[0]

    def number(self, key: str, kind: type[int] | type[float], default: Any = None) -> Any:
        """A key that must be there, or have a default, as a positive number."""
        if (value := self.get(key, default)) is None:
            raise UserError(f"{self.path}: the header has no {self.architecture}.{key}")
        if type(value) is not kind or not 0 < value < math.inf:
            raise UserError(
                f"{self.path}: {self.architecture}.{key} is {value!r:.60}; expected a positive {kind.__name__}"
            )
        return value

    def token_id(self, name: str) -> int | None:
        """`tokenizer.ggml.NAME_token_id`, if the file has it."""
        value = self.meta.get(f"tokenizer.ggml.{name}_token_id")
        if value is not None and type(value) is not int:
            raise UserError(f"{self.path}: tokenizer.ggml.{name}_token_id is {value!r:.60}; expected a number")
        return value

    def text(self, key: str) -> str:
        """A key of the whole file that is text; "" where it has none."""
        if not isinstance(value := self.meta.get(key, ""), str):
            raise UserError(f"{self.path}: {key} is {str(value)[:60]}; expected text")
        return value

    def texts(self, key: str) -> list[str]:
        """Likewise a list of texts."""
        value = self.meta.get(key, [])
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise UserError(f"{self.path}: {key} is {str(value)[:60]}; expected a list of texts")
        return value


def plan_gguf(source: Path, dtype: str | None, max_shard_bytes: int) -> Plan:
    """Reads the header, checks it whole, and plans the shards."""
    header = read_header(source)
    config = config_of(header)
    dtype = dtype or _default_dtype(header)
    config["torch_dtype"] = dtype
    tensors = tensors_of(header, config, dtype)
    notes, tokenizer = _tokenizer_files(header, config)
    return Plan(
        source=source,
        inputs=(source,),
        default_target=source.with_suffix(""),
        files=_shards(tensors, max_shard_bytes),
        side_files=tokenizer,
        config=config,
        settings={"kind": "gguf", "dtype": dtype, "max_shard_bytes": max_shard_bytes},
        warnings=tuple(notes),
    )


def read_header(path: Path) -> Header:
    """Metadata and tensor table; values stay in the file, which is mapped."""
    try:
        importlib.import_module("gguf")
    except ImportError as error:
        raise UserError("reading GGUF needs the gguf package", hint="pip install 'llmc[convert]'") from error
    present(path)
    try:
        meta, tensors = read(path)
    except Damaged as error:
        raise UserError(
            f"{path} is damaged, cut off ({path.stat().st_size} bytes) or of an unknown GGUF version: {error}",
            hint="download it again",
        ) from None
    if (parts := meta.get("split.count", 0)) not in (0, 1):
        raise UserError(f"{path} is one of {parts!s:.60} parts", hint="join them first: llama-gguf-split --merge")
    architecture = str(meta.get("general.architecture", ""))
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"{path}: architecture {architecture!r:.60} is not supported; supported: {', '.join(ARCHITECTURES)}",
            hint="get the checkpoint as safetensors: those need no conversion",
        )
    return Header(path=path, meta=meta, tensors=tensors, architecture=architecture)


# Config


def config_of(header: Header) -> dict[str, Any]:
    """The `config.json` that this header describes, without `torch_dtype`."""
    for key, off in REFUSED_KEYS.items():
        if (value := header.get(key)) is not None and value != off:
            raise UserError(
                f"{header.path}: {header.architecture}.{key} is {value!s:.60}; a LlamaConfig cannot say this"
            )
    hidden, heads = header.number("embedding_length", int), header.number("attention.head_count", int)
    head_dim = header.number("attention.key_length", int, max(hidden // heads, 1))
    for key in ("rope.dimension_count", "attention.value_length"):
        if (found := header.get(key, head_dim)) != head_dim:
            raise UserError(
                f"{header.path}: {key} is {found!s:.60}, but heads have {head_dim} values; llama needs them equal"
            )
    if head_dim % 2:
        raise UserError(f"{header.path}: heads have {head_dim} values; rope turns them in pairs")
    if "token_embd.weight" not in header.tensors:
        raise UserError(f"{header.path} has no token_embd.weight: it holds no model, or only its vocabulary")

    layers = header.number("block_count", int)
    stored = len({name.split(".")[1] for name in header.tensors if name.startswith("blk.")})
    if layers != stored:
        raise UserError(f"{header.path}: block_count is {layers}, but there are tensors of {stored} layers")

    architectures, model_type = ARCHITECTURES[header.architecture]
    config = {
        "architectures": [architectures],
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": header.number("feed_forward_length", int),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": header.number("attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        # The table itself; llama.vocab_size may differ.
        "vocab_size": int(header.tensors["token_embd.weight"].shape[-1]),
        "max_position_embeddings": header.number("context_length", int),
        "rms_norm_eps": shortest(header.number("attention.layer_norm_rms_epsilon", float)),
        "rope_theta": shortest(header.number("rope.freq_base", float, 10000.0)),
        "hidden_act": "silu",
        "attention_bias": _has_bias(header, ("attn_q", "attn_k", "attn_v", "attn_output")),
        "mlp_bias": _has_bias(header, ("ffn_gate", "ffn_up", "ffn_down")),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "use_cache": True,
    }
    if scaling := _rope_scaling(header, config):
        config["rope_scaling"] = scaling
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        config[f"{name}_token_id"] = header.token_id(key)
    return config


def shortest(value: float) -> float:
    """The shortest decimal with the same float32: GGUF holds 1e-05 as 9.999999747378752e-06."""
    if abs(value) > MAX_FLOAT32:
        return value
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        if struct.pack("f", short) == struct.pack("f", value):
            return short
    return value


def _has_bias(header: Header, names: Sequence[str]) -> bool:
    present = [name for name in names if f"blk.0.{name}.bias" in header.tensors]
    if present and len(present) < len(names):
        raise UserError(
            f"{header.path}: {', '.join(present)} have a bias and the others of {', '.join(names)} have none; "
            "a LlamaConfig gives all of them one, or none"
        )
    return bool(present)


def _rope_scaling(header: Header, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """`rope_scaling` from `rope.scaling.*`, or from the table `rope_freqs` that stands for Llama 3.1's rule."""
    kind = header.get("rope.scaling.type", "none")
    if kind == "none" and header.get("rope.scale_linear"):
        kind = "linear"  # files from before rope.scaling.* have this key alone
    original = header.number("rope.scaling.original_context_length", int, LLAMA3_ROPE[2])
    if kind == "linear":
        factor = header.number("rope.scaling.factor", float, header.get("rope.scale_linear"))
        return {"rope_type": "linear", "factor": shortest(factor)} if factor != 1.0 else None
    if kind == "yarn":
        factor = header.number("rope.scaling.factor", float)
        original = header.number("rope.scaling.original_context_length", int)
        # llama.cpp multiplies these into its own attention factor; Hugging Face's attention_factor replaces it.
        for key, off in (("attn_factor", 1.0), ("yarn_attn_factor", 1.0), ("yarn_log_multiplier", 0.0)):
            if (value := header.get(f"rope.scaling.{key}", off)) != off:
                raise UserError(
                    f"{header.path}: rope.scaling.{key} is {value!s:.60}; only {off} has a meaning for llama"
                )
        scaling = {"rope_type": "yarn", "factor": shortest(factor), "original_max_position_embeddings": original}
        for key in ("beta_fast", "beta_slow"):
            if header.get(f"rope.scaling.yarn_{key}") is not None:
                scaling[key] = shortest(header.number(f"rope.scaling.yarn_{key}", float))
        return scaling
    if kind != "none":
        raise UserError(
            f"{header.path}: rope scaling {kind!r:.60} is not supported; supported: none, linear, yarn, llama3"
        )
    if "rope_freqs.weight" not in header.tensors:
        return None
    import numpy

    factors = numpy.asarray(header.tensors["rope_freqs.weight"].data, dtype=numpy.float64)
    if factors.shape != (config["head_dim"] // 2,) or not (0 < factors.min() <= factors.max() < math.inf):
        raise UserError(
            f"{header.path}: the table rope_freqs must hold {config['head_dim'] // 2} positive numbers, one for each "
            f"pair of values of a head; its shape is {list(factors.shape)}"
        )
    return _llama3(header.path, factors.tolist(), config, original)


def _llama3(path: Path, found: Sequence[float], config: Mapping[str, Any], old: int) -> dict[str, Any] | None:
    """Llama 3.1's rule, if it gives these factors (one per pair of a head): frequency_i is divided by found[i]."""
    if all(value == 1.0 for value in found):
        return None
    low, high, _ = LLAMA3_ROPE
    factor, dim = shortest(max(found)), config["head_dim"]
    expected = []
    for i in range(dim // 2):
        waves = old * config["rope_theta"] ** (-2 * i / dim) / (2 * math.pi)  # wavelengths in the original context
        smooth = min(max((waves - low) / (high - low), 0.0), 1.0)
        expected.append(1 / ((1 - smooth) / factor + smooth))
    if any(abs(a - b) > 1e-5 * b for a, b in zip(found, expected, strict=True)):
        raise UserError(
            f"{path}: the table rope_freqs is not Llama 3.1's rule with low_freq_factor {low:g}, "
            f"high_freq_factor {high:g}, original_max_position_embeddings {old}; its settings are unknown"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": old,
    }


# Tensors


def tensors_of(header: Header, config: Mapping[str, Any], dtype: str) -> list[Tensor]:
    """Every tensor of the model under its Hugging Face name, in the order of the model; all problems in one error."""
    shapes = _expected_shapes(config)
    found = {name: _hf_name(name) for name in header.tensors if not DERIVED.fullmatch(name)}
    problems = [f"{name}: unknown" for name, ours in found.items() if ours not in shapes]
    problems += [f"{ours}: missing" for ours in shapes if ours not in found.values()]
    for name, ours in found.items():
        shape = tuple(int(size) for size in reversed(header.tensors[name].shape))
        if ours in shapes and shape != shapes[ours]:
            problems.append(f"{name}: shape {list(shape)}, expected {list(shapes[ours])}")
    if problems:
        listed = "\n  ".join(problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else []))
        raise UserError(f"{header.path} does not hold the tensors of its header:\n  {listed}")
    _check_types(header)

    source = {ours: header.tensors[name] for name, ours in found.items()}
    heads = {".q_proj.": config["num_attention_heads"], ".k_proj.": config["num_key_value_heads"]}
    return [
        Tensor(name=name, shape=shape, dtype=dtype, chunks=_reader(source[name], dtype, _rows_of(name, shape, heads)))
        for name, shape in shapes.items()
    ]


def _hf_name(name: str) -> str:
    """The Hugging Face name, or "" when there is none."""
    stem, _, kind = name.rpartition(".")
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)", stem):
        layer, leaf = match.groups()
        return f"model.layers.{layer}.{LAYER_NAMES[leaf]}.{kind}" if leaf in LAYER_NAMES else ""
    return f"{TOP_NAMES[stem]}.{kind}" if stem in TOP_NAMES else ""


def _expected_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q, kv = (config[key] * config["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
    layer = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(config["num_hidden_layers"]):
        for name, shape in layer.items():
            shapes[f"model.layers.{i}.{name}.weight"] = shape
            if ("self_attn" in name and config["attention_bias"]) or ("mlp" in name and config["mlp_bias"]):
                shapes[f"model.layers.{i}.{name}.bias"] = shape[:1]
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def _check_types(header: Header) -> None:
    """One row of each quantisation type in the file is dequantised, so that a type without a rule is refused here."""
    import gguf

    for kind in sorted({tensor.tensor_type for tensor in header.tensors.values()}):
        name, tensor = next((n, t) for n, t in header.tensors.items() if t.tensor_type == kind)
        try:
            gguf.quants.dequantize(tensor.data.reshape(-1, tensor.data.shape[-1])[:1], kind)
        except NotImplementedError as error:
            known = "F32, F16 and the types of gguf.quants"
            raise UserError(f"{header.path}: {name} is stored as {kind.name}; readable are {known}") from error


def _default_dtype(header: Header) -> str:
    """What the matrices are stored in; for blocks float16, the type of their scales."""
    kinds = {tensor.tensor_type.name for tensor in header.tensors.values() if len(tensor.shape) > 1}
    plain = {"F32": "float32", "BF16": "bfloat16"}
    return plain.get(next(iter(kinds)), "float16") if len(kinds) == 1 else "float16"


def _rows_of(name: str, shape: tuple[int, ...], heads: Mapping[str, int]) -> numpy.ndarray | None:
    """For q and k: which stored row is row r of the Hugging Face tensor. llama.cpp stores a head's rows as
    (pair, half): 0, D/2, 1, D/2 + 1, ...; Hugging Face has (half, pair): 0, 1, ..., D - 1.
    """
    import numpy

    for part, count in heads.items():
        if part in name:
            stored = numpy.arange(shape[0]).reshape(count, shape[0] // count // 2, 2)  # [heads, D/2, 2]
            return stored.swapaxes(1, 2).reshape(-1)
    return None


def _reader(tensor: StoredTensor, dtype: str, order: numpy.ndarray | None) -> Callable[[], Iterator[torch.Tensor]]:
    def chunks() -> Iterator[torch.Tensor]:
        import gguf
        import torch

        data = tensor.data  # [rows, bytes or values]; a vector is one row, but a permuted one (a bias) is many
        rows = data.reshape(-1, data.shape[-1]) if order is None else data.reshape(len(order), -1)
        step = max(1, CHUNK_VALUES * len(rows) // tensor.n_elements)
        for start in range(0, len(rows), step):
            part = rows[start : start + step] if order is None else rows[order[start : start + step]]
            values = gguf.quants.dequantize(part, tensor.tensor_type)
            # A mapped file is read-only; the copy keeps torch from warning about it.
            yield torch.from_numpy(values if values.flags.writeable else values.copy()).to(getattr(torch, dtype))

    return chunks


def _shards(tensors: Sequence[Tensor], limit: int) -> dict[str, tuple[Tensor, ...]]:
    """In order, a new file when the next tensor would pass the limit; a single larger tensor has its own."""
    shards: list[list[Tensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.nbytes for t in shards[-1]) + tensor.nbytes > limit:
            shards.append([])
        shards[-1].append(tensor)
    if len(shards) == 1:
        return {"model.safetensors": tuple(shards[0])}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": tuple(shard) for i, shard in enumerate(shards, 1)}


# Tokenizer


def _tokenizer_files(header: Header, config: Mapping[str, Any]) -> tuple[list[str], Callable[[Path], None]]:
    """Warnings, and the function that writes tokenizer.json, its two companions and generation_config.json.

    The tokenizer is built here, before any weight is written: a vocabulary that cannot be converted stops early.
    """
    tokens = header.texts("tokenizer.ggml.tokens")
    stop = [header.token_id(key) for key in ("eos", "eot", "eom")]
    eos = list(dict.fromkeys(token for token in stop if token is not None))
    generation = {
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": config["pad_token_id"],
    }
    generation = {key: value for key, value in generation.items() if value is not None}
    if not tokens:
        note = "the file holds no vocabulary; tokenizer.json is not written"
        return [note], lambda target: write_json(target / "generation_config.json", generation)

    if (longest := max(map(len, tokens))) > MAX_TOKEN:
        raise UserError(f"{header.path}: a token has {longest} characters; no vocabulary has more than {MAX_TOKEN}")
    notes, text = _tokenizer_json(header)
    special = {
        f"{ours}_token": tokens[token]
        for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if (token := header.token_id(theirs)) is not None and 0 <= token < len(tokens)
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # tokenizer.json as it is, whatever the model type
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        **special,
    }
    if template := header.text("tokenizer.chat_template"):
        settings["chat_template"] = template

    def write(target: Path) -> None:
        (target / "tokenizer.json").write_text(text, encoding="utf-8")
        write_json(target / "tokenizer_config.json", settings)
        write_json(target / "special_tokens_map.json", special)
        write_json(target / "generation_config.json", generation)

    return notes, write


def _tokenizer_json(header: Header) -> tuple[list[str], str]:
    """transformers rebuilds vocabulary, merges and special tokens; how text is split is put right here where it differs
    from llama.cpp, which is what the file was made for (compared on texts with digits, spaces and special tokens).
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise UserError(
            "the tokenizer of a GGUF needs the transformers package", hint="pip install 'llmc[convert]'"
        ) from error
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers

    kind, pre = header.meta.get("tokenizer.ggml.model"), header.meta.get("tokenizer.ggml.pre")
    with alone(header.path) as path, no_questions(), quiet_transformers():
        try:
            loaded = AutoTokenizer.from_pretrained(
                str(path.parent), gguf_file=path.name, local_files_only=True, trust_remote_code=False
            )
        except BaseException as error:  # whatever transformers raises on a vocabulary that it cannot convert
            if not is_failure(error):
                raise
            why = str(error).replace(str(path), str(header.path))[:300]
            raise UserError(f"{header.path}: transformers cannot convert the tokenizer {kind!r:.60}: {why}") from None
    tokenizer = Tokenizer.from_str(loaded.backend_tokenizer.to_str())
    notes = []
    if kind == "llama":
        # As in Llama 2's own tokenizer.json: every stretch between special tokens gets a space in front.
        prefix = header.meta.get("tokenizer.ggml.add_space_prefix", True)
        spaces = [normalizers.Prepend("▁")] if prefix else []
        tokenizer.normalizer = normalizers.Sequence([*spaces, normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = None
        strip = [decoders.Strip(" ", 1, 0)] if prefix else []
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        tokenizer.decoder = decoders.Sequence(steps)
    elif kind == "gpt2":
        if pre == "smollm":  # each digit alone, then as GPT-2
            digits = pre_tokenizers.Digits(individual_digits=True)
            bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
        elif pre in ("llama-bpe", "llama3", "llama-v3"):  # a piece that is in the vocabulary is not merged up to
            tokenizer.model.ignore_merges = True
        elif isinstance(tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel) and pre not in ("gpt-2", "gpt2"):
            notes.append(f"tokenizer.ggml.pre {pre!r} is unknown: text is split as for GPT-2, token ids may differ")
    return notes, tokenizer.to_str(pretty=True)
