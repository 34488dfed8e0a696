"""The command `sparke`: whatever goes wrong becomes one line and an exit code.

The commands themselves are in ``sparke._cli``, which needs the extra ``sparke[demo]``; this file
does without, so that it can say so.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from sparke.errors import SparkeError

__all__ = ["main"]

USAGE = 2
INTERRUPTED = 130
LONGEST = 400
NARROWEST, WIDEST = 40, 400
"""Columns that tables and help are laid out for; narrower ones would show nothing at all."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; those of the process if None.

    Returns:
        0; 1 after an error, 2 after wrong usage, 130 after Ctrl-C, 143 after SIGTERM. An error is
        one line on stderr. With ``SPARKE_TRACEBACK=1`` in the environment, errors are raised
        instead.
    """
    _open_streams()
    if sys.stdout is None:
        return _fail("stdout is closed; send it somewhere, such as > /dev/null")
    stopped_by: list[int] = []
    try:
        with _stoppable(stopped_by), _laid_out(), _warnings_in_one_line():
            try:
                code = _run(sys.argv[1:] if argv is None else list(argv))
            except SystemExit:  # of rich and click, where a pipe was closed
                _give_up_stdout()
                return _fail("the output was closed before all of it was written.")
            sys.stdout.flush()
            return code
    except KeyboardInterrupt:
        number = stopped_by[0] if stopped_by else int(signal.SIGINT)
        name = "interrupted" if number == signal.SIGINT else f"stopped by signal {number}"
        return _fail(name, 128 + number)
    except Exception as error:  # the last stop before the terminal
        if os.environ.get("SPARKE_TRACEBACK"):
            raise
        return _fail(*_told(error))


def _run(argv: list[str]) -> int:
    try:
        import PIL.Image  # noqa: F401
        import rich.console  # noqa: F401
        import typer
    except ImportError as error:
        return _fail(
            f'the command line needs more ({error}): pip install "sparke[demo]", '
            'or ".[demo]" in a checkout'
        )
    from typer.main import get_command

    from sparke._cli.commands import app

    try:
        code: Any = get_command(app).main(argv, prog_name="sparke", standalone_mode=False)
    except typer.Abort:
        raise KeyboardInterrupt from None
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    return code if isinstance(code, int) else 0


def _told(error: Exception) -> tuple[str, int]:
    """What is said of an error, and the exit code."""
    # typer has a click of its own, or uses click: which one depends on its version.
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "ClickException" in kinds:
        command = getattr(getattr(error, "ctx", None), "command_path", "sparke")
        message = error.format_message().rstrip(".")  # type: ignore[attr-defined]
        return f"{message}. See {command} --help.", USAGE
    if isinstance(error, SparkeError):
        return str(error), 1
    if isinstance(error, MemoryError) or _is_torchs_memory_error(error):
        return "out of memory; ask for less at once (-n, --batch, --size, --capacity)", 1
    if isinstance(error, OSError) and error.filename:
        return f"{error.strerror}: {error.filename}", 1
    if isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.ENOSPC, errno.EIO):
        _give_up_stdout()
        return f"the output cannot be written: {error.strerror}.", 1
    return f"unexpected {type(error).__name__}: {error} (SPARKE_TRACEBACK=1 shows where)", 1


def _is_torchs_memory_error(error: Exception) -> bool:
    text = str(error)
    return isinstance(error, RuntimeError) and ("allocate" in text or "bad_alloc" in text)


def _fail(message: str, code: int = 1) -> int:
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(f"sparke: {_one_line(message)}", file=sys.stderr, flush=True)
    return code


def _one_line(text: str) -> str:
    """`text` without line breaks and control characters, its middle left out where it is long."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if len(line) <= LONGEST:
        return line
    return f"{line[: LONGEST * 2 // 3]} [...] {line[-LONGEST // 3 :]}"


def _open_streams() -> None:
    """Make the standard streams fit for any text, and their numbers unfit for any other file."""
    for number in range(3):
        # Or the next file opened would get the number, and what a library says on stderr.
        if not _is_open(number):
            os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _give_up_stdout() -> None:
    """Let what is still to be written go nowhere, so that Python's end does not fail at it too."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


@contextlib.contextmanager
def _stoppable(seen: list[int]) -> Iterator[None]:
    """SIGTERM and SIGHUP do what Ctrl-C does, so that nothing is left behind; `seen` tells which.

    One that is ignored, or has a handler, stays as it is.
    """

    def stop(number: int, _: object) -> None:
        seen.append(number)
        raise KeyboardInterrupt

    found = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    numbers = [number for number in found if signal.getsignal(number) == signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    for number in numbers:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def _laid_out() -> Iterator[None]:
    """A width that can be read on, whatever the terminal and the environment say."""
    before = {name: os.environ.get(name) for name in ("COLUMNS", "TERMINAL_WIDTH")}
    width = min(max(shutil.get_terminal_size().columns, NARROWEST), WIDEST)
    os.environ["COLUMNS"] = str(width)
    os.environ.pop("TERMINAL_WIDTH", None)  # typer's own name for it, which it reads at import
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        _fail(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


if __name__ == "__main__":
    sys.exit(main())
