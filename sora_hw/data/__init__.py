"""Training data: reading, prompting, tokenising, and the embedded question set."""
