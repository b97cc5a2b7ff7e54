"""What goes wrong ends with one line that names it, exit status 2, no traceback, and nothing lost."""

import os
import pickle
import resource
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import COMMAND, ENVIRONMENT, ROOT, SMALL, do, draw, pictures, refused, save_generator, step

import train


class Hostile:
    """Unpickled without care, it runs a command."""

    def __reduce__(self):
        return os.system, ("touch harmed",)


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """All sorts of things that are not what they should be, and a finished run."""
    folder, here = tmp_path_factory.mktemp("things"), Path.cwd()
    os.chdir(folder)
    for name in ("empty", "hidden", "texts", "above/faces", "project", "a_run", "done", "drawn"):
        Path(name).mkdir(parents=True)
    pictures("f")
    Path("hidden/.a.png").write_bytes(Path("f/000.png").read_bytes())
    Path("texts/a.jpg").write_text("no picture")
    Path("a_file").write_text("no folder")
    Path("loop").symlink_to("loop")
    Path("project/config.json").write_text("mine")
    save_generator("good.param")
    good = train.load("good.param")
    train.save({**good, "width": 5}, Path("other_width.param"))
    train.save({**good, "width": 10**9}, Path("huge_width.param"))
    train.save(good["weights"], Path("only_weights.param"))
    train.save([1, 2], Path("a_list.param"))
    Path("cut.param").write_bytes(Path("good.param").read_bytes()[:5000])
    Path("empty.param").touch()
    os.mkfifo("pipe.param")
    train.save(good, Path("a_run/Net_G.param"))
    for name in train.RUN_FILES:
        Path("done", name).touch()
    train.save_grid(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), Path("drawn/0.png"))
    torch.save(Hostile(), "hostile.param")
    Path("raw.param").write_bytes(pickle.dumps(Hostile()))
    assert do(*COMMAND, 1) == 0
    for name in ("cut", "hostile", "good", "a_list"):
        Path(name).mkdir()
        shutil.copy(f"{name}.param", Path(name, "checkpoint.pt"))
    state = train.load("run/checkpoint.pt")
    del state["config"]["mirror"]
    Path("older").mkdir(), train.save(state, Path("older/checkpoint.pt"))
    os.chdir(here)
    return folder


@pytest.fixture
def place(things, monkeypatch):
    monkeypatch.chdir(things)


def contents(folder):
    left_out = {".cache", ".lock"}
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*") if not left_out & {*path.parts}}


