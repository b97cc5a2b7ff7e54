"""Why does the report's WGAN-GP collapse? Trains it as it is, with one suspect changed at a time, and types 1 and 3.

    python tests/collapse.py anime_faces_64                          # every run that is not in the CSV yet
    python tests/collapse.py anime_faces_64 --runs type2 no_penalty --at_once 2
    python tests/collapse.py anime_faces_64 --full                   # the report's size: hours of a CPU
    python tests/collapse.py anime_faces_64 --runs                   # none: draws the figure and prints the table

Every run is a command of train.sh, in runs/collapse/; what was cut off carries on. Each measure also gets the norm of
D's gradient at real, fake and mixed pictures, and the penalty's share in the gradient of D's weights. Finished runs go
into Figures/collapse.csv, their pictures from first to last update into Figures/collapse/, and all together into
Figures/collapse.jpg. Types 1, 2 and 3 also leave their curves and their pictures at the report's epochs in Figures/.

Half size, as by default, means half the width and batches of 128 in place of 512, with the same step through the summed
loss (4 times the rate) and the same share of the averaged penalty beside it (a quarter of its weight).
"""

import argparse
import csv
import io
import math
import multiprocessing
import os
import shutil
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from PIL import Image  # noqa: E402
from texture import texture_distance  # noqa: E402

import train  # noqa: E402


def commands(full):
    """{run: words for train.sh}. A run of the report's size is called full_..."""
    small, prefix = (1, "full_") if full else (4, "")  # the report's batch is so many times this one
    width = 64 if full else 32
    base = f"2 --width {width} --batch_size {512 // small} --lr {0.001 * small} --gp_weight {10 / small} "
    # 9,918 updates of 30,000 pictures at the report's size, as its 100 epochs; at half of it a little over 3,200.
    base += f"--epochs {171 if full else 14} --sample_every {2 / small}"
    longer = "" if full else "--epochs 18"  # without penalty seed 1 breaks late
    runs = {
        "type2": f"{base} {longer}",
        "type2_seed1": f"{base} --seed 1 {longer}",
        "type2_seed2": f"{base} --seed 2 {longer}",
        "no_penalty": f"{base} --gp_weight 0",
        "no_penalty_seed1": f"{base} --gp_weight 0 --seed 1 {longer}",
        "penalty_summed": f"{base} --gp_weight 10 --gp_reduction sum",  # (d)
        "layer_norm": f"{base} --d_norm layer",  # (e)
        "G_three_times": f"{base} --g_steps 3",  # (a)
        "layer_norm_quarter_rate": f"{base} --d_norm layer --lr {0.00025 * small}",  # (e)
        "usual_start": f"{base} --init dcgan",  # (h)
        "half_rate": f"{base} --lr {0.0005 * small} {longer}",  # (c)
        "double_rate": f"{base} --lr {0.002 * small}",  # (c)
        # (g): D's logits pull with 1 / batch in place of 1 / 4 each, so the rate is a batch / 4 times the other.
        "critic_loss": f"{base} --loss wasserstein --lr 0.128 --gp_weight 0.078",
        "adam": f"{base} --optimizer adam --lr 0.0002",
        "adam_half_rate": f"{base} --optimizer adam --lr 0.0001",
        "type1": "1 --epochs 171 --sample_every 2"
        if full
        else "1 --width 32 --batch_size 32 --lr 0.0005 --epochs 11 --sample_every 0.5",
        # As type 3 was at first.
        "type3": f"3 --width {width} --epochs 18 --sample_every 0.5 --lr 0.0005 --batch_size 64 --gp_share 1 --ema 2190"
        " --d_norm layer --networks dcgan",
    }
    if full:  # what the report multiplied in; where there is hardware for bf16, all others take that
        runs |= {f"{name}_fp32": f"{runs[name]} --precision fp32" for name in ("type1", "type2")}
    else:
        runs["full_width"] = f"{base} --width 64"  # does the half width stand for it?
    return {prefix + name: words for name, words in runs.items()}


REPORTED = {  # epochs of 100 updates at which the report shows pictures
    "type1": (10, 20, 40, 60, 80, 100),
    "type2": (2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 31),
    "type3": (2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 31),
}
RUNS = ROOT / "runs" / "collapse"
CUT_OFF = "cut off here"


