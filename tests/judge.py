"""What does the judge say of pictures that are wrong in a known way? Prints a table in Markdown.

    python tests/judge.py anime_faces_64

Each set is 1,024 real pictures, changed by hand. They are compared with 1,024 others, as a measure compares drawn ones,
but in fp32 and at two sizes of the judge's input. The best row possible is the first: other real pictures as they are.
"""

import io
import sys
from functools import partial
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent)]

import torch  # noqa: E402
from PIL import Image, ImageFilter  # noqa: E402
from torchvision.transforms.functional import pil_to_tensor, to_pil_image  # noqa: E402

import test  # noqa: E402
import train  # noqa: E402

SIZES = 128, 224  # pixels of a side, of what the judge sees; 224 is what it was trained on


def by_pillow(change, pictures):
    """Pictures uint8 [N, 3, 64, 64] -> the same, each changed by a function of Pillow's images."""
    return torch.stack([pil_to_tensor(change(to_pil_image(picture))) for picture in pictures])


def webp(quality, image):
    """An image, written and read again as WebP of that quality."""
    file = io.BytesIO()
    image.save(file, "WEBP", quality=quality)
    return Image.open(file).convert("RGB")


def noisy(pictures):
    """Pictures with Gaussian noise of 16 grey values."""
    noise = 16 * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    return (pictures + noise).clamp(0, 255).round().to(torch.uint8)


SETS = {
    "other real pictures": lambda pictures: pictures,
    "mirrored": lambda pictures: pictures.flip(3),
    "WebP, quality 80": partial(by_pillow, partial(webp, 80)),
    "WebP, quality 20": partial(by_pillow, partial(webp, 20)),
    "half contrast": lambda pictures: (pictures.float() / 2 + 64).round().to(torch.uint8),
    "grey": partial(by_pillow, lambda image: image.convert("L").convert("RGB")),
    "noise, 16 grey values": noisy,
    "blur, radius 1": partial(by_pillow, lambda image: image.filter(ImageFilter.GaussianBlur(1))),
    "blur, radius 2": partial(by_pillow, lambda image: image.filter(ImageFilter.GaussianBlur(2))),
    "one in eight, in eight copies": lambda pictures: pictures[::8].repeat(8, 1, 1, 1),
}


def main(folder):
    images, _ = train.load_images(folder)
    count, order = min(train.PICTURES, len(images) // 2), train.shuffled(len(images), 0, 0)  # as real_reference() draws
    real, other = images[order[:count]], images[order[-count:]]
    judges = [train.create_judge(torch.device("cpu"), size) for size in SIZES]
    real_features = [judge(real) for judge in judges]
    print("|", " | ".join(["pictures", *(f"KID x 1000 at {size}" for size in SIZES)]), end=" ")
    print("| precision | recall | diversity |\n" + "| --- " * 6 + "|")
    for name, change in SETS.items():
        pictures = change(other)
        features = [judge(pictures) for judge in judges]
        kids = [train.kid(one, two)[0] for one, two in zip(features, real_features)]
        *_, precision, _, recall, _ = test.distances(features[0], real_features[0], real_features[0])
        diversity = train.mean_distance(pictures) / train.mean_distance(real)
        shares = (f"| {value:.2f}" for value in (precision, recall, diversity))
        print("|", name, *(f"| {value:.1f}" for value in kids), *shares, "|", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