RUN = ["f", 3, *SMALL, "--epochs", 1, "--out", "run"]  # it is finished
TRAIN = [  # words of train.sh, and what the line must name
    ([], ["ImageFolder"]),
    (["missing", 1], ["missing"]),
    (["empty", 1], ["empty", "no pictures"]),
    (["hidden", 1], ["hidden", "no pictures"]),
    (["texts", 1], ["texts", "a.jpg"]),
    (["a_file", 1], ["a_file"]),
    (["drawn", 1], ["drawn", "0.png", "this program"]),
    (["done", 1], ["done", "this program"]),
    (["loop", 1], ["loop"]),
    (["f", 1, "--out", "loop"], ["loop"]),
    (["f"], ["gan_type"]),
    *[(["f", gan_type], ["gan_type", str(gan_type)]) for gan_type in (0, 7, "x")],
    *[(["f", 1, option, value], [option, str(value)]) for option, value in [
        ("--epochs", 0), ("--epochs", 1.5), ("--batch_size", -4), ("--width", 0), ("--latent_dim", "nan"), ("--lr", 0),
        ("--lr", -0.1), ("--lr", "inf"), ("--lr", "nan"), ("--gp_weight", -1), ("--seed", -1), ("--ema", 0.98),
        ("--gp_share", 0), ("--optimizer", "adagrad"), ("--precision", "fp16"),
        ("--device", "tpu"), ("--device", "cuda:99"), ("--out", "a_file"), ("--out", "project"), ("--out", "a_run"),
        ("--save_as", "f"), ("--save_as", "pipe.param"), ("--cache", "a_file"), ("--minutes", 0),
    ]],
    (["f", 1, "--epoch", 3], ["--epoch"]),  # an option is never guessed
    (["f", 1, "--betas", 0.5, 1], ["--betas", "1"]),
    (["f", 2, "--betas", 0.5, 0.9], ["--betas", "--optimizer adam"]),
    (["f", 1, "--gp_share", 0.5], ["--gp_share", "--gp_weight"]),
    (["above/faces", 1, "--out", "above"], ["--out above", "above/faces"]),
    (["f", 1, "--out", ".", "--restart"], ["--out ."]),
    (["f", 1, "--cache", "f"], ["--cache f"]),
    (["f", 1, "--cache", "f/decoded/here"], ["--cache f/decoded/here"]),
    (["f", 1, "--save_as", "f/model.pt"], ["--save_as f/model.pt"]),  # else it would be listed among the pictures
    (["f", 1, "--save_as", "a_file"], ["--save_as a_file"]),  # it might be a program
    *[([*RUN, "--save_as", f"run/{name}"], ["--save_as", f"run/{name}"]) for name in
      ("checkpoint.pt", "Net_G_best.param", "samples", "samples/update_0000001.png")],
    *[([*RUN, f"--{name}", value], [f"{name} {value} ", f"{name} {then} ", "run/checkpoint.pt", "--restart", "--out"])
      for name, value, then in [("ema", 9, 50000), ("width", 8, 4), ("seed", 3, 0), ("init", "normal", "dcgan")]],
    ([*RUN, "--ema", 9, "--d_norm", "layer"], ["ema 9", "d_norm layer", "ema 50000", "d_norm inner"]),
    (["f", 4, *RUN[2:]], ["gan_type 4", "gan_type 3", "run/checkpoint.pt"]),
    *[(["f", 3, *SMALL, "--out", name], [f"{name}/checkpoint.pt", "--restart"]) for name in
      ("cut", "hostile", "good", "a_list", "older")],
]  # fmt: skip
TEST = [  # the same of test.sh
    ([], ["Net_G.param"]),
    *[([name], [name]) for name in ("pipe.param", "missing.param", "a_run/missing", "empty", "a_file", "loop")],
    *[([f"{name}.param"], [f"{name}.param"]) for name in
      ("other_width", "huge_width", "only_weights", "a_list", "cut", "empty", "hostile", "raw")],
    (["a_run"], ["a_run/Net_G.param"]),
    *[(["good.param", option, value], [option, str(value)]) for option, value in [
        ("--count", 0), ("--count", 10_001), ("--out", "picture.txt"), ("--walk", "walk.mp4"), ("--folder", "f"),
    ]],
    (["good.param", "--out", "a_file/x.png"], ["a_file/x.png"]),
    (["good.param", "--folder", "a_file"], ["a_file"]),
    (["good.param", "--compare", "missing"], ["missing"]),
    (["good.param", "--compare", "texts", "--weights", "a_file"], ["--weights", "--features inception"]),
    (["good.param", "--features", "inception"], ["--features", "--compare", "--nearest"]),
    (["good.param", "--count", 1001, "--walk", "walk.webp"], ["--count 1001"]),
    (["good.param", "--best", 5], ["--best", "--compare"]),
    (["good.param", "--compare", "f", "--best", 2, "--walk", "w.gif"], ["--walk"]),
    *[([folder, "--compare", "f"], [folder, "this program"]) for folder in ("drawn", "done")],
]  # fmt: skip


@pytest.mark.parametrize("program, words, named", [*((do, *case) for case in TRAIN), *((draw, *case) for case in TEST)])
def test_it_is_refused_in_one_line_that_names_it(program, words, named, place, capsys):
    before = contents(Path())
    said = refused(capsys, *words, do=program)
    assert all(name in said for name in named), said
    assert contents(Path()) == before, "a hostile file must not run, and nothing may be written"


def test_the_same_from_python_is_an_error_that_can_be_caught(f):
    for wrong in ({"gan_type": 9}, {"gan_type": 2, "betas": (0, 0.9)}, {"gan_type": 3, "device": "tpu"}):
        with pytest.raises(train.UserError, match=str([*wrong.values()][-1]) if len(wrong) == 1 else "--"):
            train.train("f", **wrong)


