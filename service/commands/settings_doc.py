"""`vblora-serve settings-doc`: docs/settings.md, made from the settings themselves."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

from service.setting_groups import grouped
from service.settings import Setting

INTRODUCTION = """\
# Settings

Written by `vblora-serve settings-doc`; do not edit by hand.

Every setting of `vblora-serve serve` is a flag, a variable, and a key of the TOML file that `--config` (or
`VBLORA_CONFIG`) names. A flag wins over a variable, a variable over the file, the file over the default. An unknown
variable that begins with `VBLORA_`, and an unknown key of the file, are errors. `VBLORA_DEBUG=1` adds tracebacks to
error messages; `VBLORA_API_KEY` is what `vblora-serve push` and `bench` send.

A flag marked ✱ may be given several times; its variable is a list with commas, its key of the file an array. Sizes
are written as `512MiB`, `2GiB` or `1000000` (`MB` is 1000 × 1000 bytes, `MiB` 1024 × 1024). Relative paths start at
the working directory.

```toml
model = "org/name"
max_batch_size = 32
adapter_memory = "4GiB"
adapter = ["sql=/adapters/sql", "style=/adapters/style"]
```
"""


def run() -> int:
    sys.stdout.write(render())
    return 0


def render() -> str:
    """The text of docs/settings.md."""
    return "\n".join([INTRODUCTION, *_tables()])


def _tables() -> Iterator[str]:
    for title, settings in grouped():
        yield f"## {title[0].upper()}{title[1:]}\n"
        yield from _table(settings)
        yield ""


def _table(settings: Iterable[Setting]) -> Iterator[str]:
    yield "| setting | flag | variable | default | what it does |"
    yield "| --- | --- | --- | --- | --- |"
    for setting in settings:
        flag = f"`{_flag(setting)}`" + (" ✱" if setting.repeatable else "")
        default = setting.default or "none"
        values = f" One of {_options(setting)}." if _options(setting) else ""
        yield f"| `{setting.name}` | {flag} | `{setting.variable}` | {default} | {setting.help}{values} |"


def _flag(setting: Setting) -> str:
    return f"{setting.flag} {setting.kind.metavar}".strip() if not _options(setting) else setting.flag


def _options(setting: Setting) -> str:
    metavar = setting.kind.metavar
    return ", ".join(f"`{option}`" for option in metavar.strip("{}").split(",")) if metavar.startswith("{") else ""
