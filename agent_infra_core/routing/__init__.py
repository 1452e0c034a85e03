"""Which replica serves a turn, and which turn goes next. Pure."""
