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
from argparse import Namespace
from functools import partial
from pathlib import Path

from train import HERE, INSTALL, MAX_SEED, PICTURES, SAMPLE_SEED, OneLineParser, UserError, between, cached
from train import create_judge, draw_noise, drawn, generator, kid, load, load_images, mean_distance, pick_device
from train import pictures_of, progress_bar, run_program, save_animation, save_grid, say, shuffled

import torch  # after train.py, which says in a line what does not fit
import torch.nn.functional as F
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

POINTS, STEPS, FRAME_MS = 8, 15, 70  # of a walk: vectors, pictures from one to the next, milliseconds of each
NEAR = 0.05  # a drawn picture is suspicious if so few of the real ones are nearer to another real one


def load_generator(path, device="cpu"):
    """The generator of a Net_G.param, in eval mode, built with the sizes and networks that are stored in it.
    Raises UserError for any other file."""
    inside, shipped = Path(path, "Net_G.param"), HERE / "Figures" / "Net_G.param"
    if str(path) == "Net_G.param" and not inside.parent.exists() and shipped.exists():
        say(f"{path}: none here yet: drawing with {shipped}", error=True)
        path = shipped
    stored = load(path, f"name {inside}" if inside.is_file() else "train.sh makes one")
    try:
        with torch.device("meta"):  # no memory for a size that only a damaged file could name
            sizes = stored["latent_dim"], stored["width"], stored.get("size", 64)
            G = generator(*sizes, stored.get("networks", "dcgan"))
        G.load_state_dict(stored["weights"], assign=True)
        G.layout = torch.channels_last  # as in training, for the same bits
        return G.to(device, torch.float32, memory_format=G.layout).eval()
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:
        raise UserError(f"{path}: not a Net_G.param of this program: it holds no generator's weights") from None


def feature_extractor(features, weights, device):
    """A function of pictures uint8 [N, 3, H, W] -> features [N, F]: train.py's judge, or Inception, that of papers.
    Raises ImportError where a package is missing, UserError where there are no weights."""
    if features == "lite0":
        return create_judge(device)
    from torch_fidelity.utils import create_feature_extractor

    options = {"cuda": False, "feature_extractor_weights_path": weights, "verbose": False}
    try:
        extractor = create_feature_extractor("inception-v3-compat", ["2048"], **options).to(device)
    except Exception as error:  # a file of no weights raises one of a dozen kinds
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


