"""What would train better than type 3 (`modulated`) in the same minutes? Trains each candidate for so many minutes
of process time.

    OMP_NUM_THREADS=1 python tests/candidates.py anime_faces_64 modulated --minutes 24

Half width, one core each; start two at once to fill two cores. Measures do not count. What is printed at 3, 6, 12, 18
and 24 minutes is of an average of G's weights with a half-life of 5 % of the pictures so far (EDM's form), and at the
end also of 10 and of 20 %. The judge also sees it at 224 pixels. Rows and grids go into runs/candidates/NAME.

R1: Mescheder et al. 2018, arXiv:1801.04406. R3GAN: Huang et al. 2024, arXiv:2501.05441. EDM: Karras et al. 2022,
arXiv:2206.00364. DiffAugment: Zhao et al. 2020, arXiv:2006.10738. Modulation: Chen et al. 2019, arXiv:1810.01365.
Standard deviation: Karras et al. 2018, arXiv:1710.10196. PacGAN: Lin et al. 2018, arXiv:1712.04086. Hinge loss and
spectral norm: Miyato et al. 2018, arXiv:1802.05957. One stage: Shen et al. 2021, arXiv:2103.00430. EDM2: Karras et
al. 2024, arXiv:2312.02696.
"""

import argparse
import copy
import json
import math
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

import test  # noqa: E402
import train  # noqa: E402


@dataclass
class Candidate:
    loss: str = "wasserstein"  # and [4]'s penalty; hinge: none; logistic: R1 on real; relativistic: R3GAN's, R1 and R2
    share: int = 4  # the penalty takes one in so many pictures of each batch
    G: str = "fine"  # networks of train.py: dcgan, fine, modulated; resized: fine without the layer at full size
    D: str = "fine"
    norm: str = "inner"  # of D's blocks, as train.py's --d_norm; none: none at all; spectral: of its convolutions
    he: bool = False  # D begins from He's start, for a critic without a norm; else from N(0, 0.02)
    lr: float = 0.001
    lr_D: float = 0.0  # of D alone; 0: as G's
    betas: tuple = (0.0, 0.9)
    width: int = 32
    G_width: int = 32
    hidden: int = 32  # numbers in the layer between the noise and its scales and shifts
    one_stage: bool = False  # G takes the gradient that D's loss gives the fakes, before D's step
    stddev: bool = False  # D sees the standard deviation among pictures
    pac: int = 1  # pictures that D sees at once, as PacGAN
    batch_size: int = 32
    mirror: bool = False
    augment: bool = False  # DiffAugment: D sees real and drawn pictures changed at random
    pictures: int = 0  # of the folder, to train on; the others judge. 0: all train, all judge
    fall: float = 0.0  # the share of the time, at its end, in which the rate falls to 0
    root: int = 0  # after so many pictures the rate falls with the root of their number, as EDM2's


