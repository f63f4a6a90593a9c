"""The teacher: source models, diffusion loss, curvature, unlearning and influence (paper, sections 3.1-3.2)."""
