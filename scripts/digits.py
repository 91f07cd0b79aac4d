"""Train a ResNet with virtual ranks on scikit-learn's handwritten digits, and convert it back."""

from __future__ import annotations

import time

import click
import torch
import torch.nn.functional as F
from outputs import make_folder
from sklearn.datasets import load_digits
from torch import Tensor, nn

from distbn_convert import revert_model
from distbn_convert.models import get_model

COUNT = click.IntRange(min=1)


def load_images() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The 1,797 digits as images of 3x32x32: 1,437 to train, 360 to test."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 16
    images = F.interpolate(images, size=32, mode="bilinear").expand(-1, 3, -1, -1)
    labels = torch.from_numpy(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]
    return images[train], labels[train], images[test], labels[test]


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        hits = sum(
            int((model(batch).argmax(1) == target).sum())
            for batch, target in zip(images.split(120), labels.split(120), strict=True)
        )
    return 100 * hits / len(labels)


def train_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, label: str
) -> None:
    """One epoch over whole batches of 128, 16 images to a virtual rank."""
    model.train()
    batches = torch.randperm(len(images))[: len(images) // 128 * 128].split(128)
    with click.progressbar(batches, label=label) as bar:
        for batch in bar:
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@click.command()
@click.option(
    "--vt-world-size", type=COUNT, default=8, show_default=True, help="Number of virtual GPUs."
)
@click.option("--epochs", type=COUNT, default=6, show_default=True)
@click.option("--output", default="runs/quickstart", show_default=True, help="For checkpoints.")
def main(vt_world_size: int, epochs: int, output: str) -> None:
    """Train a converted ResNet-18 on handwritten digits, convert it back, compare."""
    folder = make_folder(output)
    torch.manual_seed(0)
    train_images, train_labels, test_images, test_labels = load_images()
    model = get_model("resnet18", vt_world_size=vt_world_size, num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    start = time.perf_counter()
    for epoch in range(epochs):
        train_epoch(model, optimizer, train_images, train_labels, f"epoch {epoch + 1}/{epochs}")
        schedule.step()
    print(
        f"trained {epochs} epochs with {vt_world_size} virtual GPUs in "
        f"{time.perf_counter() - start:.0f} s"
    )

    before = accuracy(model, test_images, test_labels)
    torch.save(model.state_dict(), folder / "virtual.pth")
    model = revert_model(model, reduction="mean")
    after = accuracy(model, test_images, test_labels)
    torch.save(model.state_dict(), folder / "plain.pth")
    print(f"accuracy with virtual GPUs:    {before:.2f} %")
    print(f"accuracy after reverting:      {after:.2f} %")
    print(
        f"checkpoints: {folder / 'virtual.pth'} ({vt_world_size} rows of statistics), "
        f"{folder / 'plain.pth'} (plain BatchNorm)"
    )


if __name__ == "__main__":
    main()
