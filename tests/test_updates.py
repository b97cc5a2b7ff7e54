"""Losses and penalties against values worked out by hand, and what one update moves."""

import math
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

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


class Square(Linear):
    """D(x) = a * |x|^2 / 2: its gradient at x is a * x."""

    def forward(self, x):
        return (self.a * x.square().sum(dim=(1, 2, 3)) / 2).view(-1, 1, 1, 1)


def test_bce_losses():
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-1.0, 0.0])
    wanted = torch.tensor([(softplus(-2) + softplus(-1)) / 2, math.log(2)])
    d_loss, g_loss, over_batch = train.LOSSES["bce"]
    torch.testing.assert_close(d_loss(real, fake), wanted)
    torch.testing.assert_close(g_loss(fake), torch.tensor([softplus(1), math.log(2)]))
    summed, over_batch = nn.BCEWithLogitsLoss(reduction="sum"), train.REDUCTIONS[over_batch]  # as the report has it
    assert over_batch(g_loss(fake)).item() == pytest.approx(summed(fake, torch.ones(2)).item())
    both = (summed(real, torch.ones(2)) + summed(fake, torch.zeros(2))) / 2
    assert over_batch(d_loss(real, fake)).item() == pytest.approx(both.item())


def test_gradient_penalty_of_a_linear_critic_and_its_own_gradient():
    D = Linear(3 * SIDE)  # gradient of norm 3 everywhere: the penalty is (3 - 1)^2
    penalty = train.gradient_penalty(D, torch.randn(5, 3, 64, 64), torch.randn(5, 3, 64, 64))
    torch.testing.assert_close(penalty, torch.full((5,), 4.0))
    penalty.mean().backward()
    assert D.a.grad.item() == pytest.approx(2 * (3 - 1) / SIDE, rel=1e-4)


@pytest.mark.parametrize("share, wanted", [(1.0, 0.125), (0.5, 0.0), (0.6, 0.25 / 3)])
def test_the_penalty_takes_its_share_of_the_batch(share, wanted):
    recipe = replace(train.RECIPES[3], gp_share=share)
    norms = torch.tensor([1.0, 1.0, 0.5, 0.5])  # of D's gradients, so the penalties are 0, 0, 0.25, 0.25
    real = (norms / SIDE).view(4, 1, 1, 1).expand(4, 3, 64, 64)
    D = Square(1)
    logged = train.update_D(D, train.OPTIMIZERS["adam"](D.parameters(), recipe), real, real, recipe)
    assert logged["gradient_penalty"].item() == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("mirror, turned", [(0, (0, 1)), (0.5, (16, 49)), (1, (64, 65))])
def test_each_real_picture_is_mirrored_by_a_chance_of_its_own_and_no_drawn_one_is(mirror, turned, monkeypatch):
    real, seen = torch.arange(64.0).expand(64, 3, 64, 64) / 64, []  # dark to the left
    monkeypatch.setattr(train, "update_D", lambda D, optimizer, *pictures: seen.extend(pictures[:2]) or {})
    gan = train.GAN(replace(train.RECIPES[3], width=4, latent_dim=8, mirror=mirror), 0, torch.device("cpu"))
    G, noise = deepcopy(gan.G), torch.Generator().manual_seed(0)
    gan.update(real, turn_of_G=False)
    flipped = [picture[0, 0, 0].item() > 0 for picture in seen[0]]
    assert sum(flipped) in range(*turned)
    assert all(torch.equal(seen[0][i], real[i].flip(2) if flip else real[i]) for i, flip in enumerate(flipped))
    if mirror:
        torch.rand(64, generator=noise)  # of the mirror
    assert torch.equal(seen[1], G(train.draw_noise(64, 8, noise)))


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
    D, seen = Linear(a), []
    D.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().clone()))
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
    wanted = {"d_loss": value, "gradient_penalty": penalty, "real_logits": a, "fake_logits": -a}
    assert {name: number.item() for name, number in logged.items()} == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    assert [len(x) for x in seen] == ([4, 4, 4] if gp_weight else [4, 4]), "real, fake and mixed, one after the other"
    assert torch.equal(seen[0], real) and torch.equal(seen[1], fake) and all(x.abs().max() < 1 for x in seen[2:])


