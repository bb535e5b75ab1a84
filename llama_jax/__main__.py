"""`python -m llama_jax VERB`."""

from llama_jax.cli.main import main

if __name__ == "__main__":
    main()
