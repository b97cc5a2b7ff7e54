"""What goes wrong ends with one line that names it, exit status 2, no traceback, and nothing lost."""

import gc
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL, checkpoint, do, draw, refused, run

import train


class Hostile:
    """Unpickled without care, it runs a command."""

    def __reduce__(self):
        return os.system, ("touch harmed",)


@pytest.fixture
def place(tmp_path):
    """A working directory with all sorts of things that are not what they should be."""
    Path("empty").mkdir()
    Path("texts").mkdir()
    Path("above/faces").mkdir(parents=True)
    Path("texts/a.jpg").write_text("no picture")
    Path("a_file").write_text("no folder")
    Path("loop").symlink_to("loop")
    Path("project").mkdir()
    Path("project/config.json").write_text("mine")
    good = {"latent_dim": 8, "width": 4, "weights": train.generator(8, 4).state_dict()}
    train.save(good, Path("good.param"))
    train.save({**good, "width": 5}, Path("other_width.param"))
    train.save({**good, "width": 10**9}, Path("huge_width.param"))
    train.save(good["weights"], Path("only_weights.param"))
    train.save([1, 2], Path("a_list.param"))
    Path("cut.param").write_bytes(Path("good.param").read_bytes()[:5000])
    Path("empty.param").touch()
    os.mkfifo("pipe.param")
    Path("a_run").mkdir()
    train.save(good, Path("a_run/Net_G.param"))
    Path("done").mkdir()
    for name in train.RUN_FILES:
        Path("done", name).touch()
    Path("drawn").mkdir()
    train.save_grid(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), Path("drawn/0.png"))
    torch.save(Hostile(), "hostile.param")
    Path("raw.param").write_bytes(pickle.dumps(Hostile()))
    return tmp_path


