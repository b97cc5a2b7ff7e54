"""Draws made-up anime faces: training pictures for the demo and the tests, from nothing but a seed.

    python tests/faces.py FOLDER [--count 2000] [--seed 0] [--size 96]

writes FOLDER/face_00000.png and so on. Face i of a seed depends on the seed and i alone, so the same
command always gives the same pictures, and a second run only adds the files that are missing.

Everything is drawn in a unit frame that is pinned to the head: (0, 0) is the middle of the picture,
x runs right and y runs down, both from -1 to 1. The eyes lie near y = 0.15, the chin at y = 0.78.
The Pen tilts, scales and shifts that frame onto the picture, so no other function has to know of it.
"""

import argparse
import math
import os
import random
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

try:
    from PIL import Image, ImageDraw
except ModuleNotFoundError:
    raise SystemExit(f"Pillow is not installed here: {sys.executable} -m pip install -r requirements.txt") from None

OVERSAMPLE = 2  # faces are drawn this many times too large and then shrunk, which smooths their edges

INK, WHITE, WINE = (52, 34, 48), (255, 255, 255), (150, 52, 66)
HAIRS = [(44, 40, 52), (72, 50, 44), (128, 82, 54), (186, 130, 76), (240, 208, 124), (250, 228, 172),
         (246, 158, 186), (226, 96, 140), (92, 140, 220), (58, 72, 140), (126, 200, 226), (112, 182, 124),
         (60, 138, 120), (150, 104, 196), (196, 164, 226), (206, 210, 222), (194, 58, 56), (228, 122, 62)]
SKINS = [(255, 232, 218), (255, 224, 204), (252, 214, 190), (244, 200, 170), (222, 170, 134), (178, 124, 92)]
IRISES = [(60, 120, 216), (56, 168, 206), (64, 164, 96), (152, 92, 206), (212, 66, 84), (226, 150, 48),
          (146, 88, 52), (222, 96, 160), (96, 104, 150)]
CLOTHES = [(250, 250, 252), (48, 56, 96), (170, 50, 64), (66, 70, 80), (240, 190, 204), (120, 170, 200)]

BACKS = {  # the right half of the hair behind the head, downwards; x counts in half widths of the hair
    "short": [(1.02, 0.1), (0.98, 0.36), (0.8, 0.56)],
    "ragged": [(1.16, -0.1), (0.98, 0.08), (1.22, 0.3), (0.95, 0.34), (1.04, 0.66), (0.7, 0.5)],
    "bob": [(1.08, 0.1), (1.16, 0.5), (1.0, 0.82), (0.5, 0.86)],
    "flip": [(1.04, 0.2), (1.02, 0.6), (1.26, 0.86), (0.9, 0.94), (0.4, 0.9)],
    "long": [(1.06, 0.2), (1.12, 0.8), (1.2, 1.7)],
    "wavy": [(1.14, 0.0), (1.06, 0.25), (1.26, 0.55), (1.12, 0.85), (1.34, 1.2), (1.1, 1.7)],
    "tails": [(1.0, 0.1), (0.9, 0.4)],
    "buns": [(1.0, 0.1), (0.94, 0.4)],
}
FRINGES = {  # heights of the lower edge of the hair in front, ear to ear: a tip of a lock, a notch, a tip ...
    "straight": [0.06, -0.2, -0.07, -0.18, -0.09, -0.2, -0.06, -0.18, -0.07, -0.16, 0.1],
    "parted": [0.12, -0.18, -0.06, -0.3, -0.2, -0.6, -0.2, -0.3, -0.06, -0.18, 0.12],
    "swept": [0.16, -0.12, 0.0, -0.18, -0.06, -0.26, -0.14, -0.6, -0.1, -0.2, 0.12],
    "spiky": [0.14, -0.3, -0.02, -0.4, -0.06, -0.44, 0.02, -0.4, 0.0, -0.34, 0.1],
    "middle lock": [0.12, -0.3, -0.1, -0.38, 0.08, -0.36, -0.1, -0.3, 0.12],
    "short": [-0.1, -0.38, -0.27, -0.42, -0.28, -0.44, -0.3, -0.42, -0.26, -0.4, -0.12],
    "open": [0.0, -0.58, -0.44, -0.6, 0.02],
}
# The weights of four neighbouring points in a Catmull-Rom curve, for four steps between the middle two.
WEIGHTS = [(((2 - t) * t - 1) * t / 2, ((3 * t - 5) * t * t + 2) / 2, ((4 - 3 * t) * t + 1) * t / 2,
            (t - 1) * t * t / 2) for t in (0, 0.25, 0.5, 0.75)]


