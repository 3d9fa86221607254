"""What GPU kernels are written with: PTX instructions as numba intrinsics, and loops over registers.

Addresses in shared memory are 32-bit offsets into the shared window, addresses in global memory are 64-bit.
Sections named in comments are those of the PTX ISA manual, version 9.0.  Importing this module loads numba-cuda,
so kernels import it where they build their code.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.cuda.extending import intrinsic

from numbasparse.activations import slope_of

_I32, _I64, _F32, _VOID = ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.VoidType()
_LETTER = {types.int32: "r", types.uint32: "r", types.int64: "l", types.uint64: "l", types.float32: "f"}
_LLVM = {types.int32: _I32, types.uint32: _I32, types.int64: _I64, types.uint64: _I64, types.float32: _F32}

SHARED_SYMBOL = "numbasparse_shared"
"""Name under which a kernel finds its dynamic shared memory; declared in the PTX of a kernel that uses it."""

MAP_PARAMETER = "numbasparse_tensor_map"
"""Name under which a kernel finds the tensor map of its launch; declared likewise, after the other parameters."""

DTYPES = ("float32", "float16", "bfloat16")
"""Storage types; arithmetic is in float32."""


def element_bytes(dtype: str) -> int:
    """Bytes of one stored value."""
    return 4 if dtype == "float32" else 2


def _asm(builder: ir.IRBuilder, result: Any, text: str, letters: str, arguments: Sequence[tuple[Any, ir.Value]]) -> Any:
    """Emit one inline PTX text.  All are marked as having side effects: none may move over a barrier."""
    function_type = ir.FunctionType(result, [t for t, _ in arguments])
    return builder.call(ir.InlineAsm(function_type, text, letters, side_effect=True), [v for _, v in arguments])


def _operation(text: str, parameters: Sequence[Any], result: Any = types.void, memory: bool = True) -> Any:
    """An intrinsic of one PTX text; ``$0`` is the result if there is one."""
    letters = [] if result is types.void else ["=" + _LETTER[result]]
    constraint = ",".join(letters + [_LETTER[p] for p in parameters] + (["~{memory}"] if memory else []))

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        pairs = list(zip((_LLVM[p] for p in parameters), arguments, strict=True))
        value = _asm(builder, _VOID if result is types.void else _LLVM[result], text, constraint, pairs)
        return context.get_dummy_value() if result is types.void else value

    return _intrinsic_of_arity(len(parameters), result(*parameters), generate)


def _intrinsic_of_arity(arity: int, signature: Any, generate: Any) -> Any:
    """numba reads the number of arguments off the function that it decorates, so one is needed for each number."""

    @intrinsic
    def op0(typingctx):  # type: ignore[no-untyped-def]
        return signature, generate

    @intrinsic
    def op1(typingctx, a):  # type: ignore[no-untyped-def]
        return signature, generate

    @intrinsic
    def op2(typingctx, a, b):  # type: ignore[no-untyped-def]
        return signature, generate

    @intrinsic
    def op3(typingctx, a, b, c):  # type: ignore[no-untyped-def]
        return signature, generate

    @intrinsic
    def op4(typingctx, a, b, c, d):  # type: ignore[no-untyped-def]
        return signature, generate

    @intrinsic
    def op5(typingctx, a, b, c, d, e):  # type: ignore[no-untyped-def]
        return signature, generate

    @intrinsic
    def op6(typingctx, a, b, c, d, e, f):  # type: ignore[no-untyped-def]
        return signature, generate

    @intrinsic
    def op7(typingctx, a, b, c, d, e, f, g):  # type: ignore[no-untyped-def]
        return signature, generate

    @intrinsic
    def op8(typingctx, a, b, c, d, e, f, g, h):  # type: ignore[no-untyped-def]
        return signature, generate

    @intrinsic
    def op9(typingctx, a, b, c, d, e, f, g, h, i):  # type: ignore[no-untyped-def]
        return signature, generate

    return (op0, op1, op2, op3, op4, op5, op6, op7, op8, op9)[arity]


_S, _G = types.uint32, types.int64

# Special registers (section 10).
thread_index = _operation("mov.u32 $0, %tid.x;", (), types.int32, memory=False)
block_x = _operation("mov.u32 $0, %ctaid.x;", (), types.int32, memory=False)
block_y = _operation("mov.u32 $0, %ctaid.y;", (), types.int32, memory=False)
block_z = _operation("mov.u32 $0, %ctaid.z;", (), types.int32, memory=False)
grid_x = _operation("mov.u32 $0, %nctaid.x;", (), types.int32, memory=False)
grid_y = _operation("mov.u32 $0, %nctaid.y;", (), types.int32, memory=False)

barrier = _operation("barrier.sync 0;", ())
warp_barrier = _operation("bar.warp.sync 0xffffffff;", ())
# Whether the value is not zero in any lane of the warp, the same answer in all.
warp_any = _operation(
    "{ .reg .pred p; setp.ne.s32 p, $1, 0; vote.sync.any.pred p, p, 0xffffffff; selp.s32 $0, 1, 0, p; }",
    (types.int32,),
    types.int32,
)

# Loads and stores of single values.
load_shared_i32 = _operation("ld.shared.s32 $0, [$1];", (_S,), types.int32)
store_shared_i32 = _operation("st.shared.s32 [$0], $1;", (_S, types.int32))
# Adds and returns the value before.  acq_rel: what the threads counted so far have read, they have read before.
count_shared = _operation("atom.acq_rel.cta.shared.add.u32 $0, [$1], $2;", (_S, types.int32), types.int32)
# .nc: the read-only path; what it loads is not written while the kernel runs (section 9.7.9.9).
load_global_i32 = _operation("ld.global.nc.s32 $0, [$1];", (_G,), types.int32)
load_global_f32 = _operation("ld.global.nc.f32 $0, [$1];", (_G,), types.float32)


def load_element(size: int) -> Any:
    """Intrinsic ``(global) -> word`` of an element of 2 or 4 bytes, whatever it is."""
    if size == 4:
        return load_global_i32
    return _operation("{ .reg .b16 h; ld.global.nc.b16 h, [$1]; cvt.u32.u16 $0, h; }", (_G,), types.int32)


def store_element(size: int) -> Any:
    """Intrinsic ``(global, word)`` of an element of 2 or 4 bytes."""
    if size == 4:
        return _operation("st.global.b32 [$0], $1;", (_G, types.int32))
    return _operation("{ .reg .b16 h; cvt.u16.u32 h, $1; st.global.b16 [$0], h; }", (_G, types.int32))


# Copies to shared memory that the thread does not wait for (section 9.7.9.25.3).  The last argument is how many
# bytes come from global memory; the rest of the destination is filled with zeros.
copy_async_4 = _operation("cp.async.ca.shared.global [$0], [$1], 4, $2;", (_S, _G, types.int32))
copy_async_8 = _operation("cp.async.ca.shared.global [$0], [$1], 8, $2;", (_S, _G, types.int32))
copy_async_16 = _operation("cp.async.cg.shared.global [$0], [$1], 16, $2;", (_S, _G, types.int32))
copy_commit = _operation("cp.async.commit_group;", ())


def copy_wait(groups: int) -> Any:
    """Intrinsic that waits until at most ``groups`` of the thread's newest copy groups are under way."""
    return _operation(f"cp.async.wait_group {groups};", ())


def copy_plain(size: int) -> Any:
    """Intrinsic ``(shared, global, bytes)`` that copies through registers, for GPUs before capability 8.0.

    ``bytes`` is ``size`` or 0; for 0 zeros are written.
    """
    kind = f"b{8 * size}"
    if size == 16:
        body = (
            "{ .reg .pred p; .reg .b32 a, b, c, d; setp.ne.s32 p, $2, 0; mov.b32 a, 0; mov.b32 b, 0; mov.b32 c, 0; "
            "mov.b32 d, 0; @p ld.global.v4.b32 {a, b, c, d}, [$1]; st.shared.v4.b32 [$0], {a, b, c, d}; }"
        )
    else:
        body = (
            f"{{ .reg .pred p; .reg .{kind} a; setp.ne.s32 p, $2, 0; mov.{kind} a, 0; "
            f"@p ld.global.{kind} a, [$1]; st.shared.{kind} [$0], a; }}"
        )
    return _operation(body, (_S, _G, types.int32))


# Barriers in shared memory that count arrivals and bytes (section 9.7.13.15), capability 9.0.
mbarrier_init = _operation("mbarrier.init.shared::cta.b64 [$0], $1;", (_S, types.int32))
# Makes the initialised barriers visible to the copy engine.
mbarrier_init_fence = _operation("fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;", ())
mbarrier_expect = _operation("mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;", (_S, types.int32))
# try_wait sleeps for a while in hardware; it returns false when the time is over.  Labels are local to the braces.
mbarrier_wait = _operation(
    "{ .reg .pred p; WAIT: mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1; @p bra DONE; bra WAIT; DONE: }",
    (_S, types.int32),
)
# One thread's order to the copy engine (sections 9.7.9.25.4 and .5): bytes arrive at the barrier.
copy_bulk = _operation(
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3];",
    (_S, _G, types.int32, _S),
)
# (shared, map, x0, x1, x2, x3, barrier): the box at those coordinates, innermost first; outside it is zeros.
copy_box = _operation(
    "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
    "[$0], [$1, {$2, $3, $4, $5}], [$6];",
    (_S, _G, types.int32, types.int32, types.int32, types.int32, _S),
)
# The same, to the same place in every block of the cluster whose bit is set in the last argument; the bytes arrive at
# the barrier at the same place in each (section 9.7.9.25.5.2, ".multicast::cluster").
copy_box_to_cluster = _operation(
    "{ .reg .b16 m; cvt.u16.u32 m, $7; cp.async.bulk.tensor.4d.shared::cluster.global.tile"
    ".mbarrier::complete_tx::bytes.multicast::cluster [$0], [$1, {$2, $3, $4, $5}], [$6], m; }",
    (_S, _G, types.int32, types.int32, types.int32, types.int32, _S, types.int32),
)
# Blocks of a cluster reach each other's shared memory by addresses of the cluster's window (section 5.1.5).
cluster_rank = _operation("mov.u32 $0, %cluster_ctarank;", (), types.int32, memory=False)
cluster_address = _operation("mapa.shared::cluster.u32 $0, $1, $2;", (_S, types.int32), types.uint32, memory=False)
count_in_cluster = _operation(
    "atom.acq_rel.cluster.shared::cluster.add.u32 $0, [$1], $2;", (_S, types.int32), types.int32
)
# Every thread of every block arrives before any goes on from the wait (section 9.7.13.4).
cluster_arrive = _operation("barrier.cluster.arrive.release;", ())
# Without order of what was written before: for blocks that only have to be there still.
cluster_arrive_relaxed = _operation("barrier.cluster.arrive.relaxed;", ())
cluster_wait = _operation("barrier.cluster.wait.acquire;", ())
# The map lies in parameter space, whose generic address the copy engine takes.
tensor_map_address = _operation(
    f"{{ .reg .b64 a; mov.b64 a, {MAP_PARAMETER}; cvta.param.u64 $0, a; }}", (), types.int64, memory=False
)


