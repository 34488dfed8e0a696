"""The Triton kernels without a GPU: interpreted, and compiled for one; with a GPU, run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparke import ops

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


def test_interpreted_kernels_give_the_definition() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.interpreted"],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 9
    for case in found:
        assert case["hidden alike"], case
        assert case["lse"] < 2e-5, case
        assert case["mean"] < 2e-5, case


@pytest.mark.parametrize("kernel", [0, 1])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_the_kernels_compile_for_a_gpu_that_is_not_here(
    kernel: int, dtype: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = pytest.importorskip("triton.compiler")
    targets = pytest.importorskip("triton.backends.compiler")
    from sparke.ops import _triton
    from sparke.ops._triton_kernels import compiled

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = compiled()[kernel]
    tiles = [(_triton.ROWS, _triton.WIDTH), (_triton.GATHER_ROWS, _triton.GATHER_WIDTH)]
    rows, width = tiles[kernel]
    constants = {"B": 16, "N": rows, "D": width, "PRECISION": "tf32x3"}
    signature = dict.fromkeys(function.arg_names, "*fp32")
    signature |= dict.fromkeys(("b", "n", "d", "row_stride", "share"), "i32")
    signature |= dict.fromkeys(constants, "constexpr") | {"rows": f"*{dtype}"}
    source = compiler.ASTSource(
        function,
        signature,
        constexprs={(function.arg_names.index(name),): v for name, v in constants.items()},
    )
    found = compiler.compile(source, target=targets.GPUTarget("cuda", 80, 32))
    assert "mma.sync" in found.asm["ptx"]  # on tensor cores
    assert found.metadata.shared <= 99 * 1024  # what every GPU of that family and later has


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1000, 16384), (16, 777, 4099), (64, 300, 262_144)])
def test_on_a_gpu(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    b, n, d = shape
    rows = torch.randn(n, d, device="cuda").to(dtype)
    query = rows[:1].float() + torch.randn(b, d, device="cuda")
    weight = -torch.rand(b, n, device="cuda")
    norms, center = ops.squared_norms(rows)
    found = [
        ops.pull(query, rows, weight, d**0.5, norms=norms, center=center, implementation="triton")
        for _ in range(2)
    ]
    expected = ops.pull(
        query.double(), rows.double(), weight.double(), d**0.5, implementation="reference"
    )
    for ours, again, theirs in zip(*found, expected, strict=True):
        assert torch.equal(ours, again)
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-4)
