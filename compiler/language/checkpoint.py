"""A checkpoint's config.json against the models: does it fit, which one is it, and what would a new one say.

    config = read_config("weights/Llama-2-13b-hf")
    choose_variant(config)                      # "llama2-13b"
    check_config(model, config, "weights/Llama-2-13b-hf/config.json")
    print(variant_from_config(config, "mine"))  # YAML text that fits

Every key counts: what the model's `config:` names is compared, the rest must change nothing (`config_keys.py` says
which keys do), and what nobody knows is refused. Rope settings are compared whole, in the form of `Graph.rope`:
transformers 5 writes them as `rope_parameters`, older versions as `rope_theta` and `rope_scaling`.
"""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llmc.compiler.checkpoint_files import read_object
from llmc.compiler.diagnostics import Diagnostic, DiagnosticError, Place, UserError, did_you_mean, one_line
from llmc.compiler.language.build import Model
from llmc.compiler.language.config_keys import (
    HARMLESS,
    KEYS,
    QUANTISED_KEYS,
    ROPE_KEYS,
    TYPES,
    number,
    with_defaults,
)
from llmc.compiler.language.definitions import MODEL_NAME, SCALINGS, Language, Rule
from llmc.compiler.language.expressions import ExpressionError, Number, UnknownName, evaluate
from llmc.compiler.language.reading import NAME
from llmc.compiler.language.source import Map, Scalar, catalogue, load
from llmc.compiler.sharding import deal_heads
from llmc.compiler.target.device import DTYPES

FAMILY = "families/llama"
# Names of rope settings in config.json (transformers/modeling_rope_utils.py) that are not ours.
ROPE_NAMES = {"original_max_position_embeddings": "original_max_positions"}
# What an absent setting means (the same file).
ROPE_DEFAULTS: Mapping[str, Mapping[str, Any]] = {"yarn": {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}}
# Settings of some type: transformers passes over those that are not of the type that is asked for.
ROPE_SETTINGS = {key for needed, optional in SCALINGS.values() for key in (*needed, *optional)}
ROPE_SETTINGS |= {"short_factor", "long_factor"}
TENSOR_PARALLEL = (1, 2, 4, 8)
LARGEST = 2**31 - 1  # of a size, as in the language (`Reader.whole`)
MOST_NAMES = 20  # of unknown keys in a message


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """config.json of a checkpoint directory, or the file itself. UserError for what is no configuration, or says a key
    twice."""
    path = os.fspath(path)
    file = os.path.join(path, "config.json") if os.path.isdir(path) else path
    try:
        return read_object(file, code="E502")
    except UserError as error:
        hint = error.hint or "--model-path names a directory with config.json and safetensors files"
        why = error.message.removeprefix(f"{file} ").removeprefix("cannot be read: ")
        why = f"it {why}" if why.startswith(("is ", "must ")) else why
        raise UserError(f"cannot read {file!r}: {why}", hint=hint, code="E502") from None


