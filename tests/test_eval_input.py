"""`sparke eval` given what is wrong, missing, damaged, huge or hostile: one line, no files."""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.eval_pictures import Run, command, folder, picture, refused, tree

ROOT = Path(__file__).parents[1]
PIXELS = ("--encoder", "pixels")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `sparke eval` in a folder with two small sets; nothing may be written."""
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "A", ["x"], 6)
    folder(tmp_path / "B", ["x"], 6, first=50)

    def call(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        before = tree(tmp_path)
        code = command(*argv)
        done = code, *capsys.readouterr()
        if code:
            assert tree(tmp_path) == before
        return done

    return call


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "SET"),
        (["nowhere"], "'nowhere' is not there"),
        (["A", "A"], "given twice"),
        (["A", "./A/"], "given twice"),
        (["A", "B", "c", "d", "e", "f", "g"], "at most 6"),
        (["empty"], "0 pictures"),
        (["one"], "1 picture and"),
        (["text.txt"], "is a file"),
        (["\0"], "null byte"),
        ([""], "it is empty"),
        (["A", "--report", " "], "it is empty"),
        (["A", "--prompts", ""], "it is empty"),
        (["long" * 2000], "File name too long"),
        (["\udcff"], "is not there"),
        (["A", "--reference", "empty"], "0 pictures"),
        (["A", "--reference", "nowhere"], "not there"),
        (["A", "--encoder", ""], "not known"),
        (["A", "--encoder", "clip"], "Known are pixels"),
        (["A", "--encoder", "pixels:"], "not known"),
        (["A", "--encoder", "os:nothing"], "has no 'nothing'"),
        (["A", "--encoder", "os:sep"], "cannot be called"),
        (["A", "--encoder", "no_such_module:f"], "No module named"),
        (["A", "--encoder", "nowhere.py:f"], "no file"),
        (["A", "--encoder", "text.py:f"], "importing text.py failed: SyntaxError"),
        (["A", "--encoder", "builtins:list"], "is a class"),
        (["A", "--encoder", "builtins:len"], "must return a tensor (6, width)"),
        (["A", "--encoder", "builtins:abs", "--image-size", "4"], "must return a tensor"),
        (["A", "--encoder", "pixels", "--image-size", "4"], "would go nowhere"),
        (["A", "--text-encoder", "x.py:f"], "none are given"),
        (["A", "--prompts-from-names", "--text-encoder", "pixels", *PIXELS], "not known"),
        (["A", "--kernel", "linear"], "--kernel"),
        (["A", "--bandwidth", "0"], "--bandwidth"),
        (["A", "--bandwidth", "nan"], "--bandwidth"),
        (["A", "--bandwidth", "inf"], "--bandwidth"),
        (["A", "--nearest", "0"], "--nearest"),
        (["A", "--batch", "0"], "--batch"),
        (["A", "--pairs", "-1"], "--pairs"),
        (["A", "--per-prompt", "0"], "--per-prompt"),
        (["A", "--per-prompt", "1"], "diversity needs two"),
        (["A", "--device", "toaster"], "--device 'toaster'"),
        (["A", "--device", ""], "--device"),
        (["A", "--report", "A"], "is a folder"),
        (["A", "--report", "text.txt"], "--force"),
        (["A", "--report", "text.txt/below", "--no-report"], "one will do"),
        (["A", "--report", "text.txt/below"], "text.txt is a file"),
        (["A", "--report", "/proc/nothing.html"], "cannot write"),
        (["A", "--report", "long" * 1000], "cannot write"),
        (["A", "--report", "\0"], "null byte"),
        (["A", "--json", "text.txt"], "--force"),
        (["A", "--json", "x", "--report", "x"], "give two files"),
        (["A", "--prompts", "p.csv", "--prompts-from-names"], "one will do"),
        (["A", "B", *["--prompts", "p.csv"] * 3], "3 times for 2 sets"),
        (["A", "--prompts", "nowhere.csv"], "cannot be read"),
        (["A", "--prompts", "A"], "cannot be read"),
        (["A", "--prompts", "\0"], "null byte"),
        (["named", "--prompts-from-names"], "no prompt can be read from the name 'cat.png'"),
        (["A", "--no-such-option"], "--no-such-option"),
    ],
)
def test_bad_arguments(argv: list[str], said: str, run: Run, tmp_path: Path) -> None:
    for name in ("empty", "empty/inside"):
        (tmp_path / name).mkdir()
    (tmp_path / "text.txt").write_text("mine")
    (tmp_path / "text.py").write_text("def f(:")
    picture(tmp_path / "one" / "x.png", 1)
    picture(tmp_path / "named" / "dog.png", 1)
    picture(tmp_path / "named" / "cat.png", 2)
    # Chosen, so that the only line on stderr is the error.
    chosen = [] if "--encoder" in argv else [*PIXELS]
    numbered = (
        []
        if any("prompts" in word or word == "--text-encoder" for word in argv)
        else ["--prompts-from-names"]
    )
    refused(run(*argv, *chosen, *numbered), said)


NAMES = [f"x-{i:04d}.png" for i in range(1, 7)]
GOOD = "".join(f"{name},dog\n" for name in NAMES)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (GOOD.encode(), "needs a header with the columns file and prompt"),
        (f"file;prompt\n{GOOD}".encode(), "'file;prompt'"),
        (f"name,prompt\n{GOOD}".encode(), "needs a header"),
        (f"file,words\n{GOOD}".encode(), "needs a header"),
        (f"file,prompt\n{GOOD[:-15]}".encode(), "no line for 1 of 6 pictures: A/x-0006.png"),
        (b"file,prompt\n", "no line for 6 of 6"),
        (f"file,prompt\n{GOOD}typo.png,dog\n".encode(), "nowhere: typo.png (line 8)"),
        (f"file,prompt\n{GOOD}x-0001.png,cat\n".encode(), "two things of 'x-0001.png'"),
        (f"file,prompt\n{GOOD}x-0001.png\n".encode(), "1 cells in line 8 and 2 titles"),
        (b"file,prompt\nx-0001.png,a dog, sitting\n", "in quotes"),
        (f"file,prompt\n{GOOD}x-0001.png,  \n".encode(), "empty cell in line 8"),
        (f"file,prompt\n{GOOD},dog\n".encode(), "empty cell"),
        ("file,prompt\nx-0001.png,é\n".encode("latin-1"), "not UTF-8 (byte 23)"),
        ("file,prompt\nx-0001.png,dog\n".encode("utf-16"), "not UTF-8"),
        (bytes(range(256)) * 40, "not UTF-8"),
        (b'file,prompt\n"x-0001.png,dog\n', "no csv file"),
        (b'file,prompt\nx-0001.png,"dog" cat\n', "no csv file"),
        (b"file,prompt\nx-0001.png," + b"d" * 200_000 + b"\n", "no csv file"),
        (b"file,prompt\n../\0/x,dog\n", "no line for 6"),
    ],
)
def test_tables_that_are_none(table: bytes, said: str, run: Run) -> None:
    Path("p.csv").write_bytes(table)
    refused(run("A", *PIXELS, "--prompts", "p.csv"), said)


def test_a_table_of_labels_names_its_own_column(run: Run) -> None:
    Path("l.csv").write_text(f"file,prompt\n{GOOD}")
    refused(run("A", *PIXELS, "--labels", "l.csv"), "columns file and label")


# pictures


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header claims a size, and which has no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "cannot be read as a picture"),
        (b"no picture", "cannot be read as a picture"),
        (pickle.dumps({"x": 1}), "cannot be read as a picture"),
        (png_of(100_000, 100_000), "DecompressionBombError"),
        (png_of(2**31 - 1, 2**31 - 1), "cannot be read as a picture"),
        (png_of(50, 50), "cannot be read as a picture"),
    ],
)
def test_pictures_that_are_none(data: bytes, said: str, run: Run) -> None:
    Path("A", "x-0003.png").write_bytes(data)
    refused(run("A", *PIXELS, "--prompts-from-names"), "x-0003.png", said)


def test_pictures_of_every_kind_are_read(run: Run) -> None:
    Image.new("L", (1, 1), 9).save("A/grey.png")
    Image.new("RGBA", (7, 900), (9, 9, 9, 0)).save("A/clear.webp")
    Image.new("P", (3, 3), 1).save("A/palette.gif")
    Image.new("CMYK", (5, 5), (1, 2, 3, 4)).save("A/print.jpg")
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save("A/sixteen.tiff")
    Image.new("1", (4, 4), 1).save("A/bit.BMP")
    code, out, _ = run("A", *PIXELS)
    assert code == 0
    assert " 12 " in out


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_that_cannot_be_read(run: Run) -> None:
    Path("A", "sub").mkdir()
    Path("A", "sub").chmod(0)
    try:
        refused(run("A", *PIXELS), "cannot be read")
    finally:
        Path("A", "sub").chmod(0o700)


def test_links_in_circles_end(run: Run) -> None:
    Path("A", "again").symlink_to(Path("A").absolute(), target_is_directory=True)
    Path("A", "gone.png").symlink_to("nothing.png")
    Path("A", "self.png").symlink_to("self.png")
    code, out, _ = run("A", *PIXELS, "--no-report")
    assert code == 0
    assert " 6 " in out


# features


def header(claims: str, data: bytes = b"") -> bytes:
    return len(claims).to_bytes(8, "little") + claims.encode() + data


def npy(shape: object, descr: str = "<f4") -> bytes:
    told = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}"
    told = f"{told:<117}\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(told)) + told.encode() + bytes(64)


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing.safetensors": (lambda p: p.write_bytes(b""), "cannot be read as features"),
    "noise.safetensors": (lambda p: p.write_bytes(bytes(range(256)) * 9), "cannot be read"),
    "terabytes.safetensors": (
        lambda p: p.write_bytes(
            header(
                '{"features":{"dtype":"F32","shape":[1000000,1000000],'
                '"data_offsets":[0,4000000000000]}}'
            )
        ),
        "cannot be read",
    ),
    "header.safetensors": (
        lambda p: p.write_bytes((2**40).to_bytes(8, "little")),
        "cannot be read",
    ),
    "two.safetensors": (
        lambda p: save_file({"a": torch.ones(3, 2), "b": torch.ones(3, 2)}, p),
        "2 tensors",
    ),
    "flat.safetensors": (lambda p: save_file({"a": torch.ones(6)}, p), "shape (6,)"),
    "deep.safetensors": (lambda p: save_file({"a": torch.ones(6, 2, 2)}, p), "shape (6, 2, 2)"),
    "empty.safetensors": (lambda p: save_file({"a": torch.ones(0, 2)}, p), "shape (0, 2)"),
    "thin.safetensors": (lambda p: save_file({"a": torch.ones(6, 0)}, p), "shape (6, 0)"),
    "single.safetensors": (lambda p: save_file({"a": torch.ones(1, 4)}, p), "1 picture and"),
    "nan.safetensors": (
        lambda p: save_file({"a": torch.tensor([[1.0], [torch.nan]])}, p),
        "first in row 1",
    ),
    "complex.safetensors": (
        lambda p: save_file({"a": torch.ones(3, 2, dtype=torch.complex64)}, p),
        "complex",
    ),
    "huge.npy": (lambda p: np.save(p, np.full((4, 2), 1e300)), "NaN or infinity"),
    "pickle.npy": (
        lambda p: np.save(p, np.array([[{}], [{}]], dtype=object), allow_pickle=True),
        "cannot be read as features",
    ),
    "raw-pickle.npy": (lambda p: p.write_bytes(pickle.dumps([1])), "cannot be read as features"),
    "words.npy": (lambda p: np.save(p, np.array([["a"], ["b"]])), "real numbers"),
    "claims.npy": (lambda p: p.write_bytes(npy((10**6, 10**6))), "cannot be read as features"),
    "negative.npy": (lambda p: p.write_bytes(npy((-1, 4))), "cannot be read as features"),
    "code.npy": (lambda p: p.write_bytes(npy("__import__('os')")), "cannot be read as features"),
    "zip.npy": (lambda p: p.write_bytes(b"PK\x03\x04" + bytes(99)), "cannot be read as features"),
}


@pytest.mark.parametrize("name", FILES)
def test_features_that_are_none(name: str, run: Run) -> None:
    make, said = FILES[name]
    make(Path(name))
    refused(run(name), said)


def test_features_that_do_not_belong_together(run: Run) -> None:
    save_file({"a": torch.randn(6, 3)}, "three.safetensors")
    save_file({"a": torch.randn(6, 4)}, "four.safetensors")
    refused(
        run("three.safetensors", "four.safetensors"), "three.safetensors 3", "four.safetensors 4"
    )
    refused(run("A", "three.safetensors", *PIXELS), "A 3072", "three.safetensors 3")
    refused(run("three.safetensors", "--encoder", "pixels"), "no picture to encode")
    refused(run("three.safetensors", "--prompts-from-names"), "no prompt can be read")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise ValueError('two\\nlines')", "ValueError: two lines"),
        ("return x", "must return a tensor (6, width)"),
        ("return x.flatten(1)[:2]", "got (2, 192)"),
        ("return [1]", "got list"),
        ("return x.flatten(1) / 0", "NaN or infinity"),
        ("return x.flatten(1).to(torch.complex64)", "real numbers"),
        ("return x.flatten(1)[:, :0]", "got (6, 0)"),
    ],
)
def test_encoders_of_your_own_that_fail(body: str, said: str, run: Run) -> None:
    Path("enc.py").write_text(f"import torch\ndef f(x):\n    {body}\n")
    refused(run("A", "--encoder", "enc.py:f", "--image-size", "8", "--prompts-from-names"), said)


def test_a_set_of_equal_pictures_is_one_picture(run: Run) -> None:
    folder(Path("same"), ["x"], 6, copies=6)
    code, _out, _ = run("same", "A", "--prompts-from-names", *PIXELS, "--json", "out.json")
    assert code == 0
    got = json.loads(Path("out.json").read_text())["sets"][0]["measures"]
    assert {round(got[name], 9) for name in ("vendi", "rke", "cond_vendi", "cond_rke")} == {1.0}


@pytest.mark.parametrize("missing", ["matplotlib", "jinja2"])
def test_a_missing_extra_is_named(missing: str, tmp_path: Path) -> None:
    folder(tmp_path / "A", ["x"], 2)
    code = (
        "import sys\nsys.modules[sys.argv[1]] = None\nfrom sparke.cli import main\n"
        "sys.exit(main(['eval', 'A', '--encoder', 'pixels', '--prompts-from-names']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, missing],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    refused((done.returncode, done.stdout, done.stderr), 'pip install "sparke[eval]"')
    assert [path.name for path in tmp_path.iterdir()] == ["A"]
