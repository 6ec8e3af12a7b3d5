"""The command line of `vblora-serve bench`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from service.cli.command import Command, check_url
from service.settings import API_KEY_VARIABLE, load_api_key

_CONCURRENCY = 8


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", metavar="URL", help="the server, for example http://127.0.0.1:8000")
    parser.add_argument("--api", choices=["native", "openai"], default="native", help="openai: /v1/completions")
    parser.add_argument("--api-key-file", type=Path, metavar="PATH", help="a file whose first line is the API key")
    _add_load(parser.add_argument_group("load"))
    _add_requests(parser.add_argument_group("requests"))
    parser.add_argument("--json", metavar="FILE", help="add a line of JSON to FILE; -: print it instead of the tables")


def _add_load(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME",
        help="whom to ask for: an adapter, base, or with --api openai a model (repeatable; default: all served)",
    )
    group.add_argument(
        "--popularity",
        choices=["round-robin", "zipf"],
        default="round-robin",
        help="zipf: the k-th adapter is asked for with a weight of 1/k (default: round-robin)",
    )
    group.add_argument("--requests", type=_whole(1), default=100, metavar="N", help="measured (default: 100)")
    group.add_argument(
        "--warmup", type=_whole(0), default=0, metavar="N", help="asked first, not measured (default: 0)"
    )
    loop = group.add_mutually_exclusive_group()
    loop.add_argument(
        "--concurrency",
        type=_whole(1),
        default=_CONCURRENCY,
        metavar="N",
        help=f"clients, each of which waits for its answer before it asks again (default: {_CONCURRENCY})",
    )
    loop.add_argument("--rate", type=_above_zero, metavar="X", help="requests a second, arriving by chance (Poisson)")
    group.add_argument("--seed", type=_whole(0), default=0, metavar="N", help="of prompts, arrivals, zipf (default: 0)")


def _add_requests(group: argparse._ArgumentGroup) -> None:
    prompts = group.add_mutually_exclusive_group()
    prompts.add_argument("--prompt-tokens", type=_whole(1), default=128, metavar="N", help="of a prompt (default: 128)")
    prompts.add_argument(
        "--prompt-file", type=Path, metavar="FILE", help="prompts: lines of text, or in a .jsonl of JSON with a prompt"
    )
    group.add_argument("--max-new-tokens", type=_whole(1), default=64, metavar="N", help="of an answer (default: 64)")
    group.add_argument(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether answers go on to --max-new-tokens, which not every server knows (default: true)",
    )
    group.add_argument("--timeout", type=_above_zero, default=300.0, metavar="SECONDS", help="of one (default: 300)")
    group.add_argument("--retry", action="store_true", help="ask again after a 429, when the server says")


def _whole(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        value = int(text) if text.isdecimal() else -1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return value

    return read


def _above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _run(args: argparse.Namespace) -> int:
    check_url("the URL", args.url)
    from service.commands import bench
    from service.commands.bench_answers import Dialect
    from service.commands.bench_client import Manner
    from service.commands.bench_plan import Popularity

    load = bench.Load(
        adapters=tuple(args.adapter),
        popularity=Popularity(args.popularity),
        requests=args.requests,
        concurrency=args.concurrency,
        rate=args.rate,
        prompt_tokens=args.prompt_tokens,
        prompt_file=args.prompt_file,
        max_new_tokens=args.max_new_tokens,
        warmup=args.warmup,
        seed=args.seed,
    )
    manner = Manner(Dialect(args.api), args.timeout, args.retry, args.ignore_eos)
    return bench.run(bench.BenchOptions(args.url, load_api_key(args.api_key_file), manner, load, args.json))


COMMAND = Command(
    "bench",
    "measure a running server",
    _arguments,
    _run,
    examples=(
        "bench http://127.0.0.1:8000",
        "bench http://127.0.0.1:8000 --adapter sql --adapter base --requests 200 --concurrency 16",
        "bench http://127.0.0.1:8000 --rate 5 --popularity zipf --json figures.jsonl",
        "bench http://127.0.0.1:9000 --api openai --adapter org/model",
    ),
    description=(
        "Measure a running server: this one, or with --api openai any that answers /v1/completions. Requests are "
        "greedy and streamed. Exit code 1 if any was not answered to its end; Ctrl-C reports what was measured so far. "
        f"The API key, if the server asks for one, comes from {API_KEY_VARIABLE} or --api-key-file."
    ),
)