DCGAN = Candidate(G="dcgan", D="dcgan")  # type 3 as it was when these were tried,
EVERYWHERE = replace(DCGAN, norm="layer")  # before that,
BEFORE = replace(EVERYWHERE, lr=0.0005, batch_size=64, share=1)  # as it was before
R1 = replace(BEFORE, loss="logistic", norm="none", betas=(0.0, 0.99))
R3 = replace(R1, loss="relativistic")
MODULATED = Candidate(G="modulated")
CANDIDATES = {
    "before": BEFORE,
    "before_double_rate": replace(BEFORE, lr=0.001),
    "before_half_batch": replace(BEFORE, batch_size=32),
    "r1": R1,
    "r3": R3,
    "everywhere": EVERYWHERE,
    "dcgan": DCGAN,
    "resized": Candidate(G="resized", D="dcgan"),
    "resized_fine_G": Candidate(D="dcgan"),
    "resized_fine_D": Candidate(G="resized"),
    "fine": Candidate(),
    "fine_r3": Candidate(loss="relativistic", norm="none", he=True, betas=(0.0, 0.99)),
    "fine_few": Candidate(pictures=500),
    "fine_few_mirrored": Candidate(pictures=500, mirror=True),
    "fine_few_augmented_mirrored": Candidate(pictures=500, augment=True, mirror=True),
    "fine_batch16": Candidate(batch_size=16),
    "modulated": MODULATED,
    "modulated_batch16": replace(MODULATED, batch_size=16),
    "modulated_batch16_beta2": replace(MODULATED, batch_size=16, betas=(0.0, 0.99)),
    "modulated_batch16_lr_D_half": replace(MODULATED, batch_size=16, lr_D=0.0005),
    "modulated_batch16_falling": replace(MODULATED, batch_size=16, fall=0.5),
    "modulated_share8": replace(MODULATED, share=8),
    "modulated_pac2": replace(MODULATED, pac=2),
    "modulated_lr_D_double": replace(MODULATED, lr_D=0.002),
    "modulated_hinge": replace(MODULATED, loss="hinge", norm="spectral", he=True, lr=0.0005, lr_D=0.001),
    "modulated_few_mirrored": replace(MODULATED, pictures=500, mirror=True),
    "modulated_one_stage": replace(MODULATED, one_stage=True),
    "modulated_stddev": replace(MODULATED, stddev=True),
    "modulated_wide_G": replace(MODULATED, G_width=48),
    "modulated_hidden128": replace(MODULATED, hidden=128),
    "modulated_root": replace(MODULATED, root=20_000),
}
RAMPS = 0.05, 0.1, 0.2  # half-lives of averages, as shares of the pictures so far


class Stddev(nn.Module):
    """One channel more: the mean standard deviation of the values in groups of four pictures, [B, C, H, W] -> C + 1."""

    def forward(self, x):
        group = math.gcd(4, len(x))
        variance = x.float().unflatten(0, (group, -1)).var(0, correction=0)
        deviation = (variance + 1e-8).sqrt().mean((1, 2, 3)).to(x.dtype).repeat(group)
        return torch.cat([x, deviation[:, None, None, None].expand(-1, 1, *x.shape[2:])], 1)


def networks(candidate):
    """G and D, with train.py's first weights."""
    width = candidate.width
    G = train.generator(100, candidate.G_width, networks=candidate.G.replace("resized", "fine"))
    for block in G if candidate.hidden != 32 else ():
        if getattr(block, "modulation", None):
            last = nn.Linear(candidate.hidden, block.modulation[2].out_features)
            nn.init.zeros_(last.weight), nn.init.zeros_(last.bias)
            block.modulation = nn.Sequential(nn.Linear(100, candidate.hidden), nn.ReLU(), last)
    if candidate.G == "resized":
        G = train.Network(*G[:-3], nn.Upsample(scale_factor=2), nn.Conv2d(width, 3, 3, padding=1), nn.Tanh())
    D = train.discriminator(width, candidate.norm.replace("spectral", "none"), networks=candidate.D)
    if candidate.pac > 1:
        D[0] = nn.Conv2d(3 * candidate.pac, D[0].out_channels, 3, padding=1)
    if candidate.stddev:
        D = train.Network(*D[:-1], Stddev(), nn.Conv2d(D[-1].in_channels + 1, 1, 4, bias=False))
    train.init_weights(G, "dcgan"), train.init_weights(D, "dcgan")
    for layer in D.modules() if candidate.he else ():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, 0.2)
    for layer in [*D.modules()] if candidate.norm == "spectral" else ():
        if isinstance(layer, nn.Conv2d):
            nn.utils.parametrizations.spectral_norm(layer)
    return G, D


