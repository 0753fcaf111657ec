"""Workers that meet, on real gloo: each is a process of its own."""

import multiprocessing
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from orchestrator.errors import WorkerLostError
from orchestrator.training.collective import join

CPU = torch.device("cpu")


def _meet(rank: int, folder: str, nodes: int, dies: bool, said: Any) -> None:
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    store.set(f"ready{rank}", "")
    if dies:
        # Not while the other is still connecting: that is torch's part, not ours.
        store.wait([f"ready{1 - rank}"])
        os._exit(1)
    try:
        world = join(rank, 2, CPU, f"node{rank % nodes}", 60)
    except WorkerLostError as error:
        said.put((rank, str(error)))
    else:
        said.put((rank, (world.rank, world.size, world.nodes, world.beside)))


def _outcomes(folder: Path, dying: tuple[int, ...], nodes: int = 2) -> dict[int, Any]:
    context = multiprocessing.get_context("spawn")
    said = context.Queue()
    processes = [
        context.Process(
            target=_meet, args=(rank, str(folder), nodes, rank in dying, said), daemon=True
        )
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    found = dict(said.get(timeout=90) for _ in range(2 - len(dying)))
    for process in processes:
        process.join(30)
    return found


def test_workers_know_their_places_and_on_how_many_machines_they_are(tmp_path: Path) -> None:
    assert _outcomes(tmp_path, ()) == {0: (0, 2, 2, 1), 1: (1, 2, 2, 1)}


def test_workers_know_how_many_share_their_device(tmp_path: Path) -> None:
    assert _outcomes(tmp_path, (), nodes=1) == {0: (0, 2, 1, 2), 1: (1, 2, 1, 2)}


def test_a_worker_that_dies_before_all_have_met_is_lost(tmp_path: Path) -> None:
    assert "Another worker died" in _outcomes(tmp_path, (1,))[0]
