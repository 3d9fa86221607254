"""LLVM vector code as numba intrinsics: what the CPU kernels are written with.

Every function here either returns an ``@intrinsic`` made for given constants or is one.  Addresses are plain
``int64`` (numba ``intp``) byte addresses: the kernels work on packed buffers whose layout they own, where
typed arrays would only add index arithmetic.

Vectors have ``lanes`` float32 lanes (16: AVX-512, 8: AVX2, 4: SSE or NEON).  LLVM legalises a width that the
host lacks, so every width is correct everywhere, only not fast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llvmlite import ir
from numba import extending, types
from numba.core import cgutils

from numbasparse.activations import Activation, slope_of

Entries = Literal["wide", "coded", "scaled"]
"""Form of the entries of a packed weight, one for each non-zero.

``"wide"``
    8 bytes: int32 byte offset into the packed input, then the float32 value.
``"coded"``
    A word of 32 bits: the offset, divided by 4, in the low 24, the code of the value in the high 8. A table of
    float32 holds the value of each code.
``"scaled"``
    The same word. Each output channel has a table, which several may share, and a factor for its sums.
"""

ENTRY_BYTES: dict[Entries, int] = {"wide": 8, "coded": 4, "scaled": 4}

OFFSET_BITS = 24
"""Bits of a word for its offset, which counts in units of 4 bytes."""

ENTRIES_AFTER = 16
"""Readable entries that must follow the last one of a packed weight: the inner loop reads ahead."""

# numba has no types for what it makes of these: an intrinsic is called from compiled code alone.
intrinsic: Any = extending.intrinsic

_I1, _I32, _I64, _F32 = ir.IntType(1), ir.IntType(32), ir.IntType(64), ir.FloatType()


def _const(value: int) -> ir.Constant:
    return ir.Constant(_I64, value)


def _plus(bd: Any, address: Any, displacement: int) -> Any:
    return bd.add(address, _const(displacement)) if displacement else address


def _load(bd: Any, ty: Any, address: Any, align: int) -> Any:
    value = bd.load(bd.inttoptr(address, ty.as_pointer()))
    value.align = align
    return value


def _store(bd: Any, value: Any, address: Any, align: int) -> None:
    bd.store(value, bd.inttoptr(address, value.type.as_pointer())).align = align


def _call(bd: Any, name: str, returns: Any, args: Sequence[Any]) -> Any:
    fnty = ir.FunctionType(returns, [a.type for a in args])
    return bd.call(cgutils.get_or_insert_function(bd.module, fnty, name), list(args))


def _vector(lanes: int) -> ir.VectorType:
    return ir.VectorType(_F32, lanes)


def _constants(lanes: int, value: float) -> ir.Constant:
    return ir.Constant(_vector(lanes), [value] * lanes)


def _splat(bd: Any, scalar: Any, lanes: int) -> Any:
    undefined = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
    one = bd.insert_element(undefined, scalar, ir.Constant(_I32, 0))
    return bd.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes))


def _shuffle(bd: Any, a: Any, b: Any, index: Sequence[int]) -> Any:
    return bd.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, len(index)), list(index)))


def _concat(bd: Any, parts: list[Any]) -> Any:
    """Join equal vectors, pairwise, so that the backend sees sub-vector inserts."""
    while len(parts) > 1:
        width = parts[0].type.count
        parts = [_shuffle(bd, a, b, range(2 * width)) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _fma(bd: Any, a: Any, b: Any, c: Any) -> Any:
    return _call(bd, f"llvm.fma.v{a.type.count}f32", a.type, [a, b, c])


# --- scalar access -----------------------------------------------------------------------------------------


@intrinsic
def load_i64(typingctx: Any, address: Any) -> Any:
    """The int64 at ``address`` (8-byte aligned)."""

    def codegen(ctx: Any, bd: Any, sig: Any, args: Any) -> Any:
        return _load(bd, _I64, args[0], 8)

    return types.int64(types.intp), codegen


@intrinsic
def load_i32(typingctx: Any, address: Any) -> Any:
    """The int32 at ``address`` (4-byte aligned), as int64."""

    def codegen(ctx: Any, bd: Any, sig: Any, args: Any) -> Any:
        return bd.sext(_load(bd, _I32, args[0], 4), _I64)

    return types.int64(types.intp), codegen


@intrinsic
def store_i64(typingctx: Any, address: Any, value: Any) -> Any:
    """Write an int64 to ``address`` (8-byte aligned)."""

    def codegen(ctx: Any, bd: Any, sig: Any, args: Any) -> Any:
        _store(bd, args[1], args[0], 8)
        return ctx.get_dummy_value()

    return types.void(types.intp, types.int64), codegen


# --- the sparse row: the inner loop of every CPU kernel ------------------------------------------------------


@dataclass(frozen=True)
class RowKernel:
    """Constants of the inner loop over the non-zeros of one output channel.

    Attributes
    ----------
    lanes
        float32 lanes of a vector.
    rows, columns
        Accumulators as a grid: output rows x vectors along the width.  All ``rows * columns`` stay in
        registers over the whole loop.
    displacements
        Byte distance of each accumulator's input vector from the non-zero's offset, row-major.
    chunk
        Lanes that are neighbours in the output; a vector holds ``lanes // chunk`` such runs, each with its own
        output address.
    valid
        Output columns of a run that exist (at most ``columns * chunk``; fewer only where the whole output is
        narrower than the tile).
    sets
        Copies of the accumulators used in turn, to hide the latency of the FMA where the grid is small.
    aligned
        Whether every input vector starts on a multiple of its own size.
    start
        ``"bias"`` begins with the channel's bias, ``"resume"`` with the partial sums of the last block.
    finish
        ``"store"`` applies the activation and writes the output, ``"spill"`` keeps partial sums.
    out_displacements
        Byte distance of each vector of a row from the row's output address, if not simply one after another.
    entries
        Form of the non-zeros.
    residual
        Whether a tensor like the output is added to the sums before the activation.
    """

    lanes: int
    rows: int
    columns: int
    displacements: tuple[int, ...]
    chunk: int
    valid: int
    sets: int
    aligned: bool
    activation: Activation
    start: Literal["bias", "resume"]
    finish: Literal["store", "spill"]
    out_displacements: tuple[int, ...] = ()
    entries: Entries = "wide"
    residual: bool = False


ROWS_ARGUMENTS = 14
"""Number of arguments of `rows_function`."""

ROWS_SIGNATURE = "void(" + ", ".join(["int64"] * ROWS_ARGUMENTS) + ")"
"""C signature of `rows_function`."""


def rows_function(kernels: Sequence[RowKernel]) -> Callable[..., None]:
    """Function ``(role, input, low, high, entries, decoder, rows, starts, partials, base, bias, outs, plane, pitch)``.

    Runs ``kernels[role]`` over the pieces of rows ``low`` .. ``high`` (see `kernels.cpu_rows.PackedRows`): for
    each, ``acc[t] += value * input[offset + displacements[t]]`` over its entries.  ``partials`` holds partial
    sums of output channels from ``base``; ``bias`` is the bias' address, ``outs`` a table of
    ``lanes // chunk`` output addresses and after them the distance in bytes from an output to its residual, which
    is read only where one is added, ``plane`` and ``pitch`` the bytes of an output channel and row.

    ``decoder`` depends on the form of the entries. ``"wide"``: not used. ``"coded"``: the table, float32 (256,) or
    as many codes as there are. ``"scaled"``: for each output channel 8 bytes, int32 byte offset of its table from
    ``decoder`` and float32 factor.
    """
    first, second, third, fourth = (_rows_intrinsic(k) for k in kernels)

    def run_rows(
        role: int,
        source: int,
        low: int,
        high: int,
        entries: int,
        decoder: int,
        rows: int,
        starts: int,
        partials: int,
        base: int,
        bias: int,
        outs: int,
        plane: int,
        pitch: int,
    ) -> None:
        if role == 0:
            first(source, low, high, entries, decoder, rows, starts, partials, base, bias, outs, plane, pitch)
        elif role == 1:
            second(source, low, high, entries, decoder, rows, starts, partials, base, bias, outs, plane, pitch)
        elif role == 2:
            third(source, low, high, entries, decoder, rows, starts, partials, base, bias, outs, plane, pitch)
        else:
            fourth(source, low, high, entries, decoder, rows, starts, partials, base, bias, outs, plane, pitch)

    return run_rows


@dataclass(frozen=True)
class _Row:
    """Addresses and distances of one piece of a row, as LLVM values."""

    source: Any
    entry: Any
    end: Any
    partial: Any
    bias: Any
    table: Any
    """Table of the values by code, if there is one."""
    scale: Any
    """Address of the factor, if there is one."""
    outs: Any
    out_offset: Any
    pitch: Any


def _rows_intrinsic(k: RowKernel) -> Callable[..., None]:
    """The loop over pieces of rows.  It is emitted whole: numba's front end takes longer than LLVM otherwise."""
    partial_bytes, entry_bytes = 4 * k.lanes * k.rows * k.columns, ENTRY_BYTES[k.entries]

    @intrinsic
    def sparse_rows(
        typingctx: Any,
        source: Any,
        low: Any,
        high: Any,
        entries: Any,
        decoder: Any,
        rows: Any,
        starts: Any,
        partials: Any,
        base: Any,
        bias: Any,
        outs: Any,
        plane: Any,
        pitch: Any,
    ) -> Any:
        def codegen(ctx: Any, bd: Any, sig: Any, args: Any) -> Any:
            source, low, high, entries, decoder, rows, starts, partials, base, bias, outs, plane, pitch = args
            with cgutils.for_range_slice(bd, low, high, _const(1)) as (piece, _):
                four = bd.mul(piece, _const(4))
                channel = bd.sext(_load(bd, _I32, bd.add(rows, four), 4), _I64)
                bounds = bd.add(starts, four)
                start, end = (bd.sext(_load(bd, _I32, _plus(bd, bounds, d), 4), _I64) for d in (0, 4))
                table, scale = _decoding(bd, k, decoder, channel)
                row = _Row(
                    source=source,
                    entry=bd.add(entries, bd.mul(start, _const(entry_bytes))),
                    end=bd.add(entries, bd.mul(end, _const(entry_bytes))),
                    partial=bd.add(partials, bd.mul(bd.sub(channel, base), _const(partial_bytes))),
                    bias=bd.add(bias, bd.mul(channel, _const(4))),
                    table=table,
                    scale=scale,
                    outs=outs,
                    out_offset=bd.mul(channel, plane),
                    pitch=pitch,
                )
                _sparse_row(bd, k, row)
            return ctx.get_dummy_value()

        return types.void(*[types.intp] * (ROWS_ARGUMENTS - 1)), codegen

    return sparse_rows


