"""What a shell offers at the TAB key: commands, flags, and the names that flags take, as they are installed now.

    eval "$(register-python-argcomplete llmc)"        # bash and zsh; in ~/.bashrc it is there in every shell

At each TAB the shell starts `llmc` with _ARGCOMPLETE set, and argcomplete answers from the parser instead of running
it. Nothing is generated beforehand, so a new model, device or fusion is offered at once; `llmc` itself imports none of
this otherwise.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import argcomplete
from argcomplete.completers import DirectoriesCompleter, FilesCompleter, SuppressCompleter

from llmc.compiler.atb.collective import DEVICE_COUNT
from llmc.compiler.diagnostics import UserError
from llmc.compiler.language.build import load_model
from llmc.compiler.language.source import catalogue
from llmc.compiler.ops import OPS
from llmc.compiler.passes.fuse import FUSIONS
from llmc.compiler.passes.phase import LOGITS
from llmc.compiler.pipeline import PASS_NAMES
from llmc.compiler.target.device import DTYPES, device, device_names

Values = Callable[..., Iterable[str]]


def models(prefix: str, **_: Any) -> list[str]:
    return [*catalogue(), *FilesCompleter(("yaml", "yml"))(prefix)]


def sides(prefix: str, **_: Any) -> list[str]:
    """Of `llmc diff`: artifacts are directories."""
    return [*models(prefix), *DirectoriesCompleter()(prefix)]


def fusions(prefix: str, **_: Any) -> list[str]:
    """The last of a comma separated list, each once."""
    given = prefix.split(",")[:-1]
    return [",".join([*given, name]) for name in (*FUSIONS, *([] if given else ["none"])) if name not in given]


def backends(parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """Of the device that stands before, else of any."""
    known = device_names()
    chosen = [parsed_args.device] if parsed_args.device in known else known
    return list(dict.fromkeys(backend for name in chosen for backend in device(name).backends))


def nodes(parsed_args: argparse.Namespace, **_: Any) -> Iterable[str]:
    try:
        return load_model(parsed_args.graph, parsed_args.allow_extends).graph.by_name
    except UserError:
        return ()


# Where argparse keeps the value -> what it may be. What is not here is a number, or words of the user's own.
VALUES: Mapping[str, Values] = {
    "graph": models,
    "a": sides,
    "b": sides,
    "node": nodes,
    "name": lambda **_: OPS,  # `llmc ops`; that of `llmc init` is the user's
    "device": lambda **_: device_names(),
    "dtype": lambda **_: DTYPES,
    "attention": lambda **_: sorted({a for d in device_names() for a in device(d).attention}),
    "logits": lambda **_: LOGITS,
    "golden_from": lambda **_: ("llmc", "transformers"),
    "backend": backends,
    "tp": lambda **_: map(str, range(1, DEVICE_COUNT + 1)),
    "fuse": fusions,
    "until": lambda **_: PASS_NAMES,
    **dict.fromkeys(
        ("model_path", "artifact", "cache_dir", "allow_extends", "golden", "golden_out", "data"),
        DirectoriesCompleter(),
    ),
    **dict.fromkeys(("output", "html", "source", "input_file", "text", "chat_template"), FilesCompleter()),
    **dict.fromkeys(("times", "csv", "debug_csv", "formatted", "chrome"), FilesCompleter()),
}


def complete(make_parser: Callable[[Sequence[str]], argparse.ArgumentParser], commands: Iterable[str]) -> None:
    """Answer the shell and end the process."""
    words = os.environ["COMP_LINE"].split()
    command = next((word for word in words[1:] if word in commands), "")
    parser = make_parser([command] if command else [])
    flags = set()
    for action in actions(parser):
        flags |= set(action.option_strings)
        own_word = action.dest == "name" and action.option_strings
        if not own_word and (values := VALUES.get(action.dest)):
            action.completer = values  # type: ignore[attr-defined]
    # The second spelling of a flag (--model_path) is offered to who has begun to write it.
    second = [] if "_" in words[-1] else [flag for flag in flags if flag.replace("_", "-") in flags - {flag}]
    argcomplete.autocomplete(
        parser, always_complete_options="long", default_completer=SuppressCompleter(), exclude=second
    )


def actions(parser: argparse.ArgumentParser) -> Iterable[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from actions(below)
