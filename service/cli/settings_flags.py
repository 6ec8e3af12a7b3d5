"""Flags for the server's settings, in their groups, and the settings that they, the variables and the file give."""

from __future__ import annotations

import argparse
from collections.abc import Container
from pathlib import Path
from typing import Any

from service.setting_groups import grouped
from service.settings import SETTINGS, Setting, Settings, load_settings

ALL = frozenset(setting.name for setting in SETTINGS)


def add_settings(parser: argparse.ArgumentParser, names: Container[str] = ALL) -> None:
    """Flags that stay out of the namespace unless they are given, so that variables and the file can speak."""
    parser.add_argument("--config", type=Path, metavar="FILE.toml", help="a file of settings")
    for title, settings in grouped():
        group = parser.add_argument_group(title)
        for setting in settings:
            if setting.name in names:
                _add(group, setting)


def _add(group: Any, setting: Setting) -> None:
    default = f" (default: {setting.default or 'none'})".replace("%", "%%")
    options: dict[str, Any] = {"dest": setting.name, "default": argparse.SUPPRESS, "help": setting.help + default}
    if bool in setting.kind.toml:
        group.add_argument(setting.flag, action=argparse.BooleanOptionalAction, **options)
    else:
        action = "append" if setting.repeatable else "store"
        group.add_argument(setting.flag, action=action, metavar=setting.kind.metavar, **options)


def settings_of(args: argparse.Namespace) -> Settings:
    """Raises SettingsError."""
    flags = {setting.name: getattr(args, setting.name) for setting in SETTINGS if hasattr(args, setting.name)}
    return load_settings(flags, config=args.config)
