"""The networks of ``numbasparse upscale``: where their weights are, and pruning on the picture itself."""

from __future__ import annotations

import copy
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import platformdirs
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

import numbasparse
from numbasparse.cli.image_file import RGB
from numbasparse.models.rrdbnet import RRDBNet, from_state
from numbasparse.pruning import Distillation, OBSPruning, default_filter, prune_with_data_, report

WEIGHTS = Path("realesrgan") / "x4plus_anime.safetensors"

SPARSITY = 0.9
"""To which a network is pruned if nothing is said."""

PRUNED_FROM = 0.5
"""Share of zeros from which on a file counts as pruned: nobody's dense weights have so many."""

CALIBRATION_SIZE, CALIBRATION_EDGE = 48, 2
"""Height and width of a crop for the Hessians, and how many of them are taken along each side of the picture."""

STEP_SIZE, STEP_CROPS, STEP_LR = 32, 4, 3e-4
"""Of a step of the distillation: size and number of its crops, and the rate at its beginning (of Adam)."""


@dataclass(frozen=True)
class Networks:
    """The dense network, the pruned one as a torch model, and how it came to be pruned, in words."""

    dense: RRDBNet
    pruned: RRDBNet
    origin: str

    @property
    def sparsity(self) -> float:
        """Share of zeros in the layers that are pruned."""
        return report(self.pruned).sparsity


@dataclass(frozen=True)
class Target:
    """How to prune: to which share of zeros (None: ``SPARSITY``, unless it is pruned), and steps of distillation."""

    sparsity: float | None
    steps: int

    def wanted(self, found: float) -> float | None:
        """The sparsity to prune a network to that has ``found``; None if it is to stay as it is."""
        if self.sparsity is None:
            return None if found >= PRUNED_FROM else SPARSITY
        return None if 0 < found >= self.sparsity else self.sparsity


def weight_places() -> tuple[Path, ...]:
    """Where weights are looked for if no file is given: a checkout's ``.data``, and the user's data folder."""
    checkout = Path(numbasparse.__file__).resolve().parent.parent
    fetched = (checkout / ".data",) if (checkout / "data" / "fetch_realesrgan.py").is_file() else ()
    return tuple(folder / WEIGHTS for folder in (*fetched, platformdirs.user_data_path("numbasparse")))


def find_weights(path: Path | None) -> Path:
    """The file given, or the first of `weight_places` that is there.

    Raises
    ------
    FileNotFoundError
        If there is none; the text tells how to get them.
    """
    if path is not None:
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
        return path
    places = weight_places()
    found = next((place for place in places if place.is_file()), None)
    if found is not None:
        return found
    package = Path(numbasparse.__file__).resolve().parent
    scripts = (folder / "data" / "fetch_realesrgan.py" for folder in (package, package.parent))
    script = next((script for script in scripts if script.is_file()), Path("data/fetch_realesrgan.py"))
    raise FileNotFoundError(
        f"the network's weights are not at {' or '.join(map(str, places))}: get them with "
        f"`python {script} --weights-only --out {places[0].parent}`, or give a file with --weights"
    )


