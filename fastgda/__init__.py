"""The student: rankings, ranker, losses, training, metrics, index and attribution (paper, section 3.3)."""
