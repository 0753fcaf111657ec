"""Taking secrets out of texts before they are written anywhere."""

import os
import re

_HIDDEN = "***"
_SECRET_NAME = re.compile(
    r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY|PRIVATE_KEY|CREDENTIAL", re.IGNORECASE
)
_SHORTEST = 6
_PATTERNS = (
    # user:password@ in a URI
    (re.compile(r"(?<=://)[^/\s@]+@"), f"{_HIDDEN}@"),
    # ?token=... and the like
    (
        re.compile(r"(?i)([?&;](?:[\w-]*(?:token|secret|password|key|signature|sig))=)[^&#\s]+"),
        rf"\g<1>{_HIDDEN}",
    ),
    (re.compile(r"\bhf_[A-Za-z0-9]{16,}"), _HIDDEN),
    (re.compile(r"\bsk-[A-Za-z0-9_-]{16,}"), _HIDDEN),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"), _HIDDEN),
)


def redact(text: str) -> str:
    """The text without passwords in URIs, tokens, and values of secret environment variables."""
    for value in _environment_secrets():
        text = text.replace(value, _HIDDEN)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def _environment_secrets() -> list[str]:
    """Longest first, so that no secret hides a part of another."""
    values = {
        value
        for name, value in os.environ.items()
        if _SECRET_NAME.search(name) and len(value) >= _SHORTEST and not _harmless(value)
    }
    return sorted(values, key=len, reverse=True)


def _harmless(value: str) -> bool:
    """Paths, numbers and switches (TOKENIZERS_PARALLELISM=false, a token's file) are no secrets."""
    return value.lower() in {"false", "true"} or value.isdigit() or os.path.exists(value)
