"""A CUDA graph does what its kernels do one by one: on a CUDA card alone, in a process of its own."""

import copy
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import train  # noqa: E402


def weights(network):
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def compare(folder, device, updates_of=train.cuda_graphed, d_steps=1, precision="fp32", batch_size=8):
    """Raises AssertionError unless each update of a GAN is, but for rounding, that of a twin which runs gan.update.

    The twin begins each update in the state of the GAN, since Adam makes of a difference in the last bit one as large
    as its step, within an update or two. Even so a share of the smallest gradients may change its sign: TF32 and two
    choices of kernels move the weights apart by some hundredths of the step, a wrong batch or noise by over a tenth.
    """
    recipe = replace(train.RECIPES[3], d_steps=d_steps, batch_size=batch_size, width=16)
    gan, twin = (train.GAN(recipe, 0, torch.device(device), train.PRECISIONS[precision]) for _ in range(2))
    images = train.load_images(folder)[0].repeat(5, 1, 1, 1).to(device)
    batches = train.real_batches(images, batch_size, 0, 0, gan.rng.device)
    update = updates_of(gan)
    for step in range(8 * d_steps):  # of each kind of turn the first three run without a graph
        turn_of_G, real = step % d_steps == d_steps - 1, next(batches)
        twin.load_state_dict(copy.deepcopy(gan.state_dict()))
        before = [weights(network) for network in (gan.G, gan.D)]
        losses, expected = update(real, turn_of_G), twin.update(real, turn_of_G)
        for name, network, other, old in zip("GD", (gan.G, gan.D), (twin.G, twin.D), before):
            new, moved = weights(network), name == "D" or turn_of_G
            length = (new - old).abs().mean()
            assert bool(length > 0) == moved, f"update {step}: {name} {'stands still' if moved else 'moved'}"
            difference = (new - weights(other)).abs().mean() / length.clamp(min=1e-12)
            assert difference < 0.1, f"update {step}: {name} is {difference:.3f} of its step from the twin"
        assert torch.equal(gan.rng.get_state(), twin.rng.get_state()), f"update {step}: other random numbers"
        assert losses.keys() == expected.keys()
        torch.testing.assert_close(losses, expected, rtol=0.05, atol=0.05)
        gan.step += 1
        gan.update_G_ema(batch_size)


def test_the_comparison_finds_a_graph_that_takes_the_first_batch_again(tmp_path, monkeypatch, faces):
    monkeypatch.chdir(tmp_path)
    seen = []

    def updates_of(gan):
        return lambda real, turn: seen.append(real) or gan.update(seen[0] if gan.step >= 4 else real, turn)

    with pytest.raises(AssertionError, match="update 4"):
        compare(faces, "cpu", updates_of)
    compare(faces, "cpu", lambda gan: gan.update, precision="bf16")


@pytest.mark.skipif(not shutil.which("nvidia-smi"), reason="needs a CUDA card")
@pytest.mark.parametrize("how", [[1, "fp32", 8], [3, "fp32", 8], [1, "bf16", 32], [1, "bf16", 512]], ids=str)
def test_a_cuda_graph_does_what_its_kernels_do_one_by_one(tmp_path, faces, how):
    from conftest import GPUS

    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    environment |= {} if GPUS is None else {"CUDA_VISIBLE_DEVICES": GPUS}
    words = [sys.executable, __file__, faces, *map(str, how)]
    found = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert found.returncode == 0, found.stderr
    assert "No CUDA graph" not in found.stderr


def test_the_script_for_a_card_runs_all_its_parts_without_one(tmp_path, faces):
    from conftest import ENVIRONMENT

    (tmp_path / "few").mkdir()
    for path in sorted(faces.iterdir())[:24]:
        shutil.copy(path, tmp_path / "few")
    words = ["bash", str(ROOT / "tests/on_a_card.sh"), "few", "out", "0.6", "--device", "cpu", "--width", "4"]
    words += ["--batch_size", "8", "--latent_dim", "8", "--epochs", "1"]
    subprocess.run(words, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, timeout=240)
    _, *parts = (tmp_path / "out/summary.txt").read_text().splitlines()
    assert len(parts) >= 7 and all(re.match(r"\w+: (held|cut off|skipped)\b", part) for part in parts), parts
    assert (tmp_path / "out/type3/Net_G.param").exists()


if __name__ == "__main__":
    _, pictures, steps, name, count = sys.argv
    compare(pictures, "cuda", d_steps=int(steps), precision=name, batch_size=int(count))
    with torch.autocast("cuda", train.PRECISIONS[name], enabled=name == "bf16"), torch.no_grad():
        layer, x = train.ResizedConv2d(64, 32, 3, bias=False).cuda(), torch.randn(8, 64, 16, 16, device="cuda")
        plain = torch.nn.functional.conv2d(x.repeat_interleave(2, 2).repeat_interleave(2, 3), layer.weight, padding=1)
        torch.testing.assert_close(layer(x), plain, rtol=0.05, atol=0.05)
