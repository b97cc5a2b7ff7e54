"""The texture distance of tests/collapse.py: it sees strokes and colours, not faces.

It is the sliced Wasserstein distance between the patches of two sets of pictures (Karras et al. 2018,
arXiv:1710.10196, section 5). In training KID has taken its place.
"""

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

import train

PATCHES, DIRECTIONS = 64, 128  # of each picture, and to project them on


def laplacian_pyramid(pictures):
    """Pictures [N, 3, H, W] -> detail of three sizes: as they are, at half the size, and the rest at a quarter."""
    levels, level = [], pictures.float()
    for _ in range(2):
        smaller = F.avg_pool2d(level, 2)
        levels.append(level - F.interpolate(smaller, scale_factor=2, mode="bilinear"))
        level = smaller
    return [*levels, level]


def projected_patches(pictures):
    """Pictures uint8 [N, 3, H, W] -> of each pyramid level, sorted: [3, DIRECTIONS, N x PATCHES].

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


def sliced_wasserstein(one, other):
    """Of two results of projected_patches: mean over levels and directions, times 1000 as in the paper; 0 if equal."""
    return 1000 * (one - other).abs().mean().item()


@lru_cache(maxsize=1)  # a run measures the same folder each time
def real_patches(images, device):
    """The patches of the pictures that train.real_reference() draws, how many pictures these are, and the floor: the

    distance that as many other real pictures get. No generator can hope for less.
    """
    count = max(1, min(train.PICTURES, len(images) // 2))
    order = train.shuffled(len(images), 0, 0).to(images.device)
    draw, other = (projected_patches(images[index].to(device)) for index in (order[:count], order[-count:]))
    return draw, count, sliced_wasserstein(draw, other)


def texture_distance(gan, images):
    """The columns `distance` and `floor` of a measure: of pictures drawn by gan.G_ema from the folder's images."""
    patches, count, floor = real_patches(images, gan.rng.device)
    drawn = projected_patches(train.sample(gan.G_ema, count).to(gan.rng.device))
    return {"distance": sliced_wasserstein(drawn, patches), "floor": floor}
