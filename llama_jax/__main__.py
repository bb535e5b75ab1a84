"""`python -m llama_jax VERB`."""


def run() -> None:
    """Imported late, so that the package's root depends on no program."""
    from llama_jax.cli.main import main

    main()


if __name__ == "__main__":
    run()
