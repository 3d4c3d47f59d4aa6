"""Training: the state, the step, the loop, and the checkpoints that let a killed run go on."""