def probe(gan, images):
    """What losses.csv does not tell: D's mean gradient norm at three kinds of pictures, the penalty's share."""
    G, D, recipe, rng = gan.G, gan.D, gan.recipe, torch.Generator().manual_seed(0)
    real = next(train.real_batches(images, min(recipe.batch_size, len(images)), 0, 0, gan.rng.device))
    with torch.no_grad():
        noise = train.draw_noise(len(real), recipe.latent_dim, rng).to(real.device)
        before = {name: value.clone() for name, value in G.state_dict().items()}
        fake = G(noise)
        G.load_state_dict(before)  # its batch norms have seen nothing
    share = torch.rand(len(real), 1, 1, 1, generator=rng).to(real.device)
    row = {}
    for name, pictures in [("real", real), ("fake", fake), ("mixed", share * real + (1 - share) * fake)]:
        pictures = pictures.clone().requires_grad_()
        (slope,) = torch.autograd.grad(D(pictures).sum(), pictures)
        row[f"{name}_slope"] = slope.flatten(1).norm(dim=1).mean().item()
    d_loss, _, over_batch = train.LOSSES[recipe.loss]
    losses = train.REDUCTIONS[over_batch](d_loss(D(real).flatten(), D(fake).flatten()))
    penalties = train.gradient_penalty(D, real, fake, torch.Generator(real.device).manual_seed(0))
    norms = []
    for term in (losses, recipe.gp_weight * train.REDUCTIONS[recipe.gp_reduction](penalties)):
        gradients = torch.autograd.grad(term, list(D.parameters()), allow_unused=True)
        norms.append(torch.cat([gradient.flatten() for gradient in gradients if gradient is not None]).norm().item())
    row["penalty_share"] = norms[1] / max(sum(norms), 1e-30)
    return row


def measure(gan, images):
    """The columns that each measure of train.py gets beside its own."""
    return texture_distance(gan, images) | probe(gan, images)


def one(folder, name, words):
    """Trains one of the commands to its end, with measure() -> its name and the error that ended it."""
    words = [str(folder), *words.split(), "--out", name, "--save_as", f"{name}/Net_G.param"]  # no copy elsewhere
    print("bash train.sh", *words, flush=True)
    RUNS.mkdir(parents=True, exist_ok=True)
    os.chdir(RUNS)
    try:
        train.main(words, measure=measure)
    except (SystemExit, KeyboardInterrupt):
        os._exit(130)  # all is saved, and the pool must not go on with the next run
    except train.UserError as error:
        if "not finite" not in str(error):
            raise
        return name, str(error)  # that, too, is an end
    return name, ""


def read(path):
    return list(csv.DictReader(path.open())) if path.exists() else []


def grids(folder):
    """{updates: path of the grid drawn then}"""
    return {int(path.stem.removeprefix("update_")): path for path in sorted((folder / "samples").glob("update_*.png"))}


def cut(path, columns, rows):
    """The first columns x rows faces of a grid, always those of the same noise."""
    with Image.open(path) as grid:
        return grid.crop((2, 2, 66 * columns, 66 * rows))


def strip(paths, columns, rows):
    """The first columns x rows faces of each grid, side by side."""
    pieces = [cut(path, columns, rows) for path in paths]
    picture = Image.new("RGB", (len(pieces) * (66 * columns + 4) - 6, 66 * rows - 2), "white")
    for i, piece in enumerate(pieces):
        picture.paste(piece, (i * (66 * columns + 4), 0))
    return picture


def keep_pictures(name, figures):
    """Puts the pictures of a run into Figures/."""
    folder = RUNS / name
    drawn = grids(folder)
    if not drawn:
        return

    def spread(count):
        last, steps = len(drawn) - 1, min(count, len(drawn)) - 1
        return [list(drawn.values())[round(i * last / max(1, steps))] for i in range(steps + 1)]

    (figures / "collapse").mkdir(parents=True, exist_ok=True)
    strip(spread(8), 2, 4).save(figures / "collapse" / f"{name}.png")
    reported = REPORTED.get(name.removeprefix("full_"))
    if not reported:
        return
    shutil.copy(folder / "losses.png", figures / f"{name}_losses.png")
    strip(spread(16), 1, 1).save(figures / f"{name}_one_noise.png")
    near = [min(drawn, key=lambda updates: abs(updates - 100 * epoch)) for epoch in reported]
    figure = Figure(figsize=(16, 3 * math.ceil(len(near) / 6)), layout="constrained")
    places = figure.subplots(math.ceil(len(near) / 6), 6, squeeze=False).flat
    for axes, epoch, updates in zip(places, reported, near):
        axes.imshow(cut(drawn[updates], 4, 4))
        axes.set_title(f"like epoch {epoch}: update {updates:,}")
    for axes in figure.axes:
        axes.set_axis_off()
    save(figure, figures / f"{name}_epochs.jpg", 100)


def save(figure, path, dpi):
    with train.atomic_write(path) as file:
        figure.savefig(file, format="jpg", dpi=dpi, pil_kwargs={"quality": 90})  # a third of a PNG's bytes


def keep(name, error, table):
    """Puts a run's pictures and rows where they are kept; one that ended before its first measure is a row of words."""
    keep_pictures(name, table.parent)
    rows = [row for row in read(RUNS / name / "losses.csv") if row.get("distance")] or [{}]
    rows[-1]["error"] = error.partition(";")[0]
    rows = [row for row in read(table) if row["run"] != name] + [{"run": name, **row} for row in rows]
    with train.atomic_write(table) as file:
        text = io.StringIO()
        columns = dict.fromkeys(column for row in rows for column in row)
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        file.write(text.getvalue().encode())


def finished(table):
    rows = read(table)
    return {row["run"] for row in rows} - {row["run"] for row in rows if row["error"] == CUT_OFF}


def broken_from(rows):
    """The update from which on every distance is over twice the best before it, or None."""
    best, since = math.inf, None
    for row in rows:
        best = min(best, float(row["distance"]))
        since = None if float(row["distance"]) <= 2 * best else since or int(row["updates"])
    return since


