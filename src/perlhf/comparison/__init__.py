"""A grid of runs beside one another (`grid`), and what it shows (`results`)."""
