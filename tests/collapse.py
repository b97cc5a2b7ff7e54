"""Why does the report's WGAN-GP collapse? Trains it as it is, and with one suspect changed at a time.

    python tests/collapse.py anime_faces_64                          # every run that has no rows in the CSV yet
    python tests/collapse.py anime_faces_64 --runs type2 no_penalty --at_once 2
    python tests/collapse.py anime_faces_64 --full                   # the report's size, for a GPU

Every run is a command of train.sh, in runs/collapse/; what was cut off carries on. Each measure also gets the norm of
D's gradient at real, fake and mixed pictures, and the penalty's share in the gradient of D's weights. Finished runs go
into Figures/collapse.csv, a strip of their pictures into Figures/collapse/, and all together into Figures/collapse.png.
A run whose losses cease to be numbers ends there; if that is before its first measure, it only says so.

Half size, as by default, means half the width and batches of 128 in place of 512, with the same step through the summed
loss (4 times the rate) and the same share of the averaged penalty beside it (a quarter of its weight).
"""

import argparse
import csv
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from PIL import Image  # noqa: E402

import train  # noqa: E402

HALF = "--width 32 --batch_size 128 --lr 0.004 --gp_weight 2.5 --epochs 14 --sample_every 0.5"
FULL = "--epochs 40 --sample_every 1"
RUNS = {  # name: what it changes, at half size and at full
    "type2": ("", ""),
    "no_penalty": ("--gp_weight 0", "--gp_weight 0"),
    "type2_seed1": ("--seed 1", "--seed 1"),
    "no_penalty_seed1": ("--gp_weight 0 --seed 1", "--gp_weight 0 --seed 1"),
    "penalty_summed": ("--gp_weight 10 --gp_reduction sum", "--gp_reduction sum"),  # (d)
    "layer_norm": ("--d_norm layer", "--d_norm layer"),  # (e)
    "G_three_times": ("--g_steps 3", "--g_steps 3"),  # (a)
    "usual_start": ("--init dcgan", "--init dcgan"),  # (h)
    "half_rate": ("--lr 0.002", "--lr 0.0005"),  # (c)
    "double_rate": ("--lr 0.008", "--lr 0.002"),  # (c)
    # (g): D's logits pull with 1 / batch in place of 1 / 4 each, so the rate is a batch / 4 times the other.
    "critic_loss": 2 * ("--loss wasserstein --lr 0.128 --gp_weight 0.078",),
    "adam": 2 * ("--optimizer adam --lr 0.0002",),
    "type2_seed2": ("--seed 2", "--seed 2"),
}
PROBED = ["real_slope", "fake_slope", "mixed_slope", "penalty_share"]


def probe(run):
    """What losses.csv does not tell: D's mean gradient norm at three kinds of pictures, the penalty's share."""
    (G, D), rng = list(run.parts.values())[:2], torch.Generator().manual_seed(0)
    index = train.shuffled(len(run.images), 0, 0)[: run.batch_size].to(run.images.device)
    real = train.real_batch(run.images, index, run.rng.device)
    with torch.no_grad():
        noise = train.draw_noise(len(real), run.recipe.latent_dim, rng).to(real.device)
        statistics = {name: value.clone() for name, value in G.state_dict().items()}
        fake = G(noise)
        G.load_state_dict(statistics)  # its batch norms have seen nothing
    share = torch.rand(len(real), 1, 1, 1, generator=rng).to(real.device)
    row = {}
    for name, pictures in [("real", real), ("fake", fake), ("mixed", share * real + (1 - share) * fake)]:
        pictures = pictures.clone().requires_grad_()
        (slope,) = torch.autograd.grad(D(pictures).sum(), pictures)
        row[f"{name}_slope"] = slope.flatten(1).norm(dim=1).mean().item()
    d_loss, _, over_batch = train.LOSSES[run.recipe.loss]
    losses = over_batch(d_loss(D(real).flatten(), D(fake).flatten()))
    penalties = train.gradient_penalty(D, real, fake, torch.Generator(real.device).manual_seed(0))
    norms = []
    for term in (losses, run.recipe.gp_weight * getattr(penalties, run.recipe.gp_reduction)()):
        gradients = torch.autograd.grad(term, list(D.parameters()), allow_unused=True)
        norms.append(torch.cat([gradient.flatten() for gradient in gradients if gradient is not None]).norm().item())
    row["penalty_share"] = norms[1] / max(sum(norms), 1e-30)
    return row


