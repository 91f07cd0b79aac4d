"""Predict the GPU kernels' times over ResNet-50's batch norms, with no GPU.

``PYTHONPATH=. python scripts/gpu_predict.py`` compiles each layer's kernels for sm_90 and reads
their machine code. Three things bound a layer, N=256, V=8, on an H100:

- memory: what is moved once, and what a second sweep finds in L2;
- instructions: a multiprocessor starts four a cycle, each for the 32 threads of a warp;
- latency: a program's loads, barriers and exchanges follow each other, and registers limit how
  many programs share a multiprocessor.

The largest of the three over the time of the bytes that must be moved is the prediction. It is on
the low side: all three are taken to overlap perfectly, and latencies are estimates. Written to
``gpu_predictions.csv`` beside this file, which ``gpu_bench.py`` puts beside its measurements.
"""

from __future__ import annotations

import argparse
import csv
import math
import operator
import re
from typing import NamedTuple

import triton
from gpu_table import BARS, PREDICTIONS, Bar, Row

from distbn_convert.kernels.gpu import rule
from distbn_convert.kernels.gpu.launch import Share
from distbn_convert.kernels.gpu.rule import Choice
from tests.aot import RESNET50, compile_kernel, configurations

SAMPLES, RANKS = 256, 8
# An H100: multiprocessors, cycles a second, bytes a second of a copy, and of L2.
MULTIPROCESSORS, CLOCK, MEMORY, L2 = 132, 1.7e9, 3.0e12, 5.5e12
REGISTERS, THREADS, PROGRAMS = 65536, 2048, 32
ITEMSIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
# Cycles until a result is there, by the first word of an instruction; 5 for others. Loads of large
# tensors come from memory, others from L2. Estimates.
LATENCIES = {
    "MUFU": 25, "I2F": 20, "F2I": 20, "S2R": 25, "S2UR": 25, "SHFL": 24, "LDS": 29, "LDSM": 33,
    "BAR": 25, "LDC": 30, "ULDC": 10, "R2UR": 10, "MEMBAR": 700, "ATOMG": 700, "CCTL": 50,
}  # fmt: skip
FROM_MEMORY, FROM_L2 = 900, 350
LOADS_TENSOR = re.compile(r"LDG\S*\.(E[FL]|U16)\b")
BOUNDS = "memory", "instructions", "latency"
# No result is waited for.
STORES = {"STG", "STS", "STSM", "REDG", "BRA", "BSSY", "BSYNC", "EXIT", "BAR", "MEMBAR", "CCTL"}


class Code(NamedTuple):
    """A kernel's machine code: instructions by address, those of divisions' rare cases left out.

    ``loops`` are the addresses of the first and last instruction of each, waiting left out.
    """

    body: list[tuple[int, str]]
    loops: list[tuple[int, int]]

    def part(self, start: int, stop: float, turns: int = 1) -> list[str]:
        """The instructions from one address up to another, loops so many times."""
        repeated = {
            first: [text for at, text in self.body if first <= at <= last] * (turns - 1)
            for first, last in self.loops
        }
        texts: list[str] = []
        for address, text in self.body:
            if start <= address < stop:
                texts += [*repeated.get(address, ()), text]
        return texts


class Program(NamedTuple):
    """What programs of one kind execute in each warp, how many there are, and where they load.

    ``tensors`` are the cycles that a load of a large tensor takes.
    """

    instructions: list[str]
    count: float
    tensors: int = FROM_MEMORY


