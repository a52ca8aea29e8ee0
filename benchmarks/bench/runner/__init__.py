"""The processes of benchmarks: a command with a time limit, the journal of one that measures, and the watch over it."""
