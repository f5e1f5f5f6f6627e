"""Libraries that read a checkpoint for us see the files that we give them, and nothing else; and they ask nobody.

transformers follows a checkpoint's `auto_map` to Python files, beside it or on the Hub, and asks on stdin whether to
run them; a `tokenizer_class` leads it to loaders that ask again. What is piped into `llmc` would be the answer. So it
gets a directory with links to data files and settings without such keys, and stdin is empty while it works.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def alone(*files: Path) -> Iterator[Path]:
    """A directory that holds links to these files only; yields the first link. It ends with the context."""
    with tempfile.TemporaryDirectory(prefix="llmc-") as folder:
        for file in files:
            (Path(folder) / file.name).symlink_to(file.resolve())
        yield Path(folder) / files[0].name


@contextlib.contextmanager
def no_questions() -> Iterator[None]:
    """stdin is empty for Python and for native code. What the caller has not read yet is still there afterwards."""
    try:
        saved = os.dup(0)
    except OSError:  # closed by `<&-`
        saved = None
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    before, sys.stdin = sys.stdin, io.StringIO()
    try:
        yield
    finally:
        sys.stdin = before
        if null != 0:
            os.close(null)
        if saved is None:
            os.close(0)
        else:
            os.dup2(saved, 0)
            os.close(saved)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No warnings about files of which we say ourselves what is wrong, and no bars beside ours."""
    from transformers.utils import logging as transformers_logging

    logger = logging.getLogger("transformers")
    level, bars = logger.level, transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()


def is_failure(error: BaseException) -> bool:
    """Whether a library gave up, and not the user. Panics of the ones in Rust are no `Exception`."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"
