"""How many demo faces have two eyes of unlike colour? The report complains of such faces.

    python tests/eyes.py demo_faces                 # faces that faces.py drew: 5.9 %
    python tests/eyes.py Net_G_demo.param           # those that a generator draws that was trained on them

The place of the eyes is that of faces.py. In a window on the lower half of each iris the most colourful pixels are
taken, and their mean hue is compared between the two windows.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import numpy as np  # noqa: E402
import torch  # noqa: E402

import train  # noqa: E402

LEFT, RIGHT, TOP, BOTTOM, HALF = 22.8 / 64, 41.2 / 64, 37 / 64, 45 / 64, 5 / 64  # of the side of a picture
APART = 50  # degrees between two hues that are not the same colour


def hue(window):
    """The mean hue of the most colourful fifth of the pixels, uint8 [3, H, W], in degrees."""
    red, green, blue = window.reshape(3, -1).astype(np.float64)
    x, y = red - (green + blue) / 2, np.sqrt(3) / 2 * (green - blue)  # in the plane of colours without their grey
    colourful = np.hypot(x, y).argsort()[-max(1, len(x) // 5) :]
    return np.degrees(np.arctan2(y[colourful].sum(), x[colourful].sum()))


def unlike(pictures):
    """Of pictures uint8 [N, 3, S, S] -> bool [N]: whether the eyes have two colours."""
    side, found = pictures.shape[-1], []
    for picture in pictures.numpy():
        rows = picture[:, round(TOP * side) : round(BOTTOM * side)]
        windows = (rows[:, :, round((x - HALF) * side) : round((x + HALF) * side) + 1] for x in (LEFT, RIGHT))
        left, right = map(hue, windows)
        found.append(abs((left - right + 180) % 360 - 180) > APART)
    return np.array(found)


def main(source):
    if Path(source).is_dir():
        pictures = train.load_images(source)[0][:1000]
    else:
        import test

        pictures = train.sample(test.load_generator(source, torch.device("cpu")), 1000)
    found = unlike(pictures)
    print(f"{found.mean():.1%} of {len(found):,} faces have two eyes of unlike colour")


if __name__ == "__main__":
    main(sys.argv[1])
