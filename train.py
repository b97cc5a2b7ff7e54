"""Trains a GAN on a folder of pictures and learns to draw new ones, 64x64 pixels, on a CPU or a GPU.

    bash train.sh ImageFolder 1                  # DCGAN
    bash train.sh ImageFolder 2                  # the report's WGAN-GP: BCE, SGD and a gradient penalty
    bash train.sh ImageFolder 3                  # WGAN-GP: a critic, held by its gradient penalty
    bash train.sh ImageFolder 1 --batch_size 32 --lr 0.0005 --width 32       # a small folder, or no GPU
    bash train.sh ImageFolder 1 --epochs 200     # the same command carries on; more epochs extend the run
    bash test.sh Net_G.param                     # draws with what was trained
    bash train.sh --help                         # every option, with its unit and default

The file reads from top to bottom: recipes, networks, images, losses and updates, quality, records, train, command line.

Papers: [1] Goodfellow et al. 2014, Generative Adversarial Networks, arXiv:1406.2661
        [2] Radford et al. 2015, Unsupervised Representation Learning with DCGANs, arXiv:1511.06434
        [3] Arjovsky et al. 2017, Wasserstein GAN, arXiv:1701.07875
        [4] Gulrajani et al. 2017, Improved Training of Wasserstein GANs, arXiv:1704.00028
        [5] Karras et al. 2018, Progressive Growing of GANs, arXiv:1710.10196
"""

import argparse
import copy
import csv
import hashlib
import io
import itertools
import json
import math
import os
import re
import signal
import sys
import time
import warnings
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

for package in "torch", "torchvision", "PIL", "matplotlib", "torchsummary", "tqdm":  # some are imported late, for speed
    if not find_spec(package):
        raise SystemExit(f"{package} is not installed here: python3 -m pip install -r requirements.txt")

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn, update_bn
from torch.utils.data import DataLoader
from tqdm import tqdm


class UserError(Exception):
    """What the user can mend: one line that names the file or the option, and the remedy."""


# ---------------------------------------------------------------------------------------------- recipes


def column(text, *allowed, **default):
    """A field of Recipe: what its option's help says, and the words or the (low, high) that the option takes."""
    return field(metadata={"help": text, "allowed": allowed}, **default)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training but the pictures and the seed. Each field is an option of the same name."""

    loss: str = column("of D and G, from logits: a row of LOSSES", "bce", "wasserstein")
    gp_weight: float = column("weight of the gradient penalty in D's loss, lambda of [4]; 0: none", 0, 10**6)
    optimizer: str = column("of D and of G: a row of OPTIMIZERS", "adam", "sgd")
    lr: float = column("its step size; with bce, a sum over the batch, it belongs to the batch size", 1e-9, 10**6)
    betas: tuple = column("Adam's two decay rates", 0, 0.999999)
    d_steps: int = column("updates of D, a batch each, before G's turn", 1, 10**6)
    batch_size: int = column("pictures in one update", 1, 10**6)
    d_norm: str = column("in D's blocks; layer: over one picture, so that no picture sees another", "batch", "layer")
    init: str = column("normal: every parameter from N(0, 0.02); dcgan: norms at 1 and 0", "normal", "dcgan")
    average: float = column("decay of the average of G's weights that is drawn and saved; 0: G itself", 0, 0.999999)
    g_steps: int = column("updates of G in its turn", 1, 10**6, default=1)
    gp_reduction: str = column("of the penalty over the batch", "mean", "sum", default="mean")
    epochs: int = column("passes over the folder; more of them extend a run", 1, 10**6, default=100)
    latent_dim: int = column("numbers in a noise vector", 1, 10**4, default=100)
    width: int = column("channels next to the picture; each stage has twice as many", 1, 1024, default=64)


RECIPES = {
    #          loss           gp_weight  optimizer  lr      betas         d_steps  batch_size d_norm   init      average
    1: Recipe("bce",          0.0,       "adam",    0.005,  (0.5, 0.999), 1,       512,       "batch", "normal", 0.0),
    2: Recipe("bce",          10.0,      "sgd",     0.001,  (0.5, 0.999), 1,       512,       "batch", "normal", 0.0),
    3: Recipe("wasserstein",  10.0,      "adam",    0.0005, (0.0, 0.9),   1,       64,        "layer", "dcgan",  0.98),
    4: Recipe("wasserstein",  10.0,      "adam",    0.0001, (0.0, 0.9),   5,       64,        "layer", "dcgan",  0.0),
}  # fmt: skip
TITLES = {
    1: "DCGAN",
    2: "the report's WGAN-GP: its small penalty delays the collapse that SGD at this rate comes to without it",
    3: "WGAN-GP, with settings that get there sooner",
    4: "WGAN-GP with the settings of its paper",
}


# --------------------------------------------------------------------------------------------- networks


class G_block(nn.Module):
    """Transposed convolution, batch norm, ReLU: [B, in, H, W] -> [B, out, 2H, 2W] (1x1 -> 4x4 at stride 1)."""

    def __init__(self, in_channels, out_channels, stride=2, padding=1):
        super().__init__()
        self.conv = nn.ConvTranspose2d(in_channels, out_channels, 4, stride, padding, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        self.activation = nn.ReLU()

    def forward(self, x):
        return self.activation(self.norm(self.conv(x)))


class LayerNorm(nn.GroupNorm):
    """Over one picture: [B, C, H, W] -> the same. bfloat16 stays so, or the penalty takes longer."""

    def forward(self, x):
        dtype = x.dtype if x.dtype == torch.bfloat16 else torch.float32  # float16 would overflow there
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x.to(dtype), 1, self.weight.to(dtype), self.bias.to(dtype), self.eps)


class D_block(nn.Module):
    """Convolution, norm ("batch" or "layer"), leaky ReLU: [B, in, H, W] -> [B, out, H/2, W/2]."""

    def __init__(self, in_channels, out_channels, norm="batch"):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 4, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels) if norm == "batch" else LayerNorm(1, out_channels)
        self.activation = nn.LeakyReLU(0.2)

    def forward(self, x):
        return self.activation(self.norm(self.conv(x)))


class Network(nn.Sequential):
    """Layers in a row. In training they multiply in `precision`; what goes in and what comes out is float32."""

    precision, layout = torch.float32, torch.contiguous_format

    def forward(self, x):
        lower = self.training and self.precision != torch.float32
        with torch.autocast(x.device.type, self.precision, enabled=lower, cache_enabled=False):
            return super().forward(x.contiguous(memory_format=self.layout)).float()


def generator(latent_dim=100, width=64):
    """Noise [B, latent_dim, 1, 1] ~ N(0, 1) -> pictures [B, 3, 64, 64] in [-1, 1] ([2], figure 1)."""
    return Network(
        G_block(latent_dim, width * 8, stride=1, padding=0),  #       512 x  4 x  4 at width 64
        G_block(width * 8, width * 4),  #                             256 x  8 x  8
        G_block(width * 4, width * 2),  #                             128 x 16 x 16
        G_block(width * 2, width),  #                                  64 x 32 x 32
        nn.ConvTranspose2d(width, 3, 4, 2, 1, bias=False),  #           3 x 64 x 64
        nn.Tanh(),
    )


def discriminator(width=64, norm="batch"):
    """Pictures [B, 3, 64, 64] in [-1, 1] -> logits [B, 1, 1, 1]; there is no Sigmoid, the loss has it.

    With norm "layer" it is a critic ([4], section 4): the penalty is a picture's own, and so must its gradient be.
    """
    return Network(
        D_block(3, width, norm),  #                                    64 x 32 x 32 at width 64
        D_block(width, width * 2, norm),  #                           128 x 16 x 16
        D_block(width * 2, width * 4, norm),  #                       256 x  8 x  8
        D_block(width * 4, width * 8, norm),  #                       512 x  4 x  4
        nn.Conv2d(width * 8, 1, 4, bias=False),  #                      1 x  1 x  1
    )


def init_weights(network, init):
    """Draws the start in place. The report's rate of 0.005 depends on "normal", where batch norms are small too."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) or init == "normal":
            for parameter in module.parameters(recurse=False):
                nn.init.normal_(parameter, 0, 0.02)
    return network


