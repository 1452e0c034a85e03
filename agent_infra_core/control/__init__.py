"""The control plane: everything that may block, so that the relay never does."""
