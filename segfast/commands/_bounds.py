"""How fast machine code could be at best on an H200 (sm_90): modeled from its instructions, never measured.

Counted is what a warp executes; the loops' trips come from the kernel's Triton IR. A launch takes as long as
the busiest of: the tensor cores, the FP32 and integer pipes and the issue of instructions together ("alu"),
the special functions ("mufu"), loads and stores to L1 and shared memory ("lsu"), L2, DRAM, and the waiting
for memory of the programs that fit a multiprocessor ("latency"); rounded up to whole programs a
multiprocessor ("tail"). What the bytes are is the least: each tensor once from DRAM; from L2 what passes L1,
and else each tensor once.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from .._table import format_table
from ._loops import Instruction, Loop, access_bytes, find_loops, read_code, read_source, with_trips

# Of a multiprocessor and clock. NVIDIA's "H100 Tensor Core GPU Architecture" (the table of the SXM5's units
# and rates, of which the H200 has as many) and "CUDA C++ Programming Guide", arithmetic instructions of
# compute capability 9.0. 989 TFLOP/s of dense bfloat16 at 1830 MHz on 132 multiprocessors are 2048
# multiply-adds.
PROCESSORS = 132
SCHEDULERS = 4  # a warp's instruction each
FP32 = 128 / 32  # warps' instructions: multiply-adds, additions
INTEGER = 64 / 32  # the same for integers: multiply-adds on one pipe, all else on another
SPECIAL = 16 / 32
TENSOR = 2048  # multiply-adds of 16 bits
# The share that mma.sync reaches, on average on an H800: "Dissecting the NVIDIA Hopper Architecture through
# Microbenchmarking and Multiple Level Analysis", arXiv 2501.12084.
OLDER_MATRIX = 0.63
SHARED = 128  # bytes to or from L1 and shared memory
REGISTERS, WARPS, PROGRAMS = 65536, 64, 32  # "Hopper Tuning Guide", occupancy
SHARED_MEMORY, RESERVED = 233472, 1024
# Assumed: the clock; of the data sheet's 4.8 TB/s from DRAM 4.3; from L2 what a published matrix product with
# 128x256 tiles must read, a floor; and how long a load takes.
CLOCK = 1.755e9
DRAM = 4.3e12 / CLOCK / PROCESSORS
L2 = 6.6e12 / CLOCK / PROCESSORS
LATENCY = 700e-9 * CLOCK  # from DRAM on a busy GPU
PIPES = ("tensor", "alu", "mufu", "lsu")
# A launch that whole programs a multiprocessor make longer by so much is bound by them.
TAIL = 1.1

_FLOATS = re.compile(r"(FFMA|FADD|FMUL|HFMA2|HADD2|HMUL2)\b")
_INTEGERS = re.compile(
    r"(IADD3|VIADD|VIADDMNMX|LOP3|SHF|LEA|ISETP|SEL|PRMT|PLOP3|IMNMX|VIMNMX|IABS|FMNMX|FSETP|FSEL|FCHK|F2FP|MOV|CS2R"
    r"|SGXT|POPC|FLO|BMSK|P2R|R2P|I2FP|F2I|I2F|F2F|FRND|ISCADD|VOTE)\b"
)
_MEMORY = re.compile(r"(LDG|STG|LDGSTS|LDS|STS|LDSM|STSM|ATOM|ATOMG|ATOMS|RED|LDL|STL|LD|ST|SHFL)\b")


def cost(operation: str) -> dict[str, float]:
    """The cost of one instruction of a warp: instructions by pipe, clocks of "tensor" and "lsu", bytes."""
    found: dict[str, float] = {"issue": 1}
    if shape := re.match(r"HGMMA\.64x(\d+)x", operation):
        # A warp does a quarter of 64 rows; a step is 32 bytes deep in every type, at the same clocks.
        found.update(matrix=1, tensor=16 * int(shape[1]) * 16 / TENSOR)
    elif shape := re.match(r"HMMA\.(16|8)(8|4|16)(8|4|16)\b", operation):
        depth = int(shape[3]) * (2 if "TF32" in operation else 1)
        found.update(matrix=1, tensor=16 * 8 * depth / TENSOR / OLDER_MATRIX)
    elif _FLOATS.match(operation):
        found["fp32"] = 1
    elif re.match(r"IMAD\b", operation):
        found["imad"] = 1
    elif operation.startswith("MUFU"):
        found["mufu"] = 1
    elif _INTEGERS.match(operation):
        found["integer"] = 1
    elif _MEMORY.match(operation):
        width = access_bytes(operation)
        if operation.startswith(("LDSM", "STSM")):  # 8x8 matrices of 16 bits
            width = 4 * int(operation[-1]) if operation[-2] == "." else 4
        found.update(memory=1, lsu=max(1.0, 32 * width / SHARED))
        kind = {"LDG": "loaded", "LD": "loaded", "LDGSTS": "copied", "STG": "stored", "ST": "stored"}
        if name := kind.get(operation.split(".")[0]):
            found[name] = 32 * width
    return found


def pipe_clocks(work: Mapping[str, float], warps: int) -> dict[str, float]:
    """Clocks of a multiprocessor that each pipe takes for `work` of each of `warps`."""
    alu = (
        work["issue"] / SCHEDULERS,
        (work["fp32"] + work["imad"]) / FP32,
        work["imad"] / INTEGER,
        work["integer"] / INTEGER,
    )
    clocks = (work["tensor"], max(alu), work["mufu"] / SPECIAL, work["lsu"])
    return {pipe: warps * clock for pipe, clock in zip(PIPES, clocks, strict=True)}


def resident_programs(registers: int, shared: int, warps: int) -> int:
    """Programs that fit a multiprocessor at a time; registers are dealt out to warps 256 at a time."""
    a_warp = math.ceil(registers * 32 / 256) * 256
    limits = (
        REGISTERS // (a_warp * warps),
        SHARED_MEMORY // (shared + RESERVED),
        WARPS // warps,
        PROGRAMS,
    )
    return max(1, min(limits))


class Launched(NamedTuple):
    """A launch, as far as its bound depends on it, besides its code."""

    programs: float  # those that do the work; others' bytes count, and nothing else of them
    warps: int
    stages: int
    registers: int
    shared: int
    read: float  # bytes of the tensors that it reads
    written: float
    flops: float = 0.0  # useful ones, on matrix units; 0: all that the code does
    rate: float = 1.0  # at which the matrix units take these operands, of that for 16 bits
    unrolled: float = 1.0  # steps of the loop that the code has none for


class Bound(NamedTuple):
    """A launch as modeled. A step is one of a program's main loop; clocks are a multiprocessor's."""

    step: dict[str, int]  # a warp's instructions by pipe
    step_clocks: dict[str, float]
    trips: float | None
    dram_bytes: float
    l2_bytes: float | None
    resident: int  # programs that fit a multiprocessor
    in_flight: float  # bytes on their way to a multiprocessor
    seconds: float | None
    name: str  # of what takes the longest
    share: float  # of the roof: the matrix units' or DRAM's time for the useful work


def model(code: Sequence[Instruction], loops: Sequence[Loop], launched: Launched) -> Bound:
    """The bound of a launch of `code`; where the trips are not known, of a step of its main loop."""
    costs = [cost(instruction.operation) for instruction in code]
    main = _main_loop(costs, loops)
    inside = [loop for loop in loops if loop != main and _within(loop, main)]
    step = _executed(costs, range(main.first, main.last + 1), inside)
    warps, resident = launched.warps, resident_programs(launched.registers, launched.shared, launched.warps)
    ahead = max(1, launched.stages - 1) if step["copied"] else 1
    in_flight = resident * ahead * warps * (step["copied"] + step["loaded"]) / launched.unrolled
    clocks = pipe_clocks(step, warps)
    counts = {"tensor": step["matrix"], "alu": step["fp32"] + step["imad"] + step["integer"],
              "mufu": step["mufu"], "lsu": step["memory"]}  # fmt: skip
    dram_bytes = launched.read + launched.written
    described = {name: round(count) for name, count in counts.items()}, clocks, main.trips, dram_bytes
    if any(loop.trips is None for loop in loops):
        times = {**clocks, "l2": warps * step["copied"] / L2}
        name = max(times, key=lambda name: times[name])
        share = times["tensor"] / times[name] if times["tensor"] else math.nan
        return Bound(*described, None, resident, in_flight, None, name, share)

    whole = _executed(costs, range(len(costs)), loops)
    # What goes through L1 is read from L2 once; how often L1 is a hit, the code does not say.
    l2_bytes = launched.programs * warps * whole["copied"] + launched.written
    l2_bytes += min(launched.programs * warps * whole["loaded"], launched.read)
    if not step["copied"]:
        steps = max(1.0, _times(main.first, loops) * launched.unrolled)
        in_flight = min(in_flight, resident * launched.read / launched.programs / steps)
    share = launched.programs / PROCESSORS
    program = pipe_clocks(whole, warps)
    alone = _clocks_alone(costs, loops, warps, ahead)
    times = {name: share * each for name, each in program.items()} | {
        "latency": share / resident * alone,
        "l2": l2_bytes / L2 / PROCESSORS,
        "dram": dram_bytes / DRAM / PROCESSORS,
    }
    name = max(times, key=lambda name: times[name])
    full = max(times[name], math.ceil(share) * max(program.values()), math.ceil(share / resident) * alone)
    if full > TAIL * times[name]:
        name = "tail"
    tensor = launched.flops / launched.rate / 2 / TENSOR / PROCESSORS if launched.flops else times["tensor"]
    roof = max(tensor, times["dram"])
    return Bound(*described, l2_bytes, resident, in_flight, full / CLOCK, name, roof / full)


def bound_of_launch(launch, pointers: Sequence[Any], compiled, flops: float, rate: float) -> Bound:
    """The bound of a recorded launch compiled for sm_90; `flops` and `rate` as in `Launched`."""
    from ._machine_code import disassembly, registers_and_stack  # which needs triton

    text, ttir, names = disassembly(compiled.asm["cubin"]), compiled.asm["ttir"], launch.kernel.arg_names
    code = read_code(text)
    operands = dict(zip(names, (*pointers, *launch.scalars), strict=False))
    integers = {name: value for name, value in operands.items() if isinstance(value, int)}
    source = read_source(ttir, integers, launch.grid)
    loops, unrolled = with_trips(find_loops(code), source.trips)
    sizes = {True: 0, False: 0}
    for name, tensor in zip(names, pointers, strict=False):
        if tensor is not None:
            sizes[name in source.written] += tensor.numel() * tensor.itemsize
    launched = Launched(
        programs=math.prod(launch.grid) * source.entering,
        warps=launch.tile.num_warps,
        stages=launch.tile.num_stages,
        registers=registers_and_stack(text)[0],
        shared=compiled.metadata.shared,
        read=sizes[False],
        written=sizes[True],
        flops=flops if "tt.dot" in ttir else 0.0,
        rate=rate,
        unrolled=unrolled,
    )
    return model(code, loops, launched)


_HEADERS = ("dtype", "specimen", "kernel", "tile", "steps", *PIPES, *[f"clk {pipe}" for pipe in PIPES],
            "MB dram", "MB l2", "programs", "KB flying", "us", "bound", "share")  # fmt: skip
_SPEEDS = [
    f"{each * CLOCK * PROCESSORS / 1e12:.1f} TB/s from {name}" for name, each in (("DRAM", DRAM), ("L2", L2))
]
_HEAD = f"""\
MODELED, NEVER MEASURED: an H200 at {CLOCK / 1e9} GHz, {" and ".join(_SPEEDS)}
tensor to lsu are a warp's instructions in a step of the main loop, clk the clocks of a multiprocessor that a
program's step takes there; programs fit a multiprocessor, KB flying are on their way to it; share is the most
of the roof that the code can reach
"""


def bounds_table(rows: Iterable[tuple[Sequence[str], Bound]]) -> str:
    """A table of bounds, each with the type, case, kernel and tile that it is of."""
    return f"{_HEAD}\n{format_table(_HEADERS, [(*names, *_cells(bound)) for names, bound in rows])}"


def _cells(b: Bound) -> tuple:
    return (
        "-" if b.trips is None else f"{b.trips:g}",
        *b.step.values(),
        *[f"{clocks:.0f}" for clocks in b.step_clocks.values()],
        f"{b.dram_bytes / 1e6:.1f}",
        "-" if b.l2_bytes is None else f"{b.l2_bytes / 1e6:.1f}",
        b.resident,
        f"{b.in_flight / 1e3:.1f}",
        "-" if b.seconds is None else f"{b.seconds * 1e6:.0f}",
        b.name,
        "-" if math.isnan(b.share) else f"{b.share:.2f}",
    )


def _within(loop: Loop, other: Loop) -> bool:
    return other.first <= loop.first and loop.last <= other.last


def _main_loop(costs: Sequence[Mapping[str, float]], loops: Sequence[Loop]) -> Loop:
    """The shortest loop with a matrix instruction, else that whose instructions run most; else all code."""
    every = Loop(0, len(costs) - 1, 1.0)
    if any("tensor" in each for each in costs):
        matrix = [loop for loop in loops if any("tensor" in c for c in costs[loop.first : loop.last + 1])]
        return min(matrix, key=lambda loop: loop.last - loop.first, default=every)
    return max(loops, key=lambda p: (p.last - p.first + 1) * _times(p.first, loops), default=every)


def _times(place: int, loops: Sequence[Loop]) -> float:
    """How often a program executes the instruction at `place`."""
    around = [loop for loop in loops if loop.first <= place <= loop.last]
    return math.prod(1.0 if loop.trips is None else loop.trips for loop in around)


def _executed(
    costs: Sequence[Mapping[str, float]], places: Iterable[int], loops: Sequence[Loop]
) -> dict[str, float]:
    """The sum of the `costs` at `places`, each as often as `loops` go through it."""
    total: dict[str, float] = defaultdict(float)
    for place in places:
        times = _times(place, loops)
        for name, value in costs[place].items():
            total[name] += times * value
    return total


def _clocks_alone(
    costs: Sequence[Mapping[str, float]], loops: Sequence[Loop], warps: int, ahead: int
) -> float:
    """Clocks of one program: a first load, then all its steps, none of them faster than its loads."""
    clocks = LATENCY
    for region in (Loop(0, len(costs) - 1, 1.0), *loops):
        inner = [loop for loop in loops if loop != region and _within(loop, region)]
        places = [
            place
            for place in range(region.first, region.last + 1)
            if not any(loop.first <= place <= loop.last for loop in inner)
        ]
        own = _executed(costs, places, ())
        loads = region in loops and (own["loaded"] or own["copied"])
        times = _times(region.first, [loop for loop in loops if _within(region, loop)])
        clocks += times * max(*pipe_clocks(own, warps).values(), LATENCY / ahead if loads else 0.0)
    return clocks
