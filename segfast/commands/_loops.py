"""The loops of a kernel's machine code and how often each is gone through in a launch."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

_SASS = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*(?:\.\w+)*)(?:[^;\n]*?\b(0x[0-9a-f]+)\s*;)?",
    re.MULTILINE,
)
_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
_SAMPLE = 61  # programs of a launch that are looked at


class Instruction(NamedTuple):
    """One line of NVIDIA's disassembly; `target` is the place in the code that a branch goes to, else -1."""

    operation: str  # "LDG.E.128"
    target: int = -1


class Loop(NamedTuple):
    """Instructions `first` to `last`, and how often a program goes through them; None if data decide."""

    first: int
    last: int
    trips: float | None = None


def read_code(text: str) -> list[Instruction]:
    """The instructions of a disassembly, in order."""
    lines = _SASS.findall(text)
    places = {int(address, 16): place for place, (address, *_) in enumerate(lines)}
    return [
        Instruction(op, places.get(int(operand or "-1", 16), -1) if re.match(r"BRA\b", op) else -1)
        for _, op, operand in lines
    ]


def access_bytes(operation: str) -> int:
    """The bytes that a load or store moves for a thread."""
    return next((_BYTES[part] for part in operation.split(".") if part in _BYTES), 4)


def find_loops(code: Sequence[Instruction]) -> list[Loop]:
    """The stretches a branch goes back over, in the order of the code; the trap at the end is none."""
    ends: dict[int, int] = {}
    for place, instruction in enumerate(code):
        if 0 <= instruction.target < place:
            ends[instruction.target] = place
    return [Loop(first, last) for first, last in sorted(ends.items())]


def with_trips(loops: Sequence[Loop], trips: Sequence[float | None]) -> tuple[list[Loop], float]:
    """`loops` with the `trips` of the source's, in its order, and the trips of the longest one it unrolled.

    The assembler unrolls some: those with the fewest trips are taken to be the ones it has no loop for. If it
    has more loops than the source, nothing is known.
    """
    if len(loops) > len(trips):
        return list(loops), 1.0
    ranks = [math.inf if each is None else each for each in trips]
    longest_first = sorted(range(len(trips)), key=lambda i: -ranks[i])
    kept, gone = sorted(longest_first[: len(loops)]), longest_first[len(loops) :]
    unrolled = max((trips[i] or 1.0 for i in gone), default=1.0)
    return [loop._replace(trips=trips[i]) for loop, i in zip(loops, kept, strict=True)], unrolled


class Source(NamedTuple):
    """A launch as its kernel's Triton IR tells it."""

    trips: list[float | None]  # of each loop, the mean of the programs that enter; None if data decide
    entering: float  # the share of the programs that enter a loop; 1 if there is none
    written: set[str]  # the arguments that are stored to


def read_source(ttir: str, arguments: Mapping[str, int], grid: Sequence[int]) -> Source:
    """Evaluate the loops' bounds for a sample of the programs of `grid`; `arguments` by name."""
    loops, written = _read_ir(ttir)
    programs = grid[0] * grid[1] * grid[2]
    sample = min(programs, _SAMPLE)
    found: list[list[float]] = [[] for _ in loops]
    entered = 0
    for number in range(sample):
        pid = number * programs // sample
        place = (pid % grid[0], pid // grid[0] % grid[1], pid // grid[0] // grid[1])
        inside = not loops
        for counts, (definitions, bounds, conditions) in zip(found, loops, strict=True):
            value = _evaluator(definitions, arguments, place, grid)
            try:
                if all(bool(value(name)) == wanted for name, wanted in conditions):
                    inside = True
                    start, stop, step = map(value, bounds)
                    counts.append(max(0, -(-(stop - start) // step)))
            except KeyError:  # read from memory, or carried by a loop
                inside = True
                counts.append(math.nan)
        entered += inside
    means = [sum(counts) / len(counts) if counts else 0.0 for counts in found]
    return Source([None if math.isnan(mean) else mean for mean in means], entered / sample, written)


_Definitions = dict[str, tuple[str, str]]  # a name's operation and operands
_Conditions = tuple[tuple[str, bool], ...]
_Loop = tuple[_Definitions, tuple[str, ...], _Conditions]


def _read_ir(ttir: str) -> tuple[list[_Loop], set[str]]:
    """Each loop: the names defined before it, its bounds, the conditions it stands under; the stored-to."""
    definitions: _Definitions = {}
    loops: list[_Loop] = []
    written = set()
    regions: list[tuple[str, bool] | None] = []
    for line in ttir.splitlines():
        text = line.split(" loc(")[0].strip()
        if defined := re.match(r"(%\w+) = (?:arith|tt)\.(\w+)\s*(.*)", text):
            definitions[defined[1]] = (defined[2], defined[3])
        if stored := re.match(r"tt\.store (%\w+)", text):
            written.add(_base(stored[1], definitions))
        if text.startswith("} else {"):
            condition = regions.pop()
            regions.append(None if condition is None else (condition[0], not condition[1]))
            continue
        if text.startswith("}") and regions:
            regions.pop()
        if loop := re.search(r"scf\.for %\w+ = (%\w+) to (%\w+) step (%\w+)", text):
            conditions = tuple(region for region in regions if region is not None)
            # Names are used again by regions beside each other.
            loops.append((dict(definitions), loop.groups(), conditions))
        if text.endswith("{"):
            branch = re.search(r"scf\.if (%\w+)", text)
            regions.append((branch[1], True) if branch else None)
    return loops, written


def _base(pointer: str, definitions: _Definitions) -> str:
    """The argument that a pointer is made of, by its first operands."""
    while pointer in definitions:
        operation, text = definitions[pointer]
        operands = re.findall(r"%\w+", text)
        pointer = operands[operation == "select"]
    return pointer[1:]


_COMPARE: dict[str, Callable[[int, int], int]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "slt": lambda a, b: a < b,
    "sle": lambda a, b: a <= b,
    "sgt": lambda a, b: a > b,
    "sge": lambda a, b: a >= b,
}
# Divisions and remainders are of numbers that are not negative.
_OPERATIONS: dict[str, Callable[..., int]] = {
    "addi": lambda a, b: a + b,
    "subi": lambda a, b: a - b,
    "muli": lambda a, b: a * b,
    "divsi": lambda a, b: a // b,
    "remsi": lambda a, b: a % b,
    "minsi": min,
    "maxsi": max,
    "andi": lambda a, b: a & b,
    "ori": lambda a, b: a | b,
    "select": lambda c, a, b: a if c else b,
    "extsi": lambda a: a,
    "trunci": lambda a: a,
}


def _evaluator(
    definitions: _Definitions, arguments: Mapping[str, int], place: tuple[int, int, int],
    grid: Sequence[int],
) -> Callable[[str], int]:  # fmt: skip
    """A function of a scalar's name, for the program at `place`; KeyError of what is not known."""

    def value(name: str) -> int:
        if name[1:] in arguments:
            return arguments[name[1:]]
        operation, text = definitions[name]
        if operation == "constant":
            number = text.split(" ")[0]
            return {"true": 1, "false": 0}[number] if number in ("true", "false") else int(number)
        if operation in ("get_program_id", "get_num_programs"):
            return (place if operation == "get_program_id" else grid)["xyz".index(text[0])]
        operands = [value(operand) for operand in re.findall(r"%\w+", text)]
        if operation == "cmpi":
            return _COMPARE[text.split(",")[0]](*operands)
        return _OPERATIONS[operation](*operands)

    return value
