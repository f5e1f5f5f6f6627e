"""Text to token ids and back, from the checkpoint's own files.

    tokenizer = load_tokenizer(Path("SmolLM2-135M-Instruct"))
    ids = tokenizer.encode(tokenizer.chat([{"role": "user", "content": "Hi"}]), special=False)
    stream = TextStream(tokenizer, stop=("\\n\\n",));  stream.push(token);  stream.finish()

`tokenizer.json` is read by the tokenizers library; a checkpoint with only `tokenizer.model` needs transformers.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from llmc.compiler.diagnostics import UserError

REPLACEMENT = "\ufffd"  # what decoders print for bytes that are not yet, or never, a character


class Tokenizer:
    """Encoding, decoding and the chat template of one checkpoint. Made by `load_tokenizer`."""

    def __init__(
        self,
        *,
        encode: Callable[[str, bool], list[int]],
        decode: Callable[[list[int]], str],
        special_ids: frozenset[int],
        bos_id: int | None,
        eos_ids: frozenset[int],
        template: str | None,
        tokens: Mapping[str, str],
    ) -> None:
        self._encode, self._decode = encode, decode
        self.special_ids, self.bos_id, self.eos_ids = special_ids, bos_id, eos_ids
        self.template, self.tokens = template, tokens

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """`special`: with the tokens that the checkpoint puts around a text. Chat templates write their own."""
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
            raise UserError(f"the text {text[:60]!r} is not Unicode: {error.reason}") from None
        return self._encode(text, special)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        return self._decode([i for i in ids if not (skip_special and i in self.special_ids)])

    def chat(self, messages: Sequence[Mapping[str, Any]], *, template: str | None = None, **more: Any) -> str:
        """The conversation as one text that ends where the answer begins."""
        source = template or self.template
        if source is None:
            raise UserError("the checkpoint has no chat template", hint="--chat-template FILE, or leave out --chat")
        values = {"messages": list(messages), "add_generation_prompt": True, **self.tokens, **more}
        return render_chat(source, values)


class TextStream:
    """Tokens in, text out as soon as it is certain: no half character, nothing that may still become a stop string."""

    def __init__(
        self, tokenizer: Tokenizer, *, stop: Sequence[str] = (), skip_special: bool = True, include_stop: bool = False
    ) -> None:
        self._tokenizer, self._stop, self._include_stop = tokenizer, tuple(stop), include_stop
        self._skip = tokenizer.special_ids if skip_special else frozenset()
        self._ids: list[int] = []  # the tail that decoding still depends on
        self._shown = 0  # tokens of the tail whose text is out
        self._held = ""  # decoded text that may be the start of a stop string
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that this token makes certain; "" when none."""
        if token in self._skip or self.stopped:
            return ""
        self._ids.append(token)
        return self._emit(self._decode_tail(final=False), final=False)

    def finish(self) -> str:
        """What was held back; call once, after the last token."""
        return "" if self.stopped else self._emit(self._decode_tail(final=True), final=True)

    def _decode_tail(self, *, final: bool) -> str:
        # A token's text depends on its neighbours (leading spaces, bytes of one character), so decode with and without.
        before = self._tokenizer.decode(self._ids[: self._shown], skip_special=False)
        after = self._tokenizer.decode(self._ids, skip_special=False)
        if not final and after.endswith(REPLACEMENT):
            return ""
        self._ids, self._shown = self._ids[self._shown :], len(self._ids) - self._shown
        return after[len(before) :]

    def _emit(self, new: str, *, final: bool) -> str:
        text = self._held + new
        ends = [(at, -len(s), s) for s in self._stop if (at := text.find(s)) >= 0]
        if ends:
            at, _, stop = min(ends)
            text, self._held, self.stopped = text[: at + len(stop) * self._include_stop], "", True
        else:
            keep = 0 if final else max((_overlap(text, s) for s in self._stop), default=0)
            text, self._held = text[: len(text) - keep], text[len(text) - keep :]
        self.text += text
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


# ---- reading a checkpoint


def load_tokenizer(path: Path | str) -> Tokenizer:
    path = Path(path)
    config = _json(path / "tokenizer_config.json")
    if (path / "tokenizer.json").exists():
        encode, decode, id_of, special = _fast(path)
    elif (path / "tokenizer.model").exists():
        encode, decode, id_of, special = _sentencepiece(path)
    else:
        raise UserError(f"{path} holds neither tokenizer.json nor tokenizer.model", hint="--input-ids needs none")
    tokens = _special_tokens(path, config)
    eos = set(eos_ids(path))
    eos |= {i for i in [id_of(tokens["eos_token"])] if i is not None} if "eos_token" in tokens else set()
    bos = _stated(path, "bos_token_id")
    bos_id = id_of(tokens["bos_token"]) if "bos_token" in tokens else None
    return Tokenizer(
        encode=encode,
        decode=decode,
        special_ids=special,
        bos_id=bos_id if bos_id is not None else next(iter(bos), None),
        eos_ids=frozenset(eos),
        template=_template(path, config),
        tokens=tokens,
    )


