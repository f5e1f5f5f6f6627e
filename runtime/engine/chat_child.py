"""The process that renders chat templates; chat.py starts it as `python -I chat_child.py DIRECTORY ...`.

A template is a program of the checkpoint's author: `{{ 9**(9**9) }}` never ends, `'a' * 10**10` takes all memory. So
it runs where the system ends it: after CPU_SECONDS, or with no more than MEMORY_BYTES, and without a file, socket or
child process even if Jinja's sandbox has a hole. Directories are those of jinja2 and what it needs; the isolated
interpreter sees no other package, and nothing of the directory that the user is in.

Enters on stdin, a line each: {"template": text, "values": object}. Leaves on stdout, a line each: {"text": text},
{"refused": message} (the template's own words, or its syntax) or {"failed": message}.
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

CPU_SECONDS = 1.0  # published templates take milliseconds, also with thousands of messages
MEMORY_BYTES = 1 << 29
# A template writes what it is given, some more than once, and words around it. More would be a flood of tokens.
MAX_TEXT, MAX_GROWTH = 1 << 20, 4
MAX_MESSAGE = 500


def main() -> None:
    sys.path[:0] = sys.argv[1:]
    render = renderer()
    limit()
    for line in sys.stdin.buffer:
        # No handler: the system ends the process, also in the middle of one multiplication.
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        answer = answered(render, line)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


def answered(render: Callable[[str, Mapping[str, Any]], str], line: bytes) -> dict[str, str]:
    import jinja2

    try:
        request = json.loads(line)
        text = render(request["template"], request["values"])
    except jinja2.TemplateSyntaxError as error:
        return {"refused": f"line {error.lineno}: {shown(error.message or '')}"}
    except jinja2.TemplateError as error:
        return {"refused": shown(error.message or type(error).__name__)}
    except MemoryError:
        return {"failed": f"it needs more than {MEMORY_BYTES >> 20} MiB of memory"}
    except Exception as error:  # a template can raise anything
        return {"failed": f"{type(error).__name__}: {shown(str(error))}"}
    if len(text) > (most := MAX_TEXT + MAX_GROWTH * len(line)):
        return {"failed": f"it writes {len(text)} characters; with these messages more than {most} are an error"}
    return {"text": text}


def shown(message: str) -> str:
    """Words of the template on a terminal: not too many, and no control sequences."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in message[:MAX_MESSAGE])


def limit() -> None:
    # What Python and Jinja would open later, they open now.
    time.localtime()
    "".encode("unicode-escape")
    limits = {
        resource.RLIMIT_DATA: MEMORY_BYTES,
        resource.RLIMIT_AS: 4 * MEMORY_BYTES,  # also mapped files, such as a system's table of languages
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: 3,
        resource.RLIMIT_NPROC: 0,
    }
    for name, value in limits.items():
        with contextlib.suppress(ValueError, OSError):  # a system may have its own, lower limits
            resource.setrlimit(name, (value, value))


def renderer() -> Callable[[str, Mapping[str, Any]], str]:
    """Jinja in its sandbox, with what transformers offers to chat templates (utils/chat_template_utils.py there)."""
    # Filters import these when they are used.
    import pprint  # noqa: F401
    import textwrap  # noqa: F401

    import jinja2.constants  # for lipsum
    import jinja2.debug  # for a traceback
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %} marks the answers for training; here it is its content."""

        tags = {"generation"}  # noqa: RUF012  jinja reads a set on the class

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

        def _content(self, caller: Callable[[], str]) -> str:
            return caller()

    class Dict:
        """`dict` without the class itself."""

        def __call__(self, *args: Any, **more: Any) -> dict[Any, Any]:
            return dict(*args, **more)

        def fromkeys(self, *args: Any) -> dict[Any, Any]:
            return dict.fromkeys(*args)

    class Namespace(jinja2.utils.Namespace):
        """`namespace`; names with an underscore in front are Python's."""

        def __init__(*args: Any, **more: Any) -> None:  # `namespace(self=1)` is a template's right
            values = dict(*args[1:], **more)
            for name in values:
                Namespace.check(name)
            jinja2.utils.Namespace.__init__(args[0], values)

        def __setitem__(self, name: str, value: Any) -> None:
            Namespace.check(name)
            super().__setitem__(name, value)

        @staticmethod
        def check(name: Any) -> None:
            if isinstance(name, str) and name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a namespace holds no names with an underscore, such as {name}")

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:  # jinja's own escapes HTML
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    env.globals["dict"] = Dict()
    env.globals["namespace"] = Namespace
    compiled = lru_cache(maxsize=4)(env.from_string)
    return lambda template, values: compiled(template).render(**values)


if __name__ == "__main__":
    main()