def shared_base(alignment: int) -> Any:
    """Intrinsic that gives the address of dynamic shared memory, rounded up to a power of two."""
    return _operation(
        f"{{ .reg .u32 a; mov.u32 a, {SHARED_SYMBOL}; add.u32 a, a, {alignment - 1}; and.b32 $0, a, {-alignment}; }}",
        (),
        types.uint32,
        memory=False,
    )


def _load_shared_vector(builder: ir.IRBuilder, address: ir.Value, offset: int, vector: int, dtype: str) -> list[Any]:
    """``vector`` neighbouring values at a shared address plus a constant, as float32."""
    if dtype == "float32":
        words, kind, letter, llvm = vector, "f32", "f", _F32
    elif vector == 1:
        return [_widen_single(builder, address, offset, dtype)]
    else:
        words, kind, letter, llvm = vector // 2, "b32", "r", _I32
    places = ", ".join(f"${i}" for i in range(words))
    wide = "" if words == 1 else f".v{words}"
    targets = places if words == 1 else f"{{{places}}}"
    text = f"ld.shared{wide}.{kind} {targets}, [${words}+{offset}];"
    result = llvm if words == 1 else ir.LiteralStructType([llvm] * words)
    loaded = _asm(builder, result, text, ",".join([f"={letter}"] * words + ["r"]), [(_I32, address)])
    parts = [loaded] if words == 1 else [builder.extract_value(loaded, i) for i in range(words)]
    return parts if dtype == "float32" else [x for part in parts for x in _widen_pair(builder, part, dtype)]


def _widen_single(builder: ir.IRBuilder, address: ir.Value, offset: int, dtype: str) -> Any:
    convert = "cvt.f32.f16 $0, h;" if dtype == "float16" else "mov.b32 $0, {z, h};"
    text = f"{{ .reg .b16 h, z; mov.b16 z, 0; ld.shared.b16 h, [$1+{offset}]; {convert} }}"
    return _asm(builder, _F32, text, "=f,r", [(_I32, address)])


def _widen_pair(builder: ir.IRBuilder, word: ir.Value, dtype: str) -> list[Any]:
    """Two 16-bit values of a register as float32: a bfloat16 is the upper half of one."""
    if dtype == "bfloat16":
        low = builder.bitcast(builder.shl(word, ir.Constant(_I32, 16)), _F32)
        return [low, builder.bitcast(builder.and_(word, ir.Constant(_I32, 0xFFFF0000)), _F32)]
    text = "{ .reg .b16 a, b; mov.b32 {a, b}, $2; cvt.f32.f16 $0, a; cvt.f32.f16 $1, b; }"
    both = _asm(builder, ir.LiteralStructType([_F32, _F32]), text, "=f,=f,r", [(_I32, word)])
    return [builder.extract_value(both, 0), builder.extract_value(both, 1)]


def zeros(count: int) -> Any:
    """Intrinsic that makes ``count`` registers of float32 zero, a tuple."""
    kind = types.UniTuple(types.float32, count)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        return context.make_tuple(builder, kind, [ir.Constant(_F32, 0.0)] * count)

    return _intrinsic_of_arity(0, kind(), generate)


LAST, EMPTY = 1 << 31, 1 << 30
"""Bits of an entry's offset: its list ends with it; the list has no entry, and this one only says so."""


def gather_fma(lists: int, shared: int, displacements: Sequence[int], vector: int, dtype: str, codes: bool) -> Any:
    """Intrinsic ``(accumulators, stream, codebook, base) -> accumulators``: the inner loop of a sparse product.

    The stream, in shared memory, holds ``lists`` lists of entries, one after another.  An entry is an int32 byte
    offset (with the bits `LAST` and `EMPTY`) and ``shared`` values; with ``codes`` it is one int32: the offset in
    its low 18 bits, and above it (``shared`` is 1) the 12-bit number of a value in the float32 table
    at ``codebook``.  Of list i, each entry does, for each displacement d, place v of a vector, and value g::

        accumulators[((i * shared + g) * len(displacements) + d) * vector + v]
            += value[g] * memory[base + offset + displacements[d]][v]

    A list without entries is one entry with both bits, which does nothing.  The entry after the current one is
    fetched before the current one is used, over the end of a list too, so as many bytes as an entry has are read
    after the stream, and ignored.

    Parameters
    ----------
    lists, shared
        Numbers of lists, and of values that use one loaded vector.
    displacements
        Bytes; constants of the load instructions.
    vector
        Neighbouring values of one load: 1, 2 or 4 float32; 1, 2, 4 or 8 of 16 bits.
    dtype
        Type of the values in memory, one of `DTYPES`.
    """
    width = len(displacements) * vector
    kind = types.UniTuple(types.float32, lists * shared * width)
    signature = kind(kind, types.uint32, types.uint32, types.uint32)
    step = 4 if codes else 4 * (1 + shared)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        packed, stream, codebook, base = arguments
        accumulators = [builder.extract_value(packed, i) for i in range(lists * shared * width)]
        entry = _load_entry(builder, stream, 0, shared, codes)
        where = stream
        for number in range(lists):
            own = slice(number * shared * width, (number + 1) * shared * width)
            before, state = builder.block, [where, *entry, *accumulators[own]]
            loop, skip, after = (builder.append_basic_block(f"{name}{number}") for name in ("list", "skip", "after"))
            flag = builder.and_(entry[0], ir.Constant(_I32, EMPTY))
            builder.cbranch(builder.icmp_signed("!=", flag, ir.Constant(_I32, 0)), skip, loop)
            builder.position_at_end(skip)
            skipped = [
                builder.add(where, ir.Constant(_I32, step)),
                *_load_entry(builder, where, step, shared, codes),
                *accumulators[own],
            ]
            builder.branch(after)
            builder.position_at_end(loop)
            phis = [builder.phi(v.type) for v in state]
            here, current, sums = phis[0], phis[1 : 1 + len(entry)], phis[1 + len(entry) :]
            following = _load_entry(builder, here, step, shared, codes)
            address, values = _open_entry(builder, current, codebook, base, codes)
            loaded = [_load_shared_vector(builder, address, d, vector, dtype) for d in displacements]
            new = [
                builder.fma(values[g], loaded[d][v], sums[(g * len(displacements) + d) * vector + v])
                for g in range(shared)
                for d in range(len(displacements))
                for v in range(vector)
            ]
            looped = [builder.add(here, ir.Constant(_I32, step)), *following, *new]
            done = builder.icmp_signed("<", current[0], ir.Constant(_I32, 0))
            for phi, start, again in zip(phis, state, looped, strict=True):
                phi.add_incoming(start, before)
                phi.add_incoming(again, loop)
            builder.cbranch(done, after, loop)
            builder.position_at_end(after)
            merged = [builder.phi(v.type) for v in state]
            for phi, a, b in zip(merged, skipped, looped, strict=True):
                phi.add_incoming(a, skip)
                phi.add_incoming(b, loop)
            where, entry = merged[0], merged[1 : 1 + len(entry)]
            accumulators[own] = merged[1 + len(entry) :]
        return context.make_tuple(builder, kind, accumulators)

    return _intrinsic_of_arity(4, signature, generate)


def _load_entry(builder: ir.IRBuilder, address: ir.Value, offset: int, shared: int, codes: bool) -> list[Any]:
    """An entry as int32 offset and float32 values, or as one int32 if coded.  All lanes read the same: a broadcast."""
    if codes or shared > 1:
        first = _asm(builder, _I32, f"ld.shared.s32 $0, [$1+{offset}];", "=r,r", [(_I32, address)])
        if codes:
            return [first]
        values = [
            _asm(builder, _F32, f"ld.shared.f32 $0, [$1+{offset + 4 + 4 * g}];", "=f,r", [(_I32, address)])
            for g in range(shared)
        ]
        return [first, *values]
    pair = ir.LiteralStructType([_I32, _F32])
    text = f"{{ .reg .b32 v; ld.shared.v2.b32 {{$0, v}}, [$2+{offset}]; mov.b32 $1, v; }}"
    both = _asm(builder, pair, text, "=r,=f,r", [(_I32, address)])
    return [builder.extract_value(both, 0), builder.extract_value(both, 1)]


def _open_entry(
    builder: ir.IRBuilder, entry: Sequence[Any], codebook: ir.Value, base: ir.Value, codes: bool
) -> tuple[Any, list[Any]]:
    """Address of an entry's vector for this lane, and its values."""
    if not codes:
        offset = builder.and_(entry[0], ir.Constant(_I32, 0x3FFFFFFF))
        return builder.add(base, offset), list(entry[1:])
    offset = builder.and_(entry[0], ir.Constant(_I32, 0x3FFFF))
    # Bits 18 to 29 are the place in the table: shifted by 16 and masked, they are its byte offset.
    place = builder.and_(builder.lshr(entry[0], ir.Constant(_I32, 16)), ir.Constant(_I32, 0x3FFC))
    value = _asm(builder, _F32, "ld.shared.f32 $0, [$1];", "=f,r", [(_I32, builder.add(codebook, place))])
    return builder.add(base, offset), [value]


