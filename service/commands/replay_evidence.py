"""What a replay starts from: a receipt, the prompt and the adapters, each held against the receipt's hashes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from adapters.store import digest_of_files
from service.api.adapter_files import OPTIONAL_FILES, REQUIRED_FILES
from service.api.generation import encode_prompt
from service.api.receipt import canonical, hash_of_grammar, hash_of_tokens, id_of
from service.api.schemas.receipt import Receipt, ReceiptChoice
from service.commands import CommandError, UsageError
from service.commands.replay_model import WeightedDirectory
from service.engine.tokenizer import TextTokenizer


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Something that is not what the receipt says: `what` is receipt, adapter, base, prompt or output."""

    what: str
    message: str


@dataclass(frozen=True, slots=True)
class Evidence:
    """A receipt, and what its file says besides. `outputs` are the choices' token ids, None where they are unknown."""

    receipt: Receipt
    outputs: tuple[list[int] | None, ...]
    mismatches: tuple[Mismatch, ...]


def read_evidence(path: Path) -> Evidence:
    """Reads a receipt, or a whole answer that holds one. Raises UsageError for a file that is neither."""
    try:
        answer = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON: {error}") from error
    fields = answer.get("receipt", answer) if isinstance(answer, dict) else None
    if not isinstance(fields, dict):
        raise UsageError(f"{path} holds no receipt: give the receipt of an answer, or the whole answer")
    receipt = _parsed(fields, path)
    outputs = tuple(_output(choice, answer.get("choices")) for choice in receipt.choices)
    return Evidence(receipt, outputs, tuple(_contradictions(receipt, id_of(fields), outputs)))


def _parsed(fields: Mapping[str, Any], path: Path) -> Receipt:
    try:
        receipt = Receipt.model_validate(fields)
        canonical(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UsageError(f"{path} holds no receipt that this version reads: {where}: {first['msg']}") from error
    except ValueError as error:
        raise UsageError(f"{path} holds no receipt: {error}") from error
    return receipt


def _output(choice: ReceiptChoice, answered: Any) -> list[int] | None:
    """A choice's token ids: the receipt's own, or those of the answer around it, behind the prompt if it is echoed."""
    if choice.token_ids is not None:
        return choice.token_ids
    for each in answered if isinstance(answered, list) else ():
        ids = each.get("token_ids") if isinstance(each, dict) and each.get("index") == choice.index else None
        if isinstance(ids, list) and all(type(i) is int and abs(i) < 2**63 for i in ids):
            return ids[len(ids) - choice.tokens :] if choice.tokens <= len(ids) else ids
    return None


def _contradictions(receipt: Receipt, true_id: str, outputs: Sequence[list[int] | None]) -> Iterator[Mismatch]:
    """What in a receipt, or in the answer around it, cannot be as the server wrote it."""
    if receipt.id != true_id:
        yield Mismatch("receipt", f"the receipt was changed after it was issued: its content has the id {true_id}")
    for choice, output in zip(receipt.choices, outputs, strict=True):
        if output is not None and hash_of_tokens(output) != choice.sha256:
            yield Mismatch("output", f"the token ids of choice {choice.index} are not those that the receipt hashed")
    grammar = receipt.sampling.grammar
    if grammar is not None and grammar.source is not None and hash_of_grammar(grammar.source) != grammar.sha256:
        yield Mismatch("receipt", "the grammar is not the one that the receipt hashed")


def check_complete(receipt: Receipt, prompt: Path | None) -> None:
    """Raises UsageError for a receipt that leaves out what a replay needs and nobody gives."""
    if prompt is None and receipt.prompt.token_ids is None:
        raise UsageError(
            'the receipt holds only the hash of its prompt: give --prompt-file, or ask for "receipt": "full" next time'
        )
    grammar = receipt.sampling.grammar
    if grammar is not None and grammar.source is None:
        raise UsageError('the receipt holds only the hash of its grammar: ask for "receipt": "full" next time')


def find_adapters(
    receipt: Receipt, given: Sequence[tuple[str, Path]]
) -> tuple[list[WeightedDirectory], list[Mismatch]]:
    """The directories of the selection's adapters, told by their digests, and those that are other files.

    Raises UsageError for an adapter that is not given, or a directory that is not of the selection.
    """
    selected = receipt.selection.adapters
    if unknown := [name for name, _ in given if name not in {adapter.name for adapter in selected}]:
        raise UsageError(f"the receipt names no adapter {unknown[0]!r}: {_names(receipt)} ran")
    digests = [(name, directory, _digests(directory)) for name, directory in given]
    found, mismatches = [], []
    for adapter in selected:
        here = [(directory, own) for name, directory, own in digests if name == adapter.name]
        if not here:
            raise UsageError(f"the receipt ran {adapter.name!r}: say where it is with --adapter {adapter.name}=DIR")
        matching = [directory for directory, own in here if adapter.digest in own]
        if matching:
            found.append((matching[0], adapter.weight))
        else:
            directory, own = here[0]
            message = f"adapter {adapter.name!r} was {adapter.digest}; {directory} holds {own[0]}"
            mismatches.append(Mismatch("adapter", message))
    return found, mismatches


def _names(receipt: Receipt) -> str:
    return ", ".join(repr(adapter.name) for adapter in receipt.selection.adapters) or "the base model alone"


def _digests(directory: Path) -> list[str]:
    """What the directory may be stored as: with all that a store keeps first, then with less of what is optional."""
    if missing := [name for name in REQUIRED_FILES if not (directory / name).is_file()]:
        raise CommandError(f"{directory} has no {missing[0]}")
    optional = [name for name in OPTIONAL_FILES if (directory / name).is_file()]
    kept = [some for size in range(len(optional), -1, -1) for some in combinations(optional, size)]
    return [digest_of_files({name: (directory / name).resolve() for name in (*REQUIRED_FILES, *some)}) for some in kept]


def find_prompt(
    receipt: Receipt, given: Path | None, tokenizer: TextTokenizer
) -> tuple[tuple[int, ...], Mismatch | None]:
    """The prompt's token ids: from the file that is given, else from the receipt. Raises UsageError for no text."""
    candidates = [tuple(receipt.prompt.token_ids or ())] if given is None else _readings(given, tokenizer)
    for candidate in candidates:
        if hash_of_tokens(candidate) == receipt.prompt.sha256:
            return candidate, None
    return (), Mismatch("prompt", "the prompt is not the one that the receipt hashed")


def _readings(path: Path, tokenizer: TextTokenizer) -> Sequence[tuple[int, ...]]:
    """What a file may mean; the receipt's hash says which: token ids as JSON, or text, as prompts and chats encode it.

    Editors end a file with a newline, which the prompt need not have had.
    """
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8: {error}") from error
    texts = dict.fromkeys((text, text.removesuffix("\n")))
    readings = [encode_prompt(tokenizer, each) for each in texts if each or tokenizer.bos_token_id is not None]
    readings += [tuple(tokenizer.encode(each, add_special_tokens=False)) for each in texts]
    return [*_listed(text), *readings]


def _listed(text: str) -> Iterable[tuple[int, ...]]:
    try:
        ids = json.loads(text)
    except (ValueError, RecursionError):
        return
    if isinstance(ids, list) and all(type(i) is int and 0 <= i < 2**63 for i in ids):
        yield tuple(ids)
