"""How far data-parallel workers scale: the expected efficiency by GPUs, network and base.

python -m orchestrator.plan.scaling     prints the table of infra/README.md

The batch grows with the GPUs: each trains `TOKENS` of every step on the whole base and then sums
the adapter's float32 gradients with all others, which nothing overlaps.
"""

from dataclasses import dataclass
from functools import lru_cache

from orchestrator.config import DataConfig, JobConfig, ModelConfig
from orchestrator.plan.fit import Need, Settled
from orchestrator.plan.machine import Machine
from orchestrator.plan.parts import adapter_parameters, target_layers
from orchestrator.plan.shapes import Shape, read_shape
from orchestrator.plan.speed import operations

BASES = {
    "7B": "meta-llama/Llama-2-7b-hf",
    "70B": "meta-llama/Llama-3.1-70B",
    "405B": "meta-llama/Llama-3.1-405B",
}
RANKS = (16, 64)
GPUS = (8, 64, 512, 4096)
GIGABITS = (10, 100, 400)

# Assumed: what a GPU trains in a step, as examples of LENGTH tokens; layers are recomputed.
TOKENS, LENGTH = 16384, 2048
# An H100's dense bf16 operations per second (NVIDIA's data sheet), of which Llama 3's training
# reached 38 to 43% (arXiv 2407.21783, table 4). A slower GPU waits less, and scales better.
GPU_OPERATIONS = 0.4 * 989e12
# Seconds of a message between two machines, beside its bytes: what NCCL's own tuning takes for
# the ring over a network (src/graph/tuning.cc, `hwLat`, Simple).
HOP_SECONDS = 14e-6
# Share of a link's rate that an all-reduce gets. Measured with gloo and 19.5 MB among 2, 3 and 4
# processes over a loopback held to 1 Gbit/s (`tc`, tbf), MTU 1500: 0.94, 0.96 and 0.96.
LINK_SHARE = 0.94
# Mean over most tokens of a GPU, which all others wait for. Measured: 80 examples for each GPU, of
# GSM8K's lengths, dealt by `data.batches.deal` to 8 to 4096.
BALANCE = 0.9998


@dataclass(frozen=True)
class Step:
    """A step of one base and rank: a GPU's seconds for its own tokens, and the gradients' bytes."""

    seconds: float
    gradient_bytes: int


def ring_seconds(workers: int, count: int, rate: float, hop: float) -> float:
    """Seconds of a ring all-reduce.

    Reduce-scatter, then all-gather: each has workers - 1 rounds, in which every worker sends a
    share of 1 / workers (Patarasuk and Yuan, J. Parallel Distrib. Comput. 69, 2009; Thakur,
    Rabenseifner and Gropp, Int. J. High Perform. Comput. Appl. 19, 2005, section 4).

    Args:
        workers: who sum.
        count: bytes of what each has.
        rate: bytes per second between two neighbours.
        hop: seconds of a message beside its bytes.
    """
    return 2 * (workers - 1) * (hop + count / workers / rate)


def efficiency(step: Step, workers: int, rate: float, hop: float, balance: float) -> float:
    """Tokens per second of so many workers over those of as many that need not wait.

    Args:
        step: what each does.
        workers: how many.
        rate: bytes per second that an all-reduce gets of the network.
        hop: seconds of a message beside its bytes.
        balance: mean over most tokens of a worker.
    """
    waited = ring_seconds(workers, step.gradient_bytes, rate, hop)
    return step.seconds / (step.seconds / balance + waited)


def expected(base: str, rank: int, gpus: int, gigabits: float) -> float:
    """The efficiency of a cluster whose GPUs have a link of so many Gbit/s each."""
    rate = LINK_SHARE * gigabits * 1e9 / 8
    return efficiency(step_of(base, rank), gpus, rate, HOP_SECONDS, BALANCE)


def step_of(base: str, rank: int) -> Step:
    """A step on a GPU of the table, all linear layers adapted."""
    shape = _shape(base)
    job = JobConfig(
        name="scaling", model=ModelConfig(base=BASES[base]), data=DataConfig(train="rows.jsonl")
    )
    job = job.model_copy(update={"lora": job.lora.model_copy(update={"rank": rank})})
    gpu = Machine(cuda=True, memory=0, overhead=0, gpus=1, bfloat16=True, at_hand=False)
    need = Need(shape, gpu, job, trials=1, longest=LENGTH)
    seconds = TOKENS * operations(Settled(need, TOKENS, checkpointing=True)) / GPU_OPERATIONS
    layers = target_layers(shape, job.lora.target_modules)
    return Step(seconds, 4 * adapter_parameters(layers, rank))


def table() -> str:
    """The table in Markdown: a row for each base, rank and network, a column for each size."""
    head = ["base", "rank", "gradients", "step alone", "network", *(f"{n} GPUs" for n in GPUS)]
    lines = [head, ["---"] * len(head)]
    for base in BASES:
        for rank in RANKS:
            step = step_of(base, rank)
            size, seconds = f"{step.gradient_bytes / 1e6:.0f} MB", f"{step.seconds:.1f} s"
            for gigabits in GIGABITS:
                shares = [f"{expected(base, rank, n, gigabits):.2f}" for n in GPUS]
                lines.append([base, str(rank), size, seconds, f"{gigabits} Gbit/s", *shares])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@lru_cache(maxsize=len(BASES))
def _shape(base: str) -> Shape:
    return read_shape(ModelConfig(base=BASES[base]))


if __name__ == "__main__":
    print(table())
