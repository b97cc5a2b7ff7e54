"""On a CUDA card alone, in a process of its own: a CUDA graph does what its kernels do one by one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.skipif(not shutil.which("nvidia-smi"), reason="needs a CUDA card")
@pytest.mark.parametrize("d_steps", [1, 3])
def test_a_cuda_graph_does_what_its_kernels_do_one_by_one(tmp_path, faces, d_steps):
    from conftest import GPUS

    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    environment |= {} if GPUS is None else {"CUDA_VISIBLE_DEVICES": GPUS}
    words = [sys.executable, __file__, faces, str(d_steps)]
    found = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert found.returncode == 0, found.stderr
    assert "No CUDA graph" not in found.stderr


def compare(folder, d_steps):
    """Trains with and without graphs, and compares the weights."""
    sys.path.insert(0, str(HERE.parent))
    import torch

    import train

    torch.backends.cudnn.deterministic = True
    columns = {"d_steps": d_steps, "batch_size": 8, "width": 16, "ema": 100, "epochs": 2}
    states, graphed = [], train.cuda_graphed
    for out in ("graph", "kernels"):

        def chosen(gan, out=out):
            update = graphed(gan) if out == "graph" else gan.update
            torch.backends.cudnn.benchmark = False  # two runs could find two kernels the fastest
            return update

        train.cuda_graphed = chosen
        train.train(folder, 3, device="cuda", precision="fp32", out=out, **columns)
        states.append(train.load(Path(out, "checkpoint.pt"))["gan"])
    for part in ("G", "D", "G_ema"):
        for name, value in states[0][part].items():
            assert torch.equal(value, states[1][part][name])
    assert torch.equal(states[0]["rng"], states[1]["rng"])


if __name__ == "__main__":
    compare(sys.argv[1], int(sys.argv[2]))
