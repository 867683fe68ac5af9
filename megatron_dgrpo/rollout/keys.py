"""The key of engines that are given by address, in a file that only its owner can read."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from megatron_dgrpo.errors import ConfigError

MIN_CHARACTERS = 32


def key_problem(path: str) -> str:
    """Why a file cannot serve as a key; nothing if it can."""
    make = f"make one with `(umask 077; openssl rand -hex 32 > {path})`, the same on both sides"
    try:
        status = os.stat(path)
        text = Path(path).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        return f"{path} cannot be read as a key ({error}); {make}"
    if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        return f"{path} can be read by others (mode {stat.S_IMODE(status.st_mode):04o}); chmod 600 {path}"
    if status.st_uid not in (os.getuid(), 0):
        return f"{path} belongs to another user (uid {status.st_uid}); {make}"
    if len(text) < MIN_CHARACTERS or not text.isprintable() or " " in text:
        return f"{path} holds no key of {MIN_CHARACTERS} characters or more; {make}"
    return ""


def read_key(path: str) -> str:
    if problem := key_problem(path):
        raise ConfigError(f"key_file: {problem}")
    return Path(path).read_text(encoding="ascii").strip()
