"""The ways a run can end early that are not bugs."""

# Exit status of training that was told to stop and has saved (EX_TEMPFAIL): the same command goes on.
INTERRUPTED = 75


class UserError(ValueError):
    """Something the caller gave is wrong: the message names the thing, its value and the way out.

    A ``ValueError``, so that code which calls the library can catch it as one. The command line prints the message as
    one line and exits with 2.
    """


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its type where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)


class TrainingStopped(RuntimeError):
    """Training cannot go on (a non-finite loss, say): the message names the step and the last good checkpoint."""


class Interrupted(RuntimeError):
    """Training was told to stop by a signal, and has saved all it had: the same command goes on."""
