"""What a dispatch cost, in exact and repeatable numbers. They say nothing of time."""

from __future__ import annotations

from dataclasses import dataclass

TRANSACTION_BYTES = 128


@dataclass(frozen=True)
class Counters:
    """Counts of one dispatch, in the order of the runtime's own structure (runtime/dispatch.h).

    A *device instruction* is one load or store of one place in the code, executed once by the lanes of a simdgroup
    together. Its *transactions* are the 128-byte lines that it touches.
    """

    device_bytes_loaded: int
    device_bytes_stored: int
    unique_bytes_loaded: int
    unique_bytes_stored: int
    load_transactions: int
    store_transactions: int
    load_instructions: int
    store_instructions: int
    threadgroup_bytes_loaded: int
    threadgroup_bytes_stored: int
    simd_operations: int
    matrix_operations: int
    matrix_multiplies: int
    simdgroup_barriers: int
    threadgroup_barriers: int
    atomic_operations: int
    threadgroups: int
    simdgroups: int
    threads: int

    def __add__(self, other: Counters) -> Counters:
        return Counters(*(getattr(self, n) + getattr(other, n) for n in self.__dataclass_fields__))

    @property
    def load_efficiency(self) -> float:
        """Share of the bytes of the loads' transactions that the kernel asked for."""
        return self.unique_bytes_loaded / max(1, TRANSACTION_BYTES * self.load_transactions)

    @property
    def store_efficiency(self) -> float:
        """Share of the bytes of the stores' transactions that the kernel wrote."""
        return self.unique_bytes_stored / max(1, TRANSACTION_BYTES * self.store_transactions)


@dataclass(frozen=True)
class Dispatch:
    """One checked dispatch: the kernel, its sizes in threads, its threadgroup memory in bytes, its counters."""

    kernel: str
    threads: tuple[int, int, int]
    group_size: tuple[int, int, int]
    threadgroup_bytes: int
    counters: Counters
