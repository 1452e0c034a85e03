"""The code that runs beside the engine, from node.pyz. Standard library only, Python 3.10 or newer."""
