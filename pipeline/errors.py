"""What a user did wrong or has to know: one line that says which file or key, and what to do."""


class UserError(Exception):
    """Shown as `error: ...` without a traceback; the process ends with exit code 1."""
