"""The exceptions that users see: one clear sentence each, saying what was given, what was expected and what helps."""


class OspoError(Exception):
    """Something that the user can mend. The command line prints it and exits with code 1."""


class UsageError(OspoError):
    """A wrong argument, configuration key or preset. The command line prints it and exits with code 2."""


class OpError(OspoError, ValueError):
    """Tensors that an operation cannot take; names the operation, the argument, what it got and what it expects."""
