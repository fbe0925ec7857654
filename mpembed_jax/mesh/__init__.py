"""How a stack lies over devices, and what travels between them in a step."""
