"""GLUE's metrics: accuracy, Matthews' correlation for CoLA, Pearson's for STS-B."""

import numpy as np

from sora_hw.data.glue import GlueTask


def score(task: GlueTask, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The metric of `task` under its name, as a share: accuracy between 0 and 1, correlations between -1 and 1.

    logits: (samples, task.labels), for a regression the predicted numbers.
    labels: (samples,), the gold classes or numbers.
    """
    if task.metric == "pearson":
        return {"pearson": _pearson(logits[:, 0], labels)}
    from sklearn.metrics import accuracy_score, matthews_corrcoef  # takes a second or two, which every start would wait

    metric = {"accuracy": accuracy_score, "matthews": matthews_corrcoef}[task.metric]
    return {task.metric: float(metric(labels, logits.argmax(axis=1)))}


def _pearson(predicted: np.ndarray, labels: np.ndarray) -> float:
    """0 where one of them is constant: what does not vary tells nothing."""
    predicted, labels = predicted.astype(np.float64), labels.astype(np.float64)
    if predicted.std() == 0 or labels.std() == 0:
        return 0.0
    return float(np.corrcoef(predicted, labels)[0, 1])
