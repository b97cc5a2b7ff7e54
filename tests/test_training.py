"""A run: what it leaves, being cut off, and carrying on to the same bits."""

import errno
import json
import os
import re
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import COMMAND, ROOT, SMALL, checkpoint, do, draw, fails, pictures, refused, rows, run
from conftest import save_generator, step, wait_for
from PIL import Image, ImageChops, ImageStat

import train

CPU = torch.device("cpu")


def same(one, other, path=""):
    """The paths at which two nested states differ, except for times of the clock."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        keys = one.keys() - {"seconds", "images_per_s"}
        return [difference for key in keys for difference in same(one[key], other[key], f"{path}/{key}")]
    if isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        pairs = enumerate(zip(one, other))
        return [difference for i, pair in pairs for difference in same(*pair, f"{path}/{i}")]
    equal = torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    return [] if equal else [path]


def test_a_run_leaves_what_the_readme_says(faces, tmp_path, monkeypatch, capsys):
    """Both commands, as the README has them."""
    command = [faces, 2, *SMALL, "--epochs", 5, "--sample_every", 2, "--seed", 5]
    status, out, err = run("train.sh", *command, cwd=tmp_path)
    assert status == 0, err
    status, said, err = run("test.sh", "Net_G.param", cwd=tmp_path)
    assert status == 0 and "64 pictures, eight to a row, in samples.png" in said, err
    assert "found 120 images" in out and out.count("Total params") == 2 and out.count("\nepoch ") == 3

    folder = tmp_path / "runs" / "faces-2"
    table = rows(folder)
    assert [(float(row["epoch"]), int(row["updates"])) for row in table] == [(2, 30), (4, 60), (5, 75)]
    for row in table:
        assert 0.3 < float(row["d_loss"]) < 1.5 and 0.2 < float(row["g_loss"]) < 3
        assert 0 < float(row["gradient_penalty"]) < 1.5 and 0 <= float(row["diversity"]) < 2
        assert abs(float(row["real_logits"])) < 2 and abs(float(row["fake_logits"])) < 2
    assert float(table[0]["images_per_s"]) == pytest.approx(240 / float(table[0]["seconds"]))
    names = {"checkpoint.pt", "config.json", "losses.csv", "losses.png", "Net_G.param", "samples", "samples.png"}
    assert names <= {path.name for path in folder.iterdir()} <= names | {"film.webp", ".lock"}
    grids = sorted((folder / "samples").iterdir())
    assert [path.name for path in grids] == [f"update_00000{updates}.png" for updates in (30, 60, 75)]
    assert (folder / "samples.png").read_bytes() == grids[-1].read_bytes() == Path("samples.png").read_bytes()
    with Image.open(grids[-1]) as grid, Image.open(folder / "losses.png") as curves:
        assert grid.size == (8 * 66 + 2, 8 * 66 + 2) and min(curves.size) > 500
    config = json.loads((folder / "config.json").read_text())
    wanted = {"optimizer": "sgd", "lr": 0.001, "gp_weight": 10, "images": 120, "sample_every": 2, "device": "cpu"}
    wanted |= {"out": "runs/faces-2", "folder": str(faces), "precision": train.pick_precision("auto", CPU), "seed": 5}
    assert config.items() >= wanted.items()
    assert Path("Net_G.param").read_bytes() == (folder / "Net_G.param").read_bytes()
    assert not list(tmp_path.rglob("*.part"))

    before = {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}
    monkeypatch.undo()  # so that this process draws curves, too
    monkeypatch.chdir(tmp_path)
    assert do(*command) == 0
    assert "Total params" not in capsys.readouterr().out
    assert before == {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def test_cut_off_inside_an_epoch_it_ends_on_the_same_bits(faces, tmp_path, begin, monkeypatch, capsys):
    """In the first epoch, with nothing saved yet: by Ctrl-C, SIGTERM, SLURM, a closed terminal, two signals at once."""
    command = [faces, 3, "--d_steps", 3, "--g_steps", 2, "--width", 4, "--batch_size", 2, "--epochs", 2, "--seed", 1]
    command += ["--out", "run", "--sample_every", 1, "--precision"]
    cuts = {"fp32": ([signal.SIGINT], [signal.SIGTERM], [signal.SIGUSR1]),
            "bf16": ([signal.SIGHUP], [signal.SIGTERM, signal.SIGINT])}  # fmt: skip

    def cut(precision):
        place, steps = tmp_path / precision, [0]
        for numbers in cuts[precision]:
            process = begin("bash", ROOT / "train.sh", *command, precision, cwd=place)
            wait_for(process, " at update ")
            time.sleep(0.05)  # a few updates: a later signal may meet the records at an epoch's end
            for number in numbers:
                process.send_signal(number)
            out, err = process.communicate(timeout=60)
            assert process.returncode in [128 + number for number in numbers] and "Traceback" not in err, err
            steps.append(step(place / "run"))
            assert f" at update {steps[-1]} of 120" in out
        assert all(earlier < later < 60 for earlier, later in zip(steps, steps[1:]))
        return f"Carrying on at update {steps[-1]} of 120"

    def complete(place, precision):
        monkeypatch.chdir(place)
        assert do(*command, precision) == 0
        return checkpoint()

    for precision in cuts:
        Path("whole", precision).mkdir(parents=True), Path(precision).mkdir()
    with ThreadPoolExecutor() as pool:  # both at the same time
        told = pool.map(cut, cuts)
        whole = [complete(tmp_path / "whole" / precision, precision) for precision in cuts]
    for precision, carries_on, state in zip(cuts, told, whole):
        capsys.readouterr()
        assert same(complete(tmp_path / precision, precision), state) == []
        assert carries_on in capsys.readouterr().out


def test_three_kills_at_random_moments_and_it_still_ends_on_the_same_bits(
    faces, tmp_path, begin, rng, monkeypatch, capsys
):
    """A second training there is refused while the first lives; the lock that a killed one leaves hinders nobody."""
    command = [faces, 1, "--width", 8, "--batch_size", 4, "--epochs", 6, "--sample_every", 1, "--out", "run"]
    for name in ("whole", "cut"):
        Path(name).mkdir()
    monkeypatch.chdir("cut")
    for _ in range(3):
        process = begin("bash", ROOT / "train.sh", *command)
        wait_for(process, " at update ")
        while not Path("run/checkpoint.pt").exists() and process.poll() is None:
            time.sleep(0.02)  # else all three could come before there is anything to carry on from
        for more in ([], ["--restart"]):
            assert "another training" in refused(capsys, *command, *more)
        time.sleep(rng.uniform(0.05, 0.6))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    capsys.readouterr()
    assert do(*command) == 0 and "Carrying on at update " in capsys.readouterr().out
    monkeypatch.chdir("../whole")
    assert do(*command) == 0
    folders = [tmp_path / name / "run" for name in ("whole", "cut")]
    assert same(*map(checkpoint, folders)) == []
    tables = [[{name: row[name] for name in row.keys() - {"seconds", "images_per_s"}} for row in rows(folder)]
              for folder in folders]  # fmt: skip
    assert tables[0] == tables[1] and len(tables[0]) == 6 and {"g_loss", "diversity"} <= tables[0][0].keys()


def test_two_may_write_one_file_at_the_same_time_also_with_one_process_number(tmp_path):
    path = tmp_path / "file"
    with train.atomic_write(path) as file:
        file.write(b"ours")
        with train.atomic_write(path) as theirs:  # a thread, or a process of another container
            theirs.write(b"theirs, which is longer")
        assert path.read_bytes() == b"theirs, which is longer"
    assert path.read_bytes() == b"ours" and list(tmp_path.iterdir()) == [path]


def test_numbers_of_numpy_make_a_run_that_carries_on(faces):
    small = {"width": np.int64(4), "latent_dim": 8, "batch_size": np.int32(8), "lr": np.float64(0.001)}
    small |= {"gp_weight": np.float32(3), "betas": np.array([0.5, 0.9]), "sample_every": np.float64(1)}
    small |= {"minutes": np.float32(9), "stop_on_collapse": np.bool_(False)}
    measured = {"kid": np.float64(7), "mine": np.float32(3), "three": np.int64(3)}
    for epochs in (1, 2):
        more = {"epochs": np.int64(epochs), "measure": lambda *_: measured, **small}
        train.train(faces, np.int64(3), seed=np.int64(1), out="run", **more)
    assert [(row["kid"], row["mine"], row["three"]) for row in rows()] == 2 * [("7.0", "3.0", "3.0")]
    assert checkpoint()["gan"]["step"] == 30 and json.loads(Path("run/config.json").read_text())["betas"] == [0.5, 0.9]
    assert do(faces, 3, *SMALL, "--seed", 1, "--lr", 0.001, "--gp_weight", 3, "--betas", 0.5, 0.9, "--epochs", 3,
              "--out", "run") == 0  # fmt: skip


def test_more_epochs_extend_a_run_and_restart_begins_anew(faces, monkeypatch, capsys):
    command, folder = [faces, 1, *SMALL, "--epochs"], Path("runs/faces-1")
    assert do(*command, 1) == 0
    first = checkpoint(folder)
    assert do(*command, 3, "--sample_every", 0.5) == 0 and "Carrying on at update 15 of 45" in capsys.readouterr().out
    assert [row["updates"] for row in checkpoint(folder)["records"]["rows"]] == [15, 16, 24, 32, 40, 45]
    assert do(*command, 1, "--restart") == 0 and "Starting at update 0 of 15" in capsys.readouterr().out
    assert same(checkpoint(folder), first) == []
    assert [path.name for path in (folder / "samples").iterdir()] == ["update_0000015.png"]
    (earlier,) = folder.parent.glob("faces-1_before_*")
    assert len(checkpoint(earlier)["records"]["rows"]) == len(list((earlier / "samples").iterdir())) == 6
    monkeypatch.chdir(folder)
    assert "--restart" in refused(capsys, *command, 1, "--out", ".", "--restart"), "not the folder in which it works"


def test_a_run_clears_up_after_a_killed_one(faces):
    """Wherever it writes: in the cache, in the run folder, among the grids, beside --save_as."""
    assert do(faces, 1, *SMALL, "--epochs", 1, "--save_as", "models/G.param", "--out", "run") == 0
    (pixels,) = Path(".cache").glob("*.rgb")
    ours = pixels, "run/checkpoint.pt", "run/samples/update_0000030.png", "run/samples.png", "models/G.param"
    old, new = ([Path(f"{path}.{number}.face-gan.part") for path in ours] for number in ("0a0a", "1b1b"))
    others = [Path("models/film.part"), Path(".cache/film.part")]
    for path in [*old, *new, *others]:
        path.touch()
    for path in [*old, *others]:
        os.utime(path, (0, 0))
    os.utime(min(faces.iterdir()))  # so that it decodes
    assert do(faces, 1, *SMALL, "--epochs", 2, "--save_as", "models/G.param", "--out", "run") == 0
    assert not any(path.exists() for path in old)
    assert all(path.exists() for path in [*new, *others]), "another process may still write them, films are not ours"


@pytest.mark.parametrize(
    "d_steps, g_steps, fakes, g_losses",
    [(1, 1, 15, [1, 4, 7, 10, 13]), (3, 2, 15 + 10, [0.5, 2.5, 4.5, 6.5, 8.5]), (4, 3, 15 + 9, ["", 1, 4, 7, ""])],
)
def test_how_often_each_network_is_updated_and_fakes_are_made(faces, monkeypatch, d_steps, g_steps, fakes, g_losses):
    """With a row every 3 of 15 updates, whose loss of G is the mean of the updates that there were."""
    calls, losses, update_D, draw_fake = [], iter(range(99)), train.update_D, train.GAN.draw_fake
    monkeypatch.setattr(train, "update_D", lambda *args: calls.append("D") or update_D(*args))
    monkeypatch.setattr(train, "update_G", lambda *_: torch.tensor(float(next(losses))))
    monkeypatch.setattr(train.GAN, "draw_fake", lambda *args: calls.append("fake") or draw_fake(*args))
    small = {"batch_size": 8, "width": 4, "latent_dim": 8, "epochs": 1}
    train.train(faces, 1, out="run", sample_every=0.2, d_steps=d_steps, g_steps=g_steps, **small)
    assert calls.count("D") == 15 and calls.count("fake") == fakes and next(losses) == 15 // d_steps * g_steps
    assert [row["g_loss"] and float(row["g_loss"]) for row in rows()] == g_losses


def test_measures_take_under_a_twentieth_of_the_time_unless_asked_for(faces, clock, monkeypatch):
    def takes(seconds, function):
        def slow(*args, **more):
            clock[0] += seconds
            return function(*args, **more)

        return slow

    monkeypatch.setattr(train.GAN, "update", takes(3, train.GAN.update))
    monkeypatch.setattr(train, "sample", takes(1.5, train.sample))  # for the measure, and for the grid
    Path("few").mkdir()
    for face in sorted(faces.iterdir())[:8]:
        Path("few", face.name).symlink_to(face)
    command = ["few", 1, *SMALL, "--epochs", 35]  # of one update, three seconds each
    for out, more, wanted in [("by_clock", [], [1, 19, 35]), ("asked", ["--sample_every", 15], [15, 30, 35])]:
        assert do(*command, "--out", out, *more) == 0
        table = checkpoint(out)["records"]["rows"]
        assert [row["updates"] for row in table if "diversity" in row] == wanted
        assert len(table) == (35 if out == "by_clock" else 3), "the losses of every tick are kept"
    # Checkpoints between two ticks do not use up the time for measures.
    monkeypatch.setattr(train.GAN, "update", takes(100, train.GAN.update))
    monkeypatch.setattr(train.GAN, "fit_G_ema", takes(20, train.GAN.fit_G_ema))
    assert do(faces, 3, *SMALL, "--batch_size", 24, "--networks", "dcgan", "--out", "slow", "--epochs", 3) == 0
    assert [row["updates"] for row in checkpoint("slow")["records"]["rows"] if "diversity" in row] == [5, 10, 15]


@pytest.mark.parametrize(
    "words, fit",
    [
        ([1, *SMALL], "--lr 7.8e-05\n"),
        ([2, *SMALL], "--lr 0.064\n"),
        ([3, *SMALL, "--loss", "bce"], None),  # whose rate is that of a mean
        ([2, *SMALL, "--lr", 0.01], None),
    ],
)
def test_a_small_batch_names_the_rate_to_try_where_the_loss_is_a_sum(words, fit, faces, capsys):
    assert do(faces, *words, "--out", "run", "--epochs", 1) == 0
    out = capsys.readouterr().out
    assert fit in out if fit else "try --lr" not in out


def test_a_run_goes_on_with_another_rate_precision_or_device_and_says_so(faces, capsys):
    settings = [faces, 3, *SMALL, "--out", "run", "--precision", "fp32", "--epochs"]
    weights = []
    for epochs, more in ((1, []), (2, ["--lr", 1e-7]), (3, ["--betas", 0, 0.9])):  # which are its betas
        assert do(*settings, epochs, *more) == 0
        weights.append(checkpoint()["gan"]["D"]["6.weight"])
    one, two, three = weights
    assert 0 < (two - one).abs().max() < 1e-5, "each step of Adam is about as large as its rate"
    assert 1e-4 < (three - two).abs().max() < 0.1
    said = "".join(capsys.readouterr())
    assert "lr was 0.001 and is 1e-07" in said and "lr was 1e-07 and is 0.001" in said and "betas" not in said
    assert do(*settings, 3, "--lr", 1e-7) == 0
    assert "lr was" not in "".join(capsys.readouterr()), "a finished run goes nowhere"
    state = checkpoint()
    state["gan"] |= {"rng_device": "cuda", "rng": torch.zeros(16, dtype=torch.uint8)}  # as a card leaves it
    state["config"]["device"] = "cuda"
    train.save(state, Path("run/checkpoint.pt"))
    assert do(*settings, 4, "--precision", "bf16") == 0
    said = "".join(capsys.readouterr())
    assert "Carrying on at update 45 of 60 in run" in said
    assert "precision was fp32 and is bf16" in said and "device was cuda and is cpu" in said
    assert json.loads(Path("run/config.json").read_text())["device"] == "cpu"
    assert checkpoint()["gan"]["rng"].numel() > 16


def test_a_run_leaves_a_film_of_all_its_grids_and_a_long_one_is_thinned_out(faces):
    for epochs, frames in (2, 2), (3, 3):
        assert do(faces, 3, *SMALL, "--out", "run", "--epochs", epochs, "--sample_every", 1) == 0
        with Image.open("run/film.webp") as film:
            assert film.n_frames == frames and film.size == (266, 266) and film.info["loop"] == 0
            film.seek(frames - 1)
            last = film.convert("RGB").crop((2, 2, 66, 66))
        with Image.open(f"run/samples/update_{15 * epochs:07}.png") as grid:
            lost = ImageStat.Stat(ImageChops.difference(last, grid.crop((2, 2, 66, 66)))).mean
        assert max(lost) < 12  # by WebP, which smooths noise
    Path("many").mkdir()
    train.save_film(Path("many"), Path("none.webp"))
    assert not Path("none.webp").exists()  # a run that ends before its first grid
    for update in range(250):
        Image.new("RGB", (530, 530), (255 * (update % 2), update, 0)).save(f"many/update_{update + 9_999_850}.png")
    train.save_film(Path("many"), Path("film.webp"))
    with Image.open("film.webp") as film:
        assert 50 < film.n_frames <= 100
        film.seek(film.n_frames - 1)
        assert film.convert("RGB").getpixel((9, 9))[0] > 240


def test_a_signal_in_a_tick_that_saves_nothing_is_saved_for(faces, monkeypatch, capsys):
    add_row = train.Records.add_row

    def hurried(records, gan, images, thorough):
        os.kill(os.getpid(), signal.SIGTERM)
        return add_row(records, gan, images, False)

    monkeypatch.setattr(train.Records, "recording", property(lambda records: 1e9, lambda *_: None), raising=False)
    monkeypatch.setattr(train.Records, "add_row", hurried)
    assert do(faces, 3, *SMALL, "--out", "run", "--epochs", 9) == 128 + signal.SIGTERM
    assert step() == 15 and " at update 15 of 135" in capsys.readouterr().out


def test_a_run_can_be_watched_its_newest_grid_and_its_film_so_far(f, clock, monkeypatch):
    update, seen = train.GAN.update, []

    def watched(gan, *args, **more):
        clock[0] += 61
        film, grids = Path("run/film.webp"), sorted(Path("run/samples").glob("*.png"))
        if grids:
            assert Path("run/samples.png").read_bytes() == grids[-1].read_bytes()
        seen.append(film.exists() and getattr(Image.open(film), "n_frames", 1))
        return update(gan, *args, **more)

    monkeypatch.setattr(train.GAN, "update", watched)
    assert do(*COMMAND, 5, "--sample_every", 1) == 0
    assert seen == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4], "two minutes from one film to the next"


# ------------------------------------------------------------------------------------ what cannot be written


def test_a_file_that_cannot_be_written_is_one_warning_and_no_end(f, capsys):
    for names in [["losses.csv", "losses.png", "samples.png", "config.json", "Net_G.param"], ["samples"]]:
        assert do(*COMMAND, 1, "--restart") == 0
        for path in (Path("run", name) for name in names):
            if path.is_dir():
                shutil.rmtree(path), path.touch()
            else:
                path.unlink(), path.mkdir()
        capsys.readouterr()
        assert do(*COMMAND, 3, "--sample_every", 3 if names == ["samples"] else 1) == 0
        warned = [line for line in capsys.readouterr().err.splitlines() if "epochs was" not in line]
        told = [sum(f"run/{name}" in line for line in warned) for name in names]
        assert sum(told) == len(warned) and {*told} <= {1, 2}, "at the start, and of each grid"
        assert step() == 6


def test_a_save_that_fails_is_a_warning_and_only_the_last_one_ends_the_run(f, updates, monkeypatch, capsys):
    for when, status, saved in [((2,), 0, 6), ((2, 4), 0, 6), ((2, 6), 2, 4)]:
        updates.clear(), train.say_once.cache_clear()
        away = fails(errno.EIO, os.replace, lambda _, path, when=when: len(updates) in when and path.suffix == ".pt")
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", away)
            assert do(*COMMAND, 3, "--sample_every", 1, "--restart") == status
        err = [line for line in capsys.readouterr().err.splitlines() if os.strerror(errno.EIO) in line]
        assert len(err) == (2 if status else 1) and all("checkpoint.pt" in line for line in err)
        assert step() == saved and [int(row["updates"]) for row in rows()] == ([2, 4, 6] if saved == 6 else [2, 4])
    assert do(*COMMAND, 3) == 0 and step() == 6


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_that_knows_no_sync_no_lock_or_no_map_holds_a_run(number, f, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(os, "fsync", fails(number, os.fsync, lambda *_: True))
    monkeypatch.setattr(np, "memmap", fails(errno.ENODEV, np.memmap, lambda *_: True))
    if number in (errno.ENOSYS, errno.ENOLCK):
        monkeypatch.setattr(fcntl, "flock", fails(number, fcntl.flock, lambda *_: True))
    Path("run").mkdir()
    Path("run/.lock").write_text("1\nelsewhere\n")  # what a killed training on another machine may have left
    assert do(*COMMAND, 1) == 0 and step() == 2
    assert train.load_images("f")[0][:, 0, 9, 9].tolist() == [*range(16)]


def test_the_checkpoint_is_written_before_all_else_and_the_best_generator_is_kept(f, updates, monkeypatch, capsys):
    order, replace = {}, os.replace
    monkeypatch.setattr(os, "replace", lambda part, path: order.setdefault(len(updates), []).append(Path(path).name)
                        or replace(part, path))  # fmt: skip
    judged = partial(train.main, measure=lambda gan, *_: {"kid": {2: 30.0, 4: 10.0, 6: 20.0}[gan.step]})
    assert do(*COMMAND, 3, "--sample_every", 1, program=judged) == 0
    assert order[2][0] == order[4][0] == order[6][0] == "checkpoint.pt"
    names = {"losses.csv", "losses.png", "Net_G.param", "Net_G_best.param", "update_0000004.png", "samples.png"}
    assert names <= {*order[4]} and "Net_G_best.param" not in order[6], "that of the smallest KID"
    assert train.load("run/Net_G_best.param")["updates"] == 4
    assert any("run/Net_G_best.param" in line and " 4" in line for line in capsys.readouterr().out.splitlines())
    assert [float(row["kid"]) for row in rows()] == [30, 10, 20]


def test_links_to_a_place_with_room_are_written_through_and_a_linked_run_folder_can_be_begun_anew(f):
    for name in ("drive", "big"):
        Path(name).mkdir()
    Path("Net_G.param").symlink_to("drive/mine.param")
    Path("run").symlink_to("big")
    Path("run/checkpoint.pt").symlink_to(Path("drive/state.pt").absolute())
    for epochs in (1, 2):
        assert do(*COMMAND, epochs) == 0
        assert train.load("drive/mine.param")["updates"] == train.load("drive/state.pt")["gan"]["step"] == 2 * epochs
    assert Path("Net_G.param").is_symlink() and Path("run/checkpoint.pt").is_symlink()
    for more in (["--restart"], []):
        assert do(*COMMAND, 1, *more) == 0
    assert step() == step("big") and len([*Path().glob("big_before_*")]) == 1


def test_a_picture_that_cannot_be_drawn_does_not_change_the_training(f, monkeypatch, capsys):
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
    assert "for a moment" in capsys.readouterr().err
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


# ------------------------------------------------------------------------------- whose generator it is


def moved():
    """What lies beside Net_G.param under another name."""
    return {path.read_bytes() for path in Path().glob("Net_G_*")}


def test_a_generator_that_lies_there_is_moved_aside_once_and_said(f, tmp_path, monkeypatch, capsys):
    save_generator("Net_G.param", updates="7")  # of another program
    kept = set()
    for out in ("a", "b"):
        kept.add(Path("Net_G.param").read_bytes())
        assert do("f", 3, *SMALL, "--epochs", 2, "--sample_every", 1, "--out", out) == 0
        (said,) = (line for line in capsys.readouterr().err.splitlines() if "Net_G" in line)
        assert moved() == kept and sum(path.name in said for path in Path().glob("Net_G_*")) == 1
    tmp_path.rename(tmp_path.with_name("moved"))  # as a notebook that lies elsewhere in its next session
    monkeypatch.chdir(tmp_path.with_name("moved"))
    assert do("f", 3, *SMALL, "--epochs", 3, "--out", "b") == 0
    assert moved() == kept and train.load("Net_G.param")["updates"] == 6
    kept.add(Path("Net_G.param").read_bytes())
    shutil.rmtree("b")
    assert do("f", 3, *SMALL, "--epochs", 1, "--out", "b") == 0
    assert moved() == kept, "the trained one whose run folder was deleted"
    Path("Net_G.param").write_text("mine")
    assert do("f", 3, *SMALL, "--epochs", 1, "--out", "c", "--save_as", "demo.param") == 0
    assert Path("Net_G.param").read_text() == "mine" and draw("demo.param") == 0
    (demo,) = re.findall(r"^.*demo_faces 3 .*$", (ROOT / "train.sh").read_text(), re.MULTILINE)
    assert re.search(r"--save_as (?!Net_G\.param)\S+\.param", demo)


def test_two_trainings_in_one_working_folder_do_not_write_over_each_others_generator(f, capsys):
    """The other one begins at the third of five ticks of the first."""
    def measure(gan, images):
        if gan.step == 6:
            assert do("f", 3, *SMALL, "--epochs", 1, "--out", "other") == 0
        return {}

    assert do(*COMMAND, 5, "--sample_every", 1, program=partial(train.main, measure=measure)) == 0
    assert Path("Net_G.param").read_bytes() == Path("other/Net_G.param").read_bytes()
    assert train.load("run/Net_G.param")["updates"] == 10
    (aside,) = Path().glob("Net_G_*")  # by the other one
    assert train.load(aside)["updates"] == 4
    said = [line for line in capsys.readouterr().err.splitlines() if "Net_G.param" in line]
    assert len(said) == 2 and str(aside) in said[0] and "run/Net_G.param" in said[1]


# ----------------------------------------------------------------------------------------- which pictures, how long


def test_other_pictures_are_not_taken_for_those_of_the_run_but_a_copy_is_and_a_changed_folder(capsys):
    pictures("cats/train")
    pictures("dogs/train", green=200)
    assert do("cats/train", 3, *SMALL, "--epochs", 1) == 0
    kept = Path("runs/train-3/checkpoint.pt").read_bytes()
    said = refused(capsys, "dogs/train", 3, *SMALL, "--epochs", 2)
    assert "dogs/train" in said and "cats/train" in said and "--out" in said and "--restart" in said
    assert Path("runs/train-3/checkpoint.pt").read_bytes() == kept
    shutil.copytree("cats/train", "moved", copy_function=shutil.copy)  # its files have new times
    assert do("moved", 3, *SMALL, "--epochs", 2, "--out", "runs/train-3") == 0
    assert "Carrying on at update 2 of 4" in capsys.readouterr().out
    grids = {path: path.read_bytes() for path in Path("runs/train-3/samples").iterdir()}
    Path("moved/007.png").unlink()
    for i in range(9):
        Image.new("RGB", (8, 8), (0, 99, i)).save(f"moved/new{i}.png")
    assert do("moved", 3, *SMALL, "--epochs", 2, "--out", "runs/train-3") == 0
    said = "".join(capsys.readouterr())
    assert "Carrying on at update 4 of 6" in said and "images was 16 and is 24" in said and step("runs/train-3") == 6
    assert all(path.read_bytes() == data for path, data in grids.items())


def test_minutes_count_from_the_start_and_the_same_command_carries_on(f, clock, monkeypatch, capsys):
    decode, update = train.decode, train.GAN.update
    monkeypatch.setattr(train, "decode", lambda *args: clock.append(clock.pop() + 10) or decode(*args))
    monkeypatch.setattr(train.GAN, "update",
                        lambda *args, **more: clock.append(clock.pop() + 25) or update(*args, **more))  # fmt: skip
    for last in (0, 3, 6):  # first 16 pictures are decoded
        assert do(*COMMAND, 1000, "--minutes", 1) == 0
        out = capsys.readouterr().out
        assert f"at update {last} of 2,000" in out and step() == last
        if last:
            assert f"at update {last - 3} of 2,000" in out and rows()[-1]["updates"] == str(last)
            assert Path("run/samples", f"update_{last:07}.png").exists()
        assert train.load("Net_G.param")["updates"] == train.load("run/Net_G.param")["updates"] == last


@pytest.mark.parametrize("name", ["d_loss", "gradient_penalty", "g_loss"])
def test_a_loss_or_a_weight_that_is_no_number_is_found(name):
    gan = train.GAN(train.replace(train.RECIPES[1], width=4, latent_dim=8, batch_size=8), 0, CPU)
    gan.step, good = 26, {loss: [torch.tensor(0.5)] * 9 for loss in ("d_loss", "gradient_penalty", "g_loss")}
    gan.check_finite(good)
    with pytest.raises(train.UserError, match="at update 26"):
        gan.check_finite({**good, name: [*good[name][1:], torch.tensor(torch.nan)]})
    gan.D[2].norm.weight.data[1] = torch.inf  # losses are computed before the step that does this
    with pytest.raises(train.UserError, match="at update 26"):
        gan.check_finite(good)


def test_a_run_that_diverges_keeps_its_last_good_checkpoint(faces, capsys):
    command = [faces, 2, *SMALL, "--out", "run", "--epochs"]
    assert do(*command, 1, "--lr", 1e6) == 2
    err = capsys.readouterr().err
    assert "at update " in err and "--lr" in err and "checkpoint" not in err
    assert not Path("Net_G.param").exists() and not Path("run/checkpoint.pt").exists()
    assert do(*command, 1) == 0
    path, state = Path("run/checkpoint.pt"), checkpoint()
    state["gan"]["D"]["2.norm.weight"][1] = torch.inf
    train.save(state, path)
    kept = path.read_bytes()
    capsys.readouterr()
    assert do(*command, 2) == 2
    err = capsys.readouterr().err
    assert re.search(r"at update \d", err) and "--lr" in err and "--restart" in err
    assert path.read_bytes() == kept
