"""The errors that a user is meant to read."""


class UserError(Exception):
    """Bad input: one sentence that names the thing, where it is and what to do about it.

    The command line prints the sentence alone and exits with status 2.
    """


class DamagedData(UserError):
    """Part of a dataset cannot be read as it was written: a lost shard, changed bytes, a broken picture.

    What a dataset opened with a tolerance goes on after (`data.damage`).
    """
