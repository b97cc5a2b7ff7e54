"""Trains a GAN on a folder of pictures and learns to draw new ones, 64x64 pixels, on a CPU or a GPU.

    bash train.sh ImageFolder 1                  # DCGAN
    bash train.sh ImageFolder 2                  # the report's WGAN-GP: BCE, SGD and a gradient penalty
    bash train.sh ImageFolder 1 --batch_size 32 --lr 0.0005 --width 32       # a small folder, or no GPU
    bash train.sh ImageFolder 1 --epochs 200     # the same command carries on; more epochs extend the run
    bash test.sh Net_G.param                     # draws with what was trained
    bash train.sh --help                         # every option, with its unit and default

The file reads from top to bottom: recipes, networks, images, losses and updates, records, train, command line.

Papers: [1] Goodfellow et al. 2014, Generative Adversarial Networks, arXiv:1406.2661
        [2] Radford et al. 2015, Unsupervised Representation Learning with DCGANs, arXiv:1511.06434
        [3] Arjovsky et al. 2017, Wasserstein GAN, arXiv:1701.07875
        [4] Gulrajani et al. 2017, Improved Training of Wasserstein GANs, arXiv:1704.00028
"""

import argparse
import csv
import hashlib
import io
import json
import math
import os
import re
import signal
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

try:
    import torch
    import torch.nn.functional as F
    from matplotlib.figure import Figure
    from PIL import Image, ImageOps, UnidentifiedImageError
    from torch import nn
    from torchsummary import summary
    from torchvision.transforms.functional import to_pil_image
    from torchvision.utils import make_grid
    from tqdm import tqdm
except ModuleNotFoundError as missing:
    raise SystemExit(f"{missing.name} is not installed here: python3 -m pip install -r requirements.txt")


class UserError(Exception):
    """What the user can mend: one line that names the file or the option, and the remedy."""


# ---------------------------------------------------------------------------------------------- recipes


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training but the pictures and the seed. Each field but the title is an option."""

    title: str
    loss: str  # a row of LOSSES
    gp_weight: float  # weight of the gradient penalty, lambda of [4]; 0 leaves it out
    optimizer: str  # a row of OPTIMIZERS
    lr: float  # step size; the summed BCE makes it belong to a batch size
    betas: tuple = (0.5, 0.999)  # Adam's decay rates
    d_steps: int = 1  # updates of D for ...
    g_steps: int = 1  # ... so many updates of G
    epochs: int = 100  # passes over the folder
    batch_size: int = 512  # pictures
    latent_dim: int = 100  # numbers in one noise vector
    width: int = 64  # channels of the widest pictures' layers; the narrowest have 8 times as many
    init: str = "normal"  # every parameter from N(0, 0.02); "dcgan": batch norms start at 1 and 0


RECIPES = {  #  title                                                            loss   gp_weight  optimizer  lr
    1: Recipe("DCGAN",                                                           "bce", 0.0,       "adam",    0.005),
    2: Recipe("the report's WGAN-GP, which the report saw collapse at epoch 12", "bce", 10.0,      "sgd",     0.001),
}  # fmt: skip


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


class D_block(nn.Module):
    """Convolution, batch norm, leaky ReLU: [B, in, H, W] -> [B, out, H/2, W/2]."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 4, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        self.activation = nn.LeakyReLU(0.2)

    def forward(self, x):
        return self.activation(self.norm(self.conv(x)))


def generator(latent_dim=100, width=64):
    """Noise [B, latent_dim, 1, 1] ~ N(0, 1) -> pictures [B, 3, 64, 64] in [-1, 1] ([2], figure 1)."""
    return nn.Sequential(
        G_block(latent_dim, width * 8, stride=1, padding=0),  #       512 x  4 x  4 at width 64
        G_block(width * 8, width * 4),  #                             256 x  8 x  8
        G_block(width * 4, width * 2),  #                             128 x 16 x 16
        G_block(width * 2, width),  #                                  64 x 32 x 32
        nn.ConvTranspose2d(width, 3, 4, 2, 1, bias=False),  #           3 x 64 x 64
        nn.Tanh(),
    )


