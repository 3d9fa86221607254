from __future__ import annotations

import pytest

import numbasparse


def test_import_is_light(run_python) -> None:  # type: ignore[no-untyped-def]
    code = """
import sys, numbasparse
numbasparse.__version__, dir(numbasparse)
print(sorted({"torch", "numba", "llvmlite", "scipy", "numpy", "safetensors", "optuna"} & set(sys.modules)))
"""
    assert run_python(code) == "[]"


def test_no_room_imports_torch(run_python) -> None:  # type: ignore[no-untyped-def]
    code = """
import sys, numbasparse
for name in numbasparse.__all__:
    getattr(numbasparse, name)
import numbasparse.kernels
print(sorted({"torch", "numba.cuda", "optuna", "matplotlib"} & set(sys.modules)))
"""
    assert run_python(code) == "[]"


@pytest.mark.parametrize("name", numbasparse.__all__)
def test_public_names_exist(name: str) -> None:
    assert getattr(numbasparse, name) is not None
    assert name in dir(numbasparse)


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="'numbasparse' has no attribute 'conv3d'"):
        _ = numbasparse.conv3d
    assert not hasattr(numbasparse, "__wrapped__")