def augmented(x, rng):
    """DiffAugment: random brightness, saturation, contrast, shift and a grey square, [B, 3, H, W] -> the same."""
    count, _, side, _ = x.shape
    brightness, saturation, contrast, *places = torch.rand(7, count, 1, 1, 1, generator=rng)
    x = x + brightness - 0.5
    x = torch.lerp(x.mean(1, keepdim=True), x, 2 * saturation)
    x = torch.lerp(x.mean((1, 2, 3), keepdim=True), x, contrast + 0.5)
    down, right, row, column = (place.view(count) for place in places)
    affine = torch.eye(2, 3).repeat(count, 1, 1)
    affine[:, :, 2] = (torch.stack([right, down], 1) - 0.5).mul(side / 4).round() * 2 / side  # whole pixels, an eighth
    grid = F.affine_grid(affine, x.shape, align_corners=False)
    x = F.grid_sample(x, grid, align_corners=False)
    pixels = torch.arange(side) / side
    covered = ((pixels - row[:, None]).abs() < 0.25)[:, :, None] & ((pixels - column[:, None]).abs() < 0.25)[:, None]
    return x.masked_fill(covered[:, None], 0)


def squared_gradient(logits, pictures):
    """||gradient of D||^2 at each picture, [B]."""
    (gradient,) = torch.autograd.grad(logits.sum(), pictures, create_graph=True)
    return gradient.square().sum((1, 2, 3))


def update_D(D, optimizer, real, fake, candidate, rng):
    """One step of D."""
    if candidate.loss in ("wasserstein", "hinge"):
        fake_logits, real_logits = D(fake), D(real)
        loss = (fake_logits - real_logits).mean()
        if candidate.loss == "hinge":
            loss = (F.relu(1 + fake_logits) + F.relu(1 - real_logits)).mean()
        else:
            some = slice(None, None, candidate.share)
            loss = loss + 10 * train.gradient_penalty(D, real[some], fake[some], rng).mean()
        return train.descend(loss, D, optimizer)
    real.requires_grad_()
    fake = fake.clone().requires_grad_()
    logits = D(torch.cat([real, fake])).flatten()
    real_logits, fake_logits = logits.chunk(2)
    if candidate.loss == "relativistic":
        loss = F.softplus(fake_logits - real_logits).mean()
    else:
        loss = (F.softplus(-real_logits) + F.softplus(fake_logits)).mean()
    penalty = squared_gradient(real_logits, real)
    if candidate.loss == "relativistic":
        penalty = penalty + squared_gradient(fake_logits, fake)
    train.descend(loss + penalty.mean() / 2, D, optimizer)


def update_G(G, D, optimizer, real, fake, candidate):
    """One step of G."""
    logits = D(fake)
    if candidate.loss in ("wasserstein", "hinge"):
        loss = -logits
    elif candidate.loss == "relativistic":
        with torch.no_grad():
            real_logits = D(real)
        loss = F.softplus(real_logits - logits)
    else:
        loss = F.softplus(-logits)
    train.descend(loss.mean(), G, optimizer)


