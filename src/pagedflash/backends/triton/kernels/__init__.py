"""The kernels, and the stages they share: where keys are, what queries see, rotary, the online softmax."""