def test_a_full_disk_ends_the_run_at_its_last_save_and_leaves_the_last_checkpoint(faces, tmp_path, capsys):
    command, path = [faces, 1, *SMALL, "--epochs"], Path("runs/faces-1/checkpoint.pt")
    assert do(*command, 1) == 0
    kept = path.read_bytes()
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(kept) // 2, usual[1]))
    try:
        capsys.readouterr()
        assert do(*command, 3) == 2
        last = capsys.readouterr().err.splitlines()[-1]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert f"{path} (File too large)" in last
    assert path.read_bytes() == kept and not list(tmp_path.rglob("*.part"))
    assert do(*command, 3) == 0 and "Carrying on at update 15 of 45" in capsys.readouterr().out


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
                                   RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory")])  # fmt: skip
def test_exhausted_memory_names_the_remedy_and_a_defect_of_ours_keeps_its_traceback(error, capsys):
    def program(argv):
        raise error

    assert "--batch_size" in refused(capsys, do=partial(do, program=program))
    error = RuntimeError("cannot allocate a name for this layer: out of memory formats")
    with pytest.raises(RuntimeError):
        do(program=program)


def test_a_good_file_is_not_called_damaged_where_memory_runs_out(f, capsys, monkeypatch):
    assert do(*COMMAND, 1) == 0

    def exhausted(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    for owner, name in [(torch.nn.Module, "load_state_dict"), (torch, "load")]:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, exhausted)
            assert "--batch_size" in refused(capsys, *COMMAND, 2)
            assert "out of memory" in refused(capsys, "Net_G.param", do=draw)


def test_a_checkpoint_of_other_layers_is_refused(f, capsys, monkeypatch):
    assert do(*COMMAND, 1) == 0
    monkeypatch.setitem(train.D_block.NORMS, "layer", torch.nn.BatchNorm2d)
    assert "checkpoint.pt" in refused(capsys, *COMMAND, 2) and step() == 2


def test_below_the_pytorch_that_loads_files_safely_test_sh_warns(place, monkeypatch, capsys):
    for version, warns in [("2.9.1+cu128", True), ("2.10.0", False)]:
        monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
        assert draw("good.param") == 0
        err = capsys.readouterr().err
        assert ("CVE-2026-24747" in err and err.count("\n") == 1) if warns else err == ""


# ----------------------------------------------------------------------------------------------- packages and Python


def installed(name, version, *needs):
    """A folder for PYTHONPATH in which another version of a package seems to be installed."""
    folder = Path("site", f"{name}-{version}.dist-info")
    folder.mkdir(parents=True)
    needs = "".join(f"Requires-Dist: {need}\n" for need in needs)
    Path(folder, "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}")


TORCH = torch.__version__.partition("+")[0]


@pytest.mark.parametrize(
    "script, package, code, named",
    [
        ("train.py", ("pillow", "9.5.0"), None, ["pillow", "9.5.0", "10.1"]),
        ("train.py", ("torchvision", "0.99.0", "torch (==9.9.9)"), None, ["torch", TORCH, "9.9.9"]),
        ("train.py", ("torch", "2.1.0"), None, ["torch", "2.1.0", "2.6"]),
        ("test.py", None, "raise ImportError('No module named filelock')", ["filelock"]),
        ("train.py", None, "raise OSError('libc10.so: cannot open shared object file')", ["libc10.so"]),
    ],
)
def test_a_package_that_is_missing_too_old_or_does_not_fit_is_one_line(script, package, code, named):
    """Before any work, with the version that is there, the one that is needed, and the command that installs it."""
    installed(*package or ("nothing", "1"))
    if code:
        Path("site/filelock.py").write_text(code)
    words = [sys.executable, ROOT / script, "f", "3"]
    environment = {**os.environ, "PYTHONPATH": str(Path("site").resolve())}
    found = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stdout, found.stderr.count("\n")) == (2, "", 1), found.stderr
    for words in (*named, f"-m venv {ROOT}/.venv", f"{ROOT}/.venv/bin/pip install -r {ROOT}/requirements.txt"):
        assert words in found.stderr


