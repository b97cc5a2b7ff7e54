"""How fast this machine trains each recipe, how near that is to what its matrix products allow, and where time goes.

    python tests/benchmark.py                               # a table, and the same as benchmark.csv
    python tests/benchmark.py --width 32 --batch_size 32
    python tests/benchmark.py --whole 3 --beside "COMMAND"  # whole processes instead, and another program's; whole.csv

The floor is the time of the multiplications alone, at the rate of this machine's fastest matrix product. The parts of
an update are timed one by one, on a CUDA card without its graph, so there they are more than the whole. A tick is a
row of losses.csv with all that goes with it; the first also shows the judge real pictures. Ten minutes on 2 CPU cores.

A whole process trains type 1 for one epoch of a few pictures (JPEGs of 64x64), then of many. What it takes for each
further one is the rate, which in a folder never seen includes its decoding; the rest is fixed. In COMMAND {folder} is
the folder that holds these pictures in a folder of its own, as torchvision's ImageFolder wants it.
"""

import argparse
import csv
import multiprocessing
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import train  # noqa: E402


def seconds(function, device, least=5, budget=2.0):
    """The median time of one call, of `least` calls or as many as fit into the budget of seconds, after one more."""
    function()
    times = []
    while len(times) < least or sum(times) < budget and len(times) < 200:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begun = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def machine(device):
    """Its name in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        (name, *_) = [line.split(": ")[1] for line in open("/proc/cpuinfo") if line.startswith("model name")]
    except (OSError, ValueError):
        name = platform.processor()
    return f"{name.strip()}, {torch.get_num_threads()} cores"


def matrix_rate(device, dtype):
    """Multiply-adds a second of the fastest product of two matrices, as torch.mm or as a convolution of 1x1."""
    rates = []
    for n in (1024, 2048, 4096) if device.type == "cpu" else (4096, 8192):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        rates.append(n**3 / seconds(partial(torch.mm, a, b), device, budget=0.5))
        picture = a.view(1, 64, n // 64, n).permute(0, 3, 1, 2)  # a's rows are its pixels, in place
        rates.append(n**3 / seconds(partial(F.conv2d, picture, b[:, :, None, None]), device, budget=0.5))
    return max(rates)


def work(recipe):
    """Multiply-adds for one real picture: its part in one update of D, and in G's share of one.

    A pass forward through a network is F multiply-adds, back to its weights F, back to its input F, except that the
    first layer hands nothing back. The penalty is two passes forward and four back.
    """
    layers, sizes = {}, (recipe.width, recipe.size, recipe.networks)
    for name, network, x in [
        ("G", train.generator(recipe.latent_dim, *sizes), torch.zeros(1, recipe.latent_dim, 1, 1)),
        ("D", train.discriminator(recipe.width, recipe.d_norm, *sizes[1:]), torch.zeros(1, 3, 64, 64)),
    ]:
        products = []

        def count(conv, inputs, output, products=products):
            resized = isinstance(conv, train.ResizedConv2d)  # its 3x3 taps are added up to 4x4, at each input pixel
            dense = inputs[0] if resized or isinstance(conv, torch.nn.ConvTranspose2d) else output
            products.append(dense[0, 0].numel() * conv.weight.numel() * (16 / 9 if resized else 1))

        for module in network.modules():
            if isinstance(module, (torch.nn.Conv2d, torch.nn.ConvTranspose2d)):
                module.register_forward_hook(count)
        network.eval()(x)
        layers[name] = sum(products), products[0]
    (G, G_first), (D, D_first) = layers["G"], layers["D"]
    shared, turns = recipe.d_steps == recipe.g_steps == 1, recipe.g_steps / recipe.d_steps
    penalty = recipe.gp_share if recipe.gp_weight else 0
    products = (0 if shared else G) + 2 * (3 * D - D_first) + penalty * (6 * D - D_first)
    return products + turns * (G + 2 * D + 2 * G - G_first)


def measure(gan_type, precision, width, batch_size, device, folder, out):
    """One row of the table, in a process of its own, so that its peak memory is its own."""
    os.chdir(out)
    device, dtype = torch.device(device), train.PRECISIONS[precision]
    recipe = train.RECIPES[gan_type]
    most = min(64, recipe.batch_size) if device.type == "cpu" else recipe.batch_size
    recipe = replace(recipe, width=width, batch_size=batch_size or most)
    train.load_images(folder)
    begun = time.perf_counter()
    images, digest = train.load_images(folder)
    images, gan = images.to(device), train.GAN(recipe, 0, device, dtype)
    update, batches = train.cuda_graphed(gan), train.real_batches(images, recipe.batch_size, 0, 0, device)

    def whole():
        losses = update(next(batches), (gan.step + 1) % recipe.d_steps == 0)
        gan.step += 1
        gan.update_G_ema(recipe.batch_size)
        return losses

    whole()["d_loss"].item()
    first = time.perf_counter() - begun
    for _ in range(5 * recipe.d_steps):
        whole()
    row = {"type": gan_type, "precision": precision, "width": width, "batch": recipe.batch_size}
    took = seconds(lambda: [whole() for _ in range(recipe.d_steps)], device, 8 // recipe.d_steps, 5.0) / recipe.d_steps
    row["images/s"] = recipe.batch_size / took
    real, plain, ms = next(batches), replace(recipe, gp_weight=0.0), 1e3

    def part(function):
        return ms * seconds(function, device, 3, 1.0)

    row |= {"first s": first, "update ms": ms * took, "input": part(lambda: next(batches))}
    row["G forward"] = part(lambda: gan.draw_fake(len(real)))
    fake, D = gan.draw_fake(len(real)).detach(), gan.D
    D_alone = part(lambda: train.update_D(D, gan.optimizer_D, real, fake, plain, gan.rng))
    D_all = part(lambda: train.update_D(D, gan.optimizer_D, real, fake, recipe, gan.rng))
    G_all = part(lambda: train.update_G(gan.G, D, gan.optimizer_G, gan.draw_fake(len(real)), recipe))
    step_D, step_G = part(gan.optimizer_D.step), part(gan.optimizer_G.step)  # on the gradients that are left
    row |= {"D update": D_alone - step_D, "penalty": D_all - D_alone if recipe.gp_weight else 0.0}
    row |= {"G update": G_all - step_G - row["G forward"], "optimisers": step_D + step_G}
    if device.type == "cuda":
        row["peak MB"] = torch.cuda.max_memory_allocated(device) / 2**20
    else:  # of this process alone
        status = Path("/proc/self/status").read_text() if Path("/proc/self/status").exists() else "VmHWM: nan"
        row["peak MB"] = float(status.split("VmHWM:")[1].split()[0]) / 2**10
    name, run = f"{gan_type}-{precision}", {"images": len(images), "gan_type": gan_type, "epochs": 10**6}
    run |= {"sample_every": 1e-6, "save_as": f"{name}/Net_G.param", "cache": name, "pictures": digest}  # always ticks
    records = train.Records(Path(name), {**asdict(recipe), **run})
    tick = partial(records.note, gan, images, whole())
    ticks = {"first tick s": tick, "tick s": tick, "of it measure s": partial(records.measure_row, gan, images)}
    for column, function in {**ticks, "of it save s": partial(records.save, gan)}.items():
        begun = time.perf_counter()
        function()
        row[column] = time.perf_counter() - begun
    return row


def cold_input(folder, out):
    """(images/s of load_images, which decodes in threads, of ImageFolder with a DataLoader), nothing being cached."""
    from torchvision import datasets, transforms

    os.chdir(out)
    scale = [transforms.Resize((64, 64)), transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)]
    pictures = datasets.ImageFolder(folder, transforms.Compose(scale))
    rates = []
    for _ in range(3):
        for kept in Path(".cache").glob("*"):
            kept.unlink()
        begun = time.perf_counter()
        train.load_images(folder)
        ours = time.perf_counter() - begun
        begun = time.perf_counter()
        for _ in torch.utils.data.DataLoader(pictures, 64, shuffle=True, num_workers=os.cpu_count()):
            pass
        rates.append((len(pictures) / ours, len(pictures) / (time.perf_counter() - begun)))
    return [statistics.median(rate) for rate in zip(*rates)]


def shared(folder, gan_type, processes, width, batch_size, out):
    """Images/s of so many processes of one thread each, in the last row of half a minute."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    words += [ROOT / "train.py", folder, gan_type, "--width", width, "--batch_size", batch_size, "--minutes", 0.5]
    words += ["--epochs", 10**5, "--out", f"shared{gan_type}_{processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*map(str, words)], cwd=out, env=environment, check=True, capture_output=True)
    with open(Path(out, words[-1], "losses.csv")) as file:
        return float([*csv.DictReader(file)][-1]["images_per_s"])


def draw(folder, count, size, ending):
    """`count` drawn faces; large ones are small ones made larger."""
    from faces import draw_face

    (folder / "faces").mkdir(parents=True)
    for i in range(count):
        draw_face(0, i).resize((size, size)).save(folder / "faces" / f"{i:05}.{ending}", quality=90)
    return folder


def whole(args, precisions, out):
    """Rows of what whole processes take, in the median; they take turns, so a slow minute of the machine meets all."""
    commands = {"the other": args.beside} if args.beside else {}
    for precision in precisions:
        ours = f"bash {shlex.quote(str(ROOT / 'train.sh'))} {{folder}} 1 --lr 0.0002 --epochs 1 --precision {precision}"
        ours += f" --batch_size {args.batch_size or 64} --width {args.width} --device {args.device}"
        ours += f" --cache {out}/cache --out {out}/run --save_as {out}/run/Net_G.param"
        commands[f"this one, {precision}, folder never seen"] = f"rm -rf {out}/run {out}/cache; {ours}"
        commands[f"this one, {precision}, folder seen before"] = f"rm -rf {out}/run; {ours}"
    folders = {count: draw(Path(out, str(count)), count, 64, "jpg") for count in sorted(args.pictures)}
    (few, many), times, rows = folders, defaultdict(list), []
    for count, (name, command) in args.whole * [*product(folders, commands.items())]:
        begun = time.perf_counter()
        command = command.replace("{folder}", shlex.quote(str(folders[count])))
        subprocess.run(command, shell=True, check=True, stdout=subprocess.DEVNULL)
        times[name, count].append(time.perf_counter() - begun)
        print(f"{name}, {count:,} pictures: {times[name, count][-1]:.1f} s", flush=True)
    for name in commands:
        short, long = (statistics.median(times[name, count]) for count in folders)
        rate = (many - few) / (long - short)
        row = {"program": name, "fixed s": short - few / rate, "images/s": rate, f"{few} s": short, f"{many} s": long}
        rows.append(row)
        if args.beside:
            row |= {f"{column}: times as fast": rows[0][column] / row[column] for column in (f"{few} s", f"{many} s")}
    return rows


def table(rows):
    """Prints rows of the same keys."""
    cells = [list(rows[0])]
    for row in rows:
        cells.append([f"{value:.3g}" if isinstance(value, float) and value < 100 else f"{value:.0f}"
                      if isinstance(value, float) else str(value) for value in row.values()])  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*cells)]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths)), flush=True)


