"""Finds out at load which key-value backend is right for this model.

Some architectures cannot take explicit masks, some cannot take padding; they answer plausibly and wrongly. So rows of
different lengths are run as the engine runs them and compared with plain forwards over each text alone.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from adapters.layers import AdaptedModel
from adapters.quantized import holds_quantized
from service.engine.base_model import BaseModelError
from service.engine.kv.backend import KVBackend
from service.engine.kv.rows import RowsBackend
from service.engine.kv.slots import SlotBackend
from service.engine.model_runner import TransformersRunner
from service.engine.quantization import dtype_of, mixes_rows, rounds_to

log = logging.getLogger(__name__)

# Rows may differ from the plain forward by this much, relative to the largest token logit.
_TOLERANCE = 1e-3
_OF_QUANTIZED = 0.1  # alone: with activations that are rounded too, parts of a text round otherwise than the whole
_LENGTHS = (5, 12, 3)
_CHUNK = 4


def choose_runner(
    adapted: AdaptedModel, device: torch.device, vocabulary: int, budget: int, context: int
) -> tuple[TransformersRunner, bool]:
    """The fastest runner that is right for this model, and whether rows may be batched and prompts run in parts.

    `context` is the most tokens that a row may come to. Raises BaseModelError for a model that answers differently
    even alone once its keys and values are cached.
    """
    dtype = dtype_of(adapted.model)
    layers = _text_config(adapted).num_hidden_layers
    backends: list[Callable[[], KVBackend]] = [
        lambda: SlotBackend(layers, dtype, device, budget),
        lambda: RowsBackend(device, budget),
    ]
    if _slides(adapted, context):
        backends.pop(0)  # its masks differ from layer to layer, beyond the lengths that are tested here
    texts = _texts(vocabulary)
    with adapted.finding_siblings():
        first = _plain(adapted, device, texts[0])
    expected = [first, *(_plain(adapted, device, text) for text in texts[1:])]
    tolerance = _tolerance(adapted, expected)
    for make in [] if mixes_rows(adapted.model) else backends:
        runner = TransformersRunner(adapted, device, make())
        if _agrees(runner, texts, expected, tolerance, _as_the_engine_runs_it):
            return runner, True
    name = type(adapted.model).__name__
    runner = TransformersRunner(adapted, device, RowsBackend(device, budget))
    if any(holds_quantized(module) for module in adapted.model.modules()):
        tolerance = _OF_QUANTIZED * _largest(expected)
    if not _agrees(runner, texts, expected, tolerance, _one_at_a_time):
        raise BaseModelError(f"{name} cannot be served: {_why_not(adapted)}")
    log.warning("%s answers differently in batches: running one row at a time", name)
    return runner, False


def replay_agrees(runner: TransformersRunner, adapted: AdaptedModel, device: torch.device, vocabulary: int) -> bool:
    """Whether decode steps that are replayed from graphs answer what the model does. Without rows, and leaves none."""
    assert runner.graphs is not None
    assert isinstance(runner.kv, SlotBackend)
    texts = _texts(vocabulary)[: runner.kv.slots]  # more would move the slots, and graphs with them
    expected = [_plain(adapted, device, text) for text in texts]
    before = runner.graphs.replayed
    agrees = _agrees(runner, texts, expected, _tolerance(adapted, expected), _by_row_then_together)
    return agrees and runner.graphs.replayed == before + 1


def _why_not(adapted: AdaptedModel) -> str:
    """Why a model fails even alone."""
    if "past_key_values" not in inspect.signature(adapted.model.forward).parameters:
        return "it takes no cache of keys and values (past_key_values)"
    kinds = {*(getattr(_text_config(adapted), "layer_types", None) or ())}
    if others := sorted(kind for kind in kinds if not kind.endswith("attention") or "linear" in kind):
        return f"besides attention over keys and values it has layers of other kinds ({', '.join(others)}), with states"
    return (
        "token by token, with its keys and values cached, it answers differently than over a whole text; it may keep "
        "other states between tokens"
    )


def _text_config(adapted: AdaptedModel) -> Any:
    config: Any = adapted.model.config
    return config.get_text_config()


def _tolerance(adapted: AdaptedModel, expected: Sequence[Tensor]) -> float:
    eps = torch.finfo(rounds_to(adapted.model)).eps
    return max(_TOLERANCE, 16 * eps) * _largest(expected)


def _largest(expected: Sequence[Tensor]) -> float:
    return max(float(each.abs().max()) for each in expected)


def _slides(adapted: AdaptedModel, context: int) -> bool:
    """Whether some layer attends to a part of a text only: a window that no text outgrows is none."""
    config = _text_config(adapted)
    kinds = set(getattr(config, "layer_types", None) or [])
    if kinds - {"full_attention", "sliding_attention"}:
        return True
    windows = _windows(config)
    if kinds == {"full_attention"} or (not kinds and not windows):
        return False
    return not windows or min(windows) < context


def _windows(config: Any) -> list[int]:
    """Every length that a config calls a window: `sliding_window` mostly, `window_size` in GPT-Neo's."""
    windows: list[int] = []
    for name, value in config.to_dict().items():
        if name.endswith(("window", "windows", "window_size")) and not name.startswith(("use_", "num_", "n_")):
            windows += [each for each in (value if isinstance(value, list) else [value]) if type(each) is int]
    return windows


