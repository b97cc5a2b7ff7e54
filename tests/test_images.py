"""Reading folders: every kind of picture, every kind of rubbish, and the cache."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run
from faces import draw_face
from PIL import Image
from torchvision import transforms

import train


def put(image, name, **how):
    """Saves a picture as folder/name."""
    path = Path("folder", name)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **how)
    return path


def one_colour(images):
    """The colour in the middle of the only image."""
    assert images.shape == (1, 3, 64, 64) and images.dtype == torch.uint8
    return images[0, :, 32, 32].tolist()


def test_pixels_are_those_of_the_reports_resize_and_normalisation():
    face = draw_face(0, 0)
    put(face, "face.png")
    report = transforms.Compose([transforms.Resize((64, 64)), transforms.ToTensor(), transforms.Normalize(0.5, 0.5)])
    batch = train.real_batch(train.load_images("folder"), torch.tensor([0]), torch.device("cpu"))
    torch.testing.assert_close(batch[0], report(face), rtol=0, atol=1e-6)


def test_a_large_jpeg_is_decoded_smaller_and_looks_the_same():
    face = draw_face(0, 0).resize((1024, 1024), Image.BICUBIC)
    put(face, "face.jpg", quality=95)
    (image,) = train.load_images("folder")
    difference = np.abs(image.permute(1, 2, 0).numpy().astype(int) - np.asarray(face.resize((64, 64), Image.BILINEAR)))
    assert 0 < difference.mean() < 2 and np.percentile(difference, 99) < 12


def test_many_files_are_decoded_side_by_side_and_stay_in_order(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for i in range(450):
        put(Image.new("RGB", (4, 4), (i % 256, i // 256, 0)), f"{i:04}.png")
    for i in (77, 300):
        Path("folder", f"{i:04}.png").write_text("no picture")
    images = train.load_images("folder")
    wanted = [[i % 256, i // 256, 0] for i in range(450) if i not in (77, 300)]
    assert images[:, :, 32, 32].tolist() == wanted


def test_processes_that_are_spawned_decode_as_well():
    for i in range(420):
        put(Image.new("RGB", (4, 4), (i % 256, i // 256, 0)), f"{i:04}.png")
    spawn = f"import multiprocessing, sys; sys.path.insert(0, {str(ROOT)!r}); multiprocessing.set_start_method('spawn')"
    code = f"{spawn}; import train; print(train.load_images('folder')[:, 0, 32, 32].tolist())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert found.stdout.splitlines()[-1] == str([i % 256 for i in range(420)]), found.stderr


def test_any_depth_and_any_ending_in_the_order_of_names():
    for value, name in enumerate(["a.PNG", "b/c.JpG", "b/d/e.webp", "f.bmp", "g.GIF", "h.tiff", "no_ending"]):
        put(Image.new("RGB", (30, 50), (value * 30,) * 3), name, format="PNG" if name == "no_ending" else None)
    put(Image.new("RGB", (9, 9)), ".hidden/x.png")
    images = train.load_images("folder")
    assert images.shape == (7, 3, 64, 64)
    assert (images[:, 0, 32, 32] - torch.arange(0, 210, 30)).abs().max() <= 3


def grey16(value):
    return Image.fromarray(np.full((8, 8), value, np.uint16))


RED_ON_NOTHING = Image.new("RGBA", (8, 8), (200, 40, 0, 0))
PALETTE = Image.new("RGB", (8, 8), (10, 200, 30)).convert("P", palette=Image.Palette.ADAPTIVE)


@pytest.mark.parametrize(
    "image, name, colour",
    [
        (Image.new("L", (8, 8), 77), "grey.png", (77, 77, 77)),
        (Image.new("1", (8, 8), 1), "bilevel.png", (255, 255, 255)),
        (PALETTE, "palette.png", (10, 200, 30)),
        (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "cmyk.tiff", (255, 0, 0)),
        (Image.new("RGBA", (8, 8), (0, 0, 100, 128)), "half.png", (127, 127, 177)),
        (RED_ON_NOTHING, "nothing.png", (255, 255, 255)),
        (Image.new("LA", (8, 8), (0, 0)), "grey_alpha.png", (255, 255, 255)),
        (grey16(32768), "middle16.png", (128, 128, 128)),
        (grey16(65535), "white16.tiff", (255, 255, 255)),
        (grey16(300), "dark16.png", (1, 1, 1)),
    ],
)
def test_every_kind_of_pixel_becomes_rgb(image, name, colour):
    put(image, name)
    assert one_colour(train.load_images("folder")) == pytest.approx(colour, abs=1)


def test_rubbish_is_skipped_counted_and_named(capsys):
    good = put(draw_face(0, 1), "good.png")
    data = put(draw_face(0, 2), "whole.jpg").read_bytes()
    Path("folder", "cut.jpg").write_bytes(data[: len(data) // 2])
    Path("folder", "empty.png").touch()
    Path("folder", "notes.txt").write_text("no picture")
    Path("folder", "x.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200))
    Path("folder", "x.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    Path("folder", "damaged.png").write_bytes(good.read_bytes()[:40] + b"x" * 400)
    Path("folder", "gone.png").symlink_to("nowhere")
    os.mkfifo("folder/pipe.png")
    Path("folder", "up").symlink_to("..")  # a circle
    huge = put(Image.new("1", (30000, 6000)), "huge.png")
    put(Image.new("1", (10000, 9500)), "big.png")
    assert huge.stat().st_size < 100_000
    assert len(train.load_images("folder")) == 2
    printed = capsys.readouterr().out
    assert "folder: found 2 images, skipped 10:" in printed
    for name, why in {
        "cut.jpg": "truncated", "damaged.png": "damaged: ", "empty.png": "empty", "pipe.png": "not a file",
        "gone.png": "No such file or directory", "notes.txt": "not an image that Pillow reads",
        "x.heic": "not an image that Pillow reads", "x.svg": "not an image that Pillow reads",
        "huge.png": "more than 89,478,485 pixels", "big.png": "more than 89,478,485 pixels",
    }.items():  # fmt: skip
        assert f"{name} ({why}" in printed


def test_names_that_no_terminal_can_print_do_not_end_a_run(tmp_path):
    folder = tmp_path / os.fsdecode(b"f\xff$_$ \xe4\xb8\xad")  # bytes that are no text, no formula, and Chinese
    folder.mkdir()
    draw_face(0, 1).save(folder / "good.png")
    (folder / os.fsdecode(b"b\xffd.png")).touch()
    status, out, err = run("train.sh", folder, 1, "--width", 4, "--epochs", 1, cwd=tmp_path)
    assert status == 0 and err == ""
    assert "found 1 images, skipped 1: b\\udcffd.png (empty)" in out


def decoded(monkeypatch):
    """Counts the files that are decoded from now on."""
    calls, decode = [], train.decode
    monkeypatch.setattr(train, "decode", lambda path, size: calls.append(path) or decode(path, size))
    return calls


def test_the_cache_is_used_until_something_changes(monkeypatch, capsys):
    paths = [put(draw_face(0, i), f"{i}.png") for i in range(4)]
    Path("folder", "bad.png").touch()
    first = train.load_images("folder").clone()
    calls = decoded(monkeypatch)
    assert torch.equal(train.load_images("folder"), first) and not calls
    assert "skipped 1: bad.png (empty)" in capsys.readouterr().out.splitlines()[-1]

    time.sleep(0.02)  # the clock of the files is coarse
    os.utime(paths[0], ns=(1, 1))  # another time
    assert torch.equal(train.load_images("folder"), first) and len(calls) == 4
    time.sleep(0.02)
    paths[0].chmod(0o600)  # a file that may be read at last
    assert torch.equal(train.load_images("folder"), first) and len(calls) == 8
    put(draw_face(0, 9), "9.png")  # another file
    assert len(train.load_images("folder")) == 5 and len(calls) == 13
    paths[1].rename("folder/5.png")  # another name
    assert torch.equal(train.load_images("folder")[3], first[1]) and len(calls) == 18
    assert len(list(Path(".cache").iterdir())) == 2, "an outdated cache must not stay on the disk"


@pytest.mark.parametrize("harm", ["cut", "grown", "no index", "half an index", "no pixels", "an earlier decoder"])
def test_a_damaged_cache_is_built_again(harm, monkeypatch):
    for i in range(3):
        put(draw_face(0, i), f"{i}.png")
    first = train.load_images("folder").clone()
    (pixels,), (index,) = Path(".cache").glob("*.rgb"), Path(".cache").glob("*.json")
    whole = pixels.read_bytes()
    if harm in ("cut", "grown"):
        pixels.write_bytes(whole[:-1] if harm == "cut" else whole + b"x")
    elif harm == "half an index":
        index.write_text(index.read_text()[:50])
    elif harm == "an earlier decoder":
        monkeypatch.setattr(train, "DECODER", "the next")
    else:
        (pixels if harm == "no pixels" else index).unlink()
    calls = decoded(monkeypatch)
    assert torch.equal(train.load_images("folder"), first) and len(calls) == 3
    assert pixels.read_bytes() == whole and len(json.loads(index.read_bytes())["digests"]) == 3


def test_an_epoch_holds_every_image_once_in_an_order_of_its_own():
    orders = [train.shuffled(100, seed, epoch) for seed, epoch in [(0, 0), (0, 1), (1, 0)]]
    for order in orders:
        assert order.sort().values.tolist() == list(range(100))
    assert len({tuple(order.tolist()) for order in orders}) == 3
    assert torch.equal(orders[0], train.shuffled(100, 0, 0))
