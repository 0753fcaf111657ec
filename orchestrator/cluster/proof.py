"""The file by which workers tell that the run's folder is the driver's."""

from pathlib import Path


def proof_path(run_dir: Path, proof: str) -> Path:
    """Where the driver of an attempt leaves its proof."""
    return run_dir / f".shared-{proof}"
