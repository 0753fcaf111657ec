"""URIs of object stores as texts."""

from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

# What says where a store is; all else in a query may be a secret.
_SHOWN = ("region", "scheme", "endpoint_override")


def below(uri: str, name: str) -> str:
    """The URI of what lies under another, without credentials."""
    parts = urlsplit(uri)
    query = urlencode([(key, value) for key, value in parse_qsl(parts.query) if key in _SHOWN])
    path = f"{parts.path.rstrip('/')}/{quote(name)}"
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], path, query, ""))
