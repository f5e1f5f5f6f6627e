"""A checkpoint's config.json against the models: does it fit, which one is it, and what would a new one say.

    config = read_config("weights/Llama-2-13b-hf")
    choose_variant(config)                      # "llama2-13b"
    check_config(model, config, "weights/Llama-2-13b-hf/config.json")
    print(variant_from_config(config, "mine"))  # YAML text that fits

Rope settings are compared whole, in the form of `Graph.rope`. transformers 5 writes them as `rope_parameters`, older
versions as `rope_theta` and `rope_scaling`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

from llmc.compiler.checkpoint_files import read_object
from llmc.compiler.diagnostics import Diagnostic, DiagnosticError, Place, UserError
from llmc.compiler.language.build import Model
from llmc.compiler.language.definitions import MODEL_NAME, SCALINGS, Language, Rule
from llmc.compiler.language.expressions import ExpressionError, Number, UnknownName, evaluate
from llmc.compiler.language.reading import NAME
from llmc.compiler.language.source import Map, Scalar, catalogue, load
from llmc.compiler.sharding import deal_heads

FAMILY = "families/llama"
# Names of rope settings in config.json (transformers/modeling_rope_utils.py) that are not ours.
ROPE_NAMES = {"original_max_position_embeddings": "original_max_positions"}
# What an absent setting means (the same file).
ROPE_DEFAULTS: Mapping[str, Mapping[str, Any]] = {"yarn": {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}}
TENSOR_PARALLEL = (1, 2, 4, 8)


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """config.json of a checkpoint directory, or the file itself."""
    path = os.fspath(path)
    file = os.path.join(path, "config.json") if os.path.isdir(path) else path
    try:
        return read_object(file, code="E502")
    except UserError as error:
        hint = error.hint or "--model-path names a directory with config.json and safetensors files"
        why = error.message.removeprefix(f"{file} ").removeprefix("cannot be read: ")
        why = f"it {why}" if why.startswith(("is ", "must ")) else why
        raise UserError(f"cannot read {file!r}: {why}", hint=hint, code="E502") from None


def check_config(model: Model, config: Mapping[str, Any], config_path: str = "config.json") -> None:
    """DiagnosticError with every difference between the model and its checkpoint, naming both places."""
    _refuse_quantised(config, config_path)
    found = list(differences(model.config, model.graph.rope, model.places, config, config_path))
    if found:
        raise DiagnosticError(found, model.sources)


def check_artifact_config(manifest: Mapping[str, Any], config: Mapping[str, Any], config_path: str) -> None:
    """UserError where an artifact was compiled for other settings than the checkpoint's: shapes alone do not tell a
    LLaMA-7B from a LLaMA2-7B, whose norms differ in epsilon."""
    here = Place(file="", line=0, column=0)
    rules = {key: Rule(value=r["is"], default=r["or"], place=here) for key, r in manifest["config"].items()}
    _refuse_quantised(config, config_path)
    found = list(differences(rules, manifest["rope"], {}, config, config_path))
    if found:
        lines = [f"the artifact of {manifest['model']} does not fit {config_path}:"]
        raise UserError(
            "\n".join([*lines, *(f"  {d.message}" for d in found)]),
            hint="compile this checkpoint's model, or give the weights that the artifact is for",
            code="E502",
        )


def _refuse_quantised(config: Mapping[str, Any], config_path: str) -> None:
    if settings := config.get("quantization_config"):
        kind = settings.get("quant_method") if isinstance(settings, Mapping) else settings
        raise UserError(
            f"{config_path}: the weights are quantised ({_say(kind)}), and only float weights are offered yet",
            hint="give the float checkpoint that they were made from",
            code="E502",
        )


def choose_variant(config: Mapping[str, Any], config_path: str = "config.json") -> str:
    """The catalogue's model that agrees with a config.json, the first by name where several do."""
    _refuse_quantised(config, config_path)
    found: dict[str, list[Diagnostic]] = {}
    for name in catalogue():
        model = Language(load(name))
        found[name] = list(differences(model.config, model.rope, model.places, config, config_path))
        if not found[name]:
            return name
    nearest = min(found, key=lambda name: (len(found[name]), name))
    problems = "\n".join(f"    {d.message}" for d in found[nearest])
    try:
        hint = f"save this as mine.yaml and give it as --graph mine.yaml\n\n{variant_from_config(config, 'mine')}"
    except UserError as error:
        hint = error.message
    message = f"{config_path}: no model of the catalogue agrees; the nearest is {nearest}:\n{problems}"
    raise UserError(message, hint=hint, code="E502")


