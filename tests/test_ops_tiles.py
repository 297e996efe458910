"""How work is cut: runs of time steps, inputs that have to be moved, and the sums of what programs leave."""

import os
import subprocess
import sys

import pytest
import torch
from convolutions import BOUND, DEVICE, relative_error
from hypothesis import assume, given
from hypothesis import strategies as st

from dynconv.ops import operator, tiles

pytestmark = pytest.mark.usefixtures("by_kernels")


@pytest.mark.parametrize("parts", [3, 70])
@pytest.mark.parametrize(("first", "rank"), [(0, 40), (16, 40), (32, 40), (32, 48)])
def test_sums_go_to_their_place(parts: int, first: int, rank: int) -> None:
    """16 columns of each row: into those from `first` on, of which the last may not exist; the other sums whole."""
    columns = torch.randn(parts, 37, 16, device=DEVICE)
    total, others = torch.full((37, rank), 7.0, device=DEVICE), torch.randn(5, 300, device=DEVICE)
    other = torch.empty(300, device=DEVICE)
    tiles.sum_parts((columns, total), (others, other), place=tiles.Place(16, rank, first))
    last = min(first + 16, rank)
    assert relative_error(total[:, first:last], columns.double().sum(0)[:, : last - first]) < BOUND[torch.float32]
    assert (total[:, :first] == 7).all()
    assert (total[:, last:] == 7).all()
    assert relative_error(other, others.double().sum(0)) < BOUND[torch.float32]
    tiles.sum_parts((None, None), (others, other.zero_()), place=tiles.Place(16, rank, first))
    assert relative_error(other, others.double().sum(0)) < BOUND[torch.float32]


@pytest.mark.parametrize("padding", [5, 1015, 1018, 1019, 3000, 2**20])
def test_any_number_of_zeros_is_written_after_the_sums(padding: int) -> None:
    """As where one product gives much else beside the convolved channels. Triton has tensors of up to 2^20 values."""
    columns, total = torch.randn(4, 3, 6, device=DEVICE), torch.full((3, padding + 10), 7.0, device=DEVICE)
    tiles.sum_parts((columns, total), place=tiles.Place(6, padding + 10, 2, padding))
    assert relative_error(total[:, 2:8], columns.double().sum(0)) < BOUND[torch.float32]
    assert not total[:, 8:-2].any()
    assert (total[:, :2] == 7).all()
    assert (total[:, -2:] == 7).all()


def test_zeros_are_written_between_groups_of_sums() -> None:
    columns, total = torch.randn(4, 37, 6, device=DEVICE), torch.full((37, 24), 7.0, device=DEVICE)
    tiles.sum_parts((columns, total), place=tiles.Place(6, 24, 2, padding=3, each=2, gap=4))
    want = torch.nn.functional.pad(columns.double().sum(0).unflatten(1, (3, 2)), (0, 4)).flatten(1)
    assert relative_error(total[:, 2:20], want) < BOUND[torch.float32]
    assert not total[:, 20:23].any()
    assert (total[:, :2] == 7).all()
    assert (total[:, 23:] == 7).all()


@given(
    time=st.integers(1, 10_000),
    rows=st.sampled_from([1, 16]),
    programs_a_chunk=st.integers(1, 300),
    processors=st.integers(1, 200),
    each=st.integers(1, 16),
    step=st.sampled_from([4, 8, 16]),
    longest=st.sampled_from([24, 32, 64, 128, 160]),
)
def test_runs_are_what_the_kernels_take(**asked: int) -> None:
    assume(asked["longest"] % asked["step"] == 0)
    _, run = tiles.cheapest_run(**asked)
    assert run % asked["step"] == 0
    assert 8 <= run <= asked["longest"]


@pytest.mark.parametrize(("time", "run"), [(1, 8), (3000, 96), (4096, 128), (4099, 132)])
def test_runs_fill_the_device(time: int, run: int) -> None:
    """B=4 D=2048 on an H100, whose 132 multiprocessors run a low-rank backward program each: two chunks are 128."""
    asked = {"rows": 16, "programs_a_chunk": 64, "processors": 132, "each": 1, "step": 4, "longest": 160}
    assert tiles.cheapest_run(time, **asked)[1] == run


@pytest.mark.parametrize(
    ("time", "programs", "each", "longest", "run"),
    [
        (5000, 16, 1, 160, 40),
        (1024, 128, 3, 32, 32),
        (4096, 64, 3, 32, 24),  # two waves
        (1024, 48, 3, 32, 12),  # less than one
    ],
)
def test_runs_reckon_with_programs_that_share(time: int, programs: int, each: int, longest: int, run: int) -> None:
    """On an H100: with fewer beside them the last programs are faster, if any were beside them at all."""
    found = tiles.cheapest_run(time, 16, programs, 132, each, step=4, longest=longest)
    assert found[1] == run


def test_rows_that_cp_async_cannot_copy_are_moved() -> None:
    buffer = torch.randn(2 * 5 * 32 + 8).bfloat16()
    for offset, moved in ((0, False), (8, False), (1, True)):
        view = buffer[offset : offset + 320].view(2, 5, 32)
        rows = tiles.aligned(view)
        assert torch.equal(rows, view)
        assert rows.data_ptr() % 16 == 0
        assert (rows is not view) == moved
    odd = torch.randn(2, 5, 40).bfloat16()[..., :32]
    assert tiles.aligned(odd).stride() == (160, 32, 1)


def test_rows_beyond_32_bit_offsets_are_moved() -> None:
    for channels, moved in ((2**9 - 1, False), (2**9, True)):
        time_major = torch.empty(64, 2**10, channels, dtype=torch.bfloat16, device="meta").transpose(0, 1)
        assert (operator._rows_contiguous(time_major) is not time_major) == moved


@pytest.mark.slow
def test_offsets_beyond_32_bits() -> None:
    """Rows 2^18 values apart, of which the last lie beyond 2^31; in a process of its own, for a wrong one may crash."""
    script = """
import torch
from dynconv import lowrank_dynamic_convolution, static_convolution
from dynconv.ops import reference
torch.manual_seed(0)
rows, apart, channels = 2**13 + 64, 2**18, 16
x = torch.empty(rows * apart, dtype=torch.bfloat16).as_strided((1, rows, channels), (0, apart, 1))
x.copy_(torch.randn(1, rows, channels))
static, z, U = torch.randn(4, channels), torch.randn(1, rows, 3), torch.randn(3, 4 * channels)
by_rank = lowrank_dynamic_convolution(x, z, U)
for got, filters in ((static_convolution(x, static), (None, None, static)), (by_rank, (z, U, None))):
    want = reference.convolve(x.contiguous().double(), *filters, None, (channels,), False)
    print(float((got.double() - want)[:, -64:].norm() / want[:, -64:].norm()))
"""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert [float(line) < 1e-2 for line in done.stdout.split()] == [True, True]
