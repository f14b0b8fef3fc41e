"""Errors that a user can mend: the message alone says what is wrong and where, no traceback needed."""


class GradalignError(ValueError):
    """Something outside the program is not as expected; the message names the file or the setting."""


class DataError(GradalignError):
    """A protocol or a data set is not as expected."""


class AudioError(DataError):
    """An audio file is missing, unreadable, truncated, empty, not finite or of another sample rate."""


class CheckpointError(GradalignError):
    """A checkpoint is unreadable or does not fit the run or the model."""


class ConfigError(GradalignError):
    """A setting is unknown, of a wrong type or out of range."""