def differences(
    rules: Mapping[str, Rule],
    rope: Mapping[str, Any],
    places: Mapping[str, Place],
    config: Mapping[str, Any],
    config_path: str,
) -> Iterator[Diagnostic]:
    """Everything that the model and the config.json say differently."""
    for key, rule in rules.items():
        value = config.get(key)
        implied = value is None
        if implied and rule.default is None:
            yield _difference(f"config.json has no '{key}'; the model needs {_say(rule.value)}", rule.place,
                              f"{config_path}: {key} is absent")  # fmt: skip
            continue
        value = rule.default if implied else value
        if not same(value, rule.value):
            message = f"config.json says {key} {_say(value)}, the model says {_say(rule.value)}"
            absent = " (absent, which means this)" if implied else ""
            yield _difference(message, rule.place, f"{config_path}: {key} = {_say(value)}{absent}")
    if not rope:
        return
    ours, theirs = _flat(rope), _flat(rope_from_config(config))
    for key in dict.fromkeys((*ours, *theirs)):
        if key == "pairing" or same(ours.get(key), theirs.get(key)):
            continue
        message = f"config.json says rope {key} {_say(theirs.get(key))}, the model says {_say(ours.get(key))}"
        place = places.get(f"rope.{key}") or places.get("rope.theta")
        yield _difference(message, place, f"{config_path}: rope {key} = {_say(theirs.get(key))}")


def _difference(message: str, place: Place | None, found: str) -> Diagnostic:
    return Diagnostic(
        code="E502", message=message, place=place, found=found, likely="another model (--graph), or other weights"
    )


def same(a: Any, b: Any) -> bool:
    """Equal, where 1 is 1.0 but not true, and rounding in text does not matter."""
    numbers = [isinstance(v, (int, float)) and not isinstance(v, bool) for v in (a, b)]
    if all(numbers):
        return a == b or math.isclose(a, b, rel_tol=1e-9)
    return type(a) is type(b) and a == b


def rope_from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """{"theta": 500000.0, "scaling": {"type": "llama3", "factor": 8.0, ...}}, from either way of writing it.

    Settings that we do not know stay under their names, so that a comparison shows them."""
    said: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(config.get(key), Mapping):
            said |= {k: v for k, v in config[key].items() if v is not None}
    theta = said.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
    old_name = said.pop("type", "default")
    kind = said.pop("rope_type", old_name)
    rope: dict[str, Any] = {"theta": float(theta) if isinstance(theta, (int, float)) else theta}
    partial = said.pop("partial_rotary_factor", config.get("partial_rotary_factor") or 1)
    if partial != 1:
        rope["partial_rotary_factor"] = partial
    if kind == "default":
        return rope
    scaling = {"type": kind} | {ROPE_NAMES.get(k, k): v for k, v in said.items()}
    if kind in ("dynamic", "yarn"):
        scaling.setdefault("original_max_positions", config.get("max_position_embeddings"))
    return {**rope, "scaling": scaling}