def by_parts(args, device, precisions, out):
    """Prints the rates of the machine, and of decoding -> the rows of the table."""
    rates = {precision: matrix_rate(device, train.PRECISIONS[precision]) for precision in precisions}
    products = ", ".join(f"{rate / 1e9:,.0f} G multiply-adds/s in {precision}" for precision, rate in rates.items())
    print(products, flush=True)
    for count, size in [(2000, 96), (200, 1024)]:
        ours, theirs = cold_input(draw(Path(out, f"jpeg{size}"), count, size, "jpg"), out)
        print(f"cold input, {size}x{size} JPEGs: {ours:,.0f} images/s, ImageFolder with DataLoader {theirs:,.0f}")
    folder, rows, spawn = draw(Path(out, "faces"), 2048, 64, "png"), [], multiprocessing.get_context("spawn")
    for gan_type, recipe in train.RECIPES.items():
        for precision, rate in rates.items():
            settings = gan_type, precision, args.width, args.batch_size, str(device), folder, out
            with ProcessPoolExecutor(1, spawn) as alone:
                row = alone.submit(measure, *settings).result()
            needed = work(replace(recipe, width=args.width))
            rows.append(row | {"G products": needed / 1e9, "% of floor": 100 * row["images/s"] * needed / rate})
            table(rows[-1:])
    if device.type == "cpu":
        for gan_type in (1, 3):
            one, two = (shared(folder, gan_type, count, args.width, args.batch_size or 64, out) for count in (1, 2))
            print(f"type {gan_type}, one thread a process: one {one:.0f} images/s, two {two:.0f}")
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="as in train.sh (default: auto)")
    parser.add_argument("--width", type=int, default=64, help="of the networks (default: 64)")
    parser.add_argument("--batch_size", type=int, help="default: the recipe's own, on a CPU and by --whole 64 at most")
    parser.add_argument("--csv", type=Path, help="where rows go (default: benchmark.csv, whole.csv)")
    parser.add_argument("--whole", type=int, metavar="N", help="time whole processes, N times each")
    parser.add_argument("--beside", metavar="COMMAND", help="with --whole: of another program, with {folder} in it")
    parser.add_argument("--pictures", type=int, nargs=2, default=[2560, 10240], help="of --whole (default: 2560 10240)")
    args = parser.parse_args()
    if args.beside and not args.whole:
        parser.error("--beside COMMAND: add --whole 3")
    target, begun = (args.csv or Path("whole.csv" if args.whole else "benchmark.csv")).resolve(), time.perf_counter()
    device = train.pick_device(args.device)
    precisions = ["fp32", "bf16"] if train.pick_precision("auto", device) == "bf16" else ["fp32"]
    name = f"{machine(device)}, PyTorch {torch.__version__}"
    print(name, flush=True)
    with tempfile.TemporaryDirectory() as out:
        rows = whole(args, precisions, out) if args.whole else by_parts(args, device, precisions, out)
    print(f"\n{name}, {time.perf_counter() - begun:.0f} s\n")
    table(rows)
    with open(target, "w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "machine"])
        writer.writeheader()
        writer.writerows({**row, "machine": name} for row in rows)


if __name__ == "__main__":
    main()
