"""What happens to people who train: situations from public bug reports of such programs, and what is right in each."""

import csv
import errno
import fcntl
import io
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
import zlib
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, ROOT, SMALL, checkpoint, do, draw, refused, wait_for
from PIL import Image

import train

COMMAND = ["f", 3, *SMALL, "--out", "run", "--epochs"]  # 2 updates in an epoch of the 16 pictures in f
TRAIN = ["bash", ROOT / "train.sh", *COMMAND]


@pytest.fixture(autouse=True)
def sixteen_pictures(in_a_folder_of_its_own):
    pictures("f")


def pictures(folder, count=16, green=50):
    """Plain pictures, each of a colour of its own."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", (8, 8), (i % 256, green, i // 256)).save(Path(folder, f"{i:03}.png"))


def step(out="run"):
    """The update of a checkpoint that can be read."""
    return checkpoint(out)["gan"]["step"]


def rows(out="run"):
    """Those of losses.csv."""
    return [*csv.DictReader(Path(out, "losses.csv").read_text().splitlines())]


def save_generator(path, **more):
    train.save({"latent_dim": 8, "width": 4, "weights": train.generator(8, 4).state_dict(), **more}, Path(path))


def count_updates(monkeypatch):
    """A list that grows by one with every update."""
    done, update = [], train.GAN.update
    monkeypatch.setattr(train.GAN, "update", lambda *args, **more: done.append(0) or update(*args, **more))
    return done


def replacing_fails(monkeypatch, number, when):
    """os.replace raises this error for paths of which when(path) is true."""
    replace = os.replace

    def fails(part, path):
        if when(Path(path)):
            raise OSError(number, os.strerror(number))
        replace(part, path)

    monkeypatch.setattr(os, "replace", fails)


# ----------------------------------------------------------------------------------------- what a run leaves


@pytest.mark.parametrize("path", ["run/losses.csv", "run/losses.png", "run/samples"])
def test_a_file_that_cannot_be_written_is_one_warning_and_no_end(path, capsys):
    folder = Path(path) if path != "run/samples" else Path("run")  # a folder where a file should be, or the reverse
    folder.mkdir(parents=True)
    (folder / "samples").touch()
    assert do(*COMMAND, 2, "--sample_every", 1 if folder.name != "run" else 2) == 0
    warned = [line for line in capsys.readouterr().err.splitlines() if "cannot write" in line]
    assert len(warned) == 1 and path in warned[0]
    assert step() == 4


def test_what_could_not_be_written_at_first_is_made_up_for(monkeypatch):
    updates = count_updates(monkeypatch)
    hindered = ".png", "best.param"
    replacing_fails(monkeypatch, errno.EACCES, lambda path: len(updates) < 3 and path.name.endswith(hindered))
    worse = partial(train.main, measure=lambda gan, *_: {"distance": gan.step, "floor": 9.0, "diversity": 1.0})
    assert do(*COMMAND, 2, "--sample_every", 1, program=worse) == 0
    assert train.load("run/Net_G_best.param")["updates"] == 2
    assert Path("run/losses.png").exists() and Path("run/samples/epoch_002.png").exists()


def test_the_checkpoint_is_written_before_all_else(monkeypatch):
    updates, order = count_updates(monkeypatch), {}
    replacing_fails(monkeypatch, 0, lambda path: order.setdefault(len(updates), []).append(path.name))
    assert do(*COMMAND, 2, "--sample_every", 1) == 0
    assert order[2][0] == order[4][0] == "checkpoint.pt"
    assert {"losses.csv", "losses.png", "Net_G.param", "epoch_002.png"} <= {*order[4]}


def test_another_run_keeps_the_net_g_that_lies_there_and_the_same_run_leaves_no_copies(capsys):
    save_generator("Net_G.param", gan_type=2, updates="7")  # of another program: no number
    for out, kept in [("a", "Net_G_type2_7.param"), ("b", "Net_G_a_2.param")]:
        before = Path("Net_G.param").read_bytes()
        assert do("f", 3, *SMALL, "--epochs", 1, "--out", out) == 0
        assert sum(kept in line for line in "".join(capsys.readouterr()).splitlines()) == 1
        assert Path(kept).read_bytes() == before != Path("Net_G.param").read_bytes()
    assert do("f", 3, *SMALL, "--epochs", 2, "--out", "b") == 0
    assert do("f", 3, *SMALL, "--epochs", 1, "--out", "b", "--restart") == 0
    kept = {"Net_G_type2_7.param", "Net_G_a_2.param"}
    assert {path.name for path in Path().glob("Net_G_*")} == kept
    shutil.copytree("b", "c")  # a branch of it
    assert do("f", 3, *SMALL, "--epochs", 3, "--out", "c") == 0
    assert {path.name for path in Path().glob("Net_G_*")} == {*kept, "Net_G_b_2.param"}


def test_a_moved_project_knows_its_own_net_g(tmp_path, monkeypatch, capsys):
    assert do(*COMMAND, 1) == 0
    tmp_path.rename(tmp_path.with_name("moved"))  # as a notebook that lies elsewhere in its next session
    monkeypatch.chdir(tmp_path.with_name("moved"))
    assert do(*COMMAND, 2) == 0
    assert train.load("Net_G.param")["updates"] == 4 and not [*Path().glob("Net_G_*")]
    assert "another run" not in capsys.readouterr().err


def test_a_generator_whose_run_folder_was_deleted_is_kept():
    assert do(*COMMAND, 2) == 0
    trained = Path("Net_G.param").read_bytes()
    shutil.rmtree("run")
    assert do(*COMMAND, 1) == do(*COMMAND, 3) == 0
    assert [path.read_bytes() for path in Path().glob("Net_G_*")] == [trained]


def test_a_run_without_its_checkpoint_is_not_written_over(capsys):
    assert do(*COMMAND, 2) == 0
    trained, table = Path("Net_G.param").read_bytes(), Path("run/losses.csv").read_bytes()
    Path("run/checkpoint.pt").unlink()
    assert "run: holds Net_G.param, but no checkpoint.pt" in refused(capsys, *COMMAND, 1)
    assert do(*COMMAND, 1, "--restart") == 0
    (moved,) = Path().glob("run_before_*")
    assert (Path(moved, "Net_G.param").read_bytes(), Path(moved, "losses.csv").read_bytes()) == (trained, table)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_holds_a_run_and_nobody_is_locked_out(number, monkeypatch):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    Path("run").mkdir()
    Path("run/.lock").write_text("1\nelsewhere\n")  # what a killed training on another machine may have left
    assert do(*COMMAND, 1) == 0


def test_the_command_that_draws_can_be_pasted_and_home_is_found(monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(Path().resolve()))
    for ending in ("draw: ", "Draw: "):  # of a run that ends, of one that is finished
        assert do("f", 3, *SMALL, "--out=~/my run", "--epochs", 1) == 0
        bash, test, path = shlex.split(capsys.readouterr().out.split(ending)[1])
        assert (bash, test) == ("bash", "test.sh") and train.load(path)["updates"] == 2
    assert not Path("~").exists()


def test_a_picture_that_cannot_be_drawn_does_not_change_the_training(monkeypatch, capsys):
    """In type 1 the generator that is drawn is the one that trains."""
    def forward(tanh, x):
        if not tanh.training:
            raise torch.OutOfMemoryError("for a moment")
        return x.tanh()

    weights = []
    for out in ("whole", "failing"):
        assert do("f", 1, *SMALL, "--out", out, "--epochs", 2, "--sample_every", 1) == 0
        weights.append(checkpoint(out)["gan"]["G"])
        monkeypatch.setattr(train.nn.Tanh, "forward", forward)
    assert "the measure failed" in capsys.readouterr().err
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_save_as_leaves_net_g_alone_as_the_demo_does():
    (demo,) = re.findall(r"^.*demo_faces 3 .*$", (ROOT / "train.sh").read_text(), re.MULTILINE)
    assert re.search(r"--save_as (?!Net_G\.param)\S+\.param", demo)
    Path("Net_G.param").write_text("mine")
    assert do(*COMMAND, 1, "--save_as", "demo.param") == 0
    assert Path("Net_G.param").read_text() == "mine" and draw("demo.param") == 0


def test_minutes_end_a_run_with_all_saved_and_the_same_command_carries_on(capsys):
    command = [*COMMAND, 1000, "--minutes", 0.01]
    for _ in range(2):
        assert do(*command) == 0
        out, last = capsys.readouterr().out, step()
        assert "the same command" in out and last < 2000
        assert rows()[-1]["updates"] == str(last)
        assert train.load("Net_G.param")["updates"] == train.load("run/Net_G.param")["updates"] == last
        epoch, rest = divmod(last, 2)
        assert Path("run/samples", f"epoch_{epoch:03}{'_00001' if rest else ''}.png").exists()
    begun = re.search(r"Carrying on at update ([\d,]+) of 2,000", out)[1]
    assert 0 < int(begun.replace(",", "")) < last


@pytest.mark.parametrize("seconds", [1, 3600])
def test_a_run_of_over_two_hours_says_so_and_what_helps(seconds, monkeypatch, capsys):
    clock, update = [0.0], train.GAN.update

    def slow(*args, **more):
        clock[0] += seconds
        return update(*args, **more)

    monkeypatch.setattr(train.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(train.GAN, "update", slow)
    assert do(*COMMAND, 3) == 0
    said = [line for line in "".join(capsys.readouterr()).splitlines() if re.search(r"\bhours\b", line)]
    assert len(said) == (seconds == 3600)
    assert all(remedy in line for line in said for remedy in ("--minutes", "--epochs", "--width"))


@pytest.mark.parametrize(
    "gan_type, more, names_it",
    [(1, [], True), (2, SMALL[4:], True), (2, [*SMALL[4:], "--lr", 0.01], False), (3, [], False)],
)
def test_a_batch_smaller_than_the_recipes_is_told_and_names_lr_where_the_loss_is_a_sum(
    gan_type, more, names_it, capsys
):
    assert do("f", gan_type, *SMALL[:4], *more, "--epochs", 2) == 0
    out, wanted = capsys.readouterr().out, train.RECIPES[gan_type].batch_size
    small = "Batches of 8, 2 in" if more else f"Batches of 16 (the folder has fewer than {wanted} pictures), 1 in"
    assert f"{small} an epoch" in out and step(f"runs/f-{gan_type}") == (4 if more else 2)
    assert ("--lr" in out) == names_it


def test_a_run_that_never_starts_is_told_early_and_a_pale_start_is_not():
    signs, runs = {}, {}
    for row in csv.DictReader((ROOT / "Figures" / "collapse.csv").open()):
        numbers = {column: float(value) for column, value in row.items() if value and column not in ("run", "error")}
        runs.setdefault(row["run"], []).append(numbers)
    last = runs["usual_start"][-1]
    runs["usual_start"] += [{**last, "updates": last["updates"] + 117 * i} for i in range(1, 6)]
    for name, rows in runs.items():
        loss = "wasserstein" if name == "type3" else "bce"
        signed = (rows[i]["updates"] for i in range(len(rows)) if train.sign_of_collapse(rows[: i + 1], loss))
        signs[name] = next(signed, float("inf"))
    assert max(signs["usual_start"], signs["G_three_times"]) <= 1300
    for name in ("half_rate", "adam", "adam_half_rate", "type1", "type2", "type3", "full_width"):
        assert signs[name] > 1500, name


# ------------------------------------------------------------------------------------------- which pictures


def test_other_pictures_are_not_taken_for_those_of_the_run_but_a_copy_is(capsys):
    pictures("cats/train")
    pictures("dogs/train", green=200)
    for i in range(7):  # of 16
        shutil.copy(f"cats/train/00{i}.png", f"dogs/train/cat{i}.png")
    assert do("cats/train", 3, *SMALL, "--epochs", 1) == 0
    kept = Path("runs/train-3/checkpoint.pt").read_bytes()
    said = refused(capsys, "dogs/train", 3, *SMALL, "--epochs", 2)
    assert "dogs/train holds other pictures" in said and "--out" in said and "--restart" in said
    assert Path("runs/train-3/checkpoint.pt").read_bytes() == kept
    shutil.copytree("cats/train", "moved", copy_function=shutil.copy)  # its files have new times
    assert do("moved", 3, *SMALL, "--epochs", 2, "--out", "runs/train-3") == 0
    assert "Carrying on at update 2 of 4" in capsys.readouterr().out


def test_a_run_carries_on_with_a_folder_that_has_changed_and_says_how(capsys):
    pictures("f", 30)
    assert do(*COMMAND, 1) == 0
    Path("f/007.png").unlink()
    for i in range(2):
        Image.new("RGB", (8, 8), (0, 99, i)).save(f"f/new{i}.png")
    assert do(*COMMAND, 2) == 0
    out, err = capsys.readouterr()
    (said,) = (line for line in err.splitlines() if "has changed" in line)
    assert "Carrying on at update 3 of 6" in out and step() == 6
    assert "added" in said and "gone" in said and {"1", "2"} <= {*re.findall(r"\d+", said.partition("has changed")[2])}
    shutil.copytree("f", "others/f")
    Path("others/f/008.png").unlink()
    assert do("others/f", *COMMAND[1:], 3) == 0
    assert "others/f is not as f was, 0 pictures added, 1 gone" in capsys.readouterr().err, "both folders are named"


def test_a_folder_that_has_grown_has_other_epochs_and_its_earlier_grids_are_kept():
    pictures("f", 16)
    assert do(*COMMAND, 2) == 0
    before = {path.name: path.read_bytes() for path in Path("run/samples").iterdir()}
    for i in range(8):
        Image.new("RGB", (8, 8), (0, 99, i)).save(f"f/new{i}.png")
    assert do(*COMMAND, 2) == 0 and step() == 6
    assert {path.name: path.read_bytes() for path in Path("run/samples_until_4").iterdir()} == before
    assert before.keys() == {"epoch_001.png", "epoch_002.png"}
    assert [path.name for path in Path("run/samples").iterdir()] == ["epoch_002.png"]


def test_only_our_own_run_folders_are_left_out_and_that_is_said(capsys):
    Path("f/checkpoint.pt").write_bytes(b"of another program")
    command = ["f", 3, *SMALL, "--out", "f/ours", "--epochs"]
    assert do(*command, 1) == 0
    out, err = capsys.readouterr()
    assert "found 16 images" in out and "left out" not in out + err
    assert do(*command, 2) == 0
    out, err = capsys.readouterr()
    assert "found 16 images" in out
    assert any("left out" in line and "ours" in line for line in (out + err).splitlines())


def test_what_we_drew_into_the_folder_of_pictures_is_never_training_data(monkeypatch, capsys):
    monkeypatch.chdir("f")
    command = [".", 3, *SMALL, "--epochs"]
    assert do(*command, 1) == 0
    assert draw("Net_G.param") == 0 and draw("Net_G.param", "--folder", "drawn", "--count", 3) == 0
    (losses,) = Path("runs").glob("*/losses.png")
    shutil.copy(losses, "copy.png")
    capsys.readouterr()
    assert do(*command, 2) == 0
    out, err = capsys.readouterr()
    assert "found 16 images" in out and "Carrying on at update 2 of 4" in out
    (said,) = (line for line in (out + err).splitlines() if "drawn by this program" in line)
    for name in ("samples.png", "copy.png", "drawn"):
        assert name in said
    monkeypatch.setattr(train, "decoded_files", None)
    assert do(*command, 3) == 0, "the generator that the last run left there must not make the cache stale"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, since only root becomes somebody else, and not back")
def test_what_may_not_be_read_is_named_with_the_systems_reason(tmp_path, monkeypatch):
    train.load_images("f")  # imports what another user may not be able to import
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
                    train.load_images("f")
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        said = Path("said").read_text()
        for folder in ("f/closed", "f/half"):
            os.chmod(folder, 0o755)
        monkeypatch.chdir(tmp_path)
    assert "found 15 images" in said, said
    for name in ("007.png", "closed", "half/000.png"):
        assert re.search(rf"{name}[^,]*Permission denied", said), said


def test_a_name_that_begins_with_a_dash_is_told_the_way_round_it(capsys):
    pictures("-faces")
    Path("-g.param").touch()
    assert "./-faces" in refused(capsys, "-faces", 3)
    assert "./-g.param" in refused(capsys, "-g.param", do=draw)


# -------------------------------------------------------------------------------------------- one training


def test_a_run_that_ignores_sighup_outlives_its_terminal(begin):
    terminal, end = os.openpty()

    def ignores():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        fcntl.ioctl(end, termios.TIOCSCTTY, 0)

    how = {"stdin": end, "stdout": end, "stderr": end, "preexec_fn": ignores}
    process = begin(*TRAIN, 20, "--sample_every", 20, **how)
    os.close(end)
    shown = b""
    while b" at update " not in shown:
        shown += os.read(terminal, 1000)
    process.send_signal(signal.SIGHUP)
    os.close(terminal)
    assert process.wait(timeout=60) == 0 and step() == train.load("Net_G.param")["updates"] == 40


NOTEBOOK = "module://matplotlib_inline.backend_inline", "figure.dpi: many\nlines.linewidth:\nno colon\n"
NONSENSE = "nonsense", "text.usetex: True\n"


@pytest.mark.parametrize(
    "setups", [{">&-": NOTEBOOK, "2>&-": NONSENSE}, {">&- 2>&- <&-": NONSENSE, "| head -n 1": NOTEBOOK}]
)
def test_no_closed_stream_no_reader_that_leaves_and_no_plotting_setup_stops_a_run(setups, begin, monkeypatch):
    started = {}
    for place, (closed, (backend, settings)) in enumerate(setups.items()):
        pictures(f"{place}/f")
        Path(f"{place}/matplotlibrc").write_text(settings)
        monkeypatch.setitem(ENVIRONMENT, "MPLBACKEND", backend)
        started[f"{place}/run"] = begin("bash", "-c", f'"$0" "$@" {closed}', *TRAIN, 1, cwd=f"{place}")
    for out, process in started.items():
        err = process.communicate(timeout=60)[1]
        assert process.returncode == 0 and "Traceback" not in err and "Broken pipe" not in err, err
        assert step(out) == 2 and len(rows(out)) == 1 and draw(f"{out}/Net_G.param") == 0
        for name in ("losses.png", "samples/epoch_001.png"):
            with Image.open(Path(out, name)) as picture:
                picture.load()


TELLS = """
import sys
class Tells:
    def find_spec(self, name, *_):
        if name == "numpy":
            print("importing", flush=True)
