"""Replicas behind one address: what a second one gives, what affinity saves, and what Ray costs.

    python -m benchmarks.scale [--quick] [--contenders NAME …]

- `plain`: `vblora-serve serve`, one thread; `plain_all_cores`: the same with a thread for each of two cores;
- `ray_1`, `ray_2`: one and two replicas over Ray, one thread each;
- `ray_2_random`: two, between which chance decides, whatever the adapters.

One after the other, so that no idle Ray takes part in another's figures. Clients, ingress, Ray and replicas share the
machine's cores: beside the seconds of the clock stands processor time, of all of a contender's processes. Linux only.
Needs the extra `ray` but for the plain ones. Ends in one line of JSON.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.contenders.process import Contender
from benchmarks.floor import Floor, measure_floor
from benchmarks.load.processes import tree_cpu_s
from benchmarks.load.streams import Answers, Endpoint, Latencies, closed_loop, tokens_of
from benchmarks.loops import medians
from benchmarks.report import report_line
from benchmarks.sizes import QUICK_SCALE, ScaleSizes
from benchmarks.stage import Stage, add_adapters, open_stage, selections
from benchmarks.workload import make_requests, on_base
from service.engine.sequence import GenerationRequest
from tests.server import Server, parts

_CONTEXT_S = 60.0


@dataclass(frozen=True, slots=True)
class Kind:
    """`replicas` 0: no Ray."""

    replicas: int
    threads: int = 1
    route: str = "affinity"


KINDS = {
    "plain": Kind(0),
    "plain_all_cores": Kind(0, threads=2),
    "ray_1": Kind(1),
    "ray_2": Kind(2),
    "ray_2_random": Kind(2, route="random"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    sizes = QUICK_SCALE if options.quick else replace(ScaleSizes(), requests=options.requests)
    with open_stage(sizes.model, dtype="float32", device="cpu", threads=1) as stage:
        figures = measure(stage, sizes, options.contenders, 1 if options.quick else options.rounds)
    print(report_line("scale", sizes, figures, (), threads=1))


def measure(stage: Stage, sizes: ScaleSizes, names: Sequence[str], rounds: int) -> dict[str, Any]:
    one, both = measure_floor(stage, sizes.model), measure_floor(replace(stage, threads=2), sizes.model)
    bench = _Bench(stage, sizes, add_adapters(stage, sizes.adapter, sizes.adapters), rounds)
    contenders = {name: bench.measure(name) for name in KINDS if name in names}
    return {
        "machine_floor": {"1_thread": one.described(), "2_threads": both.described()},
        "floor": floors(one, both, bench.loop("floor"), sizes.clients),
        "contenders": contenders,
        **compared(contenders),
    }


class _Bench:
    """Runs every contender through the same requests. The first one's answers are what the others must give."""

    def __init__(self, stage: Stage, sizes: ScaleSizes, adapters: Mapping[str, Path], rounds: int) -> None:
        self._stage = stage
        self._sizes = sizes
        self._adapters = adapters
        self._rounds = rounds
        self._chosen = selections(stage, list(adapters))
        self._expected: dict[str, tuple[int, ...]] | None = None

    def loop(self, label: str) -> list[GenerationRequest]:
        return make_requests(self._sizes, self._chosen[: self._sizes.few], label)

    def measure(self, name: str) -> dict[str, Any]:
        with opened(self._stage, self._sizes, KINDS[name], name) as running:
            for adapter, directory in self._adapters.items():
                running.upload(adapter, directory)
            self._check(name, running.endpoint)
            loops = [self._loop(running, turn) for turn in range(self._rounds)]
            return {**medians(loops), "alone": self._alone(running), "mixed": self._mixed(running)}

    def _check(self, name: str, endpoint: Endpoint) -> None:
        """All give the same tokens, which are not the base's. It warms the contender, too."""
        requests = self.loop("check")[: self._sizes.clients]
        answered = tokens_of(closed_loop(endpoint.ask, requests, self._sizes.clients))
        base = tokens_of(closed_loop(endpoint.ask, on_base(requests), self._sizes.clients))
        if any(base[request] == tokens for request, tokens in answered.items()):
            raise RuntimeError("an adapter changes nothing; nothing was measured")
        self._expected = self._expected or answered
        if answered != self._expected:
            raise RuntimeError(f"{name} answers differently from those before it; nothing was measured")

    def _loop(self, running: Running, turn: int) -> dict[str, float]:
        requests = self.loop(f"turn-{turn}")
        before = running.cpu_s()
        answers = closed_loop(running.endpoint.ask, requests, self._sizes.clients)
        return {**_seen(answers), "cpu_s_per_request": (running.cpu_s() - before) / len(requests)}

    def _alone(self, running: Running) -> dict[str, float]:
        """Requests of one token on an idle server, one after the other."""
        sizes = replace(self._sizes, requests=self._sizes.lone_requests, output=(1, 1))
        requests = make_requests(sizes, self._chosen[: self._sizes.few], "alone")
        before = running.cpu_s()
        answers = closed_loop(running.endpoint.ask, requests, clients=1)
        latencies = Latencies.of(answers)
        return {
            "first_token_p50_ms": latencies.first_token_p50_ms,
            "first_token_p99_ms": latencies.first_token_p99_ms,
            "cpu_s_per_request": (running.cpu_s() - before) / len(requests),
        }

    def _mixed(self, running: Running) -> dict[str, Any]:
        """All adapters, more than fit a memory, in an order by chance; a half as many go before, to fill memories."""
        sizes = replace(self._sizes, prompt=self._sizes.mixed_prompt, output=self._sizes.mixed_output)
        for label, count in (("fill", sizes.mixed_requests // 2), ("mixed", sizes.mixed_requests)):
            chosen = random.Random(label).choices(self._chosen, k=count)
            before = running.counters()
            answers = closed_loop(
                running.endpoint.ask, make_requests(replace(sizes, requests=count), chosen, label), sizes.clients
            )
            after = running.counters()
        gained = {key: after[key] - before.get(key, 0.0) for key in after}
        return {
            **_seen(answers),
            "composes_per_request": gained["vblora_adapter_composes_total"] / sizes.mixed_requests,
            "hits_per_request": gained["vblora_adapter_hits_total"] / sizes.mixed_requests,
            "routed": {key: count for key, count in gained.items() if key.startswith("to ")},
        }


def _seen(answers: Answers) -> dict[str, float]:
    streams = answers.values()
    took = max(stream.times[-1] for stream in streams) - min(stream.asked for stream in streams)
    return {"requests_per_s": len(answers) / took, **asdict(Latencies.of(answers))}


@dataclass(frozen=True, slots=True)
class Running:
    """A contender that answers."""

    port: int
    pid: int

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(self.port)

    def cpu_s(self) -> float:
        return tree_cpu_s(self.pid)

    def upload(self, name: str, directory: Path) -> None:
        url = f"http://127.0.0.1:{self.port}/v1/adapters"
        httpx.post(url, data={"name": name}, files=parts(directory), timeout=_CONTEXT_S).raise_for_status()

    def counters(self) -> dict[str, float]:
        """By name, of all replicas together; those of the router by where requests went."""
        text = httpx.get(f"http://127.0.0.1:{self.port}/metrics", timeout=_CONTEXT_S).raise_for_status().text
        return sums_of(text)


def sums_of(metrics: str) -> dict[str, float]:
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            name = f"to {sample.labels['to']}" if sample.name == "vblora_routed_total" else sample.name
            sums[name] = sums.get(name, 0.0) + sample.value
    return sums


@contextmanager
def opened(stage: Stage, sizes: ScaleSizes, kind: Kind, name: str) -> Iterator[Running]:
    arguments = [
        *("--model", str(stage.base_directory)),
        *("--dtype", "float32"),
        *("--threads", f"{kind.threads}"),
        *("--max-batch-size", f"{sizes.clients}"),
        *("--adapter-memory", f"{sizes.resident * _factor_bytes(stage)}"),
    ]
    data = stage.root / name
    if kind.replicas == 0:
        with Server("serve", *arguments, data_dir=data) as server:
            yield Running(server.port, server.process.pid)
        return
    arguments += ["--replicas", f"{kind.replicas}", "--route", kind.route, "--data-dir", str(data)]
    with Contender("replicas_app", *arguments) as app:
        app.wait()
        yield Running(app.port, app.process.pid)


def _factor_bytes(stage: Stage) -> int:
    """Of one adapter, all of which have one shape."""
    registry = stage.registry()
    (selection, *_) = selections(stage, ["adapter-0"])
    (adapter,) = selection.adapters
    registry.pin(adapter.digest)
    return registry.resident_bytes()[1]


def floors(one: Floor, both: Floor, requests: Sequence[GenerationRequest], clients: int) -> dict[str, Any]:
    """What nobody gets beyond: one process with one thread; two, each with half of the clients, whatever they share."""
    tokens = sum(request.params.max_new_tokens for request in requests) / len(requests)
    alone, half = one.of(requests, clients), one.of(requests, max(1, clients // 2))
    together = both.of(requests, clients)
    return {
        "1_process_requests_per_s": alone["tokens_per_s"] / tokens,
        "2_processes_requests_per_s": 2 * half["tokens_per_s"] / tokens,
        "2_threads_requests_per_s": together["tokens_per_s"] / tokens,
        "first_token_ms": alone["first_token_ms"],
    }


def compared(contenders: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The ratios that the contenders are there for, of those that were run."""
    pairs = {
        "ray_over_plain": ("ray_1", "plain"),
        "two_over_one": ("ray_2", "ray_1"),
        "two_replicas_over_two_threads": ("ray_2", "plain_all_cores"),
        "affinity_over_random": ("ray_2", "ray_2_random"),
    }
    return {
        name: _ratios(contenders[our], contenders[their])
        for name, (our, their) in pairs.items()
        if our in contenders and their in contenders
    }


def _ratios(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, float]:
    composes, others = (of["mixed"]["composes_per_request"] for of in (ours, theirs))
    return {
        "requests_per_s": ours["requests_per_s"] / theirs["requests_per_s"],
        "first_token_p50": ours["first_token_p50_ms"] / theirs["first_token_p50_ms"],
        "cpu_per_request": ours["cpu_s_per_request"] / theirs["cpu_s_per_request"],
        "alone_ms_more": ours["alone"]["first_token_p50_ms"] - theirs["alone"]["first_token_p50_ms"],
        "alone_cpu_ms_more": 1000 * (ours["alone"]["cpu_s_per_request"] - theirs["alone"]["cpu_s_per_request"]),
        "mixed_requests_per_s": ours["mixed"]["requests_per_s"] / theirs["mixed"]["requests_per_s"],
        "mixed_composes_fewer": others - composes,
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description="Measure replicas over Ray.")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round: shows that it runs, nothing more")
    parser.add_argument("--rounds", type=int, default=2, help="repetitions of the loop that medians are taken of (2)")
    parser.add_argument("--requests", type=int, default=24, help="of a loop's round (24)")
    parser.add_argument("--contenders", nargs="+", choices=KINDS, default=tuple(KINDS), help="which to run (all)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
