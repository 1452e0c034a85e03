"""HTTP parsing and encoding, without sockets or the relay's state. Pure."""