def _decoding(bd: Any, k: RowKernel, decoder: Any, channel: Any) -> tuple[Any, Any]:
    """Addresses of an output channel's table and of its factor, where there are such."""
    if k.entries != "scaled":
        return decoder, None
    header = bd.add(decoder, bd.mul(channel, _const(8)))
    table = bd.add(decoder, bd.sext(_load(bd, _I32, header, 4), _I64))
    return table, _plus(bd, header, 4)


def _sparse_row(bd: Any, k: RowKernel, row: _Row) -> None:
    count, size, entry_bytes = k.rows * k.columns, 4 * k.lanes, ENTRY_BYTES[k.entries]
    vector, wide = _vector(k.lanes), k.entries == "wide"

    def word_at(entry: Any) -> Any:
        """An entry's offset; or the word that holds offset and code."""
        word = _load(bd, _I32, entry, 4)
        return bd.sext(word, _I64) if wide else bd.zext(word, _I64)

    def address_of(offset: Any) -> Any:
        # An empty asm hides how the address was made.  Otherwise LLVM folds base + offset into the operand of
        # every FMA; an indexed operand is split into two operations on Intel (2-6 % slower, measured).
        return bd.call(ir.InlineAsm(ir.FunctionType(_I64, [_I64]), "", "=r,0"), [bd.add(row.source, offset)])

    def places(word: Any) -> list[Any]:
        """Address of an entry's input; and of its value, if that is in a table."""
        if wide:
            return [address_of(word)]
        offset = bd.shl(bd.and_(word, _const((1 << OFFSET_BITS) - 1)), _const(2))
        code = bd.lshr(word, _const(OFFSET_BITS))
        return [address_of(offset), bd.add(row.table, bd.shl(code, _const(2)))]

    def step(entry: Any, place: list[Any], accs: list[Any]) -> list[Any]:
        value = _splat(bd, _load(bd, _F32, _plus(bd, entry, 4) if wide else place[1], 4), k.lanes)
        align = size if k.aligned else 4
        loads = [_load(bd, vector, _plus(bd, place[0], d), align) for d in k.displacements]
        return [_fma(bd, value, x, acc) for x, acc in zip(loads, accs, strict=True)]

    def take(entries: int, start: Any, limit: Any, accs: list[Any]) -> tuple[Any, list[Any]]:
        """Loop over ``entries`` at a time; with several, each has its own set of accumulators.

        Words are loaded two turns ahead and made addresses one turn ahead: FMAs that wait for an offset to
        arrive run at little more than half speed on Zen 3.  So the last turns read words after the end, whose
        places are computed and never read.
        """
        each = 1 if wide else 2

        def words(entry: Any, turns: int) -> list[Any]:
            return [word_at(_plus(bd, entry, entry_bytes * (turns * entries + u))) for u in range(entries)]

        def turn(entry: Any, carried: list[Any]) -> list[Any]:
            here, ahead = carried[: each * entries], carried[each * entries : (each + 1) * entries]
            accs = carried[(each + 1) * entries :]
            later = words(entry, 2)
            for u in range(entries):
                part = slice(u * count, (u + 1) * count)
                place = here[each * u : each * (u + 1)]
                accs[part] = step(_plus(bd, entry, entry_bytes * u), place, accs[part])
            return [place for word in ahead for place in places(word)] + later + accs

        first = [place for word in words(start, 0) for place in places(word)]
        end, carried = _loop(bd, start, limit, entry_bytes * entries, first + words(start, 1) + accs, turn)
        return end, carried[(each + 1) * entries :]

    if k.start == "resume":
        accs = [_load(bd, vector, _plus(bd, row.partial, size * t), size) for t in range(count)]
    elif row.scale is None:
        accs = [_splat(bd, _load(bd, _F32, row.bias, 4), k.lanes)] * count
    else:  # the bias is added after the factor
        accs = [_constants(k.lanes, 0.0)] * count
    accs += [_constants(k.lanes, 0.0)] * (count * (k.sets - 1))
    entry = row.entry
    if k.sets > 1:
        entry, accs = take(k.sets, entry, bd.sub(row.end, _const(entry_bytes * (k.sets - 1))), accs)
    _, sums = take(1, entry, row.end, accs[:count])
    for u in range(1, k.sets):
        sums = [bd.fadd(x, y) for x, y in zip(sums, accs[u * count : (u + 1) * count], strict=True)]
    if k.finish == "spill":
        for t in range(count):
            _store(bd, sums[t], _plus(bd, row.partial, size * t), size)
        return
    if row.scale is not None:
        scale, bias = (_splat(bd, _load(bd, _F32, at, 4), k.lanes) for at in (row.scale, row.bias))
        sums = [_fma(bd, x, scale, bias) for x in sums]
    _write_tile(bd, k, sums, row.outs, row.out_offset, row.pitch)


