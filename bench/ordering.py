"""The order of memory accesses in compiled code, read from its PTX, as running might never show it wrong."""

from __future__ import annotations

import re

_LABEL = re.compile(r"^(\$L__BB\w+):", re.MULTILINE)
_EVENT = re.compile(
    r"(?P<wait>cp\.async\.wait_\w+)|(?P<fence>fence\.proxy\.async)|(?P<read>wgmma\.mma_async|tcgen05\.mma)"
    r"|(?P<leave>(?:@!?%p\d+\s+)?bra(?:\.uni)?\s+(?P<target>\$L__BB\w+)|^\s*ret;)",
    re.MULTILINE,
)
_INSTRUCTION = re.compile(r"^\s*(?:\{\s*)?(?:@!?%p\d+\s+)?([a-z][\w.:]*)\s+(.*?);?\s*$", re.MULTILINE)
_REGISTER = re.compile(r"%rd\d+")


def unfenced_reads(ptx: str) -> int:
    """Tensor-core reads of shared memory that some path reaches from a wait for asynchronous copies without
    a fence on the way.

    From Hopper on, tensor cores read their operands from shared memory through a path of their own, the async
    proxy. What was written there by other means, asynchronous copies included, is only certain to be seen
    after `fence.proxy.async` (PTX ISA, "Async proxy"). Older ones' `mma.sync` reads registers.
    """
    blocks = _blocks(ptx)
    unfenced_at_start = dict.fromkeys(blocks, False)
    todo, found = list(blocks), set()
    while todo:
        label = todo.pop()
        unfenced = unfenced_at_start[label]
        for position, kind, target in blocks[label]:
            if kind == "wait":
                unfenced = True
            elif kind == "fence":
                unfenced = False
            elif kind == "read" and unfenced:
                found.add(position)
            elif kind == "go" and unfenced and not unfenced_at_start[target]:
                unfenced_at_start[target] = True
                todo.append(target)
    return len(found)


def _blocks(ptx: str) -> dict[str, list[tuple[int, str | None, str]]]:
    """Each basic block's events by its label: (position, wait, fence, read or go, where it goes)."""
    starts = [("", 0), *((m[1], m.end()) for m in _LABEL.finditer(ptx))]
    following = [*starts[1:], ("", len(ptx))]
    blocks = {}
    for (label, start), (next_label, stop) in zip(starts, following, strict=True):
        events, falls_through = [], bool(next_label)
        for match in _EVENT.finditer(ptx, start, stop):
            if match["leave"] is None:
                events.append((match.start(), match.lastgroup, ""))
                continue
            if match["target"]:
                events.append((match.start(), "go", match["target"]))
            if not match["leave"].startswith("@"):
                falls_through = False
                break
        if falls_through:
            events.append((stop, "go", next_label))
        blocks[label] = events
    return blocks


def accesses_in_order(ptx: str, parameter: int) -> str:
    """The accesses to the memory behind a kernel's parameter and the barriers between them, in the order of
    the code: l, s and | for a load, a store and a barrier."""
    addresses: set[str] = set()
    found = ""
    for opcode, operands in _INSTRUCTION.findall(ptx):
        registers = _REGISTER.findall(operands)
        if opcode.startswith("bar"):
            found += "|"
        elif opcode.startswith(("ld.global", "st.global")):
            # An address stands in brackets, behind what is loaded and before what is stored.
            if addresses.intersection(_REGISTER.findall(operands.partition("[")[2].partition("]")[0])):
                found += opcode[0]
        elif opcode.startswith("ld.param"):
            if re.search(rf"_param_{parameter}\]", operands):
                addresses.update(registers)
        elif len(registers) > 1 and addresses.intersection(registers[1:]):
            addresses.add(registers[0])
    return found