def draw_noise(count, latent_dim, rng):
    """z ~ N(0, 1), [count, latent_dim, 1, 1], on the device of the random generator."""
    return torch.randn(count, latent_dim, 1, 1, generator=rng, device=rng.device)


def print_networks(recipe):
    """Prints both tables from throw-away copies: torchsummary's forward pass moves batch-norm statistics."""
    from torchsummary import summary

    summary(generator(recipe.latent_dim, recipe.width), (recipe.latent_dim, 1, 1), device="cpu")
    summary(discriminator(recipe.width, recipe.d_norm), (3, 64, 64), device="cpu")


# ----------------------------------------------------------------------------------------------- images

IMAGE_BYTES = 3 * 64 * 64


def list_files(folder):
    """[[name relative to the folder, bytes, time changed in ns], ...], sorted by name, from any depth.

    Hidden files and folders are left out, as `ls` does, and so are run folders; what is no regular file has -1 bytes.
    """
    files, seen = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if os.path.realpath(parent) in seen or "checkpoint.pt" in names:  # a link back up, or pictures that we drew
            folders.clear()
            continue
        seen.add(os.path.realpath(parent))
        for path in (os.path.join(parent, name) for name in names if not name.startswith(".")):
            stat = os.stat(path) if os.path.isfile(path) else None
            changed = max(stat.st_mtime_ns, stat.st_ctime_ns) if stat else 0  # ctime: what may be read may change, too
            files.append([os.path.relpath(path, folder), stat.st_size if stat else -1, changed])
    return sorted(files)


def decode(path):
    """One file -> the IMAGE_BYTES bytes of its picture, uint8 [64, 64, 3], RGB, upright, on white."""
    with Image.open(path) as image:
        image.draft(None, (128, 128))  # a large JPEG is decoded at a half, a quarter or an eighth, but no smaller
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith(("I", "F")):  # 16 bits and more: scaled here, since convert() would clip
            low, high = (0, 65535) if image.mode != "F" else image.getextrema()
            scale = 255 / max(high - low, 1e-9)
            image = image.convert("F").point(lambda value: value * scale + (0.5 - low * scale)).convert("L")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB").resize((64, 64), Image.BILINEAR).tobytes()  # the report's Resize: no crop


def try_decode(path, size):
    """(pixels, None), or (None, why the file cannot be used): one bad file must not end a run."""
    if size <= 0:
        return None, "empty" if size == 0 else "not a file"
    try:
        return decode(path), None
    except UnidentifiedImageError:
        return None, "not an image"
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return None, f"more than {Image.MAX_IMAGE_PIXELS:,} pixels"
    except Exception as error:  # each of Pillow's decoders has errors of its own
        return None, "truncated" if "truncated" in str(error) else f"damaged: {error}"


def decode_some(folder, files):
    """What try_decode says of each of some files."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Pillow says of a picture that it reads all the same
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return [try_decode(folder / name, size) for name, size, _ in files]


def decode_all(folder, files, path):
    """Decodes every file into `path`; returns what an index of it must say."""
    skipped, decode_here = [], partial(decode_some, folder)
    processes = min(torch.get_num_threads(), len(files) // 200)  # threads would wait for each other
    batches = DataLoader(files, batch_size=50, num_workers=processes, collate_fn=decode_here)
    with replacing(path) as out, progress_bar(len(files), desc="decoding") as bar:
        for (name, _, _), (pixels, why) in zip(files, itertools.chain.from_iterable(batches)):
            bar.update()
            if pixels:
                out.write(pixels)
            else:
                skipped.append(f"{name} ({why})")
    return {"files": files, "count": len(files) - len(skipped), "skipped": skipped}


def load_images(folder, device="cpu"):
    """Any folder of pictures -> uint8 [N, 3, 64, 64], on the GPU if half of what is free there holds it.

    Decoded once, on all cores, into .cache/, and memory-mapped from there until a file's name, size or time changes.
    Raises UserError if the folder is missing, is a file, or holds no picture that Pillow reads.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: {'is a file' if folder.exists() else 'no such folder'}; name a folder of pictures")
    files = list_files(folder)
    stem = Path(".cache", hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16])
    cache, index = stem.with_suffix(".rgb"), stem.with_suffix(".json")
    try:
        found = json.loads(index.read_bytes())
        fresh = found["files"] == files and cache.stat().st_size == found["count"] * IMAGE_BYTES
    except (OSError, ValueError, LookupError, TypeError):
        fresh = False
    if not fresh:
        index.unlink(missing_ok=True)  # an index must never stand beside pixels that it does not describe
        found = decode_all(folder, files, cache)
        with replacing(index) as file:
            file.write(json.dumps(found).encode())
    count, skipped = found["count"], found["skipped"]
    more = f" and {len(skipped) - 10:,} more (named in {index})" if len(skipped) > 10 else ""
    names = f"skipped {len(skipped):,}: {', '.join(skipped[:10])}{more}" if skipped else "skipped none"
    if not count:
        raise UserError(f"{folder}: no picture that Pillow can read among its {len(files):,} files; {names}")
    print(f"{folder}: found {count:,} images, {names}", flush=True)
    images = torch.from_file(str(cache), size=count * IMAGE_BYTES, dtype=torch.uint8).view(count, 64, 64, 3)
    images = images.permute(0, 3, 1, 2)  # channels last in memory, as the networks want it
    fits = torch.device(device).type == "cuda" and images.nbytes < torch.cuda.mem_get_info(device)[0] / 2
    return images.to(device) if fits else images


