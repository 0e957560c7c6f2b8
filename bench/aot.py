"""Compile a kernel without a GPU and read what came out: registers, stack, spills, widths of memory accesses.

    x = torch.empty(2, 4, 64, 64, device="meta")
    launch = conversions.euler_launch_of(x, x.half(), step_down=0.1)
    print(compile_launch(launch, 90))

A launch is compiled exactly as running it would: Triton sees the same arguments, so it specialises on the
same sizes and alignments. Tensors on the meta device count as aligned.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_sampler.kernels._jit import Launch

ARCHITECTURES = (80, 90, 100)


@dataclass(frozen=True)
class Compiled:
    """What one compiled kernel uses.

    Accesses are counted in the code, by their width in bits; so are the instructions, a loop's once.
    loop_instructions: those of the longest loop that has no other one inside, 0 without a loop.
    """

    name: str
    architecture: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    warps: int
    instructions: int
    loop_instructions: int
    local_loads: int
    local_stores: int
    global_loads: dict[int, int]
    global_stores: dict[int, int]
    ptx: str
    sass: str

    @property
    def spills(self) -> int:
        """Accesses to local memory: registers that did not fit, or arrays on a stack."""
        return self.local_loads + self.local_stores

    def __str__(self) -> str:
        def widths(counts: dict[int, int]) -> str:
            return " + ".join(f"{n}×{bits}" for bits, n in sorted(counts.items(), reverse=True)) or "none"

        return (
            f"{self.name} sm_{self.architecture}: {self.registers} registers, {self.stack_bytes} B stack, "
            f"{self.spills} spills, {self.shared_bytes} B shared, "
            f"loads {widths(self.global_loads)}, stores {widths(self.global_stores)} bits"
        )


class _Driver:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, architecture: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        # Kernels cache their compilations by device: this name keeps them apart from a real device's.
        return f"sm_{self.target.arch}"

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def pretend_device(architecture: int) -> Iterator[str]:
    """Let Triton take the machine for one with a GPU of this architecture, for compiling only."""
    from triton.runtime import driver

    pretended = _Driver(architecture)
    # Not reset_active(): without a GPU there is no driver to go back to.
    previous = dict(vars(driver))
    driver.set_active(pretended)  # pyright: ignore[reportArgumentType] - compiling asks for no more of it
    try:
        yield pretended.get_current_device()
    finally:
        vars(driver).update(previous)


def compile_launch(launch: Launch, architecture: int = 90) -> Compiled:
    """Compile `launch` for compute capability `architecture`/10 and inspect the machine code.

    Registers and the rest are read from the machine code by the tools that come with Triton.
    """
    with pretend_device(architecture):
        kernel = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.constants)
    sass = _disassembled(kernel.asm["cubin"])
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", sass)}
    opcodes = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.MULTILINE)
    return Compiled(
        name=launch.kernel.__name__,
        architecture=architecture,
        registers=usage["REG"],
        stack_bytes=usage["STACK"],
        shared_bytes=kernel.metadata.shared,
        warps=kernel.metadata.num_warps,
        instructions=sum(opcode != "NOP" for opcode in opcodes),
        loop_instructions=_longest_loop(sass),
        local_loads=sum(opcode.startswith("LDL") for opcode in opcodes),
        local_stores=sum(opcode.startswith("STL") for opcode in opcodes),
        global_loads=_widths(opcodes, "LDG"),
        global_stores=_widths(opcodes, "STG"),
        ptx=kernel.asm["ptx"],
        sass=sass,
    )


def _longest_loop(sass: str) -> int:
    code = re.findall(r"^\s+/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", sass, re.MULTILINE)
    addresses = [int(address, 16) for address, _, _ in code]
    loops = []
    for here, (_, opcode, operands) in zip(addresses, code, strict=True):
        target = re.search(r"0x([0-9a-f]+)", operands) if opcode.startswith("BRA") else None
        if target is not None and int(target[1], 16) < here:  # a branch to itself ends every kernel
            loops.append((int(target[1], 16), here))
    innermost = [
        (start, stop)
        for start, stop in loops
        if not any(start <= other[0] and other[1] < stop for other in loops)
    ]
    return max((sum(start <= a <= stop for a in addresses) for start, stop in innermost), default=0)


def _disassembled(cubin: bytes) -> str:
    """Resources and machine code as text; kept in Triton's cache, as it takes longer than to compile."""
    from triton.runtime.cache import get_cache_manager

    cache = get_cache_manager(hashlib.sha256(b"cuobjdump -res-usage -sass" + cubin).hexdigest())
    kept = cache.get_file("kernel.sass")
    if kept is not None:
        return Path(kept).read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        sass = _tool("cuobjdump", "-res-usage", "-sass", str(path))
    cache.put(sass, "kernel.sass", binary=False)
    return sass


def _widths(opcodes: list[str], mnemonic: str) -> dict[int, int]:
    counts: Counter[int] = Counter()
    for opcode in opcodes:
        base, *modifiers = opcode.split(".")
        if base == mnemonic:
            sizes = [
                int(m.group(1)) for m in map(re.compile(r"[US]?(8|16|64|128|256)").fullmatch, modifiers) if m
            ]
            counts[sizes[0] if sizes else 32] += 1
    return dict(counts)


def _tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise RuntimeError(f"{name} is not part of this Triton installation ({path})")
    return subprocess.run([str(path), *arguments], check=True, capture_output=True, text=True).stdout
