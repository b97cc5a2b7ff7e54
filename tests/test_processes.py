"""Several processes, as torchrun starts them: together they do what one does with the whole batch."""

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ENVIRONMENT, ROOT, SMALL, checkpoint, do, wait_for

import train

UPDATES = """
import os, sys, torch, train
from dataclasses import replace

folder, out = sys.argv[1:]
torch.set_num_threads(1)
if train.WORLD_SIZE > 1:
    torch.distributed.init_process_group()
images, cpu, found = train.load_images(folder), torch.device("cpu"), {}
recipes = {**train.RECIPES, "dcgan": replace(train.RECIPES[3], networks="dcgan")}
for gan_type, recipe in recipes.items():
    lr = min(recipe.lr, 0.0005)  # at a higher one rounding grows a hundredfold with each update
    gan = train.GAN(replace(recipe, width=8, latent_dim=8, batch_size=16, lr=lr, mirror=0.5), 0, cpu)
    found[gan_type] = [torch.cat([p.detach().flatten() for n in (gan.G, gan.D) for p in n.state_dict().values()])]
    for real in (batches := train.real_batches(images, 16, 0, 0, cpu)):
        gan.step += 1
        losses = gan.update(real, gan.step % recipe.d_steps == 0)
        if gan.step == 5:
            break
    found[gan_type] += [torch.cat([p.detach().flatten() for n in (gan.G, gan.D) for p in n.state_dict().values()])]
    found[gan_type] += [torch.cat([loss.flatten() for loss in losses])]
torch.save(found, f"{out}{train.RANK}")
os._exit(0)  # as train.py ends
"""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
# Of how far the weights moved. Adam makes much of a gradient of nearly nothing, and type 1's rate is high. Type 3 has a
# layer of many pixels: a few lie so near the kink of a ReLU that rounding decides. "dcgan": type 3 without that layer.
TOLERANCE = {1: 0.03, 2: 1e-5, 3: 0.02, "dcgan": 1e-4, 4: 1e-2}


@pytest.fixture(scope="module")
def updated(faces, tmp_path_factory):
    """Of each type the weights before and after 5 updates, and the last losses: one process, and both of two."""
    folder = tmp_path_factory.mktemp("updates")
    (folder / "updates.py").write_text(UPDATES)
    for start, name in ([sys.executable], "one"), (TORCHRUN, "two"):
        words = [*start, "updates.py", faces, name]
        environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        subprocess.run(words, cwd=folder, env=environment, capture_output=True, check=True, timeout=200)
    return [torch.load(folder / name) for name in ("one0", "two0", "two1")]


@pytest.mark.parametrize("gan_type", TOLERANCE)
def test_two_processes_do_what_one_does(updated, gan_type):
    (before, one, losses), (_, first, first_losses), (_, second, second_losses) = (run[gan_type] for run in updated)
    assert torch.equal(first, second) and torch.equal(first_losses, second_losses)
    moved, apart = (one - before).norm(), (one - first).norm()
    assert 0 < apart < TOLERANCE[gan_type] * moved
    torch.testing.assert_close(losses, first_losses, rtol=0.01, atol=0.001)


def two(*words):
    """NPROC=2 bash train.sh ... -> what subprocess.run() returns."""
    words = ["bash", str(ROOT / "train.sh"), *map(str, words)]
    return subprocess.run(words, env={**ENVIRONMENT, "NPROC": "2"}, capture_output=True, text=True, timeout=200)


def test_any_number_of_processes_carries_a_run_on_and_one_of_them_writes(faces):
    more = ["--networks", "dcgan", "--lr", 0.0005]  # rounding grows faster in the others
    command = [faces, 3, *SMALL, "--batch_size", 16, "--precision", "fp32", "--sample_every", 1, *more]
    for name in ("11", "12", "21"):
        for epochs, count in enumerate(name, 1):
            words = [*command, "--out", name, "--epochs", epochs]
            if count == "1":
                assert do(*words) == 0
            else:
                assert (found := two(*words)).returncode == 0, found.stderr
    one, *others = (checkpoint(name)["gan"]["G"]["4.weight"] for name in ("11", "12", "21"))
    for other in others:
        assert 0 < (one - other).norm() < 0.03 * one.norm()
    rows = [[*csv.DictReader(open(Path(name, "losses.csv")))] for name in ("11", "12", "21")]
    for row in zip(*rows):
        assert len({tuple(r[key] for key in ("epoch", "updates", "floor")) for r in row}) == 1
        assert [float(r["d_loss"]) for r in row] == pytest.approx([float(row[0]["d_loss"])] * 3, rel=0.01)
    assert {path.name for path in Path("12").iterdir()} == {path.name for path in Path("11").iterdir()}


def test_what_processes_cannot_share_evenly_is_refused(faces, monkeypatch):
    monkeypatch.setattr(train, "WORLD_SIZE", 2)
    monkeypatch.setattr(train, "agree", lambda *flags: flags)  # this process is alone
    with pytest.raises(train.UserError, match="--batch_size 9: cannot be shared by 2 processes; 8 can"):
        train.train(faces, 3, batch_size=9)
    with pytest.raises(train.UserError, match="--gp_share: 3 pictures cannot be shared by 2 processes; --gp_share 1"):
        train.train(faces, 3, batch_size=10)
    with pytest.raises(train.UserError, match="NPROC=2: more processes than pictures"):
        train.check_shares(train.RECIPES[3], 1, 1)
    for fits in {"batch_size": 16}, {"batch_size": 10, "gp_share": 1}:
        train.check_shares(train.replace(train.RECIPES[3], **fits), fits["batch_size"], 120)


def test_processes_that_cannot_meet_say_so_a_killed_one_ends_all_and_a_signal_saves(faces, begin):
    environment = {**ENVIRONMENT, "NPROC": "2", "GLOO_SOCKET_IFNAME": "nope"}
    words = ["bash", ROOT / "train.sh", faces, "3"]
    found = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=200)
    assert found.returncode == 2 and "Traceback" not in found.stderr, found.stderr
    assert "the processes cannot reach each other: " in found.stderr and "nope" in found.stderr
    command = [faces, 3, *SMALL, "--out", "run", "--epochs", 2000, "--precision", "fp32"]
    process = begin("env", "NPROC=2", "bash", ROOT / "train.sh", *command)
    wait_for(process, "epoch 1,")
    children = subprocess.run(["ps", "-eo", "pid,args", "ww"], capture_output=True, text=True).stdout.splitlines()
    workers = [int(line.split()[0]) for line in children if f"{faces} 3" in line and "distributed" not in line]
    os.kill(max(workers), signal.SIGKILL)
    err = process.communicate(timeout=60)[1]
    assert process.returncode and "Signal 9 (SIGKILL)" in err
    process = begin("env", "NPROC=2", "bash", ROOT / "train.sh", *command)
    wait_for(process, "Carrying on at update")
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in err, err
    assert "Stopped and saved at update" in out
