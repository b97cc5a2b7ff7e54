"""Processes: several that share a batch, as torchrun starts them; signals, streams and the shell."""

import io
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import COMMAND, ENVIRONMENT, ROOT, SMALL, TRAIN, checkpoint, do, draw, pictures, rows, run, step
from conftest import wait_for
from PIL import Image

import train

UPDATES = """
import os, sys, torch, train
from dataclasses import replace

folder, out = sys.argv[1:]
torch.set_num_threads(1)
if train.WORLD_SIZE > 1:
    torch.distributed.init_process_group()
images, cpu, found = train.load_images(folder)[0], torch.device("cpu"), {}
recipes = {**train.RECIPES, "dcgan": replace(train.RECIPES[3], networks="dcgan")}
for gan_type, recipe in recipes.items():
    lr = min(recipe.lr, 0.0001)  # at a higher one rounding grows a hundredfold with each update
    gan = train.GAN(replace(recipe, width=8, latent_dim=8, batch_size=16, lr=lr, mirror=0.5), 0, cpu)
    found[gan_type] = [torch.cat([p.detach().flatten() for n in (gan.G, gan.D) for p in n.state_dict().values()])]
    for real in (batches := train.real_batches(images, 16, 0, 0, cpu)):
        gan.step += 1
        losses = gan.update(real, gan.step % recipe.d_steps == 0)
        if gan.step == 5:
            break
    found[gan_type] += [torch.cat([p.detach().flatten() for n in (gan.G, gan.D) for p in n.state_dict().values()])]
    found[gan_type] += [torch.stack([*losses.values()])]
torch.save(found, f"{out}{train.RANK}")
os._exit(0)  # as train.py ends
"""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
# Of how far the weights moved. Adam makes much of a gradient of nearly nothing. Type 3 has a
# layer of many pixels: a few lie so near the kink of a ReLU that rounding decides. "dcgan": without that layer.
TOLERANCE = {1: 1e-4, 2: 1e-5, 3: 0.002, "dcgan": 1e-3, 4: 1e-4}


def test_two_processes_do_what_one_does(faces):
    """Of each type the weights before and after 5 updates, and the last losses: one process, and both of two."""
    Path("updates.py").write_text(UPDATES)
    for start, name in ([sys.executable], "one"), (TORCHRUN, "two"):
        words = [*start, "updates.py", faces, name]
        subprocess.run(words, env=ENVIRONMENT, capture_output=True, check=True, timeout=200)
    updated = [torch.load(name) for name in ("one0", "two0", "two1")]
    for gan_type, tolerance in TOLERANCE.items():
        (before, one, losses), (_, first, first_losses), (_, second, second_losses) = (run[gan_type] for run in updated)
        assert torch.equal(first, second) and torch.equal(first_losses, second_losses)
        moved, apart = (one - before).norm(), (one - first).norm()
        assert 0 < apart < tolerance * moved, gan_type
        torch.testing.assert_close(losses, first_losses, rtol=0.01, atol=0.001)


def test_any_number_of_processes_carries_a_run_on_and_one_of_them_writes(faces, tmp_path, monkeypatch):
    monkeypatch.setitem(ENVIRONMENT, "NPROC", "2")
    more = ["--networks", "dcgan", "--lr", 0.0005]  # rounding grows faster in the others
    command = [faces, 3, *SMALL, "--batch_size", 16, "--precision", "fp32", "--sample_every", 1, *more]
    for name in ("11", "12", "21"):
        for epochs, count in enumerate(name, 1):
            words = [*command, "--out", name, "--epochs", epochs]
            if count == "1":
                assert do(*words) == 0
            else:
                status, _, err = run("train.sh", *words, cwd=tmp_path)
                assert status == 0, err
    one, *others = (checkpoint(name)["gan"]["G"]["4.weight"] for name in ("11", "12", "21"))
    for other in others:
        assert 0 < (one - other).norm() < 0.03 * one.norm()
    for row in zip(*map(rows, ("11", "12", "21"))):
        assert len({tuple(r[key] for key in ("epoch", "updates")) for r in row}) == 1
        assert [float(r["d_loss"]) for r in row] == pytest.approx([float(row[0]["d_loss"])] * 3, rel=0.01)
    assert {path.name for path in Path("12").iterdir()} == {path.name for path in Path("11").iterdir()}


