"""`vblora-serve replay RECEIPT`: recomputes an answer with transformers and PEFT, offline.

What the receipt says is checked first: its own id, the adapters' digests, the base's fingerprint, the prompt's hash.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from service.api.errors import ApiError
from service.api.guidance import Guidance
from service.api.schemas.receipt import Receipt, ReceiptChoice
from service.commands import CommandError
from service.commands.base import check_model
from service.commands.output import say, show_facts, show_json
from service.commands.progress import counting, working
from service.commands.replay_evidence import (
    Evidence,
    Mismatch,
    check_complete,
    find_adapters,
    find_prompt,
    read_evidence,
)
from service.commands.replay_model import WeightedDirectory, check_peft, continuation, with_adapters
from service.commands.replay_tokens import ChoiceReplay, Terms, TokenDifference, replay_choice
from service.engine.base_model import (
    DTYPES,
    BaseModelError,
    Pretrained,
    fingerprint_of,
    load_pretrained,
    pick_device,
)
from service.engine.guide import Grammar, GrammarFailed
from service.engine.quantization import CHOICES, NONE
from service.engine.tokenizer import TextTokenizer


@dataclass(frozen=True, slots=True)
class ReplayOptions:
    """`adapters` are (name in the receipt, directory)."""

    receipt: Path
    model: str
    adapters: tuple[tuple[str, Path], ...]
    prompt_file: Path | None
    device: str
    as_json: bool


def run(options: ReplayOptions) -> int:
    """0 if the answer is what the receipt says, 1 if anything differs. Raises UsageError, CommandError."""
    evidence = read_evidence(options.receipt)
    adapters, foreign = find_adapters(evidence.receipt, options.adapters)
    check_complete(evidence.receipt, options.prompt_file)
    check_model(options.model)
    mismatches = [*evidence.mismatches, *foreign]
    choices: list[ChoiceReplay] = []
    tokenizer: TextTokenizer | None = None
    if not mismatches:
        if adapters:
            check_peft()
        base = _load(options.model, evidence.receipt, options.device)
        tokenizer = TextTokenizer(base.tokenizer, base.vocabulary)
        prompt_ids, foreign_prompt = find_prompt(evidence.receipt, options.prompt_file, tokenizer)
        mismatches = [each for each in (_other_base(evidence.receipt, base), foreign_prompt) if each is not None]
        if not mismatches:
            choices = _replay(evidence, base, tokenizer, prompt_ids, adapters)
    equal = not mismatches and all(choice.equal for choice in choices)
    if options.as_json:
        show_json(
            {
                "receipt": evidence.receipt.id,
                "equal": equal,
                "mismatches": [asdict(mismatch) for mismatch in mismatches],
                "choices": [asdict(choice) for choice in choices],
            }
        )
    else:
        _show(evidence.receipt, mismatches, choices, tokenizer)
    return 0 if equal else 1


def _load(model: str, receipt: Receipt, device: str) -> Pretrained:
    """The base model in the receipt's dtype, quantized as it was there."""
    if receipt.base.dtype not in DTYPES:
        raise CommandError(f"the receipt's dtype is {receipt.base.dtype!r}, which is none of {', '.join(DTYPES)}")
    asked = receipt.base.quantization if receipt.base.quantization in CHOICES else NONE  # else the checkpoint's own
    with working(f"Loading {model}"):
        try:
            return load_pretrained(model, dtype=receipt.base.dtype, device=pick_device(device), quantization=asked)
        except BaseModelError as error:
            raise CommandError(str(error)) from error


def _other_base(receipt: Receipt, base: Pretrained) -> Mismatch | None:
    fingerprint = fingerprint_of(base.model)
    if fingerprint == receipt.base.fingerprint:
        return None
    return Mismatch(
        "base",
        f"the base model was {receipt.base.id} with the fingerprint {receipt.base.fingerprint}; this one's is "
        f"{fingerprint}",
    )


