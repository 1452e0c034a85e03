"""HTTP as bytes in and values out: no sockets, no state of the relay. Pure."""