def test_what_processes_cannot_share_is_refused(faces, monkeypatch):
    monkeypatch.setattr(train, "WORLD_SIZE", 2)
    monkeypatch.setattr(train, "agree", lambda *flags: flags)  # this process is alone
    for given, named in [({"batch_size": 9}, "--batch_size 9"), ({"batch_size": 10}, "--gp_share 0.25")]:
        with pytest.raises(train.UserError, match=named):
            train.train(faces, 3, **given)
    with pytest.raises(train.UserError, match="1 pictures"):
        train.check_shares(train.RECIPES[3], 1)
    for fits in {"batch_size": 16}, {"batch_size": 10, "gp_share": 1}:
        train.check_shares(train.replace(train.RECIPES[3], **fits), fits["batch_size"])
    monkeypatch.setattr(train.dist, "broadcast_object_list", lambda found, **_: found.__setitem__(1, "rank 0's"))
    with pytest.raises(train.UserError, match="different pictures"):
        train.load_checkpoint(Path("none"), "others")


# Where the name of the machine cannot be resolved, as in a container; if one may give it such a name here.
NAMELESS = ["unshare", "-u", "bash", "-c", 'hostname nobody-knows-this-name && exec "$0" "$@"']
if not shutil.which("unshare") or subprocess.run([*NAMELESS, "true"], capture_output=True).returncode:
    NAMELESS = []


def test_processes_that_cannot_meet_say_so_a_killed_one_ends_all_and_a_signal_saves(faces, begin):
    process = begin("env", "NPROC=2", "GLOO_SOCKET_IFNAME=nope", "bash", ROOT / "train.sh", faces, 3)
    err = process.communicate(timeout=200)[1]
    assert process.returncode == 2 and "Traceback" not in err, err
    command = [faces, 3, *SMALL, "--out", "run", "--epochs", 2000, "--precision", "fp32"]
    process = begin(*NAMELESS, "env", "NPROC=2", "bash", ROOT / "train.sh", *command)
    wait_for(process, "epoch 1.0,")
    children = subprocess.run(["ps", "-eo", "pid,args", "ww"], capture_output=True, text=True).stdout.splitlines()
    workers = [int(line.split()[0]) for line in children if f"{faces} 3" in line and "distributed" not in line]
    os.kill(max(workers), signal.SIGKILL)
    err = process.communicate(timeout=60)[1]
    assert process.returncode and "Signal 9 (SIGKILL)" in err
    process = begin("env", "NPROC=2", "bash", ROOT / "train.sh", *command)
    wait_for(process, "Carrying on at update")
    process.send_signal(signal.SIGUSR1)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGUSR1 and "Traceback" not in err, err
    assert f" at update {step():,} of 30,000" in out


# -------------------------------------------------------------------------------------------------------- signals


SLOW = """
import os, sys, time
import train
updates, slowed = 0, []
def slow_if(now):
    if now and not slowed:
        slowed.append(print("now", flush=True))
        time.sleep(30)
def update(*args, usual=train.GAN.update, **more):
    global updates
    updates += 1
    slow_if(sys.argv[1] == "update" and updates == 3)
    return usual(*args, **more)
def fsync(file, usual=os.fsync):
    slow_if(sys.argv[1] == "save" and updates == 4)
    return usual(file)
train.GAN.update, os.fsync, train.save_curves = update, fsync, lambda *_: None
sys.exit(train.run_program(train.main, "train.sh", sys.argv[2:]))
"""


def test_the_first_ctrl_c_says_what_it_waits_for_and_the_second_stops_at_once(begin):
    started = {}
    for where in ("update", "save"):
        pictures(f"{where}/f")
        words = sys.executable, "-c", SLOW, where, *COMMAND, 1000, "--sample_every", 1
        started[where] = begin(*words, cwd=where)
    for where, process in started.items():
        wait_for(process, "now")
        process.send_signal(signal.SIGINT)
        said = process.stderr.readline()
        assert "update" in said and "save" in said
        time.sleep(0.3)  # as a hand does
        asked = time.monotonic()
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=60)[1]
        assert time.monotonic() - asked < 10 and process.returncode not in (0, 1, 2), err
        assert "Traceback" not in err and step(f"{where}/run") == 2


def test_ctrl_c_saves_also_where_nobody_reads_what_it_says_as_tee_that_ended_by_it(f, begin):
    process = begin(*TRAIN, 10**5)
    wait_for(process, " at update ")
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    out = process.stdout.read()
    assert process.wait(timeout=60) == 128 + signal.SIGINT and f" at update {step():,} of" in out


def test_a_run_that_ignores_sighup_outlives_its_terminal(f, begin):
    fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")
    terminal, end = os.openpty()

    def ignores():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        fcntl.ioctl(end, termios.TIOCSCTTY, 0)

    process = begin(*TRAIN, 20, "--sample_every", 20, stdin=end, stdout=end, stderr=end, preexec_fn=ignores)
    os.close(end)
    shown = b""
    while b" at update " not in shown:
        shown += os.read(terminal, 1000)
    process.send_signal(signal.SIGHUP)
    os.close(terminal)
    assert process.wait(timeout=60) == 0 and step() == train.load("Net_G.param")["updates"] == 40


