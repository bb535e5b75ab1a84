"""Generates text: `python infer.py --model PATH --prompt TEXT [--chat] [--temperature T] ...`; see
`--help`.
"""

import sys

from llama_jax.cli.infer import main
from llama_jax.cli.main import run_program

if __name__ == "__main__":
    sys.exit(run_program(lambda: main(sys.argv[1:], "infer.py")))
