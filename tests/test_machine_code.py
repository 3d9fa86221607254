"""Reading of machine code: what it finds, on code of a few lines."""

from __future__ import annotations

import platform

import pytest
from machine_code import conflicts, disassembler

STEP = "HGMMA.SP.64x16x32.F32 R24, {}, gdesc[UR8], R24, {}, 0x0, gsb0"
WAIT = "WARPGROUP.DEPBAR.LE gsb0, {}"


def code(*lines: str) -> str:
    """Lines as the disassembler has them; labels end with a colon."""
    return "\n".join(line if line.endswith(":") else f"        /*{i:04x}*/    {line} ;" for i, line in enumerate(lines))


@pytest.mark.skipif(platform.system() != "Linux", reason="the package is for Linux only")
def test_the_disassembler_is_there() -> None:
    """It is among the dependencies for tests: without it nobody would look at machine code."""
    assert disassembler() is not None


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ("LDS.128 R40, [R5+UR8]", True),
        ("LDS R43, [R5]", True),
        ("IADD3 R41, P0, R50, R51, RZ", True),
        ("ISETP.NE.U32.AND P2, PT, R40, -0x1, PT", False),
        ("LDS.128 R44, [R5+UR8]", False),
        ("LDS R60, [R5]", True),
        ("STS.128 [R5], R40", False),
        ("@!P0 IMAD.MOV.U32 R40, RZ, RZ, R5", True),
        ("IMAD.WIDE R38, R3, 0x4, R8", False),
        ("IMAD.WIDE R42, R3, 0x4, R8", True),
        ("FADD R3, R24, R4", True),
        ("FADD R3, R32, R4", False),
        ("SHFL.IDX PT, R40, R1, R2, 0x1f", True),
    ],
)
def test_operands_and_sums_under_way(written: str, found: bool) -> None:
    lines = [STEP.format("R40", "R60"), written, WAIT.format("0x0"), "EXIT"]
    assert bool(conflicts(code(*lines))) == found
    # When the step is done, everything may be.
    lines[1:3] = lines[2:0:-1]
    assert not conflicts(code(*lines))


def test_steps_are_done_in_their_order() -> None:
    steps = [STEP.format("R40", "R60"), STEP.format("R44", "R61")]
    first, second = "LDS.128 R40, [R5]", "LDS.128 R44, [R5]"
    assert not conflicts(code(*steps, WAIT.format("0x1"), first, "EXIT"))
    assert len(conflicts(code(*steps, WAIT.format("0x1"), second, "EXIT"))) == 1
    assert len(conflicts(code(*steps, WAIT.format("0x2"), first, second, "EXIT"))) == 2


def test_a_group_of_several_is_one() -> None:
    part = STEP.format("R40", "R60").replace(", gsb0", "")
    lines = [part, STEP.format("R40", "R60"), STEP.format("R44", "R61"), WAIT.format("0x1"), "LDS R40, [R5]", "EXIT"]
    assert not conflicts(code(*lines))
    lines[3] = WAIT.format("0x2")
    assert len(conflicts(code(*lines))) == 2


def test_across_branches_and_round_a_loop() -> None:
    """A step is under way at the end of a loop, whose beginning writes its operands."""
    body = [".L_x_1:", "LDS.128 R40, [R5]", STEP.format("R40", "R60"), WAIT.format("0x1"), "@P0 BRA `(.L_x_1)"]
    ending = [WAIT.format("0x0"), "EXIT"]
    assert conflicts(code(*body, *ending)) == [f"{STEP.format('R40', 'R60')} | LDS.128 R40, [R5]"]
    assert not conflicts(code(*body[:3], WAIT.format("0x0"), body[4], *ending))
    # A jump over the wait.
    jump = [STEP.format("R40", "R60"), "@P1 BRA `(.L_x_2)", WAIT.format("0x0"), ".L_x_2:", "LDS R40, [R5]", "EXIT"]
    assert len(conflicts(code(*jump))) == 1
    assert not conflicts(code(*jump[:1], *jump[2:]))
