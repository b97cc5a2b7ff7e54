"""The measures against sets whose rank or value is known, and what a run does with them."""

import csv
import math
import re
from pathlib import Path

import faces
import pytest
import torch
from conftest import ROOT, SMALL, checkpoint, do, draw, pictures, rows, sampler
from torchvision.transforms.functional import pil_to_tensor

import train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def drawn():
    """300 drawn faces, as uint8 [300, 3, 64, 64]."""
    return torch.stack([pil_to_tensor(faces.draw_face(9, i, 64)) for i in range(300)])


def test_noise_to_look_at_is_never_noise_to_train_on():
    seeds = train.SAMPLE_SEED, train.NORM_SEED, 0, 1, 2, train.MAX_SEED
    noise = [train.draw_noise(64, 8, torch.Generator().manual_seed(seed)) for seed in seeds]
    sets = [set(vectors[:, 0, 0, 0].tolist()) for vectors in noise]
    assert sum(map(len, sets)) == len(set().union(*sets))


def test_the_average_is_fitted_in_float32():
    gan = train.GAN(train.replace(train.RECIPES[3], width=4, latent_dim=8), 0, CPU, torch.bfloat16)
    seen = []
    gan.G_ema[1].conv.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    gan.fit_G_ema()
    assert set(seen) == {torch.float32} and gan.G.precision == torch.bfloat16


def test_mean_distance_by_hand():
    pictures = torch.zeros(3, 3, 64, 64, dtype=torch.uint8)
    pictures[1], pictures[2] = 3, 4
    side = math.sqrt(3 * 64 * 64)  # apart by 3, 4 and 1 in every number
    assert train.mean_distance(pictures) == pytest.approx(side * (3 + 4 + 1) / 3, rel=1e-3)


