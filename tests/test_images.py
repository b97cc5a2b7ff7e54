"""Reading folders: every kind of picture, every kind of rubbish, and the cache."""

import errno
import json
import os
import re
import shutil
import struct
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import COMMAND, SMALL, do, draw, pictures, refused
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


def load(folder="folder"):
    """Its images, uint8 [N, 3, 64, 64]."""
    return train.load_images(folder)[0]


def test_pixels_are_those_of_the_reports_resize_and_normalisation():
    face = draw_face(0, 0)
    put(face, "face.png")
    report = transforms.Compose([transforms.Resize((64, 64)), transforms.ToTensor(), transforms.Normalize(0.5, 0.5)])
    batch = next(train.real_batches(load(), 1, 0, 0, torch.device("cpu")))
    torch.testing.assert_close(batch[0], report(face), rtol=0, atol=1e-6)


def test_a_large_jpeg_is_decoded_smaller_and_looks_the_same():
    face = draw_face(0, 0).resize((1024, 1024), Image.BICUBIC)
    put(face, "face.jpg", quality=95)
    (image,) = load()
    difference = np.abs(image.permute(1, 2, 0).numpy().astype(int) - np.asarray(face.resize((64, 64), Image.BILINEAR)))
    assert 0 < difference.mean() < 2 and np.percentile(difference, 99) < 12


