"""Errors that are the user's to mend: one line saying what was given, what was expected, what to do."""


class InputError(ValueError):
    """Wrong input: a config value, a file, a prompt. Programs print its one line and exit with status 2."""


class CorruptError(InputError):
    """A file of ours (checkpoint, token file) whose content contradicts its own header."""