sys.meta_path.insert(0, Tells())
"""


def test_ctrl_c_while_it_imports_is_one_line_at_most(begin, monkeypatch):
    Path("site").mkdir()
    Path("site", "sitecustomize.py").write_text(TELLS)
    monkeypatch.setitem(ENVIRONMENT, "PYTHONPATH", str(Path("site").resolve()))
    for delay in (0, 0.1, 0.3, 0.6, 0.9):
        process = begin(sys.executable, ROOT / "train.py", "missing", 3)
        wait_for(process, "importing")
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=60)[1]
        assert process.returncode != 0 and err.count("\n") <= 1 and "Traceback" not in err, (delay, err)


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


def test_ctrl_c_saves_also_where_nobody_reads_what_it_says_as_tee_that_ended_by_it(begin):
    process = begin(*TRAIN, 10**5)
    wait_for(process, " at update ")
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    assert "Stopped and saved at update" in process.stdout.read()
    assert process.wait(timeout=60) == 128 + signal.SIGINT and step() > 0


def test_run_of_a_notebook_whose_streams_are_no_files(monkeypatch, faces):
    said, interrupt = io.StringIO(), signal.getsignal(signal.SIGINT)
    for which in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, which, said)
    words = "train.py", faces, 4, *SMALL, "--batch_size", 60, "--epochs", 2, "--out", "run"
    monkeypatch.setattr(sys, "argv", [*map(str, words)])
    try:
        assert train.run_program(train.main, "train.sh") == 0
    finally:
        signal.signal(signal.SIGINT, interrupt)
    assert "Finished" in said.getvalue()
    assert "G has its first turn at update 5: it needs more --epochs or a smaller --batch_size" in said.getvalue()


def test_on_windows_the_commands_keep_their_line_ends_and_find_the_python_of_the_venv(begin):
    for name in ("train.sh", "test.sh", ".gitattributes"):
        shutil.copy(ROOT / name, ".")
    for words in ("init -q", "config core.autocrlf true", "add .", "checkout-index -a -f"):
        if words == "checkout-index -a -f":
            Path("train.sh").unlink(), Path("test.sh").unlink()
        subprocess.run(["git", *words.split()], check=True, capture_output=True)
    python = Path(".venv/Scripts/python.exe")
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "that of the venv" >&2\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    for name in ("train", "test"):
        assert b"\r" not in Path(f"{name}.sh").read_bytes()
        Path(f"{name}.py").write_text("import sys; print('given', *sys.argv[1:])")
        out, err = begin("bash", f"{name}.sh", "f", 3).communicate(timeout=60)
        assert out == "given f 3\n" and "that of the venv" in err


EMBEDDED = """
import multiprocessing, threading
import torch._dynamo, torchsummary, torchvision.utils, train  # once for both
def go(kind):
    train.train(kind, 3, out=f"{kind}/run", width=4, latent_dim=8, batch_size=64, epochs=1)
