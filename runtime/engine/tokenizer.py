"""Text to token ids and back, from the checkpoint's own files.

    tokenizer = load_tokenizer(Path("SmolLM2-135M-Instruct"))
    ids = tokenizer.encode(tokenizer.chat([{"role": "user", "content": "Hi"}]), special=False)
    stream = TextStream(tokenizer, stop=("\\n\\n",));  stream.push(token);  stream.finish()

`tokenizer.json` is read by the tokenizers library; a checkpoint with only `tokenizer.model` needs transformers.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from llmc.compiler.checkpoint_files import nature, present, read_object, read_text
from llmc.compiler.diagnostics import UserError
from llmc.runtime.engine.chat import render_chat
from llmc.runtime.foreign import alone, is_failure, no_questions, quiet_transformers

MAX_GROWTH = 1000  # published ones replace a character by one, or by a few; the library ends the process without memory
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
        chat = [_message(message) for message in messages]
        return render_chat(source, {"messages": chat, "add_generation_prompt": True, **self.tokens, **more})


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """As transformers gives it to a template: a key without a value is absent, reasoning has the names of all."""
    said = {key: value for key, value in message.items() if value is not None}
    thought = next((said[key] for key in ("reasoning_content", "thinking", "reasoning") if key in said), None)
    return said if thought is None else {"thinking": thought, **said, "reasoning_content": thought}


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
    if present(path / "tokenizer.json"):
        encode, decode, id_of, special = _fast(path / "tokenizer.json")
    elif present(path / "tokenizer.model"):
        encode, decode, id_of, special = _sentencepiece(path, config)
    else:
        raise UserError(f"{path} holds neither tokenizer.json nor tokenizer.model", hint="--input-ids needs none")
    tokens = _special_tokens(path, config)
    named = {key: id_of(tokens[key]) for key in ("bos_token", "eos_token") if key in tokens}
    bos, eos = named.get("bos_token"), named.get("eos_token")
    return Tokenizer(
        encode=encode,
        decode=decode,
        special_ids=special,
        bos_id=bos if bos is not None else next(iter(_stated(path, "bos_token_id")), None),
        eos_ids=eos_ids(path) or frozenset([] if eos is None else [eos]),
        template=_template(path, config),
        tokens=tokens,
    )


def eos_ids(path: Path) -> frozenset[int]:
    """Tokens that end an answer, as far as the checkpoint's configurations say; no tokenizer is read."""
    return frozenset(_stated(path, "eos_token_id"))


def _stated(path: Path, key: str) -> list[int]:
    """As in transformers (GenerationMixin.adjust_generation_fn): config.json counts only where there is no
    generation_config.json, also if that is silent."""
    for file in (path / "generation_config.json", path / "config.json"):
        if present(file):
            return _ids(read_object(file).get(key), file)
    return []


def _fast(file: Path) -> tuple[Any, Any, Any, frozenset[int]]:
    from tokenizers import Tokenizer as Fast

    with _told(file):
        fast = Fast.from_file(str(file))
        fast.no_padding()
        fast.no_truncation()
        special = {i for i, token in fast.get_added_tokens_decoder().items() if token.special}
        growth = max(_growth(fast.normalizer), _growth(fast.decoder))
    if growth > MAX_GROWTH:
        raise UserError(f"{file}: its replacements make a character {growth} long; more than {MAX_GROWTH} are refused")

    def encode(text: str, special: bool) -> list[int]:
        # The post-processor of tokenizer.json says which tokens are added; like transformers 5, this ignores
        # add_bos_token and add_eos_token of tokenizer_config.json beside it.
        with _told(file):
            return list(fast.encode(text, add_special_tokens=special).ids)

    def decode(ids: list[int]) -> str:
        with _told(file):
            return fast.decode(ids, skip_special_tokens=False)

    return encode, decode, fast.token_to_id, frozenset(special)


def _growth(stage: Any) -> int:
    """The most that the replacements of a normalizer or decoder, one after the other, can make of a character."""
    steps = [] if stage is None else [json.loads(stage.__getstate__())]
    growth = 1
    while steps:
        step = steps.pop()
        growth *= max(1, len(step["content"])) if step.get("type") == "Replace" else 1
        steps += step.get("normalizers", []) + step.get("decoders", [])
    return growth