def eos_ids(path: Path) -> frozenset[int]:
    """Tokens that end an answer, as far as the checkpoint's two configurations say; no tokenizer is read."""
    return frozenset(_stated(path, "eos_token_id"))


def _stated(path: Path, key: str) -> list[int]:
    files = (path / "generation_config.json", path / "config.json")
    return [i for file in files for i in _ids(_json(file).get(key), file)]


def _fast(path: Path) -> tuple[Any, Any, Any, frozenset[int]]:
    from tokenizers import Tokenizer as Fast

    try:
        fast = Fast.from_file(str(path / "tokenizer.json"))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path / 'tokenizer.json'} cannot be read: {error}") from None
    fast.no_padding()
    fast.no_truncation()

    def encode(text: str, special: bool) -> list[int]:
        # The post-processor of tokenizer.json says which tokens are added; like transformers 5, this ignores
        # add_bos_token and add_eos_token of tokenizer_config.json beside it.
        return list(fast.encode(text, add_special_tokens=special).ids)

    special = {i for i, token in fast.get_added_tokens_decoder().items() if token.special}
    return encode, lambda ids: fast.decode(ids, skip_special_tokens=False), fast.token_to_id, frozenset(special)


def _sentencepiece(path: Path) -> tuple[Any, Any, Any, frozenset[int]]:
    try:
        for package in ("sentencepiece", "google.protobuf"):  # transformers asks for tiktoken where one is missing
            importlib.import_module(package)
        from transformers import AutoTokenizer

        slow = AutoTokenizer.from_pretrained(str(path))
    except ImportError as error:
        raise UserError(
            f"{path} has tokenizer.model but no tokenizer.json, and reading it needs transformers, sentencepiece and "
            f"protobuf ({error})",
            hint="pip install 'llmc[convert]'",
        ) from None
    except Exception as error:  # transformers raises many kinds for a damaged file
        raise UserError(f"{path / 'tokenizer.model'} cannot be read: {error}") from None
    return (
        lambda text, special: list(slow.encode(text, add_special_tokens=special)),
        lambda ids: slow.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False),
        slow.convert_tokens_to_ids,
        frozenset(slow.all_special_ids),
    )


def _special_tokens(path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, ... as texts; they may be stored as objects. tokenizer_config.json wins."""
    both = {**_json(path / "special_tokens_map.json"), **{k: v for k, v in config.items() if v is not None}}
    texts = {k: v.get("content") if isinstance(v, dict) else v for k, v in both.items() if k.endswith("_token")}
    return {k: v for k, v in texts.items() if isinstance(v, str)}


def _template(path: Path, config: Mapping[str, Any]) -> str | None:
    """A file of its own wins; a list of named templates gives the one called default."""
    file = path / "chat_template.jinja"
    if file.exists():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read: {error}") from None
    found = _json(path / "chat_template.json").get("chat_template") or config.get("chat_template")
    if isinstance(found, list):
        named = {e.get("name"): e.get("template") for e in found if isinstance(e, dict)}
        found = named.get("default") or next(iter(named.values()), None)
    if found is not None and not isinstance(found, str):
        raise UserError(f"the chat_template of {path} must be text, or a list of named texts; found {str(found)[:60]}")
    return found


def _ids(value: Any, file: Path) -> list[int]:
    """eos_token_id and bos_token_id: absent, a number, or a list of numbers."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(i) is not int for i in ids):
        raise UserError(f"{file}: an end or start token must be an id or a list of ids; found {str(value)[:60]}")
    return ids


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object; found {type(value).__name__}")
    return value


# ---- chat templates


def render_chat(template: str, values: Mapping[str, Any]) -> str:
    """Jinja in its sandbox, with the helpers that chat templates of the Hub expect. Templates are foreign code."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %} marks the answers for training; here it is its content."""

        tags = {"generation"}  # noqa: RUF012  jinja reads a set on the class

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **more: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **more)  # jinja's own escapes HTML

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return env.from_string(template).render(**values)
    except jinja2.TemplateError as error:
        raise UserError(
            f"the chat template refuses these messages: {error}", hint="--chat-template, or no --chat"
        ) from None
    except (TypeError, ValueError, KeyError, ZeroDivisionError, OverflowError) as error:
        raise UserError(f"the chat template fails: {type(error).__name__}: {error}") from None
