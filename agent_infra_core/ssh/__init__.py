"""SSH to a cluster: logins, host keys, and tunnels that are monitored and replaced."""
