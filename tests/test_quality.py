"""The measures against sets whose rank or value is known, and what a run does with them."""

import csv
import math
from pathlib import Path

import eyes
import faces
import pytest
import torch
from conftest import SMALL, checkpoint, do, draw, sampler
from torchvision.transforms.functional import pil_to_tensor

import train


@pytest.fixture(scope="module")
def drawn():
    """300 drawn faces, as uint8 [300, 3, 64, 64]."""
    return torch.stack([pil_to_tensor(faces.draw_face(9, i, 64)) for i in range(300)])


def test_pyramid_of_a_plain_and_of_a_ruled_picture():
    plain = torch.full((1, 3, 64, 64), 200.0)
    fine, middle, coarse = train.laplacian_pyramid(plain)
    assert [level.shape[-1] for level in (fine, middle, coarse)] == [64, 32, 16]
    torch.testing.assert_close(coarse, torch.full_like(coarse, 200))
    assert fine.abs().max() < 1e-3 and middle.abs().max() < 1e-3
    ruled = plain.clone()
    ruled[..., ::2] = 100  # lines one pixel wide are nothing but fine detail around their mean
    fine, middle, coarse = train.laplacian_pyramid(ruled)
    torch.testing.assert_close(fine, ruled - 150)
    assert middle.abs().max() < 1e-3 and (coarse - 150).abs().max() < 1e-3


def test_patches_of_a_level_have_mean_zero_and_variance_one_along_every_direction():
    patches = train.projected_patches(torch.randint(0, 256, (64, 3, 64, 64), dtype=torch.uint8))
    assert patches.shape == (3, train.DIRECTIONS, 64 * train.PATCHES)
    assert torch.equal(patches, patches.sort(dim=2).values)
    assert patches.mean(2).abs().max() < 0.1
    assert 0.5 < patches[2].var(1).min() and patches[0].var(1).max() < 2  # neighbouring pixels correlate
    assert patches.var(2).mean().item() == pytest.approx(1, abs=0.05)


def test_a_plain_surface_is_no_noise():
    plain = torch.full((8, 3, 64, 64), 200, dtype=torch.uint8)
    plain[:, :, ::2, ::2] += torch.randint(0, 2, (8, 3, 32, 32), dtype=torch.uint8)  # 1 in the coarse level
    coarse = train.projected_patches(plain)[2]
    assert 0.1 < coarse.std() < 0.7, "scaled up without a limit it would be 1"


def test_sliced_wasserstein_of_a_set_shifted_by_a_constant_is_that_constant():
    one = torch.randn(3, train.DIRECTIONS, 500).sort(dim=2).values
    assert train.sliced_wasserstein(one, one + 0.25) == pytest.approx(250, rel=1e-4)
    assert train.sliced_wasserstein(one, one) == 0


def test_noise_to_look_at_is_never_noise_to_train_on():
    seeds = train.SAMPLE_SEED, train.NORM_SEED, 0, 1, 2, train.MAX_SEED
    noise = [train.draw_noise(64, 8, torch.Generator().manual_seed(seed)) for seed in seeds]
    sets = [set(vectors[:, 0, 0, 0].tolist()) for vectors in noise]
    assert sum(map(len, sets)) == len(set().union(*sets))


def test_the_average_is_fitted_in_float32():
    gan = train.GAN(train.replace(train.RECIPES[3], width=4, latent_dim=8), 0, torch.device("cpu"), torch.bfloat16)
    seen = []
    gan.G_ema[1].conv.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    gan.fit_G_ema()
    assert set(seen) == {torch.float32} and gan.G.precision == torch.bfloat16


def test_mean_distance_by_hand():
    pictures = torch.zeros(3, 3, 64, 64, dtype=torch.uint8)
    pictures[1], pictures[2] = 3, 4
    side = math.sqrt(3 * 64 * 64)  # apart by 3, 4 and 1 in every number
    assert train.mean_distance(pictures) == pytest.approx(side * (3 + 4 + 1) / 3, rel=1e-3)


