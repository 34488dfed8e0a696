"""What the command `sparke` needs before torch is loaded: even then, what fails is one line.

Loading torch takes seconds and hundreds of megabytes. Until it is done nothing of sparke can catch
what happens, a pressed Ctrl-C, say; so `sparke` and ``python -m sparke`` set an exception hook
first. Where sparke is imported as a library, nothing is done.
"""

from __future__ import annotations

import os
import sys
from pathlib import PurePath
from types import TracebackType
from typing import NoReturn

COMMANDS = ("sparke", "-m")
"""Names of the program; the second is that of ``python -m sparke`` while it is being located."""
INTERRUPTED = 130


def is_command() -> bool:
    """Whether this process is the command line."""
    return bool(sys.argv) and PurePath(sys.argv[0]).stem in COMMANDS


def prepare() -> None:
    """Set the hook, and refuse to go on where torch could not."""
    if os.environ.get("SPARKE_TRACEBACK"):
        return
    try:
        os.getcwd()  # noqa: PTH109  Path.cwd() would do the same
    except OSError as error:
        # Libraries that torch loads end the process with a message about themselves.
        _end(f"the current folder cannot be read ({error.strerror}); change to another one.", 1)
    sys.excepthook = _hook


def _hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if hasattr(sys.modules.get("sparke"), "__version__"):  # loaded: what fails now is another's
        sys.__excepthook__(kind, error, trace)
    elif _is_interrupted(error):
        _end("interrupted", INTERRUPTED)
    else:
        said = " ".join(str(error).split())
        _end(f"cannot be loaded: {kind.__name__}: {said} (SPARKE_TRACEBACK=1 shows where)", 1)


def _is_interrupted(error: BaseException) -> bool:
    """Whether Ctrl-C is behind an error; Python and torch raise others in its place."""
    seen: list[BaseException] = []
    ahead: list[BaseException | None] = [error]
    while ahead:
        one = ahead.pop()
        if isinstance(one, KeyboardInterrupt):
            return True
        if one is not None and not any(one is other for other in seen):
            seen.append(one)
            ahead += [one.__cause__, one.__context__]
    return False


def _end(message: str, code: int) -> NoReturn:
    if sys.stderr is not None:
        sys.stderr.write(f"sparke: {message}\n")
        sys.stderr.flush()
    os._exit(code)  # nothing is open yet, and half-loaded libraries need not be asked


if is_command():
    prepare()
