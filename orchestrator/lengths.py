"""Lengths of rows, segments and chunks of tokens, on which plan, model and training agree.

A CPU fills them: oneDNN compiles each bfloat16 product anew for each number of tokens and keeps
what it compiled, and a block of another size leaves a hole in the heap: with all lengths, sixty
steps of SmolLM2-135M took twice the memory and a quarter more time.
"""

# Rows of up to 1024 tokens have 16 lengths, each further doubling has 8.
ROW_STEP, _ROW_STEPS = 64, 16
# Up to that limit a CPU's attention keeps a segment's probabilities for the backward pass: 3 to 5
# times faster than torch's flash kernel. Longer ones would pay for it in memory. They have 32.
_SEGMENT_STEP, DENSE_LIMIT = 16, 512
CHUNK_STEP = 64
# Bytes of logits that may exist at a time, as float32, unless a head says otherwise.
LOGITS_BYTES = 64 * 2**20
# Bytes of float32 scores that a CPU makes at a time: its caches hold them from one pass over them
# to the next.
SCORES_BYTES = 2 * 2**20
# Bytes of the head's weight that exist a second time where products run in another dtype.
_SLICE_BYTES = 16 * 2**20
_FLOAT32 = 4
_FEWEST_TOGETHER, _FEWEST_SCORED = 16, 8


def row_length(tokens: int, budget: int) -> int:
    """The length up to which a row is filled.

    Args:
        tokens: what it holds.
        budget: a row that is no longer is not filled beyond it.
    """
    step = max(ROW_STEP, (1 << (tokens - 1).bit_length()) // _ROW_STEPS)
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
    step = _SEGMENT_STEP if tokens <= DENSE_LIMIT else ROW_STEP
    return -(-tokens // step) * step


def chunk_length(vocabulary: int, filled: bool, logits_bytes: int = LOGITS_BYTES) -> int:
    """Tokens whose logits are computed together.

    Args:
        vocabulary: logits of a token.
        filled: whether a chunk of two steps or more is made of whole ones. A shorter one is not
            cut: each chunk reads all of the head's weight.
        logits_bytes: what a chunk's logits may take as float32.
    """
    tokens = max(_FEWEST_TOGETHER, logits_bytes // (_FLOAT32 * vocabulary))
    return tokens - tokens % CHUNK_STEP if filled and tokens >= 2 * CHUNK_STEP else tokens


def filled_chunk(tokens: int, chunk: int) -> int:
    """The length up to which so many tokens of a chunk are filled where products are compiled."""
    return min(chunk, -(-tokens // CHUNK_STEP) * CHUNK_STEP)


def block_length(vocabulary: int) -> int:
    """Tokens of a chunk whose float32 scores exist at a time on a CPU."""
    return max(_FEWEST_SCORED, SCORES_BYTES // (_FLOAT32 * vocabulary))


def slice_length(vocabulary: int, hidden: int, itemsize: int) -> int:
    """Rows of the head's weight (vocabulary, hidden) that are converted together.

    Args:
        vocabulary: how many there are.
        hidden: numbers of a row.
        itemsize: bytes of a number in the products' dtype.
    """
    return min(vocabulary, max(1, _SLICE_BYTES // (hidden * itemsize)))
