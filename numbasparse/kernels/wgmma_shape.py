"""What the code and the packed weight of a kernel for Hopper's sparse tensor cores depend on: see `wgmma_pipeline`."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from numbasparse.kernels import two_four
from numbasparse.kernels.base import Config
from numbasparse.kernels.cuda_fragments import coding_of, is_scaled
from numbasparse.kernels.cuda_tiles import OutputTiles
from numbasparse.runtime import cuda, layouts
from numbasparse.spec import ConvSpec
from numbasparse.weight import SparseWeight

if TYPE_CHECKING:
    from numbasparse.codegen import ptx

HEAD_BYTES = 1024
"""Of shared memory: the barriers, and so much that the stages are aligned to the swizzle's pattern."""
CHUNK_BYTES, HEADER_BYTES = 1152, 16
"""Of a chunk of the rest in a blob, and of what is before steps and chunks."""
OFFSETS = 1024
"""Where a chunk has the offsets of its rows."""
METADATA_BYTES = 512
"""Of the metadata of two steps: see `codegen.ptx.StepRun`."""


# ---- values -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entries:
    """How the values of a step are stored, before its 256 bytes of metadata, its word and 12 bytes of nothing.

    Attributes
    ----------
    form
        ``"wide"``: 16-bit values.  ``"integers"``: bytes, 128 more than the value.  ``"nibbles"``: four bits, the place
        of the value in a table of 16 that every thread has in registers.  ``"flagged"``: the same of a table without
        zero, and a word for eight values that says which are zero.
    scaled
        Whether sums are multiplied by a factor of their output channel.
    """

    form: str = "wide"
    scaled: bool = False

    @property
    def lane_words(self) -> int:
        """Words of eight values, what a thread has of a step."""
        return {"wide": 4, "integers": 2, "flagged": 2, "nibbles": 1}[self.form]

    @property
    def metadata(self) -> int:
        """Where a step has its metadata."""
        return 128 * 4 * self.lane_words

    @property
    def word(self) -> int:
        """Where a step has its word."""
        return self.metadata + 256

    @property
    def unit_bytes(self) -> int:
        """Of a step."""
        return self.word + 16


def entries_of(weight: SparseWeight, config: Config) -> Entries:
    """How a config stores the values of a weight."""
    if config["entries"] == "wide":
        return Entries()
    count = len(coding_of(weight)[0])
    form = "nibbles" if count <= NIBBLES else "flagged" if count == NIBBLES + 1 else "integers"
    return Entries(form, is_scaled(weight))


def reason_coded(weight: SparseWeight) -> str | None:
    """Reason why a weight's values cannot be stored as codes."""
    if weight.levels is None:
        return "coded entries need a quantized weight"
    values = coding_of(weight)[0]
    whole = (values == np.rint(values)).all() and values.min() >= -128 and values.max() <= 127
    if len(values) <= NIBBLES + 1 or whole:
        return None
    return f"the weight has {len(values) - 1} values, coded entries know {NIBBLES}, or whole numbers from -128 to 127"


NIBBLES = 16
"""Places of a table."""


@dataclass(frozen=True)
class Facts:
    """What the code depends on of a weight and how it is stored.

    Attributes
    ----------
    over
        Non-zeros over two in a quad (four neighbouring input channels of an output channel and tap), on average.
    pairs
        Share of the pairs of neighbouring input channels that 16 neighbouring output channels need for those, of a tap.
    """

    entries: Entries
    over: float
    pairs: float

    @property
    def rest(self) -> bool:
        """Whether any quad holds more than two."""
        return self.over > 0


def facts_of(weight: SparseWeight, config: Config) -> Facts:
    """Those of a weight that a config has no objection to."""
    return Facts(entries_of(weight, config), *_overfull(weight))