def mix(one, other, share):
    """The colour that lies `share` of the way from one to the other."""
    return tuple(round(a + (b - a) * share) for a, b in zip(one, other))


def smooth(points, closed=True):
    """A curve through the points."""
    knots = [points[-1], *points, *points[:2]] if closed else [points[0], *points, points[-1]]
    curve = [(a * px + b * qx + c * rx + d * sx, a * py + b * qy + c * ry + d * sy)
             for (px, py), (qx, qy), (rx, ry), (sx, sy) in zip(knots, knots[1:], knots[2:], knots[3:])
             for a, b, c, d in WEIGHTS]
    return curve if closed else [*curve, points[-1]]


def oval(x, y, rx, ry):
    """Eight points on an ellipse: smooth() makes it round."""
    return [(x + rx * math.cos(k * math.pi / 4), y + ry * math.sin(k * math.pi / 4)) for k in range(8)]


def flipped(points):
    """The mirror image, which runs back from the last point to the first."""
    return [(-x, y) for x, y in reversed(points)]


class Pen:
    """Draws in the unit frame, which it tilts, scales and shifts; colours may carry an alpha."""

    def __init__(self, image, tilt, scale, dx, dy):
        self.draw = ImageDraw.Draw(image, "RGBA")
        half = image.width / 2
        self.unit, self.left, self.top = scale * half, (1 + dx) * half, (1 + dy) * half
        self.cos, self.sin = (self.unit * f(math.radians(tilt)) for f in (math.cos, math.sin))

    def place(self, points):
        cos, sin, left, top = self.cos, self.sin, self.left, self.top
        return [(left + x * cos - y * sin, top + x * sin + y * cos) for x, y in points]

    def shape(self, points, fill, edge=None, width=0.014, sharp=False):
        spots = self.place(points) if sharp else smooth(self.place(points))
        self.draw.polygon(spots, fill)
        if edge:
            self.draw.line([*spots, spots[0]], edge, max(1, round(width * self.unit)))

    def pair(self, points, *style, about=0.0):
        """A shape and its mirror image; x counts from the mirror."""
        for side in (-1, 1):
            self.shape([(about + side * x, y) for x, y in points], *style)

    def stroke(self, points, colour, width=0.016):
        self.draw.line(smooth(self.place(points), closed=False), colour, max(1, round(width * self.unit)))


def fringe_edge(rng, width):
    """The lower edge of a fringe, from temple to temple."""
    heights = FRINGES[rng.choice(list(FRINGES))]
    edge = [(1.12 * i / (len(heights) - 1) - 0.56 + rng.uniform(-0.025, 0.025), y + rng.uniform(-0.03, 0.03))
            for i, y in enumerate(heights)]
    return [(-width, 0.0), *(flipped(edge) if rng.random() < 0.5 else edge), (width, 0.0)]


def locks(edge):
    """The same edge with its straight lines bent: a lock falls from its notch and then turns to its tip."""
    bent = []
    for (ax, ay), (bx, by) in zip(edge, edge[1:]):
        notch, tip = (ax, bx) if ay < by else (bx, ax)
        bent += [(ax, ay), (0.75 * notch + 0.25 * tip, (ay + by) / 2)]
    return bent


