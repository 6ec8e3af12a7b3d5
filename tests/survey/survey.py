"""One architecture: loaded and tested, two adapters registered, a mixed batch run, every token held against PEFT."""

from __future__ import annotations

import queue
import random
import shutil
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from adapters.errors import AdapterError
from adapters.registry import AdapterRegistry
from adapters.store import AdapterStore
from adapters.targets import adaptable_shape
from service.engine.base_model import BaseModelError, load_base, load_pretrained
from service.engine.build import EngineOptions, build_engine
from service.engine.engine import BatchEngine
from service.engine.events import Event, FailedEvent, FinishedEvent, TokenEvent
from service.engine.selection import SelectedAdapter, Selection
from service.engine.sequence import GenerationRequest, SamplingParams
from tests.factories import AdapterSpec, make_adapter, peft_greedy, peft_logits, randomize, save_model, untouched_rng
from tests.survey.configs import tiny_config

CPU = torch.device("cpu")
TOKENS = 6
CONTEXT = 64
TILE = 8
STRENGTHS = (0.2, 0.1, 0.05)  # of the weights: as strong as the architecture stands
# PEFT refuses them on these models, whose kernels read the weights past the adapter.
NOT_BY_PEFT = {"mamba": ("out_proj",), "falcon_mamba": ("out_proj",), "mamba2": ("out_proj",)}
WHO: tuple[str | None, ...] = (None, "one", "two", "one", "two", None, "one", "two")


@dataclass(frozen=True, slots=True)
class Finding:
    """What came of an architecture. `outcome`: works, refused, or wrong; `kv` the backend; `detail` the reason."""

    architecture: str
    outcome: str
    kv: str = ""
    layers: int = 0
    detail: str = ""


class Unfit(Exception):
    """The tiny model itself is of no use for the survey."""


def survey(architecture: str) -> Finding:
    """Never raises: what goes wrong otherwise than by a refusal is an outcome, `wrong`."""
    with tempfile.TemporaryDirectory(prefix="survey-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _surveyed(architecture, Path(folder))
        except (BaseModelError, AdapterError) as error:
            return Finding(architecture, "refused", detail=_line(error, folder))
        except Exception as error:
            return Finding(architecture, "wrong", detail=_line(error, folder) + _place(error))


def _line(error: Exception, folder: str) -> str:
    text = str(error) if isinstance(error, (BaseModelError, AdapterError)) else f"{type(error).__name__}: {error}"
    return " ".join(text.replace(folder, "…").split())[:300]


def _place(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f" ({Path(last.filename).name}:{last.lineno})"


def _surveyed(architecture: str, folder: Path) -> Finding:
    model = tiny_base(architecture)
    save_model(model, folder / "base")
    targets = targets_of(model)
    if not targets:
        return Finding(architecture, "refused", detail="it has no linear layers to adapt")
    one = AdapterSpec(seed=1, r=4, vector_length=TILE, target_modules=targets)
    two = AdapterSpec(seed=2, r=2, vector_length=TILE, target_modules=targets[::2])
    adapters = {name: make_adapter(model, spec, folder / name) for name, spec in (("one", one), ("two", two))}
    with engine_of(folder, adapters) as (engine, known, context):
        kv = str(engine.kv_backend)
        asked = [(name, prompt[: context - TOKENS]) for name, prompt in zip(WHO, prompts(), strict=True)]
        answered = answers(engine, known, asked)
    expected = {name: expected_of(folder, adapters.get(name or "")) for name in set(WHO)}
    check_adapters_matter(expected)
    wrong = [
        f"{name or 'base'}, prompt of {len(prompt)}: {tokens} instead of {rightly}"
        for (name, prompt), tokens in zip(asked, answered, strict=True)
        if tokens != (rightly := peft_greedy(expected[name], prompt, TOKENS))
    ]
    if wrong:
        return Finding(architecture, "wrong", kv, len(targets), "; ".join(wrong)[:600])
    return Finding(architecture, "works", kv, len(targets))


def tiny_base(architecture: str) -> PreTrainedModel:
    """A random model whose token logits are finite. Raises Unfit."""
    for strength in STRENGTHS:
        with untouched_rng():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(tiny_config(architecture), dtype=torch.float32).eval()
        randomize(model, 0, strength)
        if peft_logits(model, prompts()[0]).isfinite().all():
            return model
    raise Unfit("random weights of every strength give NaN")


def targets_of(model: PreTrainedModel) -> list[str]:
    """Every linear layer by its whole name: but the output layer, what tiles do not divide, and PEFT's exceptions."""
    excepted = NOT_BY_PEFT.get(model.config.model_type, ())
    names = []
    for name, module in model.named_modules():
        shape = adaptable_shape(module)
        if shape is None or module is model.get_output_embeddings() or name.rpartition(".")[2] in excepted:
            continue
        if not any(features % TILE for features in shape):
            names.append(name)
    return names


@contextmanager
def engine_of(folder: Path, adapters: dict[str, Path]) -> Iterator[tuple[BatchEngine, dict[str, SelectedAdapter], int]]:
    """A running engine over the base on disk, as a server makes it, the adapters as it knows them, and its context."""
    with ExitStack() as opened:
        base = load_base(str(folder / "base"), device="cpu")
        store = AdapterStore(folder / "data")
        opened.callback(store.close)
        registry = AdapterRegistry(store, base.adapted, base.identity, factor_budget=1 << 24, device=CPU)
        known = {}
        for name, path in adapters.items():
            with store.staging() as staged:
                shutil.copytree(path, staged, dirs_exist_ok=True)
                known[name] = SelectedAdapter(name, registry.register("", name, staged).digest)
        context = min(base.context, CONTEXT)
        options = EngineOptions(max_batch_size=5, max_context=context, prefill_tokens=16, kv_memory=1 << 26)
        engine = build_engine(base, registry, options).start()
        opened.callback(engine.stop)
        yield engine, known, context


def prompts() -> list[list[int]]:
    """Of many lengths; the last ones begin as earlier ones with the same adapter do."""
    pick = random.Random(0)
    made = [pick.choices(range(256), k=length) for length in (7, 24, 3, 33, 12)]
    return [*made, [*made[0], 65], [*made[1], 66, 67], [*made[2], 68]]


def answers(
    engine: BatchEngine, known: dict[str, SelectedAdapter], asked: Sequence[tuple[str | None, list[int]]]
) -> list[list[int]]:
    """The greedy tokens of every adapter's prompt, run together. Raises RuntimeError if a request fails."""
    params = SamplingParams(max_new_tokens=TOKENS, temperature=0.0, ignore_eos=True)
    events: queue.Queue[Event] = queue.Queue()
    tokens: list[list[int]] = [[] for _ in asked]
    for number, (name, prompt) in enumerate(asked):
        selection = Selection(() if name is None else (known[name],))
        engine.submit([GenerationRequest(f"{number}", tuple(prompt), params, selection)], events.put)
    for _ in asked:
        while not isinstance(event := events.get(timeout=120), FinishedEvent):
            if isinstance(event, FailedEvent):
                raise RuntimeError(f"a request failed: {event.message}")
            if isinstance(event, TokenEvent):
                tokens[int(event.request_id)] += event.token_ids
    return tokens


def expected_of(folder: Path, adapter: Path | None) -> Any:
    """The base as transformers loads it, with the adapter as PEFT loads it."""
    base = load_pretrained(str(folder / "base"), dtype="float32", device=CPU).model
    return base if adapter is None else PeftModel.from_pretrained(base, str(adapter)).eval()


def check_adapters_matter(expected: dict[str | None, Any]) -> None:
    """Else an adapter that is lost would not show. Raises Unfit."""
    base, one, two = (peft_logits(expected[name], prompts()[0]) for name in (None, "one", "two"))
    least = min(float((this - that).abs().max()) for this, that in ((base, one), (base, two), (one, two)))
    if least < 0.01 * float(base.abs().max()):
        raise Unfit("the adapters change next to nothing")