def shuffled(count, seed, epoch):
    """The order of an epoch, a function of seed and epoch alone, so that a resumed run finds its place again."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def real_batch(images, index, device):
    """Images uint8 [N, 3, 64, 64] at index [B] -> float [B, 3, 64, 64] in [-1, 1] on the device."""
    batch = images[index]
    if device.type == "cuda" and not batch.is_cuda:
        batch = batch.pin_memory()  # so that the copy does not hold up the loop
    return batch.to(device, non_blocking=True).float().div_(127.5).sub_(1)


# ----------------------------------------------------------------------------------- losses and updates


def bce(logits, label):
    """BCEWithLogitsLoss of each logit [B] against one label, 1 for real and 0 for fake: [B]."""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label), reduction="none")


def bce_d_loss(real_logits, fake_logits):
    """Logits [B], [B] -> D's loss of each pair [B], halved as in the report's source ([1], equation 1)."""
    return (bce(real_logits, 1) + bce(fake_logits, 0)) / 2


def bce_g_loss(fake_logits):
    """Logits [B] -> G's loss of each fake [B]: D should take it for real ([1], section 3)."""
    return bce(fake_logits, 1)


def wasserstein_d_loss(real_logits, fake_logits):
    """Logits [B], [B] -> the critic's loss of each pair [B], any sign ([4], equation 3, first two terms)."""
    return fake_logits - real_logits


def wasserstein_g_loss(fake_logits):
    """Logits [B] -> G's loss of each fake [B], any sign ([4], algorithm 1, line 12)."""
    return -fake_logits


LOSSES = {  #      D's loss            G's loss            over the batch
    "bce":         (bce_d_loss,         bce_g_loss,         torch.sum),
    "wasserstein": (wasserstein_d_loss, wasserstein_g_loss, torch.mean),
}  # fmt: skip

OPTIMIZERS = {  # fused, capturable: as one kernel, without a word to the CPU
    "adam": lambda weights, recipe: torch.optim.Adam(weights, recipe.lr, recipe.betas, fused=True, capturable=True),
    "sgd": lambda weights, recipe: torch.optim.SGD(weights, recipe.lr, fused=True),
}


NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)  # of gradients: float16 alone needs one


def gradient_penalty(D, real, fake, rng=None):
    """(||gradient of D at x||_2 - 1)^2 for each x = e real + (1 - e) fake, e ~ U[0, 1] ([4], equation 3): [B]."""
    e = torch.rand(len(real), 1, 1, 1, generator=rng, device=real.device)
    mixed = (e * real + (1 - e) * fake).requires_grad_()
    (gradient,) = torch.autograd.grad(D(mixed).sum(), mixed, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1) ** 2


def descend(loss, network, optimizer, scaler):
    """One step of the network's optimizer; other networks that the loss came through get no gradient."""
    optimizer.zero_grad()
    scaler.scale(loss).backward(inputs=list(network.parameters()))
    scaler.step(optimizer)
    scaler.update()


def update_D(D, optimizer_D, real, fake, recipe, rng=None, scaler=NO_SCALER):
    """One step of D on pictures [B, 3, 64, 64]; `fake` comes detached.

    Real, fake and mixed pictures go through D in passes of their own: batch norm makes one joint pass another thing.
    Returns, per image and on the device: loss without penalty, penalty, mean logit of real and of fake: [4].
    """
    d_loss, _, over_batch = LOSSES[recipe.loss]
    real_logits, fake_logits = D(real).flatten(), D(fake).flatten()
    losses = d_loss(real_logits, fake_logits)
    penalty = gradient_penalty(D, real, fake, rng) if recipe.gp_weight else torch.zeros_like(losses)
    # In the report the BCE is a sum over the batch and the penalty beside it a mean; in [4] both are means.
    loss = over_batch(losses) + recipe.gp_weight * getattr(penalty, recipe.gp_reduction)()
    descend(loss, D, optimizer_D, scaler)
    return torch.stack([losses.mean(), penalty.mean(), real_logits.mean(), fake_logits.mean()]).detach()


def update_G(G, D, optimizer_G, fake, recipe, scaler=NO_SCALER):
    """One step of G on its own pictures [B, 3, 64, 64], not detached. Returns the loss per image, on the device."""
    _, g_loss, over_batch = LOSSES[recipe.loss]
    losses = g_loss(D(fake).flatten())
    descend(over_batch(losses), G, optimizer_G, scaler)
    return losses.mean().detach()


# ---------------------------------------------------------------------------------------------- quality

PICTURES, PATCHES, PROJECTIONS = 1024, 64, 128  # compared: pictures at most, patches of each, lines through them


def laplacian_pyramid(pictures):
    """Pictures [N, 3, 64, 64] -> what they hold at 64x64, at 32x32 and, all that is left, at 16x16 pixels."""
    levels, level = [], pictures.float()
    for _ in range(2):
        smaller = F.avg_pool2d(level, 2)
        levels.append(level - F.interpolate(smaller, scale_factor=2, mode="bilinear"))
        level = smaller
    return [*levels, level]