def discriminator(width=64):
    """Pictures [B, 3, 64, 64] in [-1, 1] -> logits [B, 1, 1, 1]; there is no Sigmoid, the loss has it."""
    return nn.Sequential(
        D_block(3, width),  #                                          64 x 32 x 32 at width 64
        D_block(width, width * 2),  #                                 128 x 16 x 16
        D_block(width * 2, width * 4),  #                             256 x  8 x  8
        D_block(width * 4, width * 8),  #                             512 x  4 x  4
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
    summary(generator(recipe.latent_dim, recipe.width), (recipe.latent_dim, 1, 1), device="cpu")
    summary(discriminator(recipe.width), (3, 64, 64), device="cpu")


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
            files.append([os.path.relpath(path, folder), *((stat.st_size, stat.st_mtime_ns) if stat else (-1, 0))])
    return sorted(files)


def decode(path):
    """One file -> the IMAGE_BYTES bytes of its picture, uint8 [3, 64, 64], RGB, upright, on white."""
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith(("I", "F")):  # 16 bits and more: scaled here, since convert() would clip
            low, high = (0, 65535) if image.mode != "F" else image.getextrema()
            scale = 255 / max(high - low, 1e-9)
            image = image.convert("F").point(lambda value: value * scale + (0.5 - low * scale)).convert("L")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB").resize((64, 64), Image.BILINEAR)  # the report's Resize((64, 64)): no crop
        return b"".join(channel.tobytes() for channel in image.split())


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


def decode_all(folder, files, path):
    """Decodes every file into `path`; returns what an index of it must say."""
    warnings.simplefilter("ignore")  # what Pillow says of a picture that it reads all the same
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    skipped = []
    pool = ThreadPoolExecutor(os.cpu_count())  # threads are enough: Pillow decodes and resizes outside the GIL
    try:
        with replacing(path) as out, progress_bar(len(files), desc="decoding") as bar:
            results = pool.map(lambda file: try_decode(folder / file[0], file[1]), files)
            for (name, _, _), (pixels, why) in zip(files, results):
                bar.update()
                if pixels:
                    out.write(pixels)
                else:
                    skipped.append(f"{name} ({why})")
    finally:
        pool.shutdown(cancel_futures=True)  # so that Ctrl-C does not wait for the rest of the folder
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
    cache, index = stem.with_suffix(".pixels"), stem.with_suffix(".json")
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
    images = torch.from_file(str(cache), size=count * IMAGE_BYTES, dtype=torch.uint8).view(count, 3, 64, 64)
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

OPTIMIZERS = {
    "adam": lambda parameters, recipe: torch.optim.Adam(parameters, recipe.lr, recipe.betas),
    "sgd": lambda parameters, recipe: torch.optim.SGD(parameters, recipe.lr),
}


def gradient_penalty(D, real, fake, rng=None):
    """(||gradient of D at x||_2 - 1)^2 for each x = e real + (1 - e) fake, e ~ U[0, 1] ([4], equation 3): [B]."""
    e = torch.rand(len(real), 1, 1, 1, generator=rng, device=real.device)
    mixed = (e * real + (1 - e) * fake).requires_grad_()
    (gradient,) = torch.autograd.grad(D(mixed).sum(), mixed, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1) ** 2


def update_D(D, optimizer_D, real, fake, recipe, rng=None):
    """One step of D on pictures [B, 3, 64, 64]; `fake` comes detached.

    Real, fake and mixed pictures go through D in passes of their own: batch norm makes one joint pass another thing.
    Returns, per image and on the device: loss without penalty, penalty, mean logit of real and of fake: [4].
    """
    d_loss, _, over_batch = LOSSES[recipe.loss]
    real_logits, fake_logits = D(real).flatten(), D(fake).flatten()
    losses = d_loss(real_logits, fake_logits)
    penalty = gradient_penalty(D, real, fake, rng) if recipe.gp_weight else torch.zeros_like(losses)
    # As in the report, the BCE is a sum over the batch and the penalty beside it a mean.
    loss = over_batch(losses) + recipe.gp_weight * penalty.mean()
    optimizer_D.zero_grad()
    loss.backward()
    optimizer_D.step()
    return torch.stack([losses.mean(), penalty.mean(), real_logits.mean(), fake_logits.mean()]).detach()


def update_G(G, D, optimizer_G, fake, recipe):
    """One step of G on its own pictures [B, 3, 64, 64], not detached. Returns the loss per image, on the device."""
    _, g_loss, over_batch = LOSSES[recipe.loss]
    losses = g_loss(D(fake).flatten())
    optimizer_G.zero_grad()
    over_batch(losses).backward(inputs=list(G.parameters()))  # D's weights need no gradient here
    optimizer_G.step()
    return losses.mean().detach()


# ---------------------------------------------------------------------------------------------- records

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
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # two runs may decode one folder at the same time
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
        return G.to(device, torch.float32).eval()
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
    with replacing(path) as file:
        to_pil_image(make_grid(pictures, nrow=8)).save(file, "PNG")


def save_curves(rows, folder):
    """losses.csv and losses.png of a run folder, from a row an epoch."""
    table = io.StringIO()
    writer = csv.DictWriter(table, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    with replacing(folder / "losses.csv") as file:
        file.write(table.getvalue().encode())

    figure = Figure(figsize=(8, 7), layout="constrained")
    losses, logits = figure.subplots(2, sharex=True)
    epochs = [row["epoch"] for row in rows]
    for axes, columns in [(losses, ["d_loss", "g_loss", "gradient_penalty"]), (logits, ["real_logits", "fake_logits"])]:
        for column in columns:
            values = [row[column] for row in rows]
            if any(values):  # there is no curve of a penalty that the recipe leaves out
                axes.plot(epochs, values, marker="." if len(rows) < 30 else None, label=column.replace("_", " "))
        axes.grid(alpha=0.3)
        axes.legend()
    losses.set(ylabel="loss per image")
    logits.set(xlabel=f"epoch ({rows[0]['updates']:,} updates each)", ylabel="mean logit of D")
    logits.xaxis.get_major_locator().set_params(integer=True)
    with replacing(folder / "losses.png") as file:
        figure.savefig(file, format="png", dpi=120)


@dataclass
class Run:
    """The state of a training: all that it needs to go on as if it had never stopped."""

    out: Path  # the run folder
    config: dict  # every setting, so that a contradiction can be named
    parts: dict  # G, D and their optimizers, by name
    rng: torch.Generator  # noise and mixing weights, on the device
    losses: torch.Tensor  # [batches in an epoch, LOGGED], filled batch by batch on the device
    step: int = 0  # updates of D so far
    seconds: float = 0.0  # of training in this epoch, records not counted
    rows: tuple = ()  # of losses.csv

    def save(self):
        """Writes all that a run leaves but the sample grids. The checkpoint comes last: what it counts as done, is."""
        state = {name: getattr(self, name) for name in ("config", "losses", "step", "seconds", "rows")}
        state |= {name: part.state_dict() for name, part in self.parts.items()}
        sizes = {name: self.config[name] for name in ("gan_type", "latent_dim", "width")}
        for path in (self.out / "Net_G.param", Path("Net_G.param")):
            save({**sizes, "updates": self.step, "weights": state["G"]}, path)
        with replacing(self.out / "config.json") as file:
            file.write(json.dumps({**self.config, "torch": torch.__version__}, indent=2).encode())
        if self.rows:
            save_curves(self.rows, self.out)
        save({**state, "rng": self.rng.get_state(), "rng_device": self.rng.device.type}, self.out / "checkpoint.pt")

    def resume(self, saved):
        """Goes on where a checkpoint stands."""
        try:
            for name, part in self.parts.items():
                part.load_state_dict(saved[name])
            if saved["rng_device"] == self.rng.device.type:
                self.rng.set_state(saved["rng"])
            else:  # a CPU cannot carry on the noise of a GPU, nor the other way round: any fresh noise will do
                self.rng.manual_seed(self.config["seed"] + saved["step"])
            self.losses.copy_(saved["losses"])
            self.step, self.seconds, self.rows = saved["step"], saved["seconds"], saved["rows"]
        except (LookupError, TypeError, ValueError, RuntimeError):
            raise UserError(f"{self.out / 'checkpoint.pt'}: not whole; --restart, or another --out") from None

    def check_finite(self, batches):
        """Raises UserError, before anything is saved, if a loss of this epoch or a parameter is not a finite number."""
        finite = self.losses[:batches].isfinite().all(1).tolist()
        values = [*self.parts["G"].state_dict().values(), *self.parts["D"].state_dict().values()]
        finite.append(all(value.isfinite().all() for value in values))  # what the last update made of them
        if not all(finite):
            update = min(self.step, self.step - batches + finite.index(False) + 1)
            path = self.out / "checkpoint.pt"
            kept = f"{path} is the last good one" if path.exists() else "nothing was saved yet"
            raise UserError(f"no finite losses any more at update {update:,}; {kept}; try a lower --lr with --restart")

    def end_epoch(self, batch_size):
        """Turns the epoch's losses into a row of losses.csv and clears them for the next."""
        batches, d_steps = len(self.losses), self.config["d_steps"]
        mean = dict(zip(LOGGED, self.losses.cpu().double().mean(0).tolist()))
        g_batches = self.step // d_steps - (self.step - batches) // d_steps  # after so many of them G was updated
        mean["g_loss"] = mean["g_loss"] * batches / g_batches if g_batches else math.nan
        pace = {"seconds": self.seconds, "images_per_s": batches * batch_size / self.seconds}
        row = {"epoch": self.step // batches, "updates": self.step, **mean, **pace}
        self.rows, self.seconds = (*self.rows, row), 0.0
        self.losses.zero_()


def read_checkpoint(path, config):
    """The checkpoint to carry on from. Raises UserError, by name, for a setting that contradicts it."""
    saved = load(path)
    begun = saved.get("config") if isinstance(saved, dict) else None
    if not isinstance(begun, dict) or begun.keys() != config.keys():
        raise UserError(f"{path}: not a checkpoint that this train.py can carry on: --restart, or another --out")
    for name in config:
        if config[name] != begun[name] and name not in ("folder", "epochs"):  # folders move, and runs are made longer
            what = {"gan_type": "gan_type", "images": "number of images"}.get(name, f"--{name}")
            message = f"{what} {config[name]} contradicts {path}, begun with {begun[name]}"
            raise UserError(f"{message}: use that, or begin anew with --restart or another --out")
    return saved


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


def prepare(folder, gan_type, recipe, seed, device, out, restart):
    """-> (images, run): images, networks and optimizers of a training, put back from its checkpoint if there is one."""
    out = Path(out or Path("runs", f"{Path(folder).resolve().name}-{gan_type}"))
    checkpoint = out / "checkpoint.pt"
    images = load_images(folder, device)
    config = {"folder": str(folder), "images": len(images), "gan_type": gan_type, "seed": seed, **asdict(recipe)}
    del config["title"]
    saved = read_checkpoint(checkpoint, config) if checkpoint.exists() and not restart else None
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    parts = {"G": generator(recipe.latent_dim, recipe.width), "D": discriminator(recipe.width)}
    for name, network in list(parts.items()):
        init_weights(network, recipe.init).to(device)
        parts[f"optimizer_{name}"] = OPTIMIZERS[recipe.optimizer](network.parameters(), recipe)
    losses = torch.zeros(max(1, len(images) // recipe.batch_size), len(LOGGED), device=device)
    run = Run(out, config, parts, torch.Generator(device).manual_seed(seed), losses)
    if saved:
        run.resume(saved)
    elif restart and checkpoint.exists():  # what is left of the earlier run must not be taken for this one's
        checkpoint.replace(out / "checkpoint_before_restart.pt")
        for old in (*(out / "samples").glob("epoch_*.png"), *out.glob("losses.*")):
            old.unlink()
    for left in (*out.glob("*.part"), *Path(".cache").glob("*.part")):  # by a process that was killed
        if time.time() - left.stat().st_mtime > 3600:
            left.unlink(missing_ok=True)
    return images, run


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


def train(folder, gan_type, *, seed=0, device="auto", out=None, sample_every=1, restart=False, **columns):
    """Trains the recipe `gan_type` on the pictures in `folder`; `columns` replace columns of the recipe.

    Carries on from the checkpoint in the run folder if there is one. Raises UserError for what the user can mend, and
    SystemExit after Ctrl-C or SIGTERM, once the update is finished and all is saved.
    """
    recipe, device = replace(RECIPES[gan_type], **columns), pick_device(device)
    images, run = prepare(folder, gan_type, recipe, seed, device, out, restart)
    G, D, optimizer_G, optimizer_D = run.parts.values()
    batch_size = min(recipe.batch_size, len(images))
    first, per_epoch = run.step, len(run.losses)  # the incomplete last batch of an epoch is dropped
    total = recipe.epochs * per_epoch
    if first >= total:
        return print(f"{run.out} is finished: {first:,} updates. A larger --epochs extends it, --restart begins anew.")
    print_networks(recipe)
    print(f"Type {gan_type}: {recipe.title}", *(f"with {name} {value}" for name, value in columns.items()), sep=", ")
    small = f" (the folder has no {recipe.batch_size})" if batch_size < recipe.batch_size else ""
    print(f"Batches of {batch_size}{small}, {per_epoch:,} in an epoch, on {device}")
    print(f"{'Carrying on' if first else 'Starting'} at update {first:,} of {total:,} in {run.out}", flush=True)

    one_fake = recipe.d_steps == recipe.g_steps == 1  # D and G are shown the same fakes, made once
    with deferred_signals() as caught, progress_bar(total * batch_size, first * batch_size, desc="training") as bar:
        clock = saved_at = time.perf_counter()
        for step in range(first, total):
            epoch, batch = divmod(step, per_epoch)
            if batch == 0 or step == first:
                order = shuffled(len(images), seed, epoch).to(images.device)
            real = real_batch(images, order[batch * batch_size :][:batch_size], device)
            with torch.set_grad_enabled(one_fake):
                fake = G(draw_noise(batch_size, recipe.latent_dim, run.rng))
            run.losses[batch, :4] = update_D(D, optimizer_D, real, fake.detach(), recipe, run.rng)
            for _ in range(recipe.g_steps if (step + 1) % recipe.d_steps == 0 else 0):
                if not one_fake:
                    fake = G(draw_noise(batch_size, recipe.latent_dim, run.rng))
                run.losses[batch, 4] += update_G(G, D, optimizer_G, fake, recipe) / recipe.g_steps
            run.step = step + 1

            # Housekeeping, on a cadence: nothing above this line waits for the device. Files come before words, since
            # whoever reads the words may have left by the same Ctrl-C.
            ends_epoch, last = batch + 1 == per_epoch, bool(caught) or run.step == total
            patience = 120 if not ends_epoch else 60 if device.type == "cuda" else 0  # s from checkpoint to checkpoint
            save_now = last or time.perf_counter() - saved_at > patience
            if ends_epoch or save_now:
                run.check_finite(batch + 1)
                run.seconds += time.perf_counter() - clock
                if ends_epoch:
                    run.end_epoch(batch_size)
                if ends_epoch and ((epoch + 1) % sample_every == 0 or run.step == total):
                    save_grid(sample(G, 64, seed), run.out / "samples" / f"epoch_{epoch + 1:03}.png")
                if save_now:
                    run.save()
                    saved_at = time.perf_counter()
                if ends_epoch and not (sys.stdout.isatty() and sys.stderr.isatty()):  # a terminal has the bar
                    print(*(f"{name} {value:.6g}" for name, value in run.rows[-1].items()), sep=", ", flush=True)
                clock = time.perf_counter()
            if bar.update(batch_size) and not ends_epoch:  # tqdm has just drawn; these figures are for its next time
                bar.set_postfix_str("epoch {}, D {:.3f}, G {:.3f}".format(epoch + 1, *run.losses[batch, [0, 4]]), False)
            if last:
                break
    if run.step < total:
        print(f"Stopped and saved at update {run.step:,} of {total:,}: the same command carries on.", flush=True)
        raise SystemExit(128 + caught[0])
    print(f"Finished. Look at {run.out / 'samples'} and {run.out / 'losses.png'}; draw more: bash test.sh Net_G.param")


# ----------------------------------------------------------------------------------------- command line


def between(kind, low, high):
    """An argparse type: a number of that kind from low to high, which infinity and nan are not."""

    def parse(text):
        try:
            if low <= kind(text) <= high:
                return kind(text)
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"{text!r} is no {kind.__name__} from {low:,} to {high:,}")

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
    titles = "; ".join(f"{number}: {recipe.title}" for number, recipe in RECIPES.items())
    parser.add_argument("gan_type", type=int, choices=RECIPES, help=titles)

    def column(group, name, text, **how):
        values = {number: getattr(recipe, name) for number, recipe in RECIPES.items()}
        same = len(set(values.values())) == 1
        default = values[1] if same else ", ".join(f"{value} for {number}" for number, value in values.items())
        group.add_argument(f"--{name}", help=f"{text} (default: {default})", **how)

    count, rate = between(int, 1, 10**6), between(float, 1e-9, 10**6)
    run = parser.add_argument_group("run")
    column(run, "epochs", "passes over the folder; more of them extend a run", type=count)
    run.add_argument("--seed", type=between(int, 0, 2**31), default=0, help="of every random number (default: 0)")
    run.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto: cuda if it works (default: auto)")
    run.add_argument("--out", help="run folder (default: runs/<name of ImageFolder>-<gan_type>)")
    run.add_argument("--sample_every", type=count, default=1, help="epochs between sample grids (default: 1)")
    run.add_argument("--restart", action="store_true", help="begin anew, in place of the run there (default: no)")

    recipe = parser.add_argument_group("recipe")
    column(recipe, "loss", "of D and G, from logits", choices=LOSSES)
    column(recipe, "gp_weight", "weight of the gradient penalty in D's loss; 0: none", type=between(float, 0, 10**6))
    column(recipe, "optimizer", "of D and of G", choices=OPTIMIZERS)
    column(recipe, "lr", "its step size; with bce, a sum over the batch, it belongs to the batch size", type=rate)
    column(recipe, "betas", "Adam's two decay rates", type=between(float, 0, 0.999999), nargs=2)
    column(recipe, "batch_size", "pictures in one update", type=count)
    column(recipe, "d_steps", "updates of D, a batch each, before G's turn", type=count)
    column(recipe, "g_steps", "updates of G in its turn", type=count)

    networks = parser.add_argument_group("networks")
    column(networks, "latent_dim", "numbers in a noise vector", type=between(int, 1, 10**4))
    column(networks, "width", "channels next to the picture; each stage has twice as many", type=between(int, 1, 1024))
    starts = "normal: every parameter from N(0, 0.02); dcgan: batch norms at 1 and 0"
    column(networks, "init", starts, choices=["normal", "dcgan"])
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
        exhausted = re.search("out of memory|not enough memory|alloc", str(error), re.IGNORECASE)
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
