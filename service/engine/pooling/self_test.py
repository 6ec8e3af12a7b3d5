"""Finds out at load whether a model answers padded rows, each with a head of its own, as it does each text alone."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from adapters.factors import AdapterFactors
from adapters.layers import AdaptedModel
from adapters.low_rank import LowRankBatch
from adapters.quantized import holds_quantized
from service.engine.base_model import BaseModelError
from service.engine.pooling.runner import PooledText, Readout, TransformersPoolingRunner
from service.engine.quantization import mixes_rows, rounds_to

log = logging.getLogger(__name__)

# Rows may differ from the plain forward by this much, relative to the largest number.
_TOLERANCE = 1e-3
_OF_QUANTIZED = 0.1  # alone: with activations that are rounded too, what is masked may round otherwise
_LENGTHS = (5, 12, 3, 5)


def choose_pooling_runner(
    adapted: AdaptedModel, device: torch.device, vocabulary: int, readout: Readout, pad: int | None
) -> tuple[TransformersPoolingRunner, bool]:
    """The fastest runner that is right for this model, and whether texts may be batched at all.

    Raises BaseModelError for a model that cannot read a text.
    """
    name = type(adapted.model).__name__
    texts = _texts(vocabulary, pad)
    probes = [_probe(adapted, row) for row in range(len(texts))]
    try:
        with adapted.finding_siblings():
            first = _plain(adapted, device, readout, texts[0], probes[0])
        rest = zip(texts[1:], probes[1:], strict=True)
        expected = [first, *(_plain(adapted, device, readout, text, probe) for text, probe in rest)]
    except Exception as error:
        raise BaseModelError(f"{name} cannot be served: reading a text, it fails with: {error}") from error
    largest = max(float(each.abs().max()) for each in expected)
    tolerance = max(_TOLERANCE, 16 * torch.finfo(rounds_to(adapted.model)).eps) * largest
    for ragged in () if mixes_rows(adapted.model) else (True, False):
        runner = TransformersPoolingRunner(adapted, device, readout, pad=pad, ragged=ragged)
        if _agrees(runner, texts, probes, expected, tolerance):
            return runner, True
    log.warning("%s answers differently in batches: running one row at a time", name)
    if any(holds_quantized(module) for module in adapted.model.modules()):
        tolerance = _OF_QUANTIZED * largest
    alone = TransformersPoolingRunner(adapted, device, readout, pad=pad, ragged=False)
    if not all(_agrees(alone, [t], [p], [e], tolerance) for t, p, e in zip(texts, probes, expected, strict=True)):
        raise BaseModelError(f"{name} cannot be served: it answers differently when it is told a text's length")
    return alone, False


def _texts(vocabulary: int, pad: int | None) -> list[PooledText]:
    generator = torch.Generator().manual_seed(0)
    known = torch.tensor([token for token in range(vocabulary) if token != pad])
    return [PooledText(known[torch.randint(len(known), (n,), generator=generator)].tolist()) for n in _LENGTHS]


def _probe(adapted: AdaptedModel, row: int) -> AdapterFactors | None:
    """An adapter for one row of a classifier: all that the base lacks, and a head with more labels than the base's."""
    head = adapted.head
    if head is None:
        return None
    generator = torch.Generator().manual_seed(row)
    replaced: dict[str, dict[str, Tensor]] = {}
    for name in sorted(head.untrained | {f"{head.output}.{each}" for each in head.parameters}):
        own, (owner, _, attribute) = adapted.tensor(name), name.rpartition(".")
        assert own is not None
        shape = (head.labels + row, *own.shape[1:]) if owner == head.output else own.shape
        # Not zeros, which would answer alike whatever went before them.
        replaced.setdefault(owner, {})[attribute] = torch.randn(shape, generator=generator).to(own)
    return AdapterFactors(f"probe {row}", {}, replaced)


@torch.inference_mode()
def _plain(
    adapted: AdaptedModel, device: torch.device, readout: Readout, text: PooledText, probe: AdapterFactors | None
) -> Tensor:
    """What the model answers to a text alone that it is told nothing about, [width]."""
    tokens = torch.tensor([text.tokens], device=device)
    with adapted.using(_batch([probe])):
        answer: Tensor = readout(adapted.model(input_ids=tokens), torch.ones_like(tokens))
    return answer[0].float().cpu()


def _agrees(
    runner: TransformersPoolingRunner,
    texts: Sequence[PooledText],
    probes: Sequence[AdapterFactors | None],
    expected: Sequence[Tensor],
    tolerance: float,
) -> bool:
    together: list[list[int]] = [list(range(len(texts)))]
    if not runner.ragged:
        lengths = {len(text.tokens) for text in texts}
        together = [[i for i, text in enumerate(texts) if len(text.tokens) == length] for length in lengths]
    try:
        for rows in together:
            answered = runner.run([texts[i] for i in rows], _batch([probes[i] for i in rows]))
            for i, row in zip(rows, answered, strict=True):
                if not torch.allclose(row[: len(expected[i])], expected[i], rtol=0, atol=tolerance):
                    return False
    except Exception as error:
        log.info("texts cannot be read together: %s", error)
        return False
    return True


def _batch(probes: Sequence[AdapterFactors | None]) -> LowRankBatch | None:
    present = [probe for probe in probes if probe is not None]
    return LowRankBatch(present, torch.eye(len(present))) if present else None
