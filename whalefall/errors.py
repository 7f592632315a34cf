"""The errors a user can mend, told in one line."""


class UserError(Exception):
    """Something the user can mend: a wrong key, a missing file, a damaged shard.

    The message is one line that names what is wrong and what is allowed. The command line
    prints it without a traceback and exits with status 2; library callers catch it like any
    other exception.
    """
