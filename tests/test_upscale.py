"""`numbasparse upscale`: tiles against the whole picture, image files of every kind, and what the command says."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("optuna")
Image = pytest.importorskip("PIL.Image")

from click.testing import CliRunner, Result  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from numbasparse.cli import image_file, main, upscale, upscale_networks  # noqa: E402
from numbasparse.cli.image_file import read_picture, write_picture  # noqa: E402
from numbasparse.cli.tiles import tiles  # noqa: E402
from numbasparse.models.rrdbnet import SCALE, RRDBNet, from_state  # noqa: E402
from numbasparse.pruning import MagnitudePruning, prune_, report  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning")  # torch's own, when it copies a graph


def small(sparsity: float = 0.0, blocks: int = 1) -> RRDBNet:
    torch.manual_seed(0)
    model = RRDBNet(blocks, 8, 4).eval().requires_grad_(False)
    if sparsity:
        prune_(model, MagnitudePruning(sparsity, scope="layer"))
    return model


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "pruned.safetensors"
    save_file(small(0.8).state_dict(), path)
    return path


def noise(height: int, width: int, channels: int = 3) -> Any:
    shape = (height, width) if channels == 1 else (height, width, channels)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["upscale", *map(str, arguments)], catch_exceptions=False)


def flat(text: str) -> str:
    return " ".join(text.split())


# ---- tiles --------------------------------------------------------------------------------------------------


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.integers(0, 30))
@settings(max_examples=80, deadline=None)
def test_tiles_cover_once_with_one_window_size(height: int, width: int, size: int, overlap: int) -> None:
    cut = tiles(height, width, size, overlap)
    seen = np.zeros((height, width), np.int64)
    assert len({tile.read(seen).shape for tile in cut}) == 1
    for tile in cut:
        one = np.zeros_like(seen)
        tile.write(np.ones_like(tile.read(seen)), one, 1)
        seen += one
        for span, length in ((tile.rows, height), (tile.columns, width)):
            assert span.start == 0 or span.keep_start - span.start >= overlap
            assert span.stop == length or span.stop - span.keep_stop >= overlap
            assert span.stop - span.start <= size + 2 * overlap
    np.testing.assert_array_equal(seen, 1)


@pytest.mark.parametrize("arguments", [(0, 4, 4, 0), (4, 4, 0, 0), (4, 4, 4, -1)])
def test_tiles_refuse(arguments: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="of 1 or more and overlap of 0 or more"):
        tiles(*arguments)


@pytest.mark.parametrize("blocks", [1, 2])
def test_reach_is_the_receptive_field(blocks: int) -> None:
    """A pixel changes the output as far as ``reach`` says, and no further."""
    model = small(blocks=blocks).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_() if parameter.ndim > 1 else parameter.zero_()  # nothing cancels
    reach = model.reach
    assert reach == 15 * blocks + 4
    x = torch.zeros(1, 3, 1, 2 * reach + 11, dtype=torch.float64)
    x[..., reach + 5] = 1e6
    different = model(x)[0].any(dim=0).any(dim=0).nonzero()
    assert int(different.min()) // SCALE == 5
    assert int(different.max()) // SCALE == 2 * reach + 5


def run_tiles(model: Any, rgb: Any, size: int, overlap: int) -> Any:
    picture = image_file.Picture(rgb, False, np.uint16)  # finer than 8 bits
    runner = upscale.Runner("sparse", model, torch.device("cpu"))
    cut = tiles(*rgb.shape[:2], size, overlap)
    return upscale.enlarge(picture, cut, [runner])["sparse"].astype(np.int64)


def test_tiles_give_the_whole_picture() -> None:
    """With an overlap of the receptive field nothing remains of the tiles; without any, seams do."""
    from numbasparse.nn import convert

    rgb = np.random.default_rng(0).random((41, 44, 3), dtype=np.float32)
    dense = small(0.8)
    sparse = convert(dense, None, upscale_networks.to_tensor(rgb))
    for model in (dense, sparse):
        whole = run_tiles(model, rgb, 100, 0)
        reach = dense.reach
        assert np.abs(run_tiles(model, rgb, 16, reach) - whole).max() <= 1
        assert np.abs(run_tiles(model, rgb, 16, 0) - whole).max() > 20
    np.testing.assert_allclose(run_tiles(sparse, rgb, 16, reach), run_tiles(dense, rgb, 100, 0), atol=2)


# ---- files --------------------------------------------------------------------------------------------------


def test_reads_and_writes_every_kind(tmp_path: Path) -> None:
    rgb, grey = Image.fromarray(noise(5, 7)), Image.fromarray(noise(5, 7, 1))
    alpha = Image.fromarray(noise(5, 7, 4))
    wide = Image.fromarray(noise(5, 7, 1).astype(np.uint16) * 257 + 3)
    cases = {
        "a.png": (rgb, "RGB"),
        "a.bmp": (rgb, "RGB"),
        "a.tiff": (rgb, "RGB"),
        "a.jpg": (rgb, "RGB"),
        "grey.png": (grey, "L"),
        "bits.png": (grey.convert("1"), "L"),
        "palette.png": (rgb.quantize(16), "RGB"),
        "alpha.png": (alpha, "RGBA"),
        "grey_alpha.png": (alpha.convert("LA"), "LA"),
        "wide.png": (wide, "I;16"),
    }
    for name, (image, mode) in cases.items():
        path, out = tmp_path / name, tmp_path / "out.png"
        image.save(path)
        picture = read_picture(path)
        assert picture.rgb.shape == (5, 7, 3)
        assert picture.rgb.dtype == np.float32
        assert (picture.alpha is not None) == ("A" in mode)
        write_picture(out, picture.quantize(picture.rgb), picture)
        with Image.open(out) as written, Image.open(path) as first:
            assert written.mode == mode
            np.testing.assert_array_equal(np.asarray(written), np.asarray(first.convert(mode)), name)


def test_keeps_profile_and_turns_by_exif(tmp_path: Path) -> None:
    image = Image.fromarray(noise(4, 6))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "in.png", exif=exif, icc_profile=b"profile")
    picture = read_picture(tmp_path / "in.png")
    assert picture.rgb.shape == (6, 4, 3)
    assert picture.profile == b"profile"


def png_16_bit_colour() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    rows = zlib.compress(bytes(4 * (1 + 4 * 6)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def as_bytes(image: Any, kind: str, **options: Any) -> bytes:
    blob = io.BytesIO()
    image.save(blob, kind, **options)
    return blob.getvalue()


def bad_files() -> dict[str, tuple[bytes, str]]:
    rgb = Image.fromarray(noise(64, 64))
    other = Image.fromarray(255 - noise(64, 64))
    return {
        "text.png": (b"no picture", "is no image file that Pillow can read"),
        "cut.png": (as_bytes(rgb, "PNG")[:3000], "cannot be read"),
        "deep.png": (png_16_bit_colour(), "has values of mode RGB;16B: expected 8 bits"),
        "print.jpg": (as_bytes(rgb.convert("CMYK"), "JPEG"), "has values of mode CMYK"),
        "float.tiff": (as_bytes(rgb.convert("F"), "TIFF"), "has values of mode F"),
        "moves.gif": (as_bytes(rgb, "GIF", save_all=True, append_images=[other]), "has several frames"),
    }


@pytest.mark.parametrize("name", sorted(bad_files()))
def test_refuses_files(name: str, tmp_path: Path) -> None:
    blob, words = bad_files()[name]
    (tmp_path / name).write_bytes(blob)
    with pytest.raises(ValueError, match=words):
        read_picture(tmp_path / name)


def test_refuses_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(noise(5, 7)).save(tmp_path / "a.png")
    monkeypatch.setattr(image_file, "MAX_PIXELS", 34)
    with pytest.raises(ValueError, match="has 7 x 5 pixels, at most 34 can be enlarged"):
        read_picture(tmp_path / "a.png")


# ---- the command --------------------------------------------------------------------------------------------


def test_command_writes_both_pictures(tmp_path: Path, weights: Path) -> None:
    source, out, compared = tmp_path / "in.png", tmp_path / "out.png", tmp_path / "compared.png"
    Image.fromarray(noise(40, 30)).save(source)
    result = call(source, out, "--weights", weights, "--tile", 16, "--overlap", 19, "--compare", compared)
    assert result.exit_code == 0, result.output
    said = flat(result.output)
    assert "30 x 40 to 120 x 160 pixels; RRDBNet of 1 blocks, 80.0% zeros, as it is in" in said
    assert "tiles: 6 windows of 30 x 40; overlap 19 of the 19 pixels" in said
    assert "sparse against dense: " in said
    assert "dense" in said
    with Image.open(out) as image:
        assert image.size == (120, 160)
        expected = (
            small(0.8)(upscale_networks.to_tensor(read_picture(source).rgb))[0].permute(1, 2, 0).clamp(0, 1).numpy()
        )
        np.testing.assert_allclose(np.asarray(image), expected * 255, atol=0.6)
    with Image.open(compared) as image:
        assert image.size[0] >= 3 * 120
        assert image.size[1] > 160
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compared.png", "in.png", "out.png", weights.name]


@pytest.mark.parametrize(("height", "width", "channels"), [(1, 1, 3), (3, 50, 1), (20, 17, 4)])
def test_command_small_pictures_without_dense(
    height: int, width: int, channels: int, tmp_path: Path, weights: Path
) -> None:
    source, out = tmp_path / "in.png", tmp_path / "out.png"
    Image.fromarray(noise(height, width, channels)).save(source)
    result = call(source, out, "--weights", weights, "--no-dense", "--compare", tmp_path / "c.png")
    assert result.exit_code == 0, result.output
    assert "sparse against dense" not in flat(result.output)
    with Image.open(out) as image:
        assert image.size == (4 * width, 4 * height)
        assert image.mode == {1: "L", 3: "RGB", 4: "RGBA"}[channels]


def test_command_prunes_and_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upscale_networks, "CALIBRATION_SIZE", 14)
    monkeypatch.setattr(upscale_networks, "STEP_SIZE", 10)
    dense, pruned = tmp_path / "dense.safetensors", tmp_path / "pruned.safetensors"
    save_file({name: tensor.half() for name, tensor in small().state_dict().items()}, dense)
    source, out = tmp_path / "in.png", tmp_path / "out.png"
    Image.fromarray(noise(20, 16)).save(source)
    result = call(source, out, "--weights", dense, "--sparsity", 0.7, "--save-pruned", pruned, "--steps", 3)
    assert result.exit_code == 0, result.output
    assert "pruned just now" in flat(result.output)
    network = from_state(load_file(pruned), "file")
    assert not torch.equal(network.conv_last.bias, small().conv_last.bias.half().float())  # it has learnt
    assert report(network).sparsity == pytest.approx(0.7, abs=0.02)
    again = call(source, tmp_path / "again.png", "--weights", pruned, "--dense-weights", dense)
    assert f"as it is in {pruned}" in again.output
    assert (tmp_path / "again.png").read_bytes() == out.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{in}", "{tmp}/out.jpg"], "expected a file name that ends in .png"),
        (["{in}", "{tmp}/none/out.png"], "there is no folder"),
        (["{tmp}/none.png", "{tmp}/out.png"], "there is no file"),
        (["{in}", "{tmp}/out.png", "--compare", "{tmp}/out.png"], "give them different names"),
        (["{in}", "{in}"], "in.png is read: give the result another name"),
        (["{in}", "{tmp}/out.png", "--weights", "{in}"], "is no safetensors file"),
        (["{in}", "{tmp}/out.png", "--weights", "{tmp}/other.safetensors"], "does not hold the weights of an RRDBNet"),
        (["{in}", "{tmp}/out.png", "--weights", "{tmp}/nan.safetensors"], "values that are NaN or infinite"),
        (["{in}", "{tmp}/out.png", "--no-dense", "--dense-weights", "{in}"], "exclude each other"),
        (["{in}", "{tmp}/out.png", "--tuned", "{tmp}/tuned.json"], "tuned.json"),
        (["{in}", "{tmp}/out.png", "--device", "abacus"], "device 'abacus' cannot be used"),
    ],
)
def test_command_refuses(arguments: list[str], words: str, tmp_path: Path) -> None:
    Image.fromarray(noise(8, 8)).save(tmp_path / "in.png")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    broken = small().state_dict()
    broken["conv_hr.bias"][0] = float("nan")
    save_file(broken, tmp_path / "nan.safetensors")
    before = sorted(tmp_path.iterdir())
    given = [part.replace("{in}", str(tmp_path / "in.png")).replace("{tmp}", str(tmp_path)) for part in arguments]
    result = call(*given)
    assert result.exit_code == 1
    assert words in result.output
    assert sorted(tmp_path.iterdir()) == before


def test_missing_weights_say_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(noise(8, 8)).save(tmp_path / "in.png")
    monkeypatch.setattr(upscale_networks, "weight_places", lambda: (tmp_path / "realesrgan" / "x.safetensors",))
    result = call(tmp_path / "in.png", tmp_path / "out.png")
    assert result.exit_code == 1
    assert "fetch_realesrgan.py --weights-only --out" in result.output
    assert str(tmp_path / "realesrgan") in result.output


def test_psnr() -> None:
    a = np.zeros((2, 3, 3), np.uint8)
    assert upscale.psnr(a, a) == float("inf")
    assert upscale.psnr(a, a + np.uint8(255)) == pytest.approx(0.0)
    assert upscale.psnr(a, a + np.uint8(1)) == pytest.approx(48.13, abs=0.01)