def _loop(bd: Any, start: Any, limit: Any, stride: int, values: list[Any], body: Any) -> tuple[Any, list[Any]]:
    """``p = start; while p < limit: values = body(p, values); p += stride`` with the test at the bottom."""
    before = bd.block
    inside = bd.append_basic_block("nonzeros")
    after = bd.append_basic_block("done")
    bd.cbranch(bd.icmp_signed("<", start, limit), inside, after)
    bd.position_at_end(inside)
    pointer = bd.phi(_I64)
    pointer.add_incoming(start, before)
    carried = [bd.phi(v.type) for v in values]
    for phi, v in zip(carried, values, strict=True):
        phi.add_incoming(v, before)
    updated = body(pointer, carried)
    advanced = bd.add(pointer, _const(stride))
    last = bd.block
    pointer.add_incoming(advanced, last)
    for phi, v in zip(carried, updated, strict=True):
        phi.add_incoming(v, last)
    bd.cbranch(bd.icmp_signed("<", advanced, limit), inside, after)
    bd.position_at_end(after)
    end = bd.phi(_I64)
    end.add_incoming(start, before)
    end.add_incoming(advanced, last)
    results = [bd.phi(v.type) for v in values]
    for phi, old, new in zip(results, values, updated, strict=True):
        phi.add_incoming(old, before)
        phi.add_incoming(new, last)
    return end, results


