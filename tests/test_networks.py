"""The networks against the report's tables, and the two starts."""

import re

import pytest
import torch
from conftest import SMALL, do, draw, refused
from PIL import Image

import train

# The rows of the report's torchsummary tables: layer, shape behind the batch, parameters.
def rows(block, channels, size, conv, count, activation):
    shape = f"{channels}, {size}, {size}"
    return [(conv, shape, count), ("BatchNorm2d", shape, 2 * channels), (activation, shape, 0), (block, shape, 0)]


G_BLOCKS = (512, 4, 819_200), (256, 8, 2_097_152), (128, 16, 524_288), (64, 32, 131_072)
D_BLOCKS = (64, 32, 3_072), (128, 16, 131_072), (256, 8, 524_288), (512, 4, 2_097_152)
G_TABLE = [row for c, size, count in G_BLOCKS for row in rows("G_block", c, size, "ConvTranspose2d", count, "ReLU")]
G_TABLE += [("ConvTranspose2d", "3, 64, 64", 3_072), ("Tanh", "3, 64, 64", 0)]
D_TABLE = [row for c, size, count in D_BLOCKS for row in rows("D_block", c, size, "Conv2d", count, "LeakyReLU")]
D_TABLE += [("Conv2d", "1, 1, 1", 8_192)]
G_TOTALS = ["3,576,704", "3,576,704", "0", "0.00", "3.94", "13.64", "17.58"]
D_TOTALS = ["2,765,696", "2,765,696", "0", "0.05", "3.75", "10.55", "14.35"]


def test_torchsummary_prints_the_reports_tables_row_by_row(capsys):
    train.print_networks(train.GAN(train.RECIPES[1], 0, torch.device("cpu")))
    printed = capsys.readouterr().out
    rows = re.findall(r"(\w+)-(\d+) +\[-1, ([\d, ]+)\] +([\d,]+)", printed)
    wanted = [(*row, i) for table in (G_TABLE, D_TABLE) for i, row in enumerate(table, 1)]
    assert [(name, shape, int(count.replace(",", "")), int(i)) for name, i, shape, count in rows] == wanted
    assert re.findall(r"(?:params|\(MB\)): ([\d.,]+)", printed) == G_TOTALS + D_TOTALS


@pytest.mark.parametrize("width", [32, 7, 1])
def test_fine_networks_have_a_layer_at_full_size(width):
    G, D = train.generator(9, width, networks="fine"), train.discriminator(width, "inner", networks="fine")
    half = (width + 1) // 2
    inside = G[:-2](torch.randn(2, 9, 1, 1))
    assert inside.shape == (2, half, 64, 64) and G[-2](inside).shape == (2, 3, 64, 64)
    assert D[0](inside[:, :1].expand(-1, 3, -1, -1)).shape == (2, half, 64, 64)
    assert D(G(torch.randn(2, 9, 1, 1))).shape == (2, 1, 1, 1)


def test_noise_scales_and_shifts_the_channels_of_each_picture_by_itself():
    G, plain, noise = train.generator(9, 8, 64, "modulated"), train.generator(9, 8, 64, "fine"), torch.randn(4, 9, 1, 1)
    plain.load_state_dict({name: value for name, value in G.state_dict().items() if "modulation" not in name})
    assert torch.equal(G(noise), plain(noise)), "it begins as nothing"
    block, x, z = G[3], torch.randn(4, 16, 8, 8), noise.flatten(1)
    torch.nn.init.normal_(block.modulation[2].weight), torch.nn.init.normal_(block.modulation[2].bias)
    hand = block.norm(block.conv(x))[2, 7] * (1 + block.modulation(z)[2, 7]) + block.modulation(z)[2, 15]
    assert torch.allclose(block(x, noise)[2, 7], hand.clamp(min=0), atol=1e-5) and hand.max() > 0
    G(noise).sum().backward()
    assert all(parameter.grad.any() for parameter in block.modulation.parameters())


