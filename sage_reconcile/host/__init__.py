"""What touches the machine and decides nothing: one room for each outside thing."""
