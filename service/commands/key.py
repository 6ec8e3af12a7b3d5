"""`vblora-serve key`: makes an API key, and its line for the server's key file, which holds the key's hash alone."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

from service.api.keys import KeyFileError, hash_key, parse_key_line
from service.commands import CommandError
from service.commands.output import complain, say

_PREFIX = "vb-"  # so that scanners for leaked secrets can tell it


def run(attributes: Sequence[tuple[str, str]], *, file: Path | None, hash_given: bool) -> int:
    """Prints the key and its line; with `file`, appends the line there and prints the key alone.

    With `hash_given` the key is read from stdin instead of made, and not printed. `attributes` are (name, value).
    """
    key = sys.stdin.readline().strip() if hash_given else _PREFIX + secrets.token_urlsafe(32)
    if not key:
        raise CommandError("there is no key on standard input: give it there, on one line")
    line = " ".join([f"sha256:{hash_key(key)}", *(f"{name}={value}" for name, value in attributes)])
    try:
        parse_key_line(f"{key} {line.partition(' ')[2]}")
    except ValueError as error:
        raise CommandError(f"the server would not read that key: {error}") from error
    if file is not None:
        append(file, line)
        complain(f"added to {file}; SIGHUP makes a running server read it anew")
    else:
        say(line)
    if not hash_given:
        complain("the key, which is kept nowhere:")
        say(key)
    return 0


def append(file: Path, line: str) -> None:
    """Adds a line to a key file, which is made for its owner alone. Raises CommandError for a file that is not one."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    with open(descriptor, "r+", encoding="utf-8") as opened:
        text = opened.read()
        for number, each in enumerate(text.splitlines(), 1):
            try:
                parse_key_line(each)
            except ValueError as error:
                raise CommandError(f"line {number} of {file} is no key: {error}") from KeyFileError(str(error))
        opened.write(("" if not text or text.endswith("\n") else "\n") + line + "\n")