def one(folder, name, options):
    """Trains one of the RUNS to its end, with a probe at each measure. Returns its name and whether it came there."""
    end_row = train.Run.end_row

    def probed(run, measure):
        end_row(run, measure)
        run.rows[-1].update(probe(run) if measure else dict.fromkeys(PROBED))

    train.Run.end_row = probed
    words = [str(folder), "2", *options.split(), "--out", f"runs/collapse/{name}"]
    print("bash train.sh", *words, flush=True)
    try:
        train.main(words)
    except train.UserError as error:
        print(f"{name}: {error}", flush=True)
        return name, "no finite losses" in str(error)  # that, too, is an end
    return name, True


def strip(folder, columns=8):
    """The first 2 x 4 faces of evenly spaced grids of a run, side by side, first to last."""
    grids = sorted((folder / "samples").iterdir())
    chosen = [grids[round(i * (len(grids) - 1) / (columns - 1))] for i in range(columns)]
    picture = Image.new("RGB", (columns * 136 - 4, 264), "white")
    for i, path in enumerate(chosen):
        with Image.open(path) as grid:
            picture.paste(grid.crop((2, 2, 134, 266)), (i * 136, 0))
    return picture


def read(path):
    return list(csv.DictReader(path.open())) if path.exists() else []


def collect(name, table, size):
    """Puts a finished run's rows and strip where they are kept."""
    folder = Path("runs", "collapse", name)
    rows = [{"run": name, "size": size, **row} for row in read(folder / "losses.csv") if row["distance"]]
    if not rows:
        return print(f"{name}: it ended before its first measure; only its last words tell of it", flush=True)
    rows = [row for row in read(table) if row["run"] != name] + rows
    with train.replacing(table) as file:
        lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
        file.write(("\n".join(lines) + "\n").encode())
    kept = table.parent / "collapse" / f"{name}.png"
    kept.parent.mkdir(parents=True, exist_ok=True)
    strip(folder).save(kept)


def draw(table, path):
    """A row a run: its pictures from first to last update, its distance and D's gradient norm at mixed pictures."""
    from matplotlib.figure import Figure

    rows = read(table)
    names = [name for name in RUNS if any(row["run"] == name for row in rows)]
    figure = Figure(figsize=(16, 2.6 * len(names)), layout="constrained")
    grid = figure.subplots(len(names), 2, width_ratios=[2.4, 1], squeeze=False)
    for (pictures, curve), name in zip(grid, names):
        own = [row for row in rows if row["run"] == name]
        updates = [int(row["updates"]) for row in own]
        pictures.imshow(Image.open(table.parent / "collapse" / f"{name}.png"))
        pictures.set_axis_off()
        pictures.set_title(f"{name.replace('_', ' ')}: update {updates[0]:,} to {updates[-1]:,}", loc="left")
        curve.plot(updates, [float(row["distance"]) for row in own], label="distance")
        curve.plot(updates, [100 * float(row["diversity"]) for row in own], label="diversity, %")
        curve.axhline(float(own[0]["floor"]), color="grey", linewidth=0.8)
        curve.set_ylim(0, 250)
        slope = curve.twinx()
        slope.plot(updates, [float(row["mixed_slope"]) for row in own], color="tab:red", label="norm of D's gradient")
        slope.set_ylim(0, 5)
        curve.legend(loc="upper left", fontsize="small")
        slope.legend(loc="upper right", fontsize="small")
    with train.replacing(path) as file:
        figure.savefig(file, format="png", dpi=70)


def main():
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    parser.add_argument("folder", help="folder of pictures")
    parser.add_argument("--runs", nargs="+", choices=RUNS, help="only these (default: those without rows in the CSV)")
    parser.add_argument("--at_once", type=int, default=1, help="runs side by side, a core each (default: 1)")
    parser.add_argument("--full", action="store_true", help="the report's size, not half of it")
    args = parser.parse_args()
    table, size = ROOT / "Figures" / "collapse.csv", "full" if args.full else "half"
    done = {row["run"] for row in read(table)}
    if args.at_once > 1:
        os.environ["OMP_NUM_THREADS"] = "1"
    wanted = args.runs or [name for name in RUNS if name not in done]
    with ProcessPoolExecutor(args.at_once, multiprocessing.get_context("spawn")) as pool:
        options = {name: f"{FULL if args.full else HALF} {RUNS[name][args.full]}" for name in wanted}
        for name, ended in pool.map(one, [args.folder] * len(wanted), options, options.values()):
            if ended:
                collect(name, table, size)
                draw(table, ROOT / "Figures" / "collapse.png")


if __name__ == "__main__":
    main()
