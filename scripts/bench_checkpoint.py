"""Measure what converting a large checkpoint costs: time, memory, and torch's own load and save.

Each figure is of a process of its own; times are without importing torch. The memory is anonymous
(the peak of RssAnon beyond that after importing torch): the pages of a mapped file can be dropped
at any time and are not counted. The baseline is torch.load(mmap=True) and torch.save to a file.

    python scripts/bench_checkpoint.py --gigabytes 2 --folder /data
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
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
    run_one(next(iter(VARIANTS)), folder)  # the first reads from the disk, not from memory
    for _ in range(repeat):
        for name in VARIANTS:
            results[name].append(run_one(name, folder))
    report(results)


def run_one(name: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--variant", name, "--folder", str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def report(results: dict[str, list[dict[str, float]]]) -> None:
    """Print medians; ratios are to the baseline of the same round."""
    baseline = next(iter(results.values()))
    print(f"{'':34}  seconds (range)       ratio  processor s  ratio  anonymous GB")
    for name, runs in results.items():
        seconds = sorted(run["seconds"] for run in runs)
        spread = f"{statistics.median(seconds):.2f} ({seconds[0]:.2f}-{seconds[-1]:.2f})"
        processor = statistics.median(run["processor"] for run in runs)
        ratios = [
            statistics.median(
                run[key] / base[key] for run, base in zip(runs, baseline, strict=True)
            )
            for key in ("seconds", "processor")
        ]
        memory = max(run["anonymous"] for run in runs) / 1e9
        print(
            f"{name:34}  {spread:20}  {ratios[0]:5.2f}  {processor:11.2f}  {ratios[1]:5.2f}"
            f"  {memory:12.2f}"
        )


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


def torch_alone_to_disk(folder: Path) -> None:
    torch_alone(folder)
    with open(folder / "out.pth", "rb") as file:
        os.fsync(file.fileno())


def convert(name: str, **options: bool) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        from distbn_convert.checkpoint import convert_checkpoint

        convert_checkpoint(folder / f"in.{name}", folder / f"out.{name}", RANKS, **options)

    return run


VARIANTS: dict[str, Callable[[Path], None]] = {
    "torch.load + torch.save": torch_alone,
    "torch.load + torch.save + fsync": torch_alone_to_disk,
    "convert --no-fsync --no-verify": convert("pth", fsync=False, verify=False),
    "convert --no-fsync": convert("pth", fsync=False),
    "convert": convert("pth"),
    "convert safetensors --no-fsync": convert("safetensors", fsync=False),
    "convert safetensors": convert("safetensors"),
}


def measure(variant: str, folder: Path) -> dict[str, float]:
    """Run one variant in this process."""
    for module in ("torch", "distbn_convert.checkpoint.api", "distbn_convert.checkpoint.edit"):
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
    VARIANTS[variant](folder)
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
