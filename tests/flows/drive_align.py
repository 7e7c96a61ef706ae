"""Runs a flow in the current checkout, against its servers, and prints one JSON line about what came of it."""

import json
import os
import sys
from pathlib import Path

from flows import servers

os.environ.update(servers.environment(Path.cwd()))

from flows.align import align
from flows.retrain import retrain

if __name__ == "__main__":
    name, parameters = sys.argv[1], json.loads(sys.argv[2])
    state = {"align": align, "retrain": retrain}[name](**parameters, return_state=True)
    print(json.dumps({"type": state.type.value, "name": state.name, "message": state.message}))
