"""Submit a run to Slurm: `python launch/submit.py +exp=NAME key=value ... --nodes N --gpus-per-node G`.

Checks the configuration as train.py does, shows the job script, sends it. `--help` lists the options, docs/slurm.md
explains them.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # this checkout, whichever one is installed
    from launch.job import main
    from nexa.errors import exit_on_user_error

    with exit_on_user_error():
        main(sys.argv[1:])