@dataclass(frozen=True)
class Finish:
    """What is done to a finished sum.

    Attributes
    ----------
    bias, scaled, residual
        Whether there is a float32 per row to add, a float32 per row to multiply with first, a value per element
        to add.
    activation
        See `numbasparse.activations`.
    """

    bias: bool
    scaled: bool
    residual: bool
    activation: str

    def load(self, builder: ir.IRBuilder, bias: ir.Value, scale: ir.Value, row: ir.Value) -> tuple[Any, Any]:
        """Bias and factor of a row, or None."""
        shift = builder.mul(row, ir.Constant(_I64, 4))
        return tuple(
            _load_global(builder, builder.add(base, shift), 1, "float32")[0] if there else None
            for base, there in ((bias, self.bias), (scale, self.scaled))
        )  # type: ignore[return-value]

    def apply(self, builder: ir.IRBuilder, value: Any, factor: Any, shift: Any, added: Any) -> Any:
        """The value to store."""
        value = value if factor is None else builder.fmul(value, factor)
        value = value if shift is None else builder.fadd(value, shift)
        value = value if added is None else builder.fadd(value, added)
        return _activated(builder, value, self.activation)


_AT_ONCE, _ROWS_AT_ONCE = 16, 4
"""Residuals of a thread that are loaded one behind another, and rows whose bias is."""