def projected_patches(pictures):
    """Pictures uint8 [N, 3, 64, 64] -> of each pyramid level, sorted: [3, PROJECTIONS, N x PATCHES] ([5], section 5).

    Patches of 7x7 from fixed random places, each channel over all of them at mean 0 and variance 1, along fixed lines.
    """
    rng, levels = torch.Generator().manual_seed(0), []
    for level in laplacian_pyramid(pictures):
        count, _, size, _ = level.shape
        y, x = torch.randint(size - 6, (2, count, PATCHES), generator=rng).to(level.device)
        patches = level.unfold(2, 7, 1).unfold(3, 7, 1)[torch.arange(count)[:, None], :, y, x].flatten(0, 1)
        spread, mean = torch.std_mean(patches, (0, 2, 3), keepdim=True)
        patches = (patches - mean) / spread.clamp(min=0.1)  # in grey values: a plain surface is no noise
        lines = F.normalize(torch.randn(PROJECTIONS, 3 * 7 * 7, generator=rng), dim=1).to(level.device)
        lines = lines @ patches.flatten(1).T
        # On a CPU NumPy sorts ten times as fast as PyTorch.
        levels.append(lines.sort(dim=1).values if lines.is_cuda else torch.from_numpy(np.sort(lines.numpy(force=True))))
    return torch.stack(levels)


def mean_distance(pictures):
    """The mean Euclidean distance of two of the pictures [N, 3, 64, 64], in grey values."""
    vectors = pictures.flatten(1).float()
    return (torch.cdist(vectors, vectors).sum() / max(1, len(vectors) * (len(vectors) - 1))).item()


def sliced_wasserstein(one, other):
    """Of two results of projected_patches: mean over levels and lines, times 1000 as in [5]; 0 if they are the same."""
    return 1000 * (one - other).abs().mean().item()


