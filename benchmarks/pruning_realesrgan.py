"""Real-ESRGAN's 6-block network pruned by distillation against its own dense output, on photographs without labels.

``data/fetch_realesrgan.py`` gets weights and photographs. The pruned network starts as the dense one and learns to give
the same picture (mean absolute difference) and the same features after each block, while its sparsity rises.
"""

from __future__ import annotations

import copy
import io
import time
from pathlib import Path
from typing import Any

import torch
from pruning_pool import Emit, Job
from pruning_train import GraphStep, triangle
from realesrgan import RRDBNet, load_model, load_pictures
from torch import Tensor, nn
from torch.nn import functional as F

from numbasparse.files import write_whole
from numbasparse.pruning import CubicSchedule, MagnitudePruning, OBSPruning, Pruner, prune_, prune_with_data_, report

FEATURE_WEIGHT = 0.1
"""Weight of the features' relative difference beside the picture's difference."""


def features(model: RRDBNet, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return the features after each block, and the picture."""
    first = model.conv_first(x)
    found = [first]
    for block in model.body:
        found.append(block(found[-1]))
    y = first + model.conv_body(found[-1])
    y = model.relu(model.conv_up1(F.interpolate(y, scale_factor=2.0, mode="nearest")))
    y = model.relu(model.conv_up2(F.interpolate(y, scale_factor=2.0, mode="nearest")))
    return found[1:], model.conv_last(model.relu(model.conv_hr(y)))


def distillation_loss(student: RRDBNet, teacher: RRDBNet, x: Tensor) -> Tensor:
    """Return the difference of two networks' pictures and features for pictures (N, 3, H, W)."""
    with torch.no_grad():
        wanted, picture = features(teacher, x)
    got, output = features(student, x)
    loss = (output.float() - picture.float()).abs().mean()
    for ours, theirs in zip(got, wanted, strict=True):
        relative = (ours.float() - theirs.float()).abs().mean() / theirs.float().abs().mean()
        loss = loss + FEATURE_WEIGHT / len(got) * relative
    return loss


def random_crops(pictures: Tensor, count: int, size: int) -> Tensor:
    """Cut ``count`` random crops, turned and mirrored, from uint8 (N, H, W, 3); float32 (count, 3, size, size).

    All on the pictures' device, each crop for itself.
    """
    n, height, width, _ = pictures.shape
    device = pictures.device
    which = torch.randint(n, (count, 1, 1), device=device)
    top = torch.randint(height - size + 1, (count, 1, 1), device=device)
    left = torch.randint(width - size + 1, (count, 1, 1), device=device)
    places = torch.arange(size, device=device)
    crops = pictures[which, top + places[None, :, None], left + places[None, None, :]]
    x = crops.permute(0, 3, 1, 2).float() / 255.0
    turn, mirror = (torch.rand(count, 1, 1, 1, device=device) < 0.5 for _ in range(2))
    x = torch.where(turn, x.mT, x)
    return torch.where(mirror, x.flip(3), x).contiguous(memory_format=torch.channels_last)


def distil(
    student: RRDBNet,
    teacher: RRDBNet,
    pictures: Tensor,
    pruner: Pruner,
    *,
    steps: int,
    batch: int,
    size: int,
    lr: float,
) -> None:
    """Prune ``student`` on the pruner's schedule while it learns from ``teacher``."""
    device = pictures.device
    rate = torch.zeros((), device=device)
    cuda = device.type == "cuda"
    optimizer = torch.optim.Adam(student.parameters(), lr=rate, fused=True, capturable=cuda)
    student.train()
    pruner.begin()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        x = random_crops(pictures, batch, size)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=cuda):
            loss = distillation_loss(student, teacher, x)
        loss.backward()
        optimizer.step()
        pruner.apply()

    def state() -> list[Tensor]:
        moments = (value for entry in optimizer.state.values() for value in entry.values())
        return [*student.parameters(), *moments]

    run = GraphStep(step, state, device)
    for index in range(steps):
        rate.fill_(lr * triangle((index + 1) / (steps + 1), 0.05))
        run()
        pruner.step(apply=False)
    pruner.finish()
    student.eval()


@torch.no_grad()
def enlarge(model: nn.Module, pictures: Tensor) -> Tensor:
    """Enlarge pictures float32 (N, 3, H, W), one at a time, in float32; the result is in [0, 1]."""
    precision = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        return torch.cat([model(x).clamp(0.0, 1.0) for x in pictures.split(1)])
    finally:
        torch.backends.cudnn.allow_tf32 = precision


def psnr(a: Tensor, b: Tensor) -> list[float]:
    """Return each picture's peak signal-to-noise ratio in dB, of RGB in [0, 1]."""
    errors = (a - b).square().mean(dim=(1, 2, 3))
    return [round(float(value), 2) for value in -10.0 * torch.log10(errors)]