def _flat(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Rope settings with dotted names, absent ones filled in."""
    scaling = rope.get("scaling") or {"type": "default"}
    scaling = {**ROPE_DEFAULTS.get(str(scaling.get("type")), {}), **scaling}
    settings = {k: v for k, v in rope.items() if k != "scaling"}
    return settings | {f"scaling.{k}": v for k, v in scaling.items() if v is not None}


def _say(value: Any) -> str:
    if isinstance(value, str):
        return repr(value[:60])
    return "nothing" if value is None else json.dumps(value, default=str)[:60]


def variant_from_config(config: Mapping[str, Any], name: str) -> str:
    """YAML text of a model of the LLaMA family with the sizes of a config.json."""
    if not MODEL_NAME.fullmatch(name):
        raise UserError(f"{name[:40]!r} cannot be the name of a model", hint="letters, digits, '.', '_' and '-'")
    family = load(FAMILY).root
    known = _table(family, "sizes")
    sizes, fixed = _said(config, _table(family, "config"), known)
    tied = fixed.pop("tie_word_embeddings", (False, False))[0] is True
    other = [f"{key} {_say(said)} (needed: {_say(needed)})" for key, (said, needed) in fixed.items()
             if not same(said, needed)]  # fmt: skip
    if other:
        raise UserError(f"{FAMILY} does not describe this checkpoint: {', '.join(other)}", code="E502",
                        hint="write a model with the nodes that differ; see docs/add-a-variant.md")  # fmt: skip
    written = {k: v for k, v in sizes.items() if not _implied(k, v, sizes, known)}
    lines = [
        f"extends: {FAMILY}",
        f"name: {json.dumps(name)}",
        f"sizes: {{{', '.join(f'{k}: {_plain(v)}' for k, v in written.items())}}}",
        *_rope_lines(rope_from_config(config)),
    ]
    dtype = config.get("dtype") or config.get("torch_dtype")
    if dtype == "bfloat16":  # float32 weights are cast: no NPU computes in float32
        lines.append(f"dtype: {dtype}")
    if tied:
        lines += ["config: {tie_word_embeddings: {is: true}}", "graph: {lm_head: {weight: model.embed_tokens.weight}}"]
    heads, kv_heads = sizes["heads"], sizes["kv_heads"]
    tp = [n for n in TENSOR_PARALLEL if deal_heads(heads, kv_heads, 1, n)[0].local * n == heads]  # no head of zeros
    lines.append(f"support: {{atlas-800i-a2: {{tp: {tp}}}}}")
    return "\n".join(lines) + "\n"


def _said(
    config: Mapping[str, Any], rules: Mapping[str, Any], known: Mapping[str, Any]
) -> tuple[dict[str, Number], dict[str, tuple[Any, Any]]]:
    """What a config.json says by the family's rules: sizes by name; and, for each key that the family states as a
    literal, what is said and what is needed."""
    sizes: dict[str, Number] = {}
    fixed: dict[str, tuple[Any, Any]] = {}

    def lookup(size: str) -> Number:
        if size in sizes:
            return sizes[size]
        default = known.get(size)
        if isinstance(default, Scalar):
            return evaluate(default.text, lookup)
        raise UnknownName(f"unknown size {size!r}")

    for key, rule in rules.items():
        assert isinstance(rule, Map)
        expected, default = rule.items.get("is", rule.items.get("text")), rule.items.get("or")
        assert isinstance(expected, Scalar)
        said = config.get(key)
        if "text" in rule.items or not isinstance(expected.value, str):
            absent = default.value if isinstance(default, Scalar) else None
            fixed[key] = (absent if said is None else said, expected.value)
            continue
        said = _default(default, lookup) if said is None else said
        if not isinstance(said, (int, float)) or isinstance(said, bool) or said <= 0:
            raise UserError(f"config.json: {key} must be a number larger than 0, found {_say(said)}", code="E502")
        if NAME.fullmatch(expected.text):
            sizes[expected.text] = said
    return sizes, fixed


def _table(root: Map, key: str) -> dict[str, Any]:
    value = root.items[key]
    return dict(value.items) if isinstance(value, Map) else {}


def _default(default: Any, lookup: Any) -> Number | None:
    if not isinstance(default, Scalar):
        return None
    try:
        return evaluate(default.text, lookup)
    except ExpressionError:
        return None


def _implied(name: str, value: Number, sizes: Mapping[str, Number], known: Mapping[str, Any]) -> bool:
    """Does the family's own definition of the size give this value?"""

    def lookup(size: str) -> Number:
        if size not in sizes:
            raise UnknownName(size)
        return sizes[size]

    default = _default(known.get(name), lookup)
    return default is not None and same(default, value)


def _rope_lines(rope: Mapping[str, Any]) -> list[str]:
    """The `rope:` line, where the settings are not the family's."""
    if not isinstance(rope["theta"], float) or "partial_rotary_factor" in rope:
        raise UserError(f"config.json: rope settings are not offered: {_say(dict(rope))}", code="E502")
    settings = [] if rope["theta"] == 10000.0 else [f"theta: {_plain(rope['theta'])}"]
    if scaling := rope.get("scaling"):
        kind = str(scaling["type"])
        needed, optional = SCALINGS.get(kind, ((), ()))
        missing = [key for key in needed if not isinstance(scaling.get(key), (int, float))]
        if kind not in SCALINGS or missing:
            raise UserError(f"config.json: rope scaling is not offered: {_say(dict(scaling))}", code="E502",
                            hint=f"known types: {', '.join(SCALINGS)}")  # fmt: skip
        pairs = [f"{k}: {_plain(scaling[k])}" for k in (*needed, *optional) if scaling.get(k) is not None]
        settings.append(f"scaling: {{{', '.join([f'type: {kind}', *pairs])}}}")
    return [f"rope: {{{', '.join(settings)}}}"] if settings else []


def _plain(value: Any) -> str:
    """A number as we read it: 8.0 rather than 8 where it is a float, 1e-05 as it is."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer() and abs(value) >= 1:
        return f"{value:.1f}" if abs(value) < 1e15 else repr(value)
    return repr(value)