def choose_look(rng):
    """What the parts of one face have to agree on; what concerns one part only, that part draws from rng."""
    hair = tuple(min(255, max(0, channel + rng.randint(-14, 14))) for channel in rng.choice(HAIRS))
    skin, width = rng.choice(SKINS), rng.uniform(0.68, 0.75)
    return SimpleNamespace(
        rng=rng, hair=hair, hair_dark=mix(hair, (40, 16, 60), 0.3), hair_edge=mix(hair, (30, 14, 36), 0.62),
        skin=skin, skin_dark=mix(skin, (190, 80, 90), 0.26), skin_edge=mix(skin, (110, 40, 50), 0.6),
        width=width, crown=rng.uniform(-0.98, -0.88), fringe=fringe_edge(rng, width),
        turn=rng.uniform(-0.04, 0.04),  # moves the features sideways, as if the face looked there
        eye_x=rng.uniform(0.27, 0.3), eye_y=rng.uniform(0.13, 0.18), eye_h=rng.uniform(0.15, 0.2))


def background(size, rng):
    """One light colour, or a gradient between two."""
    top, other = (mix([rng.randint(60, 255) for _ in "rgb"], WHITE, rng.uniform(0.2, 0.8)) for _ in range(2))
    strip = Image.new("RGB", (1, 2), top)
    strip.putpixel((0, 1), rng.choice([top, other]))
    return strip.resize((size, size), Image.Resampling.BILINEAR)


def back_hair(pen, look):
    """The hair behind the head, in shadow, and what is tied up beside it."""
    w, style = look.width, look.rng.choice(list(BACKS))
    if style == "tails":
        tail = [(0.8, -0.5), (1.3, -0.62), (1.6, -0.1), (1.5, 0.6), (1.35, 1.2), (1.22, 0.5), (1.1, 0.0)]
        pen.pair([(x * w, y) for x, y in tail], look.hair, look.hair_edge)
    elif style == "buns":
        pen.pair(oval(0.8 * w, look.crown + 0.12, 0.25, 0.25), look.hair, look.hair_edge)
        pen.pair(oval(0.8 * w, look.crown + 0.12, 0.12, 0.12), look.hair_dark)
    half = [(0.6 * w, look.crown + 0.12), (w, -0.4), *((x * w, y) for x, y in BACKS[style])]
    pen.shape([*half, *flipped(half)], look.hair_dark, look.hair_edge, sharp=style == "ragged")


def body(pen, look):
    """Shoulders, the neck in the shadow of the chin, and a collar."""
    cloth, trim = look.rng.sample(CLOTHES, 2)
    half = [(0.16, 0.9), (0.5, 1.0), (0.86, 1.12), (1.0, 2.0)]
    pen.shape([*half, *flipped(half)], cloth, INK)
    half = [(0.17, 0.55), (0.19, 0.94), (0, 1.1)]
    pen.shape([*half, *flipped(half)], look.skin_dark, look.skin_edge, sharp=True)
    if look.rng.random() < 0.6:
        pen.pair([(0.18, 0.86), (0.02, 1.1), (0.3, 1.16)], trim, INK)


def head(pen, look):
    """Ears, face, the shadow of the fringe and, on some, a blush."""
    pen.pair(oval(0.57, 0.2, 0.09, 0.14), look.skin, look.skin_edge)
    jaw = look.rng.uniform(0.92, 1.06)
    half = [(0.3, -0.6), (0.56, -0.2), (0.57, 0.2), (0.47 * jaw, 0.48), (0.22 * jaw, 0.7), (0.04, 0.78)]
    pen.shape([*half, *flipped(half)], look.skin, look.skin_edge)
    shadow = [(0.8 * x, y + 0.07) for x, y in locks(look.fringe)]
    pen.shape([*shadow, (0.5, -0.5), (-0.5, -0.5)], look.skin_dark, sharp=True)
    if look.rng.random() < 0.55:
        pen.pair(oval(0.36, look.eye_y + 0.27, 0.11, 0.055), (240, 90, 100, 70), about=look.turn)


