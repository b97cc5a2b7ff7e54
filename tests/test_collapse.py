"""The script that looks for the cause of the collapse: its commands, its probe, and a run from folder to figure."""

import csv
import math
import os
import shutil
import signal
import sys
from types import SimpleNamespace

import collapse
import pytest
import torch
from conftest import ROOT, wait_for
from test_updates import SIDE, Linear

import train


@pytest.mark.parametrize("full, batch_size, prefix", [(True, 512, "full_"), (False, 128, "")])
def test_every_run_is_a_command_of_train_sh_and_type2_takes_the_reports_step(full, batch_size, prefix):
    settings = {}
    for name, words in collapse.commands(full).items():
        given = vars(train.command_line().parse_args(["faces", *words.split()])).items()
        changed = {key: value for key, value in given if value is not None and hasattr(train.RECIPES[1], key)}
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


SMALLER = """
import sys
sys.path.insert(0, "tests")
import collapse
usual, more = collapse.commands, {"double_rate": "--width 8 --epochs 4", "type2": "--width 8"}
collapse.commands = lambda full: {name: f"{words} {more.get(name, '')}" for name, words in usual(full).items()}
if __name__ == "__main__":
    sys.exit(collapse.main())
"""


def test_from_the_folder_to_the_table_and_the_figure_with_ctrl_c_in_the_second_of_three_runs(
    faces, tmp_path, begin, monkeypatch, capsys
):
    few, house = tmp_path / "few", tmp_path / "house"
    few.mkdir()
    for path in sorted(faces.iterdir())[:8]:
        shutil.copy(path, few)
    (house / "tests").mkdir(parents=True)
    for name in ("train.py", "tests/collapse.py"):
        shutil.copy(ROOT / name, house / name)
    (house / "smaller.py").write_text(SMALLER)

    words = [sys.executable, "-u", "smaller.py", few, "--runs", "double_rate", "type2", "half_rate"]
    process = begin(*words, cwd=house)
    for words in ("Starting at update 0 of 18 in type2", "epoch 3,"):
        wait_for(process, words)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err, err
    assert "Stopped and saved at update" in out
    assert sorted(path.parent.name for path in house.glob("runs/collapse/*/config.json")) == ["double_rate", "type2"]
    assert not (house / "Net_G.param").exists(), "the one that is shipped stays"

    figures = house / "Figures"
    rows = list(csv.DictReader((figures / "collapse.csv").open()))
    whole, cut = ([row for row in rows if row["run"] == name] for name in ("double_rate", "type2"))
    assert [int(row["updates"]) for row in whole] == [1, 2, 3, 4] and not whole[-1]["error"]
    assert all(0 < float(row["penalty_share"]) < 1 and float(row["mixed_slope"]) > 0 for row in whole)
    assert 3 <= len(cut) < 18 and cut[-1]["error"] == "cut off here"
    best = min(whole, key=lambda row: float(row["distance"]))
    table = out[out.index("| run |") :]
    assert f"| double rate | {float(best['distance']):.1f}, {best['updates']} |" in table
    assert "| cut off here |" in table
    for name in ("collapse/double_rate.png", "collapse/type2.png", "type2_epochs.jpg", "collapse.jpg"):
        assert (figures / name).stat().st_size > 1000
    (figures / "collapse.jpg").unlink()
    monkeypatch.setattr(collapse, "ROOT", house)
    monkeypatch.setattr(collapse, "RUNS", house / "runs" / "collapse")
    monkeypatch.setattr(sys, "argv", ["collapse.py", str(few), "--runs"])
    capsys.readouterr()
    assert collapse.main() == 0
    assert capsys.readouterr().out == table and (figures / "collapse.jpg").exists(), "drawn anew from what is kept"
