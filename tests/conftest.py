"""What the tests share: pictures, the two commands as a user starts them, and the same in this process; on the CPU."""

import csv
import importlib.util
import io
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

ROOT = Path(__file__).parent.parent
GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")  # for test_cuda.py alone
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported: other tests compare bits and count Python calls
# Several threads wait for each other wherever the machine has other work, and take its time while they wait.
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
# Without a .venv the commands take the `python3` of the PATH: let that be the one that runs the tests.
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

hiding = tempfile.TemporaryDirectory()  # holds a package of that name in which nothing is
Path(hiding.name, "torch_fidelity").mkdir()
Path(hiding.name, "torch_fidelity", "__init__.py").touch()
ENVIRONMENT["PYTHONPATH"] = os.pathsep.join([hiding.name, str(ROOT)])

import train  # noqa: E402

SMALL = ["--width", 4, "--latent_dim", 8, "--batch_size", 8]
COMMAND = ["f", 3, *SMALL, "--out", "run", "--epochs"]  # 2 updates in an epoch of the 16 pictures of the fixture `f`
TRAIN = ["bash", ROOT / "train.sh", *COMMAND]


def load_sampler():
    """test.py as a module, by its path, since `import test` may be Python's own package of that name."""
    spec = importlib.util.spec_from_file_location("sampler", ROOT / "test.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sampler = load_sampler()
create_judge = train.create_judge


def no_judge(*_, **__):
    raise ImportError


train.create_judge = sampler.create_judge = no_judge


@pytest.fixture
def judge(monkeypatch):
    """The judge's packages, which are hidden from all other tests: they take some seconds of each run."""
    monkeypatch.setitem(ENVIRONMENT, "PYTHONPATH", str(ROOT))
    for module in (train, sampler):
        monkeypatch.setattr(module, "create_judge", create_judge)


def do(*words, program=train.main, name="train.sh"):
    """Runs train.sh in this process -> exit status. A start of the real one takes seconds."""
    return train.run_program(program, name, [*map(str, words)])


draw = partial(do, program=sampler.main, name="test.sh")


def refused(capsys, *words, do=do):
    """The one line with which a command is refused."""
    capsys.readouterr()
    assert do(*words) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("test.sh: " if do is draw else "train.sh: "), err
    return err


def run(command, *args, cwd):
    """Runs `bash train.sh ...` or `bash test.sh ...` to its end -> (exit status, standard output, standard error)."""
    words = ["bash", str(ROOT / command), *map(str, args)]
    found = subprocess.run(words, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    return found.returncode, found.stdout, found.stderr


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """Each test; and one that hangs fails."""
    monkeypatch.chdir(tmp_path)
    train.say_once.cache_clear()
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("takes over four minutes"))
    signal.alarm(240)
    yield
    signal.alarm(0)


@pytest.fixture
def begin():
    """Starts a process that, with all that it starts, does not outlive the test."""
    begun, hangup = [], signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which they would ignore under nohup

    def begin(*words, **how):
        how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True, **how}
        process = subprocess.Popen([*map(str, words)], env=ENVIRONMENT, **how)
        begun.append(process)
        return process

    yield begin
    for process in begun:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    signal.signal(signal.SIGHUP, hangup)


def wait_for(process, words):
    """Reads its standard output up to the line with these words."""
    while words not in (line := process.stdout.readline()):
        assert line, process.communicate()[1]


def checkpoint(out="run"):
    return train.load(Path(out, "checkpoint.pt"))


def step(out="run"):
    """The update of a checkpoint that can be read."""
    return checkpoint(out)["gan"]["step"]


def rows(out="run"):
    """Those of losses.csv."""
    return [*csv.DictReader(Path(out, "losses.csv").read_text().splitlines())]


def save_generator(path, **more):
    train.save({"latent_dim": 8, "width": 4, "weights": train.generator(8, 4).state_dict(), **more}, Path(path))


def pictures(folder, count=16, green=50):
    """Plain pictures, each of a colour of its own."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", (8, 8), (i % 256, green, i // 256)).save(Path(folder, f"{i:03}.png"))


@pytest.fixture
def f(in_a_folder_of_its_own):
    """The folder f of 16 plain pictures in the test's own folder."""
    pictures("f")


def fails(number, usual, when):
    """As the function `usual`, but an OSError of that number where when(...) of the same arguments is true."""

    def failing(*args, **more):
        if when(*args):
            raise OSError(number, os.strerror(number))
        return usual(*args, **more)

    return failing


@pytest.fixture
def updates(monkeypatch):
    """A list that grows by one with every update."""
    done, update = [], train.GAN.update
    monkeypatch.setattr(train.GAN, "update", lambda *args, **more: done.append(0) or update(*args, **more))
    return done


@pytest.fixture
def clock(monkeypatch):
    """[seconds]: what time.perf_counter() says, which stands still unless a test adds to it."""
    now = [1000.0]
    monkeypatch.setattr(train.time, "perf_counter", lambda: now[0])
    return now


@pytest.fixture
def rng():
    """A random generator whose seed pytest shows if the test fails."""
    seed = random.randrange(10**6)
    print("seed of this test:", seed)
    return random.Random(seed)


@pytest.fixture(autouse=True)
def quick_curves(monkeypatch):
    """losses.png without its curves where a test trains in this process: they are most of a save; a command has."""
    png, mark = io.BytesIO(), PngInfo()
    mark.add_text("Software", train.SOFTWARE)
    Image.new("L", (600, 600)).save(png, "PNG", pnginfo=mark)

    def savefig(file, format, metadata):
        for half in (png.getvalue()[:500], png.getvalue()[500:]):
            file.write(half)
            time.sleep(0.005)  # drawing takes its time, and may be killed

    def subplots(rows, columns, **_):
        return SimpleNamespace(flat=[MagicMock() for _ in range(rows * columns)])

    figure = MagicMock(savefig=savefig, subplots=subplots)
    monkeypatch.setattr("matplotlib.figure.Figure", MagicMock(return_value=figure))


@pytest.fixture(scope="session")
def faces(tmp_path_factory):
    """A flat folder of 120 drawn faces."""
    from faces import draw_face

    folder = tmp_path_factory.mktemp("data") / "faces"
    folder.mkdir()
    for i in range(120):
        draw_face(0, i).save(folder / f"{i:03}.png")
    return folder