def test_distance_and_diversity_rank_sets_as_they_must(drawn):
    reference = train.real_reference(drawn, torch.device("cpu"))
    floor, count = reference.floor, 150
    draw, other = (drawn[index] for index in train.shuffled(300, 0, 0).split(count))
    noise = torch.Generator().manual_seed(0)

    def measured(pictures):
        found = train.quality(pictures.round().clamp(0, 255).to(torch.uint8), reference)
        assert found["floor"] == floor
        return found["distance"], found["diversity"]

    blurred = torch.nn.functional.avg_pool2d(other.float(), 5, 1, 2)
    sets = {
        "itself": draw.float(),
        "other": other.float(),
        "noisy": other + 20 * torch.randn(other.shape, generator=noise),
        "blurred": blurred,
        "noise": 255 * torch.rand(other.shape, generator=noise),
        "alike": other[:1].expand_as(other).float(),
        "pale": (other.float() - 128) / 2 + 128,
    }
    distance, diversity = zip(*map(measured, sets.values()))
    distance, diversity = dict(zip(sets, distance)), dict(zip(sets, diversity))
    assert distance["itself"] == 0 and distance["other"] == floor
    assert 5 < floor < 30
    assert 1.5 * floor < min(distance["noisy"], distance["blurred"])
    assert max(distance["noisy"], distance["blurred"]) < distance["noise"]
    assert distance["alike"] > 2 * floor
    assert diversity["itself"] == pytest.approx(1) and diversity["other"] == pytest.approx(1, abs=0.1)
    assert diversity["alike"] < 0.01
    assert diversity["pale"] == pytest.approx(diversity["other"] / 2, rel=0.02)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_smallest_folders_can_be_measured(drawn, count):
    reference = train.real_reference(drawn[:count], torch.device("cpu"))
    found = train.quality(drawn[:64], reference)
    assert found["diversity"] == 1, "one picture has none, which is no collapse"
    assert all(math.isfinite(value) and value >= 0 for value in found.values())


def row(updates, distance=20.0, diversity=0.8, **more):
    usual = {"real_logits": 1.0, "fake_logits": -1.0, "g_loss": 1.0, "floor": 10.0}
    measured = {} if distance is None else {"distance": distance, "diversity": diversity}
    return {"updates": updates, **measured, **usual, **more}


certain = {"real_logits": 9.0, "fake_logits": -9.0}


@pytest.mark.parametrize(
    "rows, loss, sign",
    [
        ([row(100), row(200)], "bce", None),
        ([row(100), row(200, 39.9, 0.26)], "bce", None),
        ([row(100), row(200, 40.1)], "bce", "distance 40.1"),
        ([row(100, 12.0), row(150, 25.0), row(200, 25.0)], "wasserstein", "distance 25.0"),
        ([row(100, 5.0), row(200, 19.9)], "bce", None),  # what is below the floor is chance
        ([row(100), row(200, diversity=0.24)], "bce", "diversity 0.24"),
        ([row(351, diversity=0.29), row(585, diversity=0.248)], "wasserstein", None),  # seen: a slow start, still pale
        ([row(4900, diversity=0.1), row(5000, diversity=0.1)], "bce", "diversity 0.10"),
        ([row(100), row(200, g_loss=2.0, **certain)], "bce", "G's loss grows"),
        ([row(100), row(200, None, None, g_loss=2.0, **certain)], "bce", "G's loss grows"),
        ([row(100), row(200, g_loss=0.9, **certain)], "bce", None),
        ([row(100), row(150, g_loss=math.nan), row(200, g_loss=2.0, **certain)], "bce", "G's loss grows"),
        ([row(100), row(200, g_loss=2.0, **certain)], "wasserstein", None),  # a critic's values have no bounds
        ([row(100, None, None), row(200, None, None)], "bce", None),
    ],
)
def test_signs_of_a_collapse(rows, loss, sign):
    found = train.sign_of_collapse(rows, loss)
    assert found is None if sign is None else sign in found


def weights(path):
    return train.load(path)["weights"]


def test_measures_do_not_disturb_the_training(faces):
    command = [faces, 1, *SMALL, "--ema", 100, "--epochs", 4]
    for name, every in (("often", 1), ("seldom", 3)):
        assert do(*command, "--out", name, "--sample_every", every) == 0
    often, seldom = map(checkpoint, ("often", "seldom"))
    for part in ("G", "D"):
        assert all(torch.equal(value, seldom["gan"][part][name]) for name, value in often["gan"][part].items())
    assert torch.equal(often["gan"]["rng"], seldom["gan"]["rng"])
    rows, few = often["records"]["rows"], seldom["records"]["rows"]
    assert [row["updates"] for row in rows] == [15, 30, 45, 60] and [row["updates"] for row in few] == [45, 60]
    assert rows[-1]["distance"] == few[-1]["distance"]


def test_a_long_epoch_has_several_rows_and_grids(faces, monkeypatch):
    monkeypatch.setattr(train, "PICTURES", 60)
    monkeypatch.setattr(train.GAN, "update", lambda *_, **__: [torch.ones(4), torch.ones(())])
    Path("many").mkdir()
    for i, path in enumerate(5 * sorted(faces.iterdir())):
        Path("many", f"{i:04}.png").hardlink_to(path)
    assert do("many", 1, *SMALL[:4], "--batch_size", 1, "--epochs", 1) == 0
    rows = list(csv.DictReader(open("runs/many-1/losses.csv")))
    assert [(row["epoch"], row["updates"]) for row in rows] == [("0.5", "300"), ("1", "600")]
    assert all(row["distance"] for row in rows)
    grids = sorted(path.name for path in Path("runs/many-1/samples").iterdir())
    assert grids == ["epoch_000_00300.png", "epoch_001.png"]


COLLAPSING = ["--optimizer", "adam", "--lr", 0.5, "--gp_weight", 0, "--epochs", 8]