if __name__ == "__main__":
    train.PICTURES, train.save_curves = 32, lambda *_: None
    process = multiprocessing.Process(target=go, args=["process"], daemon=True)
    thread = threading.Thread(target=go, args=["thread"])
    for worker in (process, thread):
        worker.start()
    for worker in (process, thread):
        worker.join()
"""


def test_it_trains_in_a_thread_and_in_a_daemonic_process(begin):
    for kind in ("process", "thread"):
        pictures(kind, 420)
    Path("app.py").write_text(EMBEDDED)
    err = begin(sys.executable, "app.py").communicate(timeout=60)[1]
    assert "Traceback" not in err, err
    assert step("process/run") == step("thread/run") == 6


UNGUARDED = """
import multiprocessing
import train
multiprocessing.set_start_method("spawn", force=True)
train.PICTURES, train.save_curves = 32, lambda *_: None
train.train("many", 3, out="run", width=4, latent_dim=8, batch_size=64, epochs=1)
print("trained once")
"""


def test_a_script_without_a_main_guard_trains_once_where_processes_are_spawned(begin):
    pictures("many", 420)
    Path("app.py").write_text(UNGUARDED)
    out, err = begin(sys.executable, "app.py").communicate(timeout=120)
    assert out.count("trained once") == out.count("Starting at update 0") == 1
    assert 'if __name__ == "__main__":' in err and step() == 6


# ---------------------------------------------------------------------------------------- pictures and cache


def chunk(kind, data, wrong=0):
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) ^ wrong)


def png(name, bits, values, before=b"", after=b"", colour=0):
    """Writes a PNG of 64 equal lines; `values` are one line's, of so many bits each."""
    line = int("".join(f"{value:0{bits}b}" for value in values), 2).to_bytes(len(values) * bits // 8, "big")
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 64, bits, colour, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(64 * (b"\0" + line)))
    path = Path("p", name)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + before + data + after + chunk(b"IEND", b""))


