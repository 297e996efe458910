"""The tensor-core kernels compile without a GPU, and fit the chip: registers, spills and shared memory of their cubins.

In a process of its own, for the kernels' other tests run Triton's interpreter in theirs.
"""

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the wheel's compiler is tried on x86-64 only"),
]

COMPILE = """
import json, math, re, subprocess, sys, tempfile
from pathlib import Path
import torch
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from dynconv.ops import lowrank_mma, ring, tiles

class Device:
    get_current_device = get_current_stream = lambda *_: 0
    get_current_target = lambda _: GPUTarget("cuda", int(sys.argv[1]), 32)

def compile(kernel, programs, tensors, integers, constants, **options):
    arguments = constants | options | {"enable_fp_fusion": True}
    compiled = kernel.run(*tensors, *integers, grid=(programs,), warmup=True, **arguments)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\\d+) STACK:(\\d+)", text).groups())
    name = f"{kernel.fn.__module__.split('.')[-1]}.{kernel.__name__}"
    print(json.dumps([name, {"registers": registers, "stack": stack, "shared": compiled.metadata.shared}]))

def made(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")

driver.set_active(Device())
tiles.launch = lowrank_mma.launch = ring.launch = compile
lowrank_mma.multiprocessors = ring.multiprocessors = lambda _: 132
packed = sys.argv[2] == "packed"
shape = (1 if packed else 4, 4096, 2048)
x = made(math.prod(shape) + 3)[3:].view(shape)  # contiguous, but at no multiple of 16 bytes: cp.async needs a copy
static_w = made(4, 2048, dtype=torch.float32)
positions = made(4096, dtype=torch.int32) if packed else None
z, up, split = made(*x.shape[:2], 45), made(15, 4 * 2048, dtype=torch.float32), (1024, 512, 512)
lowrank_mma.forward(x, z, up, static_w, positions, split, True)
lowrank_mma.backward(x, x, z, up, static_w, positions, split, True, (True, True, True))
weight = made(*x.shape[:2], 128, 4)
for dynamic in (None, weight):
    ring.forward(x, dynamic, static_w, positions, 4, True)
    ring.backward(x, x, dynamic, static_w, positions, 4, True, (True, True))
"""


@pytest.mark.parametrize("packed", ["packed", "unpacked"])
@pytest.mark.parametrize("capability", [80, 90])
def test_the_gluon_kernels_fit(capability: int, packed: str) -> None:
    command = [sys.executable, "-W", "ignore", "-c", COMPILE, str(capability), packed]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    if "ImportError" in done.stderr and "gluon" in done.stderr:
        pytest.skip("this Triton's Gluon lacks what the kernels use; the plain kernels run instead")
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 11  # six kernels, and the launches that pad z and add up partial sums
    # A few spilled loop invariants cost nothing measurable; the 264 bytes of an early version cost half its time.
    spilled = 192 if packed == "packed" else 32
    # Three low-rank forward programs share a multiprocessor's 64 K registers, and four of the ring's backward.
    ring = 170 if packed == "packed" else 128
    most = {"lowrank_mma_kernels.forward_kernel": 170, "ring_kernels.backward_kernel": ring}
    for name, resources in found:
        assert resources["stack"] <= spilled, (name, resources)
        assert resources["registers"] <= most.get(name, 255), (name, resources)
        assert resources["shared"] <= 101_376, (name, resources)  # what a program of sm_86 and sm_89 may have