def _write_tile(bd: Any, k: RowKernel, accs: list[Any], outs: Any, out_offset: Any, out_pitch: Any) -> None:
    if k.residual:
        accs = _add_residual(bd, k, accs, outs, out_offset, out_pitch)
    for run in range(k.lanes // k.chunk):
        address = bd.add(_load(bd, _I64, _plus(bd, outs, 8 * run), 8), out_offset)
        for y in range(k.rows):
            for v in range(k.columns):
                columns = min(k.chunk, k.valid - v * k.chunk)
                if columns <= 0:
                    continue
                if run == 0:
                    accs[y * k.columns + v] = _activate(bd, k.activation, accs[y * k.columns + v])
                _store_run(bd, accs[y * k.columns + v], run * k.chunk, columns, _plus(bd, address, _place(k, v)))
            address = bd.add(address, out_pitch)


def _place(k: RowKernel, column: int) -> int:
    """Bytes from a row's output address to a vector of it."""
    return k.out_displacements[column] if k.out_displacements else 4 * column * k.chunk


def _add_residual(bd: Any, k: RowKernel, accs: list[Any], outs: Any, out_offset: Any, out_pitch: Any) -> list[Any]:
    """Add what lies where the outputs will, a fixed distance away; lanes that are not stored are not read."""
    runs = k.lanes // k.chunk
    distance = bd.add(_load(bd, _I64, _plus(bd, outs, 8 * runs), 8), out_offset)
    addresses = [bd.add(_load(bd, _I64, _plus(bd, outs, 8 * run), 8), distance) for run in range(runs)]
    sums = list(accs)
    for y in range(k.rows):
        for v in range(k.columns):
            columns = min(k.chunk, k.valid - v * k.chunk)
            if columns <= 0:
                continue
            added = _constants(k.lanes, 0.0)
            for run, address in enumerate(addresses):
                added = _load_run(bd, added, run * k.chunk, columns, _plus(bd, address, _place(k, v)))
            sums[y * k.columns + v] = bd.fadd(sums[y * k.columns + v], added)
        addresses = [bd.add(address, out_pitch) for address in addresses]
    return sums


def _load_run(bd: Any, value: Any, first: int, count: int, address: Any) -> Any:
    """Replace ``count`` lanes from ``first`` by what lies at ``address``, read in powers of two as `_store_run`."""
    lanes = value.type.count
    done = 0
    while done < count:
        piece = 1 << ((count - done).bit_length() - 1)
        at, source = first + done, _plus(bd, address, 4 * done)
        if piece == lanes:
            return _load(bd, value.type, source, 4)
        if piece == 1:
            value = bd.insert_element(value, _load(bd, _F32, source, 4), ir.Constant(_I32, at))
        else:
            part = _load(bd, _vector(piece), source, 4)
            wide = _shuffle(bd, part, part, [j % piece for j in range(lanes)])
            # A choice of `lanes` or more is one of the second vector's lanes.
            chosen = [lanes + j - at if at <= j < at + piece else j for j in range(lanes)]
            value = _shuffle(bd, value, wide, chosen)
        done += piece
    return value


def _store_run(bd: Any, value: Any, first: int, count: int, address: Any) -> None:
    """Store ``count`` lanes from ``first`` in powers of two: masked stores are slow on AVX2 and absent on NEON."""
    done = 0
    while done < count:
        piece = 1 << ((count - done).bit_length() - 1)
        if piece == value.type.count:
            _store(bd, value, address, 4)
        elif piece == 1:
            lane = bd.extract_element(value, ir.Constant(_I32, first + done))
            _store(bd, lane, _plus(bd, address, 4 * done), 4)
        else:
            part = _shuffle(bd, value, value, range(first + done, first + done + piece))
            _store(bd, part, _plus(bd, address, 4 * done), 4)
        done += piece


# --- products with vectors -----------------------------------------------------------------------------------


def gather_dot(lanes: int, displacements: Sequence[int], stride: int, coded: bool) -> Callable[..., None]:
    """Intrinsic ``(stream, count, x, sums, table)``: the products of a sparse row with a few vectors, by gathers.

    The stream holds chunks of ``lanes`` float32 values and as many uint16 places (6 bytes for each non-zero, read once
    and in order); with ``coded`` the values are bytes, places in the float32 ``table``.  For each vector p::

        sums[p] += sum(value[i] * memory[x + displacements[p] + 4 * stride * place[i]] for i in range(count))

    Lanes after the last non-zero are neither read nor added, whatever lies there: a masked gather leaves them alone.

    Parameters
    ----------
    lanes
        float32 of a vector register.
    displacements
        Bytes from ``x`` to each vector.
    stride
        Values from a place to the next.
    """
    size = 1 if coded else 4

    @intrinsic
    def dot(typingctx: Any, stream: Any, count: Any, x: Any, sums: Any, table: Any) -> Any:
        def codegen(ctx: Any, bd: Any, sig: Any, args: Any) -> Any:
            stream, count, x, sums, table = args
            i32s, i16s, i8s = (ir.VectorType(ir.IntType(bits), lanes) for bits in (32, 16, 8))
            iota = ir.Constant(i32s, list(range(lanes)))

            def chunk(done: Any, accumulators: list[Any]) -> list[Any]:
                at = bd.add(stream, bd.mul(done, _const(size + 2)))
                left = bd.trunc(bd.sub(count, done), _I32)
                mask = bd.icmp_signed("<", iota, _splat(bd, left, lanes))
                places = bd.zext(_load(bd, i16s, _plus(bd, at, size * lanes), 2), i32s)
                if stride > 1:
                    places = bd.mul(places, ir.Constant(i32s, [stride] * lanes))
                if coded:
                    values = _gather(bd, lanes, table, bd.zext(_load(bd, i8s, at, 1), i32s), mask)
                else:
                    values = _load(bd, _vector(lanes), at, 2)
                return [
                    _fma(bd, values, _gather(bd, lanes, _plus(bd, x, d), places, mask), acc)
                    for d, acc in zip(displacements, accumulators, strict=True)
                ]

            zeros = [_constants(lanes, 0.0)] * len(displacements)
            _, totals = _loop(bd, _const(0), count, lanes, zeros, chunk)
            for p, total in enumerate(totals):
                width = lanes
                while width > 1:
                    width //= 2
                    low, high = range(width), range(width, 2 * width)
                    total = bd.fadd(_shuffle(bd, total, total, low), _shuffle(bd, total, total, high))
                where = _plus(bd, sums, 4 * p)
                one = bd.extract_element(total, ir.Constant(_I32, 0))
                _store(bd, bd.fadd(_load(bd, _F32, where, 4), one), where, 4)
            return ctx.get_dummy_value()

        return types.void(types.intp, types.int64, types.intp, types.intp, types.intp), codegen

    return dot


def _gather(bd: Any, lanes: int, base: Any, places: Any, mask: Any) -> Any:
    """float32 at ``base + 4 * places`` (int32) where the mask is set, zeros elsewhere."""
    pointers = ir.VectorType(ir.PointerType(), lanes)
    # One base and a vector of 32-bit indices, which x86 gathers take as they are.  llvmlite thinks that what it makes
    # is one pointer.
    where = bd.gep(bd.inttoptr(base, _F32.as_pointer()), [places], source_etype=_F32)
    where.type = pointers
    args = [where, ir.Constant(_I32, 4), mask, _constants(lanes, 0.0)]
    return _call(bd, f"llvm.masked.gather.v{lanes}f32.v{lanes}p0", _vector(lanes), args)


def finish_sums(activation: Activation, displacements: Sequence[int], residual: bool) -> Callable[..., None]:
    """Intrinsic ``(sums, scale, bias, out, added)``: finish the sums of one output channel and store them.

    Sum p goes to ``out + displacements[p]``, multiplied by the float32 at ``scale``, with that at ``bias`` added, with
    ``residual`` also what lies ``added`` bytes after that place, and the activation applied.
    """

    @intrinsic
    def finish(typingctx: Any, sums: Any, scale: Any, bias: Any, out: Any, added: Any) -> Any:
        def codegen(ctx: Any, bd: Any, sig: Any, args: Any) -> Any:
            sums, scale, bias, out, added = args
            factor, shift = _load(bd, _F32, scale, 4), _load(bd, _F32, bias, 4)
            for p, displacement in enumerate(displacements):
                value = _load(bd, _F32, _plus(bd, sums, 4 * p), 4)
                value = _call(bd, "llvm.fma.f32", _F32, [value, factor, shift])
                where = _plus(bd, out, displacement)
                if residual:
                    value = bd.fadd(value, _load(bd, _F32, bd.add(where, added), 4))
                # Four equal lanes: the activations are written for vectors.
                value = bd.extract_element(_activate(bd, activation, _splat(bd, value, 4)), ir.Constant(_I32, 0))
                _store(bd, value, where, 4)
            return ctx.get_dummy_value()

        return types.void(types.intp, types.intp, types.intp, types.intp, types.int64), codegen

    return finish


@intrinsic
def clear_f32(typingctx: Any, address: Any) -> Any:
    """Write a float32 zero to ``address``."""

    def codegen(ctx: Any, bd: Any, sig: Any, args: Any) -> Any:
        _store(bd, ir.Constant(_F32, 0.0), args[0], 4)
        return ctx.get_dummy_value()

    return types.void(types.intp), codegen


# --- columns of a matrix -------------------------------------------------------------------------------------


def add_column(lanes: int, displacements: Sequence[int], coded: bool, ahead: int) -> Callable[..., None]:
    """Intrinsic ``(x, first, limit, sums, table)``: add the products of some vectors with a sparse column.

    The vectors are at ``x + displacements[t]`` and stay in registers.  Entries lie from ``first`` up to ``limit``: 8
    bytes of an int32 offset and a float32 value; with ``coded`` 4 bytes, an offset divided by 4 and the place of the
    value in the float32 ``table``, 16 bits each.  At ``sums`` plus an offset are the sums of a row, a vector for each,
    which are read and written: aligned to their size.  What lies ``ahead`` bytes behind the vectors is fetched into the
    first cache, if that is not 0.
    """

    @intrinsic
    def add(typingctx: Any, x: Any, first: Any, limit: Any, sums: Any, table: Any) -> Any:
        def codegen(ctx: Any, bd: Any, sig: Any, args: Any) -> Any:
            x, first, limit, sums, table = args
            vectors = [_load(bd, _vector(lanes), _plus(bd, x, d), 4) for d in displacements]
            for byte in range(0, 4 * lanes * len(displacements) if ahead else 0, 64):
                _prefetch(bd, _plus(bd, x, ahead + byte))

            def entry(at: Any, _: list[Any]) -> list[Any]:
                word = bd.zext(_load(bd, _I32, at, 4), _I64)
                where = _plus(bd, at, 4)
                if coded:
                    where = bd.add(table, bd.shl(bd.lshr(word, _const(16)), _const(2)))
                    word = bd.shl(bd.and_(word, _const(0xFFFF)), _const(2))
                value = _splat(bd, _load(bd, _F32, where, 4), lanes)
                row = bd.add(sums, word)
                for t, vector in enumerate(vectors):
                    own = _plus(bd, row, 4 * lanes * t)
                    total = _fma(bd, value, vector, _load(bd, _vector(lanes), own, 4 * lanes))
                    _store(bd, total, own, 4 * lanes)
                return []

            _loop(bd, first, limit, ENTRY_BYTES["coded" if coded else "wide"], [], entry)
            return ctx.get_dummy_value()

        return types.void(*[types.intp] * 5), codegen

    return add


def clear_vectors(lanes: int) -> Callable[..., None]:
    """Intrinsic ``(first, limit)``: write zeros to vectors, aligned to their size."""

    @intrinsic
    def clear(typingctx: Any, first: Any, limit: Any) -> Any:
        def codegen(ctx: Any, bd: Any, sig: Any, args: Any) -> Any:
            def vector(at: Any, _: list[Any]) -> list[Any]:
                _store(bd, _constants(lanes, 0.0), at, 4 * lanes)
                return []

            _loop(bd, args[0], args[1], 4 * lanes, [], vector)
            return ctx.get_dummy_value()

        return types.void(types.intp, types.intp), codegen

    return clear


def finish_vectors(
    lanes: int, displacements: Sequence[int], activation: Activation, residual: bool
) -> Callable[..., None]:
    """Intrinsic ``(sums, scale, bias, out, added)``: as `finish_sums`, of vectors of one output channel."""

    @intrinsic
    def finish(typingctx: Any, sums: Any, scale: Any, bias: Any, out: Any, added: Any) -> Any:
        def codegen(ctx: Any, bd: Any, sig: Any, args: Any) -> Any:
            sums, scale, bias, out, added = args
            factor, shift = (_splat(bd, _load(bd, _F32, at, 4), lanes) for at in (scale, bias))
            # All are read before any is written: the last vector may lie over a part of the one before.
            values = []
            for t, displacement in enumerate(displacements):
                value = _fma(bd, _load(bd, _vector(lanes), _plus(bd, sums, 4 * lanes * t), 4 * lanes), factor, shift)
                if residual:
                    where = bd.add(_plus(bd, out, displacement), added)
                    value = bd.fadd(value, _load(bd, _vector(lanes), where, 4))
                values.append(_activate(bd, activation, value))
            for value, displacement in zip(values, displacements, strict=True):
                _store(bd, value, _plus(bd, out, displacement), 4)
            return ctx.get_dummy_value()

        return types.void(*[types.intp] * 4, types.int64), codegen

    return finish


# --- activations ---------------------------------------------------------------------------------------------


def _activate(bd: Any, activation: Activation, x: Any) -> Any:
    lanes = x.type.count
    zero = _constants(lanes, 0.0)
    if activation == "none":
        return x
    if activation == "silu":
        one = _constants(lanes, 1.0)
        return bd.fdiv(x, bd.fadd(one, _exp(bd, bd.fsub(zero, x))))
    # An ordered comparison is false for NaN, so NaN passes through as in torch.
    slope = slope_of(activation)
    below = zero if slope is None else bd.fmul(x, _constants(lanes, slope))
    y = bd.select(bd.fcmp_ordered("<", x, zero), below, x)
    if activation == "relu6":
        six = _constants(lanes, 6.0)
        y = bd.select(bd.fcmp_ordered(">", y, six), six, y)
    return y


def _exp(bd: Any, x: Any) -> Any:
    """exp(x) to about 1 ulp: 2**n * p(r), n = round(x / ln 2), polynomial of Cephes' ``expf``."""
    lanes = x.type.count
    const = lambda value: _constants(lanes, value)  # noqa: E731
    # Clamped so that n stays an exponent of a normal number; above, the result is infinite.
    huge = bd.fcmp_ordered(">", x, const(88.5))
    x = bd.select(bd.fcmp_ordered("<", x, const(-87.0)), const(-87.0), x)
    x = bd.select(bd.fcmp_ordered(">", x, const(88.0)), const(88.0), x)
    n = _call(bd, f"llvm.rint.v{lanes}f32", x.type, [bd.fmul(x, const(1.4426950408889634))])
    # ln 2 in two parts (the first exact in few bits) keeps r = x - n ln 2 exact.
    r = _fma(bd, n, const(-0.693359375), x)
    r = _fma(bd, n, const(2.12194440e-4), r)
    p = const(1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = _fma(bd, p, r, const(coefficient))
    p = bd.fadd(_fma(bd, p, bd.fmul(r, r), r), const(1.0))
    integers = ir.VectorType(_I32, lanes)
    # NaN must not reach fptosi (undefined): it goes on through p, which already carries it.
    n = bd.select(bd.fcmp_ordered("ord", n, n), n, const(0.0))
    biased = bd.add(bd.fptosi(n, integers), ir.Constant(integers, [127] * lanes))
    scale = bd.bitcast(bd.shl(biased, ir.Constant(integers, [23] * lanes)), x.type)
    return bd.select(huge, const(float("inf")), bd.fmul(p, scale))


# --- packing -------------------------------------------------------------------------------------------------


def mask_length(chunk: int, stride: int) -> int:
    """int32 mask elements that one run of a packed line needs (see `pack_lines`)."""
    return 2 * chunk if stride == 2 else chunk


PACK_SIGNATURE = "void(" + ", ".join(["int64"] * 8) + ")"
"""C signature of `pack_function`."""


@dataclass(frozen=True)
class Ahead:
    """Bytes that `pack_function` fetches ahead: ``first`` .. ``last`` behind a row's start, ``channels`` further."""

    first: int = 0
    last: int = 0
    channels: int = 0


@dataclass(frozen=True)
class PackedLayout:
    """Vectors of a packed row: the input's bytes from the row's start to each, where it goes, and vectors in all."""

    displacements: tuple[int, ...]
    places: tuple[int, ...]
    pitch: int


def pack_function(
    lanes: int, chunk: int, stride: int, layout: PackedLayout, ahead: Ahead = Ahead()
) -> Callable[..., None]:
    """Function ``(destination, input, channels, count, plane, table, rows, channel_bytes)``: pack a block.

    For each of ``count`` int32 channel numbers at ``channels``, copies ``rows`` input rows of that channel
    (``plane`` bytes apart) to ``destination``, a row as ``layout`` says, a channel every ``channel_bytes``.

    ``table`` holds, for each row and each of the ``lanes // chunk`` runs, two int64: byte offset of the run's
    row from the channel, and the address of its masks: for vector ``i``, `mask_length` int32, negative where
    the element exists.  Lane ``j`` of vector ``i`` becomes the float at
    ``offset + layout.displacements[i] + 4 * stride * j``, or zero where it lies outside of the image: nothing outside
    is read.

    ``ahead`` of each run is fetched into the second cache.
    """
    runs = lanes // chunk
    masks = 4 * mask_length(chunk, stride)
    row_bytes = 4 * lanes * layout.pitch

    def copy_row(bd: Any, destination: Any, source: Any, table: Any, plane: Any) -> None:
        rows, mask = [], []
        for run in range(runs):
            rows.append(bd.add(source, _load(bd, _I64, _plus(bd, table, 16 * run), 8)))
            mask.append(_load(bd, _I64, _plus(bd, table, 16 * run + 8), 8))
        for row in rows:
            coming = bd.add(row, bd.mul(plane, _const(ahead.channels)))
            for distance in range(ahead.first, ahead.last, 64):
                _prefetch(bd, _plus(bd, coming, distance))
        for i, (displacement, place) in enumerate(zip(layout.displacements, layout.places, strict=True)):
            parts = [
                _strided(bd, chunk, stride, _plus(bd, row, displacement), _plus(bd, m, masks * i))
                for row, m in zip(rows, mask, strict=True)
            ]
            _store(bd, _concat(bd, parts), _plus(bd, destination, 4 * lanes * place), 4 * lanes)

    @intrinsic
    def pack_block(
        typingctx: Any,
        destination: Any,
        source: Any,
        channels: Any,
        count: Any,
        plane: Any,
        table: Any,
        rows: Any,
        channel_bytes: Any,
    ) -> Any:
        def codegen(ctx: Any, bd: Any, sig: Any, args: Any) -> Any:
            destination, source, channels, count, plane, table, rows, channel_bytes = args
            with cgutils.for_range(bd, count) as outer:
                number = bd.sext(_load(bd, _I32, bd.add(channels, bd.mul(outer.index, _const(4))), 4), _I64)
                channel = bd.add(source, bd.mul(number, plane))
                packed = bd.add(destination, bd.mul(outer.index, channel_bytes))
                with cgutils.for_range(bd, rows) as inner:
                    to = bd.add(packed, bd.mul(inner.index, _const(row_bytes)))
                    copy_row(bd, to, channel, bd.add(table, bd.mul(inner.index, _const(16 * runs))), plane)
            return ctx.get_dummy_value()

        return types.void(*[types.intp] * 8), codegen

    def run_pack(
        destination: int,
        source: int,
        channels: int,
        count: int,
        plane: int,
        table: int,
        rows: int,
        channel_bytes: int,
    ) -> None:
        pack_block(destination, source, channels, count, plane, table, rows, channel_bytes)

    return run_pack


def _prefetch(bd: Any, address: Any) -> None:
    """Fetch a cache line for reading into the second cache; an address that does not exist is ignored."""
    read, second_cache, data = ir.Constant(_I32, 0), ir.Constant(_I32, 2), ir.Constant(_I32, 1)
    pointer = bd.inttoptr(address, ir.IntType(8).as_pointer())
    _call(bd, "llvm.prefetch.p0", ir.VoidType(), [pointer, read, second_cache, data])


@intrinsic
def prefetch(typingctx: Any, address: Any) -> Any:
    """Fetch the cache line at ``address`` into the second cache."""

    def codegen(ctx: Any, bd: Any, sig: Any, args: Any) -> Any:
        _prefetch(bd, args[0])
        return ctx.get_dummy_value()

    return types.void(types.intp), codegen


def _strided(bd: Any, count: int, stride: int, address: Any, mask: Any) -> Any:
    """``count`` floats ``stride`` apart, zero where the mask is not negative."""
    if stride == 1:
        return _masked_load(bd, count, address, mask)
    if stride == 2:
        low = _masked_load(bd, count, address, mask)
        high = _masked_load(bd, count, _plus(bd, address, 4 * count), _plus(bd, mask, 4 * count))
        return _shuffle(bd, low, high, [2 * j for j in range(count)])
    # Rare: lane by lane.  A lane that does not exist reads its own mask word instead, then is zeroed.
    value = _constants(count, 0.0)
    for j in range(count):
        word = _plus(bd, mask, 4 * j)
        exists = bd.icmp_signed("<", _load(bd, _I32, word, 4), ir.Constant(_I32, 0))
        lane = _load(bd, _F32, bd.select(exists, _plus(bd, address, 4 * stride * j), word), 4)
        lane = bd.select(exists, lane, ir.Constant(_F32, 0.0))
        value = bd.insert_element(value, lane, ir.Constant(_I32, j))
    return value


def _masked_load(bd: Any, lanes: int, address: Any, mask: Any) -> Any:
    vector, integers = _vector(lanes), ir.VectorType(_I32, lanes)
    words = _load(bd, integers, mask, 4)
    # The sign bit is what vmaskmovps and vpmovd2m test, so the comparison costs nothing.
    bits = bd.icmp_signed("<", words, ir.Constant(integers, [0] * lanes))
    args = [
        bd.inttoptr(address, vector.as_pointer()),
        ir.Constant(_I32, 4),
        bits,
        ir.Constant(vector, [0.0] * lanes),
    ]
    return _call(bd, f"llvm.masked.load.v{lanes}f32.p0", vector, args)


# --- atomics and waiting ---------------------------------------------------------------------------------------


@intrinsic
def fetch_add(typingctx: Any, address: Any, value: Any) -> Any:
    """Atomically add to the int64 at ``address``; returns the old value (sequentially consistent)."""

    def codegen(ctx: Any, bd: Any, sig: Any, args: Any) -> Any:
        return bd.atomic_rmw("add", bd.inttoptr(args[0], _I64.as_pointer()), args[1], "seq_cst")

    return types.int64(types.intp, types.int64), codegen


@intrinsic
def compare_exchange(typingctx: Any, address: Any, expected: Any, desired: Any) -> Any:
    """Atomically replace ``expected`` by ``desired``; returns the value seen."""

    def codegen(ctx: Any, bd: Any, sig: Any, args: Any) -> Any:
        pointer = bd.inttoptr(args[0], _I64.as_pointer())
        pair = bd.cmpxchg(pointer, args[1], args[2], "seq_cst", "seq_cst")
        return bd.extract_value(pair, 0)

    return types.int64(types.intp, types.int64, types.int64), codegen


@intrinsic
def f32_pointer(typingctx: Any, address: Any) -> Any:
    """A pointer to float32 at an address: loops over it are vectorized, which they are not over `load_i32`."""

    def codegen(ctx: Any, bd: Any, sig: Any, args: Any) -> Any:
        return bd.inttoptr(args[0], ir.FloatType().as_pointer())

    return types.CPointer(types.float32)(types.intp), codegen


@intrinsic
def atomic_load(typingctx: Any, address: Any) -> Any:
    """The int64 at ``address``, sequentially consistent."""

    def codegen(ctx: Any, bd: Any, sig: Any, args: Any) -> Any:
        return bd.load_atomic(bd.inttoptr(args[0], _I64.as_pointer()), "seq_cst", 8)

    return types.int64(types.intp), codegen


@intrinsic
def atomic_store(typingctx: Any, address: Any, value: Any) -> Any:
    """Write the int64 at ``address``, sequentially consistent."""

    def codegen(ctx: Any, bd: Any, sig: Any, args: Any) -> Any:
        bd.store_atomic(args[1], bd.inttoptr(args[0], _I64.as_pointer()), "seq_cst", 8)
        return ctx.get_dummy_value()

    return types.void(types.intp, types.int64), codegen


@intrinsic
def relax(typingctx: Any) -> Any:
    """Tell the core that this is a waiting loop (x86 ``pause``, Arm ``yield``; elsewhere nothing)."""

    def codegen(ctx: Any, bd: Any, sig: Any, args: Any) -> Any:
        triple = bd.module.triple or ""
        text = "pause" if triple.startswith(("x86_64", "i686")) else ""
        text = "yield" if triple.startswith(("aarch64", "arm64")) else text
        bd.call(ir.InlineAsm(ir.FunctionType(ir.VoidType(), []), text, "~{memory}", side_effect=True), [])
        return ctx.get_dummy_value()

    return types.void(), codegen


def call_address(count: int) -> Callable[..., int]:
    """Intrinsic ``(address, arg, ...)``: call a C function of ``count`` int64 arguments returning int64."""

    @intrinsic
    def call(typingctx: Any, address: Any, args: Any) -> Any:
        def codegen(ctx: Any, bd: Any, sig: Any, values: Any) -> Any:
            pointer = bd.inttoptr(values[0], ir.FunctionType(_I64, [_I64] * count).as_pointer())
            return bd.call(pointer, cgutils.unpack_tuple(bd, values[1], count))

        return types.int64(types.intp, types.UniTuple(types.int64, count)), codegen

    return call
