"""The peers' environments: TRL's three versions exclude each other, so each stands in a virtual environment of its own,
and so does Label Studio.

    python -m benchmarks.peers            # build all (a few hundred MB each), or those named

They lie in .thumbwheel/peers/, outside git, and are built anew when their pins change.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
FOLDER = CHECKOUT / ".thumbwheel" / "peers"
TORCH = "torch==2.13.0"
NEW = ("transformers==5.23.0", "accelerate==1.15.0", "datasets==5.2.0", "tokenizers==0.23.3", "numpy==2.4.6")
# trl 1.12.0 is the last release but one with trl.experimental.ppo that runs with these transformers; 1.13 has none.
# trl 0.11.4 is the last with PPOTrainer.step: it needs numpy 1 and the libraries of its time.
PINS: dict[str, tuple[str, ...]] = {
    "trl-1.16": (TORCH, "trl==1.16.0", *NEW),
    "trl-1.12": (TORCH, "trl==1.12.0", *NEW),
    "trl-0.11": (
        *(TORCH, "trl==0.11.4", "transformers==4.46.3", "accelerate==1.15.0"),
        *("datasets==3.6.0", "tokenizers==0.20.3", "numpy==1.26.4", "rich==13.9.4", "pyarrow==20.0.0"),
    ),
}
PEERS = {"label-studio": ("label-studio==1.23.2",)}  # of the feedback service: benchmarks.drills.peers


def python_of(name: str, folder: Path = FOLDER) -> Path:
    """The interpreter of a peer's environment, built first if it is absent or was built from other pins."""
    home = folder / name
    stamp = home / "pins.txt"
    pins = "\n".join({**PINS, **PEERS}[name]) + "\n"
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != pins:
        shutil.rmtree(home, ignore_errors=True)
        uv = [sys.executable, "-m", "uv"]
        interpreter = ["--python", str(home / "bin" / "python")]
        subprocess.run([*uv, "venv", "-q", "--python", sys.executable, str(home)], check=True)
        install = [*uv, "pip", "install", "-q", "--compile-bytecode", *find_links(), *interpreter]
        subprocess.run([*install, *{**PINS, **PEERS}[name]], check=True)
        stamp.write_text(pins, encoding="utf-8")
    return home / "bin" / "python"


def find_links() -> list[str]:
    """The folders of wheels that this machine's pip knows, as arguments for uv, which does not read pip's settings."""
    command = [sys.executable, "-m", "pip", "config", "get", "global.find-links"]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return [argument for place in found for argument in ("--find-links", place)]


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__.split("\n")[0])
    parser.add_argument(
        "names", nargs="*", choices=[[], *PINS, *PEERS], metavar="NAME", help=", ".join((*PINS, *PEERS))
    )
    for name in parser.parse_args().names or (*PINS, *PEERS):
        print(f"{name}: {python_of(name)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
