"""Lengths up to which a CPU fills rows, segments and chunks of tokens.

oneDNN compiles each bfloat16 product anew for each number of tokens and keeps what it compiled, and
a block of another size leaves a hole in the heap: with all lengths, sixty steps of SmolLM2-135M
took twice the memory and a quarter more time.
"""

# Rows of up to 1024 tokens have 16 lengths, each further doubling has 8.
_ROW_STEP, _ROW_STEPS = 64, 16
# Up to that limit a CPU's attention keeps a segment's probabilities for the backward pass: 3 to 5
# times faster than torch's flash kernel. Longer ones would pay for it in memory. They have 32.
_SEGMENT_STEP, DENSE_LIMIT = 16, 512
CHUNK_STEP = 64


def row_length(tokens: int, budget: int) -> int:
    """The length up to which a row is filled.

    Args:
        tokens: what it holds.
        budget: a row that is no longer is not filled beyond it.
    """
    step = max(_ROW_STEP, (1 << (tokens - 1).bit_length()) // _ROW_STEPS)
    length = -(-tokens // step) * step
    return length if tokens > budget else min(length, budget)


def row_lengths(budget: int) -> list[int]:
    """All lengths that rows of at most so many tokens are filled up to."""
    found, tokens = [], 0
    while tokens < budget:
        tokens = row_length(tokens + 1, budget)
        found.append(tokens)
    return found


def segment_length(tokens: int) -> int:
    """The length up to which one segment is filled for its attention's products."""
    step = _SEGMENT_STEP if tokens <= DENSE_LIMIT else _ROW_STEP
    return -(-tokens // step) * step


def chunk_length(tokens: int) -> int:
    """Tokens of a chunk of the loss of which so many fit into its memory."""
    return tokens - tokens % CHUNK_STEP if tokens > CHUNK_STEP else tokens
