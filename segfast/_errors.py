"""The one error a command reports in a line and exit code 2."""


class UserError(Exception):
    """Something the caller of a command can put right: a path, a size, an option."""