def realesrgan(job: Job, device: torch.device, emit: Emit) -> None:
    """Prune to one sparsity: at once by magnitude, gradually with distillation, and at once by OBS.

    Parameters of the job: ``sparsity``, ``scope``, ``seed``; ``steps``, ``batch``, ``size`` (of crops) and ``lr`` of
    the distillation; ``calibration`` (crops for OBS); ``limit`` (of held-out pictures, which are then small; None:
    all); ``pictures`` (folder for crops to look at).
    """
    p = job.parameters
    torch.manual_seed(p["seed"])
    train, held_out = _pictures(device, p["limit"])
    teacher = load_model().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    teacher.requires_grad_(False)
    dense = enlarge(teacher, held_out)

    def measure(method: str, output: Tensor, **more: object) -> Tensor:
        common = {"network": "realesrgan-x4plus-anime", "sparsity": p["sparsity"], "seed": p["seed"]}
        values = psnr(output, dense)
        emit({**common, "method": method, "psnr": round(sum(values) / len(values), 2), "each": values, **more})
        return output

    bicubic = measure("bicubic", F.interpolate(held_out, scale_factor=4, mode="bicubic").clamp(0.0, 1.0))
    at_once = copy.deepcopy(teacher)
    prune_(at_once, MagnitudePruning(p["sparsity"], scope=p["scope"]))
    magnitude = measure("magnitude, one-shot", enlarge(at_once, held_out), scope=p["scope"])
    start = time.perf_counter()
    student = _distilled(teacher, train, p)
    more = {name: p[name] for name in ("scope", "steps", "batch", "size", "lr")}
    more |= {"seconds": round(time.perf_counter() - start, 1), "reached": round(report(student).sparsity, 4)}
    distilled = measure("magnitude, gradual, distilled", enlarge(student, held_out), **more)
    shown = {"bicubic": bicubic, "dense": dense, "magnitude": magnitude, "distilled": distilled}
    save_crops(shown, Path(p["pictures"]) / f"pruning_realesrgan_{round(100 * p['sparsity'])}.png")
    start = time.perf_counter()
    obs = _obs(teacher, train, p)
    seconds = round(time.perf_counter() - start, 1)
    measure("OBS, one-shot", enlarge(obs, held_out), scope="layer", seconds=seconds, calibration=p["calibration"])


def _pictures(device: torch.device, limit: int | None) -> tuple[Tensor, Tensor]:
    """Return the training crops as they are and the held-out ones as float32 (N, 3, H, W)."""
    train, held_out = load_pictures()
    x = held_out.to(device).permute(0, 3, 1, 2).float() / 255.0
    return train.to(device), x if limit is None else x[:limit, :, :48, :48]


def _distilled(teacher: RRDBNet, train: Tensor, p: dict[str, Any]) -> RRDBNet:
    """Return a copy of the teacher, pruned over the first half of the steps."""
    student = copy.deepcopy(teacher).requires_grad_(True)
    steps = p["steps"]
    schedule = CubicSchedule(0, max(1, steps // 2), every=max(1, steps // 100), initial=min(0.5, p["sparsity"]))
    pruner = Pruner(student, MagnitudePruning(p["sparsity"], scope=p["scope"]), schedule)
    distil(student, teacher, train, pruner, steps=steps, batch=p["batch"], size=p["size"], lr=p["lr"])
    return student


def _obs(teacher: RRDBNet, train: Tensor, p: dict[str, Any]) -> RRDBNet:
    """Return a copy of the teacher, pruned at once with a few crops from all over the training pictures."""
    model = copy.deepcopy(teacher)
    crops = train[:: max(1, len(train) // p["calibration"])][: p["calibration"], : p["size"], : p["size"]]
    x = crops.permute(0, 3, 1, 2).float() / 255.0
    prune_with_data_(model, x.split(8), OBSPruning(p["sparsity"]))
    return model


def save_crops(pictures: dict[str, Tensor], path: Path, size: int = 256) -> None:
    """Write a PNG: a row for each picture, the crop in its middle from each of ``pictures`` side by side."""
    from PIL import Image

    rows = []
    for images in zip(*pictures.values(), strict=True):
        height, width = images[0].shape[1:]
        top, left = max(0, (height - size) // 2), max(0, (width - size) // 2)
        rows.append(torch.cat([image[:, top : top + size, left : left + size] for image in images], dim=2))
    grid = (torch.cat(rows, dim=1) * 255.0).round().byte().permute(1, 2, 0).cpu().numpy()
    blob = io.BytesIO()
    Image.fromarray(grid).save(blob, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, blob.getvalue())
