"""Pieces that the Gluon kernels share: rings in shared memory, the inputs before a run, documents, and silu.

A row is a run of slots, one time step each; `ring_kernels` and `lowrank_mma_kernels` say how rows lie in a program.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

# Triton 3.9 renamed it.
async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.jit
def allocate_ring(SLOTS: gl.constexpr, shape: gl.constexpr, layout: gl.constexpr, dtype: gl.constexpr):
    """Shared memory for groups of SLOTS slots: a buffer each, lest Triton put barriers between their copies."""
    ring = ()
    for _ in gl.static_range(SLOTS):
        ring = ring + (gl.allocate_shared_memory(dtype, shape, layout),)
    return ring


@gluon.jit
def load_position(positions, start, row, limit, slot):
    """Each row's place in its document: loaded, 0 beyond the end; or, of documents `positions` long, computed."""
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
    """A tuple without its first."""
    rest = ()
    for index in gl.static_range(1, len(values)):
        rest = rest + (values[index],)
    return rest


@gluon.jit
def load_positions(positions, start, row, limit, first, SLOTS: gl.constexpr):
    """`load_position` of SLOTS slots."""
    places = ()
    for slot in gl.static_range(SLOTS):
        places = places + (load_position(positions, start, row, limit, first + slot),)
    return places


@gluon.jit
def load_history(x, positions, start, row, limit, d_ok, x_time: gl.constexpr, W: gl.constexpr):
    """The W - 1 slots before a run, oldest first; zero before the document's start."""
    xs = ()
    for slot in gl.static_range(1 - W, 0):
        ok = (slot >= -start - row) & (slot < limit) & d_ok
        if positions is not None:
            ok &= load_position(positions, start, row, limit, 0) + slot >= 0
        xs = xs + (gl.load(x + slot * x_time, mask=ok, other=0.0),)
    return xs


@gluon.jit
def forget(xs, position, W: gl.constexpr):
    """The W - 1 slots before this one; zero where this one starts a document."""
    kept = ()
    for index in gl.static_range(W - 1):
        kept = kept + (gl.where(position == 0, gl.zeros_like(xs[index]), xs[index]),)
    return kept


@gluon.jit
def sigmoid(value):
    """The logistic function, by the hardware's approximate exponential and reciprocal."""
    asm: gl.constexpr = """{ .reg .f32 e;
        mul.f32 e, $1, 0fBFB8AA3B;  // -1 / ln 2
        ex2.approx.ftz.f32 e, e;
        add.f32 e, e, 0f3F800000;  // 1
        rcp.approx.ftz.f32 $0, e; }"""
    return gl.inline_asm_elementwise(asm, "=f,f", [value], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def through_silu(gradient, inner):
    """The gradient of `inner` from that of silu of it."""
    share = sigmoid(inner)
    return gradient * share * (1.0 + inner * (1.0 - share))
