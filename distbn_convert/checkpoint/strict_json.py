"""JSON from files that nobody vouches for: no key twice, no NaN, no bomb, no other encoding."""

from __future__ import annotations

import json
from typing import Any, NoReturn

__all__ = ["StrictJsonError", "parse_object"]


class StrictJsonError(ValueError):
    """What is wrong, as the end of a sentence whose subject is the text."""


def parse_object(text: bytes) -> dict[str, Any]:
    """Parse a JSON object in UTF-8.

    Raises:
        StrictJsonError: it is something else, a key occurs twice, or it holds half of a surrogate
            pair, which no other program could read.
    """
    try:
        decoded = text.decode()
        value = json.loads(decoded, object_pairs_hook=_unique, parse_constant=_no_constant)
        if "\\u" in decoded:
            json.dumps(value, ensure_ascii=False).encode()
    except StrictJsonError:
        raise
    except (ValueError, RecursionError) as error:
        raise StrictJsonError(f"is no valid JSON ({type(error).__name__})") from error
    if not isinstance(value, dict):
        raise StrictJsonError("is no JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise StrictJsonError(f"has the key {name!r} twice")
            seen.add(name)
    return result


def _no_constant(name: str) -> NoReturn:
    raise StrictJsonError(f"holds {name}, which JSON does not have")