def test_many_files_are_decoded_side_by_side_and_stay_in_order(monkeypatch):
    decode = train.decode
    monkeypatch.setattr(train, "decode", lambda path, size: time.sleep(hash(path) % 3 / 1000) or decode(path, size))
    pictures("folder", 450)
    for i in (77, 300):
        Path("folder", f"{i:03}.png").write_text("no picture")
    wanted = [[i % 256, 50, i // 256] for i in range(450) if i not in (77, 300)]
    assert load()[:, :, 32, 32].tolist() == wanted


def test_any_depth_and_any_ending_in_the_order_of_names():
    for value, name in enumerate(["a.PNG", "b/c.JpG", "b/d/e.webp", "f.bmp", "g.GIF", "h.tiff", "no_ending"]):
        put(Image.new("RGB", (30, 50), (value * 30,) * 3), name, format="PNG" if name == "no_ending" else None)
    put(Image.new("RGB", (9, 9)), ".hidden/x.png")
    images = load()
    assert images.shape == (7, 3, 64, 64)
    assert (images[:, 0, 32, 32] - torch.arange(0, 210, 30)).abs().max() <= 3


def grey16(value):
    return Image.fromarray(np.full((8, 8), value, np.uint16))


RED_UNUSED = Image.new("RGBA", (8, 8), (200, 40, 0, 0))
PALETTE = Image.new("RGB", (8, 8), (10, 200, 30)).convert("P", palette=Image.Palette.ADAPTIVE)


@pytest.mark.parametrize(
    "image, name, colour",
    [
        (Image.new("L", (8, 8), 77), "grey.png", (77, 77, 77)),
        (Image.new("1", (8, 8), 1), "bilevel.png", (255, 255, 255)),
        (PALETTE, "palette.png", (10, 200, 30)),
        (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "cmyk.tiff", (255, 0, 0)),
        (Image.new("RGBA", (8, 8), (0, 0, 100, 128)), "half.png", (127, 127, 177)),
        (Image.new("LA", (8, 8), (0, 51)), "grey_alpha.png", (204, 204, 204)),
        *((RED_UNUSED, f"unused.{ending}", (200, 40, 0)) for ending in ("png", "tga", "bmp")),
        (grey16(32768), "middle16.png", (128, 128, 128)),
        (grey16(65535), "white16.tiff", (255, 255, 255)),
        (grey16(300), "dark16.png", (1, 1, 1)),
    ],
)
def test_every_kind_of_pixel_becomes_rgb(image, name, colour):
    put(image, name)
    images = load()
    assert images.shape == (1, 3, 64, 64) and images.dtype == torch.uint8
    assert images[0, :, 32, 32].tolist() == pytest.approx(colour, abs=1)


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
    Path("folder", "self.png").symlink_to("self.png")
    os.mkfifo("folder/pipe.png")
    Path("folder", "up").symlink_to("..")  # a circle
    Path("folder", "zeros.png").write_bytes(good.read_bytes()[:33])  # as a download that was cut off leaves it
    os.truncate("folder/zeros.png", 2**33)
    put(Image.new("1", (30000, 6000)), "huge.png")
    put(Image.fromarray(np.linspace(-2, 6, 64, dtype=np.float32)[None]), "floats.tiff")
    put(Image.fromarray(np.linspace(0, 10**6, 64, dtype=np.int32)[None]), "long.tiff")
    assert len(load()) == 2
    Path("folder", os.fsdecode(b"b\xffd.png")).touch()  # bytes that are no text
    assert len(load()) == 2
    first, second = re.findall(r"folder: found 2 images, skipped (.*)", capsys.readouterr().out)
    (index,) = Path(".cache").glob("*.json")
    assert first.startswith("13 ") and second.startswith("14 ") and str(index) in second
    reasons = dict(json.loads(index.read_bytes())["skipped"])
    assert all(f"{name} ({reason})" in second for name, reason in sorted(reasons.items())[1:10]), "ten are told"
    for name, why in {
        "cut.jpg": "truncated", "damaged.png": "", "empty.png": "not an image", "pipe.png": "not a file",
        "gone.png": "No such file or directory", "notes.txt": "not an image that Pillow reads",
        "x.heic": "not an image that Pillow reads", "x.svg": "not an image that Pillow reads", "huge.png": "pixels",
        "self.png": "levels of symbolic links", "zeros.png": "", "floats.tiff": "floats", "long.tiff": "32 bits",
        os.fsdecode(b"b\xffd.png"): "not an image",
    }.items():  # fmt: skip
        assert why in reasons.pop(name)
    assert not reasons


def test_names_that_no_terminal_can_print_do_not_end_a_run(capfdbinary):
    folder = Path(os.fsdecode(b"f\xff$_$ \xe4\xb8\xad"))  # bytes that are no text, no formula, and Chinese
    pictures(folder, 3)
    (folder / os.fsdecode(b"b\xffd.png")).touch()
    assert do(folder, 1, "--width", 4, "--epochs", 1) == 0 and do(folder, 1, "--width", 4, "--epochs", 2) == 0
    out, err = capfdbinary.readouterr()
    assert b"found 3 images, skipped 1" in out and b"b\\udcffd.png (" in out
    assert train.load(Path("runs", f"{folder}-1", "Net_G.param"))["updates"] == 2


def decoded(monkeypatch):
    """Counts the files that are decoded from now on."""
    calls, decode = [], train.decode
    monkeypatch.setattr(train, "decode", lambda path, size: calls.append(path) or decode(path, size))
    return calls


def test_the_cache_is_used_until_something_changes(monkeypatch, capsys):
    paths = [put(draw_face(0, i), f"{i}.png") for i in range(4)]
    Path("folder", "bad.png").touch()
    first = load().clone()
    calls = decoded(monkeypatch)
    assert torch.equal(load(), first) and not calls
    assert "bad.png (" in capsys.readouterr().out.splitlines()[-1]

    time.sleep(0.02)  # the clock of the files is coarse
    os.utime(paths[0], ns=(1, 1))  # another time
    assert torch.equal(load(), first) and len(calls) == 5
    time.sleep(0.02)
    paths[0].chmod(0o600)  # a file that may be read at last
    assert torch.equal(load(), first) and len(calls) == 10
    put(draw_face(0, 9), "9.png")  # another file
    assert len(load()) == 5 and len(calls) == 16
    paths[1].rename("folder/5.png")  # another name
    assert torch.equal(load()[3], first[1]) and len(calls) == 22
    assert len([*Path(".cache").glob("*.rgb")]) == 1, "an outdated cache must not stay on the disk"


@pytest.mark.parametrize("harm", ["cut", "grown", "no index", "half an index", "a list", "no pixels", "old decoder"])
def test_a_damaged_cache_is_built_again(harm, monkeypatch):
    for i in range(3):
        put(draw_face(0, i), f"{i}.png")
    first = load().clone()
    (pixels,), (index,) = Path(".cache").glob("*.rgb"), Path(".cache").glob("*.json")
    whole = pixels.read_bytes()
    if harm in ("cut", "grown"):
        pixels.write_bytes(whole[:-1] if harm == "cut" else whole + b"x")
    elif harm == "half an index":
        index.write_text(index.read_text()[:50])
    elif harm == "a list":
        index.write_text("[]")
    elif harm == "old decoder":
        monkeypatch.setattr(train, "DECODER", "the next")
    else:
        (pixels if harm == "no pixels" else index).unlink()
    calls = decoded(monkeypatch)
    assert torch.equal(load(), first) and len(calls) == 3
    assert pixels.read_bytes() == whole and json.loads(index.read_bytes())["skipped"] == []


def test_an_epoch_holds_every_image_once_in_an_order_of_its_own():
    orders = [train.shuffled(100, seed, epoch) for seed, epoch in [(0, 0), (0, 1), (1, 0)]]
    for order in orders:
        assert order.sort().values.tolist() == list(range(100))
    assert len({tuple(order.tolist()) for order in orders}) == 3
    assert torch.equal(orders[0], train.shuffled(100, 0, 0))


# ---------------------------------------------------------------------------------- what else a file may hold


def chunk(kind, data):
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(name, bits, values, before=b"", after=b"", colour=0):
    """Writes a PNG of 64 equal lines; `values` are one line's, of so many bits each."""
    line = int("".join(f"{value:0{bits}b}" for value in values), 2).to_bytes(len(values) * bits // 8, "big")
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 64, bits, colour, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(64 * (b"\0" + line)))
    path = Path("folder", name)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + before + data + after + chunk(b"IEND", b""))


def test_long_text_a_large_profile_and_exif_that_is_rubbish_are_no_reason_to_lose_a_png(capsys):
    long, ramp = zlib.compress(b"many words " * 300_000), range(0, 256, 4)
    extras = {
        "ztxt": chunk(b"zTXt", b"Comment\0\0" + long),
        "itxt": chunk(b"iTXt", b"Comment\0\1\0\0\0" + long),
        "exif": chunk(b"eXIf", b"rubbish"),
        "icc": chunk(b"iCCP", b"ICC\0\0" + long),
    }
    for name, extra in extras.items():
        png(f"{name}_before.png", 8, ramp, before=extra)
        png(f"{name}_after.png", 8, ramp, after=extra)
    images = load()
    assert "found 8 images" in capsys.readouterr().out
    assert (images == torch.arange(0, 256, 4)).all()


@pytest.mark.parametrize("bits, clear, other", [(1, [0], [1]), (8, [77], [78]), (8, [30, 1, 60], [30, 1, 61])])
def test_the_clear_colour_of_a_png_is_white_and_no_other_is(bits, clear, other):
    trns = chunk(b"tRNS", struct.pack(f">{len(clear)}H", *clear))
    png("clear.png", bits, 32 * clear + 32 * other, before=trns, colour=0 if len(clear) == 1 else 2)
    (image,) = load()
    assert (image[:, :, :30] == 255).all()
    assert image[:, 0, 50].tolist() == pytest.approx([255 * value / (2**bits - 1) for value in other * 3][:3], abs=1)


def exif(*entry, tail=b""):
    """EXIF that says orientation 6, a quarter turn clockwise, and one more entry: tag, type, count, offset."""
    entries = sorted([(0x0112, 3, 1, 6), entry])  # 38 bytes up to the tail
    words = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + words + bytes(4) + tail


def test_a_jpeg_with_broken_exif_is_turned_as_its_orientation_says(capsys):
    picture = Image.new("RGB", (64, 64), "black")
    picture.paste("white", (0, 0, 64, 32))
    broken = {
        "a_bad_offset": exif(0x011A, 5, 1, 0xFFFFFFF0),
        "count": exif(0x011A, 5, 0x10000000, 38, tail=bytes(8)),
        "no_number": exif(0x011A, 11, 1, 0xFFFFFFF0),  # the bits of a NaN
        "pointer": exif(0x8769, 6, 1, 0xFFFFFFF0),
        "rubbish": b"Exif\0\0rubbish",
        "rubbish_ifd": b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(range(200)),
        "text": exif(0x011A, 2, 1, 0),
    }
    for name, data in broken.items():
        put(picture, f"{name}.jpg", exif=data)
    images = load().float().mean(1)
    assert "found 7 images" in capsys.readouterr().out
    for name, image in zip(broken, images):
        image = image if "rubbish" in name else image.rot90()  # back to how it was
        assert image[:30].mean() > 250 and image[34:].mean() < 5, name


# ------------------------------------------------------------------------------------------ which files count


def test_what_we_drew_into_the_folder_of_pictures_is_never_training_data(f, monkeypatch, capsys):
    monkeypatch.chdir("f")
    command = [".", 3, *SMALL, "--out", "ours", "--epochs"]
    Path("checkpoint.pt").write_bytes(b"of another program")
    assert do(*command, 1) == 0
    out = capsys.readouterr().out
    assert "found 16 images, skipped 1 " in out and "checkpoint.pt (" in out
    assert draw("Net_G.param") == 0 and draw("Net_G.param", "--folder", "drawn", "--count", 3) == 0
    assert draw("Net_G.param", "--walk", "walk.gif", "--count", 1) == 0
    shutil.copy("ours/losses.png", "copy.png")
    capsys.readouterr()
    assert do(*command, 2) == 0
    out = capsys.readouterr().out
    assert "found 16 images" in out and "Carrying on at update 2 of 4" in out
    for name in ("ours", "samples.png", "copy.png", "drawn/00002.png", "walk.gif"):
        assert f"{name} (" in out
    monkeypatch.setattr(train, "decode_files", None)
    assert do(*command, 3) == 0, "the generator that the last run left there must not make the cache stale"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, since only root becomes somebody else, and not back")
def test_what_may_not_be_read_is_named_with_the_systems_reason(f, tmp_path, monkeypatch):
    load("f")  # imports what another user may not be able to import
    with tempfile.TemporaryDirectory() as place:  # that of pytest is closed to others
        monkeypatch.chdir(place)
        for folder in ("f", "f/closed", "f/half"):
            pictures(folder)
        for name, mode in [(".", 0o777), ("f/closed", 0), ("f/half", 0o444), ("f/007.png", 0)]:
            os.chmod(name, mode)
        child = os.fork()
        if child == 0:
            try:
                with open("said", "w") as sys.stdout:
                    if os.geteuid() == 0:  # root may read all
                        os.setgroups([]), os.setgid(65534), os.setuid(65534)
                    load("f")
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        said = Path("said").read_text()
        for folder in ("f/closed", "f/half"):
            os.chmod(folder, 0o755)
        monkeypatch.chdir(tmp_path)
    assert "found 15 images, skipped 18 " in said, said
    for name in ("007.png", "closed", "half/000.png"):
        assert re.search(rf"{name}[^,]*Permission denied", said), said


@pytest.mark.parametrize("count, again", [(150, []), (99, [0]), (16, [0, 1])])
def test_a_read_error_is_tried_again_where_over_one_percent_has_it(count, again, monkeypatch, capsys):
    """A bad sector is not read at each start for ever, and a share that was away is not lost for ever."""
    pictures("folder", count)
    decode, tried = train.decode, []

    def failing(path, size):
        tried.append(path)
        if path.endswith(tuple(f"{i:03}.png" for i in (again or [7]))):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return decode(path, size)

    with monkeypatch.context() as patch:
        patch.setattr(train, "decode", failing)
        for _ in range(2):
            assert len(load()) == count - len(again or [7])
            assert os.strerror(errno.EIO) in capsys.readouterr().out
    assert len(tried) == (2 * count if again else count)
    if not again:
        time.sleep(0.02)
        os.utime("folder/007.png")  # restored from a backup
    assert len(load()) == count


def test_the_cache_lies_where_cache_says_and_a_bad_place_is_named(f, capsys):
    assert do(*COMMAND, 1, "--cache", "else/where") == 0
    assert draw("Net_G.param", "--compare", "f", "--cache", "else/where") == 0
    assert not Path(".cache").exists() and len([*Path("else/where").glob("*.rgb")]) == 1
    Path("a_file").touch()
    Path(".cache").touch()
    for do_it, words in [(do, [*COMMAND, 2]), (draw, ["Net_G.param", "--compare", "f"])]:
        for place, more in [(".cache", []), ("a_file", ["--cache", "a_file"])]:
            said = refused(capsys, *words, *more, do=do_it)
            assert place in said and re.search(f"{os.strerror(errno.EEXIST)}|{os.strerror(errno.ENOTDIR)}", said)
