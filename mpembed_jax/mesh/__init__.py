"""Stacks over a mesh of devices: the layout of rows and the exchange between shards in a step."""
