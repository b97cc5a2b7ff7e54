"""What the tests share: a folder of drawn faces, and the two commands as a user runs them, on the CPU."""

import importlib.util
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")  # for test_cuda.py alone
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported: other tests compare bits and count Python calls
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
# Without a .venv the commands take the `python3` of the PATH: let that be the one that runs the tests.
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def start(command, *args, cwd, **how):
    """Starts `bash train.sh ...` or `bash test.sh ...` in `cwd`."""
    words = ["bash", str(ROOT / command), *map(str, args)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, cwd=cwd, env=ENVIRONMENT, **pipes, **how)


def run(command, *args, cwd, **how):
    """Runs it to its end -> (exit status, standard output, standard error)."""
    process = start(command, *args, cwd=cwd, **how)
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def load_sampler():
    """test.py as a module, by its path, since `import test` may be Python's own package of that name."""
    spec = importlib.util.spec_from_file_location("sampler", ROOT / "test.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sampler = load_sampler()


@pytest.fixture
def rng():
    """A random generator whose seed pytest shows if the test fails."""
    seed = random.randrange(10**6)
    print("seed of this test:", seed)
    return random.Random(seed)


@pytest.fixture(scope="session")
def faces(tmp_path_factory):
    """A flat folder of 120 drawn faces."""
    from faces import draw_face

    folder = tmp_path_factory.mktemp("data") / "faces"
    folder.mkdir()
    for i in range(120):
        draw_face(0, i).save(folder / f"{i:03}.png")
    return folder
