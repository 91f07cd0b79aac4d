"""Train a torchvision classifier with virtual ranks, in one process or under torchrun.

Flags are named as in torchvision's references/classification/train.py where the two overlap;
--batch-size is that of one GPU there and of one virtual GPU here.

\b
    python scripts/train.py --epochs 4                                     # handwritten digits
    python scripts/train.py --data-path imagenet --model resnext50_32x4d --lr 0.1 --epochs 100 --amp
    torchrun --nproc-per-node 2 scripts/train.py --vt-world-size 4         # stands for 8 GPUs
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist
from building import Args, build
from outputs import make_folder
from torch import Tensor, nn

from distbn_convert import sync_running_stats


def start_processes(args: Args) -> None:
    """Join torchrun's processes, if it started us; set device, rank and world_size."""
    args.rank, args.world_size = int(os.getenv("RANK", "0")), int(os.getenv("WORLD_SIZE", "1"))
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and args.world_size > 1:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    args.device = device
    if args.world_size > 1:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")


def autocast(args: Args) -> torch.autocast:
    kind = args.device.split(":")[0]
    dtype = torch.bfloat16 if kind == "cpu" else torch.float16
    return torch.autocast(kind, dtype=dtype, enabled=args.amp)


def to_device(batch: Any, args: Args) -> tuple[Tensor, Tensor]:
    images, labels = (tensor.to(args.device, non_blocking=True) for tensor in batch)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    return images.contiguous(memory_format=layout), labels