def eyes(pen, look):
    """White, iris, pupil, lights and lashes of both eyes."""
    iris, w, h = look.rng.choice(IRISES), look.rng.uniform(0.165, 0.195), look.eye_h
    slant = look.rng.uniform(-0.2, 0.25)
    for side in (-1, 1):
        x, y = look.turn + side * look.eye_x, look.eye_y

        def at(points, side=side, x=x, y=y):
            """From the frame of the eye, which spans -1 to 1 and whose x points to the ear."""
            return [(x + side * px * w, y + (py - slant * px) * h) for px, py in points]

        pen.shape(at([(-1, 0), (-0.6, -0.72), (0.05, -1), (0.7, -0.72), (1, 0), (0.72, 0.72), (0, 1),
                     (-0.66, 0.76)]), WHITE)
        pen.shape(oval(x, y, 0.7 * w, 0.97 * h), mix(iris, INK, 0.62))
        pen.shape(oval(x, y + 0.16 * h, 0.58 * w, 0.74 * h), iris)
        pen.shape(oval(x, y + 0.5 * h, 0.4 * w, 0.34 * h), mix(iris, WHITE, 0.5))
        pen.shape(oval(x, y - 0.04 * h, 0.26 * w, 0.42 * h), mix(iris, INK, 0.85))
        # The light comes from one place, so it sits on the same side of both eyes.
        pen.shape(oval(x - 0.28 * w, y - 0.42 * h, 0.25 * w, 0.26 * h), WHITE)
        pen.shape(oval(x + 0.3 * w, y + 0.46 * h, 0.12 * w, 0.13 * h), WHITE)
        pen.shape(at([(-1.1, -0.1), (-0.64, -0.9), (0.05, -1.22), (0.8, -0.98), (1.3, -0.3), (0.95, 0.05),
                     (0.7, -0.6), (0.05, -0.84), (-0.6, -0.58)]), INK)
        pen.stroke(at([(0.7, 0.82), (0, 1.06), (-0.5, 0.92)]), look.skin_edge)


def brows(pen, look):
    """Tapered strokes whose inner ends rise or fall with the mood."""
    y, mood = look.eye_y - look.eye_h - 0.1, look.rng.uniform(-0.04, 0.05)
    arch = [(0.12, y - mood + 0.02), (0.28, y - 0.05), (0.44, y + mood / 2), (0.28, y - 0.015)]
    pen.pair(arch, (*look.hair_edge, 210), about=look.turn)


def nose_and_mouth(pen, look):
    x, y = look.turn * 1.5, look.eye_y + 0.25
    pen.shape([(x - 0.012, y), (x + 0.03, y + 0.03), (x - 0.025, y + 0.035)], look.skin_edge, sharp=True)
    y, wide, kind = y + 0.16, look.rng.uniform(0.08, 0.15), look.rng.choice(["line", "line", "open", "small"])
    if kind == "line":
        corner, dip, middle = look.rng.choice([(-0.03, 0.02, 0.03), (0, 0, 0.005), (-0.02, 0.03, -0.005)])
        half = [(0, y + middle), (wide / 2, y + dip), (wide, y + corner)]
        pen.stroke([(x + a, b) for a, b in [*flipped(half[1:]), *half]], WINE, 0.024)
    elif kind == "open":
        half = [(wide, -0.03), (wide / 2, 0.08)]
        pen.shape([(x + a, y + b) for a, b in [*half, *flipped(half)]], WINE, INK)
        pen.shape(oval(x, y + 0.055, 0.45 * wide, 0.03), (236, 120, 124))
    else:
        pen.shape(oval(x, y, 0.04, 0.035), WINE, look.skin_edge)


def fringe(pen, look):
    """The hair from the crown down to the forehead, with strands and a band of light."""
    w, top = look.width, look.crown
    half = [(w, 0.0), (1.01 * w, -0.42), (0.62 * w, top + 0.1), (0, top)]
    dome = smooth([*half, *flipped(half[:-1])], closed=False)
    pen.shape(locks(look.fringe) + dome, look.hair, look.hair_edge, sharp=True)
    for x, y in look.fringe[2:-2:2]:
        pen.stroke([(x, y), (0.95 * x, (y + top) / 2), (0.4 * x, top + 0.1)], look.hair_dark)
    arc = [(x, top + 0.22 + 0.4 * x * x) for x in (-0.48, -0.36, -0.24, -0.12, 0, 0.12, 0.24, 0.36, 0.48)]
    drips = [(x, y + look.rng.choice([0.01, 0.05, 0.1])) for x, y in arc[1:-1]]
    pen.shape(smooth(arc, closed=False) + drips[::-1], mix(look.hair, WHITE, 0.4), sharp=True)


