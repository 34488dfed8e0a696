"""Commands as processes: what they find missing, closed, full or gone."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

import pytest

from sparke.memory import RingMemory
from tests.cli.common import process, refused, tree

MISSING = """
import sys
sys.modules[sys.argv[1]] = None
sys.argv[1:] = sys.argv[2:]
from sparke.cli import main
sys.exit(main())
"""


@pytest.mark.parametrize(
    ("missing", "extra"),
    [
        ("typer", 'pip install "sparke[demo]"'),
        ("rich", 'pip install "sparke[demo]"'),
        ("PIL", 'pip install "sparke[demo]"'),
        ("k_diffusion", 'pip install "sparke[k-diffusion]"'),
    ],
)
def test_a_missing_extra_is_named(missing: str, extra: str, tmp_path: Path) -> None:
    argv = (missing, "demo", "--out", str(tmp_path / "demo"))
    refused(process(*argv, start=("-c", MISSING)), extra, code=1)
    assert list(tmp_path.iterdir()) == []


def test_the_module_runs_and_the_host_is_quiet(tmp_path: Path) -> None:
    argv = ["generate", "pizza", "-n", "1", "--steps", "1", "--out", str(tmp_path)]
    code, _, err = process(*argv, env={"PYTHONIOENCODING": "ascii"})
    assert (code, err) == (0, "")
    assert (tmp_path / "pizza-0001.png").exists()


posix = pytest.mark.skipif(os.name != "posix", reason="of POSIX systems")
DRAW = ("generate", "pizza", "-n", "2", "--steps", "1", "--memory", "bank")


@posix
def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    import resource

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    # Python looks for a folder to make bytecode and caches in, and finds none.
    done = process(*DRAW, cwd=tmp_path, preexec_fn=full, env={"PYTHONDONTWRITEBYTECODE": "1"})
    refused(done, "File too large", code=1)
    assert tree(tmp_path) == {}


@posix
@pytest.mark.parametrize("where", ["closed", "full", "a broken pipe"])
def test_output_that_goes_nowhere(where: str, tmp_path: Path) -> None:
    if where == "closed":
        done = process("scores", stdout=None, preexec_fn=lambda: os.close(1))
        refused(done, "stdout is closed", code=1)
    elif where == "full":
        with Path("/dev/full").open("w") as full:
            refused(process("scores", stdout=full), "No space left", code=1)
    else:
        reading, writing = os.pipe()
        os.close(reading)
        code, _, err = process("scores", stdout=writing)
        os.close(writing)
        assert code == 1
        assert err.count("\n") <= 1
        assert "Traceback" not in err
        assert "Exception" not in err


@posix
def test_nothing_is_said_in_a_file_where_stderr_is_closed(tmp_path: Path) -> None:
    """The first file opened would get the number of stderr, and what a library writes there."""
    code, out, _ = process(*DRAW, cwd=tmp_path, stderr=None, preexec_fn=lambda: os.close(2))
    assert code == 0
    assert "0 -> 2" in out
    assert len(RingMemory.load(tmp_path / "bank")) == 2


@posix
def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    """torch's libraries would end the process with a word of their own."""
    gone = "import os, sys; os.rmdir(os.getcwd()); import runpy; sys.argv = ['sparke', 'scores']; "
    gone += "runpy.run_module('sparke', run_name='__main__', alter_sys=True)"
    (tmp_path / "gone").mkdir()
    refused(process(start=("-c", gone), cwd=tmp_path / "gone"), "current folder", code=1)


LOADING = """
import sys
class Torch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            {error}
sys.meta_path.insert(0, Torch())
sys.argv = {argv}
import sparke
"""


@pytest.mark.parametrize("argv", [["-m", "demo"], ["/usr/bin/sparke", "demo"], ["sparke.exe"]])
@pytest.mark.parametrize(
    ("error", "said", "code"),
    [
        ("raise KeyboardInterrupt", "interrupted", 130),
        ("raise RuntimeError('__set_name__') from KeyboardInterrupt()", "interrupted", 130),
        (
            "\n".join(
                (
                    "try: raise KeyboardInterrupt",
                    "            except KeyboardInterrupt: raise SystemError from None",
                )
            ),
            "interrupted",
            130,
        ),
        ("raise ImportError('failed to map segment')", "cannot be loaded: ImportError", 1),
        ("raise MemoryError from ValueError()", "cannot be loaded: MemoryError", 1),
    ],
)
def test_what_fails_while_torch_is_loaded_is_one_line(
    error: str, said: str, code: int, argv: list[str]
) -> None:
    source = LOADING.format(error=error, argv=argv)
    status, out, err = process(start=("-c", source))
    assert (status, out) == (code, "")
    assert err.startswith(f"sparke: {said}")
    assert err.count("\n") == 1


def test_a_program_of_others_sees_the_whole_error() -> None:
    source = LOADING.format(error="raise ImportError('no torch')", argv=["theirs.py"])
    code, _, err = process(start=("-c", source))
    assert code == 1
    assert "Traceback" in err


@posix
@pytest.mark.parametrize(
    ("argv", "terminal"),
    [(DRAW, True), (("demo", "pizza", "-n", "2", "--steps", "2"), True), (DRAW, False)],
)
def test_progress_is_shown_on_a_terminal_only(
    argv: tuple[str, ...], terminal: bool, tmp_path: Path
) -> None:
    import pty

    ours, theirs = pty.openpty() if terminal else os.pipe()
    said: list[bytes] = []

    def listen() -> None:
        """A terminal holds a few kilobytes, and who writes more waits until they are read."""
        with contextlib.suppress(OSError):  # how a terminal ends whose other side was closed
            while heard := os.read(ours, 1 << 16):
                said.append(heard)

    listener = threading.Thread(target=listen)
    listener.start()
    env = {"TERM": "xterm", "FORCE_COLOR": "1", "COLUMNS": "80"}
    code, _, _ = process(*argv, cwd=tmp_path, stderr=theirs, env=env)
    os.close(theirs)
    listener.join()
    os.close(ours)
    shown = b"".join(said).decode()
    assert code == 0
    assert ("loading" in shown) == terminal
    assert ("writing" in shown) == terminal
