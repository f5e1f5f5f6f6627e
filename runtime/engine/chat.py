"""Chat templates: enters a Jinja template and messages, leaves the text for the tokenizer.

    render_chat("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}", {"messages": [...]})

A template is foreign code; a process of its own, with limits, renders it (chat_child.py). It starts with the first
template (0.1 s) and serves the next ones in well under a millisecond.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmc.compiler.diagnostics import UserError
from llmc.runtime.engine.chat_child import CPU_SECONDS

# Its processor time is limited; this is for a process that gets none. A machine may be very busy.
WAIT_SECONDS = 60


def render_chat(template: str, values: Mapping[str, Any]) -> str:
    """As transformers renders it: `tools` and `documents` are None where there are none, and of what JSON cannot say a
    template sees the name of its type. UserError for a template that refuses, fails, or takes too much."""
    request = {"template": template, "values": {"tools": None, "documents": None, **values}}
    try:
        line = json.dumps(request, default=_plain).encode() + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"the messages cannot be given to a chat template: {error}") from None
    answer = CHILD.ask(line)
    if "refused" in answer:
        raise UserError(
            f"the chat template refuses these messages: {answer['refused']}", hint="--chat-template, or no --chat"
        )
    if "failed" in answer:
        raise UserError(
            f"the chat template fails: {answer['failed']}", hint="--chat-template FILE with another one, or no --chat"
        )
    return answer["text"]


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else f"<{type(value).__name__}>"


class Child:
    """The process, started when it is needed; one request at a time."""

    def __init__(self) -> None:
        self._forget()
        atexit.register(self.end)
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: bytes) -> dict[str, str]:
        with self._lock:
            process = self._started()
            assert process.stdin
            try:
                process.stdin.write(request)
                process.stdin.flush()
                answer = read_line(process, time.monotonic() + WAIT_SECONDS)
            except BrokenPipeError:
                answer = b""
            except BaseException:  # an interrupt: its answer would be taken for the next one's
                self.end()
                raise
            if not answer:
                return {"failed": self._why_ended()}
            return json.loads(answer)

    def end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with process:
                process.kill()

    def _why_ended(self) -> str:
        assert self._process
        try:
            ended = self._process.wait(1)  # its output ends a little before it
        except subprocess.TimeoutExpired:
            return f"no answer within {WAIT_SECONDS} seconds"
        finally:
            self.end()
        if ended == -signal.SIGPROF:
            return f"it takes more than {CPU_SECONDS:g} s of processor time"
        name = signal.Signals(-ended).name if -ended in set(signal.Signals) else f"code {ended}"
        return f"the process that rendered it ended with {name}"

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            import jinja2
            import markupsafe

            packages = {str(Path(str(module.__file__)).parents[1]) for module in (jinja2, markupsafe)}
            command = [sys.executable, "-I", str(Path(__file__).with_name("chat_child.py")), *sorted(packages)]
            # A session of its own: an interrupt from the terminal is for this process alone.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        return self._process


def read_line(process: subprocess.Popen[bytes], until: float) -> bytes:
    """Up to a line feed; b"" when the process ends, or the time does."""
    assert process.stdout
    waiting = select.poll()
    waiting.register(process.stdout, select.POLLIN)
    parts: list[bytes] = []
    while not (parts and parts[-1].endswith(b"\n")):
        if not waiting.poll(max(0.0, until - time.monotonic()) * 1000):
            return b""
        part = os.read(process.stdout.fileno(), 1 << 16)
        if not part:
            return b""
        parts.append(part)
    return b"".join(parts)


CHILD = Child()
