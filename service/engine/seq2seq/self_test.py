"""Finds out at load whether an encoder-decoder answers rows of a batch, padded and moved, as it does each alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from adapters.layers import AdaptedModel
from service.engine.base_model import BaseModelError
from service.engine.quantization import mixes_rows, rounds_to
from service.engine.seq2seq.base import DecodingRules
from service.engine.seq2seq.runner import Seq2SeqRunner

log = logging.getLogger(__name__)

# Rows may differ from the plain forward by this much, relative to the largest token logit.
_TOLERANCE = 1e-3
_PROMPTS = (5, 12, 3)
_OUTPUTS = (4, 2, 2)  # the first joins alone, two tokens ahead of the others

Pair = tuple[list[int], list[int]]  # a prompt and an output


def choose_seq2seq_runner(
    adapted: AdaptedModel, device: torch.device, vocabulary: int, budget: int, rules: DecodingRules
) -> tuple[Seq2SeqRunner, bool]:
    """A runner that is right for this model, and whether rows may be batched.

    Raises BaseModelError for a model that answers differently even alone, token by token.
    """
    name = type(adapted.model).__name__
    pairs = _pairs(vocabulary, rules.start)
    try:
        with adapted.finding_siblings():
            first = _plain(adapted, device, rules.start, *pairs[0])
        expected = [first, *(_plain(adapted, device, rules.start, *pair) for pair in pairs[1:])]
        runner = Seq2SeqRunner(adapted, device, budget, DecodingRules(rules.start))
    except Exception as error:
        raise BaseModelError(f"{name} cannot be served: reading a text, it fails with: {error}") from error
    eps = torch.finfo(rounds_to(adapted.model)).eps
    tolerance = max(_TOLERANCE, 16 * eps) * max(float(each.abs().max()) for each in expected)
    for run, batches in ((_joining, True), (_one_at_a_time, False)):
        if batches and mixes_rows(adapted.model):
            continue
        runner.ragged = batches
        if _agrees(runner, pairs, expected, tolerance, run):
            if not batches:
                log.warning("%s answers differently in batches: running one row at a time", name)
            runner.rules = rules
            return runner, batches
    raise BaseModelError(
        f"{name} cannot be served: token by token, with its keys and values cached, it answers differently than over a "
        "whole text; it may keep other states between tokens"
    )


def _pairs(vocabulary: int, start: int) -> list[Pair]:
    generator = torch.Generator().manual_seed(0)
    known = torch.tensor([token for token in range(vocabulary) if token != start])

    def text(length: int) -> list[int]:
        drawn: list[int] = known[torch.randint(len(known), (length,), generator=generator)].tolist()
        return drawn

    return [(text(prompt), text(output)) for prompt, output in zip(_PROMPTS, _OUTPUTS, strict=True)]


@torch.inference_mode()
def _plain(
    adapted: AdaptedModel, device: torch.device, start: int, prompt: Sequence[int], output: Sequence[int]
) -> Tensor:
    """Token logits [2, vocabulary] at the last two tokens of the output, without any cache."""
    answer = adapted.model(
        input_ids=torch.tensor([prompt], device=device),
        decoder_input_ids=torch.tensor([[start, *output]], device=device),
        use_cache=False,
    )
    token_logits: Tensor = answer.logits[0, -2:].float().cpu()
    return token_logits


def _agrees(
    runner: Seq2SeqRunner,
    pairs: Sequence[Pair],
    expected: Sequence[Tensor],
    tolerance: float,
    run: Callable[[Seq2SeqRunner, Sequence[Pair]], list[Tensor]],
) -> bool:
    try:
        answered = run(runner, pairs)
    except Exception as error:
        log.info("the model cannot be run so: %s", error)
        return False
    finally:
        runner.keep([])
    both = zip(answered, expected, strict=True)
    return all(torch.allclose(one, other, rtol=0, atol=tolerance) for one, other in both)


def _joining(runner: Seq2SeqRunner, pairs: Sequence[Pair]) -> list[Tensor]:
    """One row is two tokens ahead when the others join; all move. Token logits as `_plain` gives them."""
    prompts, outputs = zip(*pairs, strict=True)
    runner.add(1)
    for tokens in (prompts[0], outputs[0][:1], outputs[0][1:2]):
        runner.extend([0], [tokens], None)
    runner.add(2)
    runner.extend([1, 2], prompts[1:], None)
    before = runner.extend(range(3), [output[-2:-1] for output in outputs], None)
    order = [1, 2, 0]
    runner.keep(order)
    after = runner.extend(range(3), [outputs[row][-1:] for row in order], None)
    return [torch.stack([before[row], after[order.index(row)]]) for row in range(3)]


def _one_at_a_time(runner: Seq2SeqRunner, pairs: Sequence[Pair]) -> list[Tensor]:
    answers = []
    for prompt, output in pairs:
        runner.add(1)
        runner.extend([0], [prompt], None)
        steps = [runner.extend([0], [[token]], None) for token in output]
        answers.append(torch.cat(steps[-2:]))
        runner.keep([])
    return answers