def test_diversity_ranks_sets_as_it_must(drawn):
    reference = train.real_reference(drawn, CPU, "cache")
    draw, other = (drawn[index] for index in train.shuffled(300, 0, 0).split(150))
    sets = {"itself": draw, "other": other, "alike": other[:1].expand_as(other), "pale": other // 2 + 64}
    found = {name: train.quality(pictures, reference)["diversity"] for name, pictures in sets.items()}
    assert found["itself"] == pytest.approx(1) and found["other"] == pytest.approx(1, abs=0.1)
    assert found["alike"] == 0
    assert found["pale"] == pytest.approx(found["other"] / 2, rel=0.02)
    for copies in drawn[:6, None].expand(-1, 60, -1, -1, -1):  # rounding told only some of them from nothing
        assert train.mean_distance(copies) == 0
        assert train.quality(copies, train.real_reference(copies, CPU, "cache"))["diversity"] == 1.0


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_smallest_folders_can_be_measured(drawn, count):
    found = train.quality(drawn[:64], train.real_reference(drawn[:count], CPU, "cache"))
    assert found["diversity"] == 1, "one picture has none, which is no collapse"
    assert all(math.isfinite(value) and value >= 0 for value in found.values())


def row(updates, kid=100.0, diversity=0.8, **more):
    usual = {"real_logits": 1.0, "fake_logits": -1.0, "g_loss": 1.0}
    measured = {name: value for name, value in (("kid", kid), ("diversity", diversity)) if value is not None}
    return {"updates": updates, **measured, **usual, **more}


certain = {"real_logits": 9.0, "fake_logits": -9.0}


@pytest.mark.parametrize(
    "rows, loss, sign",
    [
        ([row(100), row(200, 199.0, 0.26)], "bce", None),
        ([row(100), row(200, 201.0)], "bce", "KID x 1000 is 201"),
        ([row(100, 400.0), row(150, 120.0), row(200, 239.0), row(250, 241.0)], "wasserstein", "KID x 1000 is 241"),
        ([row(100, 5.0), row(200, 99.0)], "bce", None),  # below what is chance
        ([row(100, 5.0), row(200, 101.0)], "bce", "KID x 1000 is 101"),
        ([row(100, -3.0), row(200, None)], "bce", None),
        ([row(100), row(200, diversity=0.24)], "bce", "diversity 0.24"),
        ([row(351, diversity=0.29), row(585, diversity=0.248)], "wasserstein", None),  # seen: a slow start, still pale
        ([row(4900, diversity=0.1), row(5000, diversity=0.1)], "bce", "diversity 0.10"),
        ([row(100), row(200, g_loss=2.0, **certain)], "bce", "G's loss grows"),
        ([row(100), row(200, g_loss=0.9, **certain)], "bce", None),
        ([row(100), {k: v for k, v in row(200, **certain).items() if k != "g_loss"}], "bce", None),
        ([row(100), {"updates": 150, **certain}, row(200, g_loss=2.0, **certain)], "bce", "G's loss grows"),
        ([row(100), row(200, g_loss=2.0, **certain)], "wasserstein", None),  # a critic's values have no bounds
        ([row(100, None, None), row(200, None, None)], "bce", None),
    ],
)
def test_signs_of_a_collapse(rows, loss, sign):
    found = train.sign_of_collapse(rows, loss)
    assert found is None if sign is None else sign in found


def test_the_sign_of_a_collapse_comes_as_it_should_in_the_runs_that_were_kept():
    """A run that never starts is told early, a pale start and what README calls whole never."""
    signs, runs = {}, {}
    for row in csv.DictReader((ROOT / "Figures" / "collapse.csv").open()):
        numbers = {column: float(value) for column, value in row.items() if value and column not in ("run", "error")}
        runs.setdefault(row["run"], []).append(numbers)
    last = runs["usual_start"][-1]
    runs["usual_start"] += [{**last, "updates": last["updates"] + 117 * i} for i in range(1, 6)]
    for name, table in runs.items():
        loss = "wasserstein" if name == "type3" else "bce"
        signed = (table[i]["updates"] for i in range(len(table)) if train.sign_of_collapse(table[: i + 1], loss))
        signs[name] = next(signed, None)
    assert signs["usual_start"] <= 1300 and signs["full_type2"] == 4408
    for name in ("full_type1", "half_rate", "adam", "adam_half_rate", "type1", "type2", "type3"):
        assert signs[name] is None, name


def test_measures_do_not_disturb_the_training(faces):
    command = [faces, 1, *SMALL, "--epochs", 4]  # of type 1 the generator that is drawn is the one that trains
    for name, every in (("often", 1), ("seldom", 3)):
        assert do(*command, "--out", name, "--sample_every", every) == 0
    often, seldom = map(checkpoint, ("often", "seldom"))
    for part in ("G", "D"):
        assert all(torch.equal(value, seldom["gan"][part][name]) for name, value in often["gan"][part].items())
    assert torch.equal(often["gan"]["rng"], seldom["gan"]["rng"])
    many, few = often["records"]["rows"], seldom["records"]["rows"]
    assert [row["updates"] for row in many] == [15, 30, 45, 60] and [row["updates"] for row in few] == [45, 60]
    assert many[-1]["diversity"] == few[-1]["diversity"]


def test_a_long_epoch_has_several_rows_and_grids_and_is_saved_every_two_minutes(clock, monkeypatch):
    monkeypatch.setattr(train, "PICTURES", 60)
    names = "d_loss", "gradient_penalty", "real_logits", "fake_logits", "g_loss"
    losses, saves, save = dict.fromkeys(names, torch.ones(())), [], train.Records.save
    monkeypatch.setattr(train.GAN, "update", lambda *_, **__: clock.append(clock.pop() + 1) or losses)
    monkeypatch.setattr(train.Records, "save", lambda records, gan, last: saves.append(gan.step) or save(records, gan))
    pictures("many", 600)
    assert do("many", 1, *SMALL[:4], "--batch_size", 1, "--epochs", 1) == 0
    assert saves == [121, 242, 300, 421, 542, 600]
    table = rows("runs/many-1")
    assert [(row["epoch"], row["updates"]) for row in table] == [("0.5", "300"), ("1.0", "600")]
    assert all(row["diversity"] for row in table)
    grids = sorted(path.name for path in Path("runs/many-1/samples").iterdir())
    assert grids == ["update_0000300.png", "update_0000600.png"]


def test_a_collapse_is_told_once_and_can_end_the_run(faces, capsys):
    command = [faces, 2, *SMALL, "--optimizer", "adam", "--lr", 0.5, "--gp_weight", 0, "--epochs", 8]
    command += ["--out", "run", "--sample_every", 1]
    assert do(*command, "--stop_on_collapse") == 0
    out, err = capsys.readouterr()
    said = [line for line in err.splitlines() if "collapse" in line]
    state = checkpoint()
    step, (*_, row) = state["gan"]["step"], state["records"]["rows"]
    assert 15 < step < 120 and step == row["updates"], "at the row that shows it"
    assert state["records"]["collapse"].startswith(f"at update {step}, ")
    assert len(said) == 1 and f"at update {step}, " in said[0] and "--lr" in said[0]
    assert f" at update {step} of 120" in out and "the same command carries on" not in out
    for _ in range(2):
        assert do(*command, "--stop_on_collapse") == 0
        out = capsys.readouterr().out
        assert f"at update {step}, " in out and "--stop_on_collapse" in out and "Total params" not in out
        assert "the same command carries on" not in out and checkpoint()["gan"]["step"] == step
    assert do(*command) == 0
    err = capsys.readouterr().err
    assert checkpoint()["gan"]["step"] == 120
    assert "looks like" not in err, "warned of once in a run, however often it is cut"


def test_the_average_of_the_generators_weights_is_what_is_saved(faces, capsys):
    command = [faces, 3, *SMALL, "--lr", 0.01, "--epochs", 2, "--d_steps", 2]
    for name, average in (("plain", 0), ("averaged", 100)):
        assert do(*command, "--ema", average, "--out", name) == 0
    plain, averaged = map(checkpoint, ("plain", "averaged"))
    parameters = dict(train.generator(8, 4, networks="fine").named_parameters())
    for name in parameters:
        assert torch.equal(plain["gan"]["G"][name], averaged["gan"]["G"][name]), "it must not disturb the training"
    saved = train.load("averaged/Net_G.param")["weights"]
    assert all(torch.equal(saved[name], averaged["gan"]["G_ema"][name]) for name in saved)
    assert not any(torch.equal(saved[name], averaged["gan"]["G"][name]) for name in parameters)
    G = sampler.load_generator("averaged/Net_G.param")
    with torch.no_grad():
        x = G[0].conv(torch.randn(2048, 8, 1, 1))
    assert (G[0].norm.running_mean.abs() < 0.1 * x.std((0, 2, 3))).all(), "its batch norms fit its weights"
    assert (G[0].norm.running_var / x.var((0, 2, 3)) - 1).abs().max() < 0.3
    (*_, row) = averaged["records"]["rows"]
    assert draw("averaged/Net_G.param", "--compare", faces, "--out", "new.png") == 0
    told = float(re.search(r"\ndiversity ([\d.]+)", capsys.readouterr().out)[1])
    assert told == pytest.approx(row["diversity"], abs=0.1), "of more pictures"
    assert torch.equal(train.load("plain/Net_G.param")["weights"]["0.conv.weight"], plain["gan"]["G"]["0.conv.weight"])


@pytest.mark.parametrize("half_life, decays", [(240, (0.5**0.5, 0.5**0.5)), (10**6, (0.25, 0.5))])
def test_two_steps_of_the_average_by_hand(faces, monkeypatch, half_life, decays):
    monkeypatch.setattr(train, "EMA_RAMP", 0.5 if half_life > 240 else 9)  # of 120 pictures, then of 240
    recipe = train.replace(train.RECIPES[3], ema=half_life, width=4, latent_dim=8, batch_size=120)
    start = train.GAN(recipe, 0, CPU).G.state_dict()
    wanted = {name: value.clone() for name, value in start.items()}
    for epochs, decay in zip((1, 2), decays):  # of one update
        more = ["--ema", half_life, "--batch_size", 120, "--epochs", epochs, "--precision", "fp32"]
        assert do(faces, 3, *SMALL[:4], *more) == 0
        state = checkpoint("runs/faces-3")["gan"]
        for name, _ in train.generator(8, 4, networks="fine").named_parameters():
            wanted[name] = decay * wanted[name] + (1 - decay) * state["G"][name]
            torch.testing.assert_close(state["G_ema"][name], wanted[name])
            assert not torch.equal(wanted[name], state["G"][name])
