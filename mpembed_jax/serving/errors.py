"""The error of serving files."""


class ServingError(RuntimeError):
    """Raised if a file is damaged, cut short, of another program or of a newer version.

    The message names the file, and the table if the error is about one.
    """
