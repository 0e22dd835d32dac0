"""The paper's figures of spectra, drawn from runs: entropy by layer, singular values, entropy by method and task.

Colours, names and order of the methods are told here once, for every picture of the project.
"""

from __future__ import annotations

# In the order of every legend and table. The colours are Okabe and Ito's and Tol's, told apart by the colour-blind, and
# seen on a white and on a black page.
COLOURS = {
    "lora": "#56B4E9",
    "dora": "#E69F00",
    "post_diag": "#999933",
    "prediag": "#009E73",
    "pre_ortho": "#CC79A7",
    "post_ortho": "#0072B2",
    "sora": "#D55E00",
    "full": "#777777",
    "lora_plus": "#AA4499",
    "oft": "#882255",
}
LABELS = {
    "lora": "LoRA",
    "dora": "DoRA",
    "post_diag": "Post-Diag",
    "prediag": "Pre-Diag",
    "pre_ortho": "Pre-Ortho",
    "post_ortho": "Post-Ortho",
    "sora": "SORA",
    "full": "full fine-tuning",
    "lora_plus": "LoRA+",
    "oft": "OFT",
}
