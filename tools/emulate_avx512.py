"""Runs kernel_check on an emulated CPU with AVX-512, VNNI and BF16, where the machine has none of them.

    .venv/bin/pip install bochscpu-python                           # the CPU of the Bochs emulator, as a library
    .venv/bin/python tools/emulate_avx512.py avx512_bf16            # the arguments and the exit code of kernel_check
    .venv/bin/python tools/emulate_avx512.py avx512 half small
    .venv/bin/python tools/emulate_avx512.py --program FILE ...     # a program linked with -static -no-pie; no threads

Needs Linux on x86-64, a C++ compiler and the build folder that `make` leaves. The objects there, those that the
extension is linked from, are linked once more into a static kernel_check, loaded into the memory of an emulated
Sapphire Rapids in 64-bit mode and run there, its few system calls answered here. On stderr: what was executed
(AVX-512: libc has some too). Bochs computes float arithmetic in software: this shows whether the code is right, not
how fast it is.
"""

from __future__ import annotations

import ctypes
import importlib
import mmap
import os
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.resolve()

# Loaded before bochscpu, whose calls then find these instead of its own: the CPU model, which its Python interface does
# not let one choose, and the instrumentation, of which only a count by opcode is needed.
SHIM = r"""
#include <cstdint>
class BX_CPU_C;
void* create_sapphire_rapids_cpuid(BX_CPU_C* cpu);
void* create_corei3_cnl_cpuid(BX_CPU_C* cpu) { return create_sapphire_rapids_cpuid(cpu); }  // bochscpu's default model
extern "C" {
unsigned instr_bx_opcode(void* instruction);
uint64_t executed[1 << 16];
void bx_instr_before_execution(unsigned, void* instruction) { ++executed[uint16_t(instr_bx_opcode(instruction))]; }
void bx_instr_after_execution(unsigned, void*) {}
void bx_instr_repeat_iteration(unsigned, void*) {}
void bx_instr_opcode(unsigned, void*, const uint8_t*, unsigned, bool, bool) {}
void bx_instr_lin_access(unsigned, uint64_t, uint64_t, unsigned, unsigned, unsigned) {}
void bx_instr_phy_access(unsigned, uint64_t, unsigned, unsigned, unsigned) {}
void bx_instr_cnear_branch_taken(unsigned, uint64_t, uint64_t) {}
void bx_instr_cnear_branch_not_taken(unsigned, uint64_t) {}
void bx_instr_ucnear_branch(unsigned, unsigned, uint64_t, uint64_t) {}
}
"""

# Memory, mapped one to one: nothing in the first 2 MiB, so that null pointers fault; the program; its heap; its stack;
# page tables and what SYSCALL jumps to in the last 2 MiB.
LARGE_PAGE = 1 << 21
MEMORY = 1 << 30
TABLES = MEMORY - LARGE_PAGE
ENTRY = TABLES + 0x10000
ENTRY_CODE = bytes.fromhex("0f09 ffe1")  # wbinvd, which calls `Machine.system_call`; jmp rcx, back
STACK_BYTES = 8 << 20
ENOSYS = -38


def load_emulator(folder: Path) -> tuple[Any, ctypes.CDLL]:
    """bochscpu with the shim in front of it; the shim. Bound lazily: it names, never calls, what glibc 2.38 added."""
    source, library = folder / "shim.cpp", folder / "shim.so"
    source.write_text(SHIM)
    subprocess.run([os.environ.get("CXX", "g++"), "-O2", "-shared", "-fPIC", source, "-o", library], check=True)
    shim = ctypes.CDLL(str(library), os.RTLD_GLOBAL | os.RTLD_LAZY)
    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_GLOBAL | os.RTLD_LAZY)
    try:
        emulator = importlib.import_module("bochscpu._bochscpu")
    except ImportError as error:
        raise SystemExit(f"emulate_avx512: {error}; pip install bochscpu-python") from error
    finally:
        sys.setdlopenflags(flags)
    return emulator, shim


