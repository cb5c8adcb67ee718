"""Text from outside, as an error shows it."""


def shown(value: object, limit: int = 80) -> str:
    """The first line of a text: at most `limit` characters, those that don't print written as escapes."""
    text = str(value)
    first, *rest = text[: 4 * limit].strip().splitlines() or [""]
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in first)
    is_cut = len(plain) > limit or len(text) > 4 * limit or any(line.strip() for line in rest)
    return f"{plain[:limit].rstrip()}..." if is_cut else plain


def told(error: BaseException, limit: int = 160) -> str:
    """An exception as a sentence: its type, and the first line of its message."""
    message = shown(error, limit)
    sentence = f"{type(error).__name__}: {message}" if message else type(error).__name__
    return sentence if sentence.endswith((".", "!", "?")) else f"{sentence}."