def _replay(
    evidence: Evidence,
    base: Pretrained,
    tokenizer: TextTokenizer,
    prompt_ids: tuple[int, ...],
    adapters: Sequence[WeightedDirectory],
) -> list[ChoiceReplay]:
    receipt = evidence.receipt
    terms = Terms(
        prompt_ids=prompt_ids,
        params=receipt.sampling.params(),
        eos_token_ids=frozenset(receipt.sampling.eos_token_ids),
        decoder=tokenizer,
        grammar=_grammar(receipt, base),
    )
    _check_tokens(terms, evidence, base.vocabulary)
    device = base.model.device
    with tempfile.TemporaryDirectory(prefix="vblora-replay-") as scratch:
        with working("Loading the adapters"):
            model = with_adapters(base.model, adapters, receipt.selection.mode, Path(scratch))
        try:
            with counting("Recomputing the answer", sum(choice.tokens for choice in receipt.choices)) as advance:
                return [
                    replay_choice(continuation(model, device), terms, choice, output, advance)
                    for choice, output in zip(receipt.choices, evidence.outputs, strict=True)
                ]
        except GrammarFailed as error:
            raise CommandError(f"the grammar of the receipt cannot be followed: {error}") from error


def _grammar(receipt: Receipt, base: Pretrained) -> Grammar | None:
    grammar = receipt.sampling.grammar
    if grammar is None:
        return None
    assert grammar.source is not None, "checked before"
    try:
        return Guidance(base.tokenizer, base.vocabulary, base.eos_token_ids).grammar(grammar.source)
    except ApiError as error:
        raise CommandError(error.message) from error


def _check_tokens(terms: Terms, evidence: Evidence, vocabulary: int) -> None:
    """No server issued such a receipt, but anybody may have written it."""
    biased = [token_id for token_id, _ in terms.params.logit_bias]
    outputs = [token_id for output in evidence.outputs for token_id in output or ()]
    if not terms.prompt_ids:
        raise CommandError("the receipt's prompt has no tokens")
    if not all(0 <= token_id < vocabulary for token_id in (*terms.prompt_ids, *biased, *outputs)):
        raise CommandError(f"the receipt holds a token id outside the vocabulary (0 to {vocabulary - 1})")


def _show(
    receipt: Receipt,
    mismatches: Sequence[Mismatch],
    choices: Sequence[ChoiceReplay],
    tokenizer: TextTokenizer | None,
) -> None:
    adapters = ", ".join(f"{each.name} × {each.weight:g}" for each in receipt.selection.adapters)
    show_facts(
        [
            ("receipt", receipt.id),
            ("base", f"{receipt.base.id}, {receipt.base.fingerprint}, {receipt.base.dtype}"),
            ("adapters", adapters or "none"),
            ("ran", f"{receipt.selection.mode}, on {receipt.base.device}"),
        ]
    )
    for mismatch in mismatches:
        say(f"differs: {mismatch.message}")
    for choice, said in zip(choices, receipt.choices, strict=False):  # none where something else differs
        say(f"choice {choice.index}: {_outcome(choice, said, tokenizer)}")


def _outcome(choice: ChoiceReplay, said: ReceiptChoice, tokenizer: TextTokenizer | None) -> str:
    if choice.equal:
        return f"equal, {choice.tokens} tokens, {choice.finish_reason}"
    if choice.difference is not None:
        return _where(choice.difference, tokenizer)
    return (
        f"differs: {choice.tokens} tokens, {choice.finish_reason}, and the receipt has {said.tokens}, "
        f"{said.finish_reason}; where, only the token ids would show"
    )


def _where(difference: TokenDifference, tokenizer: TextTokenizer | None) -> str:
    def named(token: int | None) -> str:
        if token is None:
            return "ends"
        return f"has {token} ({tokenizer.token_text(token)!r})" if tokenizer else f"has {token}"

    text = f"differs at token {difference.position}: the receipt {named(difference.receipt)}, "
    text += f"the replay {named(difference.replay)}"
    return text if difference.margin is None else f"{text}, {difference.margin:+.3g} in log-probability"
