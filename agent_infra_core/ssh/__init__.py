"""SSH to a cluster: logging in, host keys, and tunnels that are watched and replaced."""