def store_rows(
    rows: int,
    displacements: Sequence[tuple[int, int]],
    vector: int,
    dtype: str,
    finish: Finish,
    strides: tuple[int, int, int],
    limits: tuple[int, int],
) -> Any:
    """Intrinsic ``(accumulators, y, residual, bias, scale, table, oy, ox) -> void``: finish and store a tile.

    The int32 at ``table + 4 * i`` is the number k of row i, negative for a row that is not there.  Row i and
    displacement (dy, dx) is the vector at ``y + k * strides[0] + dy * strides[1] + dx * strides[2]`` (bytes),
    written if ``oy + dy < limits[0]`` and ``ox + dx < limits[1]``.  What is written is
    ``activation(accumulator * scale[k] + bias[k] + residual)``, of which `Finish` says what is there.

    Parameters
    ----------
    rows, displacements, vector
        Order of the accumulators: rows, then displacements, then places of a vector.
    dtype
        Type of ``y`` and of the residual (addressed like ``y``); a vector is stored at once and must be aligned.
    """
    width = len(displacements) * vector
    kind = types.UniTuple(types.float32, rows * width)
    signature = types.void(kind, _G, _G, _G, _G, _G, types.int32, types.int32)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        packed, y, extra, bias, scale, table, oy, ox = arguments
        inside = [
            builder.and_(
                builder.icmp_signed("<", builder.add(oy, ir.Constant(_I32, dy)), ir.Constant(_I32, limits[0])),
                builder.icmp_signed("<", builder.add(ox, ir.Constant(_I32, dx)), ir.Constant(_I32, limits[1])),
            )
            for dy, dx in displacements
        ]
        at_once = max(1, _AT_ONCE // vector)
        for row in range(rows):
            # Loads of some rows, and of a row's residuals, come one behind another: what waits, waits for all of them.
            if row % _ROWS_AT_ONCE == 0:
                some = [
                    builder.add(table, ir.Constant(_I64, 4 * r)) for r in range(row, min(rows, row + _ROWS_AT_ONCE))
                ]
                text = "ld.global.nc.s32 $0, [$1];"
                numbers = [_asm(builder, _I32, text, "=r,l", [(_I64, place)]) for place in some]
                known = [builder.icmp_signed(">=", number, ir.Constant(_I32, 0)) for number in numbers]
                ks = [
                    builder.select(there, builder.sext(number, _I64), ir.Constant(_I64, 0))
                    for there, number in zip(known, numbers, strict=True)
                ]
                ready = [finish.load(builder, bias, scale, k) for k in ks]
            there, k, (shift, factor) = (found[row % _ROWS_AT_ONCE] for found in (known, ks, ready))
            start = builder.mul(k, ir.Constant(_I64, strides[0]))
            for first in range(0, len(displacements), at_once):
                some_d = range(first, min(len(displacements), first + at_once))
                written = {d: builder.and_(there, inside[d]) for d in some_d}
                at = {
                    d: builder.add(start, ir.Constant(_I64, dy * strides[1] + dx * strides[2]))
                    for d in some_d
                    for dy, dx in [displacements[d]]
                }
                added: dict[int, list[Any]] = {d: [None] * vector for d in some_d}
                if finish.residual:
                    for d in some_d:
                        added[d] = _load_global(builder, builder.add(extra, at[d]), vector, dtype, written[d])
                for d in some_d:
                    with builder.if_then(written[d]):
                        values = [
                            finish.apply(
                                builder, builder.extract_value(packed, row * width + d * vector + v), factor, shift, add
                            )
                            for v, add in enumerate(added[d])
                        ]
                        _store_global(builder, builder.add(y, at[d]), values, dtype)
        return context.get_dummy_value()

    return _intrinsic_of_arity(8, signature, generate)


def _load_global(
    builder: ir.IRBuilder, address: ir.Value, vector: int, dtype: str, wanted: ir.Value | None = None
) -> list[Any]:
    """``vector`` values in global memory as float32, or zeros where a flag says that they are not wanted."""
    single = dtype != "float32" and vector == 1
    if dtype == "float32":
        words, kind, letter, llvm = vector, "f32", "f", _F32
    elif single:
        words, kind, letter, llvm = 1, "b16", "h", ir.IntType(16)
    else:
        words, kind, letter, llvm = vector // 2, "b32", "r", _I32
    places = ", ".join(f"${i}" for i in range(words))
    wide, targets = ("", places) if words == 1 else (f".v{words}", f"{{{places}}}")
    text = f"ld.global{wide}.{kind} {targets}, [${words}];"
    operands: list[tuple[Any, ir.Value]] = [(_I64, address)]
    constraints = [f"={letter}"] * words + ["l"]
    if wanted is not None:
        zero = "0f00000000" if kind == "f32" else "0"
        cleared = " ".join(f"mov.{kind} ${i}, {zero};" for i in range(words))
        text = f"{{ .reg .pred p; setp.ne.s32 p, ${words + 1}, 0; {cleared} @p {text} }}"
        operands.append((_I32, builder.zext(wanted, _I32)))
        # Written before the address is read: the results must have registers of their own.
        constraints = [f"=&{letter}"] * words + ["l", "r"]
    result = llvm if words == 1 else ir.LiteralStructType([llvm] * words)
    loaded = _asm(builder, result, text, ",".join(constraints), operands)
    parts = [loaded] if words == 1 else [builder.extract_value(loaded, i) for i in range(words)]
    if dtype == "float32":
        return parts
    if single:
        convert = "cvt.f32.f16 $0, $1;" if dtype == "float16" else "{ .reg .b16 z; mov.b16 z, 0; mov.b32 $0, {z, $1}; }"
        return [_asm(builder, _F32, convert, "=f,h", [(llvm, loaded)])]
    return [x for part in parts for x in _widen_pair(builder, part, dtype)]


def _store_global(builder: ir.IRBuilder, address: ir.Value, values: Sequence[Any], dtype: str) -> None:
    """Round float32 values to ``dtype`` and store them at once."""
    if dtype == "float32":
        words, kind, letter, llvm = list(values), "f32", "f", _F32
    elif len(values) == 1:
        text = "{ .reg .b16 h; cvt.rn.f16.f32 h, $1; st.global.b16 [$0], h; }"
        if dtype == "bfloat16":
            text = (
                "{ .reg .b16 h, l; .reg .b32 w; cvt.rn.bf16x2.f32 w, $1, $1; mov.b32 {l, h}, w; "
                "st.global.b16 [$0], l; }"
            )
        _asm(builder, _VOID, text, "l,f,~{memory}", [(_I64, address), (_F32, values[0])])
        return
    else:
        words = [_narrow_pair(builder, values[i : i + 2], dtype) for i in range(0, len(values), 2)]
        kind, letter, llvm = "b32", "r", _I32
    places = ", ".join(f"${i + 1}" for i in range(len(words)))
    wide, sources = ("", places) if len(words) == 1 else (f".v{len(words)}", f"{{{places}}}")
    _asm(
        builder,
        _VOID,
        f"st.global{wide}.{kind} [$0], {sources};",
        ",".join(["l"] + [letter] * len(words) + ["~{memory}"]),
        [(_I64, address), *((llvm, w) for w in words)],
    )


def _activated(builder: ir.IRBuilder, value: Any, activation: str) -> Any:
    """Apply an activation to a float32; ``max`` with .NaN keeps a NaN as torch does (section 9.7.3.12)."""
    zero = ir.Constant(_F32, 0.0)
    if activation == "none":
        return value
    if activation == "silu":
        text = (
            "{ .reg .f32 e; mul.f32 e, $1, 0fBFB8AA3B; ex2.approx.f32 e, e; add.f32 e, e, 0f3F800000; "
            "rcp.approx.f32 e, e; mul.f32 $0, $1, e; }"
        )
        return _asm(builder, _F32, text, "=f,f", [(_F32, value)])
    slope = slope_of(activation)
    below = zero if slope is None else builder.fmul(value, ir.Constant(_F32, slope))
    value = builder.select(builder.fcmp_ordered("<", value, zero), below, value)
    if activation == "relu6":
        six = ir.Constant(_F32, 6.0)
        value = builder.select(builder.fcmp_ordered(">", value, six), six, value)
    return value


def load_global(dtype: str) -> Any:
    """Intrinsic that loads one value of ``dtype`` as float32."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        return _load_global(builder, arguments[0], 1, dtype)[0]

    return _intrinsic_of_arity(1, types.float32(_G), generate)


def store_finished(dtype: str, finish: Finish) -> Any:
    """Intrinsic ``(address, value, residual, bias, scale, k)`` that finishes a sum of row k and stores it.

    ``residual`` is the address of one value, ``bias`` and ``scale`` those of row 0.
    """

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        address, value, residual, bias, scale, k = arguments
        shift, factor = finish.load(builder, bias, scale, k)
        added = _load_global(builder, residual, 1, dtype)[0] if finish.residual else None
        _store_global(builder, address, [finish.apply(builder, value, factor, shift, added)], dtype)
        return context.get_dummy_value()

    return _intrinsic_of_arity(6, types.void(_G, types.float32, _G, _G, _G, _G), generate)


# ---- pieces of 16 bytes ---------------------------------------------------------------------------------------

LEAST = {"float16": 0xFC00FC00, "bfloat16": 0xFF80FF80, "float32": 0xFF800000}
"""A word of minus infinity."""
_MAXIMUM = {"float16": "max.NaN.f16x2", "bfloat16": "max.NaN.bf16x2", "float32": "max.NaN.f32"}
_PIECE = types.UniTuple(types.uint32, 4)


def least_piece(dtype: str) -> Any:
    """Intrinsic ``() -> words``: a piece of minus infinity."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        return context.make_tuple(builder, _PIECE, [ir.Constant(_I32, LEAST[dtype])] * 4)

    return _intrinsic_of_arity(0, _PIECE(), generate)


def load_piece_or(default: int) -> Any:
    """Intrinsic ``(global, wanted) -> words``: what lies there, and nobody writes; ``default`` if it is not wanted."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        address, wanted = arguments
        return context.make_tuple(builder, _PIECE, _load_words_if(builder, wanted, address, 4, default))

    return _intrinsic_of_arity(2, _PIECE(_G, types.int32), generate)


def larger_pieces(dtype: str) -> Any:
    """Intrinsic ``(words, words) -> words``: the larger of each two values, NaN if one is (capability 8.0)."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        words = []
        for i in range(4):
            both = [(_I32, builder.extract_value(piece, i)) for piece in arguments]
            words.append(_asm(builder, _I32, f"{_MAXIMUM[dtype]} $0, $1, $2;", "=r,r,r", both))
        return context.make_tuple(builder, _PIECE, words)

    return _intrinsic_of_arity(2, _PIECE(_PIECE, _PIECE), generate)


def _store_piece() -> Any:
    """Intrinsic ``(global, words)``."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        words = [(_I32, builder.extract_value(arguments[1], i)) for i in range(4)]
        text = "st.global.v4.b32 [$0], {$1, $2, $3, $4};"
        _asm(builder, _VOID, text, "l,r,r,r,r,~{memory}", [(_I64, arguments[0]), *words])
        return context.get_dummy_value()

    return _intrinsic_of_arity(2, types.void(_G, _PIECE), generate)


store_piece = _store_piece()


# ---- tensor cores -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Swizzle:
    """How 16-byte pieces of shared memory change places, so that a column of them meets every bank.

    PTX ISA, "Swizzling modes" (of tensor copies) and "Strides" (of wgmma's shared-memory matrices): the modes of 128,
    64 and 32 bytes are those of the canonical layouts, Swizzle<3,4,3>, <2,4,3> and <1,4,3> in the words of CUTLASS
    (cute/arch/mma_sm90_desc.hpp).  An address a means ``a ^ (a >> 3 & mask)``; bits 7 to 9 go into bits 4 to 6.  The
    pattern is of addresses, not of offsets, so what uses it is aligned to ``8 * row_bytes``.

    Attributes
    ----------
    row_bytes : int
        Bytes of a row, 128, 64, 32, or 16 for none: also the widest box of a tensor copy in this mode.
    mode : int
        Number of the mode in a matrix descriptor (bits 62 and 63).
    mask : int
    """

    row_bytes: int
    mode: int
    mask: int


SWIZZLES = {row: Swizzle(row, mode, row - 16) for row, mode in ((128, 1), (64, 2), (32, 3), (16, 0))}
"""By bytes of a row."""


@dataclass(frozen=True)
class MatrixDescriptor:
    """Constants of the descriptor of a K x N operand in shared memory whose N is innermost ("MN-major", "transposed").

    PTX ISA, "Matrix descriptor format" of wgmma: bits 0-13 start, 16-29 leading and 32-45 stride byte offset, each
    in 16 bytes, 49-51 base offset, 62-63 swizzle.  The rows (of equal k) of ``row_bytes`` hold neighbouring n, eight
    rows of k follow one another, and there are two strides: from eight k to the next eight, and from ``row_bytes`` of
    n to the next.  Which is which: with a swizzle the leading offset is that of n and the stride offset that of k;
    without, it is the other way round (CUTLASS, cute/atom/mma_traits_sm90_gmma.hpp, ``make_gmma_desc<Major::MN>``).
    The base offset is 0 where starts are multiples of ``8 * row_bytes``.

    Attributes
    ----------
    low, high : int
        Words to which the start and the stride of k, in 16 bytes, are added: the start to ``low``.
    k_high : bool
        Whether the stride of k is added to ``high``, or 65,536 times it to ``low``.
    """

    low: int
    high: int
    k_high: bool


def k_major_descriptor(row_bytes: int, eight_stride: int) -> int:
    """High word of the descriptor of an operand whose K is innermost; the low word is the start, in 16 bytes.

    PTX ISA, as `MatrixDescriptor`: rows of ``row_bytes`` (128 or 64) hold the k of one n, eight rows follow one
    another, and the stride offset is ``eight_stride``, from eight n to the next eight; the leading offset is not read.
    A step's 64 bytes lie within a row.  The base offset stays 0 wherever rows start, since what is swizzled is the
    address (tests/test_ptx_tensor.py tries starts at every row).
    """
    swizzle = SWIZZLES[row_bytes]
    if eight_stride % 16 or not 0 <= eight_stride // 16 < 1 << 14:
        raise ValueError(f"expected a stride of a multiple of 16 bytes under 256 KiB, got {eight_stride}")
    return swizzle.mode << 30 | eight_stride // 16


def matrix_descriptor(row_bytes: int, n_stride: int) -> MatrixDescriptor:
    """Descriptor for rows of ``row_bytes``, ``n_stride`` bytes from the same k of a row to that of the next n."""
    swizzle = SWIZZLES[row_bytes]
    units = n_stride // 16
    if n_stride % 16 or not 0 <= units < 1 << 14:
        raise ValueError(f"expected a stride of a multiple of 16 bytes under 256 KiB, got {n_stride}")
    if swizzle.mode:
        return MatrixDescriptor(low=units << 16, high=swizzle.mode << 30, k_high=True)
    return MatrixDescriptor(low=0, high=units, k_high=False)


@functools.cache
def load_words(space: str, count: int) -> Any:
    """Intrinsic ``(address) -> words``: 1, 2 or 4 neighbouring 32-bit words, at a multiple of their size.

    ``space`` is ``"global"`` or ``"shared"``.  For words that are wanted long after the load: ptxas moves other loads
    down to their first use, behind branches and waits that would have covered them, but leaves alone what the memory
    model orders (section 8.4, "Strong operations").
    """
    kind: Any = types.uint32 if count == 1 else types.UniTuple(types.uint32, count)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        loaded = _load_words(builder, space, count, arguments[0])
        return loaded[0] if count == 1 else context.make_tuple(builder, kind, loaded)

    return _intrinsic_of_arity(1, kind(_S if space == "shared" else _G), generate)


def _load_words(builder: ir.IRBuilder, space: str, count: int, address: ir.Value, offset: int = 0) -> list[ir.Value]:
    """What `load_words` emits, at an address plus a constant."""
    places = ", ".join(f"${i}" for i in range(count))
    target = f".v{count}.u32 {{{places}}}" if count > 1 else f".u32 {places}"
    text = f"ld.relaxed.cta.{space}{target}, [${count}{f'+{offset}' if offset else ''}];"
    kind, letter = (_S, "r") if space == "shared" else (_G, "l")
    result = _I32 if count == 1 else ir.LiteralStructType([_I32] * count)
    loaded = _asm(builder, result, text, ",".join(["=r"] * count + [letter]), [(_LLVM[kind], address)])
    return [loaded] if count == 1 else [builder.extract_value(loaded, i) for i in range(count)]


_SHORT = {"float16": "f16", "bfloat16": "bf16"}


def sparse_wgmma(units: Sequence[int], n: int, dtype: str, k_major: bool = False) -> Any:
    """Intrinsic ``(sums, values, metadata, low, high) -> sums``: a 2:4 sparse 64 x 32 matrix times several others.

    Instructions ``wgmma.mma_async.sp.m64nNk32``, as one group that is committed and not waited for: the sums are there
    after `wgmma_settle`, and the registers of ``values`` may change after `wgmma_wait`.  All 128 threads of a warpgroup
    run it.

    Parameters
    ----------
    units
        Where the operand B of each instruction lies, in 16 bytes from where the descriptor says.
    n
        Columns of each, a multiple of 8 up to 256.
    dtype
        ``"float16"`` or ``"bfloat16"``; sums are float32.
    k_major
        Whether the k of B are neighbours in memory (`k_major_descriptor`), else its n (`matrix_descriptor`).

    Notes
    -----
    PTX ISA, "wgmma.mma_async.sp".  Thread 4 g + t of warp w has of instruction i, in sums ``(i * n / 8 + j) * 4``
    and on, rows 16 w + g (first two) and 16 w + g + 8 (last two) and columns 8 j + 2 t and the next ("Register
    fragments for D").  ``values`` and ``metadata`` are those of `numbasparse.kernels.two_four`, for sparsity selector
    0: lanes 2 and 3 of four give metadata that is not read.  ``low`` and ``high`` are a descriptor; the last immediate
    operand is 1 where B is MN-major.  The fence orders the registers' last writes before the instructions.
    """
    total = len(units) * n // 2
    kind = types.UniTuple(types.float32, total)
    signature = kind(kind, types.UniTuple(types.uint32, 4), types.uint32, types.uint32, types.uint32)
    step = _SparseStep(tuple(units), n, dtype, k_major)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        packed, values, metadata, low, high = arguments
        sums = [builder.extract_value(packed, i) for i in range(total)]
        kept = [builder.extract_value(values, i) for i in range(4)]
        return context.make_tuple(builder, kind, step.emit(builder, sums, kept, metadata, low, high))

    return _intrinsic_of_arity(5, signature, generate)


@dataclass(frozen=True)
class _SparseStep:
    """The text of one group of `sparse_wgmma`: see there; ``selector`` says which lanes give the metadata."""

    units: tuple[int, ...]
    n: int
    dtype: str
    k_major: bool
    selector: int = 0

    def emit(
        self,
        builder: ir.IRBuilder,
        sums: Sequence[ir.Value],
        values: Sequence[ir.Value],
        metadata: ir.Value,
        low: ir.Value,
        high: ir.Value,
    ) -> list[ir.Value]:
        """The sums after it."""
        total, n, short = len(sums), self.n, _SHORT[self.dtype]
        a = ", ".join(f"${2 * total + i}" for i in range(4))
        places = [f"${2 * total + 4 + i}" for i in range(3)]
        lines = [
            ".reg .pred p;",
            ".reg .b64 d;",
            ".reg .b32 l;",
            "setp.ne.b32 p, 1, 0;",
            "wgmma.fence.sync.aligned;",
            f"mov.b32 l, {places[1]};",
        ]
        for i, (unit, before) in enumerate(zip(self.units, [0, *self.units], strict=False)):
            own = ", ".join(f"${i * n // 2 + j}" for j in range(n // 2))
            if unit != before:
                lines.append(f"add.u32 l, l, {unit - before};")
            lines.append(f"mov.b64 d, {{l, {places[2]}}};")
            lines.append(
                f"wgmma.mma_async.sp.sync.aligned.m64n{n}k32.f32.{short}.{short} "
                f"{{{own}}}, {{{a}}}, d, {places[0]}, {self.selector}, p, 1, 1, {int(not self.k_major)};"
            )
        lines.append("wgmma.commit_group.sync.aligned;")
        constraint = ",".join(["=f"] * total + [str(i) for i in range(total)] + ["r"] * 7 + ["~{memory}"])
        operands = [(_F32, v) for v in sums] + [(_I32, v) for v in (*values, metadata, low, high)]
        made = _asm(builder, ir.LiteralStructType([_F32] * total), "{ " + " ".join(lines) + " }", constraint, operands)
        return [builder.extract_value(made, i) for i in range(total)]


@dataclass(frozen=True)
class StepRun:
    """Steps of `sparse_wgmma` one behind another, all of them known when the code is made; K-major.

    Their weights lie in shared memory as `numbasparse.kernels.two_four.fragments` has them, 2048 bytes a step, and
    behind them the metadata, 512 bytes for every two steps: thread i of a warp reads its word i, which is of the first
    step in the first two lanes of four (sparsity selector 0), of the second one in the others (selector 1).

    A step's weight is read while the step two before it is ordered, since reads queue behind the tensor cores' own of
    shared memory.  Two steps are under way when the next is ordered: five sets of registers.

    The tensor cores read a step's registers when its turn comes.  ptxas keeps others from being put there within one
    piece of code without branches only (seen in machine code, and in wrong sums); what is under way at the end of
    `begin` and `go_on` goes on being used by the code until it is done: `HELD`, and a part of `CARRIED`.

    Parameters
    ----------
    words
        Start of each step's operands, in 16 bytes from where the descriptor says.
    units, n, dtype
        As of `sparse_wgmma`.
    high
        Of the descriptor: `k_major_descriptor`.
    """

    words: tuple[int, ...]
    units: tuple[int, ...]
    n: int
    dtype: str
    high: int

    FIRST = 2
    """Steps of `begin`."""
    CARRIED = 18
    """Words: what a thread has of the weights of the first four steps, two by two, and their metadata."""
    HELD = 10
    """Words: of the last two steps what they read, weights and then metadata."""

    @property
    def metadata(self) -> int:
        """Bytes from the values of the first step to the metadata."""
        return 2048 * len(self.words)

    @property
    def nbytes(self) -> int:
        """Of all values and metadata."""
        return self.metadata + 512 * -(-len(self.words) // 2)

    @property
    def _sums(self) -> Any:
        return types.UniTuple(types.float32, len(self.units) * self.n // 2)

    def begin(self) -> Any:
        """Intrinsic ``(sums, held, own, metadata, low) -> (sums, carried)``: the first steps.

        ``held`` is of the steps under way, if there are any; ``own`` is where a thread's values of the first step are,
        ``metadata`` its first word; ``low`` of the descriptor.  When it ends, no group is under way that was before.
        """
        kept, held_kind = types.UniTuple(types.uint32, self.CARRIED), types.UniTuple(types.uint32, self.HELD)
        both = types.Tuple((self._sums, kept))
        signature = both(self._sums, held_kind, kept.dtype, kept.dtype, kept.dtype)

        def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
            packed, held, *addresses = arguments
            total = self._sums.count
            sums = [builder.extract_value(packed, i) for i in range(total)]
            before = [builder.extract_value(held, i) for i in range(self.HELD)]
            weights = {i: self._load(builder, i, addresses) for i in range(2)}
            words = {0: self._load_metadata(builder, 0, addresses)}
            # What follows may get the registers of the steps before, so it is read when they are done.
            for i, done in ((0, before[:4]), (1, before[4:])):
                sums = self._step(builder, i, sums, weights[i], words[0], addresses)
                self._wait(builder)
                _use(builder, done, addresses[2])
                if i + 2 < len(self.words):
                    weights[i + 2] = self._load(builder, i + 2, addresses)
            words[1] = self._load_metadata(builder, 1, addresses)
            zero = ir.Constant(_I32, 0)
            fours = [*weights[0], *weights[1], *(word for i in (2, 3) for word in weights.get(i, [zero] * 4))]
            carried = [*fours, words[0], words[1]]
            made = context.make_tuple(builder, self._sums, sums), context.make_tuple(builder, kept, carried)
            return context.make_tuple(builder, both, made)

        return _intrinsic_of_arity(5, signature, generate)

    def go_on(self) -> Any:
        """Intrinsic ``(sums, carried, own, metadata, low) -> (sums, held)``: the others; the last two are still under
        way.
        """
        kept, held_kind = types.UniTuple(types.uint32, self.CARRIED), types.UniTuple(types.uint32, self.HELD)
        both = types.Tuple((self._sums, held_kind))
        signature = both(self._sums, kept, kept.dtype, kept.dtype, kept.dtype)

        def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
            packed, carried, *addresses = arguments
            sums = [builder.extract_value(packed, i) for i in range(self._sums.count)]
            given = [builder.extract_value(carried, i) for i in range(self.CARRIED)]
            weights, metadata = {i: given[4 * i : 4 * i + 4] for i in range(4)}, dict(enumerate(given[16:]))
            done = {2: weights[0], 3: [*weights[1], metadata[0]]}
            for i in range(self.FIRST, len(self.words)):
                sums = self._step(builder, i, sums, weights[i], metadata[i // 2], addresses)
                if i + 2 < len(self.words):
                    weights[i + 2] = self._load(builder, i + 2, addresses)
                    if i % 2 == 0:
                        metadata[i // 2 + 1] = self._load_metadata(builder, i // 2 + 1, addresses)
                self._wait(builder)
                _use(builder, done.get(i, []), addresses[2])
            last = len(self.words) - 1
            held = [*weights[last - 1], *weights[last], metadata[(last - 1) // 2], metadata[last // 2]]
            made = context.make_tuple(builder, self._sums, sums), context.make_tuple(builder, held_kind, held)
            return context.make_tuple(builder, both, made)

        return _intrinsic_of_arity(5, signature, generate)

    def nothing(self) -> Any:
        """Intrinsic ``() -> held``: where no steps are under way."""
        kind = types.UniTuple(types.uint32, self.HELD)

        def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
            return context.make_tuple(builder, kind, [ir.Constant(_I32, 0)] * self.HELD)

        return _intrinsic_of_arity(0, kind(), generate)

    def keep(self) -> Any:
        """Intrinsic ``(held, low) -> void``: behind the wait for the steps that ``held`` is of."""
        kind = types.UniTuple(types.uint32, self.HELD)

        def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
            _use(builder, [builder.extract_value(arguments[0], i) for i in range(self.HELD)], arguments[1])
            return context.get_dummy_value()

        return _intrinsic_of_arity(2, types.void(kind, types.uint32), generate)

    def _step(
        self,
        builder: ir.IRBuilder,
        number: int,
        sums: list[ir.Value],
        weights: Sequence[ir.Value],
        metadata: ir.Value,
        addresses: Sequence[ir.Value],
    ) -> list[ir.Value]:
        """Order one; the sums after it."""
        low = builder.add(addresses[2], ir.Constant(_I32, self.words[number]))
        step = _SparseStep(self.units, self.n, self.dtype, k_major=True, selector=number % 2)
        return step.emit(builder, sums, weights, metadata, low, ir.Constant(_I32, self.high))

    @staticmethod
    def _wait(builder: ir.IRBuilder) -> None:
        """Until two steps are under way."""
        _asm(builder, _VOID, "wgmma.wait_group.sync.aligned 2;", "~{memory}", [])

    @staticmethod
    def _load(builder: ir.IRBuilder, step: int, addresses: Sequence[ir.Value]) -> list[ir.Value]:
        return _load_words(builder, "shared", 4, addresses[0], 2048 * step)

    @staticmethod
    def _load_metadata(builder: ir.IRBuilder, pair: int, addresses: Sequence[ir.Value]) -> ir.Value:
        return _load_words(builder, "shared", 1, addresses[1], 512 * pair)[0]


def _use(builder: ir.IRBuilder, words: Sequence[ir.Value], low: ir.Value) -> None:
    """Instructions that read words, and do nothing, which ptxas does not know: ``low`` of a descriptor is not 2^32 - 1.

    So their registers are not given to others before.
    """
    for first in range(0, len(words), 4):
        whole = len(words) >= first + 4
        # Fours of values have registers side by side anyway, other words each its own.
        for some in [words[first : first + 4]] if whole else [[word] for word in words[first:]]:
            names, place = ", ".join(f"${i}" for i in range(len(some))), f"${len(some)}"
            store = f"st.shared{'.v4' if whole else ''}.b32 [{place}], {'{' + names + '}' if whole else names};"
            text = f"{{ .reg .pred p; setp.eq.u32 p, {place}, -1; @p {store} }}"
            constraint = ",".join(["r"] * (len(some) + 1) + ["~{memory}"])
            _asm(builder, _VOID, text, constraint, [(_I32, value) for value in (*some, low)])


def wgmma_wait(groups: int) -> Any:
    """Intrinsic that waits until at most ``groups`` of the newest groups of `sparse_wgmma` are under way."""
    return _operation(f"wgmma.wait_group.sync.aligned {groups};", ())


def wgmma_settle(total: int) -> Any:
    """Intrinsic ``(sums) -> sums`` that waits for all groups; what reads its result comes after the wait."""
    kind = types.UniTuple(types.float32, total)
    constraint = ",".join(["=f"] * total + [str(i) for i in range(total)] + ["~{memory}"])

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        operands = [(_F32, builder.extract_value(arguments[0], i)) for i in range(total)]
        text = "wgmma.wait_group.sync.aligned 0;"
        made = _asm(builder, ir.LiteralStructType([_F32] * total), text, constraint, operands)
        return context.make_tuple(builder, kind, [builder.extract_value(made, i) for i in range(total)])

    return _intrinsic_of_arity(1, kind(kind), generate)


def store_sums(total: int) -> Any:
    """Intrinsic ``(sums, address) -> void``: a thread's sums in fours to shared memory, 2048 bytes apart.

    Of 128 threads, whose addresses are 16 bytes apart, the fours lie side by side.  ``total`` is a multiple of 4.
    """
    signature = types.void(types.UniTuple(types.float32, total), types.uint32)
    text = "st.shared.v4.f32 [$0], {$1, $2, $3, $4};"

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        packed, base = arguments
        for i in range(0, total, 4):
            own = [(_F32, builder.extract_value(packed, i + j)) for j in range(4)]
            address = builder.add(base, ir.Constant(_I32, 512 * i))
            _asm(builder, _VOID, text, "r,f,f,f,f,~{memory}", [(_I32, address), *own])
        return context.get_dummy_value()

    return _intrinsic_of_arity(2, signature, generate)


def add_sums(total: int) -> Any:
    """Intrinsic ``(sums, address) -> sums``: adds what `store_sums` of another thread has stored."""
    kind = types.UniTuple(types.float32, total)
    text = "ld.shared.v4.f32 {$0, $1, $2, $3}, [$4];"

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        packed, base = arguments
        sums = []
        for i in range(0, total, 4):
            address = builder.add(base, ir.Constant(_I32, 512 * i))
            four = ir.LiteralStructType([_F32] * 4)
            loaded = _asm(builder, four, text, "=f,=f,=f,=f,r,~{memory}", [(_I32, address)])
            for j in range(4):
                own = builder.extract_value(packed, i + j)
                sums.append(builder.fadd(own, builder.extract_value(loaded, j)))
        return context.make_tuple(builder, kind, sums)

    return _intrinsic_of_arity(2, kind(kind, types.uint32), generate)


def gathered_mma(displacements: Sequence[int], mask: int, dtype: str, depth: int = 8) -> Any:
    """Intrinsic ``(sums, values, address) -> sums``: a 16 x depth matrix times gathered rows, for each warp its own.

    For each displacement some ``mma.sync.m16n8k8`` or ``k16``, whose operands B are columns of ``depth`` rows in shared
    memory: 32 columns of 8 rows, or 16 of 16.  Lane l gives the address of row ``l % depth`` at column
    ``8 * (l // depth)``; the displacement is added, and then `Swizzle.mask` applied.

    Parameters
    ----------
    displacements
        Bytes; displacement i belongs to sums ``4 * i * (32 / depth)`` and on, in the order of `sparse_wgmma`.
    mask
        See `Swizzle`.
    dtype
        ``"float16"`` or ``"bfloat16"``; sums are float32.
    depth
        8 or 16.

    Notes
    -----
    PTX ISA, "Matrix fragments for mma.m16n8k8" and "for mma.m16n8k16 with floating point type": A is as in
    `two_four.fragments`, for 16 with all columns kept; B is a register for each eight rows.  "ldmatrix": four 8 x 8
    matrices, lanes 8 m to 8 m + 7 giving the rows of matrix m; transposed, a lane gets what operand B of an mma holds.
    """
    eights, halves = 32 // depth, depth // 8
    total = 4 * eights * len(displacements)
    kind = types.UniTuple(types.float32, total)
    signature = kind(kind, types.UniTuple(types.uint32, 2 * halves), types.uint32)
    short = _SHORT[dtype]
    load = "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0, $1, $2, $3}, [$4];"
    places = iter(range(4 + 3 * halves + 4))
    d, a_text, b_text, c_text = (
        "{" + ", ".join(f"${next(places)}" for _ in range(count)) + "}" for count in (4, 2 * halves, halves, 4)
    )
    multiply = f"mma.sync.aligned.m16n8k{depth}.row.col.f32.{short}.{short}.f32 {d}, {a_text}, {b_text}, {c_text};"
    constraint = ",".join(["=f"] * 4 + ["r"] * (3 * halves) + ["f"] * 4)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        packed, values, base = arguments
        sums = [builder.extract_value(packed, i) for i in range(total)]
        a = [(_I32, builder.extract_value(values, i)) for i in range(2 * halves)]
        for number, displacement in enumerate(displacements):
            place = _swizzled(builder, builder.add(base, ir.Constant(_I32, displacement)), mask)
            loaded = _asm(builder, ir.LiteralStructType([_I32] * 4), load, "=r,=r,=r,=r,r,~{memory}", [(_I32, place)])
            for eight in range(eights):
                at = 4 * (number * eights + eight)
                b = [(_I32, builder.extract_value(loaded, halves * eight + half)) for half in range(halves)]
                c = [(_F32, sums[at + i]) for i in range(4)]
                made = _asm(builder, ir.LiteralStructType([_F32] * 4), multiply, constraint, [*a, *b, *c])
                sums[at : at + 4] = [builder.extract_value(made, i) for i in range(4)]
        return context.make_tuple(builder, kind, sums)

    return _intrinsic_of_arity(3, signature, generate)


def pair_mma(pieces: Sequence[tuple[int, int]], line: int, mask: int, dtype: str) -> Any:
    """Intrinsic ``(sums, values, address) -> sums``: a 16 x 8 matrix times gathered k of rows of pixels.

    The operands B of each warp's `mma.sync.m16n8k8` are pairs of neighbouring k of eight neighbouring rows of shared
    memory, 4 bytes for each lane, of which lane l gives the address: pair ``l % 4`` of row ``l // 4``.

    Parameters
    ----------
    pieces
        (displacement, eights): where eights of rows begin, bytes, and how many there are, ``line`` bytes apart.
    line, mask, dtype
        Sums are in the order of the pieces; see `Swizzle` and `sparse_wgmma`.

    Notes
    -----
    PTX ISA, "Matrix fragments for mma.m16n8k8": of B lane l holds k ``2 (l % 4)`` and the next of column ``l // 4``.
    Of eight rows of 128 bytes (or pairs of 64) the same piece of 16 bytes is in eight places, by the swizzle, so that
    pairs of four different places in their pieces meet 32 banks, whatever pieces they are.
    """
    total = 4 * sum(count for _, count in pieces)
    kind = types.UniTuple(types.float32, total)
    signature = kind(kind, types.UniTuple(types.uint32, 2), types.uint32)
    short = _SHORT[dtype]
    load = "ld.shared.b32 $0, [$1];"
    multiply = (
        f"mma.sync.aligned.m16n8k8.row.col.f32.{short}.{short}.f32 {{$0, $1, $2, $3}}, {{$4, $5}}, {{$6}}, "
        "{$7, $8, $9, $10};"
    )
    constraint = ",".join(["=f"] * 4 + ["r"] * 3 + ["f"] * 4)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        packed, values, base = arguments
        sums = [builder.extract_value(packed, i) for i in range(total)]
        a = [(_I32, builder.extract_value(values, i)) for i in range(2)]
        places = [displacement + i * line for displacement, count in pieces for i in range(count)]
        for first in range(0, len(places), _PAIRS_AT_ONCE):
            some = places[first : first + _PAIRS_AT_ONCE]
            loaded = []
            for place in some:
                address = _swizzled(builder, builder.add(base, ir.Constant(_I32, place)), mask)
                loaded.append(_asm(builder, _I32, load, "=r,r,~{memory}", [(_I32, address)]))
            for number, word in enumerate(loaded, first):
                c = [(_F32, sums[4 * number + i]) for i in range(4)]
                made = _asm(builder, ir.LiteralStructType([_F32] * 4), multiply, constraint, [*a, (_I32, word), *c])
                sums[4 * number : 4 * number + 4] = [builder.extract_value(made, i) for i in range(4)]
        return context.make_tuple(builder, kind, sums)

    return _intrinsic_of_arity(3, signature, generate)


_PAIRS_AT_ONCE = 8
"""Loads that `pair_mma` has under way."""


def decode_integers(dtype: str) -> Any:
    """Intrinsic ``(codes) -> values``: 16-bit values of eight bytes that are 128 more, the lowest of a word first.

    Notes
    -----
    PTX ISA, "prmt".  With 0x64 as its upper byte, a byte is the float16 of 1024 and itself, from which 1152 is taken.
    bfloat16 has too few digits for that: behind 0x4B0000 a byte is the float32 of 2**23 and itself; the upper half of
    the difference is exact.
    """
    kind, made = types.UniTuple(types.uint32, 2), types.UniTuple(types.uint32, 4)
    half = (
        "{ .reg .b32 a; prmt.b32 a, $1, 0x64646464, $2; sub.f16x2 $0, a, $3; }",
        "=r,r,n,r",
        (0x4140, 0x4342),
    )
    wide = (
        "{ .reg .b32 a, b; .reg .f32 f, g; prmt.b32 a, $1, 0x4B000000, $2; prmt.b32 b, $1, 0x4B000000, $3; "
        "mov.b32 f, a; mov.b32 g, b; sub.rn.f32 f, f, 0f4B000080; sub.rn.f32 g, g, 0f4B000080; mov.b32 a, f; "
        "mov.b32 b, g; prmt.b32 $0, a, b, 0x7632; }",
        "=r,r,n,n",
        ((0x7550, 0x7551), (0x7552, 0x7553)),
    )

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        words = []
        for i in range(4):
            code = (_I32, builder.extract_value(arguments[0], i // 2))
            if dtype == "float16":
                text, letters, selectors = half
                operands = [code, (_I32, ir.Constant(_I32, selectors[i % 2])), (_I32, ir.Constant(_I32, 0x64806480))]
            else:
                text, letters, pairs = wide
                operands = [code, *((_I32, ir.Constant(_I32, selector)) for selector in pairs[i % 2])]
            words.append(_asm(builder, _I32, text, letters, operands))
        return context.make_tuple(builder, made, words)

    return _intrinsic_of_arity(1, made(kind), generate)


def decode_nibbles() -> Any:
    """Intrinsic ``(codes, low, high) -> values``: 16-bit values of eight nibbles, the lowest first.

    ``codes`` is a word; ``low`` and ``high`` have the lower and the upper bytes of 16 values, which nibbles stand for.

    Notes
    -----
    PTX ISA, "prmt": each of four nibbles of a selector takes one of eight bytes by its lower three bits.  So four
    nibbles without their upper bits take from the first and from the second eight values, and the upper bits, moved
    down by one and added to 0, 1, 2, 3, say which of both it is.
    """
    kind, made = types.UniTuple(types.uint32, 4), types.UniTuple(types.uint32, 4)
    # Places: s takes a byte, t chooses; l and h are the lower and upper bytes of four values.
    text = (
        "{ .reg .b32 c, s, t, a, b, l, h; shr.b32 c, $2, $3; and.b32 s, c, 0x7777; shr.b32 t, c, 1; "
        "and.b32 t, t, 0x4444; or.b32 t, t, 0x3210; "
        "prmt.b32 a, $4, $5, s; prmt.b32 b, $6, $7, s; prmt.b32 l, a, b, t; "
        "prmt.b32 a, $8, $9, s; prmt.b32 b, $10, $11, s; prmt.b32 h, a, b, t; "
        "prmt.b32 $0, l, h, 0x5140; prmt.b32 $1, l, h, 0x7362; }"
    )
    letters = "=r,=r,r,n,r,r,r,r,r,r,r,r"

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        code, *halves = arguments
        table = [(_I32, builder.extract_value(half, i)) for half in halves for i in range(4)]
        words = []
        for shift in (0, 16):
            operands = [(_I32, code), (_I32, ir.Constant(_I32, shift)), *table]
            pair = _asm(builder, ir.LiteralStructType([_I32, _I32]), text, letters, operands)
            words += [builder.extract_value(pair, i) for i in range(2)]
        return context.make_tuple(builder, made, words)

    return _intrinsic_of_arity(3, made(types.uint32, kind, kind), generate)


def mask_words() -> Any:
    """Intrinsic ``(values, flags) -> values``: eight 16-bit values, those zero whose flag is not set.

    The flag of value i is bit 7 of byte i of ``flags``, from the fifth on bit 6 of byte i - 4.

    Notes
    -----
    PTX ISA, "prmt": a nibble of the selector with its upper bit set gives the sign of a byte eight times.
    """
    kind = types.UniTuple(types.uint32, 4)
    text = "{ .reg .b32 m; shl.b32 m, $2, $3; prmt.b32 m, m, m, $4; and.b32 $0, $1, m; }"

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        values, flags = arguments
        words = []
        for i in range(4):
            numbers = [(_I32, ir.Constant(_I32, n)) for n in (i // 2, (0x9988, 0xBBAA)[i % 2])]
            operands = [(_I32, builder.extract_value(values, i)), (_I32, flags), *numbers]
            words.append(_asm(builder, _I32, text, "=r,r,r,n,n", operands))
        return context.make_tuple(builder, kind, words)

    return _intrinsic_of_arity(2, kind(kind, types.uint32), generate)


def decode_bytes(words: int) -> Any:
    """Intrinsic ``(codes, table) -> values``: the 16-bit value of every byte, the lowest of a word first.

    ``codes`` are so many words; ``values`` twice as many, with two values each.  ``table`` is the shared address of the
    16-bit values that bytes stand for.
    """
    kind, made = types.UniTuple(types.uint32, words), types.UniTuple(types.uint32, 2 * words)
    text = (
        "{ .reg .b32 a, b; .reg .b16 x, y; bfe.u32 a, $1, $3, 8; bfe.u32 b, $1, $4, 8; mad.lo.u32 a, a, 2, $2; "
        "mad.lo.u32 b, b, 2, $2; ld.shared.b16 x, [a]; ld.shared.b16 y, [b]; mov.b32 $0, {x, y}; }"
    )

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        codes, table = arguments
        values = []
        for i in range(2 * words):
            word, low = builder.extract_value(codes, i // 2), 16 * (i % 2)
            shifts = [(_I32, ir.Constant(_I32, low + s)) for s in (0, 8)]
            values.append(_asm(builder, _I32, text, "=r,r,r,n,n", [(_I32, word), (_I32, table), *shifts]))
        return context.make_tuple(builder, made, values)

    return _intrinsic_of_arity(2, made(kind, types.uint32), generate)


def _swizzled(builder: ir.IRBuilder, address: ir.Value, mask: int) -> ir.Value:
    """Where shared memory holds what has a linear address: see `Swizzle`."""
    if not mask:
        return address
    moved = builder.and_(builder.lshr(address, ir.Constant(_I32, 3)), ir.Constant(_I32, mask))
    return builder.xor(address, moved)


def store_fragments(
    places: Sequence[tuple[int, int, int]],
    strides: tuple[int, int, int, int],
    limits: tuple[int, int, int],
) -> Any:
    """Intrinsic ``(sums, y, rows, oy, ox, n) -> void``: store the sums of tensor cores as float32.

    ``rows`` are the numbers k of this lane's two rows, int32, negative for a row that is not there.  Sums ``4 * i``
    and on, in the order of `sparse_wgmma`, are of place (dy, dx, dn): two neighbouring n of the two rows, at
    ``y + k * strides[0] + dy * strides[1] + dx * strides[2] + dn * strides[3]`` (bytes), written if ``oy + dy``,
    ``ox + dx`` and ``n + dn`` are under ``limits``.
    """
    kind = types.UniTuple(types.float32, 4 * len(places))
    signature = types.void(kind, _G, types.UniTuple(types.int32, 2), types.int32, types.int32, types.int32)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        packed, y, numbers, *origin = arguments
        rows = _two_rows(builder, numbers, strides[0])
        for i, place in enumerate(places):
            inside = _all_under(builder, origin, place, limits)
            at = ir.Constant(_I64, sum(p * s for p, s in zip(place, strides[1:], strict=True)))
            for half, (there, start) in enumerate(rows):
                with builder.if_then(builder.and_(inside, there)):
                    values = [builder.extract_value(packed, 4 * i + 2 * half + v) for v in range(2)]
                    _store_global(builder, builder.add(y, builder.add(start, at)), values, "float32")
        return context.get_dummy_value()

    return _intrinsic_of_arity(6, signature, generate)


_PLACES_AT_ONCE = 4
"""Places whose residuals are loaded one behind another, 8 registers for each."""


def store_finished_fragments(
    places: Sequence[tuple[int, int, int]],
    dtype: str,
    finish: Finish,
    strides: tuple[int, int, int, int],
    limits: tuple[int, int, int],
) -> Any:
    """Intrinsic ``(sums, y, residual, rows, bias, scale, oy, ox, n) -> void``: finish sums of tensor cores and store.

    As `store_fragments`, but 16 bytes at once: four lanes trade their pairs of n of four eights, so that each has
    one eight.  There is a place for each four eights, that of this lane's eight (``oy``, ``ox`` and ``n`` may depend
    on the lane), at a multiple of 16 bytes.  An eight is written or not as a whole.  What is written is as in
    `store_rows`; ``bias`` and ``scale`` are the float32 of the two rows.

    Parameters
    ----------
    dtype
        ``"float16"`` or ``"bfloat16"``, of ``y`` and of the residual (addressed like ``y``).
    """
    kind = types.UniTuple(types.float32, 16 * len(places))
    two, both = types.UniTuple(types.int32, 2), types.UniTuple(types.float32, 2)
    signature = types.void(kind, _G, _G, two, both, both, types.int32, types.int32, types.int32)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        packed, y, extra, numbers, bias, scale, *origin = arguments
        rows = _two_rows(builder, numbers, strides[0])
        shifts = [builder.extract_value(bias, half) if finish.bias else None for half in range(2)]
        factors = [builder.extract_value(scale, half) if finish.scaled else None for half in range(2)]
        lane = _asm(builder, _I32, "mov.u32 $0, %laneid;", "=r", [])
        for first in range(0, len(places), _PLACES_AT_ONCE):
            some = []
            for i in range(first, min(len(places), first + _PLACES_AT_ONCE)):
                inside = _all_under(builder, origin, places[i], limits)
                at = ir.Constant(_I64, sum(p * s for p, s in zip(places[i], strides[1:], strict=True)))
                for half, (there, start) in enumerate(rows):
                    where, written = builder.add(start, at), builder.and_(inside, there)
                    loaded = []
                    if finish.residual:
                        wanted = builder.zext(written, _I32)
                        loaded = _load_words_if(builder, wanted, builder.add(extra, where), constant=False)
                    some.append((i, half, where, written, loaded))
            for i, half, where, written, loaded in some:
                added: list[Any] = [None] * 8
                if finish.residual:
                    added = [x for word in _trade(builder, lane, loaded) for x in _widen_pair(builder, word, dtype)]
                words = []
                for j in range(4):
                    sums = [builder.extract_value(packed, 16 * i + 4 * j + 2 * half + v) for v in range(2)]
                    ready = [
                        finish.apply(builder, value, factors[half], shifts[half], added[2 * j + v])
                        for v, value in enumerate(sums)
                    ]
                    words.append(_narrow_pair(builder, ready, dtype))
                words = _trade(builder, lane, words)
                with builder.if_then(written):
                    operands = [(_I64, builder.add(y, where)), *((_I32, word) for word in words)]
                    _asm(builder, _VOID, "st.global.v4.b32 [$0], {$1, $2, $3, $4};", "l,r,r,r,r,~{memory}", operands)
        return context.get_dummy_value()

    return _intrinsic_of_arity(9, signature, generate)


@dataclass(frozen=True)
class ColumnStore:
    """Finishing sums and storing them in NHWC.

    Each eight of pixels and 16 rows of `sparse_wgmma` is transposed between the lanes, so that lane l has four
    neighbouring channels of pixel ``l // 4``: of rows ``2 q``, ``2 q + 1``, ``2 q + 8`` and ``2 q + 9``, q being
    ``l % 4``.  They are stored at once at ``y`` (which has this lane's pixel and channel in it) plus what a place adds,
    where ``there`` is not 0 and the place within the limits.

    Residuals of ``ahead`` places are loaded before: by `begin`, which may come long before the sums are there, and then
    by `store` of the places that follow.

    Attributes
    ----------
    places
        (image, row, column) of the first pixel of every eight, from the first; 4 sums each.
    dtype
        ``"float16"``, ``"bfloat16"``; ``"float32"`` stores sums as they are, without a ``finish``.
    finish
        What is written is as in `store_rows`; ``bias`` and ``scale`` are the float32 of rows ``l // 4`` and
        ``l // 4 + 8``; ``residual`` is addressed like ``y``.
    strides, limits
        Bytes from an image, a row and a column to the next; image, row and column of ``origin`` (this lane's) plus a
        place are under ``limits``.
    ahead
        How many, two registers each.

    Notes
    -----
    PTX ISA, "movmatrix": an 8 x 8 matrix of 16-bit values in one register of each lane, transposed.  All lanes run it.
    """

    places: tuple[tuple[int, int, int], ...]
    dtype: str
    finish: Finish | None
    strides: tuple[int, int, int]
    limits: tuple[int, int, int]
    ahead: int

    @property
    def _adds(self) -> bool:
        return self.finish is not None and self.finish.residual

    @property
    def _first(self) -> range:
        """The places of `begin`."""
        return range(min(self.ahead, len(self.places)))

    @property
    def _begun(self) -> Any:
        return types.UniTuple(types.int32, 2 * len(self._first)) if self._adds else types.int32

    def begin(self) -> Any:
        """Intrinsic ``(residual, there, origin) -> words`` of the first places; 0 without a residual."""

        def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
            extra, there, origin = arguments
            if not self._adds:
                return ir.Constant(_I32, 0)
            words = [word for i in self._first for word in self._residual(builder, i, extra, there, origin)]
            return context.make_tuple(builder, self._begun, words)

        return _intrinsic_of_arity(3, self._begun(_G, types.int32, _ORIGIN), generate)

    def store(self) -> Any:
        """Intrinsic ``(sums, words, y, residual, there, bias, scale, origin) -> void``, the words being `begin`'s."""
        kind = types.UniTuple(types.float32, 4 * len(self.places))
        both = types.UniTuple(types.float32, 2)
        signature = types.void(kind, self._begun, _G, _G, types.int32, both, both, _ORIGIN)

        def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
            packed, begun, y, extra, there, bias, scale, origin = arguments
            added: list[list[Any]] = []
            if self._adds:
                added = [[builder.extract_value(begun, 2 * i + half) for half in range(2)] for i in self._first]

            def load(stop: int) -> None:
                """Residuals of all places before ``stop`` that have none yet."""
                if self._adds:
                    some = range(len(added), min(stop, len(self.places)))
                    added.extend(self._residual(builder, i, extra, there, origin) for i in some)

            for start in range(0, len(self.places), _AT_ONCE_IN_COLUMNS):
                stop = min(start + _AT_ONCE_IN_COLUMNS, len(self.places))
                load(stop)
                for i in range(start, stop):
                    sums = [builder.extract_value(packed, 4 * i + v) for v in range(4)]
                    words = self._finished(builder, sums, bias, scale, added[i] if self._adds else None)
                    at, written = self._whereabouts(builder, i, there, origin)
                    with builder.if_then(written):
                        operands = [(_I64, builder.add(y, at)), *((_I32, word) for word in words)]
                        names = ", ".join(f"${1 + v}" for v in range(len(words)))
                        letters = ",".join(["l", *("r" for _ in words), "~{memory}"])
                        _asm(builder, _VOID, f"st.global.v{len(words)}.b32 [$0], {{{names}}};", letters, operands)
                load(stop + self.ahead)
            return context.get_dummy_value()

        return _intrinsic_of_arity(8, signature, generate)

    def _whereabouts(self, builder: ir.IRBuilder, i: int, there: Any, origin: Any) -> tuple[Any, Any]:
        """What a place adds to an address, and whether it is there."""
        start = [builder.extract_value(origin, axis) for axis in range(3)]
        at = ir.Constant(_I64, sum(p * s for p, s in zip(self.places[i], self.strides, strict=True)))
        there = builder.icmp_signed("!=", there, ir.Constant(_I32, 0))
        return at, builder.and_(there, _all_under(builder, start, self.places[i], self.limits))

    def _residual(self, builder: ir.IRBuilder, i: int, extra: Any, there: Any, origin: Any) -> list[Any]:
        at, written = self._whereabouts(builder, i, there, origin)
        wanted = builder.zext(written, _I32)
        return _load_words_if(builder, wanted, builder.add(extra, at), 2, constant=False)

    def _finished(self, builder: ir.IRBuilder, sums: Sequence[Any], bias: Any, scale: Any, added: Any) -> list[Any]:
        """The words of a place that a lane stores."""
        finish = self.finish
        if finish is None:
            return _transposed_floats(builder, sums)
        extras: list[Any] = [None] * 4
        if added is not None:
            back = [_transposed(builder, word) for word in added]
            extras = [x for word in back for x in _widen_pair(builder, word, self.dtype)]
        factors, shifts = (
            [builder.extract_value(pair, v // 2) for v in range(4)] if wanted else [None] * 4
            for pair, wanted in ((scale, finish.scaled), (bias, finish.bias))
        )
        ready = [finish.apply(builder, sums[v], factors[v], shifts[v], extras[v]) for v in range(4)]
        return [_transposed(builder, _narrow_pair(builder, ready[v : v + 2], self.dtype)) for v in (0, 2)]


_ORIGIN = types.UniTuple(types.int32, 3)
_AT_ONCE_IN_COLUMNS = 4
"""Places after which as many residuals are loaded."""


def _transposed(builder: ir.IRBuilder, word: Any) -> Any:
    """Of an 8 x 8 matrix of 16-bit values, two in each lane, the transposed one."""
    return _asm(builder, _I32, "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [(_I32, word)])


def _transposed_floats(builder: ir.IRBuilder, values: Sequence[Any]) -> list[Any]:
    """The same of two matrices of 32-bit values, by halves: two words of each, those of the first first."""
    bits = [builder.bitcast(value, _I32) for value in values]
    words = []
    for pair in (bits[:2], bits[2:]):
        halves = [
            _transposed(builder, _chosen_bytes(builder, pair[0], pair[1], pattern)) for pattern in (0x5410, 0x7632)
        ]
        words += [_chosen_bytes(builder, halves[0], halves[1], pattern) for pattern in (0x5410, 0x7632)]
    return words


def _chosen_bytes(builder: ir.IRBuilder, a: Any, b: Any, pattern: int) -> Any:
    """Bytes of two words: 0x5410 are their lower halves, 0x7632 their upper ones."""
    return _asm(builder, _I32, f"prmt.b32 $0, $1, $2, {pattern};", "=r,r,r", [(_I32, a), (_I32, b)])


def _two_rows(builder: ir.IRBuilder, numbers: ir.Value, stride: int) -> list[tuple[Any, Any]]:
    """Of a lane's two rows: whether it is there, and its offset."""
    rows = []
    for half in range(2):
        number = builder.extract_value(numbers, half)
        there = builder.icmp_signed(">=", number, ir.Constant(_I32, 0))
        rows.append((there, builder.mul(builder.sext(number, _I64), ir.Constant(_I64, stride))))
    return rows


def _all_under(builder: ir.IRBuilder, origin: Sequence[Any], place: Sequence[int], limits: Sequence[int]) -> Any:
    under = [
        builder.icmp_signed("<", builder.add(start, ir.Constant(_I32, offset)), ir.Constant(_I32, limit))
        for start, offset, limit in zip(origin, place, limits, strict=True)
    ]
    return functools.reduce(builder.and_, under)


def _load_words_if(
    builder: ir.IRBuilder, wanted: Any, address: Any, count: int = 4, default: int = 0, constant: bool = True
) -> list[Any]:
    """2 or 4 neighbouring words in global memory that nobody writes; ``default`` each where ``wanted``, i32, is 0.

    ptxas brings a load of what is said to be ``constant`` to its use, behind stores of others; else it stays before
    them.
    """
    places = [f"${i}" for i in range(count)]
    moves = " ".join(f"mov.b32 {place}, {default};" for place in places)
    text = (
        f"{{ .reg .pred p; setp.ne.s32 p, ${count}, 0; {moves} "
        f"@p ld.global{'.nc' if constant else ''}.v{count}.b32 {{{', '.join(places)}}}, [${count + 1}]; }}"
    )
    # Written before the address is read: the results must have registers of their own.
    letters = ",".join(["=&r"] * count + ["r", "l"])
    loaded = _asm(builder, ir.LiteralStructType([_I32] * count), text, letters, [(_I32, wanted), (_I64, address)])
    return [builder.extract_value(loaded, i) for i in range(count)]


def _trade(builder: ir.IRBuilder, lane: Any, words: Sequence[Any]) -> list[Any]:
    """Four neighbouring lanes with four words each: word i of lane t becomes word t of lane i.

    A transposition in two exchanges of half of the words, with the neighbour and with the next but one.
    """
    words = list(words)
    for distance in (1, 2):
        bit = builder.and_(lane, ir.Constant(_I32, distance))
        upper = builder.icmp_signed("!=", bit, ir.Constant(_I32, 0))
        for low in range(4):
            high = low + distance
            if low & distance:
                continue
            sent = builder.select(upper, words[low], words[high])
            text = f"shfl.sync.bfly.b32 $0, $1, {distance}, 0x1f, 0xffffffff;"
            got = _asm(builder, _I32, text, "=r,r", [(_I32, sent)])
            words[low], words[high] = (
                builder.select(upper, got, words[low]),
                builder.select(upper, words[high], got),
            )
    return words


def _narrow_pair(builder: ir.IRBuilder, values: Sequence[Any], dtype: str) -> Any:
    """Two float32 rounded to 16 bits, in a register, the first in the lower half."""
    # cvt...x2 puts its first source into the upper half (section 9.7.9.21); bfloat16 needs capability 8.0.
    text = "{ .reg .b16 a, b; cvt.rn.f16.f32 a, $1; cvt.rn.f16.f32 b, $2; mov.b32 $0, {a, b}; }"
    if dtype == "bfloat16":
        text = "cvt.rn.bf16x2.f32 $0, $2, $1;"
    return _asm(builder, _I32, text, "=r,f,f", [(_F32, values[0]), (_F32, values[1])])
