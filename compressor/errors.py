"""The one kind of error that a user can mend."""


class CompressorError(Exception):
    """Something the user can put right; the command line prints it without a traceback.

    The message says what was wrong, what was found and what would be right, in that order,
    and names the layer, the file or the recipe line.
    """
