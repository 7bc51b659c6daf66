"""What decides and touches nothing: no clock, no I/O, no logging; ``now`` is an argument."""
