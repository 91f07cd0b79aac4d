"""Measure what converting a large checkpoint costs: time, memory, and torch's own load and save.

Each figure is of a process of its own; times are without importing torch. The memory is anonymous
(the peak of RssAnon beyond that after importing torch): the pages of a mapped file can be dropped
at any time and are not counted. The baselines are torch.load(mmap=True) and torch.save, or
load_file and save_file of safetensors: alone for what runs with --no-fsync, followed by an fsync
for what does not. The order of the variants is another in each round. Ratios are of the fastest
runs, and of the medians: what else the machine does only ever adds time.

    python scripts/bench_checkpoint.py --gigabytes 2 --folder /data
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

LAYER = (512, 512, 3, 3)  # of one convolution, followed by a BatchNorm
RANKS = 8
OURS = tuple(f"distbn_convert.checkpoint.{name}" for name in ("api", "edit", "torchstore"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the checkpoint")
    parser.add_argument("--folder", type=Path, help="where to write it (default: a temporary one)")
    parser.add_argument(
        "--repeat", type=int, default=5, help="rounds; each runs every variant once"
    )
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant:
        print(json.dumps(measure(arguments.variant, arguments.folder)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="bench-") as folder:
        run_all(Path(folder), arguments.gigabytes, arguments.repeat)


def run_all(folder: Path, gigabytes: float, repeat: int) -> None:
    import torch

    make_checkpoints(folder, gigabytes)
    size = (folder / "in.pth").stat().st_size
    print(f"{size / 1e9:.2f} GB, V = {RANKS}, torch {torch.__version__}, {os.cpu_count()} cores")
    results: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    order = random.Random(0)
    for _ in range(repeat):
        for name in order.sample(list(VARIANTS), len(VARIANTS)):
            results[name].append(run_one(name, folder))
    report(results)


def run_one(name: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--variant", name, "--folder", str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def report(results: dict[str, list[dict[str, float]]]) -> None:
    """Print the fastest run and the median, and their ratios to the baseline above."""
    print(f"{'':36}  fastest s  ratio  median s  ratio  processor s  anonymous GB")
    for name, runs in results.items():
        base = results[VARIANTS[name][1] or name]
        cells = [
            f"{of(runs):{width}.2f}  {of(runs) / of(base):5.2f}"
            for of, width in ((fastest, 9), (middle, 8))
        ]
        processor = min(run["processor"] for run in runs)
        memory = max(run["anonymous"] for run in runs) / 1e9
        print(f"{name:36}  {'  '.join(cells)}  {processor:11.2f}  {memory:12.2f}")


def fastest(runs: list[dict[str, float]]) -> float:
    return min(run["seconds"] for run in runs)


def middle(runs: list[dict[str, float]]) -> float:
    return statistics.median(run["seconds"] for run in runs)


def make_checkpoints(folder: Path, gigabytes: float) -> None:
    """Write the same weights as a file of torch and as safetensors."""
    import torch

    from distbn_convert.checkpoint import save_state_dict

    state = {}
    weight = torch.randn(LAYER)
    layers = max(1, round(gigabytes * 1e9 / weight.nbytes))
    for layer in range(layers):
        state[f"layers.{layer}.conv.weight"] = weight + layer
        norm = torch.nn.BatchNorm2d(LAYER[0]).state_dict(prefix=f"layers.{layer}.bn.")
        state.update(norm)
    torch.save({"model": state, "epoch": 1}, folder / "in.pth")
    save_state_dict(state, folder / "in.safetensors")


def torch_alone(folder: Path) -> None:
    import torch

    content = torch.load(folder / "in.pth", mmap=True, weights_only=True)
    torch.save(content, folder / "out.pth")


def safetensors_alone(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file(load_file(folder / "in.safetensors"), folder / "out.safetensors")


def to_disk(name: str, write: Callable[[Path], None]) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        write(folder)
        with open(folder / f"out.{name}", "rb") as file:
            os.fsync(file.fileno())

    return run


def convert(name: str, **options: bool) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        from distbn_convert.checkpoint import convert_checkpoint

        convert_checkpoint(folder / f"in.{name}", folder / f"out.{name}", RANKS, **options)

    return run


# By name, what runs and the name of what it is compared with.
VARIANTS: dict[str, tuple[Callable[[Path], None], str | None]] = {
    "torch.load + torch.save": (torch_alone, None),
    "convert --no-fsync": (convert("pth", fsync=False), "torch.load + torch.save"),
    "torch.load + torch.save + fsync": (to_disk("pth", torch_alone), None),
    "convert": (convert("pth"), "torch.load + torch.save + fsync"),
    "load_file + save_file": (safetensors_alone, None),
    "convert safetensors --no-fsync": (
        convert("safetensors", fsync=False),
        "load_file + save_file",
    ),
    "load_file + save_file + fsync": (to_disk("safetensors", safetensors_alone), None),
    "convert safetensors": (convert("safetensors"), "load_file + save_file + fsync"),
}


def measure(variant: str, folder: Path) -> dict[str, float]:
    """Run one variant in this process."""
    for module in ("torch", "safetensors.torch", *OURS):
        importlib.import_module(module)
    for out in folder.glob("out.*"):
        out.unlink()
    os.sync()
    before = anonymous()
    peak, stopped = [before], threading.Event()

    def watch() -> None:
        while not stopped.wait(0.005):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started, busy = time.perf_counter(), time.process_time()
    try:
        VARIANTS[variant][0](folder)
    finally:  # else the process waits for its watcher for ever
        seconds, processor = time.perf_counter() - started, time.process_time() - busy
        stopped.set()
        watcher.join()
    return {"seconds": seconds, "processor": processor, "anonymous": peak[0] - before}


def anonymous() -> int:
    """Bytes of anonymous memory of this process (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("Error: expected RssAnon in /proc/self/status; run this on Linux.")


if __name__ == "__main__":
    main()
