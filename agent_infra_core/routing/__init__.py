"""Routing: chooses the replica for a turn and orders the queue. Pure."""
