"""Training: options, the loop and its losses, the state that a run goes on from, the model card that it leaves."""
