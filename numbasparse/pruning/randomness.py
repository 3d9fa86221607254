"""Random state: everything that decides the order of data and the noise of a training, to save and to put back."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def generators_of(source: object) -> list[torch.Generator]:
    """Return the ``torch.Generator`` objects that a source of batches keeps: itself, its samplers and its data set."""
    owners = [source]
    for path in ("sampler", "batch_sampler", "batch_sampler.sampler", "dataset"):
        owner: object | None = source
        for name in path.split("."):
            owner = getattr(owner, name, None)
        owners.append(owner)
    found: dict[int, torch.Generator] = {}
    for owner in owners:
        for value in vars(owner).values() if hasattr(owner, "__dict__") else ():
            if isinstance(value, torch.Generator):
                found.setdefault(id(value), value)
    return list(found.values())


def random_state(source: object, device: torch.device) -> dict[str, Any]:
    """Return the state of Python's, NumPy's and torch's generators (on the CPU and on ``device``) and of a source's."""
    legacy: Any = np.random.get_state(legacy=False)  # noqa: NPY002
    return {
        "python": random.getstate(),
        # NumPy's key is an array: kept as a list of ints.
        "numpy": {**legacy, "state": {**legacy["state"], "key": legacy["state"]["key"].tolist()}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "source": [generator.get_state() for generator in generators_of(source)],
    }


def restore_random_state(state: dict[str, Any], source: object, device: torch.device) -> None:
    """Put back what `random_state` returned.

    Raises
    ------
    ValueError
        If the source keeps another number of generators.
    """
    generators = generators_of(source)
    if len(generators) != len(state["source"]):
        raise ValueError(
            f"the batches keep {len(generators)} random generators, but those of the checkpoint kept "
            f"{len(state['source'])}: resume with the same source of batches"
        )
    numpy = state["numpy"]
    key = np.array(numpy["state"]["key"], np.uint32)
    random.setstate(state["python"])
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": key}})  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    for generator, value in zip(generators, state["source"], strict=True):
        generator.set_state(value)
