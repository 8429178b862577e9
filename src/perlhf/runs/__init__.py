"""Run directories: writing one (`run`), whose it is (`manifest`), reading it (`read`). Begin with `run`."""
