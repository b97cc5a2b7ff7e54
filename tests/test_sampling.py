"""test.sh: the same seed gives the same pictures, whatever is drawn beside them."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, draw, sampler
from PIL import Image, ImageSequence
from torchvision.transforms.functional import pil_to_tensor

import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a Net_G.param of odd sizes, and the generator that is in it."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(3)
    G = train.generator(latent_dim=13, width=5)
    with torch.no_grad():
        G(torch.randn(32, 13, 1, 1))  # running statistics that are not those of the start
        G(torch.randn(32, 13, 1, 1))
    train.save({"latent_dim": 13, "width": 5, "weights": G.state_dict()}, folder / "Net_G.param")
    return folder, G


def pixels(path):
    with Image.open(path) as image:
        return image.size, image.convert("RGB").tobytes()


def test_a_grid_of_64_by_default_always_the_same_for_a_seed(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained[0])
    assert draw("Net_G.param") == 0
    assert "64 pictures, eight to a row, in samples.png" in capsys.readouterr().out
    size, first = pixels("samples.png")
    assert size == (530, 530)
    assert draw(trained[0] / "Net_G.param", "--out", "new/same.png") == 0
    assert draw(trained[0] / "Net_G.param", "--seed", 1, "--out", "other.png") == 0
    assert pixels("new/same.png")[1] == first != pixels("other.png")[1]


def test_a_clone_draws_faces_at_once_even_if_nobody_reads_what_it_says(tmp_path, begin):
    command = 'set -o pipefail; bash "$0/test.sh" "$0/Figures/Net_G.param" | true'
    process = begin("bash", "-c", command, ROOT, cwd=tmp_path)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 0 and "Traceback" not in err and "Broken pipe" not in err, err
    pictures = train.sample(sampler.load_generator(ROOT / "Figures/Net_G.param"), 64).float()
    with Image.open(tmp_path / "samples.png") as grid:
        assert grid.crop((2, 2, 66, 66)).tobytes() == pictures[0].byte().permute(1, 2, 0).numpy().tobytes()
    # Light, dark and unlike each other: no flat and no pale pictures (standard deviations in 0 to 255).
    assert 40 < pictures.std() < 100 and 30 < pictures.std(0).mean() < 90


def test_one_file_a_picture_and_none_depends_on_its_neighbours(trained, monkeypatch, capsys):
    folder, G = trained
    monkeypatch.chdir(folder)
    assert draw("Net_G.param", "--count", 70, "--folder", "drawn") == 0
    assert "70 pictures in drawn" in capsys.readouterr().out
    files = sorted((folder / "drawn").iterdir())
    assert [files[0].name, files[-1].name, len(files)] == ["00000.png", "00069.png", 70]
    for count in (1, 3, 65):
        for i, picture in enumerate(train.sample(G.eval(), count)):
            size, drawn = pixels(files[i])
            assert size == (64, 64)
            assert drawn == picture.permute(1, 2, 0).numpy().tobytes()
    assert len({path.read_bytes() for path in files}) == 70


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_a_walk_turns_round_without_an_end_and_walks_do_not_depend_on_each_other(trained, suffix, monkeypatch, capsys):
    monkeypatch.chdir(trained[0])
    monkeypatch.setattr(sampler, "POINTS", 4)  # half as many pictures
    frames = {}
    for count in (1, 3):
        assert draw(ROOT / "Figures/Net_G.param", "--walk", f"{suffix}/walk.{suffix}", "--count", count) == 0
        assert f"{count} walks side by side, 60 pictures of each" in capsys.readouterr().out
        with Image.open(f"{suffix}/walk.{suffix}") as film:
            assert film.n_frames == 60 and film.info["loop"] == 0 and film.size == {1: (64, 64), 3: (200, 68)}[count]
            grey = [pil_to_tensor(frame.convert("L")) for frame in ImageSequence.Iterator(film)]
            frames[count] = torch.cat(grey).float()
    steps = (frames[1] - frames[1].roll(1, 0)).abs().mean((1, 2))  # the first is the one from the last to the first
    assert 0 < steps[0] <= 1.5 * steps[1:].max() and steps.min() > 0
    with pytest.raises(train.UserError, match="drawn by this program"):
        train.load_images(suffix)
    apart = (frames[3][:, 2:66, 2:66] - frames[1][:, -64:, -64:]).abs().mean()  # colours are not kept to the last bit
    assert apart < 8 < (frames[3][:, 2:66, 68:132] - frames[1][:, -64:, -64:]).abs().mean()


def copier(picture, path):
    """Writes a generator that draws one picture, uint8 [3, 64, 64], whatever the noise."""
    torch.manual_seed(0)
    G, picture = train.generator(4, 16), picture / 127.5 - 1
    optimizer = torch.optim.Adam(G.parameters(), 0.01)
    for _ in range(150):
        loss = (G(torch.randn(8, 4, 1, 1)) - picture).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    train.save({"latent_dim": 4, "width": 16, "weights": G.state_dict()}, path)


def test_a_generator_that_copies_is_found_out(faces, trained, monkeypatch, capsys):
    monkeypatch.chdir(trained[0])
    copier(train.load_images(faces)[0][7], Path("copier.param"))
    shares = []
    for generator in ("copier.param", "Net_G.param"):
        assert draw(generator, "--nearest", faces, "--count", 100, "--out", "nearest.png") == 0
        out, err = capsys.readouterr()
        assert "blurred to 16x16" in err and "in nearest.png" in out
        shares.append(float(re.search(r"([\d.]+)% of 100 drawn", out)[1]))
    assert shares[0] > 90 and shares[1] < 20
    Path("twice").mkdir()
    for i, path in enumerate([*faces.iterdir()] * 2):
        shutil.copy(path, f"twice/{i}.png")
    assert draw("copier.param", "--nearest", "twice", "--count", 64) == 0  # each has a twin there
    assert float(re.search(r"([\d.]+)% of 64 drawn", capsys.readouterr().out)[1]) > 90
    assert pixels("nearest.png")[0] == (530, 530)  # 32 pairs
