"""What a report says at a given width, word by word."""

from __future__ import annotations

import io
import re
from collections import Counter

from rich.console import Console

WIDTHS = (60, 80, 112)
_RULES = re.compile(r"[\s│┃─━┌┐└┘├┤┬┴┼┏┓┗┛┡┩╇╈╋┳┻╸╺…]+")


def rendered(show, width, *, terminal=False):
    """The text that `show(console)` prints."""
    output = io.StringIO()
    show(Console(file=output, width=width, force_terminal=terminal, color_system=None))
    return output.getvalue()


def words_of(text):
    """Counts of its words, numbers included; rules between cells are none."""
    return Counter(word for word in _RULES.split(text) if word)


def assert_says(text, expected):
    """Every expected string is there with all its words, each as often as it is expected."""
    missing = words_of(" ".join(map(str, expected))) - words_of(text)
    assert not missing, f"{sorted(missing)} are missing or cut in:\n{text}"


def assert_fits(text, width):
    """No line is longer than the terminal."""
    assert max(map(len, text.splitlines())) <= width, text