def test_text_profile_and_exif_are_no_reason_to_lose_a_png(capsys):
    long, ramp = zlib.compress(b"many words " * 300_000), range(0, 256, 4)
    extras = {
        "ztxt": chunk(b"zTXt", b"Comment\0\0" + long),
        "itxt": chunk(b"iTXt", b"Comment\0\1\0\0\0" + long),
        "crc": chunk(b"tEXt", b"Comment\0words", wrong=1),
        "exif": chunk(b"eXIf", b"rubbish"),
        "method": chunk(b"zTXt", b"Comment\0\5words"),
        "profile": chunk(b"iCCP", b"ICC\0\5words"),
        "short": chunk(b"pHYs", b"12"),
        "icc": chunk(b"iCCP", b"ICC\0\0" + long),
    }
    png("plain.png", 8, ramp)
    for name, extra in extras.items():
        png(f"{name}_before.png", 8, ramp, before=extra)
        if name != "icc":
            png(f"{name}_after.png", 8, ramp, after=extra)
    images = train.load_images("p")
    assert "found 16 images, skipped none" in capsys.readouterr().out
    assert (images == torch.arange(0, 256, 4)).all()


def exif(*entry, tail=b""):
    """EXIF that says orientation 6, a quarter turn clockwise, and one more entry: tag, type, count, offset."""
    entries = sorted([(0x0112, 3, 1, 6), entry])  # 38 bytes up to the tail
    words = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + words + bytes(4) + tail