def test_a_collapse_is_told_once_and_can_end_the_run(faces, capsys):
    command = [faces, 2, *SMALL, *COLLAPSING, "--out", "stopped", "--sample_every", 1]
    assert do(*command, "--stop_on_collapse") == 0
    out, err = capsys.readouterr()
    assert "Finished" not in out and " of 120: it collapsed at epoch " in out
    assert err.count("This looks like a collapse: at epoch ") == 1 and "Try type 3 or" in err
    state = checkpoint("stopped")
    step, (*_, row) = state["gan"]["step"], state["records"]["rows"]
    assert 15 < step < 120 and step == row["updates"]
    assert state["records"]["collapse"].startswith(f"at epoch {row['epoch']}, ")
    assert do(*command, "--stop_on_collapse") == 0
    out = capsys.readouterr().out
    assert "has collapsed: at epoch" in out and "Total params" not in out
    assert do(*command) == 0
    out, err = capsys.readouterr()
    assert "A collapse was seen at epoch" in out and "Finished" in out
    assert "looks like a collapse" not in err, "warned of once in a run, however often it is cut"


def test_the_average_of_the_generators_weights_is_what_is_saved(faces, capsys):
    command = [faces, 3, *SMALL, "--lr", 0.01, "--epochs", 2, "--d_steps", 2]
    for name, average in (("plain", 0), ("averaged", 100)):
        assert do(*command, "--ema", average, "--out", name) == 0
    plain, averaged = map(checkpoint, ("plain", "averaged"))
    parameters = dict(train.generator(8, 4, networks="fine").named_parameters())
    for name in parameters:
        assert torch.equal(plain["gan"]["G"][name], averaged["gan"]["G"][name]), "it must not disturb the training"
    saved = weights("averaged/Net_G.param")
    assert all(torch.equal(saved[name], averaged["gan"]["G_ema"][name]) for name in saved)
    assert not any(torch.equal(saved[name], averaged["gan"]["G"][name]) for name in parameters)
    (*_, row) = averaged["records"]["rows"]
    assert draw("averaged/Net_G.param", "--compare", faces, "--out", "new.png") == 0
    told = "distance {distance:.1f} (floor {floor:.1f}), diversity {diversity:.2f}\n".format(**row)
    assert told in capsys.readouterr().out
    assert torch.equal(weights("plain/Net_G.param")["0.conv.weight"], plain["gan"]["G"]["0.conv.weight"])


@pytest.mark.parametrize("half_life, decays", [(240, (0.5**0.5, 0.5**0.5)), (10**6, (0.25, 0.5))])
def test_two_steps_of_the_average_by_hand(faces, monkeypatch, half_life, decays):
    monkeypatch.setattr(train, "EMA_RAMP", 0.5 if half_life > 240 else 9)  # of 120 pictures, then of 240
    recipe = train.replace(train.RECIPES[3], ema=half_life, width=4, latent_dim=8, batch_size=120)
    start = train.GAN(recipe, 0, torch.device("cpu")).G.state_dict()
    wanted = {name: value.clone() for name, value in start.items()}
    for epochs, decay in zip((1, 2), decays):  # of one update
        more = ["--ema", half_life, "--batch_size", 120, "--epochs", epochs, "--precision", "fp32"]
        assert do(faces, 3, *SMALL[:4], *more) == 0
        state = checkpoint("runs/faces-3")["gan"]
        for name, _ in train.generator(8, 4, networks="fine").named_parameters():
            wanted[name] = decay * wanted[name] + (1 - decay) * state["G"][name]
            torch.testing.assert_close(state["G_ema"][name], wanted[name])
            assert not torch.equal(wanted[name], state["G"][name])


def test_the_batch_norms_of_the_average_fit_its_weights(faces):
    assert do(faces, 3, *SMALL, "--lr", 0.01, "--epochs", 2, "--ema", 100) == 0
    G = sampler.load_generator("Net_G.param")
    with torch.no_grad():
        x = G[0].conv(torch.randn(2048, 8, 1, 1))
    assert (G[0].norm.running_mean.abs() < 0.1 * x.std((0, 2, 3))).all()
    assert (G[0].norm.running_var / x.var((0, 2, 3)) - 1).abs().max() < 0.3


def test_two_eyes_of_unlike_colour_are_told_from_two_of_one(monkeypatch):
    drawn = [faces.draw_face(0, i) for i in range(100)]
    monkeypatch.setattr(faces, "IRISES", faces.IRISES[4:] + faces.IRISES[:4])
    recoloured = [picture.copy() for picture in drawn]
    for i, picture in enumerate(recoloured):
        half = picture.width // 2
        picture.paste(faces.draw_face(0, i).crop((half, 0, 2 * half, 2 * half)), (half, 0))
    shares = [eyes.unlike(torch.stack([pil_to_tensor(one.resize((64, 64))) for one in made])).mean()
              for made in (drawn, recoloured)]  # fmt: skip
    assert shares[0] < 0.1 and shares[1] > 0.6
