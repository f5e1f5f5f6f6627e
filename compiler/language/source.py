"""YAML text -> a tree in which every key and value keeps its place, with `extends` merged in.

    document = load("graphs/llama2-13b.yaml")
    document.root.items["sizes"].items["hidden"]     # Scalar(value=5120, place=graphs/llama2-13b.yaml:4:32)

The tree is made from YAML events by the rules of the language, which are stricter than YAML's: keys are plain words
and occur once, only true and false are booleans, `1e-5` is a number, tags and merge keys are not used.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Union

import yaml

import llmc.graphs
from llmc.compiler.diagnostics import DiagnosticError, Place, Report, UserError, did_you_mean, shorten
from llmc.compiler.files import TooLarge, Unreadable, is_within, kind, read_bytes

GRAPHS = os.path.realpath(os.path.dirname(llmc.graphs.__file__))
MAX_BYTES = 1 << 20
MAX_VALUES = 50_000  # after aliases are expanded
MAX_DEPTH = 40
MAX_EXTENDS = 10
TOO_DEEP = f"nested more than {MAX_DEPTH} deep"

LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
REAL = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?")
# YAML 1.1's printable characters; the reader of PyYAML refuses the others without a line number.
UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
NESTING = re.compile(r"nest\w* (depth|level)", re.IGNORECASE)  # how versions of libyaml speak of their own limit
LINE = re.compile("\r\n|[\n\r\x85\u2028\u2029]")

Value = Union["Scalar", "List", "Map"]


@dataclass(frozen=True, kw_only=True)
class Scalar:
    """`value` is None, bool, int, float or str; `text` is what was written, without quotes."""

    value: bool | int | float | str | None
    text: str
    place: Place

    def within(self, start: int, end: int) -> Place:
        """The place of text[start:end], where the scalar was written in one line without escapes."""
        place = self.place
        quotes = place.end_column - place.column - len(self.text)
        if quotes not in (0, 2):
            return place
        first = place.column + quotes // 2
        return Place(file=place.file, line=place.line, column=first + start, end_column=first + max(end, start + 1))


@dataclass(frozen=True, kw_only=True)
class List:
    items: tuple[Value, ...]
    place: Place


@dataclass(frozen=True, kw_only=True)
class Map:
    """`items` in written order; `keys` are the places of the keys; `place` is where the mapping starts."""

    items: Mapping[str, Value]
    keys: Mapping[str, Place]
    place: Place


@dataclass(frozen=True, kw_only=True)
class Document:
    """The merged tree of a file and what it extends. `sources`: file -> text, as read; `hash`: of their bytes."""

    root: Map
    sources: Mapping[str, str]
    hash: str


def catalogue() -> list[str]:
    """Names of the models that come with llmc."""
    return sorted(f.removesuffix(".yaml") for f in os.listdir(GRAPHS) if f.endswith(".yaml"))


def load(path_or_name: str | os.PathLike[str], allow: Iterable[str | os.PathLike[str]] = ()) -> Document:
    """Read a file, or a model of the catalogue by name, with everything that it extends: files of its folder and of the
    catalogue, and of the folders that are allowed."""
    typed = os.fspath(path_or_name)
    report = Report({})
    path = next(filter(_is_file, _candidates(typed)), None)
    if path is None:
        report.add("E001", _why_not(typed), likely=_way_out(typed))
        report.raise_if_any()
    assert path is not None
    return _Chain(report, os.path.dirname(path), allow).load(path)


def loads(text: str | bytes, file: str = "<text>") -> Document:
    """The same for text that is in memory; its folder is the working directory."""
    chain = _Chain(Report({}), "")
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return chain.finish(chain.merged(file, data, ""))


def show(value: Value) -> str:
    """What was written, for `found:`."""
    match value:
        case Scalar():
            return repr(value.text) if isinstance(value.value, str) else (value.text or "nothing")
        case List():
            return f"a list of {len(value.items)}"
        case Map():
            return f"a mapping with {', '.join(list(value.items)[:5]) or 'nothing in it'}"


def _candidates(typed: str, folder: str = "") -> list[str]:
    """Files that may be meant: as typed, with .yaml, or from the catalogue (`graphs/` may be said)."""
    path = os.path.join(folder, typed)
    return [path, f"{path}.yaml", os.path.join(GRAPHS, *_stem(typed).split("/")) + ".yaml"]


def _is_file(path: str) -> bool:
    try:
        return os.path.isfile(path)
    except ValueError:  # a NUL in the name
        return False


def _stem(typed: str) -> str:
    return typed.removeprefix("./").removeprefix("graphs/").removesuffix(".yaml")


def _why_not(typed: str) -> str:
    try:
        return f"cannot read {typed!r}: {kind(typed)}"
    except OSError as error:
        return f"cannot read {typed!r}: {error.strerror}"
    except ValueError as error:
        return f"cannot read {typed!r}: {error}"


def _way_out(typed: str) -> str:
    """A checkpoint is easily taken for its description."""
    if os.path.isfile(os.path.join(typed, "config.json")):
        return f"describe that checkpoint: llmc init --model-path {typed} > mine.yaml"
    return did_you_mean(_stem(typed), catalogue())


def _display(path: str) -> str:
    """As typed; files of the catalogue are called `graphs/...` wherever they are installed."""
    real = os.path.realpath(path)
    if real.startswith(GRAPHS + os.sep):
        return "graphs/" + os.path.relpath(real, GRAPHS).replace(os.sep, "/")
    return os.path.normpath(path)


class _Chain:
    """Reads a file and follows `extends`."""

    def __init__(self, report: Report, folder: str, allow: Iterable[str | os.PathLike[str]] = ()) -> None:
        self.report = report
        self.sources: dict[str, str] = {}
        self.report.sources = self.sources
        self.hash = hashlib.sha256()
        self.open: dict[str, str] = {}  # real path -> name in messages, of the files being read
        self.folder = os.path.realpath(folder)
        self.folders = (GRAPHS, *map(_allowed_folder, allow))

    def load(self, path: str) -> Document:
        return self.finish(self.read(path))

    def finish(self, root: Map) -> Document:
        for _, key, value in _walk(root):
            if isinstance(value, Scalar) and value.value is None:
                if value.text:
                    self.report.add("E108", f"nothing to remove: no extended file says '{key}'", value.place)
                else:
                    self.report.add("E102", f"'{key}' has no value", value.place,
                                    needed="a value; null removes what an extended file says")  # fmt: skip
        self.report.raise_if_any()
        return Document(root=root, sources=self.sources, hash=self.hash.hexdigest())

    def read(self, path: str, place: Place | None = None) -> Map:
        file = _display(path)
        try:
            data = read_bytes(path, MAX_BYTES)
        except (OSError, Unreadable) as error:
            why = error.strerror if isinstance(error, OSError) else error
            code = "E004" if isinstance(error, TooLarge) else "E001"
            self.report.add(code, f"cannot read {file!r}: {why}", place)
            self.report.raise_if_any()
            raise
        self.open[os.path.realpath(path)] = file
        root = self.merged(file, data, os.path.dirname(path))
        self.open.popitem()
        return root

    def merged(self, file: str, data: bytes, folder: str) -> Map:
        text = _decode(file, data, self.report)
        self.sources[file] = text
        self.hash.update(data)
        root = _Reader(file, text, self.report).document()
        extends = root.items.get("extends")
        if extends is None:
            return root
        here = Map(
            items={k: v for k, v in root.items.items() if k != "extends"},
            keys=root.keys,
            place=root.place,
        )
        return merge(self.read(self.base(extends, folder), extends.place), here, self.report)

    def base(self, extends: Value, folder: str) -> str:
        """The file that `extends` names: beside this one, else in the catalogue."""
        if not isinstance(extends, Scalar) or not isinstance(extends.value, str) or not extends.value.strip():
            self.report.add("E103", "'extends' must name one file", extends.place, found=show(extends))
            self.report.raise_if_any()
        assert isinstance(extends, Scalar)
        name, path = extends.text, self.found(extends, folder)
        if not path:
            known = [*catalogue(), *(f"families/{f[:-5]}" for f in os.listdir(os.path.join(GRAPHS, "families")))]
            self.report.add("E005", f"extends: there is no {name!r}", extends.place, likely=did_you_mean(name, known))
        elif os.path.realpath(path) in self.open:
            first = self.open[os.path.realpath(path)]
            names = list(self.open.values())
            loop = [*names[names.index(first) :], first]
            self.report.add(
                "E005", "extends: the files extend each other in a circle", extends.place, found=" -> ".join(loop)
            )
        elif len(self.open) >= MAX_EXTENDS:
            self.report.add("E005", f"extends: more than {MAX_EXTENDS} files deep", extends.place)
        self.report.raise_if_any()
        return path

    def found(self, extends: Scalar, folder: str) -> str:
        """The path of the file, "" if there is none. What leads out is refused before anybody looks whether it is
        there: links count by where they lead."""
        name = extends.text
        candidates = _candidates(name, folder) if "\0" not in name else []
        for path in candidates:
            real = os.path.realpath(path)
            if not self.allowed(real):
                self.report.add(
                    "E005", f"extends: {name!r} is outside the model's folder", extends.place,
                    found="" if real == os.path.abspath(path) and os.path.isabs(name) else f"it leads to {real}",
                    needed=f"a file of the folder {_display(self.folder)} and below, or of the catalogue",
                    likely=f"--allow-extends {os.path.dirname(real)}, if that file may be read",
                )  # fmt: skip
                self.report.raise_if_any()
            if _is_file(path):
                return path
        if candidates and os.path.lexists(candidates[0]):
            self.report.add("E005", f"extends: {_why_not(candidates[0])}", extends.place)
            self.report.raise_if_any()
        return ""

    def allowed(self, real: str) -> bool:
        """Whether `extends` may read this resolved path. A model in `/` would have everything for its tree: it has the
        files beside it."""
        if os.path.dirname(self.folder) == self.folder:
            return os.path.dirname(real) == self.folder or is_within(real, self.folders)
        return is_within(real, (self.folder, *self.folders))


def _allowed_folder(folder: str | os.PathLike[str]) -> str:
    typed = os.fspath(folder)
    try:
        if stat.S_ISDIR(os.stat(typed).st_mode):
            return os.path.realpath(typed)
        why = "it is not a directory"
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
    raise UserError(f"--allow-extends {typed!r}: {why}", hint="the directory of the files that may be extended")


def merge(base: Map, over: Map, report: Report, path: tuple[str, ...] = ()) -> Map:
    """What `over` says goes before what `base` says: mappings merge, everything else is replaced, null removes."""
    items, keys = dict(base.items), dict(base.keys)
    nodes = path == ("graph",) or (len(path) > 1 and path[-1] == "nodes")
    for key, value in over.items.items():
        old = items.get(key)
        if isinstance(value, Scalar) and value.value is None and value.text:
            if old is None:
                report.add(
                    "E108", f"nothing to remove: there is no '{key}'", over.keys[key], likely=did_you_mean(key, items)
                )
                continue
            del items[key], keys[key]
            continue
        if isinstance(old, Map) and isinstance(value, Map) and not _replaces(value, old, path, nodes):
            value = merge(old, value, report, (*path, key))
        elif old is None and nodes and isinstance(value, Map) and not _kind(value):
            report.add("E108", f"there is no node '{key}' to change", over.keys[key],
                       needed="a node that exists, or `op:` or `block:` for a new one",
                       likely=did_you_mean(key, items))  # fmt: skip
            continue
        items[key], keys[key] = value, over.keys[key]
    return Map(items=items, keys=keys, place=over.place)


def _kind(node: Map) -> str:
    return next((k for k in ("op", "block", "repeat") if k in node.items), "")


def _replaces(value: Map, old: Map, path: tuple[str, ...], nodes: bool) -> bool:
    """A node that says what it is replaces the old node whole; so does a rope scaling that says its type."""
    if nodes:
        return _kind(value) in ("op", "block") or (_kind(value) == "repeat" and _kind(old) != "repeat")
    return path == ("rope",) and "type" in value.items


def _walk(value: Value, path: tuple[str, ...] = (), key: str = "") -> Iterator[tuple[tuple[str, ...], str, Value]]:
    yield path, key, value
    if isinstance(value, Map):
        for k, v in value.items.items():
            yield from _walk(v, (*path, k), k)
    elif isinstance(value, List):
        for v in value.items:
            yield from _walk(v, path, key)


def _decode(file: str, data: bytes, report: Report) -> str:
    """Text of a file; what YAML's reader would refuse without a place is told here."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, column = _position(data[: error.start].decode("utf-8", "replace"))
        report.add("E001", f"{file!r} is not UTF-8 text", Place(file=file, line=line, column=column),
                   found=f"byte 0x{data[error.start]:02x}", likely="save the file as UTF-8")  # fmt: skip
        report.raise_if_any()
        raise
    if bad := UNPRINTABLE.search(text):
        line, column = _position(text[: bad.start()])
        report.sources = {**report.sources, file: UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)}
        report.add("E002", "a character that YAML does not allow", Place(file=file, line=line, column=column),
                   found=f"U+{ord(bad[0]):04X}")  # fmt: skip
        report.raise_if_any()
    return text


