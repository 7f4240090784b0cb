"""Numbers and hostile text as people read them, the same in the terminal and in the report."""

from __future__ import annotations


def bytes_text(count: float) -> str:
    """Decimal units, three digits: 21.5 kB. What travels is counted like this by every network tool."""
    return _scaled(count, 1000.0, ("B", "kB", "MB", "GB", "TB", "PB"))


def memory_text(count: float) -> str:
    """Binary units, three digits: 3.41 GiB."""
    return _scaled(count, 1024.0, ("B", "KiB", "MiB", "GiB", "TiB"))


def _scaled(count: float, step: float, units: tuple[str, ...]) -> str:
    value, index = float(count), 0
    while abs(value) >= step * 0.9995 and index < len(units) - 1:
        value, index = value / step, index + 1
    if index == 0:
        return f"{value:.0f} {units[0]}"
    return f"{value:.{2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0}f} {units[index]}"


def count_text(count: float) -> str:
    """1,234 below ten thousand, then 12.3 k, 4.56 M."""
    if abs(count) < 10_000:
        return f"{count:,.0f}"
    for limit, unit in ((1e6, "k"), (1e9, "M"), (1e12, "B")):
        if abs(count) < limit * 0.9995:
            value = count / (limit / 1000)
            return f"{value:.{2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0}f} {unit}"
    return f"{count / 1e12:.2f} T"


def counted(count: int, noun: str) -> str:
    """1 round, 2 rounds, 1,200 rounds."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def tokens_text(tokens: int, trained: int) -> str:
    """7,861 tokens, of which 1,919 (24.4%) are trained: without padding; those are trained that have a loss."""
    return f"{counted(tokens, 'token')}, of which {trained:,} ({trained / max(tokens, 1):.1%}) are trained"


def times_of(count: int) -> str:
    """never, once, 2 times."""
    return {0: "never", 1: "once"}.get(count, f"{count:,} times")


def times_text(factor: float) -> str:
    """A ratio: 3.4×, 57×, 1,240×."""
    return (f"{factor:.1f}" if factor < 9.95 else f"{factor:,.0f}") + "\N{MULTIPLICATION SIGN}"


def seconds_text(seconds: float) -> str:
    """0.35 ms, 0.45 s, 12.3 s, 2 min 41 s, 1 h 05 min, 3.6 days."""
    if 0 < seconds < 0.0995:
        return f"{seconds * 1000:.{1 if seconds >= 0.00995 else 2}f} ms"
    if seconds < 9.995:
        return f"{seconds:.2f} s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 172_800:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{seconds / 86_400:.1f} days"


def clock_text(seconds: float) -> str:
    """Minutes and seconds for tables: 2:41."""
    whole = max(0, int(seconds))
    return (
        f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"
        if whole >= 3600
        else f"{whole // 60}:{whole % 60:02d}"
    )


def sol_text(lamports: int) -> str:
    """Lamports as SOL without trailing zeros: 0.0012 SOL."""
    text = f"{lamports / 1e9:.9f}".rstrip("0").rstrip(".")
    return f"{text} SOL"


def short(identifier: str, head: int = 6, tail: int = 4) -> str:
    """Shorten an address or hash in the middle: 9f3c07…a1b2."""
    return identifier if len(identifier) <= head + tail + 1 else f"{identifier[:head]}…{identifier[-tail:]}"


def printable(text: str, limit: int = 500) -> str:
    """Return ``text`` on one line, without control characters, and not longer than ``limit``.

    Peers choose part of what is logged; an escape sequence must not reach a terminal, nor a direction override a page.
    """
    clean = "".join(character if character.isprintable() else _visible(character) for character in text[: limit + 1])
    return clean if len(text) <= limit else clean[: limit - 1] + "…"


def _visible(character: str) -> str:
    return " " if character in "\n\r\t" else "\N{REPLACEMENT CHARACTER}"
