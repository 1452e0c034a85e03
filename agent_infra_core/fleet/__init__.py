"""Replicas on this machine or on a Slurm cluster: engines, placement, start and stop."""
