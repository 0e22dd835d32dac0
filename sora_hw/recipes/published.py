"""The paper's tables, in percent; GLUE's with the standard deviation over its seeds."""

# Table 2: DeBERTaV3-base.
GLUE = {
    "lora": {
        "rte": (86.63, 0.63),
        "mrpc": (91.25, 0.79),
        "stsb": (90.44, 0.36),
        "cola": (69.71, 0.51),
        "sst2": (96.21, 0.00),
        "qnli": (93.94, 0.40),
        "qqp": (91.80, 0.60),
    },
    "dora": {
        "rte": (86.83, 1.02),
        "mrpc": (92.15, 0.73),
        "stsb": (90.34, 0.41),
        "cola": (69.90, 0.45),
        "sst2": (96.25, 0.07),
        "qnli": (94.06, 0.27),
        "qqp": (92.38, 0.02),
    },
    "prediag": {
        "rte": (87.24, 1.67),
        "mrpc": (91.17, 0.25),
        "stsb": (90.50, 0.46),
        "cola": (71.19, 0.49),
        "sst2": (96.10, 0.20),
        "qnli": (94.04, 0.14),
        "qqp": (92.21, 0.03),
    },
    "sora": {
        "rte": (87.90, 0.42),
        "mrpc": (91.82, 1.02),
        "stsb": (90.79, 0.57),
        "cola": (70.80, 1.18),
        "sst2": (96.36, 0.12),
        "qnli": (94.30, 0.23),
        "qqp": (92.38, 0.06),
    },
}

# Table 5: the averages over GLUE. Pre-Ortho and Post-Ortho have no rows of their own.
GLUE_AVERAGE = {
    "lora": 88.57,
    "dora": 88.84,
    "prediag": 88.98,
    "pre_ortho": 87.76,
    "post_ortho": 88.93,
    "sora": 89.23,
}