def test_a_file_of_zeros_that_begins_as_a_png_is_skipped_at_once(capsys):
    Path("f/huge.png").write_bytes(Path("f/000.png").read_bytes()[:33])  # as a download that was cut off leaves it
    os.truncate("f/huge.png", 2**33)
    assert len(train.load_images("f")) == 16
    assert "skipped 1: huge.png" in capsys.readouterr().out


def test_a_jpeg_with_broken_exif_is_turned_as_its_orientation_says(capsys):
    picture = Image.new("RGB", (64, 64), "black")
    picture.paste("white", (0, 0, 64, 32))
    broken = {
        "bad_offset": exif(0x011A, 5, 1, 0xFFFFFFF0),
        "bad_pointer": exif(0x8769, 6, 1, 0xFFFFFFF0),
        "count_0": exif(0x011A, 5, 0, 38),
        "count_many": exif(0x011A, 5, 0x10000000, 38, tail=bytes(8)),
        "no_denominator": exif(0x011A, 5, 1, 38, tail=struct.pack("<I", 72)),
        "no_number": exif(0x011A, 11, 1, 0xFFFFFFF0),  # the bits of a NaN
        "number_for_text": exif(0x010F, 5, 1, 38, tail=struct.pack("<II", 72, 1)),
        "text_for_number": exif(0x011A, 2, 1, 0),
        "too_large": exif(0x0128, 4, 1, 0xFFFFFFF0),
        "nothing": exif(0x0128, 3, 1, 2),
        "rubbish": b"Exif\0\0rubbish",
        "rubbish_ifd": b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(range(200)),
    }
    Path("p").mkdir()
    for name, data in broken.items():
        picture.save(f"p/{name}.jpg", exif=data)
    images = train.load_images("p").float().mean(1)
    assert "found 12 images, skipped none" in capsys.readouterr().out
    for name, image in zip(sorted(broken), images):
        image = image if "rubbish" in name else image.rot90()  # back to how it was
        assert image[:30].mean() > 250 and image[34:].mean() < 5, name


@pytest.mark.parametrize(
    "bits, clear, other",
    [(1, [0], [1]), (2, [1], [2]), (4, [5], [6]), (8, [77], [78]), (16, [30000], [30001]),
     (8, [30, 1, 60], [30, 1, 61]), (16, [30000, 1000, 60000], [30000, 1000, 20000])],
)  # fmt: skip
def test_the_clear_colour_of_a_png_is_white_and_no_other_is(bits, clear, other):
    trns = chunk(b"tRNS", struct.pack(f">{len(clear)}H", *clear))
    png("clear.png", bits, 32 * clear + 32 * other, before=trns, colour=0 if len(clear) == 1 else 2)
    (image,) = train.load_images("p")
    assert (image[:, :, :30] == 255).all()
    assert image[:, 0, 50].tolist() == pytest.approx([255 * value / (2**bits - 1) for value in other * 3][:3], abs=1)


def test_floats_are_scaled_and_those_that_are_no_numbers_spoil_one_pixel_and_not_the_picture():
    ramp = np.repeat(np.linspace(-2, 6, 64, dtype=np.float32)[None], 64, 0)
    Path("p").mkdir()
    for name, bad in {"a": {}, "b": {(5, 9): np.nan}, "c": {(5, 9): np.inf, (7, 40): -np.inf}}.items():
        picture = ramp.copy()
        for place, value in bad.items():
            picture[place] = value
        Image.fromarray(picture).save(f"p/{name}.tiff")
    plain, *others = train.load_images("p")
    assert plain[0, 0, 0] == 0 and 120 <= plain[0, 0, 31] <= 130 and plain[0, 0, -1] == 255
    for image, places in zip(others, ([(5, 9)], [(5, 9), (7, 40)])):
        assert {tuple(place) for place in (image != plain).any(0).nonzero().tolist()} <= {*places}


def test_whole_numbers_of_32_bits_are_scaled_and_not_clipped():
    Path("p").mkdir()
    Image.fromarray(np.repeat(np.linspace(0, 10**6, 64, dtype=np.int32)[None], 64, 0)).save("p/ramp.tiff")
    row = train.load_images("p")[0, 0, 9].tolist()
    assert row == pytest.approx(np.linspace(0, 255, 64), abs=2)


def test_copies_of_one_picture_are_as_varied_as_themselves():
    for seed in range(6):  # only some of them were so
        rng = torch.Generator().manual_seed(seed)
        copies = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8, generator=rng).expand(60, -1, -1, -1)
        assert train.mean_distance(copies) == 0
        assert train.quality(copies, train.real_reference(copies, torch.device("cpu")))["diversity"] == 1.0


def raises(error, *_, **__):
    raise error


class NoThread(ProcessPoolExecutor):
    def submit(self, *_, **__):
        raise RuntimeError("can't start new thread")


class Killed(ProcessPoolExecutor):
    def map(self, function, files, chunksize):
        return super().map(partial(killed_at, files[205], function), files, chunksize=chunksize)


def killed_at(last, function, file):
    """As the function, but at this file the process is killed."""
    return os.kill(os.getpid(), signal.SIGKILL) if file == last else function(file)


@pytest.mark.parametrize(
    "pool, reason",
    [
        (partial(raises, OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))), os.strerror(errno.ENOSYS)),
        (partial(raises, PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/dev/shm")), "/dev/shm"),
        (NoThread, "can't start new thread"),
        (Killed, "terminated abruptly"),
    ],
)
def test_without_worker_processes_one_process_decodes_and_says_why(pool, reason, monkeypatch, capsys):
    pictures("many", 420)
    monkeypatch.setattr(train, "ProcessPoolExecutor", pool)
    assert train.load_images("many")[:, 0, 9, 9].tolist() == [i % 256 for i in range(420)]
    out, err = capsys.readouterr()
    assert "found 420 images, skipped none" in out and err.count("\n") == 1 and reason in err


def test_the_cache_lies_where_cache_says_and_a_bad_place_is_named(capsys):
    assert do(*COMMAND, 1, "--cache", "else/where") == 0
    assert draw("Net_G.param", "--compare", "f", "--cache", "else/where") == 0
    assert not Path(".cache").exists() and len([*Path("else/where").glob("*.rgb")]) == 1
    Path("a_file").touch()
    Path(".cache").touch()
    for do_it, words in [(do, [*COMMAND, 2]), (draw, ["Net_G.param", "--compare", "f"])]:
        for place, more in [(".cache", []), ("a_file", ["--cache", "a_file"])]:
            said = refused(capsys, *words, *more, do=do_it)
            assert place in said and "--cache" in said.replace("--cache a_file", "", place == "a_file")
            assert os.strerror(errno.EEXIST) in said or os.strerror(errno.ENOTDIR) in said
            assert "free some space" not in said


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EIO])
def test_free_some_space_is_the_remedy_only_where_space_ran_out(number, monkeypatch, capsys):
    save_generator("g.param")
    replacing_fails(monkeypatch, number, lambda path: True)
    said = refused(capsys, "g.param", do=draw)
    assert "cannot write" in said and "samples.png" in said and os.strerror(number) in said
    assert ("free some space" in said) == (number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))


def test_a_passing_read_error_is_named_and_tried_again_at_the_next_start(monkeypatch, capsys):
    with monkeypatch.context() as patch:
        decode, error = train.decode, OSError(errno.EIO, os.strerror(errno.EIO))
        failing = {"007.png": lambda *_: raises(error)}
        patch.setattr(train, "decode", lambda path, size: failing.get(path.name, decode)(path, size))
        assert len(train.load_images("f")) == 15
    assert re.search(rf"skipped 1: 007.png \([^)]*{os.strerror(errno.EIO)}", capsys.readouterr().out)
    assert len(train.load_images("f")) == 16


def test_a_file_that_is_gone_before_it_is_read_is_skipped_by_name(monkeypatch, capsys):
    list_files = train.list_files

    def list_and_lose(*args):
        files = list_files(*args)
        Path("f/007.png").unlink(missing_ok=True)
        return files

    monkeypatch.setattr(train, "list_files", list_and_lose)
    assert len(train.load_images("f")) == 15
    assert re.search(r"skipped 1: 007.png \([^)]*No such file", capsys.readouterr().out)


