"""`thumbwheel stage NAME` for the miniature workspace: what its dvc.yaml runs."""

import sys
from pathlib import Path

from flows.stage import Body, main

STAGES = {
    "grind": Body("tiny_grind"),
    "train": Body("tiny_child", (str(Path(__file__).with_name("tiny_child.py")),)),
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1], stages=STAGES))