def real_reference(images, device):
    """What quality() compares with, from a fixed draw of the folder: count, patches, mean_distance and floor.

    The floor is the distance of as many other real pictures: less cannot be hoped for.
    """
    count = max(1, min(PICTURES, len(images) // 2))
    order = shuffled(len(images), 0, 0).to(images.device)
    draw, other = (images[index].to(device) for index in (order[:count], order[-count:]))
    patches = projected_patches(draw)
    floor = sliced_wasserstein(patches, projected_patches(other))
    return SimpleNamespace(count=count, patches=patches, mean_distance=mean_distance(draw), floor=floor)


def quality(pictures, real):
    """As many pictures, uint8 [N, 3, 64, 64], as the reference `real` counts -> three columns of losses.csv:

    their distance from the real ones, its floor, and their diversity: 1 as varied as the folder, near 0 all alike.
    """
    pictures = pictures[: real.count].to(real.patches.device)
    distance = sliced_wasserstein(projected_patches(pictures), real.patches)
    diversity = mean_distance(pictures) / real.mean_distance if real.mean_distance else 1.0  # one picture has none
    return {"distance": distance, "floor": real.floor, "diversity": diversity}


ALIKE, CERTAIN = 0.25, 8.0  # signs of collapse: a share of the folder's diversity, a logit


def sign_of_collapse(rows, loss):
    """What the newest row of losses.csv says of a collapse, in words, or None. `loss` is a row of LOSSES."""
    *before, now = rows
    if loss == "bce" and now["real_logits"] > CERTAIN and now["fake_logits"] < -CERTAIN:
        earlier = [row["g_loss"] for row in before if math.isfinite(row["g_loss"])]  # nan where G had no turn
        if earlier and now["g_loss"] > earlier[-1]:
            return f"D's mean logits are beyond +-{CERTAIN:g} and G's loss grows"
    if now["distance"] is not None:
        measured = [row for row in before if row["distance"] is not None]
        fell = any(row["diversity"] >= 2 * ALIKE for row in measured)  # the first pictures of a slow start are pale
        if now["diversity"] < ALIKE and (fell or now["updates"] >= 5000):
            return f"diversity {now['diversity']:.2f}, below {ALIKE:g} of the folder's"
        best = max(now["floor"], min((row["distance"] for row in measured), default=math.inf))
        if now["distance"] > 2 * best:
            return f"distance {now['distance']:.1f}, over twice the best so far"


# ---------------------------------------------------------------------------------------------- records

PART = ".face-gan.part"  # what the name of a half-written file of ours ends in
LOGGED = ["d_loss", "gradient_penalty", "real_logits", "fake_logits", "g_loss"]  # per image: update_D's, update_G's


def progress_bar(total, done=0, **how):
    """A tqdm bar over images, for what takes over a second; where it meets no terminal it is a line every 30 s."""
    if sys.stderr.isatty():
        how |= {"mininterval": 1, "dynamic_ncols": True}
    else:  # lines for a log, without the returns and blanks that draw one bar over the other
        lines = SimpleNamespace(write=lambda text: text.strip() and print(text.strip(), file=sys.stderr), flush=bool)
        shape = "{desc}: {percentage:.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
        how |= {"mininterval": 30, "bar_format": shape, "file": lines}
    return tqdm(total=total, initial=done, unit="img", unit_scale=True, miniters=1, delay=1, **how)


@contextmanager
def replacing(path):
    """A file to write that takes the place of `path` once it is whole and on the disk: never half a file."""
    part = path.with_name(f"{path.name}.{os.getpid()}{PART}")  # two runs may decode one folder at the same time
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        remedy = "what was saved before is intact; free some space or choose another place, then run the same again"
        raise UserError(f"cannot write {path} ({error.strerror or error}): {remedy}") from error
    finally:
        with suppress(OSError):
            part.unlink()


def save(what, path):
    """torch.save, whole or not at all."""
    buffer = io.BytesIO()  # a full disk must come as an OSError, not as whatever torch's writer makes of it
    torch.save(what, buffer)
    with replacing(path) as file:
        file.write(buffer.getbuffer())


def load(path):
    """What `save` wrote, on the CPU. Raises UserError for anything else; no file can make it run code."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: {'not a' if os.path.exists(path) else 'no such'} file; train.sh makes one")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch raises a dozen kinds, some of them pages long
        raise UserError(f"{path}: unreadable, damaged, or not a file of this program") from None


def load_generator(path, device="cpu"):
    """The generator of a Net_G.param, in eval mode, with the width and latent size that are stored in it."""
    stored = load(path)
    try:
        with torch.device("meta"):  # no memory for a size that only a damaged file could name
            G = generator(stored["latent_dim"], stored["width"])
        G.load_state_dict(stored["weights"], assign=True)
        G.layout = torch.channels_last  # as in training, for the same bits
        return G.to(device, torch.float32, memory_format=G.layout).eval()
    except torch.OutOfMemoryError:
        raise
    except Exception:
        raise UserError(f"{path}: not a Net_G.param of this program: it holds no generator's weights") from None


@torch.no_grad()
def sample(G, count, seed):
    """Draws uint8 [count, 3, 64, 64] on the CPU. Picture i depends on G, the seed and i alone:

    noise comes from the CPU's generator, batches are always 64, and batch norm uses its running statistics.
    """
    rng, pictures, was_training = torch.Generator().manual_seed(seed), [], G.training
    weight = G[0].conv.weight  # [latent_dim, 8 width, 4, 4]
    G.eval()
    for _ in range(0, count, 64):
        noise = draw_noise(64, len(weight), rng).to(weight.device)
        pictures.append(G(noise).add(1).mul(127.5).round().to("cpu", torch.uint8))
    G.train(was_training)
    return torch.cat(pictures)[:count]


def save_grid(pictures, path):
    """Writes pictures, uint8 [N, 3, 64, 64], as one image, eight to a row."""
    from torchvision.transforms.functional import to_pil_image
    from torchvision.utils import make_grid

    with replacing(path) as file:
        to_pil_image(make_grid(pictures, nrow=8)).save(file, "PNG")


def save_curves(rows, folder):
    """losses.csv and losses.png of a run folder, from its rows."""
    from matplotlib.figure import Figure

    table = io.StringIO()
    csv.writer(table).writerows([rows[0], *(row.values() for row in rows)])  # the first line is its keys
    with replacing(folder / "losses.csv") as file:
        file.write(table.getvalue().encode())

    panels = {
        "loss per image": ["d_loss", "g_loss", "gradient_penalty"],
        "distance from real pictures": ["distance", "floor"],
        "mean logit of D": ["real_logits", "fake_logits"],
        "diversity, 1 as in the folder": ["diversity"],
    }
    figure = Figure(figsize=(12, 7), layout="constrained")
    for axes, (label, columns) in zip(figure.subplots(2, 2, sharex=True).flat, panels.items()):
        for column in columns:
            points = [(row["epoch"], row[column]) for row in rows if row[column] is not None]
            if any(value for _, value in points):  # there is no curve of a penalty that the recipe leaves out
                axes.plot(*zip(*points), marker="." if len(points) < 30 else None, label=column.replace("_", " "))
                axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False)  # above the curves
        axes.set(ylabel=label)
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.grid(alpha=0.3)
    figure.supxlabel("epoch")
    with replacing(folder / "losses.png") as file:
        figure.savefig(file, format="png", dpi=120)


class Run:
    """A training, new or put back from the checkpoint in its folder: all that it needs to go on as if never stopped."""

    KEPT = "step", "seconds", "rows", "d_losses", "g_losses", "collapse"  # in the checkpoint, beside the parts

    def __init__(self, folder, gan_type, recipe, seed, device, precision, out=None, sample_every=None, restart=False):
        self.out = Path(out or Path("runs", f"{Path(folder).resolve().name}-{gan_type}"))
        if Path(folder).resolve().is_relative_to(self.out.resolve()):
            raise UserError(f"--out {self.out}: holds the pictures of {folder}; name a folder for this run alone")
        setting = {"folder": str(folder), "images": None, "gan_type": gan_type, "seed": seed}
        self.recipe, self.config = recipe, {**setting, **asdict(recipe)}  # so that a contradiction can be named
        checkpoint = self.out / "checkpoint.pt"
        resumes = checkpoint.exists() and not restart
        saved = read_checkpoint(checkpoint, self.config) if resumes else None  # refused before the images are read
        self.images = load_images(folder, device)
        self.config["images"] = len(self.images)
        if saved:
            refuse_contradictions(checkpoint, saved["config"], self.config)
            if saved["config"]["folder"] != str(folder):  # moved, we hope
                print(f"{self.out} began with the pictures in {saved['config']['folder']}", file=sys.stderr)
        elif checkpoint.exists():  # nothing of the earlier run is lost, or taken for this one's
            self.out.rename(f"{self.out}_before_{time.strftime('%Y%m%d_%H%M%S')}")
        self.out.mkdir(parents=True, exist_ok=True)

        torch.manual_seed(seed)
        self.rng = torch.Generator(device).manual_seed(seed)  # of noise and mixing weights, on the device
        G, D = generator(recipe.latent_dim, recipe.width), discriminator(recipe.width, recipe.d_norm)
        self.parts = {"G": G, "D": D}
        for name, network in list(self.parts.items()):
            network.precision, network.layout = precision, torch.channels_last
            # The second gradient of batch norm adds up along rows; on mps channels last has not been tried.
            if device.type == "mps" or (network is D and recipe.gp_weight and recipe.d_norm == "batch"):
                network.layout = torch.contiguous_format
            init_weights(network, recipe.init).to(device, memory_format=network.layout)
            self.parts[f"optimizer_{name}"] = OPTIMIZERS[recipe.optimizer](network.parameters(), recipe)
        self.parts["scaler"] = torch.amp.GradScaler(device.type, 2.0**4, enabled=precision == torch.float16)
        if recipe.average:
            self.parts["average"] = copy.deepcopy(G)

        self.batch_size = min(recipe.batch_size, len(self.images))
        self.per_epoch = len(self.images) // self.batch_size  # the incomplete last batch of an epoch is dropped
        self.measure_every = min(500, (sample_every or 1) * self.per_epoch)  # updates of D
        self.measure_by_clock = sample_every is None
        self.row_every = math.ceil(self.per_epoch / math.ceil(self.per_epoch / self.measure_every))  # at most
        self.step, self.seconds, self.rows = 0, 0.0, ()  # updates of D; s of training since the last row; losses.csv
        self.d_losses, self.g_losses = [], []  # what update_D and update_G gave since the last row, on the device
        self.collapse = None  # its first sign, in words
        self.reference = None  # of quality(), once it is needed
        # When it began, training went on, and it was last saved; s spent on records.
        self.began = self.clock = self.saved_at = time.perf_counter()
        self.records_took = 0.0
        if saved:
            self.resume(saved)
        for place in (self.out, self.out / "samples", Path(".cache"), Path()):
            for left in place.glob(f"*{PART}"):  # by a process that was killed
                with suppress(FileNotFoundError):
                    if time.time() - left.stat().st_mtime > 3600:
                        left.unlink()

    def draw_fake(self):
        return self.parts["G"](draw_noise(self.batch_size, self.recipe.latent_dim, self.rng))

    def update(self, real, turn_of_G):
        """D's update on real pictures [B, 3, 64, 64] and then, if it is its turn, G's -> what they log, in a list."""
        recipe, (G, D, optimizer_G, optimizer_D, scaler) = self.recipe, list(self.parts.values())[:5]
        one_fake = recipe.d_steps == recipe.g_steps == 1  # D and G are shown the same fakes, made once
        with torch.set_grad_enabled(one_fake):
            fake = self.draw_fake()
        logged = [update_D(D, optimizer_D, real, fake.detach(), recipe, self.rng, scaler)]
        for _ in range(recipe.g_steps if turn_of_G else 0):
            logged.append(update_G(G, D, optimizer_G, fake if one_fake else self.draw_fake(), recipe, scaler))
            if recipe.average:
                average = get_ema_multi_avg_fn(recipe.average)
                average(list(self.parts["average"].parameters()), list(G.parameters()), None)
        return logged

    def shown_G(self):
        """The generator that is drawn, measured and saved: G, or the average of its weights.

        The average gets batch-norm statistics of its own, from fixed noise: those of G do not fit it.
        """
        if "average" not in self.parts:
            return self.parts["G"]
        G, rng = self.parts["average"], torch.Generator().manual_seed(0)
        update_bn((draw_noise(64, self.config["latent_dim"], rng).to(self.rng.device) for _ in range(8)), G)
        return G

    def save_G(self, G, *paths):
        """Writes a Net_G.param."""
        sizes = {name: self.config[name] for name in ("gan_type", "latent_dim", "width")}
        for path in paths:
            save({**sizes, "updates": self.step, "weights": G.state_dict()}, path)

    def save(self):
        """Writes all that a run leaves but grids and best. The checkpoint comes last: what it counts as done, is."""
        self.save_G(self.shown_G(), self.out / "Net_G.param", Path("Net_G.param"))
        with replacing(self.out / "config.json") as file:
            numerics = {"precision": str(self.parts["G"].precision), "torch": torch.__version__}
            file.write(json.dumps({**self.config, **numerics}, indent=2).encode())
        if self.rows:
            save_curves(self.rows, self.out)
        state = {"config": self.config, **{name: getattr(self, name) for name in self.KEPT}}
        state |= {name: part.state_dict() for name, part in self.parts.items()}
        save({**state, "rng": self.rng.get_state(), "rng_device": self.rng.device.type}, self.out / "checkpoint.pt")

    def resume(self, saved):
        """Goes on where a checkpoint stands."""
        try:
            for name, part in self.parts.items():
                if saved[name]:  # a scaler that had nothing to do kept nothing
                    part.load_state_dict(saved[name])
            if saved["rng_device"] == self.rng.device.type:
                self.rng.set_state(saved["rng"])
            else:  # a CPU cannot carry on the noise of a GPU, nor the other way round: any fresh noise will do
                self.rng.manual_seed(self.config["seed"] + saved["step"])
            for name in self.KEPT:
                setattr(self, name, saved[name])
            for losses in (self.d_losses, self.g_losses):
                losses[:] = [loss.to(self.rng.device) for loss in losses]
        except torch.OutOfMemoryError:
            raise
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError):
            raise UserError(f"{self.out / 'checkpoint.pt'}: not whole; --restart, or another --out") from None

    def check_finite(self):
        """Raises UserError, before anything is saved, if a new loss or a parameter is not a finite number."""
        finite = torch.stack(self.d_losses).isfinite().all(1).tolist()
        values = [*self.parts["G"].state_dict().values(), *self.parts["D"].state_dict().values()]
        finite.append(all(value.isfinite().all() for value in values))  # what the last update made of them
        if not all(finite):
            update = min(self.step, self.step - len(self.d_losses) + finite.index(False) + 1)
            path = self.out / "checkpoint.pt"
            kept = f"{path} is the last good one" if path.exists() else "nothing was saved yet"
            raise UserError(f"no finite losses any more at update {update:,}; {kept}; try a lower --lr with --restart")

    def best(self):
        """The row of the smallest distance, or None."""
        measured = [row for row in self.rows if row["distance"] is not None]
        return min(measured, key=lambda row: row["distance"], default=None)

    def end_row(self, measure):
        """Turns the losses since the last row into a row of losses.csv; with `measure`, draws and measures pictures."""
        epoch, rest = divmod(self.step, self.per_epoch)
        row = {"epoch": round(self.step / self.per_epoch, 3) if rest else epoch, "updates": self.step}
        row |= zip(LOGGED, torch.stack(self.d_losses).cpu().double().mean(0).tolist())
        row["g_loss"] = torch.stack(self.g_losses).cpu().double().mean().item() if self.g_losses else math.nan
        row |= dict.fromkeys(["distance", "floor", "diversity"])
        if measure:
            G, best = self.shown_G(), self.best()
            self.reference = self.reference or real_reference(self.images, self.rng.device)
            pictures = sample(G, max(64, self.reference.count), self.config["seed"])
            name = f"epoch_{epoch:03}" + (f"_{rest:05}" if rest else "")  # so many epochs, and so many updates
            save_grid(pictures[:64], self.out / "samples" / f"{name}.png")
            row |= quality(pictures, self.reference)
            if not best or row["distance"] < best["distance"]:
                self.save_G(G, self.out / "Net_G_best.param")
        row |= {"seconds": self.seconds, "images_per_s": len(self.d_losses) * self.batch_size / self.seconds}
        self.rows, self.seconds, self.d_losses, self.g_losses = (*self.rows, row), 0.0, [], []

    def keep_records(self, last):
        """After each update of D: what is due of rows, pictures, measures and checkpoint, and all if it is the last.

        Files come before words, since whoever reads the words may have left by the same Ctrl-C.
        """
        ends_row = self.step % self.per_epoch == 0 or len(self.d_losses) >= self.row_every
        now = time.perf_counter()
        affordable = self.records_took < 0.05 * (now - self.began)
        patience = 120 if not ends_row else 0 if affordable else 60  # s between checkpoints
        save_now = last or now - self.saved_at > patience
        if not (ends_row or save_now):
            return
        self.check_finite()
        paused = time.perf_counter()  # check_finite() has waited for the device
        self.seconds += paused - self.clock
        if ends_row:
            measured = max((row["updates"] for row in self.rows if row["distance"] is not None), default=0)
            due = self.step + self.row_every - measured > self.measure_every
            due = due and (affordable or not self.measure_by_clock)
            self.end_row(due or self.step == self.config["epochs"] * self.per_epoch)
        is_best = ends_row and self.best() is self.rows[-1]  # its file and its row must not part company
        sign = sign_of_collapse(self.rows, self.config["loss"]) if ends_row and not self.collapse else None
        if sign:
            self.collapse = f"at epoch {self.rows[-1]['epoch']}, {sign}"
        if save_now or sign or is_best:
            self.save()
            self.saved_at = time.perf_counter()
        if ends_row and not (sys.stdout.isatty() and sys.stderr.isatty()):  # a terminal has the bar
            told = {name: value for name, value in self.rows[-1].items() if value is not None}
            print(*(f"{name} {round(value, 4):,}" for name, value in told.items()), sep=", ", flush=True)
        if sign:
            remedy = "type 3 or a lower --lr" if self.config["loss"] == "bce" else "a lower --lr"
            tqdm.write(f"This looks like a collapse: {self.collapse}. Try {remedy}.", file=sys.stderr)
        self.clock = time.perf_counter()
        self.records_took += self.clock - paused


def read_checkpoint(path, config):
    """The checkpoint to carry on from. Raises UserError, by name, for a setting that contradicts it."""
    saved = load(path)
    begun = saved.get("config") if isinstance(saved, dict) else None
    if not isinstance(begun, dict) or begun.keys() != config.keys():
        raise UserError(f"{path}: not a checkpoint that this train.py can carry on: --restart, or another --out")
    refuse_contradictions(path, begun, config)
    return saved


def refuse_contradictions(path, begun, config):
    """Raises UserError if a setting, None where it is not known yet, is not the one that the checkpoint began with."""
    for name, value in config.items():
        if value not in (None, begun[name]) and name not in ("folder", "epochs"):  # folders move, runs grow longer
            what = {"gan_type": "gan_type", "images": "number of images"}.get(name, f"--{name}")
            message = f"{what} {value} contradicts {path}, begun with {begun[name]}"
            raise UserError(f"{message}: use that, or begin anew with --restart or another --out")


# ------------------------------------------------------------------------------------------------ train


def pick_device(name="auto"):
    """The torch.device of that name; "auto" is CUDA where it works, else the CPU. Raises UserError if it fails."""
    if name == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    try:
        device = torch.device("cuda" if name == "auto" else name)
        (torch.ones(8, 8, device=device) @ torch.ones(8, 8, device=device)).sum().item()
        return device
    except Exception as error:  # each kind of device has errors of its own
        why = str(error).partition("\n")[0][:160]
    if name != "auto":
        raise UserError(f"--device {name}: {why}; --device cpu works everywhere")
    remedy = "a newer driver, or, for a card from before 2018: python3 -m pip install 'torch<2.8' 'torchvision<0.23'"
    print(f"PyTorch {torch.__version__} cannot drive this GPU ({why}): using the CPU. Mend: {remedy}", file=sys.stderr)
    return torch.device("cpu")


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_precision(name, device):
    """The dtype in which networks multiply. "auto" is bfloat16 where the hardware has it, else float32.

    Losses, the penalty's norm, weights and the optimizers' state are float32 in any case; on CUDA cards from 2020 on,
    float32 convolutions multiply in TF32, as is PyTorch's default.
    """
    if name != "auto":
        return PRECISIONS[name]
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)  # older ones emulate it
    else:
        native = device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    return torch.bfloat16 if native else torch.float32


def captured(update, rng):
    """The same update(real, turn_of_G); on a CUDA card its kernels are recorded once, then started by one call.

    Started one by one, the hundreds of kernels of an update at a small batch keep the card waiting. The first three
    updates of each kind run as they are: they make what PyTorch makes at first use. Recording itself runs no kernel.
    """
    if rng.device.type != "cuda":
        return update
    torch.backends.cudnn.benchmark = True  # batches never change size
    torch.cuda.synchronize(rng.device)
    torch.cuda.set_stream(torch.cuda.Stream(rng.device))  # the default stream cannot be recorded
    turns, recorded = Counter(), {}

    def replayed(real, turn_of_G):
        turns[turn_of_G] += 1
        if turns[turn_of_G] == 4:
            graph, shown = torch.cuda.CUDAGraph(), real.clone()
            kept = rng.clone_state()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # newer versions know by themselves
                getattr(graph, "register_generator_state", bool)(rng)  # each replay goes on in its row of numbers
            try:
                with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                    results = update(shown, turn_of_G)
                recorded[turn_of_G] = graph, shown, results
            except RuntimeError as error:
                rng.graphsafe_set_state(kept)
                why = str(error.__context__ or error).partition("\n")[0][:160]
                print(f"No CUDA graph here, each kernel is started by itself: {why}", file=sys.stderr)
        if turn_of_G not in recorded:
            return update(real, turn_of_G)
        graph, shown, results = recorded[turn_of_G]
        shown.copy_(real)
        graph.replay()
        return [result.clone() for result in results]  # the next replay overwrites them

    return replayed


@contextmanager
def deferred_signals():
    """Collects Ctrl-C and SIGTERM in the list that it yields, so that an update is never cut in two."""
    caught = []
    signals = signal.SIGINT, signal.SIGTERM
    usual = {number: signal.signal(number, lambda number, frame: caught.append(number)) for number in signals}
    try:
        yield caught
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def train(folder, gan_type, *, seed=0, device="auto", precision="auto", out=None, sample_every=None, restart=False,
          stop_on_collapse=False, **columns):  # fmt: skip
    """Trains the recipe `gan_type` on the pictures in `folder`; `columns` replace columns of the recipe.

    Carries on from the checkpoint in the run folder if there is one. Raises UserError for what the user can mend, and
    SystemExit after Ctrl-C or SIGTERM, once the update is finished and all is saved.
    """
    recipe, device = replace(RECIPES[gan_type], **columns), pick_device(device)
    precision = pick_precision(precision, device)
    if precision == torch.float16 and recipe.gp_weight and recipe.d_norm == "batch":
        raise UserError("--precision fp16 overflows in the penalty's gradient through batch norm: take bf16 or fp32")
    run = Run(folder, gan_type, recipe, seed, device, precision, out, sample_every, restart)
    images, batch_size, per_epoch, first = run.images, run.batch_size, run.per_epoch, run.step
    total = recipe.epochs * per_epoch
    if first >= total:
        return print(f"{run.out} is finished: {first:,} updates. A larger --epochs extends it, --restart begins anew.")
    if stop_on_collapse and run.collapse:
        return print(f"{run.out} has collapsed: {run.collapse}. Without --stop_on_collapse it carries on.")
    print_networks(recipe)
    changed = (f"with {name} {value}" for name, value in columns.items())
    print(f"Type {gan_type}: {TITLES[gan_type]}", *changed, sep=", ")
    small = f" (the folder has no {recipe.batch_size})" if batch_size < recipe.batch_size else ""
    how = f"{device} in {str(precision).removeprefix('torch.')}"
    print(f"Batches of {batch_size}{small}, {per_epoch:,} in an epoch, on {how}")
    print(f"{'Carrying on' if first else 'Starting'} at update {first:,} of {total:,} in {run.out}", flush=True)
    if run.collapse:
        print(f"A collapse was seen {run.collapse}.", flush=True)

    update = captured(run.update, run.rng)
    run.clock = time.perf_counter()  # what came before was no training
    with deferred_signals() as caught, progress_bar(total * batch_size, first * batch_size, desc="training") as bar:
        for step in range(first, total):
            epoch, batch = divmod(step, per_epoch)
            if batch == 0 or step == first:
                order = shuffled(len(images), seed, epoch).to(images.device)
            real = real_batch(images, order[batch * batch_size :][:batch_size], device)
            d_loss, *g_losses = update(real, (step + 1) % recipe.d_steps == 0)
            run.d_losses.append(d_loss)
            run.g_losses.extend(g_losses)
            run.step = step + 1
            # Nothing above this line reads from the device.
            last = bool(caught) or run.step == total
            run.keep_records(last)
            if bar.update(batch_size) and run.g_losses:  # tqdm has just drawn; these figures are for its next time
                figures = run.d_losses[-1][0], run.g_losses[-1]
                bar.set_postfix_str("epoch {}, D {:.3f}, G {:.3f}".format(epoch + 1, *figures), False)
            if last or stop_on_collapse and run.collapse:
                break
    best, kept = run.best(), ""
    if best:
        kept = f" Best: epoch {best['epoch']}, distance {best['distance']:.1f} (floor {best['floor']:.1f}), kept as "
        kept += f"{run.out / 'Net_G_best.param'}."
    if run.step < total and caught:
        how = "the same command, without --restart," if restart else "the same command"
        print(f"Stopped and saved at update {run.step:,} of {total:,}: {how} carries on.{kept}", flush=True)
        raise SystemExit(128 + caught[0])
    if run.step < total:
        return print(f"Stopped at update {run.step:,} of {total:,}: it collapsed {run.collapse}.{kept}")
    print(f"Finished.{kept} Look at {run.out / 'samples'} and {run.out / 'losses.png'}, draw: bash test.sh Net_G.param")


# ----------------------------------------------------------------------------------------- command line


def between(kind, low, high):
    """An argparse type: a number of that kind from low to high, which infinity and nan are not."""

    def parse(text):
        if not low <= kind(text) <= high:
            raise ValueError
        return kind(text)

    parse.__name__ = f"{kind.__name__} from {low:,} to {high:,}"  # argparse's message names the type
    return parse


class OneLineParser(argparse.ArgumentParser):
    """Shows its text as it was written, guesses no option, and says what is wrong in one line."""

    def __init__(self, name, text):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(name, description=text, formatter_class=raw, allow_abbrev=False)

    def error(self, message):
        raise UserError(f"{message} (--help shows every option)")


def command_line():
    """The parser of train.py. Columns of the recipe are options of the same name, None where they are not given."""
    parser = OneLineParser("train.sh", __doc__)
    parser.add_argument("folder", metavar="ImageFolder", help="folder of pictures, at any depth")
    titles = "; ".join(f"{number}: {title}" for number, title in TITLES.items())
    parser.add_argument("gan_type", type=int, choices=RECIPES, help=titles)

    run = parser.add_argument_group("run")
    run.add_argument("--seed", type=between(int, 0, 2**31), default=0, help="of every random number (default: 0)")
    run.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto: cuda if it works (default: auto)")
    run.add_argument("--out", help="run folder (default: runs/<name of ImageFolder>-<gan_type>)")
    numerics = "in which networks multiply; auto: bf16 where the hardware has it, else fp32 (default: auto)"
    run.add_argument("--precision", choices=["auto", *PRECISIONS], default="auto", help=numerics)
    every = "epochs at most, also 0.1, from one sample grid and measure to the next; 500 updates at most "
    every += "(default: 1, or more where records would take over 5%% of the time)"
    run.add_argument("--sample_every", type=between(float, 0.001, 10**6), help=every)
    run.add_argument("--restart", action="store_true", help="begin anew, in place of the run there (default: no)")
    collapse = "end the run at the first sign of a collapse, not only warn (default: no)"
    run.add_argument("--stop_on_collapse", action="store_true", help=collapse)

    recipe = parser.add_argument_group("recipe")
    for column in fields(Recipe):
        text, allowed = column.metadata["help"], column.metadata["allowed"]
        values = {number: getattr(row, column.name) for number, row in RECIPES.items()}
        default = values[1] if len(set(values.values())) == 1 else ", ".join(f"{n}: {v}" for n, v in values.items())
        how = {"choices": allowed} if column.type is str else {"type": between(column.type, *allowed)}
        if column.type is tuple:
            how = {"type": between(float, *allowed), "nargs": 2}
        recipe.add_argument(f"--{column.name}", help=f"{text} (default: {default})", **how)
    return parser


def run_program(program, name, argv=None):
    """Runs program(argv) -> exit status: 0, or 2 after one line on standard error for what the user can mend."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a file's name may hold what a terminal cannot print
            stream.reconfigure(errors="backslashreplace")
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
        exhausted = re.search("out of memory|not enough memory|alloc|DataLoader worker", str(error), re.IGNORECASE)
        if not (exhausted or isinstance(error, MemoryError)):
            raise  # a defect of ours: it deserves its traceback
        message = "out of memory: try a smaller --batch_size or --width; what was saved before is intact"
    print(f"{name}: {' '.join(str(message).split())}", file=sys.stderr)
    return 2


def main(argv=None):
    """Trains as the command line says."""
    given = {name: value for name, value in vars(command_line().parse_args(argv)).items() if value is not None}
    if "betas" in given:
        given["betas"] = tuple(given["betas"])
        if given.get("optimizer", RECIPES[given["gan_type"]].optimizer) != "adam":
            raise UserError("--betas are Adam's: leave them out, or add --optimizer adam")
    train(**given)


if __name__ == "__main__":
    sys.exit(run_program(main, "train.sh"))
