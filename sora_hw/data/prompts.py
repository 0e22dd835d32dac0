"""The prompt format of LLM-Adapters (Hu et al., 2023), byte for byte: indentation and trailing spaces included.

The paper's commonsense and math runs were trained and scored with it. The two spaces that end the first sentence in
training, and the single one in scoring, are the original's; a tokenizer sees the difference.
"""

from sora_hw.data.records import Record

INDENT = " " * 16
TASK = "Below is an instruction that describes a task"
REQUEST = "Write a response that appropriately completes the request."


def prompt(record: Record, for_training: bool) -> str:
    """Everything that stands before the answer, up to the indentation of the response's line."""
    if record.input:
        opening = f"{TASK}, paired with an input that provides further context. {REQUEST} "
        blocks = [("Instruction", record.instruction), ("Input", record.input), ("Response", "")]
    else:
        opening = f"{TASK}. {REQUEST}" + ("  " if for_training else " ")
        blocks = [("Instruction", record.instruction), ("Response", "")]
    separator = f"\n{INDENT}\n"
    return f"{opening}\n\n" + separator.join(f"{INDENT}### {title}:\n{INDENT}{text}" for title, text in blocks)


def training_text(record: Record) -> str:
    """The prompt followed by the output that is to be learned, without the end-of-text token."""
    return prompt(record, for_training=True) + record.output
