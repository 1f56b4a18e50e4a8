"""What a user did wrong or has to know: one line that says which file or key, and what to do."""

LONGEST_LINE = 500


class UserError(Exception):
    """Shown as `error: ...` without a traceback; the process ends with exit code 1."""


class SharedError(UserError):
    """Raised by all workers of a training together; another attempt would end the same way, so none is made."""


class Terminated(KeyboardInterrupt):
    """The process was asked to end (SIGTERM, `ray job stop`): exit code 143."""


def last_line(error: BaseException) -> str:
    """What an error says in the end, as long as a person reads."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip()[:LONGEST_LINE] if lines else type(error).__name__
