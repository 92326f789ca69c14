"""The one error that a user is meant to read."""


class UserError(Exception):
    """Bad input: one sentence that names the thing, where it is and what to do about it.

    The command line prints the sentence alone and exits with status 2.
    """