def test_a_block_that_resizes_draws_no_chequers():
    torch.manual_seed(0)
    for resize in (False, True):
        flat = train.G_block(5, 1, resize=resize).conv(torch.ones(1, 5, 8, 8))[0, 0, 2:-2, 2:-2]
        assert flat.shape == (12, 12) and torch.allclose(flat, flat[0, 0], atol=1e-6) == resize


def test_a_negative_value_leaves_D_block_a_fifth_of_its_size():
    block = train.D_block(1, 1, "layer").eval()
    block.norm = torch.nn.Identity()
    with torch.no_grad():
        block.conv.weight.fill_(1 / 16)  # the mean of 4x4
        found = [block(torch.full((1, 1, 4, 4), value))[0, 0].mean().item() for value in (16.0, -16.0)]
    assert found == pytest.approx([9.0, -1.8])  # 9 of the 16 lie inside the padding


def test_a_critic_sees_each_picture_alone_and_contrast_without_a_norm_next_to_the_picture():
    torch.manual_seed(0)
    pictures = torch.randn(3, 3, 64, 64)
    others = torch.cat([pictures[:1], torch.randn(2, 3, 64, 64)])
    for norm, parameters, alone, blind in [
        ("batch", 2_765_696, False, True),
        ("layer", 2_765_696, True, True),
        ("inner", 2_765_696 - 2 * 64 + 64, True, False),  # 64 biases in place of a norm
    ]:
        D = train.discriminator(64, norm)
        assert sum(p.numel() for p in D.parameters()) == parameters
        assert torch.allclose(D(pictures)[0], D(others)[0], atol=1e-5) == alone, norm
        assert torch.allclose(D(pictures), D(pictures / 2), rtol=1e-3) == blind, norm


def test_normal_start_draws_every_parameter_and_dcgan_leaves_batch_norms_at_one_and_zero():
    torch.manual_seed(0)
    normal, dcgan = (train.init_weights(train.generator(100, 64), init) for init in ("normal", "dcgan"))
    for name, parameter in normal.named_parameters():
        assert abs(parameter.mean().item()) < 0.01, name
        assert 0.014 < parameter.std().item() < 0.026, name
    for name, parameter in dcgan.named_parameters():
        if "norm.weight" in name:
            assert (parameter == 1).all(), name
        elif "norm.bias" in name:
            assert (parameter == 0).all(), name
        else:
            assert 0.018 < parameter.std().item() < 0.022, name


@pytest.mark.parametrize("size", [32, 128])
def test_pictures_of_another_size_from_folder_to_grid(faces, size, capsys):
    assert do(faces, 3, *SMALL, "--out", "run", "--epochs", 1) == 0  # of 64, in the same cache
    command = [faces, 3, *SMALL, "--size", size, "--out", "other", "--save_as", "other.param"]
    assert do(*command, "--epochs", 1) == 0
    assert train.load_images(faces, size=size)[0].shape == (120, 3, size, size)
    G, D = train.generator(8, 4, size), train.discriminator(4, "layer", size)
    widest = {32: 16, 128: 64}[size]  # a stage less or more than 32 at 64 pixels and width 4
    assert G[0].conv.out_channels == D[-1].in_channels == widest and G[-2].in_channels == D[0].conv.out_channels == 4
    assert draw("other.param", "--count", 4, "--compare", faces, "--out", "grid.png") == 0
    with Image.open("grid.png") as grid, Image.open("other/samples/update_0000015.png") as whole:
        assert grid.size == (4 * (size + 2) + 2, size + 4) and whole.size == (8 * (size + 2) + 2,) * 2
    assert do(*command, "--epochs", 2) == 0
    with Image.open("other/film.webp") as film:
        assert film.size == (4 * (size + 2) + 2,) * 2
    assert "size 64 contradicts" in refused(capsys, *command, "--size", 64)
    assert "--size: invalid choice: 96" in refused(capsys, *command, "--size", 96)
