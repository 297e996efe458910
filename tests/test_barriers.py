"""torch.compile's kernels wait for what they read back (experiments/models/barriers.py)."""

import importlib.util
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from stepping import on_a_gpu

from experiments.models.barriers import add_barriers, with_barriers

# The form that torch 2.11 gave the kernel of a mixture of experts' norm in the backward pass, for a width of 192.
KERNEL = """
import triton
import triton.language as tl

@triton.jit
def kernel(in_ptr0, out_ptr0, out_ptr1, r0_numel, XBLOCK: tl.constexpr, R0_BLOCK: tl.constexpr):
    xindex = tl.program_id(0) * XBLOCK + tl.arange(0, XBLOCK)[:, None]
    r0_base = tl.arange(0, R0_BLOCK)[None, :]
    r0_numel = 192
    _tmp3 = tl.full([XBLOCK, R0_BLOCK], 0, tl.float32)
    for r0_offset in tl.range(0, r0_numel, R0_BLOCK):
        r0_index = r0_offset + r0_base
        r0_mask = r0_index < r0_numel
        tmp0 = tl.load(in_ptr0 + (r0_index + 192*xindex), r0_mask, other=0.0).to(tl.float32)
        tmp1 = tmp0 * 0.5
        _tmp3 = tl.where(r0_mask, _tmp3 + tmp1, _tmp3)
        tl.store(out_ptr0 + (r0_index + 192*xindex), tmp1, r0_mask)
    tmp3 = tl.sum(_tmp3, 1)[:, None]
    for r0_offset in tl.range(0, r0_numel, R0_BLOCK):
        r0_index = r0_offset + r0_base
        r0_mask = r0_index < r0_numel
        tmp4 = tl.load(out_ptr0 + (r0_index + 192*xindex), r0_mask, other=0.0)
        tmp5 = tl.load(in_ptr0 + (r0_index + 192*xindex), r0_mask, other=0.0).to(tl.float32)
        tl.store(out_ptr1 + (r0_index + 192*xindex), tmp4 * tmp3 + tmp5, r0_mask)
"""

COMPILE = """
import importlib.util, json, re, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

found = []
for path in sys.argv[1:]:
    specification = importlib.util.spec_from_file_location("generated", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    types = {"in_ptr0": "*bf16", "out_ptr0": "*fp32", "out_ptr1": "*bf16", "r0_numel": "i32"}
    source = ASTSource(
        module.kernel,
        types | {"XBLOCK": "constexpr", "R0_BLOCK": "constexpr"},
        {(4,): 2, (5,): 256},
        {(index,): [["tt.divisibility", 16]] for index in range(4)},
    )
    options = {"num_warps": 2, "num_stages": 1}
    assembly = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm
    layouts = dict(re.findall(r"(#\\w+) = #ttg.blocked<(.*)>", assembly["ttgir"]))
    stored, = re.findall(r"tt.store .*!tt.ptr<f32>, (#\\w+)>", assembly["ttgir"])
    loaded, = re.findall(r"tt.load .*!tt.ptr<f32>, (#\\w+)>", assembly["ttgir"])
    # the instructions from the last store of float32 to the last loads, which are those of the second loop
    steps = re.findall(r"(?:ld|st)\\.global|bar(?:rier)?(?:\\.cta)?\\.sync", assembly["ptx"])
    last = max(index for index, step in enumerate(steps) if step == "ld.global")
    before = [index for index, step in enumerate(steps[:last]) if step == "st.global"][-1]
    first = steps.index("ld.global", before)
    waits = any("sync" in step for step in steps[before:first])
    found.append({"stored": layouts[stored], "loaded": layouts[loaded], "waits": waits})
print(json.dumps(found))
"""


def compiled(folder: Path, *sources: str) -> list[dict[str, Any]]:
    """The layouts of what the kernels store and read back on an H100, and whether they wait between the two."""
    pytest.importorskip("triton")
    paths = [folder / f"kernel{number}.py" for number in range(len(sources))]
    for path, source in zip(paths, sources, strict=True):
        path.write_text(source)
    command = [sys.executable, "-c", COMPILE, *map(str, paths)]
    found: list[dict[str, Any]] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the wheel's compiler is tried on x86-64 only")
def test_a_kernel_waits_for_other_warps_before_it_reads_back_what_they_stored(tmp_path: Path) -> None:
    """This is the cause of gradients that were hundreds of times too large: results/measured/h100/README.md."""
    generated, changed = compiled(tmp_path, KERNEL, with_barriers(KERNEL))
    assert "warpsPerCTA = [1, 2]" in generated["stored"]  # each warp stores half of every row
    assert "warpsPerCTA = [2, 1]" in generated["loaded"]  # and reads a whole row, of which the other stored half
    assert not generated["waits"]
    assert changed["waits"]


def test_only_loads_of_what_was_stored_get_a_barrier_and_only_one() -> None:
    changed = with_barriers(KERNEL)
    lines = changed.splitlines()
    (place,) = (index for index, line in enumerate(lines) if "debug_barrier" in line)
    assert lines[place] == "        tl.debug_barrier()"
    assert "tl.load(out_ptr0 +" in lines[place + 1]
    assert changed.replace("        tl.debug_barrier()\n", "") == KERNEL
    assert with_barriers(changed) == changed  # also that of torch 2.14, which has barriers of its own
    block = "tl.store(tl.make_block_ptr(out_ptr0, shape=[8]), x)\nx = tl.load(tl.make_block_ptr(out_ptr0, shape=[8]))\n"
    assert with_barriers(block).splitlines()[1] == "tl.debug_barrier()"
    added = "tl.atomic_add(out_ptr0 + x, y)\n    z = tl.load(out_ptr0 + x)\n"
    assert with_barriers(added).splitlines()[1] == "    tl.debug_barrier()"


def test_torch_compiles_the_changed_source_of_what_it_generated_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.async_compile import AsyncCompile

    sources: list[str] = []
    monkeypatch.setattr(AsyncCompile, "triton", lambda *arguments: sources.append(arguments[2]))
    add_barriers()
    add_barriers()
    by_hand = KERNEL.replace("@triton.jit", "@triton_heuristics.user_autotune()\n@triton.jit")
    for source in (KERNEL, by_hand):
        AsyncCompile().triton("kernel", source)
    assert sources == [with_barriers(KERNEL), by_hand]


@on_a_gpu
def test_a_gpu_reads_back_only_what_was_stored(tmp_path: Path) -> None:
    """What a warp reads before another has stored it is not a number here."""
    path = tmp_path / "changed.py"
    path.write_text(with_barriers(KERNEL))
    specification = importlib.util.spec_from_file_location("changed", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    x = torch.randn(16384, 192, device="cuda").bfloat16()
    between, y = torch.empty(x.shape, device="cuda"), torch.empty_like(x)
    half = x.double() / 2
    right = half * half.sum(1, keepdim=True) + x
    busy, factor = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda")
    for _ in range(100):
        between.fill_(float("nan"))
        with torch.cuda.stream(busy):  # Its products delay warps of the kernel.
            factor @ factor
        module.kernel[(len(x) // 2,)](x, between, y, 192, XBLOCK=2, R0_BLOCK=256, num_warps=2, num_stages=1)
        torch.testing.assert_close(y.double(), right, rtol=1e-2, atol=1e-3)
