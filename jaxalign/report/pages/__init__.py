"""The pages: `study` compares the arms of a job, `run` shows one arm."""