def copy(network):
    return [parameter.detach().clone() for parameter in network.parameters()]


def moved(network, before):
    return [not torch.equal(now, then) for now, then in zip(network.parameters(), before)]


@pytest.mark.parametrize("gan_type", train.RECIPES)
def test_each_update_moves_every_parameter_of_its_own_network_and_none_of_the_other(gan_type):
    recipe = train.RECIPES[gan_type]
    torch.manual_seed(0)
    G, D = train.generator(8, 4), train.discriminator(4)
    optimizer_G, optimizer_D = (train.OPTIMIZERS[recipe.optimizer](net.parameters(), recipe) for net in (G, D))
    real, fake = torch.rand(8, 3, 64, 64), G(torch.randn(8, 8, 1, 1))
    before_G, before_D = copy(G), copy(D)
    train.update_D(D, optimizer_D, real, fake.detach(), recipe)
    assert all(moved(D, before_D)) and not any(moved(G, before_G))
    before_D = copy(D)
    train.update_G(G, D, optimizer_G, fake, recipe)
    assert all(moved(G, before_G)) and not any(moved(D, before_D))


@pytest.mark.parametrize("gan_type", [1, 2, 3])
def test_an_update_in_lower_precision_moves_the_weights_as_one_in_float32_does(gan_type):
    """By SGD, which moves them in proportion to the gradient."""
    recipe = replace(train.RECIPES[gan_type], optimizer="sgd", lr=0.001, mirror=0, width=16, latent_dim=16)
    real, moves = torch.rand(16, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1, []
    for precision in (torch.float32, torch.bfloat16):
        gan = train.GAN(recipe, 0, torch.device("cpu"), precision)
        before = copy(gan.D), copy(gan.G)
        logged = gan.update(real, turn_of_G=True)
        assert logged.keys() == {"d_loss", "gradient_penalty", "real_logits", "fake_logits", "g_loss"}
        assert all(value.shape == () and value.dtype == torch.float32 for value in logged.values())
        moves.append([torch.cat([(now.detach() - then).flatten() for now, then in zip(network.parameters(), weights)])
                      for network, weights in zip((gan.D, gan.G), before)])  # fmt: skip
    for wanted, found in zip(*moves):
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


@pytest.mark.parametrize("native, wanted", [(True, "bf16"), (False, "fp32")])
def test_auto_is_bfloat16_where_the_processor_has_it(monkeypatch, native, wanted):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    assert train.pick_precision("auto", torch.device("cpu")) == wanted
    assert train.pick_precision("auto", torch.device("mps")) == "fp32"
    assert train.pick_precision("fp32", torch.device("cpu")) == "fp32"


class Scaled(Linear):
    """G(x) = a * x."""

    def forward(self, x):
        return self.a * x


@pytest.mark.parametrize("loss", ["bce", "wasserstein"])
def test_update_G_takes_the_step_of_the_formula(loss):
    a, b, batch, lr = 1.5, 0.5, 4, 0.01
    G, D = Scaled(b), Linear(a)  # the logit of each fake is a b, its slope in b is a
    recipe = replace(train.RECIPES[2], loss=loss, lr=lr)
    fake = G(torch.ones(batch, 3, 64, 64))
    logged = train.update_G(G, D, train.OPTIMIZERS["sgd"](G.parameters(), recipe), fake, recipe)
    if loss == "bce":  # a sum over the batch
        value, slope = softplus(-a * b), batch * -a / (1 + math.exp(a * b))
    else:  # a mean over the batch
        value, slope = -a * b, -a
    assert G.a.item() == pytest.approx(b - lr * slope, rel=1e-5)
    assert logged.item() == pytest.approx(value, rel=1e-5) and D.a.grad is None


def test_the_optimizers_take_the_rates_of_the_recipe():
    weights = [nn.Parameter(torch.zeros(1))]
    recipe = replace(train.RECIPES[3], lr=0.125, betas=(0.25, 0.75))
    (adam,) = train.OPTIMIZERS["adam"](weights, recipe).param_groups
    assert (adam["lr"], adam["betas"], adam["weight_decay"]) == (0.125, (0.25, 0.75), 0)
    (sgd,) = train.OPTIMIZERS["sgd"](weights, recipe).param_groups
    assert (sgd["lr"], sgd["momentum"], sgd["weight_decay"]) == (0.125, 0, 0)


def test_a_run_carries_on_from_a_device_of_another_memory_layout_as_from_its_own():
    recipe = replace(train.RECIPES[3], width=4, latent_dim=8, batch_size=4)
    real = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    gans = [train.GAN(recipe, 0, torch.device("cpu")) for _ in range(3)]
    gans[0].step = 1
    gans[0].update(real, turn_of_G=True)
    state = deepcopy(gans[0].state_dict())
    other = deepcopy(state)
    for name in ("optimizer_G", "optimizer_D"):  # contiguous, as on mps
        for moments in other[name]["state"].values():
            moments |= {key: value.contiguous() for key, value in moments.items()}
    for gan, saved in zip(gans[1:], (state, other)):
        gan.load_state_dict(saved)
        gan.update(real, turn_of_G=True)
    for one, two in zip(gans[1].G.parameters(), gans[2].G.parameters()):
        assert torch.equal(one, two)


class FakeGraphs:
    """Stands in for torch.cuda where there is no card: "records" by running, and fails at the given recording."""

    def __init__(self, monkeypatch, fails_at):
        self.recordings, self.replays, self.fails_at = 0, 0, fails_at
        stubs = {"synchronize": lambda *_: None, "Stream": lambda *_: None, "set_stream": lambda *_: None,
                 "current_stream": lambda: None, "graph_pool_handle": lambda: (0, 1), "graph": self.graph,
                 "CUDAGraph": lambda: self}  # fmt: skip
        for name, stub in stubs.items():
            monkeypatch.setattr(torch.cuda, name, stub)

    def register_generator_state(self, rng):
        pass

    def replay(self):
        self.replays += 1

    @contextmanager
    def graph(self, graph, pool, stream):
        assert pool == (0, 1), "one pool for both kinds of turn"
        self.recordings += 1
        yield
        if self.recordings == self.fails_at:
            raise RuntimeError("no room to record")


@pytest.mark.parametrize("fails_at", [None, 2])
def test_graphs_are_recorded_for_both_kinds_of_turn_or_for_none(monkeypatch, capsys, fails_at):
    graphs, runs, cleared = FakeGraphs(monkeypatch, fails_at), [], []

    rng = SimpleNamespace(device=torch.device("cuda"), state=0, get_state=lambda: rng.state)
    rng.set_state = lambda state: setattr(rng, "state", state)
    network = SimpleNamespace(zero_grad=lambda set_to_none: cleared.append(set_to_none))

    def update(real, turn_of_G):
        rng.state += 1
        runs.append(turn_of_G)
        return {"d_loss": torch.tensor(float(real))}

    graphed = train.cuda_graphed(SimpleNamespace(rng=rng, G=network, D=network, update=update))
    for step in range(20):  # D alone, D and G, D alone, ...
        graphed(torch.tensor(step), step % 2 == 1)
    err = capsys.readouterr().err
    if fails_at is None:
        assert (graphs.recordings, graphs.replays, len(runs)) == (2, 14, 8) and err == ""
    else:  # 6 as they are, one recorded and replayed, one that fails, then all as they are
        assert (graphs.recordings, graphs.replays) == (2, 1) and len(runs) == 6 + 1 + 1 + 13
        assert err.count("\n") == 1 and "no room to record" in err and cleared == [True, True]
        assert rng.state == len(runs) - 1, "the random numbers of the recording that failed are drawn again"