def load_network(path: Path) -> RRDBNet:
    """Load an RRDBNet of any number of blocks from a safetensors file, float32, for inference.

    Raises
    ------
    ValueError
        If it is not such a file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no safetensors file ({error}): convert other formats first") from error
    return from_state(state, str(path)).requires_grad_(False)


def load_networks(rgb: RGB, weights: Path | None, dense_weights: Path | None, target: Target) -> Networks:
    """Load the network and prune it, unless it is pruned already.

    Parameters
    ----------
    rgb : ndarray
        The picture (H, W, 3), on which it is pruned.
    weights, dense_weights : Path, optional
        Files of the network to prune or to run as it is, and of the dense one, if it is another.
    target : Target
        How to prune.

    Raises
    ------
    ValueError, OSError
        If a file cannot be used.
    """
    path = find_weights(weights)
    network = load_network(path)
    dense = network if dense_weights is None else load_network(find_weights(dense_weights))
    wanted = target.wanted(report(network).sparsity)
    if wanted is None:
        return Networks(dense, network, f"as it is in {path}")
    start = time.perf_counter()
    pruned = prune_on(network, rgb, wanted)
    how = "layer-wise OBS"
    if target.steps:
        distil(pruned, network, rgb, target.steps)
        how += f", then {target.steps} steps of distillation from the dense network"
    took = time.perf_counter() - start
    return Networks(dense, pruned, f"{path} pruned just now on this picture: {how}; {took:.0f} s")


def prune_on(network: RRDBNet, rgb: RGB, sparsity: float) -> RRDBNet:
    """Return a copy of a network, pruned at once by second-order information from crops of a picture."""
    pruned = copy.deepcopy(network)
    text = f"pruning to {sparsity:.0%} by second-order information from crops of the picture"
    with Console(stderr=True).status(text), warnings.catch_warnings():
        # A crop of a small or plain picture does not show every direction: the damping is there for that.
        warnings.filterwarnings("ignore", ".*directions that no calibration image shows", UserWarning)
        prune_with_data_(pruned, [calibration_crops(rgb)], OBSPruning(sparsity))
    return pruned


def distil(pruned: RRDBNet, teacher: RRDBNet, rgb: RGB, steps: int) -> None:
    """Let a pruned network learn, in place, to give what the dense one gives on random crops of a picture.

    Zeros stay zero. The loss is the mean absolute difference of the outputs.
    """
    layers = [module for name, module in pruned.named_modules() if default_filter(module, name)]
    weights = [layer.get_parameter("weight") for layer in layers]
    masks = [weight != 0 for weight in weights]
    distillation = Distillation(pruned.requires_grad_(True), teacher, match="l1")
    optimizer = torch.optim.Adam(pruned.parameters(), lr=STEP_LR)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    random = np.random.default_rng(0)
    try:
        for _ in track(range(steps), "distillation", console=Console(stderr=True)):
            x = random_crops(rgb, random)
            optimizer.zero_grad()
            distillation(x, pruned(x)).backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                for weight, mask in zip(weights, masks, strict=True):
                    weight.mul_(mask)
    finally:
        distillation.close()
        pruned.requires_grad_(False)


def calibration_crops(rgb: RGB) -> Tensor:
    """Cut crops out of a picture (H, W, 3), spread evenly; a small one is mirrored at its edges.

    Returns
    -------
    Tensor
        float32 (``CALIBRATION_EDGE ** 2``, 3, ``CALIBRATION_SIZE``, ``CALIBRATION_SIZE``).
    """
    size = CALIBRATION_SIZE
    rgb = _at_least(rgb, size)
    tops, lefts = (np.linspace(0, length - size, CALIBRATION_EDGE).astype(int) for length in rgb.shape[:2])
    return torch.cat([to_tensor(rgb[top : top + size, left : left + size]) for top in tops for left in lefts])


def random_crops(rgb: RGB, random: np.random.Generator) -> Tensor:
    """Cut random crops out of a picture; float32 (``STEP_CROPS``, 3, ``STEP_SIZE``, ``STEP_SIZE``)."""
    size = STEP_SIZE
    rgb = _at_least(rgb, size)
    places = [random.integers(0, length - size + 1, STEP_CROPS) for length in rgb.shape[:2]]
    return torch.cat([to_tensor(rgb[top : top + size, left : left + size]) for top, left in zip(*places, strict=True)])


def _at_least(rgb: RGB, size: int) -> RGB:
    missing = [max(0, size - length) for length in rgb.shape[:2]]
    return np.pad(rgb, [(0, missing[0]), (0, missing[1]), (0, 0)], mode="symmetric")


def to_tensor(rgb: RGB) -> Tensor:
    """Turn (H, W, 3) into a contiguous (1, 3, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(rgb.transpose(2, 0, 1)))[None]
