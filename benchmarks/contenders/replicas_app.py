"""The server as replicas over Ray, also as a single one, with its own router or one that knows nothing of adapters."""

from __future__ import annotations

import argparse
import secrets
from collections.abc import Sequence
from contextlib import nullcontext
from unittest.mock import patch

from service.cli import make_parser
from service.cli.settings_flags import settings_of
from service.cluster import ingress
from service.cluster.local import Replicated
from service.commands.serve import listening, serve_app
from service.logs import setup_logging

ROUTES = ("affinity", "random")


def main(arguments: Sequence[str] | None = None) -> None:
    """What `vblora-serve serve` takes, and `--route`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.contenders.replicas_app")
    parser.add_argument("--route", choices=ROUTES, default="affinity")
    options, rest = parser.parse_known_args(arguments)
    settings = settings_of(make_parser().parse_args(["serve", *rest]))
    setup_logging(format=settings.log_format, level=settings.log_level, prompts=False)
    by_chance = patch.object(ingress, "affinity_of", _a_new_key) if options.route == "random" else nullcontext()
    with by_chance, listening(settings.host, settings.port) as listener, Replicated(settings) as replicated:
        serve_app(
            replicated.ingress,
            replicated.ingress.work,
            listener,
            drain_timeout_s=settings.drain_timeout_s,
            request_timeout_s=settings.request_timeout_s,
            announce=lambda: None,
        )


def _a_new_key(*request: object) -> str:
    """Every request at home on any replica: chance, on the very path that affinity takes."""
    return secrets.token_hex(16)


if __name__ == "__main__":
    main()
