"""What the kernels on Hopper's sparse tensor cores compute, in NumPy, address by address; and how their code is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from machine_code import conflicts, disassembled, disassembler
from strategies import quantized, random_weight, two_of_four
from tensor_emulation import OutputTile, opened, opened_dense, output_tiles, widened

from numbasparse import SparseWeight
from numbasparse.kernels import Config, wgmma_shape
from numbasparse.kernels.cuda_fragments import scale_of
from numbasparse.kernels.two_four import narrow
from numbasparse.runtime import cuda
from numbasparse.spec import ConvSpec


class Emulator(ABC):
    """What a kernel computes, from its packed weight and the constants of its code."""

    BASE = 3072
    """Where the aligned shared memory begins, somewhere."""

    def __init__(self, kernel: Any, spec: ConvSpec, weight: SparseWeight, config: Config) -> None:
        self.shape = kernel.shape(spec, config, wgmma_shape.facts_of(weight, config))
        self.scale = scale_of(weight) if self.shape.entries.scaled else np.ones(spec.k, np.float32)
        self.spec, self.g = self.shape.spec, self.shape.geometry
        self.packed = kernel.pack(spec, weight, config)

    def run(self, x: np.ndarray) -> np.ndarray:
        """Sums of all blocks and splits, (N, K, OH, OW) float32, scaled, without bias; NaN where none was written."""
        halves = narrow(x, self.spec.dtype).reshape(x.shape)
        y = np.full((self.shape.split, *self.out_shape), np.nan, np.float32)
        stack = self.shape.stack
        for tile in output_tiles(self.shape):
            for own in range(stack):
                sums = self._sums(halves, tile, own)
                self.store(y, sums, self.packed.rows[tile.block * stack + own], tile)
        return self.result(y.sum(axis=0)) * self.scale[:, None, None]

    @property
    @abstractmethod
    def out_shape(self) -> tuple[int, ...]:
        """Of the output in its layout."""

    @abstractmethod
    def result(self, y: np.ndarray) -> np.ndarray:
        """The output as (N, K, OH, OW)."""

    @abstractmethod
    def store(self, y: np.ndarray, sums: np.ndarray, rows: np.ndarray, tile: OutputTile) -> None:
        """Write the sums of a tile, (operands, 64, n), each place once."""

    @abstractmethod
    def placed(self, x: np.ndarray, image: int, corner: tuple[int, int], channel: int) -> tuple[np.ndarray, np.ndarray]:
        """What a copy brings, 16-bit words, and where each of them goes, linear bytes from the stage."""

    @abstractmethod
    def operands(self, memory: np.ndarray, stage: int, word: int) -> np.ndarray:
        """Matrices B of a step, (operands, 32, n) of 16-bit words."""

    @abstractmethod
    def rest_operands(self, memory: np.ndarray, stage: int, offsets: np.ndarray) -> np.ndarray:
        """Matrices B of a chunk for each 16 rows, (operands, 4, 8, n) of 16-bit words."""

    @abstractmethod
    def swizzle(self, linear: np.ndarray) -> np.ndarray:
        """Where shared memory holds what has linear addresses."""

    def _sums(self, x: np.ndarray, tile: OutputTile, own: int) -> np.ndarray:
        """Of one block, and of a stack the one of this number, (operands, 64, n)."""
        g, block, part = self.g, tile.block, tile.part
        first, count = (int(v) for v in self.packed.ranges[block, part])
        leader = block // self.shape.cluster * self.shape.cluster
        same = self.packed.ranges[leader : leader + self.shape.cluster, part]
        n = 2 * g.sums * g.groups // self.count
        sums = np.zeros((self.count, 64, n), np.float32)
        for job in range(count):
            channels = self.packed.jobs[same[:, 0] + job, 0]
            assert (same[:, 1] == count).all()
            assert (channels == channels[0]).all(), "blocks of a cluster get other tiles"
            stage = self.BASE + wgmma_shape.HEAD_BYTES + job % self.shape.stages * self.shape.stage_bytes
            memory = self._copied(x, tile.image, tile.corner, first + job, stage)
            blob = memory[stage + g.tile_bytes + own * self.shape.blob_bytes :]
            steps, chunks = (int(v) for v in blob[:8].view(np.int32))
            assert steps <= self.shape.room[0]
            assert chunks <= self.shape.room[1]
            steps_bytes = self.shape.steps_bytes(self.shape.room[0] if self.shape.every else steps)
            body = blob[wgmma_shape.HEADER_BYTES :][:steps_bytes]
            rest = blob[wgmma_shape.HEADER_BYTES + steps_bytes :][: chunks * wgmma_shape.CHUNK_BYTES]
            for registers, metadata, word in self._every(body) if self.shape.every else self._listed(body, steps):
                sums += opened(registers, metadata, self.spec.dtype) @ self._values(self.operands(memory, stage, word))
            for number, chunk in enumerate(rest.reshape(chunks, wgmma_shape.CHUNK_BYTES)):
                a = opened_dense(chunk[:1024].view(np.uint32).reshape(128, 2), self.spec.dtype).reshape(4, 16, 8)
                offsets = chunk[1024:].view(np.int32).reshape(4, 8)
                # Each warp stops behind its last.
                assert not a[number >= blob[8:12]].any()
                products = a @ self._values(self.rest_operands(memory, stage, offsets))
                sums += products.reshape(sums.shape)
        return sums

    def _listed(self, body: np.ndarray, steps: int) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
        """Of each step its values as 128 threads get them, its metadata and its word."""
        entries = self.shape.entries
        for unit in body.reshape(steps, entries.unit_bytes):
            word = int(unit[entries.word :][:4].view(np.int32)[0])
            yield self._registers(unit), unit[entries.metadata : entries.word].view(np.uint32), word

    def _every(self, body: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
        """The same where the code knows the steps: lanes 0 and 1 of four have the metadata of the first of two."""
        run = self.g.run()
        assert body.size == run.nbytes
        lanes = body[run.metadata :].view(np.uint32).reshape(-1, 32, 4)
        for step, word in enumerate(run.words):
            values = body[2048 * step :][:2048].view(np.uint32).reshape(128, 4)
            yield values, np.ascontiguousarray(lanes[step // 2, :, step % 2 * 2 :][:, :2]).ravel(), word

    def _registers(self, unit: np.ndarray) -> np.ndarray:
        """A step's values as 128 threads get them, (128, 4) of uint32."""
        form, lanes = self.shape.entries.form, unit[: self.shape.entries.metadata].reshape(128, -1)
        if form == "wide":
            return lanes.view(np.uint32)
        if form == "integers":
            return narrow(lanes.astype(np.float32) - 128, self.spec.dtype).view(np.uint32)
        table = self.packed.table[:16] | self.packed.table[16:].astype(np.uint16) << 8
        codes = np.stack([lanes[:, :4] & 15, lanes[:, :4] >> 4], axis=2).reshape(128, 8)
        values = table[codes]
        if form == "flagged":
            flags = lanes[:, 4:]
            values = values * np.concatenate([flags >> 7 & 1, flags >> 6 & 1], axis=1)
        return np.ascontiguousarray(values, np.uint16).view(np.uint32)

    @property
    @abstractmethod
    def count(self) -> int:
        """Operands of a block."""

    def _copied(self, x: np.ndarray, image: int, corner: tuple[int, int], job: int, stage: int) -> np.ndarray:
        """Shared memory when the copies of a job have come: NaN where nothing was copied."""
        g, packed = self.g, self.packed
        channel, start, size, first = (int(v) for v in packed.jobs[job])
        memory = np.full(self.BASE + self.shape.shared_bytes, 0xFF, np.uint8)
        words, where = self.placed(x, image, corner, channel)
        assert 2 * words.size == g.copied_bytes
        memory.view(np.uint16)[self.swizzle(stage + where) // 2] = words
        assert g.tile_bytes + self.shape.stack * self.shape.blob_bytes <= self.shape.stage_bytes
        assert (16 * start + size) <= packed.blobs.size
        blobs, at = packed.blobs[16 * start :][:size], stage + g.tile_bytes
        for blob in (blobs[:first], blobs[first:]) if self.shape.stack == 2 else (blobs,):
            assert 0 < blob.size <= self.shape.blob_bytes
            assert blob.size % 16 == 0
            memory[at:][: blob.size] = blob
            at += self.shape.blob_bytes
        return memory

    def _values(self, words: np.ndarray) -> np.ndarray:
        pairs = np.ascontiguousarray(words).view(np.uint32)
        return widened(pairs, self.spec.dtype).reshape(words.shape)


def code_cases(configs: Sequence[Config]) -> list[tuple[Config, str, tuple[int, str] | None]]:
    """Configs, types and quantizations (bits and kind) whose code is looked at."""
    forms = (("float16", (8, "linear")), ("bfloat16", (8, "linear")), ("float16", (4, "linear")))
    return [
        (configs[0], "bfloat16", None),
        *((config, "float16", None) for config in configs),
        *((configs[2], dtype, form) for dtype, form in forms),
        (configs[2], "float16", (4, "codebook")),
    ]


def case_name(value: Any) -> str:
    """Of a part of a case."""
    return str(tuple(value.values())) if isinstance(value, dict) else str(value)


def assert_code(
    kernel: Any,
    spec: ConvSpec,
    config: Config,
    form: tuple[int, str] | None,
    rest: bool = True,
    residuals: Sequence[bool] = (False,),
) -> None:
    """Sums stay in registers, the tensor cores are given a step before the last one is done, and nobody writes what
    they are about to read; without a residual, and with one if it is asked for.
    """
    dense = random_weight(spec, 0.1, np.random.default_rng(0))
    weight = SparseWeight.from_dense(dense if rest else two_of_four(dense))
    if form is not None:
        weight = quantized(weight, *form)
        config = {**config, "entries": "coded"}
    for ptx in [p for residual in residuals for p in kernel.ptx(spec, weight, config, "relu", residual)]:
        assert ".f64" not in ptx.text
        assert ".local" not in ptx.text
        cubin = cuda.assemble(ptx)
        assert cubin.local_bytes == 0
        assert cubin.registers <= 255
        assert cubin.losses == ()
        if disassembler() is not None:
            assert conflicts(disassembled(cubin.image)) == []
