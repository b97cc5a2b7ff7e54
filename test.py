"""Draw new pictures, 64x64 pixels, with a trained generator, and measure how near they are to a folder's.

    bash test.sh Net_G.param                                     # 64 pictures in one grid, samples.png
    bash test.sh Net_G.param --count 16 --seed 7 --out mine.png
    bash test.sh Net_G.param --count 1000 --folder drawn         # one file each: drawn/00000.png ...
    bash test.sh Net_G.param --compare ImageFolder               # distance and diversity, as train.sh measures them

The same seed gives the same pictures, and picture i does not depend on how many are drawn beside it.
"""

import os
import signal
import sys
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C while PyTorch is imported: one line in place of thirty
    signal.signal(signal.SIGINT, lambda *_: os.write(2, b"interrupted\n") and os._exit(130))

import torch

from train import MAX_SEED, SAMPLE_SEED, OneLineParser, UserError, between, generator, is_out_of_memory, load
from train import load_images, pick_device, quality, real_reference, run_program, sample, save_grid, save_picture


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


def command_line():
    """The parser of test.py."""
    parser = OneLineParser("test.sh", __doc__)
    parser.add_argument("generator", metavar="Net_G.param", help="what train.py saved")
    parser.add_argument("--count", type=between(int, 1, 10**5), default=64, help="pictures to draw (default: 64)")
    noise = "of the noise (default: one of its own, that of the sample grids of train.sh)"
    parser.add_argument("--seed", type=between(int, 0, MAX_SEED), default=SAMPLE_SEED, help=noise)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--out", type=Path, default=Path("samples.png"), help="grid to write (default: samples.png)")
    where.add_argument("--folder", type=Path, help="write one PNG a picture into this folder, in place of the grid")
    parser.add_argument("--compare", metavar="ImageFolder", help="measure against the pictures of this folder, too")
    cache = "folder of the decoded pictures of --compare (default: .cache)"
    parser.add_argument("--cache", default=".cache", help=cache)
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
        reference = real_reference(load_images(args.compare, cache=args.cache), device)
        found = quality(sample(G, reference.count, args.seed), reference)
        print("distance {distance:.1f} (floor {floor:.1f}), diversity {diversity:.2f}".format(**found))
    pictures = sample(G, args.count, args.seed)
    if args.folder:
        for i, picture in enumerate(pictures):
            save_picture(picture, args.folder / f"{i:05}.png", "--folder")
        print(f"{args.count:,} pictures in {args.folder}")
    else:
        save_grid(pictures, args.out)
        print(f"{args.count:,} pictures, eight to a row, in {args.out}")


if __name__ == "__main__":
    sys.exit(run_program(main, "test.sh"))
