"""One file per benchmark: every value of the paper with its source; and the tables it published."""

BENCHMARKS = ("commonsense", "metamath", "glue")  # the modules here that a launcher of the same name runs