def test_the_demo_ends_at_ctrl_c_or_a_full_disk_without_a_traceback(begin):
    draws = [sys.executable, ROOT / "tests/faces.py", "demo", "--size", 64]
    process = begin(*draws)
    until = time.monotonic() + 60
    while not Path("demo/face_00003.png").exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20) == ("", "") and process.returncode == -signal.SIGINT
    shutil.rmtree("demo")
    Path("demo/face_00000.part").mkdir(parents=True)  # it cannot be written
    process = begin(*draws, "--count", 1)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and "face_00000.part" in err and err.count("\n") == 1


# -------------------------------------------------------------------------------------------- streams, shell, threads


NOTEBOOK = "module://matplotlib_inline.backend_inline", "figure.dpi: many\nlines.linewidth:\nno colon\n"
NONSENSE = "nonsense", "text.usetex: True\n"


@pytest.mark.parametrize("closed", [{">&-": NOTEBOOK, "2>&-": NONSENSE},
                                    {">&- 2>&- <&-": NONSENSE, "| head -n 1": NOTEBOOK}])  # fmt: skip
def test_no_closed_stream_no_reader_that_leaves_and_no_plotting_setup_stops_a_run(closed, begin, monkeypatch):
    started = {}
    for place, (how, (backend, settings)) in enumerate(closed.items()):
        pictures(f"{place}/f")
        Path(f"{place}/matplotlibrc").write_text(settings)
        monkeypatch.setitem(ENVIRONMENT, "MPLBACKEND", backend)
        command = f'set -o pipefail; "$0" "$@" {how}'
        started[f"{place}/run"] = begin("bash", "-c", command, *TRAIN, 1, cwd=f"{place}")
    for out, process in started.items():
        err = process.communicate(timeout=60)[1]
        assert process.returncode == 0 and "Traceback" not in err and "Broken pipe" not in err, err
        assert step(out) == 2 and len(rows(out)) == 1 and draw(f"{out}/Net_G.param") == 0
        for name in ("losses.png", "samples/update_0000002.png"):
            with Image.open(Path(out, name)) as picture:
                picture.load()


def test_output_that_does_not_block_and_is_read_late_is_not_lost_for_good(f, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    ours, theirs = os.pipe()
    fcntl.fcntl(theirs, 1031, 4096)  # F_SETPIPE_SZ
    os.set_blocking(theirs, False), os.set_blocking(ours, False)
    got = []

    def measure(gan, images):
        if gan.step > 6:  # until then nobody reads
            with suppress(BlockingIOError):
                while True:
                    got.append(os.read(ours, 10**5))
        return {}

    with open(theirs, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert do(*COMMAND, 10, "--sample_every", 1, program=partial(train.main, measure=measure)) == 0
    os.set_blocking(ours, True)
    while data := os.read(ours, 10**5):
        got.append(data)
    said = b"".join(got).decode()
    assert all(f"updates {updates}," in said for updates in range(12, 21, 2)) and step() == 20


def test_run_of_a_notebook_whose_streams_are_no_files_and_in_a_thread(f, monkeypatch):
    said, interrupt = io.StringIO(), signal.getsignal(signal.SIGINT)
    for which in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, which, said)
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, COMMAND), "1"])
    assert train.run_program(train.main, "train.sh") == 0
    found = []
    thread = threading.Thread(target=lambda: found.append(do(*COMMAND, 2)))
    thread.start(), thread.join()
    assert found == [0] and step() == 4 and signal.getsignal(signal.SIGINT) == interrupt
    assert "at update 2 of 2" in said.getvalue() and "at update 4 of 4" in said.getvalue()


def test_train_sh_runs_in_sh_through_a_link_and_beside_modules_of_the_users_own(begin):
    Path("link").symlink_to(ROOT / "train.sh")
    for name in ("random", "logging", "copy", "torch"):
        Path(f"{name}.py").write_text("raise SystemExit('this is mine')")
    commands = ["sh", ROOT / "train.sh"], ["bash", "link"], ["env", "NPROC=2", "bash", "link", "--help"]
    one, other, two = (begin(*words, "missing", 3) for words in commands)
    for process in (one, other):
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err.count("\n")) == (2, "", 1) and "missing: " in err
    out, err = two.communicate(timeout=60)
    assert two.returncode == 0 and "WGAN-GP" in out, err
