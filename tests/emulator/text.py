"""The text of PTX: a kernel's parameters, instructions and labels."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

__all__ = ["Instruction", "Program", "parse"]


class Instruction(NamedTuple):
    """One line: ``@!guard name operands``; operands are strings, or lists of them."""

    guard: str | None
    negated: bool
    name: str
    operands: list[Any]


@dataclass
class Program:
    """A kernel: its parameters' names, instructions, and where labels are among them."""

    name: str
    parameters: list[str]
    threads: int
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


def parse(text: str) -> Program:
    """Read the one kernel of a PTX module."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    head = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)([^{]*)\{(.*?)\n\}", text, re.DOTALL)
    assert head is not None, "expected a kernel, found no .entry"
    name, parameters, directives, body = head.groups()
    threads = re.search(r"\.reqntid\s+(\d+)", directives)
    assert threads is not None, "expected .reqntid"
    names = re.findall(r"(\w+)\s*(?:,|$)", parameters.strip())
    program = Program(name, names, int(threads.group(1)))
    for line in re.split(r"[;\n]", re.sub(r"(\$\w+):", r"\1:\n", body)):
        words = line.strip()
        if words.endswith(":"):
            program.labels[words[:-1]] = len(program.instructions)
        elif words and words[0] != "." and words not in "{}":
            program.instructions.append(_instruction(words))
    return program


def _instruction(words: str) -> Instruction:
    match = re.match(r"(?:@(!?)(%\w+)\s+)?([\w.:]+)\s*(.*)$", words)
    assert match is not None, f"expected an instruction, found {words!r}"
    negated, guard, name, rest = match.groups()
    operands = []
    for braces, plain in re.findall(r"\{([^}]*)\}|(\[[^\]]*\]|[^,{}\s]+)", rest):
        operands.append([part.strip() for part in braces.split(",")] if braces else plain)
    return Instruction(guard, negated == "!", name, operands)
