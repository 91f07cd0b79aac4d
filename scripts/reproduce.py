"""The headline in miniature: 8 DDP processes, 1 process with 8 virtual GPUs, 1 process plain.

A small ResNet learns handwritten digits of 8x8 pixels, 400 of them, in batches of 64: 8 images to
a GPU, which in the last blocks have 32 values to a channel. So a GPU's statistics are noisy, and
the whole batch's are not: if batch statistics matter anywhere, then here.

Needs pip install "distbn_convert[examples,plot]".

\b
    python scripts/reproduce.py        # some minutes on two cores
"""

from __future__ import annotations

import inspect
import json
import os
import statistics
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from matplotlib.figure import Figure
from outputs import make_folder
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.resnet import BasicBlock, ResNet

from distbn_convert import VirtualDistributedSampler, convert_model

RANKS, SHARE, TRAIN = 8, 8, 400
WAYS = {
    "ddp": f"{RANKS} processes, DDP",
    "virtual": f"1 process, {RANKS} virtual GPUs",
    "plain": "1 process, plain BatchNorm",
}


def load_data(seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, test images and labels; the seed chooses which are which."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).to(dtype)[:, None].expand(-1, 3, -1, -1) / 16
    labels = torch.from_numpy(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train, test = order[:TRAIN], order[TRAIN:]
    return images[train], labels[train], images[test], labels[test]


def make_model(seed: int, dtype: torch.dtype) -> ResNet:
    """A ResNet for small images, a quarter as wide as ResNet-18's first stage and two deep."""
    torch.manual_seed(seed)
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10)
    model.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
    model.bn1, model.maxpool, model.inplanes = nn.BatchNorm2d(16), nn.Identity(), 16
    model.layer1 = model._make_layer(BasicBlock, 16, 1)
    model.layer2 = model._make_layer(BasicBlock, 32, 1, stride=2)
    model.layer3 = model._make_layer(BasicBlock, 64, 1, stride=2)
    model.layer4, model.fc = nn.Identity(), nn.Linear(64, 10)
    return model.to(dtype)


def run(way: str, seed: int, epochs: int, dtype: torch.dtype) -> dict[str, Any]:
    """Train and evaluate in this process, which is one of 8 if the way is DDP."""
    images, labels, test_images, test_labels = load_data(seed, dtype)
    model = make_model(seed, dtype)
    if way == "virtual":  # evaluates with rank 0's statistics, which are what DDP would save
        convert_model(model, RANKS, eval_reduction="select")
    wrapped = wrap(model) if way == "ddp" else model
    # Under DDP each process deals to itself; else this process gets all ranks' samples.
    sampler = VirtualDistributedSampler(
        images, SHARE, 1 if way == "ddp" else RANKS, seed=seed, drop_last_batch=True
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    steps = epochs * len(sampler)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    losses = torch.zeros(steps, dtype=dtype)
    start = time.perf_counter()
    for step in range(steps):
        epoch, index = divmod(step, len(sampler))
        if index == 0:
            sampler.set_epoch(epoch)
            batches = list(sampler)
        loss = F.cross_entropy(wrapped(images[batches[index]]), labels[batches[index]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses[step] = loss.detach()
    seconds = time.perf_counter() - start
    if way == "ddp":
        dist.all_reduce(losses)
        losses /= RANKS
    model.eval()
    with torch.no_grad():
        hits = (model(test_images).argmax(1) == test_labels).double().mean()
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return {
        "way": way,
        "seed": seed,
        "accuracy": 100 * float(hits),
        "seconds": seconds,
        "losses": losses.tolist(),
        "weights": weights,
    }


def wrap(model: nn.Module) -> nn.Module:
    known = inspect.signature(DistributedDataParallel).parameters  # renamed in torch 2.13
    option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DistributedDataParallel(model, **{option: False})


def run_rank(rank: int, folder: str, seeds: int, epochs: int, dtype: torch.dtype) -> None:
    """Be one of the 8 processes, for all seeds; process 0 writes what came out."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    results = [run("ddp", seed, epochs, dtype) for seed in range(seeds)]
    if rank == 0:
        torch.save(results, f"{folder}/results.pth")
    dist.destroy_process_group()


def run_ddp(*args: Any) -> list[dict[str, Any]]:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        get_context("forkserver").set_forkserver_preload(["torch", "torchvision", "sklearn"])
        mp.start_processes(run_rank, (folder, *args), nprocs=RANKS, start_method="forkserver")
        return torch.load(f"{folder}/results.pth")


def compare(runs: list[dict[str, Any]]) -> None:
    """Replace each run's weights by their largest difference to DDP's of that seed."""
    real = {run["seed"]: run["weights"] for run in runs if run["way"] == "ddp"}
    for run in runs:
        difference = (run.pop("weights") - real[run["seed"]]).abs().max()
        run["largest_weight_difference"] = float(difference)


def table(runs: list[dict[str, Any]]) -> str:
    lines = [
        "| training | test accuracy, % | largest weight difference to DDP | seconds a run |",
        "|---|---|---|---|",
    ]
    for way, title in WAYS.items():
        own = [run for run in runs if run["way"] == way]
        accuracies = [run["accuracy"] for run in own]
        spread = statistics.stdev(accuracies) if len(own) > 1 else 0.0
        difference = max(run["largest_weight_difference"] for run in own)
        lines.append(
            f"| {title} | {statistics.mean(accuracies):.2f} ± {spread:.2f} "
            f"| {f'{difference:.1e}' if difference else '0'} "
            f"| {statistics.mean(run['seconds'] for run in own):.0f} |"
        )
    return "\n".join(lines)


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Draw the first seed's loss curves, and how far they are from DDP's where not 0."""
    curves = {run["way"]: run["losses"] for run in runs if run["seed"] == 0}
    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    styles: dict[str, Any] = {
        "ddp": {"color": "tab:blue", "linewidth": 5, "alpha": 0.35},
        "virtual": {"color": "tab:blue", "linewidth": 1.2},
        "plain": {"color": "tab:orange", "linewidth": 1.2},
    }
    for way, losses in curves.items():
        above.plot(losses, label=WAYS[way], **styles[way])
        if way != "ddp":
            gap = [abs(a - b) for a, b in zip(losses, curves["ddp"], strict=True)]
            below.plot(gap, ".", color=styles[way]["color"], label=WAYS[way])
    above.set(ylabel="training loss", yscale="log", title="One seed, every step")
    below.set(ylabel="distance to DDP's loss", yscale="log", xlabel="step")
    above.legend()
    below.legend()
    figure.savefig(path, dpi=120)


@click.command(help=__doc__)
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--epochs", type=click.IntRange(1), default=20, show_default=True)
@click.option("--dtype", type=click.Choice(["float64", "float32"]), default="float64")
@click.option("--output", default="runs/reproduce", show_default=True, help="For data and plot.")
def main(seeds: int, epochs: int, dtype: str, output: str) -> None:
    folder = make_folder(output)
    torch.set_num_threads(1)
    kind = getattr(torch, dtype)
    runs: list[dict[str, Any]] = []
    for way in WAYS:
        print(f"{WAYS[way]}: {seeds} runs ...", file=sys.stderr, flush=True)
        if way == "ddp":
            runs += run_ddp(seeds, epochs, kind)
        else:
            runs += [run(way, seed, epochs, kind) for seed in range(seeds)]
    compare(runs)
    settings = {"torch": torch.__version__, "dtype": dtype, "epochs": epochs}
    data = json.dumps({"settings": settings, "runs": runs}, indent=1)
    (folder / "reproduce.json").write_text(data, encoding="utf-8")
    plot(runs, folder / "reproduce.png")
    print(table(runs))


if __name__ == "__main__":
    main()
