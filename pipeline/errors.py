"""What a user did wrong or has to know: one line that says which file or key, and what to do."""


class UserError(Exception):
    """Shown as `error: ...` without a traceback; the process ends with exit code 1."""


class SharedError(UserError):
    """Raised by all workers of a training together; another attempt would end the same way, so none is made."""


class Terminated(KeyboardInterrupt):
    """The process was asked to end (SIGTERM, `ray job stop`): exit code 143."""
