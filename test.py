"""Draws new pictures, 64x64 pixels, with a trained generator, and measures how near they are to a folder's.

    bash test.sh Net_G.param                                     # 64 pictures in one grid, samples.png
    bash test.sh Net_G.param --count 16 --seed 7 --out mine.png
    bash test.sh Net_G.param --count 1000 --folder drawn         # one file each: drawn/00000.png ...
    bash test.sh Net_G.param --compare ImageFolder               # distance and diversity, as train.sh measures them

The same seed gives the same pictures, and picture i does not depend on how many are drawn beside it.
"""

import sys
from pathlib import Path

from train import OneLineParser, UserError, between, run_program
from train import load_generator, pick_device, replacing, sample, save_grid
from train import load_images, quality, real_reference


def command_line():
    """The parser of test.py."""
    parser = OneLineParser("test.sh", __doc__)
    parser.add_argument("generator", metavar="Net_G.param", help="what train.py saved")
    parser.add_argument("--count", type=between(int, 1, 10**5), default=64, help="pictures to draw (default: 64)")
    parser.add_argument("--seed", type=between(int, 0, 2**31), default=0, help="of the noise (default: 0)")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--out", type=Path, default=Path("samples.png"), help="grid to write (default: samples.png)")
    where.add_argument("--folder", type=Path, help="write one PNG a picture into this folder, in place of the grid")
    parser.add_argument("--compare", metavar="ImageFolder", help="measure against the pictures of this folder, too")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps; auto: cuda if it works (default: auto)")
    return parser


def main(argv=None):
    """Draws as the command line says."""
    args = command_line().parse_args(argv)
    if args.out.suffix.lower() != ".png":
        raise UserError(f"--out {args.out}: the grid is a PNG; give a name that ends in .png")
    device = pick_device(args.device)
    G = load_generator(args.generator, device)
    if args.compare:
        real = real_reference(load_images(args.compare), device)
        found = quality(sample(G, real.count, args.seed), real)
        print("distance {distance:.1f} (floor {floor:.1f}), diversity {diversity:.2f}".format(**found))
    pictures = sample(G, args.count, args.seed)
    if args.folder:
        from torchvision.transforms.functional import to_pil_image

        for i, picture in enumerate(pictures):
            with replacing(args.folder / f"{i:05}.png") as file:
                to_pil_image(picture).save(file, "PNG")
        print(f"{args.count:,} pictures in {args.folder}")
    else:
        save_grid(pictures, args.out)
        print(f"{args.count:,} pictures, eight to a row, in {args.out}")


if __name__ == "__main__":
    sys.exit(run_program(main, "test.sh"))
