"""What a loss reads of the whole batch of an update, before its gradient."""

# Statistics and fields of Logps that a job computes; no loss may ask for more.
STATS = ("label", "z0")
EXTRAS = ()
