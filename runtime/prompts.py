"""Prompts of a command line: texts, conversations or token ids, from flags or a file, as token ids.

prompts = read_prompts(args)
ids = [encode(prompt, tokenizer, args) for prompt in prompts]
"""

from __future__ import annotations

import argparse
import csv
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from llmc.compiler.diagnostics import UserError
from llmc.compiler.files import Unreadable, parse_json
from llmc.runtime.engine.tokenizer import Tokenizer, load_tokenizer
from llmc.runtime.flags import DEFAULT_QUESTION
from llmc.runtime.session import note

T = TypeVar("T")
Message = dict[str, str]  # {"role": "user", "content": text}
Prompt = str | list[int] | list[Message]


def read_prompts(args: argparse.Namespace) -> list[Prompt]:
    """Texts, or lists of token ids, in the order given."""
    if args.input_ids is not None:
        return [token_ids(text, "--input-ids") for text in args.input_ids]
    if args.input_file is not None:
        return read_input_file(Path(args.input_file))
    return list(args.input_text or [DEFAULT_QUESTION])


def read_input_file(path: Path) -> list[Prompt]:
    """.csv, .npy: a row of token ids a prompt. .jsonl: a prompt or a conversation a line. Else: a question a line."""
    prompts: list[Prompt] = []
    kind = path.suffix.lower()
    try:
        if kind == ".npy":
            return _numpy_prompts(path)
        # Only line feeds end a line: JSON texts may hold U+2028. A byte order mark is what Windows editors leave.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError, EOFError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"--input-file {path} cannot be read: {why}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        match kind:
            case ".csv":
                row = next(csv.reader([line]))
                prompts.append(token_ids(",".join(cell for cell in row if cell.strip()), f"{path}:{number}"))
            case ".jsonl":
                prompts.append(_json_prompt(line, f"{path}:{number}"))
            case _:
                prompts.append(line)
    if not prompts:
        raise UserError(f"--input-file {path} holds no prompt")
    return prompts


def _numpy_prompts(path: Path) -> list[Prompt]:
    import numpy

    array = numpy.load(path, allow_pickle=False)
    if not isinstance(array, numpy.ndarray) or array.dtype.kind not in "iu" or array.ndim not in (1, 2):
        found = f"{array.dtype} {list(array.shape)}" if isinstance(array, numpy.ndarray) else "several arrays"
        raise UserError(f"--input-file {path} must hold one or two axes of whole numbers; found {found}")
    if array.size == 0:
        raise UserError(f"--input-file {path} holds no token ids: its shape is {list(array.shape)}")
    return [row.tolist() for row in array.reshape(-1, array.shape[-1])]


def _json_prompt(line: str, place: str) -> Prompt:
    """A string, token ids, a conversation, or an object with one of them as messages, prompt, text, ..."""
    try:
        value = parse_json(line)
    except Unreadable as error:
        raise UserError(f"{place}: {error}") from None
    if isinstance(value, dict):
        value = next(
            (value[key] for key in ("messages", "prompt", "text", "question", "content") if key in value), None
        )
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and (all(type(v) is int for v in value) or all(map(_is_message, value))):
        return value
    raise UserError(
        f'{place} must be a text, token ids, {{"prompt": text}}, or a conversation '
        f'[{{"role": "user", "content": text}}, ...]; found {line[:60]}'
    )


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def token_ids(text: str, place: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{place} must be token ids with commas between them; found {text[:60]!r}") from None


def replicate(prompts: Sequence[T], batch_size: int | None) -> list[T]:
    """One prompt is repeated; several are their own batch (the original scripts' rule)."""
    if len(prompts) == 1:
        return list(prompts) * (batch_size or 1)
    return list(prompts)


def requests_of(ids: Sequence[Sequence[int]], batch_size: int | None) -> Counter[int]:
    """Tokens of a prompt -> how many of `replicate`'s prompts have so many; nothing is repeated for it."""
    return Counter({len(ids[0]): batch_size or 1}) if len(ids) == 1 else Counter(map(len, ids))


def encode(prompt: Prompt, tokenizer: Tokenizer | None, args: argparse.Namespace) -> list[int]:
    """Token ids. A conversation always goes through the chat template, a text where the flags ask for it."""
    ids = [token for token in prompt if isinstance(token, int)]
    if isinstance(prompt, str) or not ids:
        if tokenizer is None:
            raise UserError("text needs a tokenizer", hint="--input-ids, or leave out --load-tokenizer False")
        if isinstance(prompt, str) and not (args.is_chat_model or args.chat_template or args.system):
            ids = tokenizer.encode(prompt)
        else:
            text = tokenizer.chat(conversation(prompt, args.system), template=template_of(args))
            ids = tokenizer.encode(text, special=False)
    if args.max_input_length and len(ids) > args.max_input_length:
        note(f"a prompt of {len(ids)} tokens is cut to its first {args.max_input_length} (--max-input-length)")
    return ids[: args.max_input_length]


def conversation(prompt: Any, system: str | None) -> list[Message]:
    """The messages for the chat template; a system message of the prompt's own stays."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return messages


def template_of(args: argparse.Namespace) -> str | None:
    """A file's content, or the text itself."""
    text = args.chat_template
    if text and "{" not in text:
        try:
            return Path(text).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise UserError(f"--chat-template {text} cannot be read: {why}") from None
    return text


def prompt_ids(args: argparse.Namespace) -> list[list[int]]:
    """Prompts as token ids, with the checkpoint's tokenizer where one of them is text."""
    prompts = read_prompts(args)
    texts = any(isinstance(prompt, str) or not isinstance(prompt[0], int) for prompt in prompts)
    tokenizer = load_tokenizer(args.model_path) if texts else None
    return [encode(prompt, tokenizer, args) for prompt in prompts]


def shown(prompt: Prompt) -> str:
    """Texts and token ids as they are typed; of a conversation the last message."""
    if isinstance(prompt, str):
        return prompt
    last = prompt[-1]
    return last["content"] if isinstance(last, dict) else ",".join(map(str, prompt))


def as_file(prompts: Sequence[Prompt], folder: Path) -> dict[str, Any]:
    """The flags that give a rank these prompts: stdin and pipes can be read only once."""
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    return {"input_file": str(path), "input_text": None, "input_ids": None}
