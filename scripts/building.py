"""Build what a run of train.py consists of: data, model, optimizer, schedule, average."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import torch
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    LinearLR,
    LRScheduler,
    SequentialLR,
    StepLR,
)
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torchvision.transforms import v2

from distbn_convert import VirtualDistributedSampler, convert_model

Args = SimpleNamespace
NORMS = (
    nn.modules.batchnorm._NormBase,  # BatchNorm and InstanceNorm
    nn.LayerNorm,
    nn.GroupNorm,
)


def build(args: Args) -> Args:
    """Make everything that a run consists of."""
    torch.manual_seed(args.seed)
    train_set, val_set, num_classes = load_data(args)
    pin = args.device.startswith("cuda")
    loading = {"num_workers": args.workers, "pin_memory": pin}
    run = Args(
        sampler=VirtualDistributedSampler(
            train_set,
            args.batch_size,
            args.vt_world_size,
            seed=args.seed,
            drop_last_batch=True,
            partition=args.partition,
            accumulation_steps=args.accumulation_steps,
        )
    )
    if not len(run.sampler):
        raise click.UsageError(
            f"expected training images for a batch of {args.batch_size} on each of "
            f"{args.vt_world_size * args.world_size * args.accumulation_steps} GPUs, but there are "
            f"{len(train_set)}; lower --batch-size or --vt-world-size."
        )
    run.loader = DataLoader(train_set, batch_sampler=run.sampler, **loading)
    own = range(args.rank, len(val_set), args.world_size)  # type: ignore[arg-type]
    batch = args.batch_size * args.vt_world_size
    run.val_loader = DataLoader(Subset(val_set, own), batch, **loading)
    run.model = make_model(args, num_classes)
    run.optimizer = make_optimizer(run.model, args)
    run.lr_scheduler = make_scheduler(run.optimizer, args)
    run.ema = make_ema(run.model, args)
    run.scaler = torch.amp.GradScaler(args.device.split(":")[0], enabled=args.amp and pin)
    run.criterion = nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)
    run.wrapped = wrap(run.model, args)
    return run


def load_data(args: Args) -> tuple[Dataset[Any], Dataset[Any], int]:
    """Return training set, validation set and the number of classes."""
    if args.data_path is None:
        from digits import load_images

        images, labels, test_images, test_labels = load_images()
        return TensorDataset(images, labels), TensorDataset(test_images, test_labels), 10
    finish = [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
    augment = [v2.RandomResizedCrop(args.train_crop_size), v2.RandomHorizontalFlip()]
    crop = [v2.Resize(args.val_resize_size), v2.CenterCrop(args.val_crop_size)]
    folder = torchvision.datasets.ImageFolder
    train = folder(str(Path(args.data_path, "train")), v2.Compose([*augment, *finish]))
    val = folder(str(Path(args.data_path, "val")), v2.Compose([*crop, *finish]))
    return train, val, len(train.classes)


def make_model(args: Args, num_classes: int) -> nn.Module:
    model = torchvision.models.get_model(args.model, weights=args.weights, num_classes=num_classes)
    if args.vt_world_size * args.accumulation_steps > 1:
        convert_model(
            model,
            args.vt_world_size,
            partition=args.partition,
            eval_reduction=args.eval_reduction,
            accumulation_steps=args.accumulation_steps,
        )
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    return model.to(args.device)


def make_optimizer(model: nn.Module, args: Args) -> torch.optim.Optimizer:
    """SGD or AdamW; the parameters of norms may have a weight decay of their own."""
    norms = [module for module in model.modules() if isinstance(module, NORMS)]
    special = {id(p) for norm in norms for p in norm.parameters()}
    decay = args.weight_decay if args.norm_weight_decay is None else args.norm_weight_decay
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in special]},
        {"params": [p for p in model.parameters() if id(p) in special], "weight_decay": decay},
    ]
    if args.opt == "adamw":
        return torch.optim.AdamW(groups, lr=args.lr, weight_decay=args.weight_decay)
    return torch.optim.SGD(
        groups, lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay
    )


def make_scheduler(optimizer: torch.optim.Optimizer, args: Args) -> LRScheduler:
    """One step an epoch, after a linear warmup."""
    warmup = args.lr_warmup_epochs
    main: LRScheduler = {
        "steplr": lambda: StepLR(optimizer, args.lr_step_size, args.lr_gamma),
        "exponentiallr": lambda: ExponentialLR(optimizer, args.lr_gamma),
        "cosineannealinglr": lambda: CosineAnnealingLR(
            optimizer, max(1, args.epochs - warmup), eta_min=args.lr_min
        ),
    }[args.lr_scheduler]()
    if not warmup:
        return main
    first = LinearLR(optimizer, args.lr_warmup_decay, total_iters=warmup)
    return SequentialLR(optimizer, [first, main], [warmup])


def make_ema(model: nn.Module, args: Args) -> AveragedModel | None:
    """Average as torchvision does: the decay is meant for its own batch sizes and epochs."""
    if not args.model_ema:
        return None
    ranks = args.world_size * args.vt_world_size * args.accumulation_steps
    adjust = ranks * args.batch_size * args.model_ema_steps / args.epochs
    decay = 1 - min(1.0, (1 - args.model_ema_decay) * adjust)
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def wrap(model: nn.Module, args: Args) -> nn.Module:
    """Compile, then distribute; each process keeps the statistics of its own ranks."""
    if args.compile:
        model = torch.compile(model, backend=args.compile)  # type: ignore[assignment]
    if args.world_size == 1:
        return model
    known = inspect.signature(DistributedDataParallel).parameters  # renamed in torch 2.13
    option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DistributedDataParallel(model, **{option: False})
