"""Figures, records and analysis of sessions, turns and replicas. Pure, except for the history."""
