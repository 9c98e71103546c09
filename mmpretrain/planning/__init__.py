"""What a run will take before it is started: memory, time, communication and data, from its config alone."""
