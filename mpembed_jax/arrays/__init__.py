"""The jax idioms that everything stands on: gathers and scatters, loops over chunks, loop carries over a mesh."""
