"""Losses and penalties against values worked out by hand, and what one update moves."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import train

SIDE = math.sqrt(3 * 64 * 64)  # the norm of a picture whose every number is 1


def softplus(x):
    return math.log(1 + math.exp(x))


class Linear(nn.Module):
    """D(x) = a * mean(x): its gradient at any x is a / n everywhere, of norm |a| / SIDE."""

    def __init__(self, a):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(float(a)))

    def forward(self, x):
        return (self.a * x.mean(dim=(1, 2, 3))).view(-1, 1, 1, 1)


def test_bce_losses():
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-1.0, 0.0])
    wanted = torch.tensor([(softplus(-2) + softplus(-1)) / 2, math.log(2)])
    torch.testing.assert_close(train.bce_d_loss(real, fake), wanted)
    torch.testing.assert_close(train.bce_g_loss(fake), torch.tensor([softplus(1), math.log(2)]))
    summed = nn.BCEWithLogitsLoss(reduction="sum")  # as the report has it
    d_loss, g_loss, over_batch = train.LOSSES["bce"]
    assert over_batch(g_loss(fake)).item() == pytest.approx(summed(fake, torch.ones(2)).item())
    both = (summed(real, torch.ones(2)) + summed(fake, torch.zeros(2))) / 2
    assert over_batch(d_loss(real, fake)).item() == pytest.approx(both.item())


def test_wasserstein_losses():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-1.0, 1.5])
    d_loss, g_loss, over_batch = train.LOSSES["wasserstein"]
    assert over_batch(d_loss(real, fake)).item() == pytest.approx(0.25 - 1.25)
    assert over_batch(g_loss(fake)).item() == pytest.approx(-0.25)


def test_gradient_penalty_of_a_linear_critic_and_its_own_gradient():
    D = Linear(3 * SIDE)  # gradient of norm 3 everywhere: the penalty is (3 - 1)^2
    penalty = train.gradient_penalty(D, torch.randn(5, 3, 64, 64), torch.randn(5, 3, 64, 64))
    torch.testing.assert_close(penalty, torch.full((5,), 4.0))
    penalty.mean().backward()
    assert D.a.grad.item() == pytest.approx(2 * (3 - 1) / SIDE, rel=1e-4)


def test_gradient_penalty_mixes_each_pair_with_one_weight_of_its_own():
    def D(x):  # its gradient at x is x
        return x.square().sum(dim=(1, 2, 3)) / 2

    real, fake = torch.ones(64, 3, 64, 64), torch.zeros(64, 3, 64, 64)
    penalty = train.gradient_penalty(D, real, fake, torch.Generator().manual_seed(0))
    weights = (penalty.sqrt() + 1) / SIDE  # exact where e * SIDE > 1
    assert weights.unique().numel() > 60
    assert 0 <= weights.min() < 0.1 and 0.9 < weights.max() <= 1
    assert 0.4 < weights.mean() < 0.6


@pytest.mark.parametrize(
    "gp_weight, loss, gp_reduction",
    [(0.0, "bce", "mean"), (10.0, "bce", "mean"), (10.0, "bce", "sum"), (10.0, "wasserstein", "mean")],
)
def test_update_D_takes_the_step_of_the_formula(gp_weight, loss, gp_reduction):
    a, batch, lr = 1.5, 4, 0.01
    D = Linear(a)
    recipe = replace(train.RECIPES[2], gp_weight=gp_weight, loss=loss, lr=lr, gp_reduction=gp_reduction)
    real, fake = torch.ones(batch, 3, 64, 64), -torch.ones(batch, 3, 64, 64)  # logits a and -a
    logged = train.update_D(D, train.OPTIMIZERS["sgd"](D.parameters(), recipe), real, fake, recipe)
    if loss == "bce":  # a sum over the batch
        value, slope = softplus(-a), batch * -1 / (1 + math.exp(a))
    else:  # a mean over the batch
        value, slope = -2 * a, -2
    norm = a / SIDE
    slope += gp_weight * 2 * (norm - 1) / SIDE * (batch if gp_reduction == "sum" else 1)
    assert D.a.item() == pytest.approx(a - lr * slope, rel=1e-5)
    penalty = (norm - 1) ** 2 if gp_weight else 0
    torch.testing.assert_close(logged, torch.tensor([value, penalty, a, -a]), rtol=1e-4, atol=1e-5)


def test_real_fake_and_mixed_pictures_pass_through_D_one_after_the_other():
    seen = []

    class Watched(Linear):
        def forward(self, x):
            seen.append(x.detach().clone())
            return super().forward(x)

    D, recipe = Watched(1), train.RECIPES[2]
    real, fake = torch.ones(4, 3, 64, 64), -torch.ones(4, 3, 64, 64)
    train.update_D(D, train.OPTIMIZERS["sgd"](D.parameters(), recipe), real, fake, recipe)
    assert [len(x) for x in seen] == [4, 4, 4]
    assert torch.equal(seen[0], real) and torch.equal(seen[1], fake) and seen[2].abs().max() < 1


def networks(recipe):
    torch.manual_seed(0)
    G, D = train.generator(8, 4), train.discriminator(4)
    return G, D, *(train.OPTIMIZERS[recipe.optimizer](net.parameters(), recipe) for net in (G, D))


def copy(network):
    return [parameter.detach().clone() for parameter in network.parameters()]


def moved(network, before):
    return [not torch.equal(now, then) for now, then in zip(network.parameters(), before)]


@pytest.mark.parametrize("gan_type", train.RECIPES)
def test_each_update_moves_every_parameter_of_its_own_network_and_none_of_the_other(gan_type):
    recipe = train.RECIPES[gan_type]
    G, D, optimizer_G, optimizer_D = networks(recipe)
    real, fake = torch.rand(8, 3, 64, 64), G(torch.randn(8, 8, 1, 1))
    before_G, before_D = copy(G), copy(D)
    train.update_D(D, optimizer_D, real, fake.detach(), recipe)
    assert all(moved(D, before_D)) and not any(moved(G, before_G))
    before_D = copy(D)
    train.update_G(G, D, optimizer_G, fake, recipe)
    assert all(moved(G, before_G)) and not any(moved(D, before_D))


def test_D_learns_to_tell_one_batch_from_another():
    recipe = replace(train.RECIPES[1], lr=0.001)
    G, D, _, optimizer_D = networks(recipe)
    real, fake = torch.rand(16, 3, 64, 64) * 2 - 1, G(torch.randn(16, 8, 1, 1)).detach()
    losses = [train.update_D(D, optimizer_D, real, fake, recipe)[0].item() for _ in range(40)]
    assert 0.3 < losses[0] < 3
    assert 0 < losses[-1] < 0.05


def movements(gan_type, precision):
    """What one update of each network adds to its weights, by SGD, so that it is in proportion to the gradient."""
    recipe = replace(train.RECIPES[gan_type], optimizer="sgd", lr=0.001)
    torch.manual_seed(0)
    G, D = train.generator(16, 16), train.discriminator(16, recipe.d_norm)
    for network in (G, D):
        train.init_weights(network, recipe.init).precision = precision
    optimizer_G, optimizer_D = (train.OPTIMIZERS["sgd"](network.parameters(), recipe) for network in (G, D))
    scaler = torch.amp.GradScaler("cpu", 16.0, enabled=precision == torch.float16)
    rng = torch.Generator().manual_seed(1)
    real, fake = torch.rand(16, 3, 64, 64, generator=rng) * 2 - 1, G(train.draw_noise(16, 16, rng))
    before = copy(D), copy(G)
    logged = train.update_D(D, optimizer_D, real, fake.detach(), recipe, rng, scaler)
    loss = train.update_G(G, D, optimizer_G, fake, recipe, scaler)
    assert {fake.dtype, logged.dtype, loss.dtype, D[0].conv.weight.dtype} == {torch.float32}
    moves = []
    for network, weights in zip((D, G), before):
        pairs = zip(network.parameters(), weights)
        moves.append(torch.cat([(now.detach() - then).flatten() for now, then in pairs]))
    return moves


@pytest.mark.parametrize("gan_type, precision", [(1, "bf16"), (2, "bf16"), (3, "bf16"), (1, "fp16"), (3, "fp16")])
def test_an_update_in_lower_precision_moves_the_weights_as_one_in_float32_does(gan_type, precision):
    exact = movements(gan_type, torch.float32)
    for found, wanted in zip(movements(gan_type, train.PRECISIONS[precision]), exact):
        assert 0.002 < (found - wanted).norm() / wanted.norm() < 0.2
        assert 0.95 < found.norm() / wanted.norm() < 1.05


def test_a_network_multiplies_in_its_precision_only_while_it_trains():
    torch.manual_seed(0)
    D, x = train.discriminator(8), torch.randn(4, 3, 64, 64)
    seen = []
    D[1].conv.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    exact = D.eval()(x)
    D.precision = torch.bfloat16
    assert torch.equal(D(x), exact) and D.train()(x).dtype == torch.float32
    assert seen == [torch.float32, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("native, wanted", [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_is_bfloat16_where_the_processor_has_it(monkeypatch, native, wanted):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    assert train.pick_precision("auto", torch.device("cpu")) == wanted
    assert train.pick_precision("auto", torch.device("mps")) == torch.float32
    assert train.pick_precision("fp16", torch.device("cpu")) == torch.float16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
@pytest.mark.parametrize("d_steps", [1, 3])
def test_a_cuda_graph_does_what_its_kernels_do_one_by_one(tmp_path, faces, monkeypatch, capsys, d_steps):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    columns = {"d_steps": d_steps, "batch_size": 8, "width": 16, "average": 0.9, "epochs": 2}
    states = []
    for out in ("graph", "kernels"):
        if out == "kernels":
            monkeypatch.setattr(train, "captured", lambda update, rng: update)
        train.train(faces, 3, device="cuda", precision="fp32", out=out, **columns)
        states.append(train.load(tmp_path / out / "checkpoint.pt"))
    assert "No CUDA graph" not in capsys.readouterr().err
    for part in ("G", "D", "average"):
        for name, value in states[0][part].items():
            torch.testing.assert_close(value, states[1][part][name], rtol=1e-3, atol=1e-4)
    assert torch.equal(states[0]["rng"], states[1]["rng"])
