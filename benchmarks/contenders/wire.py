"""The HTTP side that all contenders share: this project's native route, as far as the benchmark asks of it."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel


class Asked(BaseModel):
    """Greedy generation of exactly so many tokens; other fields of the request are those of every request."""

    prompt: list[int]
    adapter: str
    max_new_tokens: int


@dataclass(eq=False)
class Job:
    """One request on its way: `put` hands over a token from any thread, the stream takes it."""

    asked: Asked
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    tokens: asyncio.Queue[int | None] = field(default_factory=asyncio.Queue)

    def put(self, token: int | None) -> None:
        """None says that no more can come."""
        self.loop.call_soon_threadsafe(self.tokens.put_nowait, token)

    async def events(self) -> AsyncIterator[str]:
        for _ in range(self.asked.max_new_tokens):
            token = await self.tokens.get()
            if token is None:
                yield 'event: error\ndata: {"error": "the model failed"}\n\n'
                return
            yield f"data: {json.dumps({'choices': [{'index': 0, 'token_ids': [token]}]})}\n\n"
        yield "data: [DONE]\n\n"


def serve(submit: Callable[[Job], None], port: int) -> None:
    app = FastAPI()

    @app.get("/healthz")
    async def healthz() -> None:
        """Answers once the model is loaded: nothing listens before."""

    @app.post("/v1/generate")
    async def generate(asked: Asked) -> StreamingResponse:
        job = Job(asked)
        submit(job)
        return StreamingResponse(job.events(), media_type="text/event-stream")

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


def parser_of(app: str) -> argparse.ArgumentParser:
    """The flags that every app has."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.contenders.{app}")
    parser.add_argument("--base", type=Path, required=True, help="the base model's directory")
    parser.add_argument("--adapter", action="append", required=True, metavar="NAME=DIR", help="may be repeated")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=2, help="the threads that the model computes with (2)")
    return parser


def named(given: list[str]) -> dict[str, str]:
    """Adapters' directories by name."""
    return dict(adapter.split("=", 1) for adapter in given)