def train_epoch(run: Args, args: Args, epoch: int) -> float:
    """Train one epoch; return the mean loss, over all processes."""
    torch.manual_seed(args.seed + epoch * args.world_size + args.rank)  # so that a resume is exact
    run.sampler.set_epoch(epoch)
    run.wrapped.train()
    steps, total = args.accumulation_steps, torch.zeros((), device=args.device)
    label = f"epoch {epoch + 1}/{args.epochs}"
    with click.progressbar(
        run.loader, label=label, file=sys.stderr, hidden=args.rank > 0, length=len(run.sampler)
    ) as bar:
        for index, batch in enumerate(bar):
            images, labels = to_device(batch, args)
            with autocast(args):
                loss = run.criterion(run.wrapped(images), labels)
            run.scaler.scale(loss / steps).backward()
            total += loss.detach()
            if (index + 1) % steps == 0:
                update(run, args, epoch, index // steps)
    if args.world_size > 1:
        dist.all_reduce(total)
    return float(total / len(run.sampler) / args.world_size)


def update(run: Args, args: Args, epoch: int, step: int) -> None:
    """Step the optimizer and the average."""
    if args.clip_grad_norm is not None:
        run.scaler.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(run.model.parameters(), args.clip_grad_norm)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    if run.ema is not None and step % args.model_ema_steps == 0:
        run.ema.update_parameters(run.model)
        if epoch < args.lr_warmup_epochs:
            run.ema.n_averaged.fill_(0)  # keep copying while warming up


@torch.inference_mode()
def evaluate(model: nn.Module, run: Args, args: Args) -> float:
    """Return the top-1 accuracy in percent, over all processes."""
    model.eval()
    counts = torch.zeros(2, dtype=torch.float64, device=args.device)
    for batch in run.val_loader:
        images, labels = to_device(batch, args)
        with autocast(args):
            hits = model(images).argmax(1) == labels
        counts += torch.stack([hits.sum(), hits.new_tensor(len(hits), dtype=torch.long)])
    if args.world_size > 1:
        dist.all_reduce(counts)
    return float(100 * counts[0] / counts[1])


def save(run: Args, args: Args, epoch: int) -> None:
    """Write torchvision's layout: the latest as checkpoint.pth, each epoch as model_N.pth."""
    parts = {name: getattr(run, name) for name in ("model", "optimizer", "lr_scheduler", "scaler")}
    checkpoint = {name: part.state_dict() for name, part in parts.items()}
    if run.ema is not None:
        checkpoint["model_ema"] = run.ema.state_dict()
    folder = Path(args.output_dir)
    for name in (f"model_{epoch}.pth", "checkpoint.pth"):
        temporary = folder / f"{name}.tmp"
        torch.save({**checkpoint, "epoch": epoch, "args": vars(args)}, temporary)
        temporary.replace(folder / name)


def resume(run: Args, args: Args) -> int:
    """Load a checkpoint; return the epoch to go on with."""
    checkpoint = torch.load(args.resume, map_location=args.device, weights_only=True)
    for name in ("model", "optimizer", "lr_scheduler", "scaler"):
        getattr(run, name).load_state_dict(checkpoint[name])
    if run.ema is not None:
        run.ema.load_state_dict(checkpoint["model_ema"])
    return int(checkpoint["epoch"]) + 1


def train(args: Args) -> None:
    run = build(args)
    first = resume(run, args) if args.resume else args.start_epoch
    models = {"": run.model} if run.ema is None else {"": run.model, "EMA ": run.ema}
    if args.test_only:
        for name, model in models.items():
            result = evaluate(model, run, args)
            if args.rank == 0:
                print(f"{name}accuracy {result:.2f} %")
        return
    if args.output_dir and args.rank == 0:
        make_folder(args.output_dir)
    for epoch in range(first, args.epochs):
        start = time.perf_counter()
        loss = train_epoch(run, args, epoch)
        rate = len(run.sampler) * args.batch_size * args.vt_world_size * args.world_size
        rate /= time.perf_counter() - start
        run.lr_scheduler.step()
        if args.world_size > 1:
            for model in models.values():
                sync_running_stats(model)  # so that all processes evaluate and save one model
        results = [f"{n}accuracy {evaluate(m, run, args):.2f} %" for n, m in models.items()]
        if args.rank == 0:
            print(f"epoch {epoch + 1}: loss {loss:.4f}, {', '.join(results)}, {rate:.0f} img/s")
            if args.output_dir:
                save(run, args, epoch)


COUNT = {"type": click.IntRange(min=1)}
SCHEDULERS = ["steplr", "cosineannealinglr", "exponentiallr"]
OPTIONS: list[tuple[list[str], dict[str, Any]]] = [
    (["--data-path"], {"help": "Folder with train/ and val/ for ImageFolder; default: digits."}),
    (["--model"], {"default": "resnet18"}),
    (["--weights"], {"help": "Pretrained, as torchvision names them."}),
    (["--device"], {"help": "Default: cuda if there is one."}),
    (
        ["--vt-world-size"],
        {**COUNT, "default": 8, "help": "Virtual GPUs of each process; 1: plain."},
    ),
    (
        ["--partition"],
        {"type": click.Choice(["contiguous", "interleaved"]), "default": "contiguous"},
    ),
    (["--eval-reduction"], {"type": click.Choice(["mean", "select", "pooled"]), "default": "mean"}),
    (
        ["--accumulation-steps"],
        {**COUNT, "default": 1, "help": "Micro-steps, each of all virtual GPUs."},
    ),
    (["-b", "--batch-size"], {**COUNT, "default": 16, "help": "Images of one virtual GPU."}),
    (["--epochs"], {**COUNT, "default": 10}),
    (["-j", "--workers"], {"default": 0, "help": "Processes that load data."}),
    (["--opt"], {"type": click.Choice(["sgd", "adamw"]), "default": "sgd"}),
    (["--lr"], {"default": 0.02}),
    (["--momentum"], {"default": 0.9}),
    (["--wd", "--weight-decay", "weight_decay"], {"default": 1e-4}),
    (["--norm-weight-decay"], {"type": float, "help": "Default: that of other parameters."}),
    (["--label-smoothing"], {"default": 0.0}),
    (["--lr-scheduler"], {"type": click.Choice(SCHEDULERS), "default": "cosineannealinglr"}),
    (["--lr-warmup-epochs"], {"default": 0}),
    (["--lr-warmup-decay"], {"default": 0.01}),
    (["--lr-step-size"], {**COUNT, "default": 30}),
    (["--lr-gamma"], {"default": 0.1}),
    (["--lr-min"], {"default": 0.0}),
    (["--clip-grad-norm"], {"type": float}),
    (["--amp"], {"is_flag": True, "help": "float16 on GPUs, bfloat16 on CPUs."}),
    (["--channels-last"], {"is_flag": True}),
    (["--compile"], {"is_flag": False, "flag_value": "inductor", "help": "Its backend: inductor."}),
    (["--model-ema"], {"is_flag": True}),
    (["--model-ema-steps"], {**COUNT, "default": 32}),
    (["--model-ema-decay"], {"default": 0.99998}),
    (["--val-resize-size"], {"default": 256}),
    (["--val-crop-size"], {"default": 224}),
    (["--train-crop-size"], {"default": 224}),
    (["--output-dir"], {"help": "For checkpoints that distbn-convert reads; default: none."}),
    (["--resume"], {"help": "Checkpoint to go on from."}),
    (["--start-epoch"], {"default": 0}),
    (["--test-only"], {"is_flag": True}),
    (["--seed"], {"default": 0, "help": "Of weights, order and augmentation."}),
]


@click.command(
    help=__doc__,
    params=[click.Option(names, show_default=True, **settings) for names, settings in OPTIONS],
)
def main(**options: Any) -> None:
    args = Args(**options)
    start_processes(args)
    train(args)
    if args.world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