@contextmanager
def _told(file: Path, read: Path | None = None) -> Iterator[None]:
    """What a library says of a file that it cannot use, as one message; `read` is the name under which it knows it."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not is_failure(error):
            raise
        if other := nature(file):
            raise UserError(f"{file} is {other[0]}", hint=other[1]) from None
        why = str(error).replace(str(read or file), str(file))[:300]
        raise UserError(f"{file} cannot be read: {why or type(error).__name__}") from None


def _sentencepiece(path: Path, config: Mapping[str, Any]) -> tuple[Any, Any, Any, frozenset[int]]:
    file, model = path / "tokenizer.model", _json(path / "config.json")
    for settings, name in ((config, "tokenizer_config.json"), (model, "config.json")):
        found = settings.get("auto_map")
        own = found.get("AutoTokenizer") if isinstance(found, Mapping) else found
        if own and (name != "config.json" or isinstance(found, Mapping)):
            raise UserError(
                f"{path / name}: the tokenizer is Python code that comes with the checkpoint ({str(own)[:80]}), and "
                "such code is never run",
                hint="get the checkpoint with a tokenizer.json, or give token ids (--input-ids)",
            )
    if other := nature(file):
        raise UserError(f"{file} is {other[0]}", hint=other[1])
    try:
        for package in ("sentencepiece", "google.protobuf"):  # transformers asks for tiktoken where one is missing
            importlib.import_module(package)
        import transformers
    except ImportError as error:
        raise UserError(
            f"{path} has tokenizer.model but no tokenizer.json, and reading it needs transformers, sentencepiece and "
            f"protobuf ({error})",
            hint="pip install 'llmc[convert]'",
        ) from None
    named = config.get("tokenizer_class") or model.get("tokenizer_class")
    if named is not None and not _is_tokenizer(transformers, named):
        raise UserError(f"{path}: transformers has no tokenizer of the tokenizer_class {str(named)[:80]!r}")
    small = [path / name for name in ("special_tokens_map.json", "added_tokens.json")]
    with alone(file, *filter(present, small)) as link, no_questions(), quiet_transformers(), _told(file, link):
        about = {"model_type": str(model.get("model_type", "llama"))} | ({"tokenizer_class": named} if named else {})
        kept = {key: value for key, value in config.items() if key not in ("auto_map", "chat_template")}
        (link.parent / "config.json").write_text(json.dumps(about))
        (link.parent / "tokenizer_config.json").write_text(json.dumps(kept))
        slow = transformers.AutoTokenizer.from_pretrained(
            str(link.parent), local_files_only=True, trust_remote_code=False
        )
    return (
        lambda text, special: list(slow.encode(text, add_special_tokens=special)),
        lambda ids: slow.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False),
        slow.convert_tokens_to_ids,
        frozenset(slow.all_special_ids),
    )


def _is_tokenizer(transformers: ModuleType, name: Any) -> bool:
    """Not every class of this name is one: AutoProcessor would look for code again."""
    names = (name, name.removesuffix("Fast"), f"{name}Fast") if isinstance(name, str) else ()
    found = [getattr(transformers, name, None) for name in names]
    return any(isinstance(c, type) and issubclass(c, transformers.PreTrainedTokenizerBase) for c in found)


def _special_tokens(path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, ... as texts; they may be stored as objects. tokenizer_config.json wins."""
    both = {**_json(path / "special_tokens_map.json"), **{k: v for k, v in config.items() if v is not None}}
    texts = {k: v.get("content") if isinstance(v, dict) else v for k, v in both.items() if k.endswith("_token")}
    return {k: v for k, v in texts.items() if isinstance(v, str)}


def _template(path: Path, config: Mapping[str, Any]) -> str | None:
    """A file of its own wins; a list of named templates gives the one called default."""
    file = path / "chat_template.jinja"
    if present(file):
        return read_text(file)
    found = _json(path / "chat_template.json").get("chat_template") or config.get("chat_template")
    if isinstance(found, list):
        named = {e["name"]: e.get("template") for e in found if isinstance(e, dict) and isinstance(e.get("name"), str)}
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
    return read_object(path) if present(path) else {}