def compare(draw, images, cache, args, device):
    """Says how near drawn pictures are to the folder's -> the indices of the args.best that are most like real ones."""
    pictures, order = torch.cat([*draw(min(args.count, PICTURES))]), shuffled(len(images), 0, 0)
    diversity = mean_distance(pictures) / (mean_distance(images[order[:PICTURES]]) or 1)
    say(f"diversity {diversity:.2f}, of {len(pictures):,} drawn pictures")
    try:
        judge = feature_extractor(args.features, args.weights, device)
    except ImportError:
        why = f"KID, FID, precision, recall and --best need more packages; install: {INSTALL}"
        if args.best:
            raise UserError(why) from None
        return say(why, error=True)
    fake = features_of_all(judge, draw(args.count), args.count, "drawn")
    count = min(len(fake), len(images) // 2)  # of each kind: FID, precision and recall depend on it
    if count < 2:
        raise UserError(f"--compare {args.compare}: it takes two pictures drawn and four real ones at least")

    def features_of_real(name, indices):
        def make():
            return features_of_all(judge, (images[some] for some in indices.split(256)), count, "real")

        return make() if args.weights else cached(Path(f"{cache}_{args.features}_{name}_{count}.pt"), make)

    real, other = features_of_real("real", order[:count]), features_of_real("other", order[-count:])
    say("KID x 1000 {:.1f} +- {:.1f} ({:.1f}), FID {:.1f} ({:.1f}), precision {:.2f} ({:.2f}), recall {:.2f} ({:.2f})"
        .format(*distances(fake[:count], real, other)))  # fmt: skip
    say(f"features of {args.features}, {count:,} drawn and {count:,} real pictures; in brackets other real ones")
    if count < 2048:
        say("FID is not to be trusted with fewer than 2,048 pictures; KID is, within its spread", error=True)
    return realism(fake, real).argsort(descending=True)[: args.best].tolist() if args.best else None


def distances(fake, real, other):
    """Features, [N, F] each -> KID x 1000, its spread, floor; FID, its floor; precision, its floor; recall, its floor.
    Computed by torch-fidelity: Binkowski et al. 2018, Heusel et al. 2017, Kynkaanniemi et al. 2019 with k = 5."""
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
    Precision counts all those over 1 as real."""
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
    """Writes the drawn pictures that lie nearest to a real one, each beside it; says how many lie near."""
    if len(images) < 2:
        raise UserError(f"--nearest {args.nearest}: it takes two real pictures at least")
    try:
        judge = feature_extractor(args.features, args.weights, device)
    except ImportError:
        say(f"Compared are pixels, blurred to 16x16; features need more packages; install: {INSTALL}", error=True)

        def judge(pictures):
            return F.adaptive_avg_pool2d(pictures.float(), 16).flatten(1)

    real = features_of_all(judge, images.split(256), len(images), "real")
    fake = features_of_all(judge, draw(args.count), args.count, "drawn")
    found = [torch.cdist(some, real).min(1) for some in fake.split(256)]
    distances, indices = (torch.cat(parts) for parts in zip(*found))
    apart = []  # from real pictures to the nearest other one
    for some in real[:2048].split(256):
        between_real = torch.cdist(some, real)
        between_real[between_real < 0.01 * between_real.mean()] = torch.inf  # the same picture, also where it is twice
        apart.append(between_real.amin(1))
    near = torch.cat(apart).quantile(NEAR)
    order = distances.argsort()[:32].tolist()
    pairs = torch.stack([picked(draw, order), images[indices[order]]], 1)
    save_grid(pairs.flatten(0, 1), args.out)
    share, most = (distances < near).double().mean(), f"{1 - NEAR:.0%} of real ones lie to another"
    say(f"{share:.1%} of {len(fake):,} drawn pictures lie nearer to a real one than {most}; over {NEAR:.0%}: copies")
    say(f"The nearest {len(order)}, each to the left of its real one, in {args.out}")


def walk(G, path, count, seed):
    """Writes an animation of `count` walks side by side, each through POINTS noise vectors and back to the first one.
    Between two vectors it goes along the sphere: in 100 dimensions all noise lies near one (White 2016, section 2)."""
    rng, latent_dim = torch.Generator().manual_seed(seed), G[0].conv.in_channels
    points = torch.stack([draw_noise(POINTS, latent_dim, rng) for _ in range(count)])
    frames = []
    for step in range(POINTS * STEPS):
        one, other = points[:, step // STEPS], points[:, (step // STEPS + 1) % POINTS]
        angle = F.cosine_similarity(one, other).clamp(-0.999, 0.999).acos()[:, None]
        share = step % STEPS / STEPS
        noise = (one * ((1 - share) * angle).sin() + other * (share * angle).sin()) / angle.sin()
        frames.append(to_pil_image(make_grid(pictures_of(G, noise))))
    save_animation(frames, path, FRAME_MS)
    say(f"{count:,} walks side by side, {len(frames):,} pictures of each, in {path}")


def command_line():
    """The parser of test.py. What is not given is not in its result."""
    parser = OneLineParser("test.sh", __doc__)
    what = "what train.py saved; with --compare or --nearest also a folder of what another program drew, seen at 64x64"
    parser.add_argument("generator", metavar="Net_G.param", help=what)
    count = "pictures to draw, or to judge (default: 64, at most 10,000 in a grid; --compare: 2,048, and a grid "
    count += "of 64; --nearest: 1,024; --walk: 8, at most 1,000)"
    parser.add_argument("--count", type=between(int, 1, 10**6), help=count)
    parser.add_argument("--seed", type=between(int, 0, MAX_SEED), help="of noise, to 2**31 (default: the one of grids)")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--out", type=Path, help="grid to write (default: samples.png)")
    where.add_argument("--folder", type=Path, help="write one PNG a picture into this folder, in place of the grid")
    where.add_argument("--walk", type=Path, metavar="FILE", help=f"write a GIF or WebP, through {POINTS} pictures")
    real = parser.add_mutually_exclusive_group()
    real.add_argument("--compare", metavar="ImageFolder", help="measure against the pictures of this folder, too")
    real.add_argument("--nearest", metavar="ImageFolder", help="draw those nearest to its pictures, each beside it")
    parser.add_argument("--best", type=between(int, 1, 64), help="--compare shows the 1 to 64 most like real ones")
    parser.add_argument("--cache", help="folder of the decoded pictures of --compare and --nearest (default: .cache)")
    features = "network of the judge; inception is that of papers, and is downloaded (default: lite0)"
    parser.add_argument("--features", choices=["lite0", "inception"], help=features)
    parser.add_argument("--weights", metavar="FILE", help="weights of inception, in place of a download")
    parser.add_argument("--device", help="cpu, cuda, mps; auto: cuda if there is a card (default: auto)")
    return parser


NEEDS = {"best": {"compare"}, "cache": {"compare", "nearest"}, "features": {"compare", "nearest"}}  # else useless
ENDINGS = {"out": {".png"}, "walk": {".gif", ".webp"}}
COUNTS = {"compare": (2048, 10**6), "nearest": (1024, 10**6), "folder": (64, 10**6), "walk": (8, 1000)}  # usual, most
DEFAULTS = {"seed": SAMPLE_SEED, "out": Path("samples.png"), "cache": ".cache", "features": "lite0", "device": "auto"}
DEFAULTS |= dict.fromkeys(("folder", "walk", "compare", "nearest", "best", "weights"))


def check_options(given):
    """Raises UserError for options that would do nothing where they stand, or write into a folder in use."""
    for name in NEEDS.keys() & given.keys():
        if not NEEDS[name] & given.keys():
            raise UserError(f"--{name} does nothing alone: add --{' or --'.join(sorted(NEEDS[name]))}")
    for name in ENDINGS.keys() & given.keys():
        if given[name].suffix.lower() not in ENDINGS[name]:
            raise UserError(f"--{name} {given[name]}: give a name that ends in {' or '.join(sorted(ENDINGS[name]))}")
    if {"compare", "nearest"} & given.keys() and {"folder", "walk"} & given.keys():
        raise UserError("--compare and --nearest write a grid: leave out --folder and --walk")
    if "weights" in given and given.get("features") != "inception":
        raise UserError("--weights: they are inception's; add --features inception")
    if "seed" in given and os.path.isdir(given["generator"]):
        raise UserError(f"--seed: {given['generator']} is a folder, which needs no noise; leave it out")
    if "folder" in given and given["folder"].is_dir() and any(given["folder"].iterdir()):
        raise UserError(f"--folder {given['folder']}: not empty; name a new folder")


def source(args, device):
    """draw(count), which yields uint8 [up to 64, 3, H, W], from a generator or from a folder of pictures."""
    if not os.path.isdir(args.generator) or not (args.compare or args.nearest):
        G = load_generator(args.generator, device)
        return partial(drawn, G, seed=args.seed)
    pictures, _ = load_images(args.generator, args.cache)
    order = shuffled(len(pictures), 0, 0)
    return lambda count: (pictures[some] for some in order[:count].split(64))


def write(draw, args, best):
    """Writes the pictures, one file each or one grid: those of the indices `best`, or the first ones."""
    if args.folder:
        with progress_bar(args.count, desc="drawing") as bar:
            for i, picture in enumerate(picture for pictures in draw(args.count) for picture in pictures):
                save_grid(picture, args.folder / f"{i:05}.png")
                bar.update()
        return say(f"{args.count:,} pictures in {args.folder}")
    pictures = picked(draw, best) if best else torch.cat([*draw(min(args.count, 64) if args.compare else args.count)])
    save_grid(pictures, args.out)
    order = "those most like real ones, the best first" if best else "eight to a row"
    say(f"{len(pictures):,} pictures, {order}, in {args.out}")


def main(argv=None):
    """Draws as the command line says."""
    given = vars(command_line().parse_args(argv))
    check_options(given)
    count, most = next((COUNTS[name] for name in COUNTS if name in given), (64, 10**4))
    if given.get("count", 1) > most:
        raise UserError(f"--count {given['count']}: at most {most:,} here; --folder drawn writes one file a picture")
    args = Namespace(**{"count": count, **DEFAULTS, **given})
    if torch.__version__ < "2.10":
        why = f"with PyTorch {torch.__version__} a malicious file can run code (CVE-2026-24747)"
        say(f"{why}: draw only with files that you trust, or install: {INSTALL}", error=True)
    device = pick_device(args.device)
    if args.walk:
        return walk(load_generator(args.generator, device), args.walk, args.count, args.seed)
    draw = source(args, device)
    if args.compare or args.nearest:
        images, digest = load_images(args.compare or args.nearest, args.cache, next(iter(draw(1))).shape[-1])
    if args.nearest:
        return nearest(draw, images, args, device)
    write(draw, args, compare(draw, images, Path(args.cache, digest), args, device) if args.compare else None)


if __name__ == "__main__":
    os._exit(run_program(main, "test.sh"))  # at once, as train.py does
