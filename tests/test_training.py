"""A run: what it leaves, being cut off, and carrying on to the same bits."""

import csv
import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, checkpoint, do, refused, run, sampler, wait_for
from PIL import Image, ImageChops, ImageStat

import train

CPU = torch.device("cpu")


def same(one, other, path=""):
    """The paths at which two nested states differ, except for times of the clock."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        keys = one.keys() - {"seconds", "images_per_s", "place"}
        return [difference for key in keys for difference in same(one[key], other[key], f"{path}/{key}")]
    if isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        pairs = enumerate(zip(one, other))
        return [difference for i, pair in pairs for difference in same(*pair, f"{path}/{i}")]
    equal = torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    return [] if equal else [path]


@pytest.fixture(scope="module")
def finished(faces, tmp_path_factory):
    """Where both commands have run as the README has them, and what the first one said: to look at, no more."""
    place = tmp_path_factory.mktemp("finished")
    words = [faces, 2, *SMALL, "--epochs", 5, "--sample_every", 2, "--seed", 5]
    status, said, err = run("train.sh", *words, cwd=place)
    assert status == 0, err
    status, out, err = run("test.sh", "Net_G.param", cwd=place)
    assert status == 0 and "64 pictures, eight to a row, in samples.png" in out, err
    return place, said


def test_a_run_leaves_what_the_readme_says(faces, finished, monkeypatch, capsys):
    place, out = finished
    assert "found 120 images, skipped none" in out
    assert out.count("Total params") == 2 and "SGD at this rate is the likely cause" in out
    assert out.count("\nepoch ") == 3

    folder = place / "runs" / "faces-2"
    rows = list(csv.DictReader((folder / "losses.csv").open()))
    assert [(row["epoch"], row["updates"]) for row in rows] == [("2", "30"), ("4", "60"), ("5", "75")]
    for row in rows:
        assert 0.3 < float(row["d_loss"]) < 1.5 and 0.2 < float(row["g_loss"]) < 3
        assert 0 < float(row["gradient_penalty"]) < 1.5
        assert abs(float(row["real_logits"])) < 2 and abs(float(row["fake_logits"])) < 2
        assert row["distance"] and row["floor"] and row["diversity"]
    assert float(rows[0]["images_per_s"]) == pytest.approx(240 / float(rows[0]["seconds"]))
    assert [path.name for path in sorted((folder / "samples").iterdir())] == [f"epoch_00{i}.png" for i in (2, 4, 5)]
    best = min(rows, key=lambda row: float(row["distance"]))
    told = f"epoch {best['epoch']}, texture distance {float(best['distance']):.1f} (floor {float(best['floor']):.1f})"
    assert told in out and train.load(folder / "Net_G_best.param")["updates"] == int(best["updates"])
    with Image.open(folder / "samples" / "epoch_005.png") as grid, Image.open(folder / "losses.png") as curves:
        assert grid.size == (8 * 66 + 2, 8 * 66 + 2) and min(curves.size) > 500
    config = json.loads((folder / "config.json").read_text())
    wanted = {"optimizer": "sgd", "lr": 0.001, "gp_weight": 10, "images": 120, "sample_every": 2, "device": "cpu"}
    wanted |= {"out": "runs/faces-2", "folder": str(faces), "precision": train.pick_precision("auto", CPU), "seed": 5}
    assert config.items() >= wanted.items()
    assert (place / "Net_G.param").read_bytes() == (folder / "Net_G.param").read_bytes()
    assert not list(place.rglob("*.part"))

    before = {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}
    monkeypatch.undo()  # so that this process draws curves, too
    monkeypatch.chdir(place)
    assert do(faces, 2, *SMALL, "--epochs", 5, "--seed", 5, "--sample_every", 2) == 0
    out = capsys.readouterr().out
    assert "is finished" in out and "Total params" not in out
    assert before == {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def test_last_sample_of_training_is_the_first_of_test_sh(finished):
    grid = finished[0] / "runs" / "faces-2" / "samples" / "epoch_005.png"
    assert (finished[0] / "samples.png").read_bytes() == grid.read_bytes()


def test_cut_off_inside_an_epoch_it_ends_on_the_same_bits(faces, tmp_path, begin, monkeypatch, capsys):
    """In the first epoch, with nothing saved yet: by Ctrl-C, SIGTERM, a closed terminal, and two signals at once."""
    command = [faces, 3, "--d_steps", 3, "--g_steps", 2, "--width", 4, "--batch_size", 2, "--epochs", 2, "--seed", 1]
    command += ["--out", "run", "--sample_every", 1, "--precision"]
    cuts = {"fp32": ([signal.SIGINT], [signal.SIGTERM]), "bf16": ([signal.SIGHUP], [signal.SIGTERM, signal.SIGINT])}

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
            steps.append(checkpoint(place / "run")["gan"]["step"])
            assert f"Stopped and saved at update {steps[-1]} of 120" in out
        assert 0 < steps[1] < steps[2] < 60
        return f"Carrying on at update {steps[2]} of 120"

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
    tables = [csv.reader((folder / "losses.csv").open()) for folder in folders]
    columns = [[row[:7] + row[9:] for row in table] for table in tables]  # without seconds and images_per_s
    assert columns[0][0][6:] == ["g_loss", "distance", "floor", "diversity"] and all(columns[0][-1])
    assert columns[0] == columns[1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_twenty_kills_of_a_process_that_does_nothing_but_save(faces, rng):
    train.train(faces, 1, out="run", width=4, batch_size=8, epochs=1)
    saved = checkpoint()
    recipe = train.replace(train.RECIPES[1], width=4, batch_size=8)
    gan, records = train.GAN(recipe, 0, CPU), train.Records(Path("run"), saved["config"], saved["records"]["digests"])
    train.restore(gan, records)
    for _ in range(2):  # the first one takes longer
        begun = time.monotonic()
        records.new_best = records.stored(gan)
        records.save(gan)
        duration = time.monotonic() - begun
    generators = "run/Net_G_best.param", "run/Net_G.param", "Net_G.param"
    for kill in range(20):
        child = os.fork()
        if child == 0:
            try:
                while True:
                    gan.step += 1
                    records.new_best = records.stored(gan)
                    records.save(gan)
                    time.sleep(0.01)  # as an update takes: file times are that coarse
            finally:
                os._exit(1)
        time.sleep(rng.uniform(0.1, 3) * duration)
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "it should have gone on saving"
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        before, step = gan.step, checkpoint()["gan"]["step"]
        for path in generators:
            sampler.load_generator(path)
            assert before <= train.load(path)["updates"] <= step, "the checkpoint is written first"
        assert len(list(csv.DictReader(Path("run/losses.csv").open()))) == 1
        with Image.open("run/losses.png") as curves:
            curves.load()
        train.restore(gan, records)  # as the same command does
        assert [gan.step, *(train.load(path)["updates"] for path in generators)] == 4 * [step]
    assert gan.step > 15, "none of twenty kills came after a save"


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
    small |= {"gp_weight": np.float32(3), "betas": np.array([0.5, 0.9])}
    for epochs in (1, 2):
        train.train(faces, np.int64(3), seed=np.int64(1), out="run", epochs=np.int64(epochs), **small)
    assert checkpoint()["gan"]["step"] == 30 and json.loads(Path("run/config.json").read_text())["betas"] == [0.5, 0.9]
    assert do(faces, 3, *SMALL, "--seed", 1, "--lr", 0.001, "--gp_weight", 3, "--betas", 0.5, 0.9, "--epochs", 3,
              "--out", "run") == 0  # fmt: skip


def test_more_epochs_extend_a_run_and_restart_begins_anew(faces, capsys):
    command, folder = [faces, 1, *SMALL, "--epochs"], Path("runs/faces-1")
    assert do(*command, 1) == 0
    first = checkpoint(folder)
    assert do(*command, 3, "--sample_every", 0.5) == 0 and "Carrying on at update 15 of 45" in capsys.readouterr().out
    assert [row["updates"] for row in checkpoint(folder)["records"]["rows"]] == [15, 23, 30, 38, 45]
    assert do(*command, 1, "--restart") == 0 and "Starting at update 0 of 15" in capsys.readouterr().out
    assert same(checkpoint(folder), first) == []
    assert [path.name for path in (folder / "samples").iterdir()] == ["epoch_001.png"]
    (earlier,) = folder.parent.glob("faces-1_before_*")
    assert len(checkpoint(earlier)["records"]["rows"]) == len(list((earlier / "samples").iterdir())) == 5


def test_a_run_clears_up_after_a_killed_one(faces):
    names = ".cache/old.rgb.1.face-gan.part", ".cache/new.rgb.1.face-gan.part", "film.part", ".cache/film.part"
    names += ("models/G.param.1.face-gan.part",)
    Path(".cache").mkdir()
    Path("models").mkdir()
    for name in names:
        Path(name).touch()
        if "new" not in name:
            os.utime(name, (0, 0))
    assert do(faces, 1, *SMALL, "--epochs", 1, "--save_as", "models/G.param") == 0
    left = [Path(name).exists() for name in names]
    assert left == [False, True, True, True, False], "another process may still write the new one, films are not ours"


@pytest.mark.parametrize("d_steps, g_steps, fakes", [(1, 1, 15), (3, 2, 15 + 10), (4, 1, 15 + 3)])
def test_how_often_each_network_is_updated_and_fakes_are_made(faces, monkeypatch, d_steps, g_steps, fakes):
    calls = []
    for name in ("tick", "save"):  # they make fakes of their own
        monkeypatch.setattr(train.Records, name, lambda *_: None)
    for name in ("update_D", "update_G", "draw_noise"):
        function = getattr(train, name)
        monkeypatch.setattr(train, name, lambda *args, n=name, f=function: calls.append(n) or f(*args))
    steps = {"d_steps": d_steps, "g_steps": g_steps, "batch_size": 8, "width": 4, "latent_dim": 8, "epochs": 1}
    train.train(faces, 1, out="run", **steps)
    assert calls.count("update_D") == 15
    assert calls.count("update_G") == 15 // d_steps * g_steps
    assert calls.count("draw_noise") == fakes


def test_the_loss_of_G_is_the_mean_of_the_updates_that_there_were(faces, monkeypatch):
    monkeypatch.setattr(train, "update_G", lambda *_: torch.tensor(0.7))
    train.train(faces, 1, out="run", batch_size=8, width=4, latent_dim=8, epochs=1, d_steps=4, g_steps=3)
    (row,) = csv.DictReader(open("run/losses.csv"))
    assert float(row["g_loss"]) == pytest.approx(0.7)


def test_a_long_epoch_is_saved_every_two_minutes(faces, monkeypatch):
    clock, saves, save = [0.0], [], train.Records.save
    monkeypatch.setattr(train.time, "perf_counter", lambda: clock.append(clock[-1] + 10) or clock[-1])
    monkeypatch.setattr(train.Records, "save", lambda records, gan: saves.append(gan.step) or save(records, gan))
    train.train(faces, 1, out="run", batch_size=4, width=4, latent_dim=8, epochs=1)
    assert saves[-1] == 30 and 2 <= len(saves) <= 6
    assert all(5 <= after - before <= 14 for before, after in zip([0, *saves], saves[:-1]))


def test_measures_take_under_a_twentieth_of_the_time_unless_asked_for(faces, monkeypatch):
    clock = [0.0]

    def takes(seconds, function):
        def slow(*args, **more):
            clock[0] += seconds
            return function(*args, **more)

        return slow

    monkeypatch.setattr(train.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(train.GAN, "update", takes(3, train.GAN.update))
    monkeypatch.setattr(train, "save_grid", takes(3, train.save_grid))
    Path("few").mkdir()
    for face in sorted(faces.iterdir())[:8]:
        Path("few", face.name).symlink_to(face)
    command = ["few", 1, *SMALL, "--epochs", 25]  # of one update, three seconds each
    for out, more, wanted in [("by_clock", [], [1, 19, 25]), ("asked", ["--sample_every", 10], [10, 20, 25])]:
        assert do(*command, "--out", out, *more) == 0
        rows = checkpoint(out)["records"]["rows"]
        assert [row["updates"] for row in rows if "distance" in row] == wanted
        assert len(rows) == (25 if out == "by_clock" else 3), "the losses of every tick are kept"
    # Checkpoints between two ticks do not use up the time for measures.
    monkeypatch.setattr(train.GAN, "update", takes(100, train.GAN.update))
    monkeypatch.setattr(train.GAN, "fit_G_ema", takes(20, train.GAN.fit_G_ema))
    assert do(faces, 3, *SMALL, "--batch_size", 24, "--networks", "dcgan", "--out", "slow", "--epochs", 3) == 0
    assert [row["updates"] for row in checkpoint("slow")["records"]["rows"] if "distance" in row] == [5, 10, 15]


@pytest.mark.parametrize(
    "words, fit",
    [
        ([1], "with 8, try --lr 7.8e-05\n"),
        ([2], "with 8, try --lr 0.064 --gp_weight 0.16"),
        ([2, "--gp_weight", 1], "with 8, try --lr 0.064\n"),
        ([2, "--gp_reduction", "sum"], "with 8, try --lr 0.064\n"),
        ([2, "--lr", 0.01], None),
    ],
)
def test_a_small_batch_of_the_reports_types_names_the_rate_to_try(words, fit, faces, capsys):
    assert do(faces, *words, *SMALL, "--out", "run", "--epochs", 1) == 0
    out = capsys.readouterr().out
    assert fit in out if fit else ", try --lr" not in out


def test_a_run_goes_on_with_another_rate_and_says_so(faces, capsys):
    settings = [faces, 3, *SMALL, "--out", "run", "--precision", "fp32", "--epochs"]
    weights = []
    for epochs, more in ((1, []), (2, ["--lr", 1e-7]), (3, [])):
        assert do(*settings, epochs, *more) == 0
        weights.append(checkpoint()["gan"]["D"]["6.weight"])
    one, two, three = weights
    assert 0 < (two - one).abs().max() < 1e-5, "each step of Adam is about as large as its rate"
    assert 1e-4 < (three - two).abs().max() < 0.1
    err = capsys.readouterr().err
    assert "run: --lr was 0.001 and is 1e-07 from here on" in err and "--lr was 1e-07 and is 0.001" in err
    assert do(*settings, 3, "--lr", 1e-7) == 0
    assert not capsys.readouterr().err, "a finished run goes nowhere"


def test_a_run_that_is_older_than_an_option_goes_on_with_its_default(faces, capsys):
    settings = {"out": "run", "width": 4, "latent_dim": 8, "batch_size": 8}
    train.train(faces, 3, **settings, epochs=1)
    state = checkpoint()
    del state["config"]["mirror"]
    train.save(state, Path("run/checkpoint.pt"))
    with pytest.raises(train.UserError, match="--mirror 0.5 contradicts run/checkpoint.pt: --mirror 0.0 carries on"):
        train.train(faces, 3, **settings, epochs=2, mirror=0.5)
    train.train(faces, 3, **settings, epochs=2)
    assert "Carrying on at update 15 of 30 in run" in capsys.readouterr().out
    del state["config"]["lr"]
    train.save(state, Path("run/checkpoint.pt"))
    with pytest.raises(train.UserError, match="not a checkpoint that this train.py can carry on"):
        train.train(faces, 3, **settings, epochs=2)


def test_a_run_goes_on_on_another_device_and_in_another_precision_and_says_so(faces, capsys):
    settings = {"out": "run", "width": 4, "latent_dim": 8, "batch_size": 8}
    train.train(faces, 3, **settings, epochs=1, precision="fp32")
    state = checkpoint()
    state["gan"] |= {"rng_device": "cuda", "rng": torch.zeros(16, dtype=torch.uint8)}  # as a card leaves it
    state["config"]["device"] = "cuda"
    train.save(state, Path("run/checkpoint.pt"))
    train.train(faces, 3, **settings, epochs=2, precision="bf16")
    out, err = capsys.readouterr()
    assert "Carrying on at update 15 of 30 in run" in out
    assert "run: --precision was fp32 and is bf16 from here on" in err
    assert json.loads(Path("run/config.json").read_text())["device"] == "cpu"
    assert checkpoint()["gan"]["rng"].numel() > 16


def test_a_run_leaves_a_film_of_all_its_grids_and_a_long_one_is_thinned_out(faces):
    for epochs, frames in (2, 2), (3, 3):
        assert do(faces, 3, *SMALL, "--out", "run", "--epochs", epochs, "--sample_every", 1) == 0
        with Image.open("run/film.webp") as film:
            assert film.n_frames == frames and film.size == (266, 266) and film.info["loop"] == 0
            film.seek(frames - 1)
            last = film.convert("RGB").crop((2, 2, 66, 66))
        with Image.open(f"run/samples/epoch_{epochs:03}.png") as grid:
            lost = ImageStat.Stat(ImageChops.difference(last, grid.crop((2, 2, 66, 66)))).mean
        assert max(lost) < 12  # by WebP, which smooths noise
    Path("many").mkdir()
    train.save_film(Path("many"), Path("none.webp"))
    assert not Path("none.webp").exists()  # a run that ends before its first grid
    for epoch in range(250):
        Image.new("RGB", (530, 530), (255 * (epoch % 2), epoch, 0)).save(f"many/epoch_{epoch + 850}.png")
    Path("many/epoch_850_copy.png").write_bytes(Path("many/epoch_850.png").read_bytes())
    Path("many/epoch_1098.png").write_bytes(b"cut off")  # neither costs the film
    train.save_film(Path("many"), Path("film.webp"))
    with Image.open("film.webp") as film:
        assert 50 < film.n_frames <= 100
        film.seek(film.n_frames - 1)
        assert film.convert("RGB").getpixel((9, 9))[0] > 240


def test_a_signal_in_a_tick_that_saves_nothing_is_saved_for(faces, monkeypatch, capsys):
    tick = train.Records.tick

    def hurried(records, gan, images, last):
        records.recording = 1e9  # records took too long so far: no measure, no save
        tick(records, gan, images, last)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train.Records, "tick", hurried)
    with pytest.raises(SystemExit):
        do(faces, 3, *SMALL, "--out", "run", "--epochs", 9)
    step = checkpoint()["gan"]["step"]
    assert step > 1 and f"Stopped and saved at update {step} of" in capsys.readouterr().out
