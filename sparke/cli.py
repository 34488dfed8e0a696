"""The command `sparke`: whatever goes wrong becomes one line and an exit code.

The commands themselves are in ``sparke._cli``, which needs the extra ``sparke[demo]``; this file
does without, so that it can say so.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from sparke.errors import SparkeError

__all__ = ["main"]

USAGE = 2
INTERRUPTED = 130
LONGEST = 400


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; those of the process if None.

    Returns:
        0; 1 after an error, 2 after wrong usage, 130 after Ctrl-C. An error is one line on stderr.
        With ``SPARKE_TRACEBACK=1`` in the environment, errors are raised instead.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        import PIL.Image  # noqa: F401
        import rich.console  # noqa: F401
        import typer
    except ImportError as error:
        return _fail(f'the command line needs more ({error}): pip install "sparke[demo]"')
    # typer has a click of its own, or uses click: which one depends on its version.
    click_error: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
    try:
        with _warnings_in_one_line():
            return _run(sys.argv[1:] if argv is None else list(argv))
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", INTERRUPTED)
    except Exception as error:  # the last stop before the terminal
        if os.environ.get("SPARKE_TRACEBACK"):
            raise
        if isinstance(error, click_error):
            command = getattr(getattr(error, "ctx", None), "command_path", "sparke")
            message = error.format_message().rstrip(".")
            return _fail(f"{message}. See {command} --help.", USAGE)
        if isinstance(error, SparkeError):
            return _fail(str(error))
        if isinstance(error, OSError) and error.filename:
            return _fail(f"{error.strerror}: {error.filename}")
        if isinstance(error, MemoryError):
            return _fail("out of memory; ask for less at once (-n, --batch, --capacity)")
        return _fail(f"unexpected {type(error).__name__}: {error} (SPARKE_TRACEBACK=1 shows where)")


def _run(argv: list[str]) -> int:
    from typer.main import get_command

    from sparke._cli.commands import app

    code: Any = get_command(app).main(argv, prog_name="sparke", standalone_mode=False)
    if code == INTERRUPTED:
        return _fail("interrupted", INTERRUPTED)
    return code if isinstance(code, int) else 0


def _fail(message: str, code: int = 1) -> int:
    print(f"sparke: {_one_line(message)}", file=sys.stderr)
    return code


def _one_line(text: str) -> str:
    """`text` without line breaks and control characters, its middle left out where it is long."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if len(line) <= LONGEST:
        return line
    return f"{line[: LONGEST * 2 // 3]} [...] {line[-LONGEST // 3 :]}"


@contextlib.contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"sparke: warning: {_one_line(str(message))}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


if __name__ == "__main__":
    sys.exit(main())
