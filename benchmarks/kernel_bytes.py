"""What a decode step's low-rank part must read, by either pair of kernels: the floors in docs/performance.md.

python -m benchmarks.kernel_bytes
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from adapters.kernels.tables import GroupShape, index_dtype
from benchmarks.sizes import AdapterShape

BANDWIDTHS = {"H100": 3.35e12, "H200": 4.8e12}  # bytes/s, as their maker states them

_VALUE = 2  # bytes of a base weight, an activation, a factor's or a bank's element: 16 bits each
_WEIGHT = 4  # of a top-k weight

LLAMA_7B_LAYERS = 32
LLAMA_7B: Mapping[str, GroupShape] = {
    "qkv": GroupShape(4096, (4096, 4096, 4096)),
    "o": GroupShape(4096, (4096,)),
    "gate_up": GroupShape(4096, (11008, 11008)),
    "down": GroupShape(11008, (4096,)),
}
ADAPTED: Mapping[str, Sequence[GroupShape]] = {
    "q and v": (GroupShape(4096, (4096, 4096)),),
    "all linear": tuple(LLAMA_7B.values()),
}


@dataclass(frozen=True, slots=True)
class StepBytes:
    """Bytes of one step. From memory: `gathered` by the one pair; `selections` and some of the banks by the other.

    `banks_once`: read at the step's first need and in the cache ever after. `banks_each_launch`: what a launch needs of
    them, had the base's weights driven them out since the last. `mixed`: what the bank-direct pair takes out of the
    caches, topk times the factors.
    """

    base: int
    gathered: int
    selections: int
    banks_once: int
    banks_each_launch: int
    mixed: int

    @classmethod
    def of(
        cls,
        groups: Sequence[GroupShape],
        adapter: AdapterShape,
        *,
        rows: int,
        adapters: int,
        banks: int | None = None,
        layers: int = LLAMA_7B_LAYERS,
    ) -> StepBytes:
        """Each of `adapters` in some row; `banks` different ones, by default one each."""
        banks = adapters if banks is None else banks
        index = index_dtype(adapter.num_vectors).itemsize
        factors = selections = each_launch = 0
        for group in groups:
            a = adapter.r * group.projections * group.in_features
            b = adapter.r * group.total_out
            factors += a + b
            selections += (a + b) // adapter.vector_length * adapter.topk * (index + _WEIGHT)
            each_launch += sum(
                _distinct(side // adapter.vector_length * adapter.topk * adapters // banks, adapter.num_vectors)
                for side in (a, b)
            )
        vector = adapter.vector_length * _VALUE
        return cls(
            base=layers * sum(group.in_features * group.total_out for group in LLAMA_7B.values()) * _VALUE,
            gathered=layers * adapters * factors * _VALUE,
            selections=layers * adapters * selections,
            banks_once=banks * adapter.num_vectors * vector,
            banks_each_launch=layers * banks * each_launch * vector,
            mixed=layers * rows * factors * adapter.topk * _VALUE,
        )


def _distinct(draws: int, among: int) -> int:
    """How many different vectors so many selections name, on average, if they name all equally often."""
    return round(among * (1 - (1 - 1 / among) ** draws))


def main() -> None:
    for num_vectors in (60, 256):
        for name, groups in ADAPTED.items():
            for banks in (64, 1):
                adapter = AdapterShape(num_vectors=num_vectors)
                step = StepBytes.of(groups, adapter, rows=64, adapters=64, banks=banks)
                near, far = step.selections + step.banks_once, step.selections + step.banks_each_launch
                print(f"{name}, {num_vectors} vectors, {banks} banks:")
                for label, size in (
                    ("base", step.base),
                    ("gathered", step.gathered),
                    ("bank-direct, banks stay", near),
                    ("bank-direct, banks go", far),
                    ("mixed, from caches", step.mixed),
                ):
                    times = ", ".join(f"{1e6 * size / speed:.0f} µs on {gpu}" for gpu, speed in BANDWIDTHS.items())
                    print(f"  {label:24} {size / 1e6:10.1f} MB  {times}")


if __name__ == "__main__":
    main()