def read(machine_code: str) -> Code:
    """Find the instructions that a program without surprises executes, and its loops."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", machine_code, re.MULTILINE)
    body = [(int(address, 16), text) for address, text in lines if not text.startswith("NOP")]
    # Subroutines, for numbers that divisions and roots rarely meet, come last.
    targets = [int(at, 16) for _, text in body for at in re.findall(r"CALL\S* (0x\w+)", text)]
    body = [one for one in body if one[0] < min(targets, default=math.inf)]
    rare: set[int] = set()
    for address, target in branches(body):
        inside = [one for one in body if address < one[0] < target]
        if len(inside) <= 8 and any("CALL" in text for _, text in inside):
            rare |= {place for place, _ in inside}
    body = [one for one in body if one[0] not in rare]
    loops = []
    for address, target in branches(body):
        inside = {place: text for place, text in body if target <= place <= address}
        if not any("STRONG" in text for text in inside.values()) and len(inside) > 20:
            if any(LOADS_TENSOR.search(text) for text in inside.values()):
                loops.append((target, address))
            else:  # over ranks, in the few programs that sum them
                rare |= inside.keys()
    return Code([one for one in body if one[0] not in rare], loops)


def branches(body: list[tuple[int, str]]) -> list[tuple[int, int]]:
    """Where each branch is, and where it goes."""
    found = [(address, re.search(r"BRA.* (0x\w+)", text)) for address, text in body]
    return [(address, int(match.group(1), 16)) for address, match in found if match]


def programs_of(code: Code, choice: Choice, share: Share) -> list[Program]:
    """What the programs of a launch execute, loops unrolled."""
    slabs = share.slabs(choice.channels)
    pieces = slabs * choice.splits
    turns = -(-(choice.size or share.values) // choice.rows) if choice.kind != "planes" else 1
    if choice.kind == "pipelined":
        start, stop = max(
            ((target, at) for at, target in branches(code.body)), key=lambda loop: loop[1] - loop[0]
        )
        round = code.part(start, stop + 1) * -(-slabs // choice.groups)
        once = code.part(0, start), code.part(stop + 1, math.inf)
        return [Program([*once[0], *round, *once[1]], choice.groups * choice.splits)]
    if choice.kind != "ticketed":
        return [Program(code.part(0, math.inf, turns), pieces)]
    # Gathering: up to the arrival, and for the last to arrive, up to the announcement.
    arrival, announcement = (
        max(address for address, text in code.body if word in text) for word in ("ATOMG", "REDG")
    )
    gather = code.part(0, arrival, turns)
    merge = code.part(arrival, announcement)
    apply = code.part(0, code.loops[0][0]) + code.part(announcement, math.inf, turns)
    return [Program(gather, pieces), Program(merge, slabs), Program(apply, pieces, FROM_L2)]


def latency(program: Program) -> float:
    """Cycles that a warp takes alone, each instruction waiting for what it reads."""
    ready: dict[str, float] = {}
    now = 0.0
    for text in program.instructions:
        guard = re.match(r"@!?(U?P\d)", text)
        words = re.sub(r"^@!?U?P\w+\s+", "", text)
        name, _, rest = words.partition(" ")
        kind = name.split(".")[0]
        operands = rest.split(",")
        width = 4 if ".128" in name else 2 if ".64" in name or ".WIDE" in name else 1
        writes = [] if kind in STORES else named(operands[kind == "ATOMG"], width)
        reads = named(rest if kind in STORES else ",".join(operands[1:]), width)
        reads += named(rest, 2) if ".64]" in rest else []
        reads += [guard.group(1)] if guard else []
        start = max([now, *(ready.get(register, 0.0) for register in reads)])
        cycles = LATENCIES.get(kind, 5)
        if kind == "LDG":
            cycles = program.tensors if LOADS_TENSOR.search(name) else FROM_L2
        now = start + (cycles if kind in ("MEMBAR", "BAR", "CCTL") else 1)
        ready |= dict.fromkeys(writes, start + cycles)
    return now


def named(operands: str, width: int) -> list[str]:
    """The registers in a text, each with those that follow it."""
    found = re.findall(r"\b(UR|R|UP|P)(\d+)\b", operands)
    return [
        f"{kind}{int(number) + step}"
        for kind, number in found
        for step in range(width if "R" in kind else 1)
    ]


def predict(bar: Bar, channels: int, side: int) -> Row:
    """Predict one pass of one layer."""
    last, itemsize = bar.layout == "channels_last", ITEMSIZES[bar.dtype]
    backward = bar.what == "backward"
    share = Share(SAMPLES, channels, side * side, RANKS, False, last, itemsize)
    choice = share.choose(backward)
    relu = "relu" if bar.what.startswith("relu") else "none"
    issue = wait = registers = 0.0
    for kernel, constants, given in configurations(share, backward, relu).values():
        compiled = compile_kernel(kernel, itemsize, constants, 90, **given)
        warps = constants["num_warps"]
        granted = -(-compiled.registers // 8) * 8
        room = min(REGISTERS // (granted * warps * 32), THREADS // (warps * 32), PROGRAMS)
        registers = max(registers, compiled.registers)
        for program in programs_of(read(compiled.machine_code), choice, share):
            executed = len(program.instructions) * warps * program.count
            issue += executed / (4 * MULTIPROCESSORS)
            waves = program.count / (MULTIPROCESSORS * room)
            wait += waves * latency(program)
    nbytes = SAMPLES * channels * side * side * itemsize
    least, moved = tensors(choice, backward)
    ms = {
        "memory": max(least * nbytes / MEMORY, moved * nbytes / L2) * 1e3,
        "instructions": issue / CLOCK * 1e3,
        "latency": wait / CLOCK * 1e3,
    }
    floor = (3 if backward else 2) * nbytes / MEMORY * 1e3
    bound = max(BOUNDS, key=lambda name: ms[name])
    return {
        "dtype": bar.dtype, "layout": bar.layout, "pass": bar.what, "channels": channels,
        "side": side, "count": RESNET50[channels, side], "kernel": choice.kind,
        "warps": choice.warps, "registers": int(registers), "floor_ms": round(floor, 4),
        **{f"{name}_ms": round(value, 4) for name, value in ms.items()},
        "bound": bound, "predicted": round(ms[bound] / floor, 2), "triton": triton.__version__,
    }  # fmt: skip


def tensors(choice: Choice, backward: bool) -> tuple[int, int]:
    """Tensors moved to and from memory, and in all, with what L2 has."""
    once, twice = (3, 5) if backward else (2, 3)
    if choice.kind in ("resident", "planes", "cooperative", "pipelined"):
        return once, once
    return (twice, twice) if choice.kind == "split" else (once, twice)


def predict_pipelined(bar: Bar, channels: int, side: int) -> float | None:
    """Predict a layer with pipelined kernels, if it would take one."""
    before, rule.ENABLED = rule.ENABLED, rule.ENABLED | {"pipelined"}
    try:
        row = predict(bar, channels, side)
    finally:
        rule.ENABLED = before
    return row["predicted"] if row["kernel"] == "pipelined" else None


def main() -> None:
    rows: list[Row] = [
        {**predict(bar, *layer), "pipelined": predict_pipelined(bar, *layer)}
        for bar in BARS
        for layer in RESNET50
    ]
    with PREDICTIONS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    names = *BOUNDS, "predicted", "pipelined"
    print(f"{'':34}{'floor ms':>9}   over the floor: {'  '.join(names)}")
    for bar in BARS:
        layers = [row for row in rows if (row["dtype"], row["layout"], row["pass"]) == bar[:3]]
        print(f"{bar.name:34}{summary(layers)}")


def summary(layers: list[Row]) -> str:
    """Sum a bar's layers: the floor, each bound over it, and the prediction."""
    floor = math.fsum(row["count"] * row["floor_ms"] for row in layers)
    sums = [math.fsum(row["count"] * row[f"{name}_ms"] for row in layers) for name in BOUNDS]
    for name in ("predicted", "pipelined"):
        ratios = [row[name] or row["predicted"] for row in layers]
        weights = [row["count"] * row["floor_ms"] for row in layers]
        sums.append(math.fsum(map(operator.mul, weights, ratios)))
    ratios = [one / floor for one in sums]
    widths = [len(name) for name in (*BOUNDS, "predicted", "pipelined")]
    columns = (f"{one:{width}.2f}" for one, width in zip(ratios, widths, strict=True))
    return f"{floor:9.2f}   {'':16}{'  '.join(columns)}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    main()