def _position(before: str) -> tuple[int, int]:
    lines = LINE.split(before)
    return len(lines), len(lines[-1]) + 1


class _Reader:
    """Events of one file -> tree. Problems after which reading can go on are collected, others end it."""

    def __init__(self, file: str, text: str, report: Report) -> None:
        self.file, self.report = file, report
        self.text = text
        self.events: Iterator[Any] = yaml.parse(text, Loader=LOADER)
        self.anchors: dict[str, tuple[Value, int, int] | None] = {}  # name -> value, values in it, depth below it
        self.count = self.deepest = 0

    def document(self) -> Map:
        try:
            root = self.root()
        except yaml.MarkedYAMLError as error:
            self.syntax(error)
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            self.stop("E002", f"not YAML: {error}".splitlines()[0], Place(file=self.file, line=1, column=1))
        if not isinstance(root, Map):
            self.stop("E103", "a model is a mapping of keys to values", root.place, found=show(root))
        self.report.raise_if_any()
        assert isinstance(root, Map)
        return root

    def root(self) -> Value:
        next(self.events)  # stream start
        event = next(self.events)
        if isinstance(event, yaml.StreamEndEvent):
            self.stop("E102", f"{self.file!r} is empty", Place(file=self.file, line=1, column=1),
                      needed="name, extends, sizes, ...")  # fmt: skip
        root = self.value(next(self.events), 0)
        next(self.events)  # document end
        if isinstance(event := next(self.events), yaml.DocumentStartEvent):
            self.stop("E002", "a second document; one file holds one model", self.place(event))
        return root

    def value(self, event: Any, depth: int) -> Value:
        self.count += 1
        if isinstance(event, yaml.AliasEvent):
            return self.alias(event, depth)
        if event.tag is not None:
            self.stop("E002", f"tags are not used: {event.tag}", self.place(event), likely="remove the tag")
        self.reach(depth, event)
        before, above, self.deepest = self.count, self.deepest, depth
        if event.anchor:
            self.anchors[event.anchor] = None
        result: Value
        if isinstance(event, yaml.ScalarEvent):
            result = self.scalar(event)
        elif isinstance(event, yaml.SequenceStartEvent):
            items = []
            while not isinstance(inner := next(self.events), yaml.SequenceEndEvent):
                items.append(self.value(inner, depth + 1))
            result = List(items=tuple(items), place=self.place(event))
        else:
            result = self.mapping(event, depth)
        if event.anchor:
            self.anchors[event.anchor] = (result, self.count - before + 1, self.deepest - depth)
        self.deepest = max(above, self.deepest)
        self.limit(event)
        return result

    def reach(self, depth: int, event: Any) -> None:
        self.deepest = max(self.deepest, depth)
        if depth > MAX_DEPTH:
            self.stop("E004", TOO_DEEP, self.place(event))

    def alias(self, event: Any, depth: int) -> Value:
        known = self.anchors.get(event.anchor)
        if known is None:
            why = "contains itself" if event.anchor in self.anchors else "has no anchor before it"
            self.stop("E002", f"alias *{event.anchor} {why}", self.place(event))
        assert known is not None
        value, count, below = known
        self.count += count
        self.reach(depth + below, event)
        self.limit(event)
        return value

    def limit(self, event: Any) -> None:
        if self.count > MAX_VALUES:
            self.stop("E004", f"more than {MAX_VALUES} values, aliases expanded", self.place(event))

    def mapping(self, event: Any, depth: int) -> Map:
        items: dict[str, Value] = {}
        keys: dict[str, Place] = {}
        while not isinstance(key := next(self.events), yaml.MappingEndEvent):
            place = self.place(key)
            if not isinstance(key, yaml.ScalarEvent):
                self.stop("E002", "a key must be a plain word", place)
            if key.tag is not None:
                self.stop("E002", f"tags are not used: {key.tag}", place, likely="remove the tag")
            if key.value == "<<":
                self.report.add("E002", "YAML merge keys are not used", place, likely="use `extends`, or a block")
            if key.anchor:
                self.anchors[key.anchor] = (self.scalar(key), 1, 0)
            value = self.value(next(self.events), depth + 1)
            if key.value in keys:
                first = keys[key.value]
                self.report.add("E003", f"'{key.value}' is said twice", place, found=f"first at {first}")
                continue
            items[key.value], keys[key.value] = value, place
        return Map(items=items, keys=keys, place=self.place(event))

    def scalar(self, event: Any) -> Scalar:
        text, place = event.value, self.place(event)
        value: bool | int | float | str | None = text
        if event.style in (None, ""):
            value = self.plain(text, place)
        return Scalar(value=value, text=text, place=place)

    def plain(self, text: str, place: Place) -> bool | int | float | str | None:
        if text in ("", "~", "null"):
            return None
        if text in ("true", "false"):
            return text == "true"
        if INTEGER.fullmatch(text) or REAL.fullmatch(text):
            number = float(text)
            if abs(number) >= 2.0**63:
                self.report.add("E106", "the number is too large", place, found=shorten(text), needed="less than 2^63")
                return 1
            if len(text) > 60:
                self.report.add("E106", f"a number of {len(text)} characters", place, found=shorten(text),
                                needed="at most 60")  # fmt: skip
                return 1
            return int(text) if INTEGER.fullmatch(text) else number
        return text

    def place(self, event: Any) -> Place:
        start, end = event.start_mark, event.end_mark
        same = start.line == end.line and isinstance(event, (yaml.ScalarEvent, yaml.AliasEvent))
        anchor = len(event.anchor) + 2 if same and event.anchor and not isinstance(event, yaml.AliasEvent) else 0
        return Place(
            file=self.file,
            line=start.line + 1,
            column=start.column + 1 + anchor,
            end_column=end.column + 1 if same else 0,
        )

    def syntax(self, error: yaml.MarkedYAMLError) -> None:
        """libyaml's words, made plain for the frequent cases."""
        mark: Any = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        if NESTING.search(error.problem or ""):
            # libyaml's own limit: its scanner reads ahead for the end of a possible key, past the depth that is ours.
            self.stop("E004", TOO_DEEP, Place(file=self.file, line=line, column=column))
        lines = LINE.split(self.text)
        at = lines[line - 1][column - 1 : column] if line <= len(lines) else ""
        problem, likely = (error.problem or "not YAML").replace("did not find expected", "expected"), ""
        if at == "\t":
            problem, likely = "a tab, where YAML wants spaces", "indent with spaces"
        elif "mapping values are not allowed" in problem:
            problem, likely = "a ':' that cannot stand here", "quote a text that holds ': ', or check the indentation"
        elif "cannot start any token" in problem:
            problem, likely = f"a value cannot start with {at!r}", "quote the text"
        elif error.context and error.context not in problem:
            problem = f"{problem} ({error.context})"
        self.stop("E002", f"not YAML: {problem}", Place(file=self.file, line=line, column=column), likely=likely)

    def stop(self, code: str, message: str, place: Place, **more: str) -> None:
        self.report.add(code, message, place, **more)
        raise DiagnosticError(self.report.diagnostics, self.report.sources)
