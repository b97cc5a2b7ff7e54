"""The script that looks for the cause of the collapse: its commands, its probe, and a run from folder to figure."""

import csv
import math
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import collapse
import pytest
import texture
import torch
from test_updates import SIDE, Linear

import train


@pytest.mark.parametrize("full, batch_size, prefix", [(True, 512, "full_"), (False, 128, "")])
def test_every_run_is_a_command_of_train_sh_and_type2_takes_the_reports_step(full, batch_size, prefix):
    settings = {}
    for name, words in collapse.commands(full).items():
        given = vars(train.command_line().parse_args(["faces", *words.split()]))
        changed = {key: value for key, value in given.items() if hasattr(train.RECIPES[1], key)}
        settings[name.removeprefix(prefix)] = train.replace(train.RECIPES[int(words[0])], **changed)
    base = settings["type2"]
    assert base.batch_size == batch_size
    assert base.lr * batch_size == pytest.approx(0.001 * 512)  # a step through the summed loss
    assert base.lr * base.gp_weight == pytest.approx(0.001 * 10)  # and through the averaged penalty
    critic = settings["critic_loss"]  # a logit of 0 has the slope 1/4 in the halved BCE, a sum; 1/batch in the mean
    assert critic.lr / batch_size == pytest.approx(base.lr / 4)
    assert critic.lr * critic.gp_weight == pytest.approx(base.lr * base.gp_weight, rel=0.01)


def test_the_probe_by_hand():
    a, batch, gp_weight = 2 * SIDE, 4, 10.0
    G = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Upsample(scale_factor=64))  # one colour a picture
    D, recipe = Linear(a), train.replace(train.RECIPES[2], gp_weight=gp_weight, latent_dim=3)
    images = torch.full((batch, 3, 64, 64), 128, dtype=torch.uint8)  # all but grey
    found = collapse.probe(SimpleNamespace(G=G, D=D, rng=torch.Generator(), recipe=recipe), images)
    assert [found[f"{kind}_slope"] for kind in ("real", "fake", "mixed")] == pytest.approx([2, 2, 2], rel=1e-4)
    assert G[0].running_mean.abs().max() == 0 and G[0].num_batches_tracked == 0
    fake = train.draw_noise(batch, 3, torch.Generator().manual_seed(0))
    fake = ((fake - fake.mean((0, 2, 3), keepdim=True)) / fake.std((0, 2, 3), keepdim=True, correction=0)).mean(1)
    sigmoid = torch.sigmoid(a * fake.flatten())
    real = 128 / 127.5 - 1
    loss_slope = (sigmoid * fake.flatten()).sum().item() / 2 - batch * real / (1 + math.exp(a * real)) / 2
    penalty_slope = gp_weight * 2 * (2 - 1) / SIDE
    wanted = penalty_slope / (penalty_slope + abs(loss_slope))
    assert found["penalty_share"] == pytest.approx(wanted, rel=1e-2) and 0.1 < wanted < 0.9
    assert D.a.grad is None and D.a.item() == pytest.approx(a), "a look must not move what it looks at"


@pytest.mark.parametrize(
    "distances, wanted",
    [([50, 40, 79, 41], None), ([50, 40, 81, 90], 300), ([50, 40, 81, 41, 90, 200], 500), ([50], None)],
)
def test_broken_from_is_where_the_last_stretch_over_twice_the_best_begins(distances, wanted):
    rows = [{"updates": str(100 * i), "distance": str(distance)} for i, distance in enumerate(distances, 1)]
    assert collapse.broken_from(rows) == wanted


def test_from_the_folder_to_the_table_and_the_figure_also_of_a_run_that_was_cut_off(
    faces, tmp_path, monkeypatch, capsys
):
    few, runs, figures = (tmp_path / name for name in ("few", "runs", "Figures"))
    few.mkdir()
    for path in sorted(faces.iterdir())[:8]:
        shutil.copy(path, few)
    monkeypatch.setattr(collapse, "RUNS", runs)
    monkeypatch.setattr(collapse, "ProcessPoolExecutor", ThreadPoolExecutor)
    words = ["collapse.py", str(few), "--figures", str(figures), "--more", "--width 8 --epochs 4", "--runs"]
    monkeypatch.setattr(sys, "argv", [*words, "double_rate", "type2"])
    assert collapse.main() == 0
    assert not [*tmp_path.glob("Net_G*")], "the one that lies there stays"
    shutil.copytree(runs / "type2", runs / "half_rate")
    monkeypatch.setattr(sys, "argv", words)  # no run: the table and the figure of what is kept
    capsys.readouterr()
    assert collapse.main() == 0
    rows = list(csv.DictReader((figures / "collapse.csv").open()))
    whole, cut = ([row for row in rows if row["run"] == name] for name in ("double_rate", "half_rate"))
    for name, table in ("", whole), ("cut off here", cut):
        assert [float(row["updates"]) for row in table] == [1, 2, 3, 4] and table[-1]["error"] == name
        assert all(0 < float(row["penalty_share"]) < 1 and float(row["mixed_slope"]) > 0 for row in table)
    best = min(whole, key=lambda row: float(row["distance"]))
    said = capsys.readouterr().out
    assert f"| double rate | {float(best['distance']):.1f}, {float(best['updates']):.0f} |" in said
    assert "| cut off here |" in said
    for name in ("collapse/double_rate.png", "collapse/half_rate.png", "type2_epochs.jpg", "collapse.jpg"):
        assert (figures / name).stat().st_size > 1000


def test_pyramid_of_a_plain_and_of_a_ruled_picture():
    ruled = torch.full((1, 3, 64, 64), 200.0)
    ruled[..., ::2] = 100  # lines one pixel wide are nothing but fine detail around their mean
    for picture, mean in (torch.full((1, 3, 64, 64), 200.0), 200), (ruled, 150):
        fine, middle, coarse = texture.laplacian_pyramid(picture)
        assert [level.shape[-1] for level in (fine, middle, coarse)] == [64, 32, 16]
        torch.testing.assert_close(fine, picture - mean)
        assert middle.abs().max() < 1e-3 and (coarse - mean).abs().max() < 1e-3


def test_sliced_wasserstein_of_a_set_shifted_by_a_constant_is_that_constant():
    one = torch.randn(3, texture.DIRECTIONS, 500).sort(dim=2).values
    assert texture.sliced_wasserstein(one, one + 0.25) == pytest.approx(250, rel=1e-4)
    assert texture.sliced_wasserstein(one, one) == 0
