"""test.sh: the same seed gives the same pictures, whatever is drawn beside them."""

import pytest
import torch
from conftest import ROOT, run, sampler
from PIL import Image

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


def test_a_grid_of_64_by_default_always_the_same_for_a_seed(trained):
    folder, G = trained
    status, out, err = run("test.sh", "Net_G.param", cwd=folder)
    assert status == 0 and "64 pictures, eight to a row, in samples.png" in out
    size, first = pixels(folder / "samples.png")
    assert size == (530, 530)
    run("test.sh", folder / "Net_G.param", "--out", "new/same.png", cwd=folder)
    run("test.sh", folder / "Net_G.param", "--seed", 1, "--out", "other.png", cwd=folder)
    assert pixels(folder / "new" / "same.png")[1] == first != pixels(folder / "other.png")[1]


def test_a_clone_draws_faces_at_once(tmp_path):
    status, out, err = run("test.sh", ROOT / "Net_G.param", cwd=tmp_path)
    assert status == 0, err
    pictures = train.sample(sampler.load_generator(ROOT / "Net_G.param", torch.device("cpu")), 64).float()
    with Image.open(tmp_path / "samples.png") as grid:
        assert grid.crop((2, 2, 66, 66)).tobytes() == pictures[0].byte().permute(1, 2, 0).numpy().tobytes()
    # Light, dark and unlike each other: no flat and no pale pictures (standard deviations in 0 to 255).
    assert 40 < pictures.std() < 100 and 30 < pictures.std(0).mean() < 90


def test_one_file_a_picture_and_none_depends_on_its_neighbours(trained):
    folder, G = trained
    status, out, err = run("test.sh", "Net_G.param", "--count", 70, "--folder", "drawn", cwd=folder)
    assert status == 0 and "70 pictures in drawn" in out
    files = sorted((folder / "drawn").iterdir())
    assert [files[0].name, files[-1].name, len(files)] == ["00000.png", "00069.png", 70]
    for count in (1, 3, 65):
        for i, picture in enumerate(train.sample(G.eval(), count)):
            size, drawn = pixels(files[i])
            assert size == (64, 64)
            assert drawn == picture.permute(1, 2, 0).numpy().tobytes()
    assert len({path.read_bytes() for path in files}) == 70


def test_sampling_uses_the_running_statistics_and_leaves_the_generator_as_it_was(trained):
    G = trained[1].train()
    before = {name: value.clone() for name, value in G.state_dict().items()}
    pictures = train.sample(G, 2, 7)
    assert G.training and all(torch.equal(value, before[name]) for name, value in G.state_dict().items())
    noise = torch.randn(64, 13, 1, 1, generator=torch.Generator().manual_seed(7))
    alone = ((G.eval()(noise[:1]) + 1) * 127.5).round().detach()
    assert (pictures[0] - alone[0]).abs().max() <= 1
