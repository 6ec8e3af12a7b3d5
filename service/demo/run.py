"""`vblora-serve demo`: serves the model and the adapters that come with the package, and shows what they do."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import threading
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from service.assembly import Server, build_server
from service.commands import CommandError
from service.commands.serve import end_on_sigterm, listening, url_of
from service.commands.serve import serve as serve_until_stopped
from service.demo.styles import PROMPTS
from service.demo.tour import Tour
from service.engine.seam import EngineState
from service.logs import setup_logging
from service.settings import Settings, default_data_dir

log = logging.getLogger(__name__)

ASSETS = Path(__file__).parent / "assets"
BASE_ID = "vblora-demo-base"
_TIMEOUT_S = 60
_SHOWN_PROMPTS = 1


@dataclass(slots=True)
class _Outcome:
    """How the tour ended; written by its thread, read when the server has stopped."""

    faults: list[str] = field(default_factory=list)
    error: Exception | None = None


def main(settings: Settings, *, check: bool, serve: bool) -> int:
    """Serves the demo until Ctrl-C; without `serve` or with `check`, until it has shown what it has to show.

    With `check` the exit status is 1 unless every adapter writes in its own style. Adapters live in a temporary
    directory unless a data directory is given.
    """
    card = _read_card()
    level = "warning" if settings.log_level == "info" else settings.log_level
    setup_logging(format=settings.log_format, level=level, prompts=settings.log_prompts)
    end_on_sigterm()
    outcome = _Outcome()
    with ExitStack() as opened:
        settings = replace(settings, model=str(ASSETS / "base"), served_model_name=BASE_ID)
        if settings.data_dir == default_data_dir():
            temporary = opened.enter_context(tempfile.TemporaryDirectory(prefix="vblora-demo-"))
            settings = replace(settings, data_dir=Path(temporary))
        listener = opened.enter_context(listening(settings.host, settings.port))
        server = build_server(settings)
        opened.callback(server.close)

        def announce() -> None:
            arguments = (server, url_of(listener), card, outcome, serve and not check)
            threading.Thread(target=_guide, args=arguments, name="vblora-tour", daemon=True).start()

        serve_until_stopped(server, listener, drain_timeout_s=settings.drain_timeout_s, announce=announce)
    return _verdict(outcome, check=check)


def _read_card() -> dict[str, Any]:
    try:
        card: dict[str, Any] = json.loads((ASSETS / "card.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise CommandError(f"the demo's files are missing ({error}); install the package again") from error
    return card


def _guide(server: Server, url: str, card: dict[str, Any], outcome: _Outcome, stay: bool) -> None:
    """On a thread of its own, beside the server: shows everything, then ends the server unless it is to stay."""
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 120)
    try:
        # A container may have no /etc/hosts to look localhost up in.
        address = url.replace("//localhost", "//127.0.0.1")
        with httpx.Client(base_url=address, timeout=_TIMEOUT_S, trust_env=False) as client:
            tour = Tour(client, ASSETS / "adapters", card["blend"]["adapters"], console)
            console.print(f"serving {BASE_ID} ({card['base']['parameters']:,} parameters) at {url}")
            tour.upload()
            tour.show_counts()
            for prompt in PROMPTS[:_SHOWN_PROMPTS]:
                outcome.faults += tour.faults(tour.show_answers(prompt))
            if stay:
                tour.show_commands(url)
    except Exception as error:
        if server.engine.state is not EngineState.READY:
            return  # it was stopped before the tour was over
        outcome.error = error
        stay = False
    if not stay:
        os.kill(os.getpid(), signal.SIGTERM)


def _verdict(outcome: _Outcome, *, check: bool) -> int:
    if outcome.error is not None:
        raise CommandError(f"the demo failed: {outcome.error}") from outcome.error
    if check and outcome.faults:
        raise CommandError("the adapters do not write as they should: " + "; ".join(outcome.faults))
    return 0