def scripts(pythons):
    """train.sh and test.sh where there is no .venv, beside a train.py that says who runs it; -> their environment."""
    for name in ("train.sh", "test.sh"):
        shutil.copy(ROOT / name, ".")
        Path(name).with_suffix(".py").write_text("import os, sys; print(os.environ['WHICH'], *sys.argv[1:])")
    Path("bin").mkdir()
    for tool in ("dirname", "readlink", "bash", "env"):
        Path("bin", tool).symlink_to(shutil.which(tool))
    for name, code in pythons.items():
        path = Path("bin", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\nWHICH={path.name} {code}\n")
        path.chmod(0o755)
    return {**ENVIRONMENT, "PATH": str(Path("bin").resolve())}


WORKS = f'exec "{sys.executable}" "$@"'
OLD = f'exec "{sys.executable}" -c "import sys; sys.version_info = (3, 9, 0)\n$2"'  # $1 is -c


@pytest.mark.parametrize(
    "pythons, which",
    [
        ({"python": WORKS}, "python"),  # conda in Git Bash
        ({"python3": WORKS, "python": "exit 1"}, "python3"),
        ({"python3": "exit 49", "python": WORKS}, "python"),  # what Windows puts there opens its store
        ({"python3": OLD, "python": WORKS}, "python"),
        ({"python3": WORKS, "../.venv/Scripts/python.exe": WORKS}, "python.exe"),  # Windows
        ({"python3": OLD}, None),
        ({}, None),
    ],
)
def test_train_sh_finds_the_python_that_starts_and_is_new_enough(pythons, which):
    environment = scripts(pythons)
    for name in ("train.sh", "test.sh"):
        found = subprocess.run(["bash", name, "f", "3"], env=environment, capture_output=True, text=True, timeout=60)
        if which:
            assert (found.returncode, found.stdout, found.stderr) == (0, f"{which} f 3\n", "")
        else:
            assert (found.returncode, found.stdout) == (2, "") and found.stderr.count("\n") == 1
            assert "Python" in found.stderr and "3.10" in found.stderr


# ----------------------------------------------------------------------------------- the generator that is shipped


def test_where_no_generator_is_yet_test_sh_draws_with_that_of_the_project_and_then_with_ones_own(f, capsys):
    assert draw("Net_G.param", "--count", 1) == 0
    (said,) = capsys.readouterr().err.splitlines()
    assert "none here yet: drawing with" in said and str(ROOT / "Figures/Net_G.param") in said
    before = Path("samples.png").read_bytes()
    for other in ("Net_H.param", "./x/Net_G.param", "Net_G_best.param"):
        assert other.removeprefix("./") in refused(capsys, other, do=draw)
    assert do(*COMMAND, 1) == 0
    capsys.readouterr()
    assert draw("Net_G.param", "--count", 1) == 0 and capsys.readouterr().err == ""
    assert Path("samples.png").read_bytes() != before


def test_a_plain_training_changes_no_tracked_file():
    if not (ROOT / ".git").exists():
        pytest.skip("needs a clone")
    made = "Net_G.param", "Net_G_before_20260101_000000_000000.param", "Net_G_demo.param", "samples.png", "runs/x/y"
    git = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True)
    found = git(["git", "check-attr", "eol", "train.sh", "test.sh"])
    assert found.stdout.count(": eol: lf") == 2, "also in a clone made with core.autocrlf=true"
    found = git(["git", "check-ignore", *made, ".cache/x"])
    assert found.stdout.split() == [*made, ".cache/x"]
    assert not git(["git", "ls-files", *made]).stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a GPU that PyTorch cannot use, or none")
def test_a_gpu_that_cannot_be_driven_is_named(f, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    said = refused(capsys, *COMMAND, 1)
    assert "--device cuda" in said and "--device cpu" in said or "--device auto" in said and "--device cpu" in said
