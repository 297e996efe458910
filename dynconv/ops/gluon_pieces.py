"""Functions that the Gluon kernels share: ring buffers in shared memory, the inputs before a run, documents, and silu.

A run is RUN consecutive time steps, called slots, and a row is the part of a program that works on one run. The
docstrings of `ring_kernels` and `lowrank_mma_kernels` say how a program divides its time steps into rows.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

# Triton 3.9 renamed this function, so look for both names.
async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.jit
def allocate_ring(SLOTS: gl.constexpr, shape: gl.constexpr, layout: gl.constexpr, dtype: gl.constexpr):
    """Shared memory for a ring buffer of groups of SLOTS slots.

    Each slot of a group has a buffer of its own, because Triton would put barriers between copies into a common one.
    """
    ring = ()
    for _ in gl.static_range(SLOTS):
        ring = ring + (gl.allocate_shared_memory(dtype, shape, layout),)
    return ring


@gluon.jit
def load_position(positions, start, row, limit, slot):
    """The index within its document of each row's token at this slot.

    If `positions` is a pointer, the index is loaded, with 0 past the end; if it is the length of every document, the
    index is computed.
    """
    if positions.dtype.is_ptr():
        place = gl.load(positions + start + row + slot, mask=slot < limit, other=0)
    else:
        place = ((start + row + slot).to(gl.uint32) % positions.to(gl.uint32)).to(gl.int32)
    return place


@gluon.jit
def end_of_documents(positions, time):
    """Where the last document ends: what comes after it is padding, which kernels read as zeros."""
    end = time
    if positions is not None and positions.dtype.is_ptr():
        end = time - gl.load(positions + time)
    return end


@gluon.jit
def drop_first(values):
    """A tuple without its first element."""
    rest = ()
    for index in gl.static_range(1, len(values)):
        rest = rest + (values[index],)
    return rest


@gluon.jit
def load_positions(positions, start, row, limit, first, SLOTS: gl.constexpr):
    """`load_position` for SLOTS slots from `first` on, as a tuple."""
    places = ()
    for slot in gl.static_range(SLOTS):
        places = places + (load_position(positions, start, row, limit, first + slot),)
    return places


@gluon.jit
def load_history(x, positions, start, row, limit, d_ok, x_time: gl.constexpr, W: gl.constexpr):
    """The inputs of the W - 1 slots before a run, oldest first; zeros for those before the document's start."""
    xs = ()
    for slot in gl.static_range(1 - W, 0):
        ok = (slot >= -start - row) & (slot < limit) & d_ok
        if positions is not None:
            ok &= load_position(positions, start, row, limit, 0) + slot >= 0
        xs = xs + (gl.load(x + slot * x_time, mask=ok, other=0.0),)
    return xs


@gluon.jit
def forget(xs, position, W: gl.constexpr):
    """The inputs of the W - 1 slots before this one, set to zero where this slot starts a document."""
    kept = ()
    for index in gl.static_range(W - 1):
        kept = kept + (gl.where(position == 0, gl.zeros_like(xs[index]), xs[index]),)
    return kept


@gluon.jit
def sigmoid(value):
    """The logistic function, computed with the hardware's approximate exponential and reciprocal."""
    asm: gl.constexpr = """{ .reg .f32 e;
        mul.f32 e, $1, 0fBFB8AA3B;  // -1 / ln 2
        ex2.approx.ftz.f32 e, e;
        add.f32 e, e, 0f3F800000;  // 1
        rcp.approx.ftz.f32 $0, e; }"""
    return gl.inline_asm_elementwise(asm, "=f,f", [value], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def through_silu(gradient, inner):
    """The gradient with respect to `inner`, from the gradient with respect to silu(inner)."""
    share = sigmoid(inner)
    return gradient * share * (1.0 + inner * (1.0 - share))
