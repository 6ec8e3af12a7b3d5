"""The command line. Every subcommand's arguments are here; what it does is in `service.commands`, imported to run it.

Exit codes: 0 done, 1 it could not be done, 2 it was asked for wrongly.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from adapters.errors import AdapterError
from service import __version__
from service.commands import CommandError, UsageError
from service.engine.errors import EngineError
from service.logs import printable, quiet_libraries
from service.setting_kinds import BYTES, ENDPOINT, SECONDS, STORE, Kind
from service.settings import (
    API_KEY_VARIABLE,
    DEBUG_VARIABLE,
    SETTINGS,
    Setting,
    Settings,
    SettingsError,
    load_api_key,
    load_settings,
)

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130
DEMO_SETTINGS = ("host", "port", "device", "data_dir", "log_format", "log_level")
MOST_PARALLEL = 64

_REPORT_A_BUG = f"this is a bug in vblora-serve; set {DEBUG_VARIABLE}=1 for the traceback, and report it"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. Errors are one line on stderr."""
    quiet_libraries()
    try:
        args, unknown = _parser().parse_known_args(argv)
        if unknown:
            raise UsageError(f"{unknown[0]} is not understood here; see vblora-serve {args.command} --help")
        code: int = args.run(args)
        sys.stdout.flush()  # a reader that has left is noticed here, not when the interpreter ends
        return code
    except SystemExit as stop:  # --help and --version
        return stop.code if isinstance(stop.code, int) else EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has left; Python would complain once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except Exception as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        print(f"error: {_explain(error)}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, (UsageError, SettingsError)) else EXIT_FAILED


def _explain(error: Exception) -> str:
    """What is wrong and what to do, on one line."""
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    elif isinstance(error, (AdapterError, EngineError, CommandError, UsageError, SettingsError, FileExistsError)):
        text = str(error)
    else:
        text = f"{type(error).__name__}: {error}; {_REPORT_A_BUG}"
    return printable(" ".join(text.split()))


class _Parser(argparse.ArgumentParser):
    """Raises UsageError where argparse prints its usage and exits, and never guesses at abbreviated flags."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="vblora-serve", description="Serve many VB-LoRA adapters from one base model.")
    parser.add_argument("--version", action="version", version=f"vblora-serve {__version__}")
    # `metavar` leaves commands without help, which are not for everyday use, out of the usage line too.
    commands = parser.add_subparsers(title="commands", required=True, dest="command", metavar="COMMAND")
    _add_serve(commands.add_parser("serve", help="start the server"))
    _add_demo(commands.add_parser("demo", help="serve the small model and the adapters that come with the package"))
    _add_inspect(commands.add_parser("inspect", help="validate an adapter and print its parameter count"))
    _add_init(commands.add_parser("init", help="write a fresh adapter for PEFT to train"))
    _add_export(commands.add_parser("export", help="convert an adapter: compact, full logits, or plain LoRA"))
    _add_blend(commands.add_parser("blend", help="make one adapter of a weighted sum of several"))
    _add_merge(commands.add_parser("merge", help="write the base model with adapters folded into its weights"))
    _add_push(commands.add_parser("push", help="upload many adapters to a server"))
    _add_replay(commands.add_parser("replay", help="recompute an answer from its receipt, with PEFT"))
    _add_key(commands.add_parser("key", help="make an API key"))
    _add_doctor(commands.add_parser("doctor", help="check the directory that adapters are kept in, and repair it"))
    commands.add_parser("settings-doc").set_defaults(run=_settings_doc)
    return parser


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.description = "Start the server. Every setting may also be a VBLORA_… variable or a key of --config."
    _add_settings(parser, SETTINGS)
    parser.set_defaults(run=_serve)


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.description = "Serve the small base model and the adapters that come with the package. Needs no network."
    parser.add_argument("--check", action="store_true", help="exit 1 unless every adapter writes in its own style")
    parser.add_argument("--no-serve", action="store_true", help="show what the adapters do, and end")
    _add_settings(parser, [setting for setting in SETTINGS if setting.name in DEMO_SETTINGS])
    parser.set_defaults(run=_demo)


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.description = "Validate an adapter directory as an upload would be, and print what is in it."
    parser.add_argument("directory", type=Path, metavar="DIR", help="a PEFT adapter directory")
    parser.add_argument("--model", help="hold it against this base model too (only its config is read)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_inspect)


def _add_init(parser: argparse.ArgumentParser) -> None:
    parser.description = "Write a fresh VB-LoRA adapter with full logits, which PEFT loads and trains."
    parser.add_argument("--model", required=True, help="the base model; only its config is read")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where to write the adapter")
    parser.add_argument("--dry-run", action="store_true", help="only print the parameter counts")
    for name, default, text in (
        ("r", 4, "the rank"),
        ("num-vectors", 256, "vectors in the bank"),
        ("vector-length", 256, "features of a vector; it must divide those of every layer adapted"),
        ("topk", 2, "vectors that are mixed into one tile"),
        ("seed", 0, "what the initial values are drawn from"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default: {default})")
    parser.add_argument(
        "--target-modules", metavar="WHICH", help="names with commas, a regular expression, or all-linear"
    )
    parser.add_argument("--init-vector-bank-bound", type=float, default=0.02, metavar="X", help="default: 0.02")
    parser.add_argument("--init-logits-std", type=float, default=0.1, metavar="X", help="default: 0.1")
    parser.add_argument("--base-name", metavar="ID", help="the base's name in the config (default: its Hub id, if any)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_init)


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.description = "Write an adapter compact, with full logits, or as plain LoRA, as a directory that PEFT loads."
    parser.add_argument("directory", type=Path, metavar="DIR", help="a PEFT adapter directory")
    parser.add_argument(
        "--format", required=True, choices=["topk", "logits", "lora"], help="topk: compact; lora: plain LoRA"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="where to write the adapter")
    parser.set_defaults(run=_export)


def _add_push(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Upload adapters to a server, those that it does not have already. Each is called as its directory. "
        f"The API key, if the server asks for one, comes from {API_KEY_VARIABLE} or --api-key-file."
    )
    parser.add_argument(
        "directories", type=Path, nargs="+", metavar="DIR", help="an adapter's directory, or one that holds some"
    )
    parser.add_argument("--url", required=True, help="the server, for example http://127.0.0.1:8000")
    parser.add_argument("--name", help="what to call the adapter, if there is only one")
    parser.add_argument("--replace", action="store_true", help="make a new version where the server has other files")
    parser.add_argument("--parallel", type=int, default=4, metavar="N", help="uploads at a time (default: 4)")
    parser.add_argument("--api-key-file", type=Path, metavar="PATH", help="a file whose first line is the API key")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_push)


def _add_replay(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Recompute an answer from its receipt with transformers and PEFT, and name the first token that differs. "
        "Exit code 0 if it is equal, 1 if anything differs."
    )
    parser.add_argument("receipt", type=Path, metavar="RECEIPT", help="a JSON file: the receipt, or the whole answer")
    parser.add_argument("--model", required=True, help="the base model: a directory, or a Hub id")
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="NAME=DIR", help="an adapter of the receipt (repeatable)"
    )
    parser.add_argument(
        "--prompt-file",
        type=Path,
        metavar="FILE",
        help="the prompt, as text or as a JSON list of token ids, where the receipt has only its hash",
    )
    parser.add_argument(
        "--device", default="auto", metavar="{auto,cpu,cuda}", help="what to compute on (default: auto)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_replay)


def _add_blend(parser: argparse.ArgumentParser) -> None:
    parser.description = "Write a weighted sum of adapters as one adapter, exactly, which PEFT loads."
    parser.add_argument("members", nargs="+", metavar="DIR[:WEIGHT]", help="an adapter directory and its weight (1)")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="where to write the adapter")
    parser.add_argument("--model", help="the base model: needed for adapters with biases or saved modules of their own")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_blend)


def _add_merge(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write the base model with a weighted sum of adapters folded into its weights, as a directory that "
        "transformers loads. Works tensor by tensor: the model need not fit into memory."
    )
    parser.add_argument("members", nargs="+", metavar="DIR[:WEIGHT]", help="an adapter directory and its weight (1)")
    parser.add_argument("--model", required=True, help="the base model: a directory or a Hub id")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="where to write the merged model")
    dtypes = ["auto", "float32", "bfloat16", "float16"]
    parser.add_argument("--dtype", default="auto", choices=dtypes, help="auto keeps the base's own (default: auto)")
    parser.add_argument("--shard-size", default="5GB", metavar="SIZE", help="of a file at most (default: 5GB)")
    parser.add_argument(
        "--base-alias", action="append", default=[], metavar="ID", help="another name of the base; may be repeated"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_merge)


def _add_key(parser: argparse.ArgumentParser) -> None:
    parser.description = "Make an API key, and the line for the server's --api-key-file: its hash and what it allows."
    parser.add_argument("--file", type=Path, metavar="FILE", help="append the line to this key file")
    parser.add_argument("--hash", action="store_true", help="read a key from stdin instead of making one")
    parser.add_argument("--name", metavar="LABEL", help="what logs call it (default: the first digits of its hash)")
    parser.add_argument(
        "--tenant", metavar="NAME", help="whose adapters it sees and changes (default: the shared ones)"
    )
    parser.add_argument("--scopes", metavar="infer,admin", help="what it may be used for (default: both)")
    parser.add_argument("--rate", metavar="N", help="requests a minute (default: no limit)")
    parser.add_argument("--concurrency", metavar="N", help="requests at once (default: no limit)")
    parser.set_defaults(run=_key)


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Check a server's data directory while no server runs on it, or a store that servers share while they do. "
        "Exit code 1: something is wrong."
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--data-dir", type=Path, metavar="PATH", help="the server's --data-dir")
    where.add_argument("--store", type=_parsed_as(STORE), metavar="URL", help="the servers' --store")
    parser.add_argument(
        "--store-endpoint", type=_parsed_as(ENDPOINT), metavar="URL", help="the servers' --store-endpoint"
    )
    parser.add_argument(
        "--grace-s", type=_parsed_as(SECONDS), default=3600.0, metavar="SECONDS",
        help="how long files of a shared store must have been without a name to be removed (default: 3600)",
    )  # fmt: skip
    parser.add_argument("--repair", action="store_true", help="mend it; nothing that is intact and named is removed")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_doctor)


def _add_settings(parser: argparse.ArgumentParser, settings: Iterable[Setting]) -> None:
    """Flags that stay out of the namespace unless they are given, so that variables and the file can speak."""
    parser.add_argument("--config", type=Path, metavar="FILE.toml", help="a file of settings")
    for setting in settings:
        default = f" (default: {setting.default or 'none'})".replace("%", "%%")
        options: dict[str, Any] = {"dest": setting.name, "default": argparse.SUPPRESS, "help": setting.help + default}
        if bool in setting.kind.toml:
            parser.add_argument(setting.flag, action=argparse.BooleanOptionalAction, **options)
        else:
            action = "append" if setting.repeatable else "store"
            parser.add_argument(setting.flag, action=action, metavar=setting.kind.metavar, **options)


def _settings(args: argparse.Namespace) -> Settings:
    flags = {setting.name: getattr(args, setting.name) for setting in SETTINGS if hasattr(args, setting.name)}
    return load_settings(flags, config=args.config)


def _serve(args: argparse.Namespace) -> int:
    settings = _settings(args)
    if settings.model is None:
        raise UsageError("no base model is given; set --model or VBLORA_MODEL to a directory or a Hub id")
    from service.commands import serve

    return serve.run(settings)


def _demo(args: argparse.Namespace) -> int:
    settings = _settings(args)
    from service.demo import run

    return run.main(settings, check=args.check, serve=not args.no_serve)


def _inspect(args: argparse.Namespace) -> int:
    from service.commands import inspect

    return inspect.run(args.directory, model=args.model, as_json=args.json)


def _init(args: argparse.Namespace) -> int:
    if args.output is None and not args.dry_run:
        raise UsageError("give --output DIR to write the adapter, or --dry-run to see its parameter counts")
    from service.commands import init

    names = ("r", "num_vectors", "vector_length", "topk", "init_vector_bank_bound", "init_logits_std")
    options = init.InitOptions(
        model=args.model,
        fields={name: getattr(args, name) for name in names},
        target_modules=args.target_modules,
        base_name=args.base_name,
        seed=args.seed,
        output=None if args.dry_run else args.output,
        as_json=args.json,
    )
    return init.run(options)


def _export(args: argparse.Namespace) -> int:
    from service.commands import export

    return export.run(args.directory, format=args.format, output=args.output)


def _push(args: argparse.Namespace) -> int:
    if not args.url.startswith(("http://", "https://")):
        raise UsageError(f"--url is {args.url!r}; give the server's address, such as http://127.0.0.1:8000")
    if not 1 <= args.parallel <= MOST_PARALLEL:
        raise UsageError(f"--parallel is {args.parallel}; give a number from 1 to {MOST_PARALLEL}")
    from service.commands import push

    options = push.PushOptions(
        directories=tuple(args.directories),
        url=args.url,
        name=args.name,
        replace=args.replace,
        parallel=args.parallel,
        api_key=load_api_key(args.api_key_file),
        as_json=args.json,
    )
    return push.run(options)


def _replay(args: argparse.Namespace) -> int:
    adapters = []
    for given in args.adapter:
        name, _, directory = given.partition("=")
        if not (name and directory):
            raise UsageError(f"--adapter is {given!r}; expected NAME=DIRECTORY")
        adapters.append((name, Path(directory)))
    from service.commands import replay

    options = replay.ReplayOptions(
        receipt=args.receipt,
        model=args.model,
        adapters=tuple(adapters),
        prompt_file=args.prompt_file,
        device=args.device,
        as_json=args.json,
    )
    return replay.run(options)


def _blend(args: argparse.Namespace) -> int:
    from service.commands import blend

    members = [blend.WeightedDirectory.parse(text) for text in args.members]
    return blend.run(members, output=args.output, model=args.model, as_json=args.json)


def _merge(args: argparse.Namespace) -> int:
    try:
        shard_bytes = BYTES.parse(args.shard_size)
    except ValueError:
        raise UsageError(f"--shard-size is {args.shard_size!r}; expected {BYTES.expected}") from None
    from service.commands import merge
    from service.commands.blend import WeightedDirectory

    options = merge.MergeOptions(
        model=args.model,
        members=tuple(WeightedDirectory.parse(text) for text in args.members),
        output=args.output,
        dtype=args.dtype,
        shard_bytes=shard_bytes,
        base_aliases=tuple(args.base_alias),
        as_json=args.json,
    )
    return merge.run(options)


def _key(args: argparse.Namespace) -> int:
    from service.commands import key

    names = ("name", "tenant", "scopes", "rate", "concurrency")
    attributes = [(name, getattr(args, name)) for name in names if getattr(args, name) is not None]
    return key.run(attributes, file=args.file, hash_given=args.hash)


def _parsed_as(kind: Kind) -> Callable[[str], Any]:
    """An argument's type: read as a setting of that kind is."""

    def parse(text: str) -> Any:
        try:
            return kind.parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is not {kind.expected}") from error

    return parse


def _doctor(args: argparse.Namespace) -> int:
    from service.commands import doctor

    if args.store is not None:
        return doctor.run_shared(
            args.store, args.store_endpoint, grace_s=args.grace_s, mend=args.repair, as_json=args.json
        )
    return doctor.run(args.data_dir, mend=args.repair, as_json=args.json)


def _settings_doc(args: argparse.Namespace) -> int:
    from service.commands import settings_doc

    return settings_doc.run()
