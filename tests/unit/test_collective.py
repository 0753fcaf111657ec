"""What workers say to one another: real processes over gloo."""

import json
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from orchestrator.training.collective import World, join

WORKER = """
import json, sys
from pathlib import Path
import torch, torch.distributed as dist
from orchestrator.training.collective import World

rank, size, meeting = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
world = World(rank, size)
said = [[False, rank == 1], [False, False], [rank == 0, False]]
heard = []
for flags in said:
    world.ask = lambda: flags
    parts = [torch.full((3,), rank + 1.0), torch.full((2, 2), 10.0 * rank, dtype=torch.float64)]
    world.sum(parts)
    heard.append([part.flatten().tolist() for part in parts])
    if flags is not said[1]:
        heard.append(world.take_answers())
with world.together():
    own = world.alone()
import peft  # As in a run: long after the group was formed.
world.part()
own.sum(parts)
threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
gloo = any("gloo" in name for name in threads)
print(json.dumps([*heard, own.size, own.leads, dist.is_initialized(), gloo]))
"""


def test_flags_travel_with_the_sum_all_hear_the_same_and_part(tmp_path: Path) -> None:
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), "2", str(tmp_path / "meeting")],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outs = [worker.communicate(timeout=120)[0] for worker in workers]
    assert outs[0] == outs[1]
    sums = [[3.0] * 3, [10.0] * 4]
    # Nobody takes the second sum's answers: the third's come with them.
    flags = [[False, True], [True, False]]
    assert json.loads(outs[0]) == [sums, flags[0], sums, sums, flags[1], 1, True, False, False]
    assert [worker.returncode for worker in workers] == [0, 0]


def test_a_worker_alone_hears_itself() -> None:
    world, flags = World(), [True, False]
    assert world.take_answers() == []
    world.ask = lambda: flags
    world.sum([torch.ones(2)])
    flags = [False, False]
    world.sum([torch.ones(2)])
    assert world.take_answers() == [True, False]
    assert world.take_answers() == []


def test_a_worker_alone_leaves_its_group(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'own'}", rank=0, world_size=1)
    for _ in range(2):
        assert join(0, 1, torch.device("cpu"), "node", 20.0).size == 1
        assert not dist.is_initialized()