def report(table, path, names):
    """Prints the table of Figures/collapse.md; draws a row a run: its pictures, and its curve."""
    runs = {name: [row for row in read(table) if row["run"] == name] for name in names}
    print("| run | best distance, at update | D's gradient norm then; highest while whole |", end=" ")
    print("at the end: update, distance, diversity | broken from | penalty's share, median |\n" + "| --- " * 6 + "|")
    for name, rows in runs.items():
        if rows and rows[0].get("distance"):
            best, end = min(rows, key=lambda row: float(row["distance"])), rows[-1]
            broken = broken_from(rows)
            slopes = [float(row["mixed_slope"]) for row in rows if not broken or int(row["updates"]) < broken]
            cells = [name.replace("_", " "), f"{float(best['distance']):.1f}, {int(best['updates']):,}"]
            cells += [f"{float(best['mixed_slope']):.2f}; {max(slopes):.2f}"]
            cells += [f"{int(end['updates']):,}, {float(end['distance']):.1f}, {float(end['diversity']):.2f}"]
            cells += [end["error"] or (f"{broken:,}" if broken else "no")]
            cells += [f"{100 * statistics.median(float(row['penalty_share']) for row in rows):.1f} %"]
            print(f"| {' | '.join(cells)} |")
        elif rows:
            print(f"| {name.replace('_', ' ')} | {rows[0]['error']} |" + " |" * 4)

    runs = {name: rows for name, rows in runs.items() if rows and rows[0].get("distance")}
    if not runs:
        return
    figure = Figure(figsize=(13.5, 1.5 * len(runs)), layout="constrained")
    grid = figure.subplots(len(runs), 2, width_ratios=[2, 1], squeeze=False)
    for (pictures, curve), (name, rows) in zip(grid, runs.items()):
        updates, broken = [int(row["updates"]) for row in rows], broken_from(rows)
        with Image.open(table.parent / "collapse" / f"{name}.png") as picture:
            pictures.imshow(picture.crop((0, 0, picture.width, 130)))
        pictures.set(xlim=(0, 1086), ylim=(130, 0))  # to scale, however few there are
        pictures.set_axis_off()
        end = rows[-1]["error"] or (f"broken from {broken:,}" if broken else "")
        span = f"updates {updates[0]:,} to {updates[-1]:,}"
        pictures.set_title(": ".join([name.replace("_", " "), span, *filter(None, [end])]), loc="left")
        curve.plot(updates, [float(row["distance"]) for row in rows], ".-", label="distance")
        curve.plot(updates, [100 * float(row["diversity"]) for row in rows], ".-", label="diversity, %")
        curve.axhline(float(rows[0]["floor"]), color="grey", linewidth=0.8)
        if broken:
            curve.axvline(broken, color="black", linewidth=0.8, linestyle="--")
        curve.set(xlim=(0, max(4250, updates[-1])), ylim=(0, 300))
        slope = curve.twinx()
        norms = [float(row["mixed_slope"]) for row in rows]
        slope.plot(updates, norms, ".-", color="tab:red", label="norm of D's gradient, right scale")
        slope.set_ylim(0, 5)
    figure.legend(handles=[*curve.lines[:2], *slope.lines], loc="outside upper right", ncols=3, frameon=False)
    curve.set_xlabel("updates of D")
    save(figure, path, 70)


def main():
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    parser.add_argument("folder", type=Path, help="folder of pictures")
    parser.add_argument("--runs", nargs="*", metavar="RUN", help="only these (default: those not in the CSV)")
    parser.add_argument("--at_once", type=int, default=1, help="runs side by side, they share the cores (default: 1)")
    parser.add_argument("--full", action="store_true", help="the report's size, not half of it")
    parser.add_argument("--figures", type=Path, default=ROOT / "Figures", help="where results go (default: Figures)")
    parser.add_argument("--more", default="", metavar="OPTIONS", help="of train.sh, for all runs: one text in quotes")
    args = parser.parse_args()
    table = args.figures.absolute() / "collapse.csv"
    runs = {name: f"{words} {args.more}" for name, words in commands(args.full).items()}
    if set(args.runs or ()) - runs.keys():
        parser.error(f"--runs: choose from {', '.join(runs)}")
    wanted = [name for name in runs if name not in finished(table)] if args.runs is None else args.runs
    if args.at_once > 1:
        os.environ["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // args.at_once))
    with ProcessPoolExecutor(args.at_once, multiprocessing.get_context("spawn")) as pool:
        trainings = [pool.submit(one, args.folder.absolute(), name, runs[name]) for name in wanted]
        try:
            for training in as_completed(trainings):
                keep(*training.result(), table)
            status = 0
        except (KeyboardInterrupt, BrokenProcessPool):
            status = 130
    for name in runs:  # as far as they came
        if name not in finished(table) and (RUNS / name / "losses.csv").exists():
            keep(name, CUT_OFF, table)
    report(table, table.with_name("collapse_full.jpg" if args.full else "collapse.jpg"), runs)
    return status


if __name__ == "__main__":
    sys.exit(main())