def places_of(weight: SparseWeight) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Output channel, input channel (of its group) and tap of every non-zero: int64."""
    _, r, s = weight.kernel_shape
    channel, tap = np.divmod(weight.indices.astype(np.int64), r * s)
    return weight.rows, channel, tap


_known: weakref.WeakKeyDictionary[SparseWeight, tuple[float, float]] = weakref.WeakKeyDictionary()


def _overfull(weight: SparseWeight) -> tuple[float, float]:
    """`Facts.over` and `Facts.pairs`."""
    found = _known.get(weight)
    if found is None:
        channels, r, s = weight.kernel_shape
        row, channel, tap = places_of(weight)
        quads = -(-channels // 4)
        quad = (row * quads + channel // 4) * (r * s) + tap
        held = np.bincount(quad, minlength=weight.k * quads * r * s)
        lower = np.bincount(quad[channel % 4 < 2], minlength=len(held))
        (broken,) = np.nonzero(held > 2)
        # Of three the one that is alone in its pair; see `two_four.cover_steps`.
        upper = lower[broken] == 2
        needed = len(
            np.unique((broken // (quads * r * s) // 16 * (quads * r * s) + broken % (quads * r * s)) * 2 + upper)
        )
        over = int((held[broken] - 2).sum())
        found = over / len(held), needed / (2 * -(-weight.k // 16) * quads * r * s)
        _known[weight] = found
    return found


# ---- geometry -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Geometry(ABC):
    """How a block's tile lies in shared memory, and who computes what.  Offsets in bytes.

    An *octet* is eight neighbouring input channels of a pixel, what a step has four of, numbered in the order of
    memory from the first that any tap can start from.

    Attributes
    ----------
    spec
        The problem.
    layout
        Of activations.
    groups
        Warpgroups.
    batch, channels
        Images and input channels of a stage.
    tile_h, tile_w
        Output pixels of a block, of each image.
    patch_h, patch_w
        Pixels of an input tile.
    row_bytes
        Bytes of a row of shared memory: see `codegen.ptx.Swizzle`.
    """

    spec: ConvSpec
    layout: layouts.Layout
    groups: int
    batch: int
    channels: int
    tile_h: int
    tile_w: int
    patch_h: int
    patch_w: int
    row_bytes: int

    @property
    @abstractmethod
    def sums(self) -> int:
        """Of a thread."""

    @property
    @abstractmethod
    def tile_bytes(self) -> int:
        """Of an input tile, up to where the weight follows."""

    @property
    @abstractmethod
    def copied_bytes(self) -> int:
        """That a copy brings."""

    @abstractmethod
    def cover(
        self, part: np.ndarray, row: np.ndarray, column: np.ndarray, data: np.ndarray, parts: int, once: bool
    ) -> tuple[two_four.Steps, two_four.Rest]:
        """Steps and rest of the non-zeros of parts (a tile's input channels): columns are those of a group's matrix.

        With ``once`` no octet is taken by two steps.
        """

    @abstractmethod
    def words(self, steps: two_four.Steps) -> np.ndarray:
        """Of every step the word that `multiply` gets: int32."""

    def run(self) -> ptx.StepRun:
        """All steps of a tile, in the order of `all_octets`; for those that know one."""
        raise NotImplementedError

    def all_octets(self) -> np.ndarray:
        """The first octet of every step of a tile, int64; for those that know one."""
        raise NotImplementedError

    @abstractmethod
    def offsets(self, rest: two_four.Rest) -> np.ndarray:
        """Of every chunk and 16 rows what eight lanes add to their `lane_start`: int32 (chunks, 4, 8)."""

    @abstractmethod
    def row_blocks(self, weight: SparseWeight) -> np.ndarray:
        """Output channels of each block, int32 (blocks, 64), -1 for none; no block has channels of two groups."""

    @abstractmethod
    def tensor_map(self, address: int) -> cuda.TensorMap:
        """For the copies of tiles."""

    @property
    @abstractmethod
    def group_bytes(self) -> int:
        """From the input of a warpgroup to that of the next."""

    @abstractmethod
    def copy_tile(self, cluster: int) -> Any:
        """Device function ``(stage, channel, origin, full)``: order the copy of an input tile.

        ``origin`` is image, row and column; in a cluster the copy is for all blocks.
        """

    @abstractmethod
    def multiply(self) -> Any:
        """Device function ``(sums, values, metadata, word, stage) -> sums``: a step for the pixels of a warpgroup.

        Their input begins at ``stage``.
        """

    @abstractmethod
    def lane_start(self) -> Any:
        """Device function ``(lane) -> bytes``: where a lane's share of a chunk of the rest begins."""

    @abstractmethod
    def rest_mma(self) -> Any:
        """Intrinsic ``(sums, values, address) -> sums`` of a chunk."""

    @abstractmethod
    def finish(self, split: int, residual: bool, activation: str, scaled: bool, ahead: int) -> tuple[Any, Any, Any]:
        """Device functions: ``(rows, first, lane)`` gives a lane's output channels, those of a warp being
        ``rows[first]`` and on; ``(residual, numbers, part, image, oy, ox, group, lane) -> begun`` loads the first of
        what is added to the sums, ``ahead`` pieces if the layout's are small; ``(sums, begun, y, residual, bias, scale,
        numbers, part, image, oy, ox, group, lane)`` finishes sums and stores them.
        """


# ---- all of it ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape(OutputTiles):
    """All constants of the kernel's code: what the compiled code depends on, and nothing else.

    ``room`` is that of a stage, steps and chunks; ``blocks`` those of output channels; ``turns`` the warpgroups that
    take turns with input channels; ``entries`` say how values are stored.  With ``every`` each job has all steps of its
    tile, in one order, so that the code knows them; ``rest`` says whether there are chunks.  A block has ``stack``
    times 64 output channels, a warpgroup for each 64.
    """

    geometry: Geometry
    room: tuple[int, int]
    stages: int
    split: int
    cluster: int
    blocks: int
    turns: int
    entries: Entries
    activation: str
    residual: bool
    every: bool = False
    rest: bool = True
    stack: int = 1

    @property
    def spec(self) -> ConvSpec:  # type: ignore[override]
        return self.geometry.spec

    @property
    def blob_bytes(self) -> int:
        """Room for the blob of 64 output channels."""
        return HEADER_BYTES + self.steps_bytes(self.room[0]) + self.room[1] * CHUNK_BYTES

    @property
    def stage_bytes(self) -> int:
        """An input tile and behind it the blobs, up to the next multiple of 1024."""
        return -(-(self.geometry.tile_bytes + self.stack * self.blob_bytes) // 1024) * 1024

    @property
    def late(self) -> bool:
        """Whether a stage is left when the first steps of the next job are under way, which needs another stage, and
        four steps: those under way read other registers than the first two of the next job.
        """
        return self.every and self.stages > self.turns and self.room[0] >= 4

    @property
    def ahead(self) -> int:
        """Pieces of a residual that a thread has loaded ahead, for which it has registers, two for each."""
        if not self.every:
            return 8
        return 16 if self.rest else 32

    @property
    def early(self) -> bool:
        """Whether the first of them are loaded before an output tile's steps, by the warps that store it."""
        return self.residual and self.turns == 1

    def steps_bytes(self, steps: int) -> int:
        """Of so many steps in a blob; every job has as many if it has all."""
        if self.every:
            return self.entries.metadata * steps + METADATA_BYTES * -(-steps // 2)
        return self.entries.unit_bytes * steps

    @property
    def shared_bytes(self) -> int:
        """Of a block."""
        return 1024 + self.sums_at + (512 * self.geometry.sums if self.turns > 1 else 0)

    @property
    def sums_at(self) -> int:
        """Where sums are added up.  Behind the last stage is room for the steps that are read ahead of the last one."""
        return HEAD_BYTES + self.stages * self.stage_bytes + 2 * self.entries.unit_bytes

    @property
    def groups(self) -> int:
        """Warpgroups of a block."""
        return self.geometry.groups * self.turns * self.stack

    @property
    def threads(self) -> int:
        return 128 * self.groups

    def resident(self, device: cuda.Device) -> int:
        """Blocks that are on a multiprocessor at once."""
        return min(2 // self.groups, device.shared_per_multiprocessor // (self.shared_bytes + 1024))

    def grid(self, device: cuda.Device) -> tuple[int, int, int]:
        """As many blocks as are on the device at once, a multiple of the cluster; fewer where there is less work."""
        # Clusters lie within the 16 or 18 multiprocessors of a part of the GPU, of which those of four leave some out.
        usable = device.multiprocessors if self.cluster < 4 else device.multiprocessors * 16 // 17
        most = usable * self.resident(device) // self.cluster * self.cluster
        return min(most, self.works), 1, 1