def ignoring(config: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The configuration with these keys as null: taken as absent. UserError for a key that is not there."""
    if missing := [name for name in names if name not in config]:
        raise UserError(f"config.json has no key {missing[0]!r} to ignore", hint=did_you_mean(missing[0], config))
    return {**config, **dict.fromkeys(names)}


def stored_dtype(config: Mapping[str, Any]) -> str | None:
    """The dtype that a config.json says, in either spelling; None where it says none. UserError."""
    said = _first(config.get("dtype"), config.get("torch_dtype"))
    name = said.removeprefix("torch.") if isinstance(said, str) else said
    if name in (None, "auto"):
        return None
    if isinstance(name, str) and name in DTYPES:
        return name
    raise UserError(f"config.json says dtype {_say(said)}, and weights are cast to {', '.join(DTYPES)} only",
                    hint="--dtype says another", code="E502")  # fmt: skip


def check_config(model: Model, config: Mapping[str, Any], config_path: str = "config.json") -> None:
    """DiagnosticError with every difference between the model and its checkpoint, naming both places."""
    _refuse_quantised(config, config_path)
    graph = model.graph
    found = list(differences(model.config, graph.rope, graph.sizes, model.places, config, config_path))
    if found:
        raise DiagnosticError(found, model.sources)


def check_artifact_config(manifest: Mapping[str, Any], config: Mapping[str, Any], config_path: str) -> None:
    """UserError where an artifact was compiled for other settings than the checkpoint's: shapes alone do not tell a
    LLaMA-7B from a LLaMA2-7B, whose norms differ in epsilon."""
    here = Place(file="", line=0, column=0)
    rules = {
        key: Rule(value=r.get("is"), default=r.get("or"), place=here, ignore=r.get("ignore", ""))
        for key, r in manifest["config"].items()
    }
    _refuse_quantised(config, config_path)
    found = list(differences(rules, manifest["rope"], manifest["sizes"], {}, config, config_path))
    if found:
        lines = [f"the artifact of {manifest['model']} does not fit {config_path}:"]
        raise UserError(
            "\n".join([*lines, *(f"  {d.message}" for d in found)]),
            hint="compile this checkpoint's model, or give the weights that the artifact is for",
            code="E502",
        )


def _refuse_quantised(config: Mapping[str, Any], config_path: str) -> None:
    for key in QUANTISED_KEYS:
        settings = config.get(key)
        if KEYS[key].is_off(settings, config, None):
            continue
        kind = settings.get("quant_method") if isinstance(settings, Mapping) else settings
        raise UserError(
            f"{config_path}: the weights are quantised ({_say(kind)}), says {key}; only float weights are offered yet",
            hint="give the float checkpoint that they were made from",
            code="E502",
        )


def choose_variant(config: Mapping[str, Any], config_path: str = "config.json") -> str:
    """The catalogue's model that agrees with a config.json, the first by name where several do."""
    _refuse_quantised(config, config_path)
    found: dict[str, list[Diagnostic]] = {}
    for name in catalogue():
        model = Language(load(name))
        found[name] = list(differences(model.config, model.rope, model.sizes, model.places, config, config_path))
        if not found[name]:
            return name
    nearest = min(found, key=lambda name: (len(found[name]), name))
    problems = "\n".join(f"    {d.message}" for d in found[nearest])
    try:
        hint = f"save this as mine.yaml and give it as --graph mine.yaml\n\n{variant_from_config(config, 'mine')}"
    except UserError as error:
        hint = error.hint if _unknown(config, {}) and len(found[nearest]) == 1 else error.message
    message = f"{config_path}: no model of the catalogue agrees; the nearest is {nearest}:\n{problems}"
    raise UserError(message, hint=hint, code="E502")


# ---- differences


def differences(
    rules: Mapping[str, Rule],
    rope: Mapping[str, Any],
    sizes: Mapping[str, Number],
    places: Mapping[str, Place],
    config: Mapping[str, Any],
    config_path: str,
) -> Iterator[Diagnostic]:
    """Everything that the model and the config.json say differently, and every key of which the model says nothing."""
    full = with_defaults(config)
    for key, rule in rules.items():
        if rule.ignore:
            continue
        value = full.get(key)
        implied = value is None
        if implied and rule.default is None:
            yield _difference(f"config.json has no '{key}'; the model needs {_say(rule.value)}", rule.place,
                              f"{config_path}: {key} is absent")  # fmt: skip
            continue
        value = rule.default if implied else value
        if not same(value, rule.value):
            message = f"config.json says {key} {_say(value)}, the model says {_say(rule.value)}"
            absent = " (absent, which means this)" if implied or key not in config else ""
            yield _difference(message, rule.place, f"{config_path}: {key} = {_say(value)}{absent}")
    known = {*rules, *ROPE_KEYS} if rope else set(rules)
    positions = sizes.get("max_positions")
    for key, value in _active(full, known, positions if isinstance(positions, int) else None):
        absent = "" if key in config else " (absent, which means this)"
        yield Diagnostic(
            code="E502",
            message=f"config.json says {key} {_say(value)}, and the model has no rule for it: {KEYS[key].does}",
            found=f"{config_path}: {key} = {_say(value)}{absent}",
            needed=KEYS[key].needs,
        )
    if unknown := _unknown(full, rules):
        yield Diagnostic(code="E502", message=_unknown_keys(unknown), found=f"{config_path}: {_listed(full, unknown)}",
                         likely=_way_out(unknown))  # fmt: skip
    if not rope:
        return
    for problem in rope_conflicts(full):
        yield _difference(f"config.json says two things: {problem}", places.get("rope.theta"), config_path)
    ours, theirs = _flat(rope), _flat(rope_from_config(full))
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


def _active(
    config: Mapping[str, Any], known: set[str] | Mapping[str, Any], positions: int | None
) -> Iterator[tuple[str, Any]]:
    """Keys that change the computation, and are not among those that the model knows."""
    for key, value in config.items():
        if key in KEYS and key not in known and not KEYS[key].is_off(value, config, positions):
            yield key, value


def _unknown(config: Mapping[str, Any], known: Mapping[str, Any]) -> list[str]:
    """Keys that nobody knows; null is what an absent key says."""
    tables = (known, KEYS, HARMLESS)
    return [key for key, value in config.items() if value is not None and not any(key in table for table in tables)]


def _unknown_keys(names: Sequence[str]) -> str:
    one = len(names) == 1
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    shown = ", ".join(repr(name[:60]) for name in names[:MOST_NAMES])
    return (
        f"config.json has {'a key' if one else f'{len(names)} keys'} that llmc does not know: {shown}{more}; "
        f"{'it' if one else 'they'} may change what the model computes"
    )


def _listed(config: Mapping[str, Any], names: Sequence[str]) -> str:
    return one_line(", ".join(f"{name[:60]} = {_say(config[name])}" for name in names[:MOST_NAMES]))


def _way_out(names: Sequence[str]) -> str:
    """How unknown keys are passed knowingly."""
    names = names[:MOST_NAMES]
    near = {name: did_you_mean(name, [*KEYS, *ROPE_KEYS]) for name in names}
    typing = "".join(f"{name[:60]}: {hint} " for name, hint in near.items() if hint)
    rules = ", ".join(f'{json.dumps(name)}: {{ignore: "why"}}' for name in names)
    return one_line(
        f"{typing}If nothing that the model computes depends on it: --ignore-config {shlex.join(names)}   "
        f"(llmc run, llmc init), or in the model's YAML  config: {{{rules}}}"
    )


def same(a: Any, b: Any) -> bool:
    """Equal, where 1 is 1.0 but not true, and rounding in text does not matter."""
    if number(a) and number(b):
        return a == b or math.isclose(a, b, rel_tol=1e-9)
    return type(a) is type(b) and a == b


# ---- rope


def rope_from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """{"theta": 500000.0, "scaling": {"type": "llama3", "factor": 8.0, ...}}, from either way of writing it, as
    transformers reads it (modeling_rope_utils.py): a setting that is not of the type is passed over.

    Settings that we do not know stay under their names, so that a comparison shows them."""
    config = with_defaults(config)
    said, key = _rope_settings(config)
    rope: dict[str, Any] = {}
    if not isinstance(said, Mapping):
        rope[key], said = said, {}
    theta = _first(said.get("rope_theta"), config.get("rope_theta"), 10000.0)
    rope["theta"] = float(theta) if number(theta) else theta
    kind = _first(said.get("rope_type"), said.get("type"), "default")
    partial = _first(said.get("partial_rotary_factor"), config.get("partial_rotary_factor"), 1)
    if not same(partial, 1):
        rope["partial_rotary_factor"] = partial
    settings = {
        ROPE_NAMES.get(k, k): v
        for k, v in said.items()
        if k not in ("rope_theta", "rope_type", "type", "partial_rotary_factor")
    }
    offered = SCALINGS.get(kind) if isinstance(kind, str) else None
    own = {*offered[0], *offered[1]} if offered else ROPE_SETTINGS
    foreign = {k: v for k, v in settings.items() if k not in ROPE_SETTINGS and v is not None}
    if kind == "default":
        return rope | foreign
    scaling = {"type": kind} | {k: v for k, v in settings.items() if k in own} | foreign
    trained = config.get("max_position_embeddings")
    if kind == "dynamic":  # reads no other length
        scaling["original_max_positions"] = trained
    elif "original_max_positions" in own:
        outer = config.get("original_max_position_embeddings")
        scaling["original_max_positions"] = _first(outer, scaling.get("original_max_positions"), trained)
    if number(original := scaling.get("original_max_positions")) and original == original // 1:
        scaling["original_max_positions"] = int(original)
    if kind == "yarn":
        scaling = _yarn(scaling, trained)
    return {**rope, "scaling": {k: v for k, v in scaling.items() if v is not None}}


def _rope_settings(config: Mapping[str, Any]) -> tuple[Any, str]:
    """The settings, and the key that holds them. An empty value is an absent one."""
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    return config.get(key) or {}, key


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _yarn(scaling: Mapping[str, Any], trained: Any) -> dict[str, Any]:
    """Settings as transformers takes them: factor null is the ratio of the lengths, a beta of 0 is an absent one,
    truncate null is false."""
    found = {**scaling, **{key: scaling.get(key) or None for key in ("beta_fast", "beta_slow")}}
    original = scaling.get("original_max_positions")
    if scaling.get("factor") is None and number(trained) and number(original) and original:
        found["factor"] = trained / original
    if "truncate" in scaling:
        found["truncate"] = scaling["truncate"] or False
    return _without_idle(found)


def _without_idle(scaling: Mapping[str, Any]) -> dict[str, Any]:
    """mscale and mscale_all_dim count only together, and not where attention_factor is said."""
    counts = scaling.get("attention_factor") is None and scaling.get("mscale") and scaling.get("mscale_all_dim")
    return {k: v for k, v in scaling.items() if counts or k not in ("mscale", "mscale_all_dim")}


def rope_conflicts(config: Mapping[str, Any]) -> Iterator[str]:
    """What is said twice and differently: versions of transformers choose differently there."""
    old, new = config.get("rope_scaling"), config.get("rope_parameters")
    if old and new and old != new:
        yield f"rope_scaling {_say(old)} and rope_parameters {_say(new)}"
    said, where = _rope_settings(config)
    if not isinstance(said, Mapping):
        return
    pairs = [
        (f"{where}.type", said.get("type"), f"{where}.rope_type", said.get("rope_type")),
        *(
            (f"{where}.{key}", said.get(key), key, config.get(key))
            for key in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
        ),
    ]
    for first, a, second, b in pairs:
        if a is not None and b is not None and not same(a, b):
            yield f"{first} {_say(a)} and {second} {_say(b)}"


def _flat(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Rope settings with dotted names, absent ones filled in, and those left out that others replace."""
    scaling = rope.get("scaling") or {"type": "default"}
    scaling = _without_idle({**ROPE_DEFAULTS.get(str(scaling.get("type")), {}), **scaling})
    settings = {k: v for k, v in rope.items() if k != "scaling"}
    return settings | {f"scaling.{k}": v for k, v in scaling.items() if v is not None}


def _say(value: Any) -> str:
    """A value as JSON, cut."""
    if isinstance(value, str):
        return repr(value[:60])
    if value is None:
        return "nothing"
    try:
        text = json.dumps(value, default=str)
    except RecursionError:
        return "something nested deep"
    return text if len(text) <= 60 else f"{text[:56]} ..."


# ---- a new variant


def variant_from_config(config: Mapping[str, Any], name: str, ignore: Sequence[str] = ()) -> str:
    """YAML text of a model of the LLaMA family with the sizes of a config.json. Keys of `ignore` are taken as absent,
    and the model says so. UserError with everything that the family has not."""
    if not MODEL_NAME.fullmatch(name):
        raise UserError(f"{name[:40]!r} cannot be the name of a model", hint="letters, digits, '.', '_' and '-'")
    ignore = list(dict.fromkeys(ignore))
    full = ignoring(with_defaults(config), ignore)
    family = load(FAMILY).root
    known, rules = _table(family, "sizes"), _table(family, "config")
    sizes, fixed, problems = _said(full, rules, known)
    tied = fixed.get("tie_word_embeddings", (False, False))[0] is True
    if tied:
        del fixed["tie_word_embeddings"]
    problems += [
        f"{key} {_say(said)} (needed: {_say(needed)}){_why(key, said)}"
        for key, (said, needed) in fixed.items()
        if not same(said, needed)
    ]
    positions = sizes.get("max_positions")
    active = list(_active(full, {*rules, *ROPE_KEYS}, positions if isinstance(positions, int) else None))
    problems += [f"{key} {_say(value)}{_why(key)}" for key, value in active]
    unknown = _unknown(full, rules)
    problems += [_unknown_keys(unknown)] if unknown else []
    problems += [f"it says two things: {problem}" for problem in rope_conflicts(full)]
    rope_lines, rope_problems = _rope_lines(rope_from_config(full))
    problems += rope_problems
    if problems:
        hint = "write a model with the nodes that differ; see docs/add-a-variant.md"
        raise UserError("\n".join([f"{FAMILY} does not describe this checkpoint:", *(f"  {p}" for p in problems)]),
                        hint=_way_out(unknown) if unknown else hint, code="E502")  # fmt: skip
    written = {k: v for k, v in sizes.items() if not _implied(k, v, sizes, known)}
    lines = [
        f"extends: {FAMILY}",
        f"name: {json.dumps(name)}",
        f"sizes: {{{', '.join(f'{k}: {_plain(v)}' for k, v in written.items())}}}",
        *rope_lines,
    ]
    if _first(config.get("dtype"), config.get("torch_dtype")) in (
        "bfloat16",
        "torch.bfloat16",
    ):  # float32 weights are cast: no NPU computes in float32
        lines.append("dtype: bfloat16")
    said = ["tie_word_embeddings: {is: true}"] if tied else []
    said += [f"{json.dumps(key)}: {{ignore: llmc init --ignore-config}}" for key in ignore]
    lines += [f"config: {{{', '.join(said)}}}"] if said else []
    lines += ["graph: {lm_head: {weight: model.embed_tokens.weight}}"] if tied else []
    heads, kv_heads = sizes["heads"], sizes["kv_heads"]
    tp = [n for n in TENSOR_PARALLEL if deal_heads(heads, kv_heads, 1, n)[0].local * n == heads]  # no head of zeros
    lines.append(f"support: {{atlas-800i-a2: {{tp: {tp}}}}}")
    return "\n".join(lines) + "\n"


def _why(key: str, said: Any = None) -> str:
    if key not in KEYS:
        return ""
    own = TYPES.get(said) if key == "model_type" and isinstance(said, str) else None
    return f": {KEYS[key].does}{f' ({own})' if own else ''}; it takes {KEYS[key].needs}"


def _said(
    config: Mapping[str, Any], rules: Mapping[str, Any], known: Mapping[str, Any]
) -> tuple[dict[str, Number], dict[str, tuple[Any, Any]], list[str]]:
    """What a config.json says by the family's rules: sizes by name; for each key that the family states as a literal,
    what is said and what is needed; and sizes that no model has."""
    sizes: dict[str, Number] = {}
    fixed: dict[str, tuple[Any, Any]] = {}
    problems: list[str] = []

    def lookup(size: str) -> Number:
        if size in sizes:
            return sizes[size]
        default = known.get(size)
        if isinstance(default, Scalar):
            return evaluate(default.text, lookup)
        raise UnknownName(f"unknown size {size!r}")

    for key, rule in rules.items():
        assert isinstance(rule, Map)
        if "ignore" in rule.items:
            continue
        expected, default = rule.items.get("is", rule.items.get("text")), rule.items.get("or")
        assert isinstance(expected, Scalar)
        said = config.get(key)
        if "text" in rule.items or not isinstance(expected.value, str):
            absent = default.value if isinstance(default, Scalar) else None
            fixed[key] = (absent if said is None else said, expected.value)
            continue
        if said is None and default is not None:
            if problems:
                continue  # it may follow from what is wrong
            said = _default(default, lookup)
        if problem := _no_size(key, said):
            problems.append(problem)
        elif number(said) and NAME.fullmatch(expected.text):
            sizes[expected.text] = int(said) if key in KEYS and KEYS[key].whole else said
    return sizes, fixed, problems or _unequal_heads(sizes, config.get("head_dim"))


def _unequal_heads(sizes: Mapping[str, Number], head_dim: Any) -> list[str]:
    """What is wrong with sizes that are each a size."""
    hidden, heads, kv_heads = sizes["hidden"], sizes["heads"], sizes["kv_heads"]
    if heads % kv_heads:
        why = "each key and value head serves as many query heads"
        return [f"num_attention_heads {heads} must be a multiple of num_key_value_heads {kv_heads}: {why}"]
    if head_dim is None and hidden % heads:
        return [f"hidden_size {hidden} is no multiple of num_attention_heads {heads}, and there is no head_dim"]
    if sizes["head_dim"] % 2:
        return [f"head_dim {sizes['head_dim']} must be even: rope turns pairs"]
    return []


def _no_size(key: str, said: Any) -> str:
    """What is wrong with the value of a size; empty where nothing is."""
    whole = key in KEYS and KEYS[key].whole and isinstance(said, (int, float)) and not isinstance(said, bool)
    if number(said) and (said == said // 1 and 1 <= said <= LARGEST if whole else said > 0):
        return ""
    needed = f"whole number from 1 to {LARGEST}" if whole else "number larger than 0"
    return f"{key} must be a {needed}, found {_say(said)}"


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


def _rope_lines(rope: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The `rope:` line, where the settings are not the family's; and what it cannot say."""
    problems = []
    if set(rope) - {"theta", "scaling"} or not _above_zero(rope["theta"]):
        problems.append(f"rope settings are not offered: {_say(dict(rope))}")
    settings = [] if rope["theta"] == 10000.0 else [f"theta: {_plain(rope['theta'])}"]
    if scaling := rope.get("scaling"):
        kind = scaling["type"]
        needed, optional = SCALINGS.get(kind, ((), ())) if isinstance(kind, str) else ((), ())
        missing = [key for key in needed if not _fits(key, scaling.get(key))]
        wrong = [key for key in optional if key in scaling and not _fits(key, scaling[key])]
        flat = kind == "yarn" and rope["theta"] == 1  # all dimensions turn alike, and none can be told from another
        if not needed or missing or wrong or flat or set(scaling) - {"type", *needed, *optional}:
            problems.append(f"rope scaling is not offered: {_say(dict(scaling))} (known types: {', '.join(SCALINGS)})")
        else:
            pairs = [f"{k}: {_plain(scaling[k])}" for k in (*needed, *optional) if k in scaling]
            settings.append(f"scaling: {{{', '.join([f'type: {kind}', *pairs])}}}")
    return ([f"rope: {{{', '.join(settings)}}}"] if settings else []), problems


def _above_zero(value: Any) -> bool:
    return number(value) and value > 0


def _fits(key: str, value: Any) -> bool:
    if key == "truncate":
        return isinstance(value, bool)
    return _above_zero(value) and (key != "original_max_positions" or (isinstance(value, int) and value <= LARGEST))


def _plain(value: Any) -> str:
    """A number as we read it: 8.0 rather than 8 where it is a float, 1e-05 as it is."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer() and abs(value) >= 1:
        return f"{value:.1f}" if abs(value) < 1e15 else repr(value)
    return repr(value)