def side_locks(pen, look):
    """A strand in front of each ear, down to the cheek or to the chest."""
    w, end = look.width, look.rng.choice([0.4, 0.55, 0.75, 1.0])
    pen.pair([(0.8 * w, -0.3), (1.01 * w, -0.3), (1.04 * w, 0.1), (0.98 * w, 0.6 * end), (0.82 * w, end),
              (0.8 * w, 0.5 * end), (0.74 * w, 0.0)], look.hair, look.hair_edge)


def glasses(pen, look):
    frame, y = look.rng.choice([INK, WINE, (60, 84, 150)]), look.eye_y + 0.02
    pen.pair(oval(look.eye_x, y, 0.235, 0.23), (255, 255, 255, 36), frame, 0.028, about=look.turn)
    pen.stroke([(look.turn - 0.06, y - 0.04), (look.turn + 0.06, y - 0.04)], frame, 0.03)


def ornament(pen, look):
    """A ribbon, a clip or a band in the hair."""
    side, w, colour = look.rng.choice([-1, 1]), look.width, look.rng.choice(HAIRS[6:])
    x, y, kind = side * 0.66 * w, look.crown + 0.3, look.rng.choice(["ribbon", "clip", "band"])
    if kind == "ribbon":
        wing = [(0, y), (0.12, y - 0.12), (0.24, y - 0.13), (0.22, y + 0.1), (0.1, y + 0.08)]
        pen.pair(wing, colour, INK, about=x)
        pen.shape(oval(x, y, 0.05, 0.06), mix(colour, INK, 0.25), INK)
    elif kind == "clip":
        for drop in (0.04, 0.13):
            pen.stroke([(x - 0.11, y + drop + 0.04 * side), (x + 0.11, y + drop - 0.04 * side)], colour, 0.05)
    else:
        half = [(w, -0.36), (0.74 * w, look.crown + 0.24), (0, look.crown + 0.12)]
        pen.stroke([*half, *flipped(half[:-1])], colour, 0.08)


def draw_face(seed: int, index: int, size: int = 96) -> Image.Image:
    """Face `index` of `seed`, an RGB picture of size x size: layer over layer, from back to front."""
    rng = random.Random(f"{seed}/{index}")
    look, image = choose_look(rng), background(size * OVERSAMPLE, rng)
    pen = Pen(image, tilt=rng.triangular(-12, 12), scale=rng.uniform(0.92, 1.1),
              dx=rng.uniform(-0.06, 0.06), dy=rng.uniform(0.0, 0.1))
    # The brows come after the fringe because they show through it, as the genre has it.
    layers = [(back_hair, 1), (body, 1), (head, 1), (nose_and_mouth, 1), (eyes, 1), (glasses, 0.14),
              (side_locks, 0.65), (fringe, 1), (brows, 1), (ornament, 0.3)]
    for layer, chance in layers:
        if rng.random() < chance:
            layer(pen, look)
    return image.resize((size, size), Image.Resampling.BOX)


def positive(text):
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def main():
    parser = argparse.ArgumentParser(description="Draw made-up anime faces.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="where the faces go; made if missing")
    parser.add_argument("--count", type=positive, default=2000, help="how many faces the folder shall hold")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other faces")
    parser.add_argument("--size", type=positive, default=96, help="width and height in pixels")
    args = parser.parse_args()
    paths = (args.folder / f"face_{index:05d}.png" for index in range(args.count))
    try:
        args.folder.mkdir(parents=True, exist_ok=True)
        missing = [(index, path) for index, path in enumerate(paths) if not path.exists()]
        for index, path in missing:
            # Renaming is all or nothing: an interruption leaves no half picture under the final name.
            draw_face(args.seed, index, args.size).save(path.with_suffix(".part"), "PNG", compress_level=1)
            os.replace(path.with_suffix(".part"), path)
    except OSError as error:
        print(f"faces.py: {error}; choose another folder, or free some space", file=sys.stderr)
        sys.exit(2)
    print(f"drew {len(missing)} of {args.count} faces in {args.folder}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    main()
