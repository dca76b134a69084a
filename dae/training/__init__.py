"""The train step, the train state, the loop around them, and checkpoints."""
