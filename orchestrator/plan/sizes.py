"""Byte counts as people write them."""

from pydantic import ByteSize, TypeAdapter, ValidationError

from orchestrator.errors import RefusedError

_READER = TypeAdapter(ByteSize)


def parse_bytes(text: str) -> int:
    """Bytes of a text such as `48GiB`, `80 GB` or `50000000000`.

    Raises:
        RefusedError: the text is no size.
    """
    try:
        size = int(_READER.validate_python(text))
    except ValidationError:
        size = 0
    if size <= 0:
        raise RefusedError(f"{text!r} is no memory size; write it like 48GiB, 80GB or 24576MiB")
    return size


def show_bytes(count: float) -> str:
    """A byte count for a person, such as `7.41 GiB` or `64 MiB`."""
    if count >= 2**30:
        return f"{count / 2**30:.2f} GiB"
    return f"{count / 2**20:.0f} MiB"
