"""What an error says to whoever typed the command: what is wrong and what to do, on one line."""

from __future__ import annotations

import errno

from adapters.errors import AdapterError
from service.commands import CommandError, UsageError
from service.engine.errors import EngineError
from service.logs import printable
from service.settings import DEBUG_VARIABLE, SettingsError

_REPORT_A_BUG = f"this is a bug in vblora-serve; set {DEBUG_VARIABLE}=1 for the traceback, and report it"
_TOLD = (AdapterError, EngineError, CommandError, UsageError, SettingsError)
_FILE_ERROR = "SafetensorError"  # by name: importing its module takes longer than most commands' help
_ADVICE = {
    errno.EEXIST: "give a path where nothing is in the way",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EISDIR: "give a file",
    errno.EACCES: "give a path that you may use, or change its permissions",
    errno.EPERM: "give a path that you may use, or change its permissions",
    errno.EROFS: "give a path that can be written",
    errno.ENOSPC: "make room, or give a path on another disk",
    errno.EDQUOT: "make room, or give a path on another disk",
}


def explain(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        text = _of_system(error)
    elif isinstance(error, FileExistsError):
        text = f"{error}; choose another path"
    elif type(error).__name__ == _FILE_ERROR:
        text = f"{error}; check the disk's room, and that the file is whole"
    elif isinstance(error, _TOLD):
        text = str(error)
    else:
        text = f"{type(error).__name__}: {error}; {_REPORT_A_BUG}"
    return printable(" ".join(text.split()))


def _of_system(error: OSError) -> str:
    text = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
    return f"{text}; {advice}" if (advice := _ADVICE.get(error.errno or 0)) else text
