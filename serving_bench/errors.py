"""The one error that ends a benchmark with a message instead of a traceback."""


class BenchError(Exception):
    """What went wrong, in one line, with the log file's name where there is one."""


class Interrupted(BaseException):
    """A signal asked us to stop. Not an Exception, so that no handler swallows it.

    `signum` is the signal's number; the exit code is 128 + signum, as shells have it.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum
