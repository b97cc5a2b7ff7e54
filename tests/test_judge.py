"""The judge: features of a network that was trained on photographs, and what torch-fidelity computes of them."""

import re
from pathlib import Path

import pytest
import torch
from conftest import SMALL, do, draw, no_judge, refused, rows, sampler, save_generator
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

import train

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("judge")


def shifted(count, shift):
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(count)) + shift


def test_kid_by_hand():
    one, other = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    # The kernel (x y / 2 + 1)^3 of different vectors: 1 within one, 1 within other, 8, 1, 1, 1 across.
    mean, spread = train.kid(one, other)
    assert mean == pytest.approx(1000 * (1 + 1 - 2 * (8 + 1 + 1 + 1) / 4)) and spread == 0


def test_fid_and_recall_by_hand():
    real, fake = shifted(2000, 0), shifted(1500, 2)
    found = sampler.distances(fake, real, shifted(1000, 0))
    kid, kid_spread, kid_floor, fid, fid_floor, precision, precision_floor, recall, recall_floor = found
    assert fid == pytest.approx(4 * 2**2, rel=0.1) and 0 <= fid_floor < 0.1  # the means' distance squared
    assert kid > 100 > abs(kid_floor) and 0 < kid_spread < kid
    assert precision < 0.5 < 0.8 < precision_floor <= 1 and recall < 0.5 < 0.8 < recall_floor <= 1
    half = sampler.distances(real[real[:, 0] > 0], real, real)  # true, but half of what there is
    assert half[5] > 0.95 and 0.4 < half[7] < 0.75


def test_features_are_those_of_each_picture_alone(faces):
    images, judge = train.load_images(faces)[0], train.create_judge(CPU)
    features = judge(images)
    assert features.shape == (120, 1280) and features.min() >= 0 and features.max() <= 6  # means behind a ReLU6
    torch.testing.assert_close(judge(images[77:80]), features[77:80], rtol=1e-4, atol=1e-4)
    noise = torch.randint(0, 256, images.shape, dtype=torch.uint8)
    assert train.kid(features[:60], features[60:])[0] < 100 < 1000 < (kid := train.kid(features, judge(noise))[0])
    low = train.create_judge(CPU, precision=torch.bfloat16)
    assert 1e-6 < abs(train.kid(low(images), low(noise))[0] / kid - 1) < 0.05


def test_compare_names_each_figure_beside_its_floor(faces, capsys):
    save_generator("g.param")
    assert draw("g.param", "--compare", faces, "--count", 100) == 0
    out, err = capsys.readouterr()
    (kid,) = re.findall(r"KID x 1000 (\S+) \+- (\S+) \((\S+)\), FID (\S+) \((\S+)\), precision", out)
    mean, spread, floor, fid, fid_floor = map(float, kid)
    assert mean > 1000 > spread > 0 and abs(floor) < 100 and fid > fid_floor
    assert "features of lite0, 60 drawn and 60 real pictures" in out and "diversity" in out
    assert "not to be trusted" in err and "64 pictures" in out
    assert draw(faces, "--compare", faces) == 0  # as pictures of another program
    out, err = capsys.readouterr()
    assert abs(float(re.search(r"KID x 1000 (-?[\d.]+)", out)[1])) < 100 and "60 drawn and 60 real pictures" in out
    assert "not to be trusted" in err and "faces: not a file" in refused(capsys, faces, do=draw)


def test_the_best_are_those_nearest_to_real_ones_and_real_ones_are_their_own_nearest(faces, capsys):
    images, _ = train.load_images(faces)
    noise = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    other = Path("mixed")
    other.mkdir()
    for i, picture in enumerate([*noise[:2], images[5], noise[2], images[9]]):
        to_pil_image(picture).save(other / f"{i}.png")
    assert draw(other, "--compare", faces, "--best", 2, "--out", "best.png") == 0
    assert "best.png" in capsys.readouterr().out
    # The radii of 1, 2 and 3 are 2, 1 and 2: of each the third nearest, itself included, since there are no six.
    found = sampler.realism(torch.tensor([[0.0], [9.0]]), torch.tensor([[1.0], [2.0], [3.0]]))
    assert found.tolist() == pytest.approx([2.0, 1 / 3])
    with Image.open("best.png") as grid:
        drawn = [pil_to_tensor(grid.crop((x, 2, x + 64, 66))) for x in (2, 68)]
    assert all(any(torch.equal(one, images[i]) for one in drawn) for i in (5, 9))
    assert draw(other, "--nearest", faces, "--out", "near.png") == 0
    out = capsys.readouterr().out
    assert "40.0% of 5 drawn pictures" in out and "The nearest 5," in out
    with Image.open("near.png") as grid:
        left, right = (pil_to_tensor(grid.crop((x, 2, x + 64, 66))) for x in (2, 68))
    assert torch.equal(left, right)


def test_without_its_packages_all_else_is_there_and_the_remedy_is_one_line(faces, monkeypatch, capsys):
    for module in (train, sampler):
        monkeypatch.setattr(module, "create_judge", no_judge)
    assert do(faces, 1, *SMALL, "--out", "run", "--epochs", 1) == 0
    assert "kid" not in rows()[0]
    capsys.readouterr()
    assert draw("Net_G.param", "--compare", faces) == 0
    out, err = capsys.readouterr()
    assert "diversity" in out and "KID" not in out and "64 pictures" in out
    assert err.count("\n") == 1 and "pip install" in err
    err = refused(capsys, "Net_G.param", "--compare", faces, "--best", 2, do=draw)
    assert "--best" in err and "pip install" in err


def test_inception_without_its_weights_is_one_line(faces, capsys):
    save_generator("g.param")
    Path("page.pth").write_text("<html>not found</html>")
    Path("empty.pth").touch()
    for weights in ("missing.pth", "page.pth", "empty.pth"):
        more = ["--features", "inception", "--weights", weights]
        said = refused(capsys, "g.param", "--compare", faces, *more, do=draw)
        assert "--features inception" in said and "--weights" in said and "lite0" in said


def test_the_features_of_real_pictures_are_computed_once(faces, monkeypatch):
    judged, create_judge = [], train.create_judge

    def counting(*args, **options):
        judge = create_judge(*args, **options)
        return lambda pictures: judged.append(len(pictures)) or judge(pictures)

    monkeypatch.setattr(train, "create_judge", counting)
    command = [faces, 3, *SMALL, "--out", "run", "--sample_every", 1, "--epochs"]
    assert do(*command, 1) == do(*command, 2) == 0
    assert judged == [60, 60, 60], "real ones, drawn ones; in the second run drawn ones alone"
    assert all(float(row["kid"]) > 100 for row in rows())
