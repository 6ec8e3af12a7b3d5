"""The command line. Each subcommand's arguments have a module here; what it does is in `service.commands`, imported to
run it.

Exit codes: 0 done, 1 it could not be done, 2 it was asked for wrongly.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from service import __version__
from service.cli import (
    bench,
    blend,
    demo,
    doctor,
    export,
    init,
    inspect,
    key,
    merge,
    push,
    replay,
    serve,
    settings_doc,
)
from service.cli.command import PROGRAM, Command, Parser, add_command, did_you_mean
from service.cli.explain import explain
from service.commands import UsageError
from service.commands.progress import hidden_progress
from service.logs import quiet_libraries
from service.settings import DEBUG_VARIABLE, SettingsError

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130
COMMANDS: Sequence[Command] = tuple(
    module.COMMAND
    for module in (
        serve, demo, inspect, init, export, blend, merge, push, bench, replay, key, doctor, settings_doc,
    )
)  # fmt: skip
_OPTIONS = ("-h", "--help", "--version")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. Errors are one line on stderr."""
    quiet_libraries()
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()  # a reader that has left is noticed here, not when the interpreter ends
        return code
    except SystemExit as stop:  # --help and --version
        return stop.code if isinstance(stop.code, int) else EXIT_FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has left; Python would complain once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except Exception as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        print(f"error: {explain(error)}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, (UsageError, SettingsError)) else EXIT_FAILED


def _run(words: list[str]) -> int:
    parser = make_parser()
    if not words:
        parser.print_help(sys.stderr)
        return EXIT_USAGE
    if words[0] == "help":
        words = [*words[1:2], "--help"]
    if words[0].startswith("-") and words[0] not in _OPTIONS:
        raise parser.unknown(words[0])
    _check_command(words[0])
    args, unknown = parser.parse_known_args(words)
    if unknown:
        raise args.parser.unknown(unknown[0])
    with hidden_progress(bool(getattr(args, "json", False))):
        code: int = args.run(args)
    return code


def _check_command(word: str) -> None:
    names = [command.name for command in COMMANDS]
    if not word.startswith("-") and word not in names:
        text = f"there is no command {word!r}" + did_you_mean(word, names)
        raise UsageError(f"{text}; see {PROGRAM} --help")


def make_parser() -> Parser:
    parser = Parser(
        prog=PROGRAM,
        description="Serve many VB-LoRA adapters from one base model.",
        epilog=f"{PROGRAM} COMMAND --help says more of each. Exit code 0: done; 1: it could not be done; 2: it was "
        f"asked for wrongly. {DEBUG_VARIABLE}=1 adds tracebacks to errors.",
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    # `metavar` leaves commands without help, which are not for everyday use, out of the usage line too.
    commands = parser.add_subparsers(title="commands", required=True, dest="command", metavar="COMMAND")
    for command in COMMANDS:
        add_command(commands, command)
    return parser