# ----------------------------------------------------------------------------------------- odd places


def test_save_as_and_folder_never_write_over_what_is_not_theirs(capsys):
    os.mkfifo("pipe")
    assert do(*COMMAND, 1) == 0
    for place in ("pipe", "f", "run/checkpoint.pt", "run/Net_G_best.param"):
        assert f"--save_as {place}" in refused(capsys, *COMMAND, 2, "--save_as", place)
    assert step() == 2
    before = {path: path.read_bytes() for path in Path("f").iterdir()}
    assert "--folder f: not empty" in refused(capsys, "Net_G.param", "--folder", "f", do=draw)
    assert before == {path: path.read_bytes() for path in Path("f").iterdir()}


def test_no_net_g_of_others_is_lost_however_often_it_is_put_there():
    for number in (1, 2):
        Path("Net_G.param").write_text(f"mine {number}")
        assert do("f", 3, *SMALL, "--epochs", 1, "--out", f"{number}/run") == 0
    kept = sorted(path.read_bytes() for path in Path().glob("Net_G_*"))
    assert kept == [b"mine 1", b"mine 2"], "also where runs have one name"


def test_what_a_kill_kept_from_being_written_is_written_at_the_next_start(monkeypatch):
    updates = count_updates(monkeypatch)
    with monkeypatch.context() as patch:
        replacing_fails(patch, 0, lambda path: len(updates) == 4 and path.name != "checkpoint.pt" and sys.exit(9))
        with pytest.raises(SystemExit):
            do(*COMMAND, 2, "--sample_every", 1)
    assert step() == 4 and train.load("run/Net_G.param")["updates"] == 2
    Path("run/losses.png").unlink()
    for path in Path("run").iterdir():
        os.utime(path)  # a copy has other times
    assert do(*COMMAND, 2, "--sample_every", 1) == 0
    assert train.load("run/Net_G.param")["updates"] == train.load("Net_G.param")["updates"] == 4
    assert len(rows()) == 2 and Path("run/samples/epoch_002.png").exists() and Path("run/losses.png").exists()


SLOW_DECODER = """
import os, sys, time
import train
def decode(path, size):
    print(os.getpid(), flush=True)
    time.sleep(60)
if __name__ == "__main__":
    train.decode = decode
    train.torch.set_num_threads(2)
    train.load_images("many")
"""


def test_processes_that_decode_end_with_the_one_that_began_them(begin):
    pictures("many", 420)
    process = begin(sys.executable, "-c", SLOW_DECODER)
    child = int(process.stdout.readline())
    assert child != process.pid
    process.kill()
    until = time.monotonic() + 20
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split()[2]:
        assert time.monotonic() < until, "it goes on for ever"
        time.sleep(0.1)


def test_train_sh_runs_in_sh_through_a_link_and_beside_modules_of_the_users_own(begin):
    Path("link").symlink_to(ROOT / "train.sh")
    for name in ("random", "logging", "copy", "torch"):
        Path(f"{name}.py").write_text("raise SystemExit('this is mine')")
    commands = ["sh", ROOT / "train.sh"], ["bash", "link"], ["env", "NPROC=2", "bash", "link", "--help"]
    one, other, two = (begin(*words, "missing", 3) for words in commands)
    for process in (one, other):
        said = "train.sh: missing: no such folder; name a folder of pictures\n"
        assert process.communicate(timeout=60) == ("", said) and process.returncode == 2
    assert "WGAN-GP" in two.communicate(timeout=60)[0] and two.returncode == 0


def test_links_to_a_place_with_room_are_written_through():
    Path("drive").mkdir()
    Path("Net_G.param").symlink_to("drive/mine.param")
    Path("run").mkdir()
    Path("run/checkpoint.pt").symlink_to(Path("drive/state.pt").absolute())
    for epochs in (1, 2):
        assert do(*COMMAND, epochs) == 0
        assert train.load("drive/mine.param")["updates"] == train.load("drive/state.pt")["gan"]["step"] == 2 * epochs
    assert Path("Net_G.param").is_symlink() and Path("run/checkpoint.pt").is_symlink()


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


def test_restart_does_not_move_the_folder_in_which_it_works(capsys):
    assert do(*COMMAND[:-3], "--out", ".", "--epochs", 1) == 2  # it holds f
    capsys.readouterr()
    pictures("../apart")
    assert do("../apart", 3, *SMALL, "--out", ".", "--epochs", 1) == 0
    assert "--restart" in refused(capsys, "../apart", 3, *SMALL, "--out", ".", "--epochs", 1, "--restart")
    assert step(".") == 2
