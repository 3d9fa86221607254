"""Machine code of Hopper, read: whether registers of a ``wgmma`` under way are left alone.

The tensor cores read a step's weights from registers when its turn comes, and add to sums in registers until it is
done. The assembler keeps other instructions from those registers where it sees that a step is under way, which is
within one piece of code without branches. Kernels whose steps are under way across branches must keep them by
themselves (`codegen.ptx.StepRun`); here all ways through the code are looked at.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;")
_LABEL = re.compile(r"^\s*(\.L_\w+):")
_STEP = re.compile(r"HGMMA\.SP\.64x(\d+)x32\S* R(\d+), R(\d+), gdesc\[\w+\]\S*, R\d+, R(\d+)")
_WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x([0-9a-f]+)")
_WITHOUT_RESULT = re.compile(
    r"(ST|RED|BAR|BRA|EXIT|NOP|SYNCS|MEMBAR|FENCE|CCTL|ERRBAR|BSSY|BSYNC|R2UR|ISETP|FSETP|PLOP3|R2P|YIELD|WARP|DEPBAR|"
    r"ELECT|VOTEU|HGMMA|U|CGA)"
)


def disassembler() -> Path | None:
    """nvdisasm, of the package nvidia-cuda-nvdisasm."""
    try:
        files = importlib.metadata.files("nvidia-cuda-nvdisasm") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.name == "nvdisasm"), None)


def disassembled(image: bytes) -> str:
    """The text of a kernel's machine code, an ELF file."""
    found = disassembler()
    assert found is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(image)
        return subprocess.run([found, "-c", path], check=True, capture_output=True, text=True).stdout


@dataclass(frozen=True)
class _Instruction:
    """What matters of one.

    Attributes
    ----------
    text
        Without its condition.
    conditional
        Whether it may do nothing.
    read, sums
        Of a sparse step the registers of its operands and those of its sums.
    written, named
        Of another one the registers that it writes, and all that it names.
    """

    text: str
    conditional: bool
    read: frozenset[int] = frozenset()
    sums: frozenset[int] = frozenset()
    written: frozenset[int] = frozenset()
    named: frozenset[int] = frozenset()

    @property
    def is_step(self) -> bool:
        return bool(self.sums)

    @property
    def ends_group(self) -> bool:
        """Whether waits count it."""
        return self.is_step and "gsb0" in self.text


def _instruction(line: str) -> _Instruction:
    text = re.sub(r"^@!?U?P\w+\s+", "", line)
    step = _STEP.match(text)
    if step is not None:
        n, sums, values, metadata = (int(number) for number in step.groups())
        read = frozenset([*range(values, values + 4), metadata])
        return _Instruction(text, text != line, read, frozenset(range(sums, sums + n // 2)))
    assert not text.startswith("HGMMA"), f"another kind of wgmma: {text}"
    named = frozenset(int(number) for number in re.findall(r"\bR(\d+)\b", text))
    return _Instruction(text, text != line, written=frozenset(_written(text)), named=named)


def _written(text: str) -> range:
    """Registers of an instruction's result, none or neighbours."""
    name, _, arguments = text.partition(" ")
    if _WITHOUT_RESULT.match(name):
        return range(0)
    # Behind a predicate that is a result too.
    first = next((m for m in (re.match(r"R(\d+)\b", a.strip()) for a in arguments.split(",")[:2]) if m), None)
    if first is None:
        return range(0)
    width = 1
    if ".128" in name or name.startswith(("HMMA", "LDSM")):
        width = 4
    elif ".64" in name or "WIDE" in name or (name.startswith("CS2R") and ".32" not in name):
        width = 2
    return range(int(first[1]), int(first[1]) + width)


def conflicts(code: str) -> list[str]:
    """Instructions that write what a sparse step under way reads, or name its sums.

    Steps are done in their order, and a wait says how many may be under way behind it.
    """
    instructions, labels = [], {}
    for line in code.splitlines():
        label, found = _LABEL.match(line), _INSTRUCTION.match(line)
        if label is not None:
            labels[label[1]] = len(instructions)
        elif found is not None:
            instructions.append(_instruction(found[1]))
    seen: set[tuple[int, tuple[int, ...]]] = set()
    left: list[tuple[int, tuple[int, ...]]] = [(0, ())]
    bad: set[str] = set()
    while left:
        number, under_way = left.pop()
        if number >= len(instructions) or (number, under_way) in seen:
            continue
        seen.add((number, under_way))
        here = instructions[number]
        for other in (instructions[i] for i in under_way):
            if here.written & other.read or (not here.is_step and here.named & other.sums):
                bad.add(f"{other.text} | {here.text}")
        if here.is_step:
            under_way = (*under_way, number)
        wait = _WAIT.match(here.text)
        if wait is not None:
            under_way = _newest(under_way, int(wait[1], 16), instructions)
        assert sum(instructions[i].ends_group for i in under_way) < 6, "nobody waits"
        left += [(target, under_way) for target in _following(number, here, labels)]
    return sorted(bad)


def _newest(under_way: tuple[int, ...], groups: int, instructions: list[_Instruction]) -> tuple[int, ...]:
    """What is left when so many groups are under way: steps of several operands are one."""
    ends = [place + 1 for place, number in enumerate(under_way) if instructions[number].ends_group]
    return under_way[ends[-groups - 1] :] if len(ends) > groups else under_way


def _following(number: int, here: _Instruction, labels: dict[str, int]) -> Iterator[int]:
    if here.conditional or not here.text.startswith(("BRA", "EXIT")):
        yield number + 1
    if here.text.startswith(("BRA", "WARPSYNC", "CALL")):
        yield from (labels[name] for name in re.findall(r"\.L_\w+", here.text) if name in labels)
