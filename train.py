"""Trains a LLaMA: `python train.py --config configs/debug.yaml [--section.key value ...]`; see
`--help`.
"""

import pathlib
import sys

from llama_jax.cli.main import run_program
from llama_jax.cli.train import main

if __name__ == "__main__":
    default = pathlib.Path(__file__).parent / "configs" / "debug.yaml"
    sys.exit(run_program(lambda: main(sys.argv[1:], default)))
