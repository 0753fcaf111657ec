"""Taking secrets out of texts before they are written anywhere."""

import os
import re

_HIDDEN = "***"
# TOKENS and TOKENIZERS count and configure; TOKEN is a secret.
_SECRET_NAME = re.compile(
    r"TOKEN(?!S|IZ)|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY|PRIVATE_KEY|CREDENTIAL",
    re.IGNORECASE,
)
_SHORTEST = 6
_PATTERNS = (
    # user:password@ in a URI, up to the last @ of its authority
    (re.compile(r"(?<=://)[^/\s?#]+@"), f"{_HIDDEN}@"),
    # ?token=... and the like
    (
        re.compile(
            r"(?i)([?&;][\w.-]*(?:token|secret|password|passwd|key|credential|signature|sig)=)"
            r"[^&#\s\"']+"
        ),
        rf"\g<1>{_HIDDEN}",
    ),
    (re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{8,}"), rf"\g<1> {_HIDDEN}"),
    (re.compile(r"\bhf_[A-Za-z0-9]{16,}"), _HIDDEN),
    (re.compile(r"\bsk-[A-Za-z0-9_-]{16,}"), _HIDDEN),
    (re.compile(r"\bgh[oprsu]_[A-Za-z0-9]{16,}"), _HIDDEN),
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
    # Another thread may take a variable away meanwhile: MLflow's import does.
    pairs = [(name, os.environ.get(name, "")) for name in os.environ]
    values = {
        value
        for name, value in pairs
        if len(value) >= _SHORTEST and _SECRET_NAME.search(name) and not _is_file(value)
    }
    return sorted(values, key=len, reverse=True)


def _is_file(value: str) -> bool:
    """A variable such as GOOGLE_APPLICATION_CREDENTIALS names a file, which is no secret."""
    return os.path.isabs(value) and os.path.exists(value)
