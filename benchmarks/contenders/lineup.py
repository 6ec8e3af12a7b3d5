"""All contenders at once, each in a process of its own, over the same weights. Idle ones wait without computing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.contenders.process import Contender
from benchmarks.load.streams import Answers, Endpoint, closed_loop, tokens_of
from benchmarks.sizes import ServingSizes
from benchmarks.stage import Stage
from benchmarks.workload import on_base
from service.engine.sequence import GenerationRequest
from tests.server import Server

SERVER = "server"
PEFT_SWITCHING = "peft_switching"
PEFT_GROUPED = "peft_grouped"
CONTINUOUS = "transformers_continuous"

Endpoints = dict[str, Endpoint]


@contextmanager
def open_lineup(
    stage: Stage, sizes: ServingSizes, adapters: Mapping[str, Path], names: Sequence[str]
) -> Iterator[Endpoints]:
    """The server, and those of the others that are named."""
    common = ("--base", str(stage.base_directory), "--threads", f"{stage.threads}")
    given = [f"--adapter={name}={directory}" for name, directory in adapters.items()]
    apps = {
        PEFT_SWITCHING: Contender("peft_app", *common, *given),
        PEFT_GROUPED: Contender("peft_app", *common, *given, "--batch", f"{sizes.peft_batch}"),
        CONTINUOUS: Contender("continuous_app", *common, given[0]),
    }
    with ExitStack() as stack:
        started = {name: stack.enter_context(apps[name]) for name in names if name != SERVER}
        server = stack.enter_context(open_server(stage, sizes, adapters))
        for app in started.values():
            app.wait()
        yield {SERVER: Endpoint(server.port), **{name: Endpoint(app.port) for name, app in started.items()}}


def open_server(stage: Stage, sizes: ServingSizes, adapters: Mapping[str, Path]) -> Server:
    return Server(
        "serve",
        *("--model", str(stage.base_directory)),
        *("--dtype", str(stage.base.dtype).removeprefix("torch.")),
        *("--threads", f"{stage.threads}"),
        *("--max-batch-size", f"{sizes.clients}"),
        data_dir=stage.root / "server-data",
        environ={"VBLORA_ADAPTER": ",".join(f"{name}={directory}" for name, directory in adapters.items())},
    )


def check_answers(endpoints: Endpoints, requests: Sequence[GenerationRequest], clients: int, *, alike: bool) -> None:
    """Speed counts only for the right tokens: all `alike`, and not the base model's. Warms everyone up, too.

    16-bit models round differently from batch to batch, so that theirs are only reported.
    """
    answers = {name: answered(endpoint, requests, clients) for name, endpoint in endpoints.items()}
    ours = tokens_of(answers[SERVER])
    for name, theirs in answers.items():
        if alike and tokens_of(theirs) != ours:
            raise RuntimeError(f"the server and {name} answer differently; nothing was measured")
    base = tokens_of(answered(endpoints[SERVER], on_base(requests), clients))
    if any(base[name] == tokens for name, tokens in ours.items()):
        raise RuntimeError("an adapter changes nothing; nothing was measured")


def answered(endpoint: Endpoint, requests: Sequence[GenerationRequest], clients: int) -> Answers:
    return closed_loop(endpoint.ask, requests, clients)


def agreed(answers: Mapping[str, Answers]) -> float:
    """The share of requests to which all contenders gave the same tokens."""
    one, *others = (tokens_of(of_one) for of_one in answers.values())
    return sum(all(other[name] == tokens for other in others) for name, tokens in one.items()) / len(one)
