"""Any sparse matrix in the 2:4 form of the sparse tensor cores, without loss.

A sparse tensor core multiplies with a matrix that has at most two non-zeros among every four neighbouring columns of a
row (a *quad*).  An unstructured mask has not, but a product may take its columns in any order, skip those that are
zero, and take one twice.  Here the rows of a weight are cut into *blocks* of 64 and the work of a block into *steps* of
32 columns, what one ``wgmma.mma_async.sp.m64nNk32`` multiplies, in one of two ways:

`gather_steps`
    For each block an order of its columns in which quads fit, for a kernel that brings the columns one by one.
`cover_steps`
    Columns stay where they are, in *octets* of eight; a step takes four octets at equal distances, and what does not
    fit into one step goes into another that takes the octet again, or into a small dense rest.

The loops are compiled by numba; equal input gives equal output.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numbasparse.codegen.loops import compiled, population

ROWS, STEP, QUADS, OCTET = 64, 32, 8, 8
"""Rows of a block, columns of a step, quads of a step, columns of an octet."""


@dataclass(frozen=True)
class Steps:
    """Rows of a weight in 2:4 form.

    Attributes
    ----------
    first : int64, (parts + 1,)
        Steps of part p are ``first[p]`` up to ``first[p + 1]``; a part is a block, or a piece of one.
    columns : int32
        What the columns of a step are: (steps, 32) columns of the matrix, -1 for none, from `gather_steps`;
        (steps, 2) first octet and distance between octets, from `cover_steps`.
    values : float32, (steps, 64, 16)
        The two values kept of each quad of each row; zero where there are fewer.
    metadata : uint32, (steps, 64)
        Places of the kept values in the order of `fragments`: see `places`.
    """

    first: NDArray[np.int64]
    columns: NDArray[np.int32]
    values: NDArray[np.float32]
    metadata: NDArray[np.uint32]

    @property
    def count(self) -> int:
        """Number of steps."""
        return len(self.columns)


def fragments(values: NDArray[np.float32], dtype: str) -> NDArray[np.uint32]:
    """Values as the 128 threads of a warpgroup hold them in registers.

    Parameters
    ----------
    values : float32, (steps, 64, 16), or (chunks, 64, 8) of a rest
    dtype : str
        ``"float16"`` or ``"bfloat16"``, to which they are rounded (to nearest, ties to even).

    Returns
    -------
    uint32, (steps, 128, 4), or (chunks, 128, 2)
        PTX ISA, "Register fragments for wgmma.mma_async.sp.m64nNk32" (that of matrix A, and of
        ``mma.sp.m16n8k32`` for each warp): warp w has rows 16 w to 16 w + 15; lane l holds of rows l / 4 and l / 4 + 8
        (registers 0 and 1) the kept columns 2 (l % 4) and the next, in registers 2 and 3 those plus 8; the lower half
        of a register has the lower column.  Without the last two, that is matrix A of ``mma.m16n8k8``.
    """
    return lanes(narrow(values, dtype)).view(np.uint32)


def lanes(values: NDArray[Any]) -> NDArray[Any]:
    """What each of 128 threads holds of values (steps, 64, 16) or (chunks, 64, 8), in the order of `fragments`."""
    eights = values.shape[2] // 8
    # (warp, row half, row, column half, column pair, two) -> (warp, row, column pair, column half, row half, two)
    parts = values.reshape(-1, 4, 2, 8, eights, 4, 2).transpose(0, 1, 3, 5, 4, 2, 6)
    return np.ascontiguousarray(parts).reshape(-1, 128, 4 * eights)


def narrow(values: NDArray[np.float32], dtype: str) -> NDArray[np.uint16]:
    """Bits of float32 values rounded to ``"float16"`` or ``"bfloat16"``."""
    if dtype == "float16":
        return values.astype(np.float16).view(np.uint16)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def places(metadata: NDArray[np.uint32]) -> NDArray[np.int64]:
    """Place in its quad (0 to 3) of every kept value, (steps, 64, 16), from the words of `Steps.metadata`.

    PTX ISA, "Sparse matrix storage" and "Metadata" of ``mma.sp.m16n8k32`` with 16-bit values, which
    ``wgmma.mma_async.sp`` has too: word ``(w * 8 + g) * 2 + t`` is the register of lane ``4 g + t`` of warp w for
    sparsity selector 0 (t is 0 or 1).  Its low half is of row g, its high half of row g + 8; each has quads 4 t to
    4 t + 3, four bits each: two places of two bits, the lower place in the lower bits.
    """
    words = metadata.reshape(-1, 4, 8, 2)
    shifts = np.arange(16) * 2
    found = words[..., None] >> shifts.astype(np.uint32) & 3  # (step, warp, row, t, half * 8 + kept)
    return found.reshape(-1, 4, 8, 2, 2, 8).transpose(0, 1, 4, 2, 3, 5).reshape(-1, ROWS, 16).astype(np.int64)


# ---- rows ---------------------------------------------------------------------------------------------------


def order_rows(
    indptr: NDArray[np.int32], indices: NDArray[np.int32], width: int, rows: int = ROWS
) -> NDArray[np.int32]:
    """Rows of a CSR matrix in blocks that have many empty columns: (blocks, rows), -1 where there is no row.

    Rows without non-zeros come last.  A block starts with the fullest row left, and takes the row that adds the
    fewest columns to it, the lower number first.
    """
    order = compiled(_order_rows)(indptr, indices, width, rows)
    blocks = np.full(-(-len(order) // rows) * rows, -1, np.int32)
    blocks[: len(order)] = order
    return blocks.reshape(-1, rows)


def _order_rows(indptr: Any, indices: Any, width: int, rows: int) -> Any:
    count = len(indptr) - 1
    words = (width + 63) // 64
    bits = np.zeros((count, words), np.uint64)
    for row in range(count):
        for i in range(indptr[row], indptr[row + 1]):
            bits[row, indices[i] >> 6] |= np.uint64(1) << np.uint64(indices[i] & 63)
    order = np.empty(count, np.int32)
    left = np.ones(count, np.bool_)
    union = np.zeros(words, np.uint64)
    for place in range(count):
        best, best_score = -1, -1
        if place % rows == 0:
            union[:] = 0
            for row in range(count):
                size = indptr[row + 1] - indptr[row]
                if left[row] and size > best_score:
                    best, best_score = row, int(size)
        else:
            for row in range(count):
                if left[row]:
                    added = 0
                    for w in range(words):
                        added += population(bits[row, w] & ~union[w])
                    # A row of nothing adds nothing and would waste a place.
                    score = width - added if indptr[row + 1] > indptr[row] else 0
                    if score > best_score:
                        best, best_score = row, score
        order[place] = best
        left[best] = False
        for w in range(words):
            union[w] |= bits[best, w]
    return order


# ---- columns one by one -------------------------------------------------------------------------------------


def gather_steps(
    indptr: NDArray[np.int32],
    indices: NDArray[np.int32],
    data: NDArray[np.float32],
    width: int,
    blocks: NDArray[np.int32],
    most_extra: float,
) -> Steps | str:
    """Order the columns of each block of rows so that quads fit.

    Parameters
    ----------
    indptr, indices, data, width
        CSR matrix of ``width`` columns.
    blocks : int32, (blocks, 64)
        Rows of each block, -1 for none.
    most_extra : float
        Quads that may be needed beyond the fewest that hold the columns, as a share of those.

    Returns
    -------
    Steps, one part for each block, or the reason for which there is none
        Quads need no more places than columns where few rows meet: on random masks, 0-1 % extra at 90 % zeros.  Two
        columns always fit, so at most twice the places are needed, and then dense tensor cores are as fast.
    """
    first, columns, needed, made = compiled(_gather)(indptr, indices, width, blocks, most_extra)
    if made < 0:
        return (
            f"no order of the columns puts the mask into 2:4 form with at most {100 * most_extra:.0f} % extra columns "
            f"({needed} columns of 64-row blocks are needed): it has too few zeros, use a dense kernel"
        )
    values, metadata = compiled(_fill_gathered)(indptr, indices, data, width, blocks, first, columns)
    return Steps(first, columns.reshape(-1, STEP), values, metadata)


def _gather(indptr: Any, indices: Any, width: int, blocks: Any, most_extra: float) -> Any:
    """Columns of all steps, one after another; columns needed, and quads made or -1 if there are too many."""
    count = len(blocks)
    masks = np.zeros((count, width), np.uint64)
    needed = least = 0
    for b in range(count):
        for place in range(ROWS):
            row = blocks[b, place]
            if row >= 0:
                for i in range(indptr[row], indptr[row + 1]):
                    masks[b, indices[i]] |= np.uint64(1) << np.uint64(place)
        used = 0
        for c in range(width):
            if masks[b, c] != 0:
                used += 1
        needed += used
        least += (used + 3) // 4
    limit = least + np.int64(least * most_extra)
    columns = np.full((limit * 4 // STEP + count + 1) * STEP, -1, np.int32)
    first = np.zeros(count + 1, np.int64)
    following = np.empty(width + 1, np.int32)
    made = at = 0
    for b in range(count):
        # A linked list of the columns left, those of most rows first: they are the hardest to place.
        rank = np.zeros(ROWS + 2, np.int64)
        weights = np.zeros(width, np.int32)
        for c in range(width):
            v = masks[b, c]
            while v:
                v &= v - np.uint64(1)
                weights[c] += 1
            rank[ROWS - weights[c] + 1] += 1
        for i in range(1, ROWS + 2):
            rank[i] += rank[i - 1]
        used = rank[ROWS]
        order = np.empty(width, np.int32)
        for c in range(width):
            order[rank[ROWS - weights[c]]] = c
            rank[ROWS - weights[c]] += 1
            # following[i] is the place in `order` of the first column left from i on; `used` ends the list.
        head = 0
        for i in range(used):
            following[i] = i + 1
        while head < used:
            if made == limit:
                return first, columns, needed, -1
            once = twice = np.uint64(0)
            got, before, i = 0, -1, head
            while i < used and got < 4:
                mask = masks[b, order[i]]
                if mask & twice:
                    before, i = i, following[i]
                    continue
                twice |= once & mask
                once |= mask
                columns[at + got] = order[i]
                got += 1
                i = following[i]
                if before < 0:
                    head = i
                else:
                    following[before] = i
            at += 4
            made += 1
        at = (at + STEP - 1) // STEP * STEP
        first[b + 1] = at // STEP
    return first, columns[:at], needed, made


def _fill_gathered(indptr: Any, indices: Any, data: Any, width: int, blocks: Any, first: Any, columns: Any) -> Any:
    steps = len(columns) // STEP
    kept, where, counts = _empty(steps)
    place_of = np.empty(width, np.int64)
    for b in range(len(blocks)):
        for place in range(first[b] * STEP, first[b + 1] * STEP):
            if columns[place] >= 0:
                place_of[columns[place]] = place
        for row in range(ROWS):
            k = blocks[b, row]
            if k >= 0:
                for i in range(indptr[k], indptr[k + 1]):
                    place = place_of[indices[i]]
                    _keep(kept, where, counts, place // STEP, row, place % STEP // 4, place % 4, data[i])
    return _finish(kept, where, counts)


# ---- columns where they are ---------------------------------------------------------------------------------

REST = 8
"""Columns of a chunk of the rest: what one ``mma.m16n8k8`` multiplies."""


@dataclass(frozen=True)
class Rest:
    """What is left of rows whose quads hold more than two: dense, for each sixteen rows their own columns.

    Attributes
    ----------
    first : int64, (parts + 1,)
        Chunks of part p are ``first[p]`` up to ``first[p + 1]``.
    columns : int32, (chunks, 4, 8)
        For each 16 rows of a block the columns (eight times the octet, plus the place in it); where there are fewer
        than eight, some of octet 0 with values of zero.  Where 16 rows have fewer chunks, theirs come first.  The
        places of a chunk are different where that is possible: rows of shared memory in different places are in
        different banks.
    values : float32, (chunks, 64, 8)
        Values of row i in the columns of ``i // 16``.
    """

    first: NDArray[np.int64]
    columns: NDArray[np.int32]
    values: NDArray[np.float32]

    @property
    def count(self) -> int:
        """Number of chunks."""
        return len(self.columns)


def cover_steps(
    part: NDArray[np.int64],
    row: NDArray[np.int64],
    octet: NDArray[np.int64],
    place: NDArray[np.int64],
    data: NDArray[np.float32],
    parts: int,
    octets: int,
    aligned: bool = False,
    once: bool = False,
) -> tuple[Steps, Rest]:
    """Cover the non-zeros of each part by steps of four octets at equal distances, and a rest.

    Parameters
    ----------
    part, row, octet, place, data : (nnz,)
        Of each non-zero: its part, row (0 to 63), octet, column in the octet (0 to 7), and value; no two in one place.
        Those of a row and octet follow one another, their columns ascending.
    parts, octets : int
        Numbers of them; a step's octets are from 0 to ``octets - 1``.
    aligned : bool
        Steps are octets 4 i to 4 i + 3 only, and the rest takes columns in pairs, 2 i and 2 i + 1; then ``octets`` is a
        multiple of 4.
    once : bool
        Aligned steps take no octet twice, however long the rest becomes.

    Returns
    -------
    steps, rest
        An octet with a non-zero is taken once.  Where a quad of it holds three or four, what is over two goes into the
        rest, or the octet (if aligned, all four of the step) is taken twice, whichever is less work for a part: a chunk
        of the rest takes about as long as a step.  Four values are two and two, so there are at most twice as many
        steps as without zeros.
    """
    order, starts = compiled(_sort)(part * octets + octet, parts * octets)
    row, place, data = (np.ascontiguousarray(a[order]) for a in (row, place, data))
    given = (starts, row, place, parts, octets)
    covered = compiled(_cover_aligned)(*given, once) if aligned else compiled(_cover)(*given)
    first, columns, rest_first, rest_columns, column_of = covered
    arrays = (starts, row, place, data, octets, first, columns, column_of)
    values, metadata, rest_values = compiled(_fill_covered)(*arrays, rest_first)
    return Steps(first, columns, values, metadata), Rest(rest_first, rest_columns, rest_values)


@functools.cache
def steps_to_cover(needed: tuple[int, ...], octets: int) -> int:
    """How many steps `cover_steps` makes of a part that has non-zeros in these octets, none of which is taken twice."""
    count = len(needed)
    zeros = np.zeros(count, np.int64)
    octet = np.array(needed, np.int64)
    steps, _ = cover_steps(zeros, zeros, octet, zeros, np.ones(count, np.float32), 1, octets)
    return steps.count


def _sort(keys: Any, count: int) -> Any:
    """Stable counting sort: the order, and where each key starts."""
    starts = np.zeros(count + 1, np.int64)
    for key in keys:
        starts[key + 1] += 1
    for i in range(count):
        starts[i + 1] += starts[i]
    at = starts.copy()
    order = np.empty(len(keys), np.int64)
    for i in range(len(keys)):
        order[at[keys[i]]] = i
        at[keys[i]] += 1
    return order, starts


def _cover(starts: Any, row: Any, place: Any, parts: int, octets: int) -> Any:
    """Steps and chunks of all parts; of each non-zero its column in the rest of its part, or -1."""
    first, rest_first = np.zeros(parts + 1, np.int64), np.zeros(parts + 1, np.int64)
    columns = np.empty((2 * octets * parts, 2), np.int32)
    chunks = (octets * OCTET + REST - 1) // REST
    rest_columns = np.full((chunks * parts, 4, REST), -1, np.int32)
    column_of = np.full(len(row), -1, np.int64)
    # Of each column of the octets and each 16 rows, its place in the rest.
    known = np.full((octets * OCTET, 4), -1, np.int64)
    keys = np.zeros((octets * OCTET, 4), np.int64)
    need, again = np.zeros(octets, np.int64), np.zeros(octets, np.int64)
    made = rest = 0
    for part in range(parts):
        for u in range(octets):
            begin, end = starts[part * octets + u], starts[part * octets + u + 1]
            need[u] = 1 if end > begin else 0
            again[u] = 0
            i = begin
            while i < end:
                j = _run(row, place, i, end)
                if j - i > 2:
                    again[u] = 1
                i = j
        while _pick(need, again, columns, made):
            made += 1
        # `again` is now what no spare place of a step has taken a second time.
        known[:] = -1
        # Columns of each 16 rows, and how many of them in each place.
        width = np.zeros(4, np.int64)
        crowd = np.zeros((OCTET, 4), np.int64)
        for u in range(octets):
            i, end = starts[part * octets + u], starts[part * octets + u + 1]
            while again[u] > 0 and i < end:
                j = _run(row, place, i, end)
                group = row[i] // 16
                for _ in range(j - i - 2):
                    chosen = _leave(place, i, j, u, group, known, crowd, column_of)
                    key = u * OCTET + place[chosen]
                    if known[key, group] < 0:
                        known[key, group] = width[group]
                        keys[width[group], group] = key
                        crowd[place[chosen], group] += 1
                        width[group] += 1
                    column_of[chosen] = known[key, group]
                i = j
        wanted = (width.max() + REST - 1) // REST
        before = made
        copy = again.copy()
        while made - before < wanted and _pick(copy, need, columns, made):
            made += 1
        if made - before < wanted:
            column_of[starts[part * octets] : starts[(part + 1) * octets]] = -1
        else:
            made = before
            own = rest_columns[rest : rest + wanted]
            slots = _deal(keys, width, own)
            for n in range(starts[part * octets], starts[(part + 1) * octets]):
                if column_of[n] >= 0:
                    column_of[n] = slots[column_of[n], row[n] // 16]
            _fill_up(own)
            rest += wanted
        first[part + 1], rest_first[part + 1] = made, rest
    return first, columns[:made].copy(), rest_first, rest_columns[:rest].copy(), column_of


def _cover_aligned(starts: Any, row: Any, place: Any, parts: int, octets: int, once: bool) -> Any:
    """What `_cover` gives, for aligned steps."""
    first, rest_first = np.zeros(parts + 1, np.int64), np.zeros(parts + 1, np.int64)
    columns = np.empty((octets // 2 * parts, 2), np.int32)
    rest_columns = np.empty((octets * parts, 4, REST), np.int32)
    column_of = np.full(len(row), -1, np.int64)
    steps = octets // 4
    # Of each pair of columns and each 16 rows, its place in the rest.
    known = np.empty((octets * 4, 4), np.int64)
    keys = np.empty((octets * 4, 4), np.int64)
    times, width, own = np.empty(steps, np.int64), np.empty(4, np.int64), np.empty((steps, 4), np.int64)
    made = rest = 0
    for part in range(parts):
        offset = part * octets
        for q in range(steps):
            times[q] = 1 if starts[offset + 4 * q + 4] > starts[offset + 4 * q] else 0
        _leave_pairs(starts, row, place, offset, times, known, keys, width, own, column_of)
        while not once:
            best, least = -1, (width.max() + 3) // 4 - 1
            for q in range(steps):
                fewer = ((width - own[q]).max() + 3) // 4
                if times[q] == 1 and fewer < least:
                    best, least = q, fewer
            if best < 0:
                break
            times[best] = 2
            width -= own[best]
            own[best] = 0
        _leave_pairs(starts, row, place, offset, times, known, keys, width, own, column_of)
        for q in range(steps):
            for _ in range(times[q]):
                columns[made, 0], columns[made, 1] = 4 * q, 1
                made += 1
        wanted = (width.max() + 3) // 4
        slots = _deal_pairs(keys, width, rest_columns[rest : rest + wanted])
        for n in range(starts[offset], starts[offset + octets]):
            if column_of[n] >= 0:
                column_of[n] = slots[column_of[n], row[n] // 16] + place[n] % 2
        rest += wanted
        first[part + 1], rest_first[part + 1] = made, rest
    return first, columns[:made].copy(), rest_first, rest_columns[:rest].copy(), column_of


def _leave_pairs(
    starts: Any,
    row: Any,
    place: Any,
    offset: int,
    times: Any,
    known: Any,
    keys: Any,
    width: Any,
    own: Any,
    column_of: Any,
) -> None:
    """Which pairs of columns each 16 rows have in the rest, where steps take their octets so many times.

    ``keys`` and ``width`` are those of the groups of 16 rows, ``own`` counts them by step, and ``column_of`` says of
    every non-zero which it is in. Of a quad of three goes the one whose pair is there already, else the one that is
    alone in its pair; of four, two that are a pair.
    """
    known[:] = -1
    width[:] = 0
    own[:] = 0
    for u in range(4 * len(times)):
        i, end = starts[offset + u], starts[offset + u + 1]
        column_of[i:end] = -1
        while i < end:
            j = _run(row, place, i, end)
            if j - i > 2 and times[u // 4] < 2:
                group = row[i] // 16
                lower = 4 * u + place[i] // 4 * 2
                in_lower = 0
                for n in range(i, j):
                    in_lower += 1 if place[n] % 4 < 2 else 0
                if j - i == 4:
                    upper = known[lower, group] < 0 and known[lower + 1, group] >= 0
                else:
                    alone = 0 if in_lower == 1 else 1
                    upper = alone == 1
                    if known[lower + alone, group] < 0 and known[lower + 1 - alone, group] >= 0:
                        upper = not upper
                key = lower + (1 if upper else 0)
                if known[key, group] < 0:
                    known[key, group] = width[group]
                    keys[width[group], group] = key
                    width[group] += 1
                    own[u // 4, group] += 1
                left = j - i - 2
                for n in range(i, j):
                    if left > 0 and 4 * u + place[n] // 2 == key:
                        column_of[n] = known[key, group]
                        left -= 1
            i = j


def _deal_pairs(keys: Any, width: Any, columns: Any) -> Any:
    """Deal the pairs of each 16 rows to the chunks that they need, those of one place of an octet one by one.

    Returns the first column of each there.
    """
    slots = np.zeros_like(keys)
    for group in range(4):
        dealt, chunks = 0, (width[group] + 3) // 4
        for place in range(4):
            for i in range(width[group]):
                if keys[i, group] % 4 == place:
                    chunk, at = dealt % chunks, dealt // chunks
                    columns[chunk, group, 2 * at] = 2 * keys[i, group]
                    columns[chunk, group, 2 * at + 1] = 2 * keys[i, group] + 1
                    slots[i, group] = chunk * REST + 2 * at
                    dealt += 1
        # Where there are fewer, those of octet 0 in places that the others do not have.
        for chunk in range(len(columns)):
            there = 0 if chunk >= chunks else dealt // chunks + (1 if chunk < dealt % chunks else 0)
            used = 0
            for at in range(there):
                used |= 1 << (columns[chunk, group, 2 * at] // 2 % 4)
            place = 0
            for at in range(there, 4):
                while used >> place & 1:
                    place += 1
                columns[chunk, group, 2 * at], columns[chunk, group, 2 * at + 1] = 2 * place, 2 * place + 1
                used |= 1 << place
    return slots


def _deal(keys: Any, width: Any, columns: Any) -> Any:
    """Deal the columns of each 16 rows to the chunks that they need, those of one place one by one.

    Returns where each went.
    """
    slots = np.zeros_like(keys)
    for group in range(4):
        dealt, chunks = 0, (width[group] + REST - 1) // REST
        for place in range(OCTET):
            for i in range(width[group]):
                if keys[i, group] % OCTET == place:
                    chunk, at = dealt % chunks, dealt // chunks
                    columns[chunk, group, at] = keys[i, group]
                    slots[i, group] = chunk * REST + at
                    dealt += 1
    return slots


def _fill_up(columns: Any) -> None:
    """Put columns of octet 0 where none is, in places that the others of a chunk do not have."""
    chunks, groups, _ = columns.shape
    for chunk in range(chunks):
        for group in range(groups):
            own = columns[chunk, group]
            used = 0
            for i in range(REST):
                if own[i] >= 0:
                    used |= 1 << (own[i] % OCTET)
            place = 0
            for i in range(REST):
                if own[i] < 0:
                    while used >> place & 1:
                        place += 1
                    own[i] = place
                    used |= 1 << place


def _run(row: Any, place: Any, i: int, end: int) -> int:
    """End of the non-zeros of one quad that start at i."""
    j = i + 1
    while j < end and row[j] == row[i] and place[j] // 4 == place[i] // 4:
        j += 1
    return j


def _leave(place: Any, i: int, j: int, octet: int, group: int, known: Any, crowd: Any, column_of: Any) -> int:
    """Which non-zero of a quad, i to j, goes into the rest: one whose column is there already, else of a rare place."""
    chosen = -1
    for n in range(i, j):
        if column_of[n] < 0:
            if known[octet * OCTET + place[n], group] >= 0:
                return n
            if chosen < 0 or crowd[place[n], group] < crowd[place[chosen], group]:
                chosen = n
    return chosen


def _pick(need: Any, later: Any, columns: Any, at: int) -> bool:
    """Write the step that covers the most octets in need to ``columns[at]``; False if there is no need.

    Of equal ones, the step that covers more of ``later``, at a smaller distance, and earlier.
    """
    octets = len(need)
    best = best_start = best_distance = 0
    for distance in range(max(1, (octets + 2) // 3)):
        for start in range(octets - 3 * distance):
            score = 0
            for j in range(4 if distance > 0 else 1):
                u = start + j * distance
                if need[u] > 0:
                    score += 8
                elif later[u] > 0:
                    score += 1
            if score > best:
                best, best_start, best_distance = score, start, distance
    if best < 8:
        return False
    columns[at, 0], columns[at, 1] = best_start, best_distance
    for j in range(4 if best_distance > 0 else 1):
        u = best_start + j * best_distance
        if need[u] > 0:
            need[u] -= 1
        elif later[u] > 0:
            later[u] -= 1
    return True


def _fill_covered(
    starts: Any,
    row: Any,
    place: Any,
    data: Any,
    octets: int,
    first: Any,
    columns: Any,
    column_of: Any,
    rest_first: Any,
) -> Any:
    kept, where, counts = _empty(len(columns))
    rest = np.zeros((rest_first[-1], ROWS, REST), np.float32)
    # Of each octet the steps that take it, and as which of their four.
    taken = np.zeros((octets, 2), np.int64)
    times = np.zeros(octets, np.int64)
    for part in range(len(first) - 1):
        times[:] = 0
        for step in range(first[part], first[part + 1]):
            start, distance = columns[step, 0], columns[step, 1]
            for j in range(4 if distance > 0 else 1):
                u = start + j * distance
                if times[u] < 2:
                    taken[u, times[u]] = step * 4 + j
                    times[u] += 1
        for u in range(octets):
            i, end = starts[part * octets + u], starts[part * octets + u + 1]
            while i < end:
                j = _run(row, place, i, end)
                number = 0
                for n in range(i, j):
                    if column_of[n] >= 0:
                        rest[rest_first[part] + column_of[n] // REST, row[n], column_of[n] % REST] = data[n]
                    else:
                        step, quarter = taken[u, number // 2] // 4, taken[u, number // 2] % 4
                        _keep(kept, where, counts, step, row[n], 2 * quarter + place[n] // 4, place[n] % 4, data[n])
                        number += 1
                i = j
    values, metadata = _finish(kept, where, counts)
    return values, metadata, rest


# ---- what both share ----------------------------------------------------------------------------------------


def _empty(steps: int) -> Any:
    """Kept values, their places, and how many of each quad are kept."""
    return (
        np.zeros((steps, ROWS, QUADS * 2), np.float32),
        np.zeros((steps, ROWS, QUADS * 2), np.uint8),
        np.zeros((steps, ROWS, QUADS), np.uint8),
    )


def _keep(kept: Any, where: Any, counts: Any, step: int, row: int, quad: int, place: int, value: float) -> None:
    at = quad * 2 + counts[step, row, quad]
    kept[step, row, at] = value
    where[step, row, at] = place
    counts[step, row, quad] += 1


def _finish(kept: Any, where: Any, counts: Any) -> Any:
    """Bring the two of each quad into order, name two places where fewer are kept, and write the metadata."""
    metadata = np.zeros((len(kept), ROWS), np.uint32)
    for step in range(len(kept)):
        for row in range(ROWS):
            low = high = np.uint32(0)
            for quad in range(QUADS):
                a, b = quad * 2, quad * 2 + 1
                if counts[step, row, quad] == 0:
                    i, j = 0, 1
                elif counts[step, row, quad] == 1:
                    i = where[step, row, a]
                    if i == 3:
                        # The lower place comes first: the value is the second of the two.
                        i, j = 2, 3
                        kept[step, row, b], kept[step, row, a] = kept[step, row, a], np.float32(0)
                    else:
                        j = 3
                else:
                    i, j = where[step, row, a], where[step, row, b]
                    if i > j:
                        i, j = j, i
                        kept[step, row, a], kept[step, row, b] = kept[step, row, b], kept[step, row, a]
                word = np.uint32(i | j << 2) << np.uint32(4 * (quad % 4))
                if quad < 4:
                    low |= word
                else:
                    high |= word
            # Rows g and g + 8 of a warp share a word, in its halves (see `places`).
            at = (row // 16 * 8 + row % 8) * 2
            shift = np.uint32(16 * (row % 16 // 8))
            metadata[step, at] |= low << shift
            metadata[step, at + 1] |= high << shift
    return kept, metadata


_HELPERS = (
    "population",
    "_empty", "_keep", "_finish", "_pick", "_run", "_leave", "_deal", "_fill_up", "_leave_pairs", "_deal_pairs",
)  # fmt: skip
