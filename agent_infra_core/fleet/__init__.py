"""Replicas on this machine or on a Slurm cluster: what they run, where they go, how they start and end."""
