"""What the system lets this process have of the machine's memory."""

import resource
from collections.abc import Iterator
from pathlib import Path

# (limit, in use, the part of memory.stat that is given back on demand) of cgroups v2 and v1
# (kernel documentation, admin-guide/cgroup-v2 and cgroup-v1/memory).
_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def free_bytes(sharing: int = 1) -> int:
    """Bytes that this process can still take.

    Args:
        sharing: processes that share what the machine has free, this one included.
    """
    import psutil

    free = min(psutil.virtual_memory().available, *_cgroups(Path("/"))) // sharing
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return free
    return max(0, min(free, limit - psutil.Process().memory_info().vms))


def _cgroups(root: Path) -> Iterator[int]:
    """Bytes left in each control group that this process is in, up to the whole machine's."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mount, names = root / "sys/fs/cgroup", _V2
        elif "memory" in controllers.split(","):
            mount, names = root / "sys/fs/cgroup/memory", _V1
        else:
            continue
        # In a container the path may be that of the machine outside; the mount itself is there.
        inner = mount / path.lstrip("/")
        for folder in (inner, *inner.parents):
            if folder.is_relative_to(mount):
                yield from _left(folder, *names)


def _left(folder: Path, limit: str, usage: str, reclaimable: str) -> Iterator[int]:
    try:
        most = (folder / limit).read_text().strip()
        used = int((folder / usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return
    if most.isdigit():
        yield max(0, int(most) - used + int(stat.get(reclaimable, 0)))
