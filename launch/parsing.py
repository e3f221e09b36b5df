"""Command-line arguments to dataclasses, with tyro; a mistake becomes one line and exit code 2."""

from __future__ import annotations

import contextlib
import difflib
import io
from collections.abc import Iterable, Sequence
from typing import TypeVar

import tyro

T = TypeVar("T")


def parse(kind: type[T], arguments: Sequence[str], *, program: str, default: T | None = None) -> T:
    """An instance of dataclass `kind` from `arguments`; prints the help and exits on `--help`.

    Raises:
        ValueError: what tyro found wrong, as one line with its suggestion.
    """
    if any(argument in ("-h", "--help") for argument in arguments):
        return _cli(kind, arguments, program, default)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return _cli(kind, arguments, program, default)
    except SystemExit:
        raise ValueError(f"{_one_line(said.getvalue())} (all flags: {program} --help)") from None


def closest(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the known word most like `word`, or nothing."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""


def _cli(kind: type[T], arguments: Sequence[str], program: str, default: T | None) -> T:
    if default is None:
        return tyro.cli(kind, args=list(arguments), prog=program)
    return tyro.cli(kind, args=list(arguments), prog=program, default=default)


def _one_line(box: str) -> str:
    """The words in tyro's framed error: its first paragraph, and the first flag it suggests."""
    lines = [line.strip("│╭╮╰╯ ").rstrip() for line in box.splitlines()]
    paragraphs: list[list[str]] = [[]]
    for line in lines[1:]:
        if set(line.strip()) <= {"─", "-"}:
            paragraphs.append([])
        else:
            paragraphs[-1].append(line.strip())
    found = [" ".join(paragraph).strip() for paragraph in paragraphs if paragraph]
    text = found[0].rstrip(".") if found else " ".join(box.split())
    for paragraph in paragraphs[1:]:
        if paragraph and paragraph[0].startswith("Perhaps you meant") and len(paragraph) > 1:
            text += f"; did you mean {paragraph[1].split()[0]}?"
    return text