def update(G, D, optimizers, real, fake, candidate, rng):
    """One step of D, then one of G; in one stage, where G's loss is D's with the other sign, of both at once."""
    if not candidate.one_stage:
        update_D(D, optimizers[1], real, fake.detach(), candidate, rng)
        return update_G(G, D, optimizers[0], real.detach(), fake, candidate)
    some = slice(None, None, candidate.share)
    penalty = train.gradient_penalty(D, real[some], fake[some].detach(), rng).mean()
    for optimizer in optimizers:
        optimizer.zero_grad()
    (D(fake).mean() - D(real).mean() + 10 * penalty).backward()
    for parameter in G.parameters():
        parameter.grad.neg_()
    for optimizer in optimizers:
        optimizer.step()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("name", choices=CANDIDATES)
    parser.add_argument("--minutes", type=float, default=24)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    candidate, cpu = CANDIDATES[args.name], torch.device("cpu")
    out = ROOT / "runs" / "candidates" / f"{args.name}_{args.seed}"
    out.mkdir(parents=True, exist_ok=True)
    images, _ = train.load_images(args.folder)
    others = images
    if candidate.pictures:
        order = train.shuffled(len(images), 77, 0)
        images, others = images[order[: candidate.pictures]], images[order[candidate.pictures :]]
    judge, large_judge = train.create_judge(cpu), train.create_judge(cpu, 224)
    compared = train.shuffled(len(others), 0, 0)[:2048]
    real_features = judge(others[compared])
    large_features = large_judge(others[compared[:1024]])

    torch.manual_seed(args.seed)
    rng = torch.Generator().manual_seed(args.seed)
    G, D = networks(candidate)
    for network in (G, D):
        network.precision = train.PRECISIONS[train.pick_precision("auto", cpu)]
        network.layout = torch.channels_last
        network.to(memory_format=torch.channels_last)
    options = {"lr": candidate.lr, "betas": candidate.betas, "fused": True}
    optimizers = [torch.optim.Adam(network.parameters(), **options) for network in (G, D)]
    averages = [copy.deepcopy(G) for _ in RAMPS]
    for average in averages:
        average.precision = torch.float32
    flips = torch.Generator().manual_seed(args.seed + 77)
    batches = train.real_batches(images, candidate.batch_size, args.seed, 0, cpu)

    def measure(minutes, step, last):
        row = {"name": args.name, "seed": args.seed, "minutes": round(minutes, 1), "updates": step}
        for ramp, average in zip(RAMPS, averages):
            if not last and ramp != RAMPS[0]:
                continue
            noise = torch.Generator().manual_seed(train.NORM_SEED)
            train.update_bn((train.draw_noise(64, 100, noise) for _ in range(8)), average)
            pictures = train.sample(average, 2048)
            found = test.distances(judge(pictures), real_features, real_features)
            row[str(ramp)] = {"KID x 1000": found[0], "precision": found[5], "recall": found[7]}
            if ramp == RAMPS[0]:
                row[str(ramp)]["KID x 1000 at 224"] = train.kid(large_judge(pictures[:1024]), large_features)[0]
                train.save_grid(pictures[:64], out / f"{round(minutes):02}.png")
        print(json.dumps(row), flush=True)
        with open(out / "rows.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")

    points, step, used, since = [m for m in (3, 6, 12, 18) if m < args.minutes], 0, 0.0, time.process_time()
    while True:
        seconds = used + time.process_time() - since
        share = seconds / 60 / args.minutes
        factor = min(1, max(0, 1 - share) / candidate.fall) if candidate.fall else 1
        factor *= min(1, (candidate.root / (step * candidate.batch_size + 1)) ** 0.5) if candidate.root else 1
        for optimizer, lr in zip(optimizers, (candidate.lr, candidate.lr_D or candidate.lr)):
            optimizer.param_groups[0]["lr"] = lr * factor
        real = next(batches)
        if candidate.mirror:
            real = torch.where(torch.rand(len(real), 1, 1, 1, generator=flips) < 0.5, real.flip(3), real)
        fake = G(train.draw_noise(len(real), 100, rng))
        if candidate.augment:
            real, fake = augmented(real, rng), augmented(fake, rng)
        real, fake = (pictures.reshape(-1, 3 * candidate.pac, *pictures.shape[2:]) for pictures in (real, fake))
        update(G, D, optimizers, real, fake, candidate, rng)
        step += 1
        with torch.no_grad():
            for ramp, average in zip(RAMPS, averages):
                weight = 1 - 0.5 ** (1 / (ramp * step))
                torch._foreach_lerp_(list(average.parameters()), list(G.parameters()), weight)
        if share >= 1 or points and seconds / 60 >= points[0]:
            measure(seconds / 60, step, share >= 1)
            if share >= 1:
                return
            points.pop(0)
            used, since = seconds, time.process_time()


if __name__ == "__main__":
    main()
