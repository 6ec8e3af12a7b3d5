"""What arrives at a fleet: when, for which adapter, and how long it takes. A seed gives the same each time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Traffic:
    """Requests in the order of their arrival: seconds, adapters by their number, seconds of generation."""

    at: list[float]
    adapter: list[int]
    takes: list[float]

    def __len__(self) -> int:
        return len(self.at)


Shares = np.ndarray[tuple[int], np.dtype[np.float64]]


def zipf_shares(adapters: int, exponent: float) -> Shares:
    """What share of the requests each adapter has, the most used first; exponent 0: all the same."""
    weights: Shares = np.arange(1, adapters + 1, dtype=np.float64) ** -exponent
    weights /= weights.sum()
    return weights


def make_traffic(requests: int, adapters: int, exponent: float, per_second: float, mean_s: float, seed: int) -> Traffic:
    """Arrivals by chance (Poisson), adapters by Zipf's law, exponential times of generation."""
    draw = np.random.default_rng(seed)
    at = np.cumsum(draw.exponential(1 / per_second, requests))
    adapter = draw.choice(adapters, requests, p=zipf_shares(adapters, exponent))
    takes = draw.exponential(mean_s, requests)
    return Traffic(at.tolist(), adapter.tolist(), takes.tolist())
