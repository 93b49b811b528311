"""From the weights of a snapshot to losses, curvature, λ̂ and what makes it reliable."""