def link_program(folder: Path) -> Path:
    """kernel_check from the objects of the build folder, without shared libraries."""
    build = ROOT / "build" / f"cmake.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "recog_fast._native"
    if not (build / "CMakeCache.txt").exists():
        raise SystemExit(f"emulate_avx512: no build folder {build.relative_to(ROOT)}; run make first")
    make = [sys.executable, "-m", "cmake", "--build", str(build), "--target", "kernel_check"]
    subprocess.run(make, check=True, stdout=subprocess.DEVNULL)
    folders = [build / "CMakeFiles" / f"{target}.dir" for target in ("recog_fast_cpu", "kernel_check")]
    objects = [path for part in folders for path in part.rglob("*.o")]
    program = folder / "kernel_check"
    compiler = os.environ.get("CXX", "g++")
    subprocess.run([compiler, "-static", "-no-pie", *objects, "-o", program, "-pthread"], check=True)
    return program


class Machine:
    """One CPU in 64-bit mode, its memory, and as much of Linux as a static program without threads asks for."""

    def __init__(self, emulator: Any) -> None:
        self.emulator = emulator
        self.memory = mmap.mmap(-1, MEMORY)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.session = emulator.Session()
        self.session.missing_page_handler = self.add_page
        self.exit_code: int | None = None
        self.heap = self.heap_end = self.heap_highest = 0

    def add_page(self, physical: int) -> None:
        page = physical & ~0xFFF
        self.emulator.memory.page_insert(page, self.address + page % MEMORY)

    def words(self, at: int, *values: int) -> None:
        struct.pack_into(f"<{len(values)}Q", self.memory, at, *values)

    def load(self, program: Path, arguments: list[str]) -> None:
        """The program in memory, its stack, and the CPU at its first instruction."""
        image = program.read_bytes()
        if struct.unpack_from("<4sBB10xH", image) != (b"\x7fELF", 2, 1, 2):
            raise SystemExit(f"emulate_avx512: {program} was not linked with -static -no-pie")
        entry, headers = struct.unpack_from("<QQ", image, 24)
        size, count = struct.unpack_from("<HH", image, 54)
        header_address = 0
        for i in range(count):
            kind, _, offset, at, _, in_file, in_memory = struct.unpack_from("<IIQQQQQ", image, headers + i * size)
            if kind != 1:  # PT_LOAD
                continue
            self.memory[at : at + in_file] = image[offset : offset + in_file]
            self.heap = max(self.heap, at + in_memory + 0xFFF & ~0xFFF)
            if offset <= headers < offset + in_file:
                header_address = at + headers - offset
        self.heap_end = self.heap_highest = self.heap
        stack = TABLES - 0x10000
        texts = []
        for text in [program.name, *arguments, "0123456789abcdef"]:  # the last: AT_RANDOM
            self.memory[stack : stack + len(text)] = text.encode()
            texts.append(stack)
            stack += len(text) + 1
        vector = [3, header_address, 4, size, 5, count, 6, 4096, 9, entry, 23, 0, 25, texts.pop(), 0, 0]
        start = TABLES - 0x20000
        self.words(start, len(texts), *texts, 0, 0, *vector)
        self.start_cpu(entry, start)

    def start_cpu(self, entry: int, stack: int) -> None:
        self.words(TABLES, TABLES + 0x1007)
        self.words(TABLES + 0x1000, TABLES + 0x2007)
        self.words(TABLES + 0x2000, 0, *(at | 0x87 for at in range(LARGE_PAGE, MEMORY, LARGE_PAGE)))
        self.memory[ENTRY : ENTRY + len(ENTRY_CODE)] = ENTRY_CODE
        state = self.emulator.State()
        state.cr0, state.efer = 0x80050033, 0xD01  # protected mode and paging with FPU; long mode with SYSCALL
        state.cr3, state.rip, state.rsp, state.rflags = TABLES, entry, stack, 2
        state.cr4 = 1 << 5 | 1 << 9 | 1 << 10 | 1 << 18  # PAE, OSFXSR, OSXMMEXCPT, OSXSAVE
        state.xcr0 = 0xE7  # x87, SSE, AVX, opmask, both halves of ZMM
        state.mxcsr, state.fpcw, state.fptw = 0x1F80, 0x37F, 0xFFFF
        state.star, state.lstar = 0x10 << 32, ENTRY
        for name, selector, kind in (("cs", 0x10, 0x229B), *((s, 0x18, 0xC93) for s in ("ss", "ds", "es", "fs", "gs"))):
            setattr(state, name, self.segment(selector, kind, 0))
        self.session.cpu.state = state

    def segment(self, selector: int, kind: int, base: int) -> Any:
        segment = self.emulator.Segment()
        segment.present, segment.selector, segment.attr = True, selector, kind
        segment.base, segment.limit = base, 0xFFFFFFFF
        return segment

    def run(self) -> int:
        """Until the program ends; its exit code."""
        hook = self.emulator.Hook()
        hook.cache_cntrl = self.system_call
        hook.exception = self.fault
        self.session.run([hook])
        return 70 if self.exit_code is None else self.exit_code

    def end(self, code: int) -> int:
        if self.exit_code is None:
            self.exit_code = code
        self.session.stop()
        return 0

    def fault(self, _session: Any, _cpu: int, vector: int, error: int) -> None:
        if self.exit_code is None:
            at = self.session.cpu.rip
            code = self.memory[at : at + 15].hex(" ")
            print(f"emulate_avx512: exception {vector} (error {error:#x}) before {at:#x}: {code}", file=sys.stderr)
        self.end(128 + vector)

    def system_call(self, _session: Any, _cpu: int, _what: int) -> None:
        cpu = self.session.cpu
        cpu.rax = self.answer(cpu.rax, cpu.rdi, cpu.rsi, cpu.rdx) % (1 << 64)

    def answer(self, number: int, first: int, second: int, third: int) -> int:
        if number == 1:  # write
            return os.write(first, self.memory[second : second + third])
        if number == 20:  # writev
            pieces = struct.iter_unpack("<QQ", self.memory[second : second + 16 * third])
            return os.write(first, b"".join(self.memory[at : at + size] for at, size in pieces))
        if number == 12:  # brk
            return self.grow(first)
        if number == 158:  # arch_prctl(ARCH_SET_FS)
            if first != 0x1002:
                return ENOSYS
            self.session.cpu.fs = self.segment(0x18, 0xC93, second)
            return 0
        if number in (60, 231, 234):  # exit, exit_group; tgkill, which abort() asks for
            return self.end(first if number != 234 else 128 + third)
        if number == 10:  # mprotect: all memory may be read, written and run
            return 0
        if number == 202 and second & 127 == 1:  # futex(FUTEX_WAKE): nobody waits
            return 0
        # No mmap: malloc then takes all from brk. No threads: the sweeps do with the one there is.
        return ENOSYS

    def grow(self, end: int) -> int:
        if self.heap <= end < TABLES - STACK_BYTES:
            again = min(end, self.heap_highest) - self.heap_end
            if again > 0:  # what was given back and is taken again comes zeroed
                self.memory[self.heap_end : self.heap_end + again] = bytes(again)
            self.heap_end, self.heap_highest = end, max(end, self.heap_highest)
        return self.heap_end


