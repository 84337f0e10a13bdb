"""The errors a user can cause, each with the exit code a launcher reads.

Every message says what was found, what was wanted, and which knob to turn.
`main` prints the message in one line and exits with `exit_code`; a launcher
restarts only on 75 or on a signal.
"""


class JaxalignError(Exception):
  """Base of all errors that carry an exit code."""

  exit_code = 1


class ConfigError(JaxalignError):
  """A knob, flag or name that cannot work (64, EX_USAGE)."""

  exit_code = 64


class DataError(JaxalignError):
  """Input data that is missing, broken or too small (65, EX_DATAERR)."""

  exit_code = 65


class WriteError(JaxalignError):
  """A file that could not be written, a full disk (73, EX_CANTCREAT)."""

  exit_code = 73


class CorruptError(JaxalignError):
  """A damaged artifact with no good copy left (74, EX_IOERR)."""

  exit_code = 74


class RestartError(JaxalignError):
  """Everything is saved; start the same command again (75, EX_TEMPFAIL)."""

  exit_code = 75


class NumericError(JaxalignError):
  """NaN or infinity where a number was needed (76)."""

  exit_code = 76