def _texts(vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in _LENGTHS]


@torch.inference_mode()
def _plain(adapted: AdaptedModel, device: torch.device, text: Sequence[int]) -> Tensor:
    """Token logits [2, vocabulary] at the last two tokens, without any cache."""
    output = adapted.model(input_ids=torch.tensor([text], device=device), use_cache=False)
    token_logits: Tensor = output.logits[0, -2:].float().cpu()
    return token_logits


def _agrees(
    runner: TransformersRunner,
    texts: list[list[int]],
    expected: list[Tensor],
    tolerance: float,
    run: Callable[[TransformersRunner, list[list[int]]], list[Tensor]],
) -> bool:
    try:
        answered = run(runner, texts)
    except Exception as error:
        log.info("the %s backend does not fit this model: %s", runner.kv.name, error)
        return False
    finally:
        runner.keep([])
    pairs = zip(answered, expected, strict=True)
    return all(torch.allclose(one, other, rtol=0, atol=tolerance) for one, other in pairs)


def _as_the_engine_runs_it(runner: TransformersRunner, texts: list[list[int]]) -> list[Tensor]:
    """Rows join, one with a beginning that another ran, move, decode a token. Token logits as `_plain` gives them."""
    first, long, short = texts
    runner.add(1)
    before = runner.extend([0], [first[:-1]], None)
    runner.add(1)
    runner.extend([1], [long[:_CHUNK]], None)
    beginning = runner.read(1, 0, _CHUNK)
    runner.keep([0])
    runner.add(2)
    runner.write(1, beginning)
    before = torch.cat([before, _extend(runner, [1, 2], [long[_CHUNK:-1], short[:-1]])])
    order = [1, 2, 0]
    runner.keep(order)
    after = runner.extend(range(3), [texts[row][-1:] for row in order], None)
    return [torch.stack([before[row], after[order.index(row)]]) for row in range(3)]


def _by_row_then_together(runner: TransformersRunner, texts: list[list[int]]) -> list[Tensor]:
    """Each text in a row, the last tokens in one step. Token logits as `_plain` gives them."""
    runner.add(len(texts))
    before = [runner.extend([row], [text[:-1]], None) for row, text in enumerate(texts)]
    after = runner.extend(range(len(texts)), [text[-1:] for text in texts], None)
    return [torch.cat([one, other.unsqueeze(0)]) for one, other in zip(before, after, strict=True)]


def _one_at_a_time(runner: TransformersRunner, texts: list[list[int]]) -> list[Tensor]:
    answers = []
    for text in texts:
        runner.add(1)
        answers.append(torch.cat([runner.extend([0], [text[:-1]], None), runner.extend([0], [text[-1:]], None)]))
        runner.keep([])
    return answers


def _extend(runner: TransformersRunner, rows: list[int], tokens: list[list[int]]) -> Tensor:
    if runner.ragged:
        return runner.extend(rows, tokens, None)
    return torch.cat([runner.extend([row], [of_row], None) for row, of_row in zip(rows, tokens, strict=True)])
