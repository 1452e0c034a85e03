"""The data plane: one gevent process that takes turns to replicas and answers to clients."""
