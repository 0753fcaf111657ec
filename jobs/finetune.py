r"""What `ray job submit` starts for a fine-tune; takes the arguments of `orchestrator finetune`.

ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- \
    python jobs/finetune.py JOB.yaml --set output_dir=/mnt/shared/runs

Ray deletes the working directory that was sent when the job ends: an output_dir inside it is
refused.
"""

import sys
from pathlib import Path

# The working directory that was submitted holds the package; it need not be installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from orchestrator.cli import command

if __name__ == "__main__":
    command(["finetune", *sys.argv[1:]], "finetune.py")