def contents(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@pytest.mark.parametrize(
    "argv, named",
    [
        ([], "ImageFolder"),
        (["missing", 1], "missing: no such folder"),
        (["empty", 1], "empty: no picture that Pillow can read among its 0 files; skipped none; name a folder of real"),
        (["texts", 1], "a.jpg (not an image that Pillow reads); unpack archives, convert pictures to JPEG or PNG"),
        (["a_file", 1], "a_file: is a file"),
        (["drawn", 1], "0.png (drawn by this program); name a folder of real pictures"),
        (["loop", 1], "loop"),
        (["", 1], "an empty name or value"),
        (["FACES", 1, "--out="], "an empty name or value"),
        (["FACES"], "gan_type"),
        (["FACES", 0], "gan_type: invalid choice: 0"),
        (["FACES", 7], "gan_type: invalid choice: 7"),
        (["FACES", "x"], "gan_type: invalid int value: 'x'"),
        (["FACES", 1, "--epochs", 0], "--epochs: invalid int from 1 to 1,000,000 value: '0'"),
        (["FACES", 1, "--epochs", "1.5"], "--epochs: invalid int from 1 to 1,000,000 value: '1.5'"),
        (["FACES", 1, "--batch_size", -4], "--batch_size: invalid int"),
        (["FACES", 1, "--width", 0], "--width"),
        (["FACES", 1, "--latent_dim", "nan"], "--latent_dim"),
        (["FACES", 1, "--lr", 0], "--lr: invalid float from"),
        (["FACES", 1, "--lr", "-0.1"], "--lr"),
        (["FACES", 1, "--lr", "inf"], "--lr: invalid float"),
        (["FACES", 1, "--lr", "nan"], "--lr: invalid float"),
        (["FACES", 1, "--gp_weight", "-1"], "--gp_weight"),
        (["FACES", 1, "--betas", 0.5, 1], "--betas: invalid float from 0 to 0.999999 value: '1'"),
        (["FACES", 2, "--betas", 0.5, 0.9], "--betas"),
        (["FACES", 1, "--seed", "-1"], "--seed"),
        (["FACES", 1, "--optimizer", "adagrad"], "--optimizer: invalid choice: 'adagrad'"),
        (["FACES", 1, "--loss", "hinge"], "--loss"),
        (["FACES", 1, "--init", "zeros"], "--init"),
        (["FACES", 3, "--d_norm", "instance"], "--d_norm: invalid choice"),
        (["FACES", 3, "--ema", 0.98], "--ema: invalid int from 0"),
        (["FACES", 3, "--gp_share", 0], "--gp_share: invalid float from 0.001"),
        (["FACES", 3, "--gp_reduction", "max"], "--gp_reduction"),
        (["FACES", 1, "--epoch", 3], "--epoch"),  # an option is never guessed
        (["FACES", 1, "--precision", "fp8"], "--precision: invalid choice: 'fp8'"),
        (["FACES", 1, "--precision", "fp16"], "--precision: invalid choice: 'fp16'"),
        (["FACES", 1, "--device", "tpu"], "--device tpu"),
        (["FACES", 1, "--device", "cuda:99"], "--device cuda:99"),
        (["FACES", 1, *SMALL, "--epochs", 1, "--out", "a_file"], "a_file"),
        (["FACES", 1, *SMALL, "--out", "project"], "project: holds config.json, but no checkpoint.pt"),
        (["FACES", 1, *SMALL, "--out", "a_run"], "a_run: holds Net_G.param, but no checkpoint.pt"),
        (["above/faces", 1, "--out", "above"], "--out above: holds the pictures of above/faces"),
        ([".", 1, "--out", ".", "--restart"], "--out .: holds the pictures of ."),
        ([".", 1, "--cache", "."], "--cache .: lies among the pictures of ."),
        (["FACES", 1, "--cache", "FACES/decoded/here"], "here: lies among the pictures of"),
    ],
)
def test_arguments_of_train(argv, named, place, faces, capsys):
    before = contents(Path())
    assert named in refused(capsys, *(str(word).replace("FACES", str(faces)) for word in argv))
    assert {path: data for path, data in contents(Path()).items() if ".cache" not in path.parts} == before


@pytest.mark.parametrize(
    "argv, named",
    [
        ([], "Net_G.param"),
        (["pipe.param"], "pipe.param: not a file"),
        (["missing.param"], "missing.param: no such file"),
        (["empty"], "empty: "),
        *[([f"{name}.param"], f"{name}.param: ") for name in
          ("other_width", "huge_width", "only_weights", "a_list", "cut", "empty", "hostile", "raw")],
        (["a_file"], "a_file: unreadable, damaged, or not a file of this program"),
        (["good.param", "--count", 0], "--count"),
        (["good.param", "--out", "picture.txt"], "--out picture.txt"),
        (["good.param", "--out", "a_file/x.png"], "a_file/x.png"),
        (["good.param", "--folder", "a_file"], "a_file"),
        (["good.param", "--compare", "missing"], "missing: no such folder"),
        (["good.param", "--compare", ""], "an empty name or value"),
        (["good.param", "--compare", "texts", "--weights", "a_file"], "--weights: they are inception's"),
        (["good.param", "--features", "inception"], "--features inception: of which pictures?"),
        (["good.param", "--count", 10_001], "--count 10001: a grid takes up to 10,000"),
        (["good.param", "--count", 1001, "--walk", "walk.webp"], "--count 1001: --walk shows up to 1,000"),
        (["a_run"], "a_run: not a file; name a_run/Net_G.param"),
    ],
)  # fmt: skip
def test_arguments_of_test(argv, named, place, capsys):
    before = contents(place)
    assert named in refused(capsys, *argv, do=draw)
    assert contents(place) == before, "a hostile file must not run, and nothing may be written"


@pytest.mark.parametrize("folder, reason", [("drawn", "0.png (drawn by"), ("done", "a run folder of")])
def test_pictures_of_ours_are_judged_by_their_generator(folder, reason, place, capsys):
    said = refused(capsys, folder, "--compare", "drawn", do=draw)
    assert f"{reason} this program); name a folder of real pictures (drawn ones are judged by their Net_G" in said


def test_test_sh_itself_says_it_in_one_line(place):
    status, out, err = run("test.sh", "hostile.param", cwd=place)
    assert status == 2 and out == "" and err.count("\n") == 1 and "hostile" in err
    assert not Path("harmed").exists()


def test_settings_that_contradict_the_checkpoint_are_refused_by_name(faces, place, capsys):
    begun = [faces, 1, *SMALL, "--epochs", 1, "--out", "run"]
    assert do(*begun) == 0
    kept = Path("run/checkpoint.pt").read_bytes()
    gc.disable()  # which may let go of the folder that a refused run has locked, or not
    try:
        for more in (["--ema", 9], ["--width", 8], ["--seed", 3], ["--betas", 0, 0.9], ["--init", "dcgan"]):
            assert f"{more[0]} " in refused(capsys, *begun, *more)
        assert "gan_type 2 contradicts" in refused(capsys, faces, 2, *begun[2:])
        assert ": --betas 0.5 0.999 carries on" in refused(capsys, *begun, "--betas", 0, 0.9)  # as one types it
        both = refused(capsys, *begun, "--ema", 9, "--d_norm", "layer")
        assert "--d_norm layer --ema 9 contradicts" in both and ": --d_norm batch --ema 0 carries on" in both
        assert do(*begun) == 0
    finally:
        gc.enable()
    assert Path("run/checkpoint.pt").read_bytes() == kept
    for harmed in ("cut.param", "hostile.param", "good.param"):
        Path("run/checkpoint.pt").write_bytes(Path(harmed).read_bytes())
        said = refused(capsys, *begun)
        assert "run/checkpoint.pt" in said and "--restart" in said
    assert not Path("harmed").exists()


def test_a_full_disk_ends_the_run_at_the_third_try_and_leaves_the_last_checkpoint(
    faces, tmp_path, monkeypatch, capsys
):
    command, path, slept = [faces, 1, *SMALL, "--epochs"], Path("runs/faces-1/checkpoint.pt"), []
    assert do(*command, 1) == 0
    kept = path.read_bytes()
    monkeypatch.setattr(train.time, "sleep", slept.append)
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(kept) // 2, usual[1]))
    try:
        capsys.readouterr()
        assert do(*command, 3) == 2
        last = capsys.readouterr().err.splitlines()[-1]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert "cannot write" in last and f"{path} (File too large)" in last and "free some space" in last
    assert slept[-2:] == [1, 1] and path.read_bytes() == kept and not list(tmp_path.rglob("*.part"))
    assert do(*command, 3) == 0 and "Carrying on at update 15 of 45" in capsys.readouterr().out


def test_losses_that_are_no_numbers_stop_the_run_before_it_saves(faces, capsys):
    assert do(faces, 2, *SMALL, "--epochs", 1, "--lr", 1e6) == 2
    err = capsys.readouterr().err
    assert "losses are not finite any more at update " in err and "nothing was saved" in err and "--lr" in err
    assert not Path("Net_G.param").exists() and not Path("runs/faces-2/checkpoint.pt").exists()


def test_the_first_bad_update_is_named():
    recipe = train.replace(train.RECIPES[1], width=4, latent_dim=8, batch_size=8)
    gan = train.GAN(recipe, 0, torch.device("cpu"))
    good, bad = torch.zeros(4), torch.tensor([0, torch.nan, 0, 0])
    gan.step = 22
    gan.check_finite(7 * [good])
    gan.step = 26
    with pytest.raises(FloatingPointError, match="update 23$"):
        gan.check_finite(7 * [good] + 4 * [bad])
    gan.check_finite(11 * [good])
    gan.D[2].norm.weight.data[1] = torch.inf  # losses are computed before the step that does this
    with pytest.raises(FloatingPointError, match="update 26$"):
        gan.check_finite(11 * [good])


def test_a_run_that_diverges_names_its_last_good_checkpoint(faces, capsys):
    command = [faces, 2, *SMALL, "--out", "run", "--epochs"]
    assert do(*command, 1) == 0
    path, state = Path("run/checkpoint.pt"), checkpoint()
    state["gan"]["D"]["2.norm.weight"][1] = torch.inf
    train.save(state, path)
    kept = path.read_bytes()
    capsys.readouterr()
    assert do(*command, 2) == 2
    err = capsys.readouterr().err
    assert "at update 16; run/checkpoint.pt is the last good one" in err and "--restart" in err
    assert path.read_bytes() == kept


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
                                   RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory")])  # fmt: skip
def test_exhausted_memory_names_the_remedy(error, capsys):
    def program(argv):
        raise error

    assert "--batch_size" in refused(capsys, do=partial(do, program=program))


def test_a_good_file_is_not_called_damaged_where_memory_runs_out(place, faces, capsys, monkeypatch):
    begun = [faces, 1, *SMALL, "--epochs", 1, "--out", "run"]
    assert do(*begun) == 0

    def exhausted(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    for owner, name in [(torch.nn.Module, "load_state_dict"), (torch, "load")]:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, exhausted)
            assert "out of memory" in refused(capsys, *begun)
            assert "out of memory" in refused(capsys, "good.param", do=draw)


def test_a_defect_of_ours_keeps_its_traceback():
    def program(argv):
        raise RuntimeError("cannot allocate a name for this layer: out of memory formats")

    with pytest.raises(RuntimeError):
        do(program=program)


def test_below_the_pytorch_that_loads_files_safely_test_sh_warns(place, monkeypatch, capsys):
    for version, warns in [("2.9.1+cu128", True), ("2.10.0", False)]:
        monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
        assert draw("good.param") == 0
        err = capsys.readouterr().err
        assert ("CVE-2026-24747" in err and err.count("\n") == 1) if warns else err == ""


@pytest.mark.parametrize(
    ("python", "said"),
    [
        ('-S "$@"', f"torch .*{re.escape(sys.executable)} -m pip install -r requirements.txt"),  # no site-packages
        ('-c "import sys; sys.version_info = (3, 9, 0)\n$2"', "too old: install Python 3.10"),  # $1 is -c
    ],
)
def test_a_package_that_is_missing_and_a_python_that_is_too_old_are_named(tmp_path, python, said):
    (tmp_path / "python3").write_text(f'#!/bin/sh\nexec "{sys.executable}" {python}\n')
    (tmp_path / "python3").chmod(0o755)
    for name in ("train.sh", "test.sh"):
        shutil.copy(ROOT / name, tmp_path)  # where there is no .venv
        environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
        words = ["bash", tmp_path / name, "x", "1"]
        found = subprocess.run(words, env=environment, capture_output=True, text=True)
        assert found.returncode == 2 and found.stderr.count("\n") == 1, found.stderr
        assert re.search(said, found.stderr)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a GPU that PyTorch cannot use, or none")
def test_a_gpu_that_cannot_be_driven_is_reported_and_the_cpu_used(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert train.pick_device("auto") == torch.device("cpu")
    said = capsys.readouterr().err
    assert "cannot use this GPU" in said and "torch<2.8" in said and said.count("\n") == 1
    monkeypatch.setattr(train, "WORLD_SIZE", 2)  # the other process would wait on its GPU for ever
    with pytest.raises(train.UserError, match="--device auto: .*; --device cpu works everywhere"):
        train.pick_device("auto")