def report(emulator: Any, shim: ctypes.CDLL, seconds: float) -> None:
    """What was executed, on stderr; the instructions that only AVX-512 has, by how often they were."""
    library = ctypes.CDLL(emulator.__file__)
    name_of = library._Z18get_bx_opcode_namet
    name_of.restype = ctypes.c_char_p
    counts = {i: n for i, n in enumerate((ctypes.c_uint64 * (1 << 16)).in_dll(shim, "executed")) if n}
    names = Counter({name_of(i).decode().removeprefix("BX_IA_"): n for i, n in counts.items()})
    evex = Counter({name.removeprefix("EVEX_"): n for name, n in names.items() if name.startswith("EVEX_")})
    most = ", ".join(f"{name} {n}" for name, n in evex.most_common(8))
    total = f"{names.total() / 1e6:.1f} million instructions in {seconds:.0f} s"
    print(f"{total}, {evex.total() / 1e6:.1f} of them AVX-512, of {len(evex)} kinds: {most}", file=sys.stderr)


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        emulator, shim = load_emulator(folder)
        machine = Machine(emulator)
        if sys.argv[1:2] == ["--program"]:
            machine.load(Path(sys.argv[2]), sys.argv[3:])
        else:
            machine.load(link_program(folder), sys.argv[1:])
        start = time.monotonic()
        code = machine.run()
        report(emulator, shim, time.monotonic() - start)
    return code


if __name__ == "__main__":
    sys.exit(main())
