"""`make bench`: what every benchmark measures on this machine, as one JSON line.

    python -m tests.benchmarks [PART]...

Each part is a module that prints one JSON line of its own when it is run alone, with options of
its own: `python -m tests.benchmarks.compare --steps 30`.
"""

import argparse
import json
import subprocess
import sys

from tests.benchmarks.material import finish

# part: its module
PARTS = {"step": "compare", "sweep": "sweeps", "scaling": "scaling"}


def main() -> None:
    """Run the named parts, or all, and print the line."""
    parser = argparse.ArgumentParser(description="Measure, and print one JSON line.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    chosen = parser.parse_args().parts or list(PARTS)
    unknown = [part for part in chosen if part not in PARTS]
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    print(json.dumps({part: _run(PARTS[part]) for part in chosen}))


def _run(module: str) -> object:
    command = [sys.executable, "-m", f"tests.benchmarks.{module}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return finish(process)


if __name__ == "__main__":
    main()
