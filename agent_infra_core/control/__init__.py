"""The control plane: does everything that may block, so the relay never has to."""
