"""The machine code of a kernel compiled offline: registers, spills, matrix instructions, access widths."""

import dataclasses
import functools
import re
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

import triton

from ._loops import access_bytes, find_loops, read_code

# The newest first: the first found is the one a kernel is said to use.
_MATRIX = {r"UTC\w*MMA": "tcgen05", "HGMMA": "HGMMA", "HMMA": "HMMA", "v_mfma": "mfma", "v_wmma": "wmma"}
_AMD = re.compile(r"^\s+([a-z]+_\w+)", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class MachineCode:
    """Widths are bytes a thread moves at a time, the narrowest and the widest; (0, 0) where there is none."""

    registers: int
    spills: int  # local-memory instructions and stack bytes; 0 is none of either
    matrix: str  # "HGMMA", "HMMA", "tcgen05", "mfma", "wmma" or ""
    store: tuple[int, int]
    load: tuple[int, int]  # into registers
    async_copy: tuple[int, int]  # into shared memory, past the registers
    instructions: int
    barriers: int  # at which the threads of a program wait for each other
    loop: int = 0  # instructions of the innermost loop with a matrix instruction (NVIDIA); 0 where is none


def inspect(compiled: "triton.compiler.CompiledKernel") -> MachineCode:
    """Read the code of `compiled`, with the `cuobjdump` of Triton's wheel or from the AMD assembly."""
    if "amdgcn" in compiled.asm:
        return _inspect_amd(compiled.asm["amdgcn"])
    text = disassembly(compiled.asm["cubin"])
    return from_sass(text, *registers_and_stack(text))


def registers_and_stack(text: str) -> tuple[int, int]:
    """A thread's registers and the bytes of its stack, of a disassembly."""
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if usage is None:
        raise RuntimeError(f"cuobjdump names no registers: {text[:200]!r}")
    return int(usage[1]), int(usage[2])


@functools.lru_cache(maxsize=1)
def disassembly(cubin: bytes) -> str:
    """NVIDIA's, with the registers and the stack on a line of their own."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-sass", "--dump-resource-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def from_sass(text: str, registers: int, stack: int) -> MachineCode:
    """Read NVIDIA's disassembly."""
    code = read_code(text)
    operations = [instruction.operation for instruction in code]
    local = sum(re.match(r"(LDL|STL)\b", op) is not None for op in operations)
    loops = [operations[loop.first : loop.last + 1] for loop in find_loops(code)]
    return MachineCode(
        registers,
        stack + local,
        _matrix(operations),
        _widths(access_bytes(op) for op in operations if re.match(r"STG\b", op)),
        _widths(access_bytes(op) for op in operations if re.match(r"LDG\b", op)),
        _widths(access_bytes(op) for op in operations if re.match(r"LDGSTS\b", op)),
        len(operations),
        sum(op.startswith("BAR.SYNC") for op in operations),
        min((len(loop) for loop in loops if _matrix(loop)), default=0),
    )


def _inspect_amd(text: str) -> MachineCode:
    def number(name: str) -> int:
        return sum(map(int, re.findall(rf"\.{name}:\s*(\d+)", text)))

    operations = _AMD.findall(text)
    stores = [op for op in operations if re.match("(global|buffer)_store", op)]
    loads = [op for op in operations if re.match("(global|buffer)_load", op)]
    # Scalar registers spill into lanes of vector registers, not to memory: not counted.
    spills = number("vgpr_spill_count") + number("private_segment_fixed_size")
    return MachineCode(
        number("vgpr_count"),
        spills,
        _matrix(operations),
        _widths(_amd_bytes(op) for op in stores),
        _widths(_amd_bytes(op) for op in loads if "_lds" not in op),
        _widths(_amd_bytes(op) for op in loads if "_lds" in op),
        len(operations),
        sum(op == "s_barrier" for op in operations),
    )


def _amd_bytes(operation: str) -> int:
    match = re.search(r"dword(?:x(\d))?", operation)
    if match:
        return 4 * int(match[1] or 1)
    return 1 if "byte" in operation else 2


def _matrix(operations: list[str]) -> str:
    for pattern, name in _MATRIX.items():
        if any(re.match(pattern, op) for op in operations):
            return name
    return ""


def _widths(sizes: Iterable[int]) -> tuple[int, int]:
    found = list(sizes)
    return (min(found), max(found)) if found else (0, 0)
