"""One file per benchmark: every value of the paper with its source."""
