"""What is known of sessions, turns and replicas, and what follows from it. Pure, except for the history."""
